//! The stack: PUSH, POP, the flags on it, and frames.

use iced_x86::{Code, Instruction, Mnemonic};

use crate::hv::soft::cpu::{Cpu, slot, stack_fault};
use crate::hv::soft::fault::{Flow, Stop};
use crate::hv::soft::flags;

/// RFLAGS bits that POPF and IRET replace at any privilege level.
const USER_FLAGS: u64 = flags::ARITHMETIC | flags::TF | flags::DF | flags::NT | flags::AC | flags::ID;

impl Cpu {
    /// Pushes 2, 4 or 8 bytes; RSP changes only when the write succeeds.
    pub(super) fn push_sized(&mut self, value: u64, bytes: u64) -> Result<(), Stop> {
        let sp = self.regs[slot::RSP].wrapping_sub(bytes);
        match bytes {
            2 => self.write(sp, value as u16),
            4 => self.write(sp, value as u32),
            _ => self.write(sp, value),
        }
        .map_err(stack_fault)?;
        self.regs[slot::RSP] = sp;
        Ok(())
    }

    /// Reads 2, 4 or 8 bytes at RSP + `offset`.
    pub(super) fn peek_sized(&mut self, offset: u64, bytes: u64) -> Result<u64, Stop> {
        let at = self.regs[slot::RSP].wrapping_add(offset);
        match bytes {
            2 => self.read::<u16>(at).map(u64::from),
            4 => self.read::<u32>(at).map(u64::from),
            _ => self.read::<u64>(at),
        }
        .map_err(stack_fault)
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
    cpu.regs[slot::RSP] = sp.wrapping_add(bytes);
    if let Err(stop) = cpu.set_operand(insn, 0, value) {
        cpu.regs[slot::RSP] = sp;
        return Err(stop);
    }
    Ok(Flow::Next)
}

pub(super) fn pushf(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    let bytes = if insn.code() == Code::Pushfw { 2 } else { 8 };
    cpu.push_sized(cpu.rflags() & !flags::RF, bytes)?;
    Ok(Flow::Next)
}

pub(super) fn popf(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    let (bytes, width) = if insn.code() == Code::Popfw { (2, 0xffff) } else { (8, u64::MAX) };
    let value = cpu.peek_sized(0, bytes)?;
    cpu.regs[slot::RSP] = cpu.regs[slot::RSP].wrapping_add(bytes);
    let old = cpu.rflags();
    let writable = cpu.writable_flags() & width;
    // The 64-bit form clears RF, as does any instruction that completes.
    let new = old & !writable & !flags::RF | value & writable;
    cpu.set_rflags(new);
    let look = new & !old & flags::IF != 0 || (new ^ old) & flags::TF != 0;
    Ok(if look { Flow::Sync } else { Flow::Next })
}

pub(super) fn enter(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    let bytes = if insn.code() == Code::Enterw_imm16_imm8 { 2 } else { 8 };
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
        let pointer = if bytes == 2 { cpu.read::<u16>(display).map(u64::from) } else { cpu.read::<u64>(display) };
        cpu.push_sized(pointer.map_err(stack_fault)?, bytes)?;
    }
    if level > 0 {
        cpu.push_sized(frame, bytes)?;
    }
    let sp = cpu.regs[slot::RSP].wrapping_sub(room);
    // The new top of the stack must be writable.
    cpu.probe_write(sp, bytes).map_err(stack_fault)?;
    cpu.regs[slot::RSP] = sp;
    cpu.set_low(slot::RBP, bits, frame);
    Ok(())
}

pub(super) fn leave(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    debug_assert_eq!(insn.mnemonic(), Mnemonic::Leave);
    let frame = cpu.regs[slot::RBP];
    let (value, bytes) = if insn.code() == Code::Leavew {
        (cpu.read::<u16>(frame).map_err(stack_fault)?.into(), 2)
    } else {
        (cpu.read::<u64>(frame).map_err(stack_fault)?, 8)
    };
    cpu.regs[slot::RSP] = frame.wrapping_add(bytes);
    cpu.set_low(slot::RBP, bytes as u32 * 8, value);
    Ok(Flow::Next)
}
