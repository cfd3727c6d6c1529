//! Control transfers that load CS: far jumps, calls and returns, and IRET (Intel SDM volume 2).

use iced_x86::{Code, Instruction, MemorySize, OpKind};

use crate::hv::soft::cpu::{Cpu, is_canonical, seg, slot};
use crate::hv::soft::fault::{Exception, Flow, Stop};
use crate::hv::soft::flags;
use crate::hv::soft::mmu::Access;
use crate::hv::soft::operand::segment_fault;
use crate::hv::state::x86_64::Segment;

use super::mask;
use super::segment::{Descriptor, code, gp, is_null};

impl Cpu {
    /// The far pointer in memory: offset, selector, and the offset's size.
    pub(super) fn far_pointer(&mut self, insn: &Instruction) -> Result<(u64, u16, u64), Stop> {
        let bytes = match insn.memory_size() {
            MemorySize::SegPtr16 => 2,
            MemorySize::SegPtr32 => 4,
            _ => 8,
        };
        let address = self.linear_address(insn, bytes + 2, Access::Read)?;
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

    /// Where a far jump or call goes: offset, selector, and the offset's size.
    fn far_target(&mut self, insn: &Instruction) -> Result<(u64, u16, u64), Stop> {
        match insn.op0_kind() {
            OpKind::FarBranch16 => Ok((insn.far_branch16().into(), insn.far_branch_selector(), 2)),
            OpKind::FarBranch32 => Ok((insn.far_branch32().into(), insn.far_branch_selector(), 4)),
            _ => self.far_pointer(insn),
        }
    }

    /// Whether a descriptor is of 64-bit code, which there is in long mode alone.
    fn is_long_code(&self, descriptor: Descriptor) -> bool {
        self.is_long_mode() && descriptor.is_long()
    }

    /// The code segment that a far jump or call at the current level may go to directly.
    fn transfer_segment(&mut self, selector: u16, offset: u64) -> Result<Segment, Stop> {
        if !self.is_protected() {
            let segment = self.real_segment(seg::CS, selector);
            return if offset <= segment.limit.into() { Ok(segment) } else { Err(gp(0)) };
        }
        if is_null(selector) {
            return Err(gp(0));
        }
        let mut descriptor = self.descriptor(selector)?.ok_or_else(|| gp(selector))?;
        if !descriptor.is_code() {
            return Err(self.system_transfer(descriptor));
        }
        let (cpl, rpl) = (self.cpl(), selector as u8 & 3);
        let allowed =
            if descriptor.is_conforming() { descriptor.dpl() <= cpl } else { rpl <= cpl && descriptor.dpl() == cpl };
        if !allowed || (self.is_long_code(descriptor) && descriptor.is_default_32()) {
            return Err(gp(selector));
        }
        if !descriptor.is_present() {
            return Err(Exception::not_present(code(selector)).into());
        }
        self.check_target(descriptor, offset)?;
        self.mark_accessed(&mut descriptor)?;
        Ok(code_segment(descriptor, cpl))
    }

    /// Why there is no going through a system descriptor: long mode has call gates (type 12) alone.
    fn system_transfer(&self, descriptor: Descriptor) -> Stop {
        match descriptor.kind() {
            0xc => Stop::Unimplemented("call gate"),
            4 if !self.is_long_mode() => Stop::Unimplemented("call gate"),
            1 | 5 | 9 if !self.is_long_mode() => Stop::Unimplemented("task switch"),
            _ => gp(descriptor.selector),
        }
    }

    /// The code segment that a far return or IRET goes back to.
    fn return_segment(&mut self, selector: u16) -> Result<Descriptor, Stop> {
        if is_null(selector) {
            return Err(gp(0));
        }
        let descriptor = self.descriptor(selector)?.ok_or_else(|| gp(selector))?;
        let rpl = selector as u8 & 3;
        let level = if descriptor.is_conforming() { descriptor.dpl() <= rpl } else { descriptor.dpl() == rpl };
        if !descriptor.is_code()
            || rpl < self.cpl()
            || !level
            || (self.is_long_code(descriptor) && descriptor.is_default_32())
        {
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

    /// Whether code of a descriptor may be entered at `offset`.
    fn check_target(&self, descriptor: Descriptor, offset: u64) -> Result<(), Stop> {
        let fits =
            if self.is_long_code(descriptor) { is_canonical(offset) } else { offset <= descriptor.limit().into() };
        if fits { Ok(()) } else { Err(gp(0)) }
    }

    /// Completes a return to another level or stack.
    fn arrive(&mut self, cs: Segment, stack: Stack, rip: u64) {
        let outward = cs.attributes >> 5 & 3 > u16::from(self.cpl());
        self.segments[seg::CS] = cs;
        self.rip = rip;
        match stack {
            Stack::Same { rsp } => self.regs[slot::RSP] = rsp,
            Stack::Other { ss, rsp } => {
                self.segments[seg::SS] = ss;
                self.set_low(slot::RSP, self.stack_bits(), rsp);
            }
        }
        if outward {
            self.drop_privileged_segments();
        }
        self.mode_changed();
    }

    /// RSP after a return drops `bytes`.
    fn stack_after(&mut self, bytes: u64) -> u64 {
        let before = self.regs[slot::RSP];
        self.move_stack(bytes);
        std::mem::replace(&mut self.regs[slot::RSP], before)
    }
}

/// The stack that a return goes back to.
enum Stack {
    Same { rsp: u64 },
    Other { ss: Segment, rsp: u64 },
}

/// CS as loaded: its selector and attributes name the level the code runs at.
fn code_segment(descriptor: Descriptor, cpl: u8) -> Segment {
    let mut segment = descriptor.segment(descriptor.selector & !3 | u16::from(cpl));
    segment.attributes = segment.attributes & !(3 << 5) | u16::from(cpl) << 5;
    segment
}

pub(super) fn jmp(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    let (offset, selector, _) = cpu.far_target(insn)?;
    cpu.segments[seg::CS] = cpu.transfer_segment(selector, offset)?;
    cpu.rip = offset;
    Ok(Flow::Sync)
}

pub(super) fn call(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    let (offset, selector, bytes) = cpu.far_target(insn)?;
    let segment = cpu.transfer_segment(selector, offset)?;
    cpu.push_all(&[cpu.segments[seg::CS].selector.into(), cpu.rip], bytes)?;
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
    if !cpu.is_protected() {
        return return_real(cpu, selector, rip, 2 * bytes + drop);
    }
    let mut descriptor = cpu.return_segment(selector)?;
    let level = selector as u8 & 3;
    let stack = if level > cpu.cpl() {
        let rsp = cpu.peek_sized(2 * bytes + drop, bytes)?;
        let stack = cpu.peek_sized(3 * bytes + drop, bytes)? as u16;
        let ss = cpu.stack_segment(stack, level, cpu.is_long_code(descriptor))?;
        Stack::Other { ss, rsp: rsp.wrapping_add(drop) }
    } else {
        Stack::Same { rsp: cpu.stack_after(2 * bytes + drop) }
    };
    cpu.check_target(descriptor, rip)?;
    cpu.mark_accessed(&mut descriptor)?;
    cpu.arrive(code_segment(descriptor, level), stack, rip);
    Ok(Flow::Sync)
}

/// A far return or IRET in real mode, which takes `bytes` off the stack.
fn return_real(cpu: &mut Cpu, selector: u16, rip: u64, bytes: u64) -> Result<Flow, Stop> {
    let segment = cpu.transfer_segment(selector, rip)?;
    cpu.move_stack(bytes);
    cpu.segments[seg::CS] = segment;
    cpu.rip = rip;
    Ok(Flow::Sync)
}

/// IRET ends the handling of an NMI, also if it faults (SDM 7.7.1).
pub(super) fn iret(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    cpu.nmi_masked = false;
    let bytes = match insn.code() {
        Code::Iretw => 2,
        Code::Iretd => 4,
        _ => 8,
    };
    if cpu.is_protected() && cpu.system_flags & flags::NT != 0 {
        // Back to the task before; long mode has no task switches.
        return Err(if cpu.is_long_mode() { gp(0) } else { Stop::Unimplemented("task switch") });
    }
    let mut frame = [0u64; 3];
    for (n, value) in (0..).zip(&mut frame) {
        *value = cpu.peek_sized(n * bytes, bytes)?;
    }
    let [rip, cs, rflags] = frame;
    // RF only holds off instruction breakpoints, which never match here, until the next instruction is done.
    let writable = cpu.writable_flags() & mask(bytes as u32 * 8);
    let rflags_after = cpu.rflags() & !writable | rflags & writable;
    if !cpu.is_protected() {
        let flow = return_real(cpu, cs as u16, rip, 3 * bytes)?;
        cpu.set_rflags(rflags_after);
        return Ok(flow);
    }
    if bytes > 2 && rflags & flags::VM != 0 && cpu.cpl() == 0 && !cpu.is_long_mode() {
        return Err(Stop::Unimplemented("virtual-8086 mode"));
    }
    let mut descriptor = cpu.return_segment(cs as u16)?;
    let level = cs as u8 & 3;
    // 64-bit mode always takes all five values off the stack.
    let stack = if cpu.is_64bit() || level > cpu.cpl() {
        let (rsp, ss) = (cpu.peek_sized(3 * bytes, bytes)?, cpu.peek_sized(4 * bytes, bytes)? as u16);
        Stack::Other { ss: cpu.stack_segment(ss, level, cpu.is_long_code(descriptor))?, rsp }
    } else {
        Stack::Same { rsp: cpu.stack_after(3 * bytes) }
    };
    cpu.check_target(descriptor, rip)?;
    cpu.mark_accessed(&mut descriptor)?;
    cpu.set_rflags(rflags_after);
    cpu.arrive(code_segment(descriptor, level), stack, rip);
    Ok(Flow::Sync)
}
