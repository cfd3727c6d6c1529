//! Which pages of RAM hold decoded instructions, and which of those somebody else has written since.
//!
//! A processor that keeps decoded instructions has a [`CodeWatch`] and marks their pages in it. Whoever else writes to a
//! marked page notes that: a device by way of the dirty-tracking hook of `vm-memory`, another processor by
//! [`CodePages::note_write_by`]. [`CodeWatch::take_written`] hands the pages to the processor.
//!
//! Ordering. A writer writes, then looks who watches; a processor watches, then reads what it decodes. There is a fence
//! between the two on either side, so either the writer sees the watch or the processor sees what was written. And a
//! writer notes the page (Release) before it goes on to tell anybody that the data is there. A processor asks (Acquire)
//! before it takes an interrupt and wherever it looks for decoded code, so it knows no later than its guest can.

use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering, fence};

use vm_memory::bitmap::{Bitmap, WithBitmapSlice};

use super::page_set::AtomicPageSet;
use crate::units::PAGE_SIZE;

/// Most processors that can watch one RAM.
pub const MAX_WATCHERS: usize = 8;

/// The pages whose decoded instructions one processor keeps.
#[derive(Debug)]
pub struct CodeWatch {
    watched: AtomicPageSet,
    /// Written by others while they were watched.
    written: AtomicPageSet,
    /// Some page may be in `written`.
    any: AtomicBool,
}

impl CodeWatch {
    fn new(ram_bytes: u64) -> Self {
        let none = || AtomicPageSet::none(ram_bytes);
        Self { watched: none(), written: none(), any: AtomicBool::new(false) }
    }

    /// Starts watching the page that holds RAM offset `offset`. What is read of it after this is either what it holds, or
    /// will be noted as written.
    pub fn watch(&self, offset: u64) {
        self.watched.insert(offset);
        fence(Ordering::SeqCst);
    }

    /// Stops watching the page that holds RAM offset `offset`.
    pub fn unwatch(&self, offset: u64) {
        self.watched.remove(offset);
    }

    /// Stops watching all pages.
    pub fn unwatch_all(&self) {
        self.watched.drain(|_| ());
    }

    /// Whether the page that holds RAM offset `offset` is watched.
    #[inline]
    #[must_use]
    pub fn watches(&self, offset: u64) -> bool {
        self.watched.contains(offset)
    }

    /// Whether somebody else has written a watched page since the last [`take_written`](Self::take_written).
    #[inline(always)]
    #[must_use]
    pub fn any_written(&self) -> bool {
        self.any.load(Ordering::Acquire)
    }

    /// Calls `page` with the RAM offset of each watched page that somebody else has written, and forgets them.
    pub fn take_written(&self, page: impl FnMut(u64)) {
        if self.any.swap(false, Ordering::AcqRel) {
            self.written.drain(page);
        }
    }

    /// Whether it matters to the processor that the page is written: it is watched, and not already noted.
    fn cares(&self, offset: u64) -> bool {
        self.watched.contains(offset) && !self.written.contains(offset)
    }

    fn note(&self, offset: u64) {
        if self.cares(offset) {
            self.written.insert(offset);
            self.any.store(true, Ordering::Release);
        }
    }
}

#[derive(Debug)]
struct Shared {
    ram_bytes: u64,
    /// By the processors' numbers; most machines have one.
    watches: [OnceLock<Arc<CodeWatch>>; MAX_WATCHERS],
}

/// The watched pages of one guest's RAM; clones share state.
#[derive(Debug, Clone)]
pub struct CodePages {
    shared: Arc<Shared>,
    /// RAM offset at which the region that this handle serves begins.
    base: u64,
}

impl CodePages {
    pub(super) fn new(ram_bytes: u64) -> Self {
        Self { shared: Arc::new(Shared { ram_bytes, watches: Default::default() }), base: 0 }
    }

    pub(super) fn for_region(&self, base: u64) -> Self {
        Self { shared: Arc::clone(&self.shared), base }
    }

