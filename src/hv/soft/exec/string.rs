//! String instructions and their repetition.
//!
//! A repeated instruction commits its registers after every iteration (or host-side copy of many), so a fault in
//! the middle restarts where it was. One call does a bounded amount of work and then leaves to the run loop to come back
//! to it, so that kicks and interrupts get in, as they do on silicon.

use iced_x86::{CodeSize, Instruction, OpKind};

use crate::hv::soft::cpu::{Cpu, seg, slot};
use crate::hv::soft::fault::{Flow, Stop};
use crate::hv::soft::flags;
use crate::hv::soft::mmu::Access;
use crate::hv::soft::operand::{segment_fault, segment_number};
use crate::units::PAGE_SIZE;

use super::mask;

/// How many bytes one call moves at most...
const BYTES_A_CALL: u64 = 64 << 10;
/// ...and what it counts for at least when the host does not copy many at once: an element may be a device's, which takes
/// the time of hundreds of bytes.
const LEAST_BYTES: u64 = 64;

/// What all string instructions have in common.
struct Form {
    /// Element size in bytes.
    size: u64,
    /// What an element adds to RSI and RDI.
    step: u64,
    /// The width of RSI, RDI and RCX.
    address_bits: u32,
    /// The source's segment, and its base in 64-bit mode.
    source: (usize, u64),
    /// Outside 64-bit mode segments are checked.
    checked: bool,
}

impl Form {
    fn new(cpu: &Cpu, insn: &Instruction, size: u64) -> Self {
        let segment = insn.memory_segment();
        Self {
            size,
            step: if cpu.system_flags & flags::DF == 0 { size } else { size.wrapping_neg() },
            address_bits: (0..insn.op_count()).find_map(|n| address_bits(insn.op_kind(n))).unwrap_or(64),
            source: (segment_number(segment), cpu.segment_base(segment)),
            checked: insn.code_size() != CodeSize::Code64,
        }
    }

    /// Where `elements` elements of the source lie.
    fn source(&self, cpu: &Cpu, elements: u64) -> Result<u64, Stop> {
        let (segment, base) = self.source;
        let offset = cpu.regs[slot::RSI] & mask(self.address_bits);
        if self.checked {
            cpu.segment_address(segment, offset, elements * self.size, Access::Read)
        } else {
            Ok(offset.wrapping_add(base))
        }
    }

    /// Where `elements` elements of the destination lie, in ES.
    fn destination(&self, cpu: &Cpu, elements: u64, access: Access) -> Result<u64, Stop> {
        let offset = cpu.regs[slot::RDI] & mask(self.address_bits);
        if self.checked { cpu.segment_address(seg::ES, offset, elements * self.size, access) } else { Ok(offset) }
    }

    /// How many elements lie between an index register and where it wraps.
    fn before_wrap(&self, cpu: &Cpu, index: usize) -> u64 {
        (mask(self.address_bits) - (cpu.regs[index] & mask(self.address_bits))) / self.size
    }

    fn advance(&self, cpu: &mut Cpu, index: usize, elements: u64) {
        let value = cpu.regs[index].wrapping_add(self.step.wrapping_mul(elements));
        cpu.set_low(index, self.address_bits, value);
    }

    fn load(&self, cpu: &mut Cpu, insn: &Instruction) -> Result<u64, Stop> {
        let at = self.source(cpu, 1)?;
        read(cpu, at, self.size).map_err(|stop| segment_fault(insn, stop))
    }

    fn store(&self, cpu: &mut Cpu, value: u64) -> Result<(), Stop> {
        let at = self.destination(cpu, 1, Access::Write)?;
        write(cpu, at, self.size, value)
    }
}

fn address_bits(kind: OpKind) -> Option<u32> {
    match kind {
        OpKind::MemorySegSI | OpKind::MemoryESDI => Some(16),
        OpKind::MemorySegESI | OpKind::MemoryESEDI => Some(32),
        OpKind::MemorySegRSI | OpKind::MemoryESRDI => Some(64),
        _ => None,
    }
}

fn read(cpu: &mut Cpu, address: u64, size: u64) -> Result<u64, Stop> {
    Ok(match size {
        1 => cpu.read::<u8>(address)?.into(),
        2 => cpu.read::<u16>(address)?.into(),
        4 => cpu.read::<u32>(address)?.into(),
        _ => cpu.read::<u64>(address)?,
    })
}

