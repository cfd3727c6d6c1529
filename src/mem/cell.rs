//! One access of the guest's as one access of the host's: loads, stores and compare-exchanges of 1 to 16 bytes at raw
//! addresses that other threads reach too.
#![allow(unsafe_code, reason = "unsafe fence: accesses to memory that every vCPU and every device thread reaches")]
//!
//! Intel SDM volume 3A, 9.1.1: a naturally aligned access of up to 8 bytes is atomic, and so is one of any alignment that
//! stays in a cache line. On an x86-64 host the accesses here are single MOV instructions, written as such: the compiler
//! neither splits, joins, repeats nor reorders them, and the host's own memory order, which is the guest's
//! ([`TOTAL_STORE_ORDER`]), is all that happens to them. A 16-byte access is two of 8 bytes, low half first, which is as
//! much as the manual promises of SSE moves.
//!
//! Other hosts get volatile accesses: enough for one vCPU and its devices, and no more is claimed.

use std::sync::atomic::AtomicU8;
use std::sync::atomic::AtomicU16;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;

/// Whether plain loads and stores of RAM are seen by other threads in the order that x86 processors promise each other
/// (SDM volume 3A, 9.2.2): a machine with several vCPUs needs that.
pub const TOTAL_STORE_ORDER: bool = cfg!(target_arch = "x86_64");

/// An integer as it lies in memory that is shared with other threads.
pub(super) trait Cell: Copy {
    /// Reads one at `base` plus `offset`, of any alignment.
    ///
    /// # Safety
    /// The place lies whole in memory that is mapped readable and that no Rust reference points into.
    unsafe fn load(base: *const u8, offset: u64) -> Self;

    /// Writes one at `base` plus `offset`, of any alignment.
    ///
    /// # Safety
    /// As for [`load`](Self::load), and writable.
    unsafe fn store(base: *mut u8, offset: u64, value: Self);

    /// Replaces `current` by `new` and returns what was there, as one access and a full barrier; `None` where the host
    /// has no such instruction.
    ///
    /// # Safety
    /// As for [`store`](Self::store), and `at` is aligned to the integer's size.
    unsafe fn compare_exchange(at: *mut u8, current: Self, new: Self) -> Option<Self>;
}

#[cfg(target_arch = "x86_64")]
macro_rules! plain {
    ($t:ty, $load:literal, $store:literal) => {
        #[inline(always)]
        unsafe fn load(base: *const u8, offset: u64) -> Self {
            let value: u64;
            // SAFETY: reads what the caller vouches for and changes nothing else. All of these clear the register's bits
            // above the value's.
            unsafe {
                std::arch::asm!($load, value = lateout(reg) value, base = in(reg) base, offset = in(reg) offset,
                    options(nostack, preserves_flags, readonly));
                std::hint::assert_unchecked(value <= u64::from(Self::MAX));
            }
            value as Self
        }

        #[inline(always)]
        unsafe fn store(base: *mut u8, offset: u64, value: Self) {
            // SAFETY: writes what the caller vouches for and changes nothing else.
            unsafe {
                std::arch::asm!($store, value = in(reg) u64::from(value), base = in(reg) base,
                    offset = in(reg) offset, options(nostack, preserves_flags));
            }
        }
    };
}

/// `T` at any address: alignment 1, so that a volatile access to it needs no aligned pointer.
#[cfg(not(target_arch = "x86_64"))]
#[repr(C, packed)]
#[derive(Clone, Copy)]
struct Unaligned<T>(T);

#[cfg(not(target_arch = "x86_64"))]
macro_rules! plain {
    ($t:ty, $load:literal, $store:literal) => {
        #[inline(always)]
        unsafe fn load(base: *const u8, offset: u64) -> Self {
            // SAFETY: in mapped memory by the caller's word, of alignment 1, and any bytes are a value.
            unsafe { base.add(offset as usize).cast::<Unaligned<$t>>().read_volatile() }.0
        }

        #[inline(always)]
        unsafe fn store(base: *mut u8, offset: u64, value: Self) {
            // SAFETY: as for `load`.
            unsafe { base.add(offset as usize).cast::<Unaligned<$t>>().write_volatile(Unaligned(value)) }
        }
    };
}

macro_rules! cell {
    ($t:ty, $atomic:ty, $load:literal, $store:literal) => {
        impl Cell for $t {
            plain!($t, $load, $store);

            #[inline(always)]
            unsafe fn compare_exchange(at: *mut u8, current: Self, new: Self) -> Option<Self> {
                // SAFETY: valid for as long as the borrow by the caller's word, aligned, and the memory is shared with
                // accesses that the host itself keeps whole: these atomics and the accesses above.
                let cell = unsafe { <$atomic>::from_ptr(at.cast()) };
                let found = cell.compare_exchange(current, new, Ordering::SeqCst, Ordering::SeqCst);
                Some(found.unwrap_or_else(|found| found))
            }
        }
    };
}
cell!(u8, AtomicU8, "movzx {value:e}, byte ptr [{base} + {offset}]", "mov byte ptr [{base} + {offset}], {value:l}");
cell!(u16, AtomicU16, "movzx {value:e}, word ptr [{base} + {offset}]", "mov word ptr [{base} + {offset}], {value:x}");
cell!(u32, AtomicU32, "mov {value:e}, dword ptr [{base} + {offset}]", "mov dword ptr [{base} + {offset}], {value:e}");
cell!(u64, AtomicU64, "mov {value:r}, qword ptr [{base} + {offset}]", "mov qword ptr [{base} + {offset}], {value:r}");

impl Cell for u128 {
    #[inline(always)]
    unsafe fn load(base: *const u8, offset: u64) -> Self {
        // SAFETY: both halves lie in what the caller vouches for.
        let [low, high] = unsafe { [u64::load(base, offset), u64::load(base, offset + 8)] };
        Self::from(low) | Self::from(high) << 64
    }

    #[inline(always)]
    unsafe fn store(base: *mut u8, offset: u64, value: Self) {
        // SAFETY: both halves lie in what the caller vouches for.
        unsafe {
            u64::store(base, offset, value as u64);
            u64::store(base, offset + 8, (value >> 64) as u64);
        }
    }

    #[inline(always)]
    unsafe fn compare_exchange(at: *mut u8, current: Self, new: Self) -> Option<Self> {
        #[cfg(target_arch = "x86_64")]
        if std::arch::is_x86_feature_detected!("cmpxchg16b") {
            let [mut low, mut high] = [current as u64, (current >> 64) as u64];
            // SAFETY: the processor has the instruction, as was just asked; it writes what the caller vouches for. RBX,
            // which the compiler keeps for itself, is as it was afterwards; the place is not addressed by it.
            unsafe {
                std::arch::asm!(
                    "xchg {new_low}, rbx",
                    "lock cmpxchg16b xmmword ptr [rdi]",
                    "mov rbx, {new_low}",
                    new_low = inout(reg) new as u64 => _,
                    in("rcx") (new >> 64) as u64,
                    in("rdi") at,
                    inout("rax") low,
                    inout("rdx") high,
                    options(nostack),
                );
            }
            return Some(Self::from(low) | Self::from(high) << 64);
        }
        let _ = (at, current, new);
        None
    }
}
