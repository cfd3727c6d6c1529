//! Which bytes of RAM have been decoded, to 64-byte granules: what makes self-modifying code work.

use crate::units::PAGE_SIZE;

const GRANULE: u64 = 64;
/// Pages of a region: one page's worth of words, so that a guest that runs little code has little of this.
const REGION: usize = 512;

/// One bit a granule, one word a page of RAM, in regions that are made when code is first decoded in them.
#[derive(Debug)]
pub(super) struct CodeMap(Box<[Option<Box<[u64; REGION]>>]>);

impl CodeMap {
    pub(super) fn new(ram_bytes: u64) -> Self {
        let pages = ram_bytes.div_ceil(PAGE_SIZE) as usize;
        Self(vec![None; pages.div_ceil(REGION)].into_boxed_slice())
    }

    /// The word of the page of RAM offset `offset`; none where nothing was decoded, or there is no RAM.
    #[inline]
    fn page(&self, offset: u64) -> Option<u64> {
        let page = (offset / PAGE_SIZE) as usize;
        self.0.get(page / REGION)?.as_ref().map(|region| region[page % REGION])
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
        self.page(offset).is_some_and(|granules| granules != 0)
    }

    /// Whether a write there may hit decoded bytes.
    #[inline]
    pub(super) fn hits(&self, offset: u64, len: u64) -> bool {
        self.page(offset).is_some_and(|granules| granules & Self::mask(offset, len) != 0)
    }

    /// Marks bytes of one page as decoded.
    pub(super) fn mark(&mut self, offset: u64, len: u64) {
        let page = (offset / PAGE_SIZE) as usize;
        let Some(region) = self.0.get_mut(page / REGION) else { return };
        let granules = &mut region.get_or_insert_with(|| Box::new([0; REGION]))[page % REGION];
        *granules |= Self::mask(offset, len);
    }

    /// Forgets the whole page of `offset`.
    pub(super) fn clear_page(&mut self, offset: u64) {
        let page = (offset / PAGE_SIZE) as usize;
        if let Some(Some(region)) = self.0.get_mut(page / REGION) {
            region[page % REGION] = 0;
        }
    }

    /// Forgets everything.
    pub(super) fn clear(&mut self) {
        self.0.fill(None);
    }
}
