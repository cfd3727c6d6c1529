//! Which pages of RAM hold decoded instructions, and which of those a device has written since.
//!
//! A processor that keeps decoded instructions marks their page with [`CodePages::watch`]. Device
//! writes arrive here as the dirty-tracking hook of `vm-memory`; a write that touches a watched page
//! is remembered and [`CodePages::take_written`] hands it to the processor.
//!
//! Ordering: a device writes the data, then notes the page (Release), then raises its interrupt. The
//! processor asks (Acquire) before it takes an interrupt and before it executes from a page that is
//! new to its TLB, so it sees the note no later than the guest can learn that the data is there.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use vm_memory::bitmap::{Bitmap, WithBitmapSlice};

use crate::units::PAGE_SIZE;

#[derive(Debug)]
struct Shared {
    /// One bit a page: the processor holds instructions decoded from it.
    watched: Box<[AtomicU64]>,
    /// One bit a page: a device wrote to it while it was watched.
    written: Box<[AtomicU64]>,
    /// Some bit of `written` may be set.
    any: AtomicBool,
}

/// The watched pages of one guest's RAM; clones share state.
#[derive(Debug, Clone)]
pub struct CodePages {
    shared: Arc<Shared>,
    /// RAM offset at which the region that this handle serves begins.
    base: u64,
}

fn bits(pages: u64) -> Box<[AtomicU64]> {
    (0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect()
}

impl CodePages {
    pub(super) fn new(ram_bytes: u64) -> Self {
        let pages = ram_bytes.div_ceil(PAGE_SIZE);
        Self {
            shared: Arc::new(Shared { watched: bits(pages), written: bits(pages), any: AtomicBool::new(false) }),
            base: 0,
        }
    }

    pub(super) fn for_region(&self, base: u64) -> Self {
        Self { shared: Arc::clone(&self.shared), base }
    }

    /// Starts watching the page that holds RAM offset `offset`.
    pub fn watch(&self, offset: u64) {
        let page = offset / PAGE_SIZE;
        if let Some(word) = self.shared.watched.get((page / 64) as usize) {
            word.fetch_or(1 << (page % 64), Ordering::AcqRel);
        }
    }

    /// Stops watching the page that holds RAM offset `offset`.
    pub fn unwatch(&self, offset: u64) {
        let page = offset / PAGE_SIZE;
        if let Some(word) = self.shared.watched.get((page / 64) as usize) {
            word.fetch_and(!(1 << (page % 64)), Ordering::AcqRel);
        }
    }

    /// Whether a device has written a watched page since the last [`take_written`](Self::take_written).
    #[inline]
    #[must_use]
    pub fn any_written(&self) -> bool {
        self.shared.any.load(Ordering::Acquire)
    }

    /// Calls `page` with the RAM offset of each watched page that a device has written, and forgets them.
    pub fn take_written(&self, mut page: impl FnMut(u64)) {
        if !self.shared.any.swap(false, Ordering::AcqRel) {
            return;
        }
        for (index, word) in self.shared.written.iter().enumerate() {
            let mut set = word.swap(0, Ordering::AcqRel);
            while set != 0 {
                page((index as u64 * 64 + u64::from(set.trailing_zeros())) * PAGE_SIZE);
                set &= set - 1;
            }
        }
    }

    fn note_write(&self, offset: u64, len: u64) {
        if len == 0 {
            return;
        }
        let first = (self.base + offset) / PAGE_SIZE;
        let last = (self.base + offset + (len - 1)) / PAGE_SIZE;
        for page in first..=last {
            let (word, bit) = ((page / 64) as usize, 1u64 << (page % 64));
            let watched = self.shared.watched.get(word).is_some_and(|w| w.load(Ordering::Acquire) & bit != 0);
            if watched && let Some(written) = self.shared.written.get(word) {
                written.fetch_or(bit, Ordering::AcqRel);
                self.shared.any.store(true, Ordering::Release);
            }
        }
    }
}

/// A [`CodePages`] seen from an offset within its region, as `vm-memory` slices it.
#[derive(Debug, Clone)]
pub struct CodePagesSlice<'a> {
    pages: &'a CodePages,
    offset: u64,
}

impl<'a> WithBitmapSlice<'a> for CodePages {
    type S = CodePagesSlice<'a>;
}

impl Bitmap for CodePages {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.note_write(offset as u64, len as u64);
    }

    fn dirty_at(&self, _offset: usize) -> bool {
        false
    }

    fn slice_at(&self, offset: usize) -> CodePagesSlice<'_> {
        CodePagesSlice { pages: self, offset: offset as u64 }
    }
}

impl<'a> WithBitmapSlice<'a> for CodePagesSlice<'_> {
    type S = Self;
}

impl vm_memory::bitmap::BitmapSlice for CodePagesSlice<'_> {}

impl Bitmap for CodePagesSlice<'_> {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.pages.note_write(self.offset + offset as u64, len as u64);
    }

    fn dirty_at(&self, _offset: usize) -> bool {
        false
    }

    fn slice_at(&self, offset: usize) -> Self {
        CodePagesSlice { pages: self.pages, offset: self.offset + offset as u64 }
    }
}
