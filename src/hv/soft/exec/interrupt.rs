//! Interrupts and exceptions (Intel SDM volume 3A, chapter 7): long mode's gates, stack switches and frames, and the
//! double fault's rules. [`legacy_interrupt`](super::legacy_interrupt) has the gates of the other modes.

use crate::hv::soft::cpu::{Cpu, is_canonical, seg, slot};
use crate::hv::soft::fault::{Exception, Stop};
use crate::hv::soft::flags;

use super::segment::{is_null, null_stack};

/// Where an event comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::hv::soft) enum Source {
    /// Outside the program.
    External,
    /// An exception.
    Exception,
    /// INT n and INT3: the gate's DPL is checked.
    Software,
}

/// Why no handler could be entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::hv::soft) enum Shutdown {
    /// Not even the double fault's: the processor stops.
    TripleFault,
    /// The engine cannot do what delivery needs.
    Unimplemented(&'static str),
}

/// What a second fault makes of a first (SDM table 7-4).
#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    Benign,
    Contributory,
    PageFault,
    DoubleFault,
}

const fn class(vector: u8) -> Class {
    match vector {
        0 | 10..=13 => Class::Contributory,
        14 => Class::PageFault,
        8 => Class::DoubleFault,
        _ => Class::Benign,
    }
}

const DR7_GENERAL_DETECT: u64 = 1 << 13;

impl Cpu {
    /// Delivers an event, and whatever faults that meets on the way. `rip` must be what the frame shall hold.
    ///
    /// # Errors
    /// [`Shutdown`]; the state is then that before, but for CR2.
    pub(in crate::hv::soft) fn deliver(&mut self, event: Exception, source: Source) -> Result<(), Shutdown> {
        let (mut current, mut source) = (event, source);
        loop {
            let before = self.system_flags;
            if let Some(address) = current.cr2 {
                self.control.cr2 = address;
            }
            if source == Source::Exception && is_fault(current.vector) {
                // The handler's return must not meet an instruction breakpoint again.
                self.system_flags |= flags::RF;
            }
            let second = match self.enter_gate(current.vector, current.error, source) {
                Ok(()) => return Ok(()),
                Err(Stop::Unimplemented(what)) => {
                    self.system_flags = before;
                    return Err(Shutdown::Unimplemented(what));
                }
                Err(Stop::Fault(second)) => second,
            };
            self.system_flags = before;
            // An interrupt is benign: the fault that stops it is served in its place.
            let first = if source == Source::Exception { class(current.vector) } else { Class::Benign };
            current = match (first, class(second.vector)) {
                (Class::DoubleFault, _) => return Err(Shutdown::TripleFault),
                (Class::Contributory, Class::Contributory)
                | (Class::PageFault, Class::Contributory | Class::PageFault) => {
                    Exception { cr2: second.cr2, ..Exception::DOUBLE }
                }
                _ => second,
            };
            source = Source::Exception;
        }
    }

    /// Enters a handler through its gate, with `rip` as the return address. Changes nothing on error.
    pub(super) fn enter_gate(&mut self, vector: u8, error: Option<u32>, source: Source) -> Result<(), Stop> {
        if !self.is_protected() {
            return self.enter_real_handler(vector);
        }
        let external = u32::from(source != Source::Software);
        if !self.is_long_mode() {
            return self.enter_legacy_gate(vector, error, source, external);
        }
        let gate = self.gate(vector, source, external)?;
        let selector = gate.selector;
        if is_null(selector) {
            return Err(Exception::general_protection(external).into());
        }
        let refused = Exception::general_protection(u32::from(selector & !3) | external);
        let mut code = self.descriptor(selector)?.ok_or(refused)?;
        let cpl = self.cpl();
        if !code.is_code() || code.dpl() > cpl || !code.is_long() || code.is_default_32() {
            return Err(refused.into());
        }
        if !code.is_present() {
            return Err(Exception::not_present(u32::from(selector & !3) | external).into());
        }
        let level = if code.is_conforming() { cpl } else { code.dpl() };
        let inward = level < cpl;
        let stack = if gate.ist != 0 {
            self.tss_stack(0x24 + 8 * u64::from(gate.ist - 1), external)?
        } else if inward {
            self.tss_stack(4 + 8 * u64::from(level), external)?
        } else {
            self.regs[slot::RSP]
        };
        self.mark_accessed(&mut code)?;
        let sp = self.push_frame(stack & !15, error, external)?;
        self.regs[slot::RSP] = sp;
        self.segments[seg::CS] = code.segment(selector & !3 | u16::from(level));
        // The attributes must show the level the code runs at, which a conforming segment does not give.
        self.segments[seg::CS].attributes = self.segments[seg::CS].attributes & !(3 << 5) | u16::from(level) << 5;
        if inward {
            self.segments[seg::SS] = null_stack(level);
        }
        self.rip = gate.offset;
        self.handler_entered(vector, gate.clears_if);
        Ok(())
    }

