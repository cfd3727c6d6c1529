//! FXSAVE and FXRSTOR (Intel SDM volume 1, section 10.5, and volume 2), in the 64-bit mode layout: all sixteen XMM
//! registers, of which there are eight outside it. The x87 pointers are saved as AMD does: only while an exception is pending, else as zeros.

use iced_x86::CodeSize;
use iced_x86::Instruction;
use iced_x86::Mnemonic;

use crate::hv::soft::cpu::Cpu;
use crate::hv::soft::cpu::cr0;
use crate::hv::soft::exec::Executor;
use crate::hv::soft::fault::Exception;
use crate::hv::soft::fault::Flow;
use crate::hv::soft::fault::Stop;
use crate::hv::soft::mmu::Access;
use crate::hv::soft::operand::segment_fault;

use super::extended::Extended;
use super::mxcsr;
use super::x87::Pointers;

/// XMM registers that are saved: eight outside 64-bit mode, which does not have the others.
fn registers(insn: &Instruction) -> usize {
    if insn.code_size() == CodeSize::Code64 { 16 } else { 8 }
}

/// The bytes of the area that are written: the rest is left to software.
const fn saved(registers: usize) -> u64 {
    160 + 16 * registers as u64
}

pub(super) fn executor(insn: &Instruction) -> Option<Executor> {
    Some(match insn.mnemonic() {
        Mnemonic::Fxsave => save::<false>,
        Mnemonic::Fxsave64 => save::<true>,
        Mnemonic::Fxrstor => restore::<false>,
        Mnemonic::Fxrstor64 => restore::<true>,
        _ => return None,
    })
}

fn area(cpu: &Cpu, insn: &Instruction, access: Access) -> Result<u64, Stop> {
    if cpu.control.cr0 & (cr0::EM | cr0::TS) != 0 {
        return Err(Exception::NO_FPU.into());
    }
    cpu.aligned_address(insn, saved(registers(insn)), access)
}

/// `WIDE`: with REX.W the pointers are 64 bits, else 32 bits and a selector.
fn save<const WIDE: bool>(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    let at = area(cpu, insn, Access::Write)?;
    let fault = |stop| segment_fault(insn, stop);
    cpu.probe_write(at, saved(registers(insn))).map_err(fault)?;
    let x87 = &cpu.fpu.x87;
    let pointers = if x87.is_pending() { x87.pointers } else { Pointers::default() };
    let header = [x87.control, x87.status_word(), u16::from(x87.valid), pointers.opcode];
    let header = header.iter().rev().fold(0, |all, &word| all << 16 | u64::from(word));
    let (ip, dp) = if WIDE {
        (pointers.ip, pointers.dp)
    } else {
        let packed = |offset: u64, selector: u16| offset & 0xffff_ffff | u64::from(selector) << 32;
        (packed(pointers.ip, pointers.cs), packed(pointers.dp, pointers.ds))
    };
    let control = u64::from(cpu.fpu.mxcsr) | u64::from(mxcsr::MASK) << 32;
    for (offset, value) in [(0, header), (8, ip), (16, dp), (24, control)] {
        cpu.write(at + offset, value).map_err(fault)?;
    }
    for i in 0..8u8 {
        let value = cpu.fpu.x87.raw(i);
        let value = u128::from(value.sig) | u128::from(value.se) << 64;
        cpu.write(at + 32 + 16 * u64::from(i), value).map_err(fault)?;
    }
    for (to, i) in (at + 160..).step_by(16).zip(0..registers(insn)) {
        cpu.write(to, cpu.fpu.xmm[i]).map_err(fault)?;
    }
    Ok(Flow::Next)
}

fn restore<const WIDE: bool>(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    let at = area(cpu, insn, Access::Read)?;
    let fault = |stop| segment_fault(insn, stop);
    let mut area = [0u128; (saved(16) / 16) as usize];
    let len = (saved(registers(insn)) / 16) as usize;
    for (offset, part) in (0..).step_by(16).zip(&mut area[..len]) {
        *part = cpu.read(at + offset).map_err(fault)?;
    }
    let mxcsr = (area[1] >> 64) as u32;
    if mxcsr & !mxcsr::MASK != 0 {
        return Err(Exception::general_protection(0).into());
    }
    cpu.fpu.mxcsr = mxcsr;
    let x87 = &mut cpu.fpu.x87;
    x87.set_control(area[0] as u16);
    x87.set_status_word((area[0] >> 16) as u16);
    x87.valid = (area[0] >> 32) as u8;
    let (ip, dp) = ((area[0] >> 64) as u64, area[1] as u64);
    let opcode = (area[0] >> 48) as u16 & 0x7ff;
    x87.pointers = if WIDE {
        Pointers { opcode, ip, cs: 0, dp, ds: 0 }
    } else {
        Pointers { opcode, ip: ip & 0xffff_ffff, cs: (ip >> 32) as u16, dp: dp & 0xffff_ffff, ds: (dp >> 32) as u16 }
    };
    for i in 0..8u8 {
        let value = area[2 + usize::from(i)];
        x87.set_raw(i, Extended { sig: value as u64, se: (value >> 64) as u16 });
    }
    cpu.fpu.xmm[..registers(insn)].copy_from_slice(&area[10..len]);
    Ok(Flow::Next)
}
