//! Data movement between registers and memory, exchanges, and conditional moves.

use iced_x86::{Instruction, OpKind, Register};

use crate::hv::soft::cpu::{Cpu, slot};
use crate::hv::soft::fault::{Exception, Flow, Stop};
use crate::hv::soft::flags::{self, sext};
use crate::hv::soft::mmu::Access;
use crate::hv::soft::operand::{operand_bits, segment_fault};
use crate::mem::Scalar;

use super::mask;

pub(super) fn mov(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    let value = cpu.operand(insn, 1)?;
    cpu.set_operand(insn, 0, value)?;
    Ok(Flow::Next)
}

pub(super) fn movzx(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    mov(cpu, insn)
}

pub(super) fn movsx(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    let value = cpu.operand(insn, 1)?;
    cpu.set_register(insn.op0_register(), sext(value, operand_bits(insn, 1)));
    Ok(Flow::Next)
}

pub(super) fn lea(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    cpu.set_register(insn.op0_register(), cpu.effective_address(insn));
    Ok(Flow::Next)
}

/// With memory it is locked whether or not it says so.
pub(super) fn xchg(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    let b = cpu.operand(insn, 1)?;
    let a = if insn.op0_kind() == OpKind::Memory {
        cpu.update_operand(insn, |_| b)?
    } else {
        let a = cpu.operand(insn, 0)?;
        cpu.set_operand(insn, 0, b)?;
        a
    };
    cpu.set_operand(insn, 1, a)?;
    Ok(Flow::Next)
}

/// XADD, CMPXCHG and its wider forms are locked with memory in any case: it is what they are used for.
pub(super) fn xadd(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    let source = insn.op1_register();
    let b = cpu.register(source);
    let a = if insn.op0_kind() == OpKind::Memory {
        let a = cpu.update_operand(insn, |a| a.wrapping_add(b))?;
        cpu.set_register(source, a);
        a
    } else {
        let a = cpu.operand(insn, 0)?;
        // With both the same register, the sum stays.
        cpu.set_register(source, a);
        cpu.set_operand(insn, 0, a.wrapping_add(b))?;
        a
    };
    cpu.flags.add(a, b, a.wrapping_add(b), operand_bits(insn, 0));
    Ok(Flow::Next)
}

pub(super) fn cmpxchg(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    let bits = operand_bits(insn, 0);
    let accumulator = cpu.regs[slot::RAX] & mask(bits);
    let new = cpu.register(insn.op1_register());
    let old = if insn.op0_kind() == OpKind::Memory {
        // Written either way, as it was if it is another.
        cpu.update_operand(insn, |old| if old == accumulator { new } else { old })?
    } else {
        let old = cpu.operand(insn, 0)?;
        if old == accumulator {
            // Else a register keeps even its upper half.
            cpu.set_operand(insn, 0, new)?;
        }
        old
    };
    if old != accumulator {
        cpu.set_low(slot::RAX, bits, old);
    }
    cpu.flags.sub(accumulator, old, accumulator.wrapping_sub(old), bits);
    Ok(Flow::Next)
}

/// Replaces what is in memory by `new` if it is `expected`, and returns what was there.
fn exchange_pair<T: Scalar>(cpu: &mut Cpu, insn: &Instruction, expected: u128, new: u128) -> Result<u128, Stop> {
    let at = cpu.linear_address(insn, T::SIZE, Access::Write)?;
    let old = cpu.update::<T>(at, |old| if old.widen() == expected { T::narrow(new) } else { old });
    old.map(T::widen).map_err(|stop| segment_fault(insn, stop))
}

pub(super) fn cmpxchg8b(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    let pair = |cpu: &Cpu, low: usize, high: usize| cpu.regs[low] & mask(32) | cpu.regs[high] << 32;
    let expected = pair(cpu, slot::RAX, slot::RDX).into();
    let old = exchange_pair::<u64>(cpu, insn, expected, pair(cpu, slot::RBX, slot::RCX).into())?;
    if old != expected {
        cpu.set_low(slot::RAX, 32, old as u64);
        cpu.set_low(slot::RDX, 32, (old >> 32) as u64);
    }
    cpu.flags.set_zf(old == expected);
    Ok(Flow::Next)
}

