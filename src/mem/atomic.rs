//! Read-modify-write of RAM as one access: what LOCK, XCHG with memory and the page walk's accessed and dirty bits need.
//!
//! Naturally aligned operands of 1, 2, 4, 8 and, where the host has CMPXCHG16B, 16 bytes are the host's own atomics: whole
//! against every other access, a vCPU's or a device's. An operand that crosses no border of 8 bytes is exchanged with the
//! word around it, and is as good.
//!
//! What is left are operands in two words, "split locks". Those take turns by a lock of RAM's, and exchange word after
//! word. Two of them never mix, and no other write to either word is lost. But an access to one of the words alone can come
//! between the two exchanges; hardware locks its bus against that. A guest's kernel that cares makes split locks a fault
//! (SDM volume 3A, 9.1.2.3), and Linux has none.

use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::sync::atomic::fence;

use super::GuestRam;
use super::RamOffset;
use super::Scalar;

/// Bytes of a word that is exchanged whole.
const WORD: u64 = 8;

/// The bits of an operand that lie in one aligned word.
#[derive(Clone, Copy, Debug)]
struct Piece {
    word: RamOffset,
    shift: u32,
    mask: u64,
}

impl Piece {
    /// `len` bytes, 1 to 8, at `at`, which stay in its word.
    fn new(at: RamOffset, len: u64) -> Self {
        Self { word: at & !(WORD - 1), shift: (at % WORD * 8) as u32, mask: u64::MAX >> (64 - 8 * len) }
    }

    fn load(self, ram: &GuestRam) -> Option<u64> {
        Some(ram.load::<u64>(self.word)? >> self.shift & self.mask)
    }

    /// Replaces `current` by `new`, whatever happens to the rest of the word; what was there.
    fn compare_exchange(self, ram: &GuestRam, current: u64, new: u64) -> Option<u64> {
        let mut word = ram.load::<u64>(self.word)?;
        loop {
            let here = word >> self.shift & self.mask;
            if here != current {
                return Some(here);
            }
            let changed = word & !(self.mask << self.shift) | new << self.shift;
            let found = ram.exchange_aligned(self.word, word, changed)?;
            if found == word {
                return Some(current);
            }
            word = found;
        }
    }
}

impl GuestRam {
    /// Replaces `current` at a RAM offset by `new`, as one access and a full barrier, and returns what was there: `current`
    /// if it was replaced. `None`, with nothing written, when the value does not lie in RAM whole.
    ///
    /// For values that cross a border of 8 bytes see the [module](super).
    #[inline(always)]
    pub fn compare_exchange<T: Scalar>(&self, at: RamOffset, current: T, new: T) -> Option<T> {
        if at.is_multiple_of(T::SIZE)
            && let Some(found) = self.exchange_aligned(at, current, new)
        {
            return Some(found);
        }
        self.exchange_pieces(at, current, new)
    }

    #[cold]
    fn exchange_pieces<T: Scalar>(&self, at: RamOffset, current: T, new: T) -> Option<T> {
        let end = at.checked_add(T::SIZE).filter(|end| *end <= self.size().0)?;
        let second = (at + 1).next_multiple_of(WORD);
        if second < end {
            return self.compare_exchange_across(at, second - at, second, current, new);
        }
        fence(Ordering::SeqCst);
        let piece = Piece::new(at, T::SIZE);
        let found = piece.compare_exchange(self, current.widen() as u64, new.widen() as u64)?;
        Some(T::narrow(found.into()))
    }

