//! Descriptor tables, the task register, and the instructions that look descriptors up (Intel SDM volume 2).

use iced_x86::{Code, CodeSize, Instruction, Register};

use crate::hv::soft::cpu::{Cpu, is_canonical};
use crate::hv::soft::fault::{Exception, Flow, Stop};
use crate::hv::soft::mmu::Access;
use crate::hv::soft::operand::segment_fault;
use crate::hv::state::x86_64::{Segment, Table};

use super::mask;
use super::segment::{Descriptor, code, gp, is_null};

/// System descriptor types.
const TSS_16_AVAILABLE: u8 = 1;
const LDT: u8 = 2;
const TSS_16_BUSY: u8 = 3;
const CALL_GATE_16: u8 = 4;
const TASK_GATE: u8 = 5;
const TSS_AVAILABLE: u8 = 9;
const TSS_BUSY: u8 = 11;
const CALL_GATE: u8 = 12;

/// The bytes of a table's base in memory.
fn base_bytes(insn: &Instruction) -> u64 {
    if insn.code_size() == CodeSize::Code64 { 8 } else { 4 }
}

fn load_table(cpu: &mut Cpu, insn: &Instruction) -> Result<Table, Stop> {
    cpu.require_cpl0()?;
    let bytes = base_bytes(insn);
    let address = cpu.linear_address(insn, 2 + bytes, Access::Read)?;
    let read = |cpu: &mut Cpu| -> Result<(u16, u64), Stop> {
        let (limit, at) = (cpu.read::<u16>(address)?, address.wrapping_add(2));
        Ok((limit, if bytes == 8 { cpu.read::<u64>(at)? } else { cpu.read::<u32>(at)?.into() }))
    };
    let (limit, mut base) = read(cpu).map_err(|stop| segment_fault(insn, stop))?;
    if matches!(insn.code(), Code::Lgdt_m1632_16 | Code::Lidt_m1632_16) {
        // With a 16-bit operand the base has 24 bits, as on the 286.
        base &= mask(24);
    }
    if !is_canonical(base) {
        return Err(gp(0));
    }
    Ok(Table { base, limit })
}

fn store_table(cpu: &mut Cpu, insn: &Instruction, table: Table) -> Result<Flow, Stop> {
    let bytes = base_bytes(insn);
    let address = cpu.linear_address(insn, 2 + bytes, Access::Write)?;
    let write = |cpu: &mut Cpu| {
        cpu.probe_write(address, 2 + bytes)?;
        cpu.write(address, table.limit)?;
        let at = address.wrapping_add(2);
        if bytes == 8 { cpu.write(at, table.base) } else { cpu.write(at, table.base as u32) }
    };
    write(cpu).map_err(|stop| segment_fault(insn, stop))?;
    Ok(Flow::Next)
}

pub(super) fn lgdt(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    cpu.gdtr = load_table(cpu, insn)?;
    Ok(Flow::Sync)
}

pub(super) fn lidt(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    cpu.idtr = load_table(cpu, insn)?;
    Ok(Flow::Sync)
}

pub(super) fn sgdt(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    store_table(cpu, insn, cpu.gdtr)
}

pub(super) fn sidt(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    store_table(cpu, insn, cpu.idtr)
}

/// The selector operand of an instruction here: memory holds 16 bits, of a register 16 count.
fn selector_operand(cpu: &mut Cpu, insn: &Instruction, n: u32) -> Result<u16, Stop> {
    match insn.op_register(n) {
        Register::None => cpu.load::<u16>(insn),
        register => Ok(cpu.register(register) as u16),
    }
}

fn store_selector(cpu: &mut Cpu, insn: &Instruction, selector: u16) -> Result<Flow, Stop> {
    if insn.op0_register() == Register::None {
        cpu.store(insn, selector)?;
    } else {
        cpu.set_register(insn.op0_register(), selector.into());
    }
    Ok(Flow::Next)
}

pub(super) fn sldt(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    cpu.require_protected()?;
    store_selector(cpu, insn, cpu.ldtr.selector)
}

pub(super) fn str(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    cpu.require_protected()?;
    store_selector(cpu, insn, cpu.tr.selector)
}

/// A present descriptor of one of `kinds` in the GDT, with its whole base: of 16 bytes in long mode, of 8 else.
fn system_descriptor(cpu: &mut Cpu, selector: u16, kinds: &[u8]) -> Result<(Descriptor, u64), Stop> {
    if selector & 4 != 0 {
        return Err(gp(selector));
    }
    let descriptor = cpu.descriptor(selector)?.ok_or_else(|| gp(selector))?;
    let upper = if cpu.is_long_mode() { cpu.descriptor_upper(selector)?.ok_or_else(|| gp(selector))? } else { 0 };
    // The upper half's type field must be zero, or it is a descriptor of its own.
    if !kinds.contains(&descriptor.kind()) || upper >> 40 & 0x1f != 0 {
        return Err(gp(selector));
    }
    if !descriptor.is_present() {
        return Err(Exception::not_present(code(selector)).into());
    }
    let base = descriptor.base() | upper << 32;
    if is_canonical(base) { Ok((descriptor, base)) } else { Err(gp(selector)) }
}

