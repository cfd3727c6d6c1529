//! What RAM holds before anybody writes to it: files, one over another, that any number of guests map and share.
//!
//! ```text
//!   third    ......[####].............[##]....   what a clone had written when it was cloned
//!   second   ..[######].......[####]..........   what changed since
//!   first    [##################################]   all of the memory; holes are zeros
//! ```
//! A page is that of the highest file whose extents hold it. The files never change.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::Extent;
use super::GuestRam;
use super::RamError;
use crate::units::{Bytes, PAGE_SIZE};

/// Names what a memory image holds, for whoever meets it to know it again.
pub type MemoryId = [u8; 32];

/// A file, and what of it counts.
#[derive(Debug)]
struct Layer {
    /// Of the image of which this is the highest file.
    id: MemoryId,
    file: Arc<File>,
    /// Ascending, not overlapping.
    extents: Vec<Extent>,
}

/// The content of a guest's memory, in files that stay open. Cheap to clone.
#[derive(Clone, Debug)]
pub struct MemoryImage {
    size: Bytes,
    /// From the one with all of the memory upwards.
    layers: Vec<Arc<Layer>>,
}

impl MemoryImage {
    /// The first `size` bytes of `file`, which must not change; see [`GuestRam::from_file`] for why.
    #[must_use]
    pub fn new(file: impl Into<Arc<File>>, size: Bytes, id: MemoryId) -> Self {
        let extents = vec![Extent { offset: 0, len: size.0 }];
        Self { size, layers: vec![Arc::new(Layer { id, file: file.into(), extents })] }
    }

    /// This one with `extents` replaced by what `file`, which must not change, has at the same offsets.
    #[must_use]
    pub fn with(&self, file: impl Into<Arc<File>>, extents: Vec<Extent>, id: MemoryId) -> Self {
        let layer = Arc::new(Layer { id, file: file.into(), extents });
        Self { size: self.size, layers: self.layers.iter().cloned().chain([layer]).collect() }
    }

    /// The size of the memory.
    #[must_use]
    pub const fn size(&self) -> Bytes {
        self.size
    }

    /// Names the lowest file: the same for all images that build on it.
    #[must_use]
    pub fn root(&self) -> MemoryId {
        self.layers.first().map_or([0; 32], |layer| layer.id)
    }

    /// How many ranges it is mapped in, each of which takes one of the process's mappings.
    #[must_use]
    pub fn pieces(&self) -> usize {
        self.layers.iter().map(|layer| layer.extents.len()).sum()
    }

    /// RAM that holds this; reads nothing.
    ///
    /// # Errors
    /// [`RamError`] when the files do not hold the memory, or the host refuses a mapping.
    pub fn map(&self) -> Result<GuestRam, RamError> {
        let (first, others) = self.layers.split_first().ok_or(RamError::Size(self.size))?;
        let mut ram = GuestRam::from_file(&first.file, 0, self.size)?;
        for layer in others {
            for extent in &layer.extents {
                ram.overlay(&layer.file, extent.offset, Bytes(extent.len))?;
            }
        }
        Ok(ram.with_source(self.clone()))
    }

    /// Reads the page at `offset`, as RAM that was mapped from here has it; `page` is as long as one.
    ///
    /// # Errors
    /// The host's; `UnexpectedEof` past the end of the memory.
    pub fn read_page(&self, offset: u64, page: &mut [u8]) -> io::Result<()> {
        debug_assert_eq!(page.len() as u64, PAGE_SIZE);
        let holds = |layer: &&Arc<Layer>| Extent::find(&layer.extents, offset).is_some();
        match self.layers.iter().rev().find(holds) {
            Some(layer) => layer.file.read_exact_at(page, offset),
            None => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    /// The extents of everything above the image called `id`, of each file by itself; `None` if this one does not build on
    /// it. It builds on itself.
    #[must_use]
    pub fn above(&self, id: &MemoryId) -> Option<Vec<Extent>> {
        let below = self.layers.iter().position(|layer| layer.id == *id)?;
        Some(self.layers[below + 1..].iter().flat_map(|layer| layer.extents.iter().copied()).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGES: u64 = 8;

    fn file_of(byte: u8) -> File {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&vec![byte; (PAGES * PAGE_SIZE) as usize], 0).unwrap();
        file
    }

    fn pages(first: u64, count: u64) -> Extent {
        Extent { offset: first * PAGE_SIZE, len: count * PAGE_SIZE }
    }

    #[test]
    fn the_highest_file_with_a_page_has_it_for_mappings_and_reads() {
        let base = MemoryImage::new(file_of(b'a'), Bytes(PAGES * PAGE_SIZE), [1; 32]);
        let second = base.with(file_of(b'b'), vec![pages(1, 2), pages(6, 1)], [2; 32]);
        let third = second.with(file_of(b'c'), vec![pages(2, 2)], [3; 32]);
        let expected = b"abccaaba";
        let (ram, mut page) = (third.map().unwrap(), vec![0; PAGE_SIZE as usize]);
        for (n, expected) in (0..).zip(expected) {
            third.read_page(n * PAGE_SIZE, &mut page).unwrap();
            assert!(page.iter().all(|byte| byte == expected), "page {n}");
            assert_eq!(ram.load::<u8>(n * PAGE_SIZE + 17), Some(*expected), "page {n}");
        }
        assert!(third.read_page(PAGES * PAGE_SIZE, &mut page).is_err());
        assert_eq!(third.pieces(), 4);
    }

    #[test]
    fn an_image_knows_what_it_builds_on() {
        let base = MemoryImage::new(file_of(b'a'), Bytes(PAGES * PAGE_SIZE), [1; 32]);
        let second = base.with(file_of(b'b'), vec![pages(1, 2)], [2; 32]);
        let third = second.with(file_of(b'c'), vec![pages(2, 2)], [3; 32]);
        assert_eq!(third.above(&[1; 32]), Some(vec![pages(1, 2), pages(2, 2)]));
        assert_eq!(third.above(&[2; 32]), Some(vec![pages(2, 2)]));
        assert_eq!(third.above(&[3; 32]), Some(vec![]));
        assert_eq!(second.above(&[3; 32]), None);
    }
}
