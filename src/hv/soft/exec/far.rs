//! Control transfers that load CS: far jumps, calls and returns, and IRET (Intel SDM volume 2).

use iced_x86::{Code, Instruction, MemorySize};

use crate::hv::soft::cpu::{Cpu, is_canonical, seg, slot, stack_fault};
use crate::hv::soft::fault::{Exception, Flow, Stop};
use crate::hv::soft::flags;
use crate::hv::soft::operand::segment_fault;
use crate::hv::state::x86_64::Segment;

use super::mask;
use super::segment::{Descriptor, code, gp, is_null};

impl Cpu {
    /// The far pointer in memory: offset and selector.
    fn far_pointer(&mut self, insn: &Instruction) -> Result<(u64, u16, u64), Stop> {
        let bytes = match insn.memory_size() {
            MemorySize::SegPtr16 => 2,
            MemorySize::SegPtr32 => 4,
            _ => 8,
        };
        let address = self.linear_address(insn);
        let read = |cpu: &mut Self| -> Result<(u64, u16, u64), Stop> {
            let offset = match bytes {
                2 => cpu.read::<u16>(address)?.into(),
                4 => cpu.read::<u32>(address)?.into(),
                _ => cpu.read::<u64>(address)?,
            };
            Ok((offset, cpu.read::<u16>(address.wrapping_add(bytes))?, bytes))
        };
        read(self).map_err(|stop| segment_fault(insn, stop))
    }

    /// The code segment that a far jump or call at the current level may go to directly.
    fn transfer_segment(&mut self, selector: u16, offset: u64) -> Result<Segment, Stop> {
        if is_null(selector) {
            return Err(gp(0));
        }
        let mut descriptor = self.descriptor(selector)?.ok_or_else(|| gp(selector))?;
        if !descriptor.is_code() {
            // A 64-bit call gate (type 12) is the one system descriptor to transfer through.
            return Err(if descriptor.kind() == 0xc { Stop::Unimplemented("call gate") } else { gp(selector) });
        }
        let (cpl, rpl) = (self.cpl(), selector as u8 & 3);
        let allowed =
            if descriptor.is_conforming() { descriptor.dpl() <= cpl } else { rpl <= cpl && descriptor.dpl() == cpl };
        if !allowed || (descriptor.is_long() && descriptor.is_default_32()) {
            return Err(gp(selector));
        }
        if !descriptor.is_present() {
            return Err(Exception::not_present(code(selector)).into());
        }
        if !is_canonical(offset) || (!descriptor.is_long() && offset > descriptor.limit().into()) {
            return Err(gp(0));
        }
        self.mark_accessed(&mut descriptor)?;
        Ok(code_segment(descriptor, cpl))
    }

    /// The code segment that a far return or IRET goes back to.
    fn return_segment(&mut self, selector: u16) -> Result<Descriptor, Stop> {
        if is_null(selector) {
            return Err(gp(0));
        }
        let descriptor = self.descriptor(selector)?.ok_or_else(|| gp(selector))?;
        let rpl = selector as u8 & 3;
        let level = if descriptor.is_conforming() { descriptor.dpl() <= rpl } else { descriptor.dpl() == rpl };
        if !descriptor.is_code() || rpl < self.cpl() || !level || (descriptor.is_long() && descriptor.is_default_32()) {
            return Err(gp(selector));
        }
        if !descriptor.is_present() {
            return Err(Exception::not_present(code(selector)).into());
        }
        Ok(descriptor)
    }

    /// Data segments that the level returned to may not use become null.
    fn drop_privileged_segments(&mut self) {
        let cpl = self.cpl();
        for index in [seg::ES, seg::DS, seg::FS, seg::GS] {
            let segment = &mut self.segments[index];
            let conforming = segment.attributes & 0xc == 0xc;
            if !segment.unusable && !conforming && (segment.attributes >> 5 & 3) < u16::from(cpl) {
                segment.selector = 0;
                segment.unusable = true;
            }
        }
    }