fn write(cpu: &mut Cpu, address: u64, size: u64, value: u64) -> Result<(), Stop> {
    match size {
        1 => cpu.write(address, value as u8),
        2 => cpu.write(address, value as u16),
        4 => cpu.write(address, value as u32),
        _ => cpu.write(address, value),
    }
}

/// When a repeated comparison ends.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Until {
    CountOut,
    NotEqual,
    Equal,
}

/// Runs `work` once, or as the REP prefix says. `work` may do up to the number of elements it is given, commits
/// its own registers, and returns how many it did.
fn repeat(
    cpu: &mut Cpu,
    insn: &Instruction,
    form: &Form,
    until: Until,
    mut work: impl FnMut(&mut Cpu, &Form, u64) -> Result<u64, Stop>,
) -> Result<Flow, Stop> {
    if !insn.has_rep_prefix() && !insn.has_repne_prefix() {
        work(cpu, form, 1)?;
        return Ok(Flow::Next);
    }
    // Single stepping stops after every iteration.
    let mut room = if cpu.system_flags & flags::TF != 0 { form.size } else { BYTES_A_CALL };
    loop {
        let count = cpu.regs[slot::RCX] & mask(form.address_bits);
        if count == 0 {
            return Ok(Flow::Next);
        }
        if room == 0 {
            cpu.rip = cpu.rip.wrapping_sub(insn.len() as u64);
            return Ok(Flow::Again);
        }
        let done = work(cpu, form, count.min((room / form.size).max(1)))?;
        cpu.set_low(slot::RCX, form.address_bits, count - done);
        room = room.saturating_sub((done * form.size).max(LEAST_BYTES));
        let ended = match until {
            Until::CountOut => false,
            Until::NotEqual => !cpu.flags.zf(),
            Until::Equal => cpu.flags.zf(),
        };
        if ended {
            return Ok(Flow::Next);
        }
    }
}

fn until(insn: &Instruction) -> Until {
    if insn.has_repne_prefix() { Until::Equal } else { Until::NotEqual }
}

fn memory_bytes(insn: &Instruction) -> u64 {
    insn.memory_size().size() as u64
}

pub(super) fn movs(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    let form = Form::new(cpu, insn, memory_bytes(insn));
    repeat(cpu, insn, &form, Until::CountOut, |cpu, form, count| {
        if count > 1
            && form.step == form.size
            && let Some(done) = copy(cpu, insn, form, count)?
        {
            return Ok(done);
        }
        let value = form.load(cpu, insn)?;
        form.store(cpu, value)?;
        form.advance(cpu, slot::RSI, 1);
        form.advance(cpu, slot::RDI, 1);
        Ok(1)
    })
}

/// How many whole elements lie between `address` and the end of its page.
fn in_page(address: u64, size: u64) -> u64 {
    (PAGE_SIZE - address % PAGE_SIZE) / size
}

fn read_offset(cpu: &mut Cpu, address: u64) -> Result<Option<u64>, Stop> {
    match cpu.tlb.read(address, 1) {
        Some(offset) => Ok(Some(offset)),
        None => cpu.ram_offset(address, Access::Read),
    }
}

fn write_offset(cpu: &mut Cpu, address: u64) -> Result<Option<u64>, Stop> {
    match cpu.tlb.write(address, 1) {
        Some(offset) => Ok(Some(offset)),
        None => cpu.ram_offset(address, Access::Write),
    }
}

/// Copies as many elements as lie on the source's and the destination's page; `None` when it must go one by one.
fn copy(cpu: &mut Cpu, insn: &Instruction, form: &Form, count: u64) -> Result<Option<u64>, Stop> {
    let wrap = form.before_wrap(cpu, slot::RSI).min(form.before_wrap(cpu, slot::RDI));
    let (source, destination) = (form.source(cpu, 1)?, form.destination(cpu, 1, Access::Write)?);
    let mut elements = count.min(wrap).min(in_page(source, form.size)).min(in_page(destination, form.size));
    // What the segments' limits cut off goes one by one, up to the fault.
    if elements == 0 || form.source(cpu, elements).is_err() || form.destination(cpu, elements, Access::Write).is_err() {
        return Ok(None);
    }
    let Some(from) = read_offset(cpu, source).map_err(|stop| segment_fault(insn, stop))? else { return Ok(None) };
    let Some(to) = write_offset(cpu, destination)? else { return Ok(None) };
    // Where the ranges overlap, later elements read what earlier ones wrote: copy only what lies between.
    if from != to {
        elements = elements.min(from.abs_diff(to) / form.size);
    }
    let len = elements * form.size;
    if elements == 0 || (from != to && cpu.ram.copy(from, to, len).is_none()) {
        return Ok(None);
    }
    cpu.note_ram_write(to, len);
    form.advance(cpu, slot::RSI, elements);
    form.advance(cpu, slot::RDI, elements);
    Ok(Some(elements))
}

