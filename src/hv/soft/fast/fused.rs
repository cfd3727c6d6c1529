//! CMP or TEST and the conditional jump after it, as one operation.
//!
//! The pair ends most blocks. Fused, the condition is a comparison of the operands instead of a reading of lazy flags,
//! and one dispatch is saved. The flags are stored all the same: the next block may want them. Only register and
//! immediate operands, which cannot fault, and targets within the page.

use super::super::cpu::Cpu;
use super::branch::conditional;
use super::{Handler, Leave, Op, Word, get};

/// Which instruction sets the flags.
trait Compare {
    fn flags<T: Word>(cpu: &mut Cpu, a: u64, b: u64);
    /// The condition `CC` without its low, inverting bit.
    fn holds<T: Word, const CC: u8>(cpu: &Cpu, a: u64, b: u64) -> bool;
}

struct Cmp;
struct Test;

impl Compare for Cmp {
    #[inline(always)]
    fn flags<T: Word>(cpu: &mut Cpu, a: u64, b: u64) {
        cpu.flags.sub(a, b, a.wrapping_sub(b), T::BITS);
    }

    #[inline(always)]
    fn holds<T: Word, const CC: u8>(cpu: &Cpu, a: u64, b: u64) -> bool {
        let (ua, ub) = (T::cut(a).widen64(), T::cut(b).widen64());
        let (sa, sb) = (T::cut(a).sign_extend() as i64, T::cut(b).sign_extend() as i64);
        match CC >> 1 {
            1 => ua < ub,
            2 => ua == ub,
            3 => ua <= ub,
            6 => sa < sb,
            7 => sa <= sb,
            _ => cpu.flags.condition(CC & !1),
        }
    }
}

impl Compare for Test {
    #[inline(always)]
    fn flags<T: Word>(cpu: &mut Cpu, a: u64, b: u64) {
        cpu.flags.logic(a & b, T::BITS);
    }

    #[inline(always)]
    fn holds<T: Word, const CC: u8>(cpu: &Cpu, a: u64, b: u64) -> bool {
        let both = T::cut(a & b).sign_extend() as i64;
        match CC >> 1 {
            // TEST clears CF and OF.
            0 | 1 => false,
            2 | 3 => both == 0,
            4 | 6 => both < 0,
            7 => both <= 0,
            _ => cpu.flags.condition(CC & !1),
        }
    }
}

fn rr<C: Compare, T: Word, const CC: u8>(cpu: &mut Cpu, op: &Op, rest: &[Op], arena: &[Op]) -> Leave {
    let (a, b) = (get(cpu, op.dst), get(cpu, op.src));
    C::flags::<T>(cpu, a, b);
    let taken = C::holds::<T, CC>(cpu, a, b) != (CC & 1 != 0);
    conditional(cpu, op, rest, arena, taken, fused_target(op))
}

fn ri<C: Compare, T: Word, const CC: u8>(cpu: &mut Cpu, op: &Op, rest: &[Op], arena: &[Op]) -> Leave {
    let (a, b) = (get(cpu, op.dst), op.imm);
    C::flags::<T>(cpu, a, b);
    let taken = C::holds::<T, CC>(cpu, a, b) != (CC & 1 != 0);
    conditional(cpu, op, rest, arena, taken, fused_target(op))
}

/// The fields of an address are free in these forms and hold the in-page target.
#[inline(always)]
fn fused_target(op: &Op) -> u64 {
    u64::from(u16::from_le_bytes([op.base, op.index]))
}

macro_rules! conditions {
    ($f:ident, $c:ty, $t:ty) => {
        [
            $f::<$c, $t, 0>,
            $f::<$c, $t, 1>,
            $f::<$c, $t, 2>,
            $f::<$c, $t, 3>,
            $f::<$c, $t, 4>,
            $f::<$c, $t, 5>,
            $f::<$c, $t, 6>,
            $f::<$c, $t, 7>,
            $f::<$c, $t, 8>,
            $f::<$c, $t, 9>,
            $f::<$c, $t, 10>,
            $f::<$c, $t, 11>,
            $f::<$c, $t, 12>,
            $f::<$c, $t, 13>,
            $f::<$c, $t, 14>,
            $f::<$c, $t, 15>,
        ]
    };
}

macro_rules! sizes {
    ($f:ident, $c:ty) => {
        [conditions!($f, $c, u8), conditions!($f, $c, u16), conditions!($f, $c, u32), conditions!($f, $c, u64)]
    };
}

static CMP_RR: [[Handler; 16]; 4] = sizes!(rr, Cmp);
static CMP_RI: [[Handler; 16]; 4] = sizes!(ri, Cmp);
static TEST_RR: [[Handler; 16]; 4] = sizes!(rr, Test);
static TEST_RI: [[Handler; 16]; 4] = sizes!(ri, Test);

/// The handler of a pair: CMP or TEST (`test`) of operands of `bits`, and a jump on `condition`.
pub(in super::super) fn handler(test: bool, immediate: bool, bits: u32, condition: usize) -> Handler {
    let table = match (test, immediate) {
        (false, false) => &CMP_RR,
        (false, true) => &CMP_RI,
        (true, false) => &TEST_RR,
        (true, true) => &TEST_RI,
    };
    table[(bits.trailing_zeros() as usize).saturating_sub(3) & 3][condition & 15]
}
