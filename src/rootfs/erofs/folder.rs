//! Folders: blocks of sorted entries.
//!
//! Each block stands alone: the entries (12 bytes each: inode number, offset of the name, type),
//! then the names without terminators, the last one ending at the block's or the folder's end or at
//! a zero byte. Names ascend as bytes within and across blocks, `.` and `..` among them, because the
//! kernel finds a name by bisection.

use crate::rootfs::erofs::BLOCK;

/// `struct erofs_dirent`, in bytes.
const ENTRY: usize = 12;

/// An entry of a folder.
#[derive(Clone, Copy, Debug)]
pub(super) struct Dirent<'a> {
    pub(super) name: &'a [u8],
    pub(super) nid: u64,
    /// `EROFS_FT_*`, the same as `FT_*` of the kernel.
    pub(super) file_type: u8,
}

/// Merges `.` and `..` into `names`, which ascend.
pub(super) fn with_dots<'a, T: Copy>(
    names: impl Iterator<Item = (&'a [u8], T)>,
    this: T,
    parent: T,
) -> impl Iterator<Item = (&'a [u8], T)> {
    let mut dots = [(&b"."[..], this), (&b".."[..], parent)].into_iter().peekable();
    let mut names = names.peekable();
    std::iter::from_fn(move || match (dots.peek(), names.peek()) {
        (Some((dot, _)), Some((name, _))) if dot < name => dots.next(),
        (_, Some(_)) => names.next(),
        (Some(_), None) => dots.next(),
        (None, None) => None,
    })
}

/// The size of a folder whose names have these lengths, in order, in bytes.
pub(super) fn size(lengths: impl Iterator<Item = usize>) -> u64 {
    let (mut full, mut used) = (0, 0);
    for length in lengths {
        if used + ENTRY + length > BLOCK {
            full += BLOCK as u64;
            used = 0;
        }
        used += ENTRY + length;
    }
    full + used as u64
}

/// The content of a folder.
pub(super) fn encode(entries: &[Dirent<'_>]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut rest = entries;
    while !rest.is_empty() {
        bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
        let mut used = 0;
        let fitting = rest.iter().take_while(|entry| {
            used += ENTRY + entry.name.len();
            used <= BLOCK
        });
        let (block, after) = rest.split_at(fitting.count());
        encode_block(&mut bytes, block);
        rest = after;
    }
    bytes
}

fn encode_block(bytes: &mut Vec<u8>, entries: &[Dirent<'_>]) {
    let mut name_offset = entries.len() * ENTRY;
    for entry in entries {
        bytes.extend_from_slice(&entry.nid.to_le_bytes());
        bytes.extend_from_slice(&(name_offset as u16).to_le_bytes());
        bytes.extend_from_slice(&[entry.file_type, 0]);
        name_offset += entry.name.len();
    }
    entries.iter().for_each(|entry| bytes.extend_from_slice(entry.name));
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    /// Reads a folder back by the rules of the format.
    fn decode(bytes: &[u8]) -> Vec<(Vec<u8>, u64)> {
        let mut found = Vec::new();
        for block in bytes.chunks(BLOCK) {
            let offset = |index: usize| usize::from(u16::from_le_bytes([block[index * ENTRY + 8], block[index * ENTRY + 9]]));
            let count = offset(0) / ENTRY;
            for index in 0..count {
                let name = match index + 1 < count {
                    true => &block[offset(index)..offset(index + 1)],
                    false => block[offset(index)..].split(|byte| *byte == 0).next().unwrap(),
                };
                found.push((name.to_vec(), u64::from_le_bytes(block[index * ENTRY..][..8].try_into().unwrap())));
            }
        }
        found
    }

    proptest! {
        #[test]
        fn names_come_back_in_order_and_the_size_is_as_planned(
            names in proptest::collection::btree_set(proptest::collection::vec(1..=255_u8, 1..=255), 0..200)
        ) {
            let names: BTreeSet<Vec<u8>> = names.into_iter().filter(|name| name != b"." && name != b"..").collect();
            let numbered = names.iter().zip(3..).map(|(name, nid)| (name.as_slice(), nid));
            let all: Vec<_> = with_dots(numbered, 1, 2).collect();
            let entries: Vec<_> = all.iter().map(|&(name, nid)| Dirent { name, nid, file_type: 1 }).collect();
            let bytes = encode(&entries);
            prop_assert_eq!(bytes.len() as u64, size(all.iter().map(|(name, _)| name.len())));
            let expected: Vec<_> = all.iter().map(|&(name, nid)| (name.to_vec(), nid)).collect();
            prop_assert!(expected.is_sorted());
            prop_assert_eq!(decode(&bytes), expected);
        }
    }
}