pub(super) fn stos(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    let form = Form::new(cpu, insn, memory_bytes(insn));
    let value = cpu.regs[slot::RAX] & mask(form.size as u32 * 8);
    repeat(cpu, insn, &form, Until::CountOut, |cpu, form, count| {
        if count > 1
            && form.step == form.size
            && let Some(done) = fill(cpu, form, value, count)?
        {
            return Ok(done);
        }
        form.store(cpu, value)?;
        form.advance(cpu, slot::RDI, 1);
        Ok(1)
    })
}

/// Fills as many elements as lie on the destination's page; `None` when it must go one by one.
fn fill(cpu: &mut Cpu, form: &Form, value: u64, count: u64) -> Result<Option<u64>, Stop> {
    let destination = form.destination(cpu, 1, Access::Write)?;
    let elements = count.min(form.before_wrap(cpu, slot::RDI)).min(in_page(destination, form.size));
    let byte = value as u8;
    let uniform = value == u64::from_le_bytes([byte; 8]) & mask(form.size as u32 * 8);
    if elements == 0 || !uniform || form.destination(cpu, elements, Access::Write).is_err() {
        return Ok(None);
    }
    let Some(to) = write_offset(cpu, destination)? else { return Ok(None) };
    let len = elements * form.size;
    if cpu.ram.fill(to, byte, len).is_none() {
        return Ok(None);
    }
    cpu.note_ram_write(to, len);
    form.advance(cpu, slot::RDI, elements);
    Ok(Some(elements))
}

pub(super) fn lods(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    let form = Form::new(cpu, insn, memory_bytes(insn));
    repeat(cpu, insn, &form, Until::CountOut, |cpu, form, _| {
        let value = form.load(cpu, insn)?;
        cpu.set_low(slot::RAX, form.size as u32 * 8, value);
        form.advance(cpu, slot::RSI, 1);
        Ok(1)
    })
}

pub(super) fn scas(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    let form = Form::new(cpu, insn, memory_bytes(insn));
    repeat(cpu, insn, &form, until(insn), |cpu, form, _| {
        let at = form.destination(cpu, 1, Access::Read)?;
        let b = read(cpu, at, form.size)?;
        let a = cpu.regs[slot::RAX];
        cpu.flags.sub(a, b, a.wrapping_sub(b), form.size as u32 * 8);
        form.advance(cpu, slot::RDI, 1);
        Ok(1)
    })
}

pub(super) fn cmps(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    let form = Form::new(cpu, insn, memory_bytes(insn));
    repeat(cpu, insn, &form, until(insn), |cpu, form, _| {
        let a = form.load(cpu, insn)?;
        let at = form.destination(cpu, 1, Access::Read)?;
        let b = read(cpu, at, form.size)?;
        cpu.flags.sub(a, b, a.wrapping_sub(b), form.size as u32 * 8);
        form.advance(cpu, slot::RSI, 1);
        form.advance(cpu, slot::RDI, 1);
        Ok(1)
    })
}

pub(super) fn ins(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    let form = Form::new(cpu, insn, memory_bytes(insn));
    let port = cpu.regs[slot::RDX] as u16;
    cpu.require_ports(port, form.size)?;
    repeat(cpu, insn, &form, Until::CountOut, |cpu, form, _| {
        // What the port gives is lost if it cannot be stored.
        let at = form.destination(cpu, 1, Access::Write)?;
        cpu.probe_write(at, form.size)?;
        let value = cpu.port_in(port, form.size);
        write(cpu, at, form.size, value)?;
        form.advance(cpu, slot::RDI, 1);
        Ok(1)
    })
}

pub(super) fn outs(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    let form = Form::new(cpu, insn, memory_bytes(insn));
    let port = cpu.regs[slot::RDX] as u16;
    cpu.require_ports(port, form.size)?;
    repeat(cpu, insn, &form, Until::CountOut, |cpu, form, _| {
        let value = form.load(cpu, insn)?;
        cpu.port_out(port, form.size, value);
        form.advance(cpu, slot::RSI, 1);
        Ok(1)
    })
}
