//! Memory to a sparse file and its digests, and back to what changed since: pages of zeros become holes.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use sha2::{Digest as _, Sha256};

use super::manifest::CHUNK;
use super::manifest::DIGEST_LEN;
use super::manifest::EXTENTS_MAX;
use crate::mem::Extent;
use crate::mem::GuestRam;
use crate::mem::is_zero;
use crate::mem::write_data;
use crate::units::PAGE_SIZE;

const PAGE: usize = PAGE_SIZE as usize;

/// The digest of a chunk; of one of zeros only it is zeros, so that holes need not be read to be digested.
type ChunkDigest = [u8; DIGEST_LEN as usize];

/// The chunks of a memory of `size` bytes.
fn chunks(size: u64) -> impl Iterator<Item = Extent> {
    (0..size).step_by(CHUNK as usize).map(move |offset| Extent { offset, len: CHUNK.min(size - offset) })
}

/// What of `extents` lies in `chunk`.
fn parts(extents: &[Extent], chunk: Extent) -> impl Iterator<Item = Extent> {
    let first = extents.partition_point(|extent| extent.end() <= chunk.offset);
    extents[first..].iter().take_while(move |extent| extent.offset < chunk.end()).map(move |extent| {
        let offset = extent.offset.max(chunk.offset);
        Extent { offset, len: extent.end().min(chunk.end()) - offset }
    })
}

/// Writes `extents` of `ram`, ascending, to the same offsets of `file`, which is one hole as large as the memory.
/// Returns the digests of the file's chunks, one after the other.
pub(super) fn write(ram: &GuestRam, extents: &[Extent], file: &File) -> io::Result<Vec<u8>> {
    let mut digests = Vec::new();
    let mut buffer = vec![0; CHUNK.min(ram.size().0) as usize];
    for chunk in chunks(ram.size().0) {
        let bytes = &mut buffer[..chunk.len as usize];
        bytes.fill(0);
        for part in parts(extents, chunk) {
            let at = (part.offset - chunk.offset) as usize;
            let outside = || io::Error::other("an extent outside the memory");
            ram.read_bytes(part.offset, &mut bytes[at..at + part.len as usize]).ok_or_else(outside)?;
        }
        write_data(file, chunk.offset, bytes)?;
        digests.extend_from_slice(&digest(bytes));
    }
    Ok(digests)
}

/// The first chunk of `file` that does not have its digest.
pub(super) fn find_damage(file: &File, size: u64, digests: &[u8]) -> io::Result<Option<u64>> {
    let mut buffer = vec![0; CHUNK.min(size) as usize];
    for (chunk, expected) in chunks(size).zip(digests.chunks(DIGEST_LEN as usize)) {
        let bytes = &mut buffer[..chunk.len as usize];
        file.read_exact_at(bytes, chunk.offset)?;
        if digest(bytes) != *expected {
            return Ok(Some(chunk.offset));
        }
    }
    Ok(None)
}

fn digest(bytes: &[u8]) -> ChunkDigest {
    if is_zero(bytes) { ChunkDigest::default() } else { Sha256::digest(bytes).into() }
}

/// The pages of `ram` that are not what `parent` reads, as few extents as a diff may have. Only pages that
/// `may_differ` are looked at.
pub(super) fn changes(
    ram: &GuestRam,
    may_differ: impl Fn(u64) -> bool,
    parent: impl Fn(u64, &mut [u8]) -> io::Result<()>,
) -> io::Result<Vec<Extent>> {
    let (mut now, mut before) = ([0; PAGE], [0; PAGE]);
    let mut changed: Vec<Extent> = Vec::new();
    for offset in (0..ram.size().0).step_by(PAGE).filter(|offset| may_differ(*offset)) {
        ram.read_bytes(offset, &mut now).ok_or_else(|| io::Error::other("a page outside the memory"))?;
        parent(offset, &mut before)?;
        if now == before {
            continue;
        }
        match changed.last_mut().filter(|extent| extent.end() == offset) {
            Some(extent) => extent.len += PAGE_SIZE,
            None => changed.push(Extent { offset, len: PAGE_SIZE }),
        }
    }
    Ok(Extent::join(changed, EXTENTS_MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::Bytes;

    fn extents(ranges: &[(u64, u64)]) -> Vec<Extent> {
        ranges.iter().map(|(offset, len)| Extent { offset: offset * PAGE_SIZE, len: len * PAGE_SIZE }).collect()
    }

    #[test]
    fn zero_pages_are_holes_and_digests_cover_the_rest() {
        let ram = GuestRam::new(Bytes(CHUNK + 3 * PAGE_SIZE)).unwrap();
        for page in [1, 2, 1024 + 1] {
            ram.store(page * PAGE_SIZE + 9, 7u8).unwrap();
        }
        let file = tempfile::tempfile().unwrap();
        file.set_len(ram.size().0).unwrap();
        let all = [Extent { offset: 0, len: ram.size().0 }];
        let digests = write(&ram, &all, &file).unwrap();
        assert_eq!(digests.len(), 2 * 32);
        assert_eq!(find_damage(&file, ram.size().0, &digests).unwrap(), None);
        use std::os::unix::fs::MetadataExt as _;
        assert_eq!(file.metadata().unwrap().blocks() * 512, 3 * PAGE_SIZE);
        file.write_all_at(&[1], CHUNK).unwrap();
        assert_eq!(find_damage(&file, ram.size().0, &digests).unwrap(), Some(CHUNK));
        file.write_all_at(&[1], 0).unwrap();
        assert_eq!(find_damage(&file, ram.size().0, &digests).unwrap(), Some(0));
    }

    #[test]
    fn changes_are_found_where_they_may_be() {
        let ram = GuestRam::new(Bytes(8 * PAGE_SIZE)).unwrap();
        for page in [1, 2, 5, 7] {
            ram.store(page * PAGE_SIZE, 1u8).unwrap();
        }
        let parent = |offset: u64, page: &mut [u8]| {
            page.fill(0);
            page[0] = u8::from(offset == 5 * PAGE_SIZE || offset == 0);
            Ok(())
        };
        let found = |may_differ: fn(u64) -> bool| changes(&ram, may_differ, parent).unwrap();
        assert_eq!(found(|_| true), extents(&[(0, 3), (7, 1)]));
        assert_eq!(found(|offset| offset != 0), extents(&[(1, 2), (7, 1)]));
    }
}
