//! Moves between registers and memory, extensions, address arithmetic and conditional moves.

use super::super::cpu::{Cpu, slot};
use super::{Handler, Leave, Op, Word, address, get, load, next, writable};

fn mov_rr<T: Word>(cpu: &mut Cpu, op: &Op, rest: &[Op], arena: &[Op]) -> Leave {
    let value = get(cpu, op.src);
    T::set(cpu, op.dst, value);
    next!(cpu, rest, arena)
}

fn mov_ri<T: Word>(cpu: &mut Cpu, op: &Op, rest: &[Op], arena: &[Op]) -> Leave {
    T::set(cpu, op.dst, op.imm);
    next!(cpu, rest, arena)
}

fn mov_rm<T: Word, const I: bool>(cpu: &mut Cpu, op: &Op, rest: &[Op], arena: &[Op]) -> Leave {
    let value = load!(T, address::<I>(cpu, op), cpu, op, rest, arena);
    T::set(cpu, op.dst, value.widen64());
    next!(cpu, rest, arena)
}

/// A register or, where `src` is the zero slot, an immediate to memory.
fn mov_mr<T: Word, const I: bool>(cpu: &mut Cpu, op: &Op, rest: &[Op], arena: &[Op]) -> Leave {
    let to = writable!(T, address::<I>(cpu, op), cpu, op, rest, arena);
    let value = get(cpu, op.src).wrapping_add(op.imm);
    if cpu.ram.store(to, T::cut(value)).is_none() {
        return super::redecoded(cpu, op, rest, arena);
    }
    next!(cpu, rest, arena)
}

macro_rules! by_size {
    ($bits:expr, $f:ident $(, $g:tt)*) => {
        match $bits {
            8 => $f::<u8 $(, $g)*>,
            16 => $f::<u16 $(, $g)*>,
            32 => $f::<u32 $(, $g)*>,
            _ => $f::<u64 $(, $g)*>,
        }
    };
}

/// MOV between registers.
pub(in super::super) fn mov_registers(bits: u32) -> Handler {
    by_size!(bits, mov_rr)
}

/// MOV of an immediate to a register.
pub(in super::super) fn mov_immediate(bits: u32) -> Handler {
    by_size!(bits, mov_ri)
}

/// MOV from memory.
pub(in super::super) fn mov_load(bits: u32, indexed: bool) -> Handler {
    if indexed { by_size!(bits, mov_rm, true) } else { by_size!(bits, mov_rm, false) }
}

/// MOV to memory.
pub(in super::super) fn mov_store(bits: u32, indexed: bool) -> Handler {
    if indexed { by_size!(bits, mov_mr, true) } else { by_size!(bits, mov_mr, false) }
}

fn extend_rr<From: Word, To: Word, const SIGNED: bool>(cpu: &mut Cpu, op: &Op, rest: &[Op], arena: &[Op]) -> Leave {
    let value = From::cut(get(cpu, op.src));
    To::set(cpu, op.dst, if SIGNED { value.sign_extend() } else { value.widen64() });
    next!(cpu, rest, arena)
}

fn extend_rm<From: Word, To: Word, const SIGNED: bool, const I: bool>(
    cpu: &mut Cpu,
    op: &Op,
    rest: &[Op],
    arena: &[Op],
) -> Leave {
    let value = load!(From, address::<I>(cpu, op), cpu, op, rest, arena);
    To::set(cpu, op.dst, if SIGNED { value.sign_extend() } else { value.widen64() });
    next!(cpu, rest, arena)
}

/// Where the source of an extension is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) enum Source {
    Register,
    Memory,
    Indexed,
}

/// MOVZX, MOVSX and MOVSXD.
pub(in super::super) fn extend(from: u32, to: u32, signed: bool, source: Source) -> Option<Handler> {
    macro_rules! pick {
        ($from:ty, $to:ty) => {
            match (signed, source) {
                (false, Source::Register) => extend_rr::<$from, $to, false>,
                (true, Source::Register) => extend_rr::<$from, $to, true>,
                (false, Source::Memory) => extend_rm::<$from, $to, false, false>,
                (true, Source::Memory) => extend_rm::<$from, $to, true, false>,
                (false, Source::Indexed) => extend_rm::<$from, $to, false, true>,
                (true, Source::Indexed) => extend_rm::<$from, $to, true, true>,
            }
        };
    }
    Some(match (from, to) {
        (8, 32) => pick!(u8, u32),
        (8, 64) => pick!(u8, u64),
        (16, 32) => pick!(u16, u32),
        (16, 64) => pick!(u16, u64),
        (32, 64) => pick!(u32, u64),
        _ => return None,
    })
}

fn lea_as<T: Word, const I: bool>(cpu: &mut Cpu, op: &Op, rest: &[Op], arena: &[Op]) -> Leave {
    let value = address::<I>(cpu, op);
    T::set(cpu, op.dst, value);
    next!(cpu, rest, arena)
}

/// LEA with 64-bit addresses.
pub(in super::super) fn lea(bits: u32, indexed: bool) -> Option<Handler> {
    Some(match (bits, indexed) {
        (32, false) => lea_as::<u32, false>,
        (32, true) => lea_as::<u32, true>,
        (64, false) => lea_as::<u64, false>,
        (64, true) => lea_as::<u64, true>,
        _ => return None,
    })
}

