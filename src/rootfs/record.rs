//! The end of a joined file: which contents belong behind it, so that a file found later can be told to fit them.
//!
//! ```text
//! diff id (32), blocks (u32)   of each content, in order
//! zeros                        so that the record ends with a block
//! contents, blocks (u32 each)  how many there are; length of the joined file, this record included
//! "kilnjoin"
//! sha256                       of the record before it
//! ```
//!
//! Together with the superblock's checksum it says that the file was written to its end, and by whom.

use std::fs::File;
use std::io;
use std::io::Read;
use std::os::unix::fs::FileExt;

use crate::image::Digest;
use crate::rootfs::erofs;
use crate::rootfs::erofs::BLOCK;

const MAGIC: [u8; 8] = *b"kilnjoin";
const CONTENT: usize = 32 + 4;
const TAIL: usize = 4 + 4 + 8 + 32;

/// More contents than an image has layers; what a damaged file can make this host read is bounded by it.
const MAX_CONTENTS: usize = 4096;

/// A content that a joined file refers to, and its length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Content {
    pub(super) diff_id: Digest,
    pub(super) blocks: u32,
}

/// What a joined file says about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Joined {
    pub(super) contents: Vec<Content>,
    /// Length of the joined file itself.
    pub(super) blocks: u32,
}

/// How many blocks the record of so many contents takes.
const fn record_blocks(contents: usize) -> usize {
    (contents * CONTENT + TAIL).div_ceil(BLOCK)
}

/// The record of a joined file whose metadata takes `blocks`; `None` if that is more than the format can hold.
pub(super) fn encode(contents: &[Content], blocks: u32) -> Option<Vec<u8>> {
    let size = record_blocks(contents.len());
    let total = blocks.checked_add(u32::try_from(size).ok()?)?;
    let mut bytes = Vec::with_capacity(size * BLOCK);
    for content in contents {
        bytes.extend_from_slice(content.diff_id.as_bytes());
        bytes.extend_from_slice(&content.blocks.to_le_bytes());
    }
    bytes.resize(size * BLOCK - TAIL, 0);
    bytes.extend_from_slice(&u32::try_from(contents.len()).ok()?.to_le_bytes());
    bytes.extend_from_slice(&total.to_le_bytes());
    bytes.extend_from_slice(&MAGIC);
    let checksum = Digest::of(&bytes);
    bytes.extend_from_slice(checksum.as_bytes());
    Some(bytes)
}

/// What `file` says about itself; `None` if it is not a whole joined file. Blocking.
pub(super) fn read(file: &mut File) -> io::Result<Option<Joined>> {
    let length = file.metadata()?.len();
    let mut block0 = [0; BLOCK];
    if length % BLOCK as u64 != 0 || length < 2 * BLOCK as u64 {
        return Ok(None);
    }
    file.read_exact(&mut block0)?;
    let Some(flat_blocks) = erofs::superblock_blocks(&block0) else { return Ok(None) };
    let mut tail = [0; TAIL];
    file.read_exact_at(&mut tail, length - TAIL as u64)?;
    let contents = word(&tail) as usize;
    let size = record_blocks(contents.min(MAX_CONTENTS)) * BLOCK;
    if contents > MAX_CONTENTS || size as u64 > length {
        return Ok(None);
    }
    let mut record = vec![0; size];
    file.read_exact_at(&mut record, length - size as u64)?;
    let joined = decode(&record, contents);
    Ok(joined.filter(|joined| {
        let flat =
            joined.contents.iter().fold(u64::from(joined.blocks), |sum, content| sum + u64::from(content.blocks));
        u64::from(joined.blocks) * BLOCK as u64 == length && flat == u64::from(flat_blocks)
    }))
}

fn decode(record: &[u8], contents: usize) -> Option<Joined> {
    let (signed, checksum) = record.split_last_chunk::<32>()?;
    let (rest, magic) = signed.split_last_chunk::<8>()?;
    let (_, blocks) = rest.split_last_chunk::<4>()?;
    if *magic != MAGIC || Digest::of(signed).as_bytes() != checksum {
        return None;
    }
    let content = |bytes: &[u8]| {
        let (diff_id, blocks) = bytes.split_first_chunk::<32>()?;
        Some(Content { diff_id: Digest::from_bytes(*diff_id), blocks: word(blocks) })
    };
    let contents = record.chunks_exact(CONTENT).take(contents).map(content).collect::<Option<_>>()?;
    Some(Joined { contents, blocks: u32::from_le_bytes(*blocks) })
}

/// The number at the start of `bytes`, of which there are four.
fn word(bytes: &[u8]) -> u32 {
    bytes.iter().take(4).rev().fold(0, |word, byte| word << 8 | u32::from(*byte))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn a_record_comes_back_and_damage_is_noticed(
            lengths in proptest::collection::vec(any::<u32>(), 0..300), at in any::<prop::sample::Index>(), change in 1..=255_u8,
        ) {
            let content = |blocks: &u32| Content { diff_id: Digest::of(&blocks.to_le_bytes()), blocks: *blocks };
            let contents: Vec<_> = lengths.iter().map(content).collect();
            let mut bytes = encode(&contents, 7).unwrap();
            prop_assert_eq!(bytes.len() % BLOCK, 0);
            let blocks = 7 + (bytes.len() / BLOCK) as u32;
            prop_assert_eq!(decode(&bytes, contents.len()), Some(Joined { contents, blocks }));
            let at = at.index(bytes.len());
            bytes[at] ^= change;
            prop_assert_eq!(decode(&bytes, lengths.len()), None);
        }

        #[test]
        fn any_bytes_are_a_record_or_none(bytes in proptest::collection::vec(any::<u8>(), 0..5000), contents in 0..200_usize) {
            let mut signed = bytes;
            signed.extend_from_slice(&MAGIC);
            let checksum = Digest::of(&signed);
            signed.extend_from_slice(checksum.as_bytes());
            let _ = decode(&signed, contents);
        }
    }
}