    /// What every handler begins with, once its segments are loaded.
    pub(super) fn handler_entered(&mut self, vector: u8, clears_if: bool) {
        self.system_flags &= !(flags::TF | flags::RF | if self.is_protected() { flags::NT } else { 0 });
        if clears_if {
            self.system_flags &= !flags::IF;
        }
        if vector == 1 {
            self.dr[5] &= !DR7_GENERAL_DETECT;
        }
        self.interrupt_shadow = false;
        self.mode_changed();
    }

    fn gate(&mut self, vector: u8, source: Source, external: u32) -> Result<Gate, Stop> {
        let at = u64::from(vector) * 16;
        // Error codes that name an IDT entry have bit 1 set.
        let name = u32::from(vector) << 3 | 2 | external;
        let refused = Exception::general_protection(name);
        if at + 15 > u64::from(self.idtr.limit) {
            return Err(refused.into());
        }
        let address = self.idtr.base.wrapping_add(at);
        let low = self.read_structure(address)?;
        let high = self.read_structure(address.wrapping_add(8))?;
        let (kind, dpl) = (low >> 40 & 0x1f, (low >> 45 & 3) as u8);
        if !matches!(kind, 0xe | 0xf) || (source == Source::Software && dpl < self.cpl()) {
            return Err(refused.into());
        }
        if low >> 47 & 1 == 0 {
            return Err(Exception::not_present(name).into());
        }
        let offset = low & 0xffff | low >> 32 & 0xffff_0000 | high << 32;
        if !is_canonical(offset) {
            return Err(Exception::general_protection(external).into());
        }
        Ok(Gate { selector: (low >> 16) as u16, offset, ist: (low >> 32 & 7) as u8, clears_if: kind == 0xe })
    }

    /// A stack pointer out of the TSS.
    pub(super) fn tss_stack(&mut self, offset: u64, external: u32) -> Result<u64, Stop> {
        if offset + 7 > u64::from(self.tr.limit) {
            return Err(Exception::invalid_tss(u32::from(self.tr.selector & !3) | external).into());
        }
        let stack = self.read_structure(self.tr.base.wrapping_add(offset))?;
        if is_canonical(stack) { Ok(stack) } else { Err(Exception::stack(external).into()) }
    }

    /// Writes the frame below `top` as a supervisor and returns the new stack pointer.
    fn push_frame(&mut self, top: u64, error: Option<u32>, external: u32) -> Result<u64, Stop> {
        let frame = [
            self.segments[seg::SS].selector.into(),
            self.regs[slot::RSP],
            self.rflags(),
            self.segments[seg::CS].selector.into(),
            self.rip,
        ];
        let supervisor = self.cpl() < 3;
        let mut sp = top;
        for value in frame.into_iter().chain(error.map(u64::from)) {
            sp = sp.wrapping_sub(8);
            if !is_canonical(sp) {
                return Err(Exception::stack(external).into());
            }
            if supervisor { self.write(sp, value) } else { self.write_system(sp, value) }?;
        }
        Ok(sp)
    }
}

/// A gate that may be entered.
#[derive(Debug)]
struct Gate {
    selector: u16,
    offset: u64,
    ist: u8,
    clears_if: bool,
}

/// Faults are reported before their instruction; #DB (as raised here), #BP and #OF after it, #DF and #MC abort.
const fn is_fault(vector: u8) -> bool {
    !matches!(vector, 1 | 3 | 4 | 8 | 18)
}
