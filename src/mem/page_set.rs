//! Which pages of a mapping of files were written: what the host's kernel knows, so that no store need be watched.
//!
//! A private mapping's page is the file's until the first write makes it a copy. Linux says in `/proc/self/pagemap`
//! which pages are copies, range by range or, where it is older, page by page. Elsewhere, or where that is not allowed, nobody knows, and whoever asks must compare.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;

use super::Extent;
use crate::units::PAGE_SIZE;

/// A set of pages of RAM.
#[derive(Clone, Debug)]
pub struct PageSet {
    /// One bit a page.
    bits: Vec<u64>,
}

impl PageSet {
    /// No page of the `len` bytes of RAM.
    pub(crate) fn none(len: u64) -> Self {
        Self { bits: vec![0; (len / PAGE_SIZE).div_ceil(64) as usize] }
    }

    /// Whether the page that holds RAM offset `offset` is in it.
    #[must_use]
    pub fn contains(&self, offset: u64) -> bool {
        let page = offset / PAGE_SIZE;
        self.bits.get((page / 64) as usize).is_some_and(|word| word >> (page % 64) & 1 != 0)
    }

    /// The RAM offsets of its pages, ascending.
    pub fn iter(&self) -> impl Iterator<Item = u64> + '_ {
        let words = (0u64..).zip(&self.bits).filter(|(_, word)| **word != 0);
        words.flat_map(|(n, word)| {
            let set = (0..64).filter(move |bit| word >> bit & 1 != 0);
            set.map(move |bit| (n * 64 + bit) * PAGE_SIZE)
        })
    }

    /// Adds the pages of `extent`, as far as they are RAM.
    pub(super) fn add(&mut self, extent: Extent) {
        for page in extent.offset / PAGE_SIZE..extent.end() / PAGE_SIZE {
            if let Some(word) = self.bits.get_mut((page / 64) as usize) {
                *word |= 1 << (page % 64);
            }
        }
    }

    /// Adds the page that holds RAM offset `offset`, if that is RAM.
    pub(crate) fn insert(&mut self, offset: u64) {
        let page = offset / PAGE_SIZE;
        if let Some(word) = self.bits.get_mut((page / 64) as usize) {
            *word |= 1 << (page % 64);
        }
    }

    /// Adds the pages of `others`.
    pub(crate) fn unite(&mut self, others: &Self) {
        self.bits.iter_mut().zip(&others.bits).for_each(|(word, other)| *word |= other);
    }

    /// Those that are not in `others`.
    pub(super) fn without(&self, others: &Self) -> Self {
        Self { bits: self.bits.iter().zip(&others.bits).map(|(word, other)| word & !other).collect() }
    }

    /// How many pages are in it.
    pub(super) fn count(&self) -> u64 {
        self.bits.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// The pages of `len` bytes of this process's memory from `address` on that belong to no file.
    #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
    pub(super) fn private(address: u64, len: u64) -> Option<Self> {
        super::watch::private(address, len).ok().or_else(|| Self::read_private(address, len))
    }

    /// As [`private`](Self::private), entry by entry, which every kernel tells.
    #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
    pub(super) fn read_private(address: u64, len: u64) -> Option<Self> {
        use std::fs::File;
        use std::os::unix::fs::FileExt as _;

        /// Bytes an entry; the kernel's pages are as large as the guest's on this architecture.
        const ENTRY: u64 = 8;
        /// Entries read at once.
        const BATCH: u64 = 8192;

        let pagemap = File::open("/proc/self/pagemap").ok()?;
        let pages = len / PAGE_SIZE;
        let mut bits = vec![0u64; pages.div_ceil(64) as usize];
        let mut buffer = vec![0; (BATCH.min(pages) * ENTRY) as usize];
        for first in (0..pages).step_by(BATCH as usize) {
            let entries = &mut buffer[..(BATCH.min(pages - first) * ENTRY) as usize];
            pagemap.read_exact_at(entries, (address / PAGE_SIZE + first) * ENTRY).ok()?;
            for (page, entry) in (first..).zip(entries.chunks_exact(ENTRY as usize)) {
                let entry = u64::from_le_bytes(entry.try_into().ok()?);
                bits[(page / 64) as usize] |= u64::from(is_private(entry)) << (page % 64);
            }
        }
        Some(Self { bits })
    }

    #[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
    pub(super) fn private(_address: u64, _len: u64) -> Option<Self> {
        None
    }
}

/// A set of pages of RAM that several threads change.
///
/// A change is seen by others no later than what its thread does after it (Release), and what comes after a look is not
/// done before it (Acquire). Where more is needed, callers put a fence.
#[derive(Debug)]
pub(crate) struct AtomicPageSet(Box<[AtomicU64]>);

impl AtomicPageSet {
    /// No page of the `len` bytes of RAM.
    pub(crate) fn none(len: u64) -> Self {
        Self((0..len.div_ceil(PAGE_SIZE).div_ceil(64)).map(|_| AtomicU64::new(0)).collect())
    }

    fn place(&self, offset: u64) -> Option<(&AtomicU64, u64)> {
        let page = offset / PAGE_SIZE;
        Some((self.0.get((page / 64) as usize)?, 1 << (page % 64)))
    }

    /// Whether the page that holds RAM offset `offset` is in it.
    #[inline]
    pub(crate) fn contains(&self, offset: u64) -> bool {
        self.place(offset).is_some_and(|(word, bit)| word.load(Ordering::Acquire) & bit != 0)
    }

    /// Adds the page that holds RAM offset `offset`, if that is RAM.
    #[inline]
    pub(crate) fn insert(&self, offset: u64) {
        if let Some((word, bit)) = self.place(offset)
            && word.load(Ordering::Relaxed) & bit == 0
        {
            word.fetch_or(bit, Ordering::AcqRel);
        }
    }

    /// Takes the page that holds RAM offset `offset` out.
    pub(crate) fn remove(&self, offset: u64) {
        if let Some((word, bit)) = self.place(offset) {
            word.fetch_and(!bit, Ordering::AcqRel);
        }
    }

    /// Takes all pages out, word by word, and gives each to `page`, by its RAM offset, ascending.
    pub(crate) fn drain(&self, mut page: impl FnMut(u64)) {
        for (index, word) in (0u64..).zip(&self.0) {
            // Most words are empty, and a look is cheaper than a change.
            let mut set = if word.load(Ordering::Relaxed) == 0 { 0 } else { word.swap(0, Ordering::AcqRel) };
            while set != 0 {
                page((index * 64 + u64::from(set.trailing_zeros())) * PAGE_SIZE);
                set &= set - 1;
            }
        }
    }

    /// The pages that are in it now.
    pub(crate) fn snapshot(&self) -> PageSet {
        PageSet { bits: self.0.iter().map(|word| word.load(Ordering::Acquire)).collect() }
    }
}

/// An entry's bits (Linux, `Documentation/admin-guide/mm/pagemap.rst`): present 63, swapped out 62, of a file or
/// shared 61. A copy is one of the first two and not the third.
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
fn is_private(entry: u64) -> bool {
    entry >> 62 & 3 != 0 && entry >> 61 & 1 == 0
}
