//! Descriptor tables, the task register, and the instructions that look descriptors up (Intel SDM volume 2).

use iced_x86::{Instruction, Register};

use crate::hv::soft::cpu::{Cpu, is_canonical};
use crate::hv::soft::fault::{Exception, Flow, Stop};
use crate::hv::soft::operand::segment_fault;
use crate::hv::state::x86_64::{Segment, Table};

use super::segment::{Descriptor, code, gp, is_null};

/// System descriptor types.
const LDT: u8 = 2;
const TSS_AVAILABLE: u8 = 9;
const TSS_BUSY: u8 = 11;
const CALL_GATE: u8 = 12;

fn load_table(cpu: &mut Cpu, insn: &Instruction) -> Result<Table, Stop> {
    cpu.require_cpl0()?;
    let address = cpu.linear_address(insn);
    let read = |cpu: &mut Cpu| Ok((cpu.read::<u16>(address)?, cpu.read::<u64>(address.wrapping_add(2))?));
    let (limit, base) = read(cpu).map_err(|stop| segment_fault(insn, stop))?;
    if !is_canonical(base) {
        return Err(gp(0));
    }
    Ok(Table { base, limit })
}

fn store_table(cpu: &mut Cpu, insn: &Instruction, table: Table) -> Result<Flow, Stop> {
    let address = cpu.linear_address(insn);
    let write = |cpu: &mut Cpu| {
        cpu.probe_write(address, 10)?;
        cpu.write(address, table.limit)?;
        cpu.write(address.wrapping_add(2), table.base)
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
    store_selector(cpu, insn, cpu.ldtr.selector)
}

pub(super) fn str(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    store_selector(cpu, insn, cpu.tr.selector)
}

/// A present 16-byte descriptor of type `kind` in the GDT, with its whole base.
fn system_descriptor(cpu: &mut Cpu, selector: u16, kind: u8) -> Result<(Descriptor, u64), Stop> {
    if selector & 4 != 0 {
        return Err(gp(selector));
    }
    let descriptor = cpu.descriptor(selector)?.ok_or_else(|| gp(selector))?;
    let upper = cpu.descriptor_upper(selector)?.ok_or_else(|| gp(selector))?;
    // The upper half's type field must be zero, or it is a descriptor of its own.
    if descriptor.kind() != kind || upper >> 40 & 0x1f != 0 {
        return Err(gp(selector));
    }
    if !descriptor.is_present() {
        return Err(Exception::not_present(code(selector)).into());
    }
    let base = descriptor.base() | upper << 32;
    if is_canonical(base) { Ok((descriptor, base)) } else { Err(gp(selector)) }
}

pub(super) fn lldt(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    cpu.require_cpl0()?;
    let selector = selector_operand(cpu, insn, 0)?;
    cpu.ldtr = if is_null(selector) {
        Segment { selector, unusable: true, ..Segment::default() }
    } else {
        let (descriptor, base) = system_descriptor(cpu, selector, LDT)?;
        Segment { base, ..descriptor.segment(selector) }
    };
    Ok(Flow::Sync)
}

pub(super) fn ltr(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    cpu.require_cpl0()?;
    let selector = selector_operand(cpu, insn, 0)?;
    if is_null(selector) {
        return Err(gp(0));
    }
    let (mut descriptor, base) = system_descriptor(cpu, selector, TSS_AVAILABLE)?;
    descriptor.raw |= 2 << 40;
    debug_assert_eq!(descriptor.kind(), TSS_BUSY);
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
    let selector = selector_operand(cpu, insn, 1)?;
    let kinds = [LDT, TSS_AVAILABLE, TSS_BUSY, CALL_GATE];
    let found = visible(cpu, selector)?.filter(|d| d.is_memory() || kinds.contains(&d.kind()));
    if let Some(descriptor) = found {
        cpu.set_register(insn.op0_register(), descriptor.raw >> 32 & 0x00ff_ff00);
    }
    cpu.flags.set_zf(found.is_some());
    Ok(Flow::Next)
}

pub(super) fn lsl(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    let selector = selector_operand(cpu, insn, 1)?;
    let kinds = [LDT, TSS_AVAILABLE, TSS_BUSY];
    let found = visible(cpu, selector)?.filter(|d| d.is_memory() || kinds.contains(&d.kind()));
    if let Some(descriptor) = found {
        cpu.set_register(insn.op0_register(), descriptor.limit().into());
    }
    cpu.flags.set_zf(found.is_some());
    Ok(Flow::Next)
}