    /// As [`compare_exchange`](Self::compare_exchange), for a value whose first `len` bytes end a word, as they do at the
    /// end of a page, and whose others begin the word at `second`.
    pub fn compare_exchange_across<T: Scalar>(
        &self,
        first: RamOffset,
        len: u64,
        second: RamOffset,
        current: T,
        new: T,
    ) -> Option<T> {
        let lens = [len, T::SIZE.checked_sub(len)?];
        let fits = |at: RamOffset, len: u64| (1..=WORD - at % WORD).contains(&len);
        if !fits(first, lens[0]) || !fits(second, lens[1]) {
            return None;
        }
        let pieces = [Piece::new(first, lens[0]), Piece::new(second, lens[1])];
        let cut =
            |value: T| [value.widen() as u64 & pieces[0].mask, (value.widen() >> (8 * len)) as u64 & pieces[1].mask];
        let (current, new) = (cut(current), cut(new));
        // It guards no data of its own.
        let _turn = self.split_locks().lock().unwrap_or_else(PoisonError::into_inner);
        fence(Ordering::SeqCst);
        let mut found = [pieces[0].compare_exchange(self, current[0], new[0])?, pieces[1].load(self)?];
        if found[0] == current[0] {
            found[1] = pieces[1].compare_exchange(self, current[1], new[1])?;
            if found[1] != current[1] {
                // Back as it was, unless somebody has written there meanwhile.
                let _ = pieces[0].compare_exchange(self, new[0], current[0]);
            }
        }
        Some(T::narrow(u128::from(found[0]) | u128::from(found[1]) << (8 * len)))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::thread;

    use super::*;
    use crate::units::{Bytes, PAGE_SIZE};

    const THREADS: u64 = 4;
    const ROUNDS: u64 = 20_000;

    fn add<T: Scalar>(ram: &GuestRam, at: RamOffset, what: u128) {
        let mut old = ram.load::<T>(at).unwrap();
        loop {
            let found = ram.compare_exchange(at, old, T::narrow(old.widen().wrapping_add(what))).unwrap();
            if found.widen() == old.widen() {
                return;
            }
            old = found;
        }
    }

    /// Counts at `at` by many threads; their neighbours are written plainly all the while.
    fn count<T: Scalar>(at: RamOffset) {
        let ram = Arc::new(GuestRam::new(Bytes(PAGE_SIZE)).unwrap());
        // Carries pass from byte to byte.
        let step = u128::MAX / 255 / 3;
        thread::scope(|scope| {
            for _ in 0..THREADS {
                scope.spawn(|| (0..ROUNDS).for_each(|_| add::<T>(&ram, at, step)));
            }
            scope.spawn(|| {
                for n in 0..ROUNDS {
                    ram.store(at - 1, n as u8).unwrap();
                    ram.store(at + T::SIZE, n as u8).unwrap();
                    assert_eq!(ram.load(at - 1), Some(n as u8), "a neighbour was written over");
                    assert_eq!(ram.load(at + T::SIZE), Some(n as u8), "a neighbour was written over");
                }
            });
        });
        let expected = T::narrow(step.wrapping_mul((THREADS * ROUNDS).into()));
        assert_eq!(ram.load::<T>(at).unwrap().widen(), expected.widen(), "at {at:#x}");
    }

    #[test]
    fn nothing_is_lost_at_any_size_and_alignment() {
        for at in 0x100..0x110 {
            count::<u8>(at);
            count::<u16>(at);
            count::<u32>(at);
            count::<u64>(at);
        }
        count::<u128>(0x100);
        count::<u128>(0x108);
    }

    #[test]
    fn what_differs_stays_and_is_returned() {
        let ram = GuestRam::new(Bytes(2 * PAGE_SIZE)).unwrap();
        for at in [0x10, 0x11, 0x14, 0x1c, 0x1f] {
            ram.store(at, 0x1122_3344_5566_7788u64).unwrap();
            assert_eq!(ram.compare_exchange(at, 0x1122_3344_5566_7799u64, 1), Some(0x1122_3344_5566_7788));
            assert_eq!(ram.compare_exchange(at, 0x0022_3344_5566_7788u64, 1), Some(0x1122_3344_5566_7788));
            assert_eq!(ram.load(at), Some(0x1122_3344_5566_7788u64), "at {at:#x}");
            assert_eq!(ram.compare_exchange(at, 0x1122_3344_5566_7788u64, 7), Some(0x1122_3344_5566_7788));
            assert_eq!(ram.load(at), Some(7u64), "at {at:#x}");
        }
        let edge = 2 * PAGE_SIZE;
        assert_eq!(ram.compare_exchange(edge - 8, 0u64, 1), Some(0));
        for at in [edge - 7, edge - 1, edge, u64::MAX, u64::MAX - 7] {
            assert_eq!(ram.compare_exchange(at, 0u64, 1), None, "{at:#x}");
        }
    }

    #[test]
    fn a_value_on_two_pages_is_exchanged_whole() {
        let ram = GuestRam::new(Bytes(4 * PAGE_SIZE)).unwrap();
        let (first, second) = (4 * PAGE_SIZE - 3, PAGE_SIZE);
        assert_eq!(ram.compare_exchange_across(first, 3, second, 0u64, 0x1122_3344_5566_7788), Some(0));
        assert_eq!(ram.load::<u16>(first), Some(0x7788));
        assert_eq!(ram.load::<u32>(second), Some(0x2233_4455));
        assert_eq!(ram.load::<u8>(second + 4), Some(0x11));
        assert_eq!(ram.compare_exchange_across(first, 3, second, 5u64, 6), Some(0x1122_3344_5566_7788));
        assert_eq!(ram.compare_exchange_across(first, 4, second, 5u64, 6), None, "past the word");
        assert_eq!(ram.compare_exchange_across(4 * PAGE_SIZE, 4, second, 5u64, 6), None);
    }
}
