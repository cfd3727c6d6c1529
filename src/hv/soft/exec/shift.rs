//! Shifts and rotates. Flags that the manuals leave undefined are as AMD's silicon leaves them.

use iced_x86::Instruction;

use crate::hv::soft::cpu::Cpu;
use crate::hv::soft::fault::{Flow, Stop};
use crate::hv::soft::flags;
use crate::hv::soft::flags::Flags;
use crate::hv::soft::operand::operand_bits;

use super::mask;

/// Runs `operation` with the masked count, unless that is zero, which changes no flag.
fn shift(
    cpu: &mut Cpu,
    insn: &Instruction,
    count: u32,
    operation: impl Fn(&mut Flags, u64, u32, u32) -> u64,
) -> Result<Flow, Stop> {
    let count = cpu.operand(insn, count)? as u32;
    let count = count & if operand_bits(insn, 0) == 64 { 0x3f } else { 0x1f };
    cpu.modify(insn, |flags, a, bits| if count == 0 { a } else { operation(flags, a, bits, count) })
}

fn top(value: u64, bits: u32) -> bool {
    value >> (bits - 1) & 1 != 0
}

pub(super) fn shl(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    shift(cpu, insn, 1, |flags, a, bits, count| flags::shl(flags, a, count, bits, true))
}

pub(super) fn shr(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    shift(cpu, insn, 1, |flags, a, bits, count| flags::shr(flags, a, count, bits, true))
}

pub(super) fn sar(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    shift(cpu, insn, 1, |flags, a, bits, count| flags::sar(flags, a, count, bits, true))
}

/// Rotates change CF and OF alone.
fn rotated(flags: &mut Flags, cf: bool, of: bool) {
    flags.set_cf(cf);
    flags.set_of(of);
}

fn rotate_left(a: u64, bits: u32, count: u32) -> u64 {
    let count = count % bits;
    if count == 0 { a } else { (a << count | a >> (bits - count)) & mask(bits) }
}

pub(super) fn rol(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    shift(cpu, insn, 1, |flags, a, bits, count| flags::rol(flags, a, count, bits, true))
}

pub(super) fn ror(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    shift(cpu, insn, 1, |flags, a, bits, count| flags::ror(flags, a, count, bits, true))
}

/// Rotates `bits` bits and CF above them left by `count`.
fn rotate_through_carry(flags: &Flags, a: u64, bits: u32, count: u32) -> (u64, bool) {
    let wide = u128::from(flags.cf()) << bits | u128::from(a & mask(bits));
    let rotated = if count == 0 { wide } else { wide << count | wide >> (bits + 1 - count) };
    (rotated as u64 & mask(bits), rotated >> bits & 1 != 0)
}

pub(super) fn rcl(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    shift(cpu, insn, 1, |flags, a, bits, count| {
        let (result, cf) = rotate_through_carry(flags, a, bits, count % (bits + 1));
        rotated(flags, cf, top(result, bits) != cf);
        result
    })
}

pub(super) fn rcr(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    shift(cpu, insn, 1, |flags, a, bits, count| {
        let left = (bits + 1 - count % (bits + 1)) % (bits + 1);
        let (result, cf) = rotate_through_carry(flags, a, bits, left);
        rotated(flags, cf, top(result, bits) != top(result << 1, bits));
        result
    })
}

pub(super) fn shld(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    let fill = cpu.operand(insn, 1)?;
    shift(cpu, insn, 2, |flags, a, bits, count| {
        let result = if count > bits {
            // Undefined with 16 bits: the source follows itself, and CF and OF are clear.
            rotate_left(fill, bits, count - bits)
        } else {
            ((u128::from(a) << bits | u128::from(fill)) << count >> bits) as u64 & mask(bits)
        };
        let cf = count <= bits && a >> (bits - count) & 1 != 0;
        flags.result_cf_of(result, bits, cf, count <= bits && top(result, bits) != cf);
        result
    })
}

pub(super) fn shrd(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    let fill = cpu.operand(insn, 1)?;
    shift(cpu, insn, 2, |flags, a, bits, count| {
        let result = if count > bits {
            rotate_left(fill, bits, 2 * bits - count)
        } else {
            ((u128::from(fill) << bits | u128::from(a)) >> count) as u64 & mask(bits)
        };
        let cf = count <= bits && a >> (count - 1) & 1 != 0;
        flags.result_cf_of(result, bits, cf, top(result, bits) != top(result << 1, bits));
        result
    })
}
