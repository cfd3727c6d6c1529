//! Moves through XMM registers and bitwise logic on them: what memory copies and string functions are made of.

use super::super::cpu::Cpu;
use super::{Handler, Leave, Op, Word, address, get, load, next, redecoded, writable};

/// Where an SSE instruction would fault for want of an operating system's consent, the general executor says how.
macro_rules! ready {
    ($cpu:expr, $op:expr, $rest:expr, $arena:expr) => {
        if !$cpu.sse_ready {
            return redecoded($cpu, $op, $rest, $arena);
        }
    };
}

#[inline(always)]
fn xmm(cpu: &Cpu, register: u8) -> u128 {
    cpu.fpu.xmm[usize::from(register & 15)]
}

#[inline(always)]
fn set_xmm(cpu: &mut Cpu, register: u8, value: u128) {
    cpu.fpu.xmm[usize::from(register & 15)] = value;
}

/// The address of a 16-byte operand that must be aligned, or `None` where that faults.
#[inline(always)]
fn aligned<const I: bool>(cpu: &Cpu, op: &Op) -> Option<u64> {
    let va = address::<I>(cpu, op);
    va.is_multiple_of(16).then_some(va)
}

/// MOVAPS, MOVUPS, MOVDQA, MOVDQU and their like between registers.
pub(in super::super) fn mov_registers(cpu: &mut Cpu, op: &Op, rest: &[Op], arena: &[Op]) -> Leave {
    ready!(cpu, op, rest, arena);
    let value = xmm(cpu, op.src);
    set_xmm(cpu, op.dst, value);
    next!(cpu, rest, arena)
}

fn load_full<const ALIGNED: bool, const I: bool>(cpu: &mut Cpu, op: &Op, rest: &[Op], arena: &[Op]) -> Leave {
    ready!(cpu, op, rest, arena);
    let va = if ALIGNED { aligned::<I>(cpu, op) } else { Some(address::<I>(cpu, op)) };
    let Some(va) = va else { return redecoded(cpu, op, rest, arena) };
    let value = load!(u128, va, cpu, op, rest, arena);
    set_xmm(cpu, op.dst, value);
    next!(cpu, rest, arena)
}

fn store_full<const ALIGNED: bool, const I: bool>(cpu: &mut Cpu, op: &Op, rest: &[Op], arena: &[Op]) -> Leave {
    ready!(cpu, op, rest, arena);
    let va = if ALIGNED { aligned::<I>(cpu, op) } else { Some(address::<I>(cpu, op)) };
    let Some(va) = va else { return redecoded(cpu, op, rest, arena) };
    let to = writable!(u128, va, cpu, op, rest, arena);
    if cpu.ram.store(to, xmm(cpu, op.src)).is_none() {
        return redecoded(cpu, op, rest, arena);
    }
    next!(cpu, rest, arena)
}

/// A load that clears the rest of the register: MOVD, MOVQ, MOVSS, MOVSD.
fn load_low<T: Word, const I: bool>(cpu: &mut Cpu, op: &Op, rest: &[Op], arena: &[Op]) -> Leave {
    ready!(cpu, op, rest, arena);
    let value = load!(T, address::<I>(cpu, op), cpu, op, rest, arena);
    set_xmm(cpu, op.dst, value.widen());
    next!(cpu, rest, arena)
}

fn store_low<T: Word, const I: bool>(cpu: &mut Cpu, op: &Op, rest: &[Op], arena: &[Op]) -> Leave {
    ready!(cpu, op, rest, arena);
    let to = writable!(T, address::<I>(cpu, op), cpu, op, rest, arena);
    if cpu.ram.store(to, T::narrow(xmm(cpu, op.src))).is_none() {
        return redecoded(cpu, op, rest, arena);
    }
    next!(cpu, rest, arena)
}

fn from_general<T: Word>(cpu: &mut Cpu, op: &Op, rest: &[Op], arena: &[Op]) -> Leave {
    ready!(cpu, op, rest, arena);
    let value = T::cut(get(cpu, op.src)).widen();
    set_xmm(cpu, op.dst, value);
    next!(cpu, rest, arena)
}

fn to_general<T: Word>(cpu: &mut Cpu, op: &Op, rest: &[Op], arena: &[Op]) -> Leave {
    ready!(cpu, op, rest, arena);
    let value = T::narrow(xmm(cpu, op.src)).widen64();
    T::set(cpu, op.dst, value);
    next!(cpu, rest, arena)
}

