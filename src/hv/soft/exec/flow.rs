//! Near control transfers, software interrupts, SYSCALL and SYSRET.

use std::sync::atomic::Ordering;
use std::sync::atomic::fence;

use iced_x86::{Code, Instruction, Mnemonic, OpKind};

use crate::hv::soft::cpu::{Cpu, efer, is_canonical, seg, slot};
use crate::hv::soft::fault::{Exception, Flow, Stop};
use crate::hv::soft::flags;
use crate::hv::soft::flags::sext;
use crate::hv::soft::mmu::Access;
use crate::hv::soft::operand::operand_bits;
use crate::hv::state::x86_64::Segment;

use super::interrupt::Source;
use super::mask;
use super::moves::condition;

impl Cpu {
    /// Goes to `target`, if there can be code.
    fn jump(&mut self, target: u64) -> Result<Flow, Stop> {
        if !self.is_code_address(target) {
            return Err(Exception::general_protection(0).into());
        }
        self.rip = target;
        Ok(Flow::Jump)
    }

    /// An operand-size prefix cuts a near branch's target to 16 bits, in 64-bit mode too, as AMD's processors have it.
    fn near_target(&mut self, insn: &Instruction) -> Result<u64, Stop> {
        match insn.op0_kind() {
            OpKind::Register | OpKind::Memory => self.operand(insn, 0),
            OpKind::NearBranch16 => Ok(self.branch_target(insn) & mask(16)),
            OpKind::NearBranch32 => Ok(self.branch_target(insn) & mask(32)),
            _ => Ok(self.branch_target(insn)),
        }
    }
}

pub(super) fn nop(_: &mut Cpu, _: &Instruction) -> Result<Flow, Stop> {
    Ok(Flow::Next)
}

/// All stores before it are seen by others before a load after it is done.
pub(super) fn mfence(_: &mut Cpu, _: &Instruction) -> Result<Flow, Stop> {
    fence(Ordering::SeqCst);
    Ok(Flow::Next)
}

/// A vCPU that waits for another, whose thread may be waiting for this one's host processor.
pub(super) fn pause(cpu: &mut Cpu, _: &Instruction) -> Result<Flow, Stop> {
    cpu.sharing.pause();
    Ok(Flow::Next)
}

pub(super) fn jmp(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    branch(cpu, insn)
}

pub(super) fn call(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    let target = cpu.near_target(insn)?;
    let back = cpu.rip;
    if !cpu.is_code_address(target) {
        return Err(Exception::general_protection(0).into());
    }
    cpu.push_sized(back, insn.stack_pointer_increment().unsigned_abs().into())?;
    cpu.jump(target)
}

pub(super) fn ret(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    let bytes = match insn.code() {
        Code::Retnw | Code::Retnw_imm16 => 2,
        Code::Retnd | Code::Retnd_imm16 => 4,
        _ => 8,
    };
    let target = cpu.peek_sized(0, bytes)?;
    let flow = cpu.jump(target)?;
    let drop = if insn.op_count() == 1 { u64::from(insn.immediate16()) } else { 0 };
    cpu.move_stack(bytes + drop);
    Ok(flow)
}

fn branch(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    let target = cpu.near_target(insn)?;
    cpu.jump(target)
}

/// BOUND: #BR unless a signed index lies within two bounds in memory.
pub(super) fn bound(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    let bits = operand_bits(insn, 0);
    let bytes = u64::from(bits / 8);
    let at = cpu.linear_address(insn, 2 * bytes, Access::Read)?;
    let read = |cpu: &mut Cpu, at: u64| -> Result<i64, Stop> {
        let value = if bits == 16 { cpu.read::<u16>(at)?.into() } else { cpu.read::<u32>(at)?.into() };
        Ok(sext(value, bits) as i64)
    };
    let bounds = read(cpu, at)?..=read(cpu, at + bytes)?;
    let index = sext(cpu.register(insn.op0_register()), bits) as i64;
    if bounds.contains(&index) { Ok(Flow::Next) } else { Err(Exception::BOUND.into()) }
}

pub(super) fn jcc(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    if condition(cpu, insn) { branch(cpu, insn) } else { Ok(Flow::Next) }
}