    /// What processor number `id` watches: the same each time it is asked for, and nothing at first. `None` for a number
    /// past [`MAX_WATCHERS`].
    #[must_use]
    pub fn watch_of(&self, id: usize) -> Option<Arc<CodeWatch>> {
        let watch = self.shared.watches.get(id)?;
        Some(Arc::clone(watch.get_or_init(|| Arc::new(CodeWatch::new(self.shared.ram_bytes)))))
    }

    /// Notes that processor number `id` has written `len` bytes at a RAM offset: the others are told.
    pub fn note_write_by(&self, id: usize, offset: u64, len: u64) {
        fence(Ordering::SeqCst);
        self.others(id).for_each(|watch| pages(offset, len).for_each(|page| watch.note(page)));
    }

    /// Whether a write by processor number `id` to the page that holds RAM offset `offset` must be noted.
    #[must_use]
    pub fn others_care(&self, id: usize, offset: u64) -> bool {
        fence(Ordering::SeqCst);
        self.others(id).any(|watch| watch.cares(offset))
    }

    fn others(&self, id: usize) -> impl Iterator<Item = &Arc<CodeWatch>> {
        let all = self.shared.watches.iter().enumerate();
        all.filter(move |(other, _)| *other != id).filter_map(|(_, watch)| watch.get())
    }

    fn note_write(&self, offset: u64, len: u64) {
        fence(Ordering::SeqCst);
        for watch in self.shared.watches.iter().filter_map(OnceLock::get) {
            pages(self.base + offset, len).for_each(|page| watch.note(page));
        }
    }
}

/// The pages that `len` bytes at a RAM offset touch.
fn pages(offset: u64, len: u64) -> impl Iterator<Item = u64> {
    let touched = offset / PAGE_SIZE..(offset + len).div_ceil(PAGE_SIZE);
    touched.filter(move |_| len > 0).map(|page| page * PAGE_SIZE)
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

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(watch: &CodeWatch) -> Vec<u64> {
        let mut pages = Vec::new();
        watch.take_written(|page| pages.push(page));
        pages
    }

    #[test]
    fn a_processor_hears_of_others_writes_and_not_of_its_own() {
        let pages = CodePages::new(8 * PAGE_SIZE);
        let [one, other] = [0, 1].map(|id| pages.watch_of(id).unwrap());
        for watch in [&one, &other] {
            watch.watch(PAGE_SIZE);
            watch.watch(2 * PAGE_SIZE);
        }
        pages.note_write_by(0, 2 * PAGE_SIZE - 1, 2);
        pages.note_write_by(0, 5 * PAGE_SIZE, PAGE_SIZE);
        assert!(!one.any_written());
        assert_eq!(taken(&other), [PAGE_SIZE, 2 * PAGE_SIZE]);
        assert!(!other.any_written());
        assert_eq!(taken(&other), [0; 0]);
        pages.note_write(2 * PAGE_SIZE, 0);
        pages.note_write(2 * PAGE_SIZE, 1);
        assert_eq!((taken(&one), taken(&other)), (vec![2 * PAGE_SIZE], vec![2 * PAGE_SIZE]));
        assert!(pages.watch_of(MAX_WATCHERS).is_none());
    }

    #[test]
    fn others_care_until_they_have_been_told() {
        let pages = CodePages::new(8 * PAGE_SIZE);
        let watch = pages.watch_of(3).unwrap();
        assert!(!pages.others_care(0, PAGE_SIZE));
        watch.watch(PAGE_SIZE + 5);
        assert!(pages.others_care(0, PAGE_SIZE) && !pages.others_care(3, PAGE_SIZE));
        pages.note_write_by(0, PAGE_SIZE, 8);
        assert!(!pages.others_care(0, PAGE_SIZE), "the page will be dropped whole");
        assert_eq!(taken(&watch), [PAGE_SIZE]);
        assert!(pages.others_care(0, PAGE_SIZE));
        watch.unwatch(PAGE_SIZE);
        assert!(!pages.others_care(0, PAGE_SIZE));
    }
}
