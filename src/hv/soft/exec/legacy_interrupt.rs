//! Interrupts and exceptions outside long mode: real mode's vector table (Intel SDM volume 3A, 22.1.4) and protected
//! mode's gates (7.11 and 7.12).

use crate::hv::soft::cpu::{Cpu, seg, slot, stack_fault};
use crate::hv::soft::fault::{Exception, Stop};
use crate::hv::soft::flags;
use crate::hv::soft::logical::within_limit;
use crate::hv::state::x86_64::Segment;

use super::interrupt::Source;
use super::mask;
use super::segment::is_null;

/// A gate of a protected-mode IDT that may be entered.
struct Gate {
    selector: u16,
    offset: u64,
    /// What is pushed has this many bytes each.
    bytes: u64,
    clears_if: bool,
}

/// A busy 32-bit TSS, and the type bits that tell.
const TSS_32_BUSY: u16 = 0xb;

impl Cpu {
    /// Enters a handler through real mode's table of far pointers. There are no error codes.
    pub(super) fn enter_real_handler(&mut self, vector: u8) -> Result<(), Stop> {
        let at = u64::from(vector) * 4;
        if at + 3 > u64::from(self.idtr.limit) {
            return Err(Exception::general_protection(0).into());
        }
        let pointer = self.read_system::<u32>(self.idtr.base.wrapping_add(at))?;
        let (offset, selector) = (u64::from(pointer as u16), (pointer >> 16) as u16);
        let segment = self.real_segment(seg::CS, selector);
        if offset > segment.limit.into() {
            return Err(Exception::general_protection(0).into());
        }
        self.push_all(&[self.rflags(), self.segments[seg::CS].selector.into(), self.rip], 2)?;
        self.segments[seg::CS] = segment;
        self.rip = offset;
        self.system_flags &= !flags::AC;
        self.handler_entered(vector, true);
        Ok(())
    }

    /// Enters a handler through an interrupt or trap gate of protected mode.
    pub(super) fn enter_legacy_gate(
        &mut self,
        vector: u8,
        error: Option<u32>,
        source: Source,
        external: u32,
    ) -> Result<(), Stop> {
        let gate = self.legacy_gate(vector, source, external)?;
        if is_null(gate.selector) {
            return Err(Exception::general_protection(external).into());
        }
        let name = u32::from(gate.selector & !3) | external;
        let refused = Exception::general_protection(name);
        let mut code = self.descriptor(gate.selector)?.ok_or(refused)?;
        let cpl = self.cpl();
        if !code.is_code() || code.dpl() > cpl {
            return Err(refused.into());
        }
        if !code.is_present() {
            return Err(Exception::not_present(name).into());
        }
        if gate.offset > code.limit().into() {
            return Err(Exception::general_protection(external).into());
        }
        let level = if code.is_conforming() { cpl } else { code.dpl() };
        let mut values = vec_of([self.rflags(), self.segments[seg::CS].selector.into(), self.rip], error);
        let (ss, top) = if level < cpl {
            let (ss, top) = self.inner_stack(level, external)?;
            values.splice(0..0, [self.segments[seg::SS].selector.into(), self.regs[slot::RSP]]);
            (ss, top)
        } else {
            (self.segments[seg::SS], self.regs[slot::RSP])
        };
        let fault = if level < cpl { u32::from(ss.selector & !3) | external } else { external };
        let sp = self.push_legacy_frame(&ss, top, &values, gate.bytes, fault)?;
        self.mark_accessed(&mut code)?;
        self.segments[seg::SS] = ss;
        let bits = self.stack_bits();
        self.set_low(slot::RSP, bits, sp);
        self.segments[seg::CS] = code.segment(gate.selector & !3 | u16::from(level));
        // The attributes must show the level the code runs at, which a conforming segment does not give.
        self.segments[seg::CS].attributes = self.segments[seg::CS].attributes & !(3 << 5) | u16::from(level) << 5;
        self.rip = gate.offset;
        self.handler_entered(vector, gate.clears_if);
        Ok(())
    }

    fn legacy_gate(&mut self, vector: u8, source: Source, external: u32) -> Result<Gate, Stop> {
        let at = u64::from(vector) * 8;
        // Error codes that name an IDT entry have bit 1 set.
        let name = u32::from(vector) << 3 | 2 | external;
        let refused = Exception::general_protection(name);
        if at + 7 > u64::from(self.idtr.limit) {
            return Err(refused.into());
        }
        let raw = self.read_system::<u64>(self.idtr.base.wrapping_add(at))?;
        let (kind, dpl) = (raw >> 40 & 0x1f, (raw >> 45 & 3) as u8);
        if !matches!(kind, 5 | 6 | 7 | 0xe | 0xf) || (source == Source::Software && dpl < self.cpl()) {
            return Err(refused.into());
        }
        if raw >> 47 & 1 == 0 {
            return Err(Exception::not_present(name).into());
        }
        if kind == 5 {
            return Err(Stop::Unimplemented("task gate"));
        }
        let wide = kind & 8 != 0;
        let offset = raw & 0xffff | if wide { raw >> 32 & 0xffff_0000 } else { 0 };
        let bytes = if wide { 4 } else { 2 };
        Ok(Gate { selector: (raw >> 16) as u16, offset, bytes, clears_if: kind & 1 == 0 })
    }

    /// The stack of a more privileged level, out of the TSS.
    fn inner_stack(&mut self, level: u8, external: u32) -> Result<(Segment, u64), Stop> {
        let refused = Exception::invalid_tss(u32::from(self.tr.selector & !3) | external);
        if self.tr.attributes & 0xf != TSS_32_BUSY {
            return Err(Stop::Unimplemented("a stack out of a 16-bit TSS"));
        }
        let at = 4 + 8 * u64::from(level);
        if at + 5 > u64::from(self.tr.limit) {
            return Err(refused.into());
        }
        let top = self.read_system::<u32>(self.tr.base.wrapping_add(at))?;
        let selector = self.read_system::<u16>(self.tr.base.wrapping_add(at + 4))?;
        let segment = self.stack_segment(selector, level, false).map_err(|stop| match stop {
            // What is wrong with the selector is the TSS's fault.
            Stop::Fault(Exception { vector: 13, error: Some(code), .. }) => {
                Stop::Fault(Exception::invalid_tss(code | external))
            }
            Stop::Fault(Exception { vector: 12, error: Some(code), .. }) => {
                Stop::Fault(Exception::stack(code | external))
            }
            other => other,
        })?;
        Ok((segment, top.into()))
    }

    /// Writes a frame below `top` in a stack segment, as a supervisor, and returns the new stack pointer. `fault` is
    /// the error code of a #SS.
    fn push_legacy_frame(
        &mut self,
        ss: &Segment,
        top: u64,
        values: &[u64],
        bytes: u64,
        fault: u32,
    ) -> Result<u64, Stop> {
        let wrap = if ss.attributes & 1 << 14 != 0 { mask(32) } else { mask(16) };
        let mut sp = top & wrap;
        for value in values {
            sp = sp.wrapping_sub(bytes) & wrap;
            if !within_limit(ss, sp, bytes) {
                return Err(Exception::stack(fault).into());
            }
            let at = ss.base.wrapping_add(sp) & mask(32);
            let written =
                if bytes == 2 { self.write_system(at, *value as u16) } else { self.write_system(at, *value as u32) };
            written.map_err(stack_fault)?;
        }
        Ok(sp)
    }
}

/// A frame in the order in which it is pushed.
fn vec_of(frame: [u64; 3], error: Option<u32>) -> Vec<u64> {
    frame.into_iter().chain(error.map(u64::from)).collect()
}
