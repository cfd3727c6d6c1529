//! Integer arithmetic and logic.
//!
//! Each handler exists with and without flags: where a later instruction of the block overwrites them unread, with
//! nothing between that could fault, they are not computed.

use super::super::cpu::{Cpu, slot};
use super::{Handler, Leave, Op, Word, address, get, load, next, writable};

/// A two-operand operation; bits of the operands above the size do not matter.
pub(super) trait Alu {
    /// Whether the result goes back to the destination.
    const WRITES: bool = true;
    fn run<T: Word, const FLAGS: bool>(cpu: &mut Cpu, a: u64, b: u64) -> u64;
}

macro_rules! alu {
    ($name:ident, $writes:expr, |$cpu:ident, $a:ident, $b:ident, $bits:ident, $flags:ident| $body:block) => {
        pub(super) struct $name;
        impl Alu for $name {
            const WRITES: bool = $writes;
            #[inline(always)]
            fn run<T: Word, const FLAGS: bool>($cpu: &mut Cpu, $a: u64, $b: u64) -> u64 {
                let ($bits, $flags) = (T::BITS, FLAGS);
                $body
            }
        }
    };
}

alu!(Add, true, |cpu, a, b, bits, flags| {
    let res = a.wrapping_add(b);
    if flags {
        cpu.flags.add(a, b, res, bits);
    }
    res
});
alu!(Adc, true, |cpu, a, b, bits, flags| {
    let res = a.wrapping_add(b).wrapping_add(cpu.flags.cf().into());
    if flags {
        cpu.flags.add(a, b, res, bits);
    }
    res
});
alu!(Sub, true, |cpu, a, b, bits, flags| {
    let res = a.wrapping_sub(b);
    if flags {
        cpu.flags.sub(a, b, res, bits);
    }
    res
});
alu!(Sbb, true, |cpu, a, b, bits, flags| {
    let res = a.wrapping_sub(b).wrapping_sub(cpu.flags.cf().into());
    if flags {
        cpu.flags.sub(a, b, res, bits);
    }
    res
});
alu!(Cmp, false, |cpu, a, b, bits, flags| {
    if flags {
        cpu.flags.sub(a, b, a.wrapping_sub(b), bits);
    }
    a
});
alu!(And, true, |cpu, a, b, bits, flags| {
    let res = a & b;
    if flags {
        cpu.flags.logic(res, bits);
    }
    res
});
alu!(Or, true, |cpu, a, b, bits, flags| {
    let res = a | b;
    if flags {
        cpu.flags.logic(res, bits);
    }
    res
});
alu!(Xor, true, |cpu, a, b, bits, flags| {
    let res = a ^ b;
    if flags {
        cpu.flags.logic(res, bits);
    }
    res
});
alu!(Test, false, |cpu, a, b, bits, flags| {
    if flags {
        cpu.flags.logic(a & b, bits);
    }
    a
});
// One-operand operations ignore their second.
alu!(Inc, true, |cpu, a, _b, bits, flags| {
    let res = a.wrapping_add(1);
    if flags {
        cpu.flags.inc(a, res, bits);
    }
    res
});
alu!(Dec, true, |cpu, a, _b, bits, flags| {
    let res = a.wrapping_sub(1);
    if flags {
        cpu.flags.dec(a, res, bits);
    }
    res
});
alu!(Neg, true, |cpu, a, _b, bits, flags| {
    let res = 0u64.wrapping_sub(a);
    if flags {
        cpu.flags.sub(0, a, res, bits);
    }
    res
});
alu!(Not, true, |_cpu, a, _b, _bits, _flags| { !a });

fn rr<A: Alu, T: Word, const F: bool>(cpu: &mut Cpu, op: &Op, rest: &[Op], arena: &[Op]) -> Leave {
    let (a, b) = (get(cpu, op.dst), get(cpu, op.src));
    let res = A::run::<T, F>(cpu, a, b);
    if A::WRITES {
        T::set(cpu, op.dst, res);
    }
    next!(cpu, rest, arena)
}

