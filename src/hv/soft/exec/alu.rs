//! Addition, subtraction, logic and comparison.

use iced_x86::Instruction;

use crate::hv::soft::cpu::Cpu;
use crate::hv::soft::fault::{Flow, Stop};
use crate::hv::soft::flags::Flags;
use crate::hv::soft::operand::operand_bits;

fn update(
    cpu: &mut Cpu,
    insn: &Instruction,
    operation: impl Fn(&mut Flags, u64, u64, u32) -> u64,
) -> Result<Flow, Stop> {
    let b = cpu.operand(insn, 1)?;
    cpu.modify(insn, |flags, a, bits| operation(flags, a, b, bits))
}

pub(super) fn add(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    update(cpu, insn, |flags, a, b, bits| {
        let result = a.wrapping_add(b);
        flags.add(a, b, result, bits);
        result
    })
}

pub(super) fn adc(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    update(cpu, insn, |flags, a, b, bits| {
        let result = a.wrapping_add(b).wrapping_add(flags.cf().into());
        flags.add(a, b, result, bits);
        result
    })
}

pub(super) fn sub(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    update(cpu, insn, |flags, a, b, bits| {
        let result = a.wrapping_sub(b);
        flags.sub(a, b, result, bits);
        result
    })
}

pub(super) fn sbb(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    update(cpu, insn, |flags, a, b, bits| {
        let result = a.wrapping_sub(b).wrapping_sub(flags.cf().into());
        flags.sub(a, b, result, bits);
        result
    })
}

fn logic(cpu: &mut Cpu, insn: &Instruction, operation: fn(u64, u64) -> u64) -> Result<Flow, Stop> {
    update(cpu, insn, |flags, a, b, bits| {
        let result = operation(a, b);
        flags.logic(result, bits);
        result
    })
}

pub(super) fn and(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    logic(cpu, insn, |a, b| a & b)
}

pub(super) fn or(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    logic(cpu, insn, |a, b| a | b)
}

pub(super) fn xor(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    logic(cpu, insn, |a, b| a ^ b)
}

pub(super) fn cmp(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    let (a, b) = (cpu.operand(insn, 0)?, cpu.operand(insn, 1)?);
    cpu.flags.sub(a, b, a.wrapping_sub(b), operand_bits(insn, 0));
    Ok(Flow::Next)
}

pub(super) fn test(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    let (a, b) = (cpu.operand(insn, 0)?, cpu.operand(insn, 1)?);
    cpu.flags.logic(a & b, operand_bits(insn, 0));
    Ok(Flow::Next)
}

pub(super) fn inc(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    cpu.modify(insn, |flags, a, bits| {
        let result = a.wrapping_add(1);
        flags.inc(a, result, bits);
        result
    })
}

pub(super) fn dec(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    cpu.modify(insn, |flags, a, bits| {
        let result = a.wrapping_sub(1);
        flags.dec(a, result, bits);
        result
    })
}

pub(super) fn neg(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    cpu.modify(insn, |flags, a, bits| {
        let result = a.wrapping_neg();
        flags.sub(0, a, result, bits);
        result
    })
}

pub(super) fn not(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    cpu.modify(insn, |_, a, _| !a)
}
