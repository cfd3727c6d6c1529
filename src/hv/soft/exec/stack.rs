//! The stack: PUSH, POP, the flags on it, and frames.

use iced_x86::{Code, Instruction, Mnemonic};

use crate::hv::soft::cpu::{Cpu, slot, stack_fault};
use crate::hv::soft::fault::{Flow, Stop};
use crate::hv::soft::flags;
use crate::hv::soft::mmu::Access;

use super::mask;

/// RFLAGS bits that POPF and IRET replace at any privilege level.
const USER_FLAGS: u64 = flags::ARITHMETIC | flags::TF | flags::DF | flags::NT | flags::AC | flags::ID;

impl Cpu {
    /// The stack pointer with `bytes` added, as wide as the stack has it.
    fn stack_offset(&self, bytes: u64) -> u64 {
        self.regs[slot::RSP].wrapping_add(bytes) & mask(self.stack_bits())
    }

    /// Moves the stack pointer; what of RSP the stack does not use stays.
    pub(super) fn move_stack(&mut self, bytes: u64) {
        let (bits, sp) = (self.stack_bits(), self.stack_offset(bytes));
        self.set_low(slot::RSP, bits, sp);
    }

    /// Pushes 2, 4 or 8 bytes; RSP changes only when the write succeeds.
    pub(super) fn push_sized(&mut self, value: u64, bytes: u64) -> Result<(), Stop> {
        let at = self.stack_address(self.stack_offset(bytes.wrapping_neg()), bytes, Access::Write)?;
        match bytes {
            2 => self.write(at, value as u16),
            4 => self.write(at, value as u32),
            _ => self.write(at, value),
        }
        .map_err(stack_fault)?;
        self.move_stack(bytes.wrapping_neg());
        Ok(())
    }

    /// Pushes all or none of `values`, the first one first.
    pub(super) fn push_all(&mut self, values: &[u64], bytes: u64) -> Result<(), Stop> {
        let sp = self.regs[slot::RSP];
        let pushed = values.iter().try_for_each(|value| self.push_sized(*value, bytes));
        pushed.inspect_err(|_| self.regs[slot::RSP] = sp)
    }

    /// Reads 2, 4 or 8 bytes at RSP + `offset`.
    pub(super) fn peek_sized(&mut self, offset: u64, bytes: u64) -> Result<u64, Stop> {
        let at = self.stack_address(self.stack_offset(offset), bytes, Access::Read)?;
        self.read_sized(at, bytes).map_err(stack_fault)
    }

    /// Reads 2, 4 or 8 bytes at an offset from RBP's segment, which is the stack's.
    fn frame_sized(&mut self, offset: u64, bytes: u64) -> Result<u64, Stop> {
        let at = self.stack_address(offset & mask(self.stack_bits()), bytes, Access::Read)?;
        self.read_sized(at, bytes).map_err(stack_fault)
    }

    fn read_sized(&mut self, at: u64, bytes: u64) -> Result<u64, Stop> {
        match bytes {
            2 => self.read::<u16>(at).map(u64::from),
            4 => self.read::<u32>(at).map(u64::from),
            _ => self.read::<u64>(at),
        }
    }

    /// The RFLAGS bits that POPF and IRET may replace here.
    pub(super) fn writable_flags(&self) -> u64 {
        let mut writable = USER_FLAGS;
        if self.cpl() == 0 {
            writable |= flags::IOPL;
        }
        if self.cpl() <= self.iopl() {
            writable |= flags::IF;
        }
        writable
    }
}

fn operand_bytes(insn: &Instruction) -> u64 {
    insn.stack_pointer_increment().unsigned_abs().into()
}

pub(super) fn push(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    let register = insn.op0_register();
    let value = if register.is_segment_register() {
        cpu.segments[register.number()].selector.into()
    } else {
        cpu.operand(insn, 0)?
    };
    cpu.push_sized(value, operand_bytes(insn))?;
    Ok(Flow::Next)
}