fn ri<A: Alu, T: Word, const F: bool>(cpu: &mut Cpu, op: &Op, rest: &[Op], arena: &[Op]) -> Leave {
    let a = get(cpu, op.dst);
    let res = A::run::<T, F>(cpu, a, op.imm);
    if A::WRITES {
        T::set(cpu, op.dst, res);
    }
    next!(cpu, rest, arena)
}

fn rm<A: Alu, T: Word, const F: bool, const I: bool>(cpu: &mut Cpu, op: &Op, rest: &[Op], arena: &[Op]) -> Leave {
    let b = load!(T, address::<I>(cpu, op), cpu, op, rest, arena).widen64();
    let a = get(cpu, op.dst);
    let res = A::run::<T, F>(cpu, a, b);
    if A::WRITES {
        T::set(cpu, op.dst, res);
    }
    next!(cpu, rest, arena)
}

/// Memory and a register or, where `src` is the zero slot, an immediate.
fn mr<A: Alu, T: Word, const F: bool, const I: bool>(cpu: &mut Cpu, op: &Op, rest: &[Op], arena: &[Op]) -> Leave {
    let va = address::<I>(cpu, op);
    let b = get(cpu, op.src).wrapping_add(op.imm);
    if A::WRITES {
        let to = writable!(T, va, cpu, op, rest, arena);
        let Some(a) = cpu.ram.load::<T>(to) else { return super::redecoded(cpu, op, rest, arena) };
        let res = A::run::<T, F>(cpu, a.widen64(), b);
        if cpu.ram.store(to, T::cut(res)).is_none() {
            return super::redecoded(cpu, op, rest, arena);
        }
    } else {
        let a = load!(T, va, cpu, op, rest, arena);
        A::run::<T, F>(cpu, a.widen64(), b);
    }
    next!(cpu, rest, arena)
}

/// As [`mr`] that writes, as one access. Its flags are always computed.
fn locked<A: Alu, T: Word, const I: bool>(cpu: &mut Cpu, op: &Op, rest: &[Op], arena: &[Op]) -> Leave {
    let to = writable!(T, address::<I>(cpu, op), cpu, op, rest, arena);
    let (b, before) = (get(cpu, op.src).wrapping_add(op.imm), cpu.flags);
    let Some(mut a) = cpu.ram.load::<T>(to) else { return super::redecoded(cpu, op, rest, arena) };
    loop {
        let res = A::run::<T, true>(cpu, a.widen64(), b);
        match cpu.ram.compare_exchange(to, a, T::cut(res)) {
            Some(found) if found.widen64() == a.widen64() => break,
            found => {
                cpu.flags = before;
                let Some(found) = found else { return super::redecoded(cpu, op, rest, arena) };
                a = found;
            }
        }
    }
    next!(cpu, rest, arena)
}

fn locked_sized<A: Alu>(bits: u32, indexed: bool) -> Handler {
    match (bits, indexed) {
        (8, false) => locked::<A, u8, false>,
        (8, true) => locked::<A, u8, true>,
        (16, false) => locked::<A, u16, false>,
        (16, true) => locked::<A, u16, true>,
        (32, false) => locked::<A, u32, false>,
        (32, true) => locked::<A, u32, true>,
        (_, false) => locked::<A, u64, false>,
        (_, true) => locked::<A, u64, true>,
    }
}

/// The handler of an arithmetic instruction with LOCK, of the more frequent ones.
pub(in super::super) fn locked_handler(mnemonic: iced_x86::Mnemonic, bits: u32, indexed: bool) -> Option<Handler> {
    use iced_x86::Mnemonic as M;
    Some(match mnemonic {
        M::Add => locked_sized::<Add>(bits, indexed),
        M::Sub => locked_sized::<Sub>(bits, indexed),
        M::And => locked_sized::<And>(bits, indexed),
        M::Or => locked_sized::<Or>(bits, indexed),
        M::Xor => locked_sized::<Xor>(bits, indexed),
        M::Inc => locked_sized::<Inc>(bits, indexed),
        M::Dec => locked_sized::<Dec>(bits, indexed),
        _ => return None,
    })
}

/// Where the operands are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) enum Form {
    /// Register and register.
    Rr,
    /// Register and immediate.
    Ri,
    /// Register and memory.
    Rm,
    /// Memory and register or immediate.
    Mr,
}