pub(super) fn lldt(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    cpu.require_protected()?;
    cpu.require_cpl0()?;
    let selector = selector_operand(cpu, insn, 0)?;
    cpu.ldtr = if is_null(selector) {
        Segment { selector, unusable: true, ..Segment::default() }
    } else {
        let (descriptor, base) = system_descriptor(cpu, selector, &[LDT])?;
        Segment { base, ..descriptor.segment(selector) }
    };
    Ok(Flow::Sync)
}

pub(super) fn ltr(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    cpu.require_protected()?;
    cpu.require_cpl0()?;
    let selector = selector_operand(cpu, insn, 0)?;
    if is_null(selector) {
        return Err(gp(0));
    }
    // Outside long mode there are tasks of the 286 too.
    let kinds = if cpu.is_long_mode() { &[TSS_AVAILABLE][..] } else { &[TSS_AVAILABLE, TSS_16_AVAILABLE] };
    let (mut descriptor, base) = system_descriptor(cpu, selector, kinds)?;
    descriptor.raw |= 2 << 40;
    cpu.write_descriptor(&descriptor)?;
    cpu.tr = Segment { base, ..descriptor.segment(selector) };
    Ok(Flow::Sync)
}

/// The descriptor that LAR, LSL, VERR or VERW asks about, if the level may see it.
fn visible(cpu: &mut Cpu, selector: u16) -> Result<Option<Descriptor>, Stop> {
    if is_null(selector) {
        return Ok(None);
    }
    let level = cpu.cpl().max(selector as u8 & 3);
    Ok(cpu.descriptor(selector)?.filter(|found| found.is_conforming() || level <= found.dpl()))
}

fn verify(cpu: &mut Cpu, insn: &Instruction, allows: fn(Descriptor) -> bool) -> Result<Flow, Stop> {
    cpu.require_protected()?;
    let selector = selector_operand(cpu, insn, 0)?;
    let found = visible(cpu, selector)?.is_some_and(allows);
    cpu.flags.set_zf(found);
    Ok(Flow::Next)
}

pub(super) fn verr(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    verify(cpu, insn, Descriptor::is_readable)
}

pub(super) fn verw(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    verify(cpu, insn, Descriptor::is_writable)
}

pub(super) fn lar(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    cpu.require_protected()?;
    let selector = selector_operand(cpu, insn, 1)?;
    let old: &[u8] = if cpu.is_long_mode() { &[] } else { &[TSS_16_AVAILABLE, TSS_16_BUSY, CALL_GATE_16, TASK_GATE] };
    let kinds = [LDT, TSS_AVAILABLE, TSS_BUSY, CALL_GATE];
    let known = |kind: u8| kinds.contains(&kind) || old.contains(&kind);
    let found = visible(cpu, selector)?.filter(|d| d.is_memory() || known(d.kind()));
    if let Some(descriptor) = found {
        cpu.set_register(insn.op0_register(), descriptor.raw >> 32 & 0x00ff_ff00);
    }
    cpu.flags.set_zf(found.is_some());
    Ok(Flow::Next)
}

pub(super) fn lsl(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    cpu.require_protected()?;
    let selector = selector_operand(cpu, insn, 1)?;
    let old: &[u8] = if cpu.is_long_mode() { &[] } else { &[TSS_16_AVAILABLE, TSS_16_BUSY] };
    let kinds = [LDT, TSS_AVAILABLE, TSS_BUSY];
    let known = |kind: u8| kinds.contains(&kind) || old.contains(&kind);
    let found = visible(cpu, selector)?.filter(|d| d.is_memory() || known(d.kind()));
    if let Some(descriptor) = found {
        cpu.set_register(insn.op0_register(), descriptor.limit().into());
    }
    cpu.flags.set_zf(found.is_some());
    Ok(Flow::Next)
}

/// ARPL: raises a selector's requested level to that of another. 64-bit mode has MOVSXD in its place.
pub(super) fn arpl(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    cpu.require_protected()?;
    let to = cpu.operand_for_write(insn, 0)?;
    let from = cpu.register(insn.op1_register());
    let raises = to & 3 < from & 3;
    cpu.set_operand(insn, 0, if raises { to & !3 | from & 3 } else { to })?;
    cpu.flags.set_zf(raises);
    Ok(Flow::Next)
}