pub(super) fn pop(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    let bytes = operand_bytes(insn);
    let value = cpu.peek_sized(0, bytes)?;
    // A destination addressed through RSP sees it incremented.
    let sp = cpu.regs[slot::RSP];
    cpu.move_stack(bytes);
    if let Err(stop) = cpu.set_operand(insn, 0, value) {
        cpu.regs[slot::RSP] = sp;
        return Err(stop);
    }
    Ok(Flow::Next)
}

pub(super) fn pushf(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    cpu.push_sized(cpu.rflags() & !flags::RF, operand_bytes(insn))?;
    Ok(Flow::Next)
}

pub(super) fn popf(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    let bytes = operand_bytes(insn);
    let value = cpu.peek_sized(0, bytes)?;
    cpu.move_stack(bytes);
    let old = cpu.rflags();
    let writable = cpu.writable_flags() & mask(bytes as u32 * 8);
    // The wide forms clear RF, as does any instruction that completes.
    let new = old & !writable & !flags::RF | value & writable;
    cpu.set_rflags(new);
    let look = new & !old & flags::IF != 0 || (new ^ old) & flags::TF != 0;
    Ok(if look { Flow::Sync } else { Flow::Next })
}

/// PUSHA: all general registers, with SP as it was before.
pub(super) fn pusha(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    let values: [u64; 8] = std::array::from_fn(|n| cpu.regs[n]);
    cpu.push_all(&values, operand_bytes(insn) / 8)?;
    Ok(Flow::Next)
}

/// POPA: what PUSHA pushed, without SP.
pub(super) fn popa(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    let bytes = operand_bytes(insn) / 8;
    let mut values = [0; 8];
    for (n, value) in (0..8).zip(values.iter_mut().rev()) {
        *value = cpu.peek_sized(n * bytes, bytes)?;
    }
    for (n, value) in values.into_iter().enumerate().filter(|(n, _)| *n != slot::RSP) {
        cpu.set_low(n, bytes as u32 * 8, value);
    }
    cpu.move_stack(8 * bytes);
    Ok(Flow::Next)
}

pub(super) fn enter(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    let bytes = match insn.code() {
        Code::Enterw_imm16_imm8 => 2,
        Code::Enterd_imm16_imm8 => 4,
        _ => 8,
    };
    let saved = (cpu.regs[slot::RSP], cpu.regs[slot::RBP]);
    let entered = build_frame(cpu, bytes, insn.immediate16().into(), insn.immediate8_2nd() & 31);
    if entered.is_err() {
        (cpu.regs[slot::RSP], cpu.regs[slot::RBP]) = saved;
    }
    entered.map(|()| Flow::Next)
}

fn build_frame(cpu: &mut Cpu, bytes: u64, room: u64, level: u8) -> Result<(), Stop> {
    let bits = bytes as u32 * 8;
    cpu.push_sized(cpu.regs[slot::RBP], bytes)?;
    let frame = cpu.regs[slot::RSP];
    let mut display = cpu.regs[slot::RBP];
    for _ in 1..level {
        display = display.wrapping_sub(bytes);
        let pointer = cpu.frame_sized(display, bytes)?;
        cpu.push_sized(pointer, bytes)?;
    }
    if level > 0 {
        cpu.push_sized(frame, bytes)?;
    }
    cpu.move_stack(room.wrapping_neg());
    // The new top of the stack must be writable.
    let at = cpu.stack_address(cpu.stack_offset(0), bytes, Access::Write)?;
    cpu.probe_write(at, bytes).map_err(stack_fault)?;
    cpu.set_low(slot::RBP, bits, frame);
    Ok(())
}

pub(super) fn leave(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    debug_assert_eq!(insn.mnemonic(), Mnemonic::Leave);
    let bytes = match insn.code() {
        Code::Leavew => 2,
        Code::Leaved => 4,
        _ => 8,
    };
    let (frame, bits) = (cpu.regs[slot::RBP], cpu.stack_bits());
    let value = cpu.frame_sized(frame, bytes)?;
    cpu.set_low(slot::RSP, bits, frame);
    cpu.move_stack(bytes);
    cpu.set_low(slot::RBP, bytes as u32 * 8, value);
    Ok(Flow::Next)
}
