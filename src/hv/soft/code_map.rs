//! Which bytes of RAM have been decoded, to 64-byte granules: what makes self-modifying code work.

use crate::units::PAGE_SIZE;

const GRANULE: u64 = 64;

/// One bit a granule, one word a page of RAM.
#[derive(Debug)]
pub(super) struct CodeMap(Box<[u64]>);

impl CodeMap {
    pub(super) fn new(ram_bytes: u64) -> Self {
        Self(vec![0; ram_bytes.div_ceil(PAGE_SIZE) as usize].into_boxed_slice())
    }

    /// The granules of `offset .. offset + len` that lie on `offset`'s page.
    fn mask(offset: u64, len: u64) -> u64 {
        let first = offset % PAGE_SIZE / GRANULE;
        let last = (offset % PAGE_SIZE + len.max(1) - 1).min(PAGE_SIZE - 1) / GRANULE;
        (u64::MAX >> (63 - (last - first))) << first
    }

    /// Whether anything on the page of RAM offset `offset` has been decoded.
    #[inline]
    pub(super) fn page_has_code(&self, offset: u64) -> bool {
        self.0.get((offset / PAGE_SIZE) as usize).is_some_and(|&granules| granules != 0)
    }

    /// Whether a write there may hit decoded bytes.
    #[inline]
    pub(super) fn hits(&self, offset: u64, len: u64) -> bool {
        self.0.get((offset / PAGE_SIZE) as usize).is_some_and(|&granules| granules & Self::mask(offset, len) != 0)
    }

    /// Marks bytes of one page as decoded; true when they are the page's first.
    pub(super) fn mark(&mut self, offset: u64, len: u64) -> bool {
        let Some(granules) = self.0.get_mut((offset / PAGE_SIZE) as usize) else { return false };
        let first = *granules == 0;
        *granules |= Self::mask(offset, len);
        first
    }

    /// Forgets the whole page of `offset`.
    pub(super) fn clear_page(&mut self, offset: u64) {
        if let Some(granules) = self.0.get_mut((offset / PAGE_SIZE) as usize) {
            *granules = 0;
        }
    }

    /// Forgets everything.
    pub(super) fn clear(&mut self) {
        self.0.fill(0);
    }
}