/// 128-bit loads.
pub(in super::super) fn load128(aligned: bool, indexed: bool) -> Handler {
    match (aligned, indexed) {
        (false, false) => load_full::<false, false>,
        (false, true) => load_full::<false, true>,
        (true, false) => load_full::<true, false>,
        (true, true) => load_full::<true, true>,
    }
}

/// 128-bit stores.
pub(in super::super) fn store128(aligned: bool, indexed: bool) -> Handler {
    match (aligned, indexed) {
        (false, false) => store_full::<false, false>,
        (false, true) => store_full::<false, true>,
        (true, false) => store_full::<true, false>,
        (true, true) => store_full::<true, true>,
    }
}

/// Loads of a low part.
pub(in super::super) fn load_part(bits: u32, indexed: bool) -> Handler {
    match (bits, indexed) {
        (32, false) => load_low::<u32, false>,
        (32, true) => load_low::<u32, true>,
        (_, false) => load_low::<u64, false>,
        (_, true) => load_low::<u64, true>,
    }
}

/// Stores of a low part.
pub(in super::super) fn store_part(bits: u32, indexed: bool) -> Handler {
    match (bits, indexed) {
        (32, false) => store_low::<u32, false>,
        (32, true) => store_low::<u32, true>,
        (_, false) => store_low::<u64, false>,
        (_, true) => store_low::<u64, true>,
    }
}

/// MOVD and MOVQ from a general register.
pub(in super::super) fn general_to_xmm(bits: u32) -> Handler {
    if bits == 32 { from_general::<u32> } else { from_general::<u64> }
}

/// MOVD and MOVQ to a general register.
pub(in super::super) fn xmm_to_general(bits: u32) -> Handler {
    if bits == 32 { to_general::<u32> } else { to_general::<u64> }
}

trait Bitwise {
    fn run(a: u128, b: u128) -> u128;
}

macro_rules! bitwise {
    ($name:ident, |$a:ident, $b:ident| $body:expr) => {
        struct $name;
        impl Bitwise for $name {
            #[inline(always)]
            fn run($a: u128, $b: u128) -> u128 {
                $body
            }
        }
    };
}
bitwise!(And, |a, b| a & b);
bitwise!(AndNot, |a, b| !a & b);
bitwise!(Or, |a, b| a | b);
bitwise!(Xor, |a, b| a ^ b);

fn logic_rr<B: Bitwise>(cpu: &mut Cpu, op: &Op, rest: &[Op], arena: &[Op]) -> Leave {
    ready!(cpu, op, rest, arena);
    let value = B::run(xmm(cpu, op.dst), xmm(cpu, op.src));
    set_xmm(cpu, op.dst, value);
    next!(cpu, rest, arena)
}

fn logic_rm<B: Bitwise>(cpu: &mut Cpu, op: &Op, rest: &[Op], arena: &[Op]) -> Leave {
    ready!(cpu, op, rest, arena);
    let Some(va) = aligned::<true>(cpu, op) else { return redecoded(cpu, op, rest, arena) };
    let b = load!(u128, va, cpu, op, rest, arena);
    let value = B::run(xmm(cpu, op.dst), b);
    set_xmm(cpu, op.dst, value);
    next!(cpu, rest, arena)
}

/// Bitwise logic of whole registers, under any of its names.
pub(in super::super) fn logic(mnemonic: iced_x86::Mnemonic, memory: bool) -> Option<Handler> {
    use iced_x86::Mnemonic as M;
    Some(match (mnemonic, memory) {
        (M::Pand | M::Andps | M::Andpd, false) => logic_rr::<And>,
        (M::Pand | M::Andps | M::Andpd, true) => logic_rm::<And>,
        (M::Pandn | M::Andnps | M::Andnpd, false) => logic_rr::<AndNot>,
        (M::Pandn | M::Andnps | M::Andnpd, true) => logic_rm::<AndNot>,
        (M::Por | M::Orps | M::Orpd, false) => logic_rr::<Or>,
        (M::Por | M::Orps | M::Orpd, true) => logic_rm::<Or>,
        (M::Pxor | M::Xorps | M::Xorpd, false) => logic_rr::<Xor>,
        (M::Pxor | M::Xorps | M::Xorpd, true) => logic_rm::<Xor>,
        _ => return None,
    })
}
