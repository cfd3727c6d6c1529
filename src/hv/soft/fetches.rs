//! How long a linear address may be trusted to lead to the same decoded code.
//!
//! The jump cache remembers blocks by linear address. Each half of the address space has an epoch that its entries
//! carry; a changed translation makes a new epoch and so forgets them all at the cost of an addition. Two things keep
//! that rare. A CR3 write leaves global pages alone, so it does not touch the upper half, the kernel's, as long as
//! all code there is on global pages. And INVLPG of a page from which nothing was ever fetched changes nothing:
//! a small filter of page numbers knows.

use crate::units::PAGE_SIZE;

const FILTER_BITS: u64 = 4096;

/// Pages that were fetched from, by a hash: says yes too often, never no wrongly.
#[derive(Debug)]
struct Filter([u64; (FILTER_BITS / 64) as usize]);

impl Filter {
    const fn new() -> Self {
        Self([0; (FILTER_BITS / 64) as usize])
    }

    fn place(va: u64) -> (usize, u64) {
        let page = va / PAGE_SIZE;
        let bit = (page ^ (page >> 12)) % FILTER_BITS;
        ((bit / 64) as usize, 1 << (bit % 64))
    }

    fn insert(&mut self, va: u64) {
        let (word, bit) = Self::place(va);
        self.0[word] |= bit;
    }

    fn may_have(&self, va: u64) -> bool {
        let (word, bit) = Self::place(va);
        self.0[word] & bit != 0
    }
}

#[derive(Debug)]
pub(super) struct Fetches {
    /// Lower and upper half.
    epochs: [u32; 2],
    fetched: [Filter; 2],
    /// Code was seen where the rules above do not expect it (local in the upper half, global in the lower, or on a
    /// large page, of which INVLPG names any address): forget all, always.
    unusual: bool,
}

impl Fetches {
    pub(super) const fn new() -> Self {
        Self { epochs: [0; 2], fetched: [Filter::new(), Filter::new()], unusual: false }
    }

    #[inline(always)]
    pub(super) fn epoch(&self, va: u64) -> u32 {
        self.epochs[(va >> 63) as usize]
    }

    /// Notes that code at `va` is fetched from, through a translation of `size` bytes.
    pub(super) fn note(&mut self, va: u64, size: u64, global: bool) {
        let upper = va >> 63 != 0;
        self.fetched[usize::from(upper)].insert(va);
        // The kernel's own code is on large pages, and is not unmapped.
        self.unusual |= upper != global || (size > PAGE_SIZE && !upper);
    }

    pub(super) fn forget_all(&mut self) {
        self.renew(0);
        self.renew(1);
        self.fetched = [Filter::new(), Filter::new()];
        self.unusual = false;
    }

    pub(super) fn forget_local(&mut self) {
        self.renew(0);
        if self.unusual {
            self.renew(1);
        } else {
            self.fetched[0] = Filter::new();
        }
    }

    pub(super) fn forget_page(&mut self, va: u64) {
        let half = (va >> 63) as usize;
        if self.unusual || self.fetched[half].may_have(va) {
            self.renew(half);
        }
    }

    fn renew(&mut self, half: usize) {
        self.epochs[half] = self.epochs[half].wrapping_add(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KERNEL: u64 = 0xffff_ffff_8100_0000;
    const USER: u64 = 0x40_1000;

    fn epochs(fetches: &Fetches) -> (u32, u32) {
        (fetches.epoch(USER), fetches.epoch(KERNEL))
    }

    #[test]
    fn a_cr3_write_spares_global_kernel_code() {
        let mut fetches = Fetches::new();
        fetches.note(KERNEL, 1 << 21, true);
        fetches.note(USER, PAGE_SIZE, false);
        fetches.forget_local();
        assert_eq!(epochs(&fetches), (1, 0));
        fetches.note(KERNEL, PAGE_SIZE, false);
        fetches.forget_local();
        assert_eq!(epochs(&fetches), (2, 1));
    }

    #[test]
    fn invlpg_matters_only_where_code_was() {
        let mut fetches = Fetches::new();
        fetches.note(USER, PAGE_SIZE, false);
        fetches.forget_page(USER + PAGE_SIZE);
        assert_eq!(epochs(&fetches), (0, 0));
        fetches.forget_page(USER + 5);
        assert_eq!(epochs(&fetches), (1, 0));
    }
}