    /// Completes a return to another level or stack.
    fn arrive(&mut self, cs: Segment, ss: Segment, rip: u64, rsp: u64) {
        let outward = cs.attributes >> 5 & 3 > u16::from(self.cpl());
        self.segments[seg::CS] = cs;
        self.segments[seg::SS] = ss;
        self.rip = rip;
        self.regs[slot::RSP] = rsp;
        if outward {
            self.drop_privileged_segments();
        }
        self.mode_changed();
    }
}

/// CS as loaded: its selector and attributes name the level the code runs at.
fn code_segment(descriptor: Descriptor, cpl: u8) -> Segment {
    let mut segment = descriptor.segment(descriptor.selector & !3 | u16::from(cpl));
    segment.attributes = segment.attributes & !(3 << 5) | u16::from(cpl) << 5;
    segment
}

pub(super) fn jmp(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    let (offset, selector, _) = cpu.far_pointer(insn)?;
    cpu.segments[seg::CS] = cpu.transfer_segment(selector, offset)?;
    cpu.rip = offset;
    Ok(Flow::Sync)
}

pub(super) fn call(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    let (offset, selector, bytes) = cpu.far_pointer(insn)?;
    let segment = cpu.transfer_segment(selector, offset)?;
    let sp = cpu.regs[slot::RSP];
    cpu.push_sized(cpu.segments[seg::CS].selector.into(), bytes)?;
    if let Err(stop) = cpu.push_sized(cpu.rip, bytes) {
        cpu.regs[slot::RSP] = sp;
        return Err(stop);
    }
    cpu.segments[seg::CS] = segment;
    cpu.rip = offset;
    Ok(Flow::Sync)
}

pub(super) fn ret(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    let bytes = match insn.code() {
        Code::Retfw | Code::Retfw_imm16 => 2,
        Code::Retfd | Code::Retfd_imm16 => 4,
        _ => 8,
    };
    let drop = if insn.op_count() == 1 { u64::from(insn.immediate16()) } else { 0 };
    let rip = cpu.peek_sized(0, bytes)?;
    let selector = cpu.peek_sized(bytes, bytes)? as u16;
    let mut descriptor = cpu.return_segment(selector)?;
    let level = selector as u8 & 3;
    let (ss, rsp) = if level > cpu.cpl() {
        let rsp = cpu.peek_sized(2 * bytes + drop, bytes)?;
        let stack = cpu.peek_sized(3 * bytes + drop, bytes)? as u16;
        (cpu.stack_segment(stack, level, descriptor.is_long())?, rsp.wrapping_add(drop))
    } else {
        (cpu.segments[seg::SS], cpu.regs[slot::RSP].wrapping_add(2 * bytes + drop))
    };
    check_return(&descriptor, rip)?;
    cpu.mark_accessed(&mut descriptor)?;
    cpu.arrive(code_segment(descriptor, level), ss, rip, rsp);
    Ok(Flow::Sync)
}

fn check_return(descriptor: &Descriptor, rip: u64) -> Result<(), Stop> {
    let fits = if descriptor.is_long() { is_canonical(rip) } else { rip <= descriptor.limit().into() };
    if fits { Ok(()) } else { Err(gp(0)) }
}

/// In 64-bit mode IRET always takes all five values off the stack.
pub(super) fn iret(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    if cpu.system_flags & flags::NT != 0 {
        return Err(gp(0));
    }
    let bytes = match insn.code() {
        Code::Iretw => 2,
        Code::Iretd => 4,
        _ => 8,
    };
    let mut frame = [0u64; 5];
    for (n, value) in frame.iter_mut().enumerate() {
        *value = cpu.peek_sized(n as u64 * bytes, bytes).map_err(stack_fault)?;
    }
    let [rip, cs, rflags, rsp, ss] = frame;
    let mut descriptor = cpu.return_segment(cs as u16)?;
    let level = cs as u8 & 3;
    let stack = cpu.stack_segment(ss as u16, level, descriptor.is_long())?;
    check_return(&descriptor, rip)?;
    cpu.mark_accessed(&mut descriptor)?;
    let writable = (cpu.writable_flags() | flags::RF) & mask(bytes as u32 * 8);
    cpu.set_rflags(cpu.rflags() & !writable | rflags & writable);
    cpu.arrive(code_segment(descriptor, level), stack, rip, rsp);
    Ok(Flow::Sync)
}
