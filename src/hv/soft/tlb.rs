//! The software TLB: recent translations, so that a memory access costs a compare and an add.
//!
//! Direct-mapped. An entry holds a tag for each kind of access that is allowed without further thought and
//! the distance from the linear address to the RAM offset. What is not plain RAM, or must be noticed (a first
//! write that sets the dirty bit, a write to a page with decoded instructions), simply has no tag and takes the
//! slow path. The tag carries the privilege mode in bit 0, so no flush is needed when it changes.

use crate::units::PAGE_SIZE;

/// 1024 entries of 32 bytes: fewer alias badly, more compete with guest data for the host's caches
/// (docs/performance.md).
pub(super) const ENTRIES: usize = 1024;

/// No address has this page number with these low bits.
const INVALID: u64 = u64::MAX;
const PAGE_MASK: u64 = !(PAGE_SIZE - 1);

#[derive(Clone, Copy, Debug)]
pub(super) struct Entry {
    pub(super) read: u64,
    pub(super) write: u64,
    pub(super) fetch: u64,
    /// RAM offset minus linear address, wrapping.
    pub(super) addend: u64,
}

const EMPTY: Entry = Entry { read: INVALID, write: INVALID, fetch: INVALID, addend: 0 };

/// What a page may be used for without the slow path.
#[derive(Clone, Copy, Debug)]
pub(super) struct Grant {
    pub(super) read: bool,
    pub(super) write: bool,
    pub(super) fetch: bool,
    pub(super) global: bool,
}

#[derive(Debug)]
pub(super) struct Tlb {
    pub(super) entries: Box<[Entry; ENTRIES]>,
    global: [u64; ENTRIES / 64],
    /// 1 in user mode, 0 in supervisor mode: part of each tag.
    pub(super) mode: u64,
    /// Linear range in which large pages were cached since the last full flush: one INVLPG of theirs must
    /// drop all their 4 KiB pieces.
    large: Option<(u64, u64)>,
}

impl Tlb {
    pub(super) fn new() -> Self {
        Self { entries: Box::new([EMPTY; ENTRIES]), global: [0; ENTRIES / 64], mode: 0, large: None }
    }

    /// Folds in higher bits, so that buffers a power of two apart (the two sides of a copy) do not meet in one
    /// entry and evict each other at every access.
    #[inline(always)]
    pub(super) const fn index(va: u64) -> usize {
        ((va >> 12) ^ (va >> 22)) as usize & (ENTRIES - 1)
    }

    /// The tag that an access of `size` bytes at `va` must find; one that crosses a page finds none,
    /// because its last byte's page does not belong to its first byte's entry.
    #[inline(always)]
    pub(super) fn tag(&self, va: u64, size: u64) -> u64 {
        (va.wrapping_add(size - 1) & PAGE_MASK) | self.mode
    }

    /// The RAM offset for a read that needs no slow path.
    #[inline(always)]
    pub(super) fn read(&self, va: u64, size: u64) -> Option<u64> {
        let entry = &self.entries[Self::index(va)];
        (entry.read == self.tag(va, size)).then(|| va.wrapping_add(entry.addend))
    }

    /// The RAM offset for a write that needs no slow path.
    #[inline(always)]
    pub(super) fn write(&self, va: u64, size: u64) -> Option<u64> {
        let entry = &self.entries[Self::index(va)];
        (entry.write == self.tag(va, size)).then(|| va.wrapping_add(entry.addend))
    }

    /// The RAM offset for an instruction fetch that needs no slow path.
    #[inline(always)]
    pub(super) fn fetch(&self, va: u64) -> Option<u64> {
        let entry = &self.entries[Self::index(va)];
        (entry.fetch == self.tag(va, 1)).then(|| va.wrapping_add(entry.addend))
    }

    /// Caches the translation of `va`'s page to the RAM page at `ram`.
    pub(super) fn fill(&mut self, va: u64, ram: u64, grant: Grant) {
        let (page, index) = (va & PAGE_MASK, Self::index(va));
        let tag = page | self.mode;
        let allow = |allowed: bool| if allowed { tag } else { INVALID };
        self.entries[index] = Entry {
            read: allow(grant.read),
            write: allow(grant.write),
            fetch: allow(grant.fetch),
            addend: (ram & PAGE_MASK).wrapping_sub(page),
        };
        let bit = 1 << (index % 64);
        if grant.global {
            self.global[index / 64] |= bit;
        } else {
            self.global[index / 64] &= !bit;
        }
    }

    /// Notes that `va` lies in a large page of `size` bytes.
    pub(super) fn note_large(&mut self, va: u64, size: u64) {
        let (start, last) = (va & !(size - 1), va | (size - 1));
        self.large = Some(self.large.map_or((start, last), |(s, l)| (s.min(start), l.max(last))));
    }

    /// Forgets everything.
    pub(super) fn flush_all(&mut self) {
        self.entries.fill(EMPTY);
        self.large = None;
    }

    /// Forgets what is not global: a CR3 write.
    pub(super) fn flush_local(&mut self) {
        for (index, entry) in self.entries.iter_mut().enumerate() {
            if self.global[index / 64] >> (index % 64) & 1 == 0 {
                *entry = EMPTY;
            }
        }
    }

    /// Forgets `va`'s page: INVLPG.
    pub(super) fn flush_page(&mut self, va: u64) {
        if self.large.is_some_and(|(start, last)| (start..=last).contains(&va)) {
            self.flush_all();
        } else {
            self.entries[Self::index(va)] = EMPTY;
        }
    }

    /// Makes writes to the RAM page at `ram` take the slow path: it now holds decoded instructions.
    pub(super) fn guard_writes(&mut self, ram: u64) {
        for entry in self.entries.iter_mut().filter(|e| e.write != INVALID) {
            if (entry.write & PAGE_MASK).wrapping_add(entry.addend) == ram & PAGE_MASK {
                entry.write = INVALID;
            }
        }
    }

    /// Makes all writes take the slow path once.
    pub(super) fn revoke_writes(&mut self) {
        self.entries.iter_mut().for_each(|entry| entry.write = INVALID);
    }
}