fn sized<A: Alu, T: Word, const F: bool>(form: Form, indexed: bool) -> Handler {
    match (form, indexed) {
        (Form::Rr, _) => rr::<A, T, F>,
        (Form::Ri, _) => ri::<A, T, F>,
        (Form::Rm, false) => rm::<A, T, F, false>,
        (Form::Rm, true) => rm::<A, T, F, true>,
        (Form::Mr, false) => mr::<A, T, F, false>,
        (Form::Mr, true) => mr::<A, T, F, true>,
    }
}

fn of<A: Alu>(bits: u32, flags: bool, form: Form, indexed: bool) -> Handler {
    match (bits, flags) {
        (8, true) => sized::<A, u8, true>(form, indexed),
        (8, false) => sized::<A, u8, false>(form, indexed),
        (16, true) => sized::<A, u16, true>(form, indexed),
        (16, false) => sized::<A, u16, false>(form, indexed),
        (32, true) => sized::<A, u32, true>(form, indexed),
        (32, false) => sized::<A, u32, false>(form, indexed),
        (_, true) => sized::<A, u64, true>(form, indexed),
        (_, false) => sized::<A, u64, false>(form, indexed),
    }
}

/// The handler of an arithmetic instruction.
pub(in super::super) fn handler(
    mnemonic: iced_x86::Mnemonic,
    bits: u32,
    flags: bool,
    form: Form,
    indexed: bool,
) -> Option<Handler> {
    use iced_x86::Mnemonic as M;
    Some(match mnemonic {
        M::Add => of::<Add>(bits, flags, form, indexed),
        M::Adc => of::<Adc>(bits, flags, form, indexed),
        M::Sub => of::<Sub>(bits, flags, form, indexed),
        M::Sbb => of::<Sbb>(bits, flags, form, indexed),
        M::Cmp => of::<Cmp>(bits, flags, form, indexed),
        M::And => of::<And>(bits, flags, form, indexed),
        M::Or => of::<Or>(bits, flags, form, indexed),
        M::Xor => of::<Xor>(bits, flags, form, indexed),
        M::Test => of::<Test>(bits, flags, form, indexed),
        M::Inc => of::<Inc>(bits, flags, form, indexed),
        M::Dec => of::<Dec>(bits, flags, form, indexed),
        M::Neg => of::<Neg>(bits, flags, form, indexed),
        M::Not => of::<Not>(bits, false, form, indexed),
        _ => return None,
    })
}

/// A shift by a constant; the count is masked and not zero.
pub(super) trait Shift {
    fn run<T: Word, const FLAGS: bool>(cpu: &mut Cpu, a: u64, count: u32) -> u64;
}

macro_rules! shift {
    ($name:ident, $pure:path) => {
        pub(super) struct $name;
        impl Shift for $name {
            #[inline(always)]
            fn run<T: Word, const FLAGS: bool>(cpu: &mut Cpu, a: u64, count: u32) -> u64 {
                $pure(&mut cpu.flags, a, count, T::BITS, FLAGS)
            }
        }
    };
}
shift!(Shl, super::super::flags::shl);
shift!(Shr, super::super::flags::shr);
shift!(Sar, super::super::flags::sar);
shift!(Rol, super::super::flags::rol);
shift!(Ror, super::super::flags::ror);

fn shift_imm<S: Shift, T: Word, const F: bool>(cpu: &mut Cpu, op: &Op, rest: &[Op], arena: &[Op]) -> Leave {
    let a = get(cpu, op.dst);
    let res = S::run::<T, F>(cpu, a, op.imm as u32);
    T::set(cpu, op.dst, res);
    next!(cpu, rest, arena)
}

fn shift_cl<S: Shift, T: Word, const F: bool>(cpu: &mut Cpu, op: &Op, rest: &[Op], arena: &[Op]) -> Leave {
    let mask = if T::BITS == 64 { 63 } else { 31 };
    let count = cpu.regs[slot::RCX] as u32 & mask;
    let a = get(cpu, op.dst);
    // A count of zero keeps the flags; the register is written all the same (its upper half, at 32 bits).
    let res = if count == 0 { a } else { S::run::<T, F>(cpu, a, count) };
    T::set(cpu, op.dst, res);
    next!(cpu, rest, arena)
}