pub(super) fn cmpxchg16b(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    let pair = |cpu: &Cpu, low: usize, high: usize| u128::from(cpu.regs[low]) | u128::from(cpu.regs[high]) << 64;
    if !cpu.linear_address(insn, 16, Access::Write)?.is_multiple_of(16) {
        return Err(Exception::general_protection(0).into());
    }
    let expected = pair(cpu, slot::RAX, slot::RDX);
    let old = exchange_pair::<u128>(cpu, insn, expected, pair(cpu, slot::RBX, slot::RCX))?;
    if old != expected {
        cpu.regs[slot::RAX] = old as u64;
        cpu.regs[slot::RDX] = (old >> 64) as u64;
    }
    cpu.flags.set_zf(old == expected);
    Ok(Flow::Next)
}

/// The condition of Jcc, SETcc and CMOVcc, whose codes iced numbers from one.
pub(super) fn condition(cpu: &Cpu, insn: &Instruction) -> bool {
    cpu.flags.condition((insn.condition_code() as u8).wrapping_sub(1))
}

pub(super) fn setcc(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    cpu.set_operand(insn, 0, condition(cpu, insn).into())?;
    Ok(Flow::Next)
}

/// Memory is read, and a 32-bit destination's upper half cleared, whatever the condition.
pub(super) fn cmovcc(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    let value = cpu.operand(insn, 1)?;
    let register = insn.op0_register();
    let value = if condition(cpu, insn) { value } else { cpu.register(register) };
    cpu.set_register(register, value);
    Ok(Flow::Next)
}

/// CBW, CWDE, CDQE.
pub(super) fn extend_accumulator(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    use iced_x86::Mnemonic;
    let bits = match insn.mnemonic() {
        Mnemonic::Cbw => 16,
        Mnemonic::Cwde => 32,
        _ => 64,
    };
    let value = sext(cpu.regs[slot::RAX], bits / 2);
    cpu.set_low(slot::RAX, bits, value);
    Ok(Flow::Next)
}

/// CWD, CDQ, CQO.
pub(super) fn sign_to_rdx(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    use iced_x86::Mnemonic;
    let bits = match insn.mnemonic() {
        Mnemonic::Cwd => 16,
        Mnemonic::Cdq => 32,
        _ => 64,
    };
    let negative = (sext(cpu.regs[slot::RAX], bits) as i64) < 0;
    cpu.set_low(slot::RDX, bits, if negative { u64::MAX } else { 0 });
    Ok(Flow::Next)
}

pub(super) fn xlat(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    let base = insn.memory_base();
    let offset = cpu.register(base).wrapping_add(cpu.regs[slot::RAX] & 0xff) & mask(base.size() as u32 * 8);
    let address = cpu.address_at(insn, offset, 1, Access::Read)?;
    let value = cpu.read::<u8>(address).map_err(|stop| segment_fault(insn, stop))?;
    cpu.set_low(slot::RAX, 8, value.into());
    Ok(Flow::Next)
}

const STATUS_BYTE: u64 = flags::SF | flags::ZF | flags::AF | flags::PF | flags::CF;

pub(super) fn lahf(cpu: &mut Cpu, _: &Instruction) -> Result<Flow, Stop> {
    let status = cpu.flags.rflags() & STATUS_BYTE | 2;
    cpu.set_register(Register::AH, status);
    Ok(Flow::Next)
}

pub(super) fn sahf(cpu: &mut Cpu, _: &Instruction) -> Result<Flow, Stop> {
    let rflags = cpu.flags.rflags() & flags::OF | cpu.register(Register::AH) & STATUS_BYTE;
    cpu.flags.set_rflags(rflags);
    Ok(Flow::Next)
}