/// The count register's width: that of addresses.
fn count_bits(insn: &Instruction) -> u32 {
    use iced_x86::Code as C;
    match insn.code() {
        C::Loop_rel8_16_CX | C::Loope_rel8_16_CX | C::Loopne_rel8_16_CX | C::Jcxz_rel8_16 => 16,
        C::Loop_rel8_32_CX | C::Loope_rel8_32_CX | C::Loopne_rel8_32_CX | C::Jcxz_rel8_32 => 16,
        C::Loop_rel8_64_ECX | C::Loope_rel8_64_ECX | C::Loopne_rel8_64_ECX | C::Jecxz_rel8_64 => 32,
        C::Loop_rel8_32_ECX | C::Loope_rel8_32_ECX | C::Loopne_rel8_32_ECX | C::Jecxz_rel8_32 => 32,
        C::Loop_rel8_16_ECX | C::Loope_rel8_16_ECX | C::Loopne_rel8_16_ECX | C::Jecxz_rel8_16 => 32,
        _ => 64,
    }
}

pub(super) fn loops(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    let bits = count_bits(insn);
    let count = cpu.regs[slot::RCX].wrapping_sub(1) & mask(bits);
    let again = count != 0
        && match insn.mnemonic() {
            Mnemonic::Loope => cpu.flags.zf(),
            Mnemonic::Loopne => !cpu.flags.zf(),
            _ => true,
        };
    let flow = if again { branch(cpu, insn)? } else { Flow::Next };
    cpu.set_low(slot::RCX, bits, count);
    Ok(flow)
}

pub(super) fn jrcxz(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    if cpu.regs[slot::RCX] & mask(count_bits(insn)) == 0 { branch(cpu, insn) } else { Ok(Flow::Next) }
}

/// INT3, INT n, INTO and INT1: traps, so the frame's RIP is after the instruction.
pub(super) fn int(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    let (vector, source) = match insn.mnemonic() {
        Mnemonic::Int3 => (3, Source::Software),
        Mnemonic::Into if !cpu.flags.of() => return Ok(Flow::Next),
        Mnemonic::Into => (4, Source::Software),
        // Privileged in name only: it skips the gate's DPL check.
        Mnemonic::Int1 => (1, Source::Exception),
        _ => (insn.immediate8(), Source::Software),
    };
    cpu.enter_gate(vector, None, source)?;
    // They clear TF, and what comes next is not traced (SDM 19.3.1.4).
    cpu.single_step = false;
    Ok(Flow::Sync)
}

/// Flat segments, as SYSCALL and SYSRET make them without looking at descriptors.
fn flat_code(selector: u16, dpl: u16, long: bool) -> Segment {
    // Present, code, readable, accessed; G, and L or D.
    let attributes = 0x809b | dpl << 5 | if long { 1 << 13 } else { 1 << 14 };
    Segment { selector, base: 0, limit: u32::MAX, attributes, unusable: false }
}

fn flat_stack(selector: u16, dpl: u16) -> Segment {
    Segment { selector, base: 0, limit: u32::MAX, attributes: 0xc093 | dpl << 5, unusable: false }
}

/// There is none outside 64-bit mode on processors of the vendor that CPUID names.
pub(super) fn syscall(cpu: &mut Cpu, _: &Instruction) -> Result<Flow, Stop> {
    if cpu.control.efer & efer::SCE == 0 || !cpu.is_64bit() {
        return Err(Exception::INVALID_OPCODE.into());
    }
    cpu.regs[slot::RCX] = cpu.rip;
    let rflags = cpu.rflags();
    cpu.regs[slot::R11] = rflags & !flags::RF;
    cpu.rip = cpu.msrs.lstar;
    cpu.set_rflags(rflags & !cpu.msrs.sfmask & !flags::RF);
    // Masked, it does not trap before the handler's first instruction.
    cpu.single_step &= cpu.system_flags & flags::TF != 0;
    let selector = (cpu.msrs.star >> 32) as u16 & !3;
    cpu.segments[seg::CS] = flat_code(selector, 0, true);
    cpu.segments[seg::SS] = flat_stack(selector.wrapping_add(8), 0);
    cpu.mode_changed();
    Ok(Flow::Sync)
}

pub(super) fn sysret(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    if cpu.control.efer & efer::SCE == 0 || !cpu.is_64bit() {
        return Err(Exception::INVALID_OPCODE.into());
    }
    cpu.require_cpl0()?;
    let long = insn.mnemonic() == Mnemonic::Sysretq;
    let target = cpu.regs[slot::RCX];
    if long && !is_canonical(target) {
        return Err(Exception::general_protection(0).into());
    }
    cpu.rip = if long { target } else { target & mask(32) };
    cpu.set_rflags(cpu.regs[slot::R11] & 0x3c_7fd7 & !flags::RF);
    let selector = (cpu.msrs.star >> 48) as u16;
    let code = if long { selector.wrapping_add(16) } else { selector };
    cpu.segments[seg::CS] = flat_code(code | 3, 3, long);
    cpu.segments[seg::SS] = flat_stack(selector.wrapping_add(8) | 3, 3);
    cpu.mode_changed();
    Ok(Flow::Sync)
}