fn shift_sized<S: Shift, const F: bool>(bits: u32, by_cl: bool) -> Option<Handler> {
    Some(match (bits, by_cl) {
        (32, false) => shift_imm::<S, u32, F>,
        (64, false) => shift_imm::<S, u64, F>,
        (32, true) => shift_cl::<S, u32, F>,
        (64, true) => shift_cl::<S, u64, F>,
        (8, false) => shift_imm::<S, u8, F>,
        (16, false) => shift_imm::<S, u16, F>,
        _ => return None,
    })
}

/// The handler of a shift of a register by a constant or CL. Flags of a shift by CL are always computed: it may
/// keep those of before.
pub(in super::super) fn shift_handler(
    mnemonic: iced_x86::Mnemonic,
    bits: u32,
    flags: bool,
    by_cl: bool,
) -> Option<Handler> {
    use iced_x86::Mnemonic as M;
    match (mnemonic, flags) {
        (M::Shl | M::Sal, true) => shift_sized::<Shl, true>(bits, by_cl),
        (M::Shl | M::Sal, false) => shift_sized::<Shl, false>(bits, by_cl),
        (M::Shr, true) => shift_sized::<Shr, true>(bits, by_cl),
        (M::Shr, false) => shift_sized::<Shr, false>(bits, by_cl),
        (M::Sar, true) => shift_sized::<Sar, true>(bits, by_cl),
        (M::Sar, false) => shift_sized::<Sar, false>(bits, by_cl),
        (M::Rol, true) => shift_sized::<Rol, true>(bits, by_cl),
        (M::Rol, false) => shift_sized::<Rol, false>(bits, by_cl),
        (M::Ror, true) => shift_sized::<Ror, true>(bits, by_cl),
        (M::Ror, false) => shift_sized::<Ror, false>(bits, by_cl),
        _ => None,
    }
}

/// IMUL r, r: the low half of the product; CF and OF say whether that is all of it.
fn imul_rr<T: Word, const F: bool>(cpu: &mut Cpu, op: &Op, rest: &[Op], arena: &[Op]) -> Leave {
    let (a, b) = (get(cpu, op.dst), get(cpu, op.src));
    imul::<T, F>(cpu, op.dst, a, b);
    next!(cpu, rest, arena)
}

/// IMUL r, r, imm.
fn imul_rri<T: Word, const F: bool>(cpu: &mut Cpu, op: &Op, rest: &[Op], arena: &[Op]) -> Leave {
    let a = get(cpu, op.src);
    imul::<T, F>(cpu, op.dst, a, op.imm);
    next!(cpu, rest, arena)
}

#[inline(always)]
fn imul<T: Word, const F: bool>(cpu: &mut Cpu, dst: u8, a: u64, b: u64) {
    let (a, b) = (T::cut(a).sign_extend() as i64, T::cut(b).sign_extend() as i64);
    let (low, overflow) = a.overflowing_mul(b);
    let res = low as u64;
    if F {
        // CF and OF alike; silicon leaves the other four alone.
        let lost = overflow || T::cut(res).sign_extend() != res;
        cpu.flags.cv = u64::from(lost) << 63;
    }
    T::set(cpu, dst, res);
}

/// The handler of IMUL with a register destination.
pub(in super::super) fn imul_handler(bits: u32, flags: bool, immediate: bool) -> Option<Handler> {
    Some(match (bits, flags, immediate) {
        (32, true, false) => imul_rr::<u32, true>,
        (32, false, false) => imul_rr::<u32, false>,
        (64, true, false) => imul_rr::<u64, true>,
        (64, false, false) => imul_rr::<u64, false>,
        (32, true, true) => imul_rri::<u32, true>,
        (32, false, true) => imul_rri::<u32, false>,
        (64, true, true) => imul_rri::<u64, true>,
        (64, false, true) => imul_rri::<u64, false>,
        _ => return None,
    })
}