fn set_r<const CC: u8>(cpu: &mut Cpu, op: &Op, rest: &[Op], arena: &[Op]) -> Leave {
    let value = cpu.flags.condition(CC).into();
    u8::set(cpu, op.dst, value);
    next!(cpu, rest, arena)
}

/// Not taken, a 32-bit move still clears the upper half.
fn cmov_rr<const CC: u8, T: Word>(cpu: &mut Cpu, op: &Op, rest: &[Op], arena: &[Op]) -> Leave {
    let value = if cpu.flags.condition(CC) { get(cpu, op.src) } else { get(cpu, op.dst) };
    T::set(cpu, op.dst, value);
    next!(cpu, rest, arena)
}

/// Reads memory whether or not it moves.
fn cmov_rm<const CC: u8, T: Word>(cpu: &mut Cpu, op: &Op, rest: &[Op], arena: &[Op]) -> Leave {
    let loaded = load!(T, address::<true>(cpu, op), cpu, op, rest, arena).widen64();
    let value = if cpu.flags.condition(CC) { loaded } else { get(cpu, op.dst) };
    T::set(cpu, op.dst, value);
    next!(cpu, rest, arena)
}

macro_rules! by_condition {
    ($f:ident $(, $t:ty)*) => {
        [
            $f::<0 $(, $t)*>, $f::<1 $(, $t)*>, $f::<2 $(, $t)*>, $f::<3 $(, $t)*>, $f::<4 $(, $t)*>, $f::<5 $(, $t)*>,
            $f::<6 $(, $t)*>, $f::<7 $(, $t)*>, $f::<8 $(, $t)*>, $f::<9 $(, $t)*>, $f::<10 $(, $t)*>,
            $f::<11 $(, $t)*>, $f::<12 $(, $t)*>, $f::<13 $(, $t)*>, $f::<14 $(, $t)*>, $f::<15 $(, $t)*>,
        ]
    };
}

const SET_R: [Handler; 16] = by_condition!(set_r);
const CMOV_RR32: [Handler; 16] = by_condition!(cmov_rr, u32);
const CMOV_RR64: [Handler; 16] = by_condition!(cmov_rr, u64);
const CMOV_RM32: [Handler; 16] = by_condition!(cmov_rm, u32);
const CMOV_RM64: [Handler; 16] = by_condition!(cmov_rm, u64);

/// SETcc to a register.
pub(in super::super) fn setcc(condition: usize) -> Handler {
    SET_R[condition & 15]
}

/// CMOVcc from a register or from memory (with or without an index).
pub(in super::super) fn cmov(condition: usize, bits: u32, memory: bool) -> Option<Handler> {
    let table = match (bits, memory) {
        (32, false) => &CMOV_RR32,
        (64, false) => &CMOV_RR64,
        (32, true) => &CMOV_RM32,
        (64, true) => &CMOV_RM64,
        _ => return None,
    };
    Some(table[condition & 15])
}

fn xchg_as<T: Word>(cpu: &mut Cpu, op: &Op, rest: &[Op], arena: &[Op]) -> Leave {
    let (a, b) = (get(cpu, op.dst), get(cpu, op.src));
    T::set(cpu, op.dst, b);
    T::set(cpu, op.src, a);
    next!(cpu, rest, arena)
}

/// XCHG of registers.
pub(in super::super) fn xchg(bits: u32) -> Handler {
    by_size!(bits, xchg_as)
}

/// NOP and the hints that are one.
pub(in super::super) fn nop(cpu: &mut Cpu, _op: &Op, rest: &[Op], arena: &[Op]) -> Leave {
    next!(cpu, rest, arena)
}

/// CDQE.
pub(in super::super) fn cdqe(cpu: &mut Cpu, _op: &Op, rest: &[Op], arena: &[Op]) -> Leave {
    cpu.regs[slot::RAX] = cpu.regs[slot::RAX] as i32 as i64 as u64;
    next!(cpu, rest, arena)
}

/// CQO.
pub(in super::super) fn cqo(cpu: &mut Cpu, _op: &Op, rest: &[Op], arena: &[Op]) -> Leave {
    cpu.regs[slot::RDX] = (cpu.regs[slot::RAX] as i64 >> 63) as u64;
    next!(cpu, rest, arena)
}

/// CDQ.
pub(in super::super) fn cdq(cpu: &mut Cpu, _op: &Op, rest: &[Op], arena: &[Op]) -> Leave {
    cpu.regs[slot::RDX] = u64::from((cpu.regs[slot::RAX] as i32 >> 31) as u32);
    next!(cpu, rest, arena)
}

/// BSWAP r64.
pub(in super::super) fn bswap64(cpu: &mut Cpu, op: &Op, rest: &[Op], arena: &[Op]) -> Leave {
    cpu.regs[usize::from(op.dst)] = get(cpu, op.dst).swap_bytes();
    next!(cpu, rest, arena)
}

/// BSWAP r32.
pub(in super::super) fn bswap32(cpu: &mut Cpu, op: &Op, rest: &[Op], arena: &[Op]) -> Leave {
    cpu.regs[usize::from(op.dst)] = (get(cpu, op.dst) as u32).swap_bytes().into();
    next!(cpu, rest, arena)
}
