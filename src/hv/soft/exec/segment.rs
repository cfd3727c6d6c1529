//! Segment descriptors and registers (Intel SDM volume 3A, sections 3.4, 3.5 and 6.8; MOV in volume 2).

use iced_x86::{Instruction, Mnemonic, Register};

use crate::hv::soft::cpu::{Cpu, seg, slot};
use crate::hv::soft::fault::{Exception, Flow, Stop};
use crate::hv::soft::operand::operand_bits;
use crate::hv::state::x86_64::Segment;

/// Descriptor bit 40: set by the processor on first use.
const ACCESSED: u64 = 1 << 40;

/// A code or data descriptor, and where it is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Descriptor {
    pub(super) selector: u16,
    pub(super) raw: u64,
    address: u64,
}

impl Descriptor {
    fn bit(self, n: u32) -> bool {
        self.raw >> n & 1 != 0
    }
    /// Bits 40 to 44: type and S.
    pub(super) fn kind(self) -> u8 {
        (self.raw >> 40 & 0x1f) as u8
    }
    /// S is set: not a system descriptor.
    pub(super) fn is_memory(self) -> bool {
        self.bit(44)
    }
    pub(super) fn is_code(self) -> bool {
        self.is_memory() && self.bit(43)
    }
    /// Code that runs at its caller's privilege level.
    pub(super) fn is_conforming(self) -> bool {
        self.is_code() && self.bit(42)
    }
    pub(super) fn is_readable(self) -> bool {
        self.is_memory() && (!self.bit(43) || self.bit(41))
    }
    pub(super) fn is_writable(self) -> bool {
        self.is_memory() && !self.bit(43) && self.bit(41)
    }
    pub(super) fn dpl(self) -> u8 {
        (self.raw >> 45 & 3) as u8
    }
    pub(super) fn is_present(self) -> bool {
        self.bit(47)
    }
    pub(super) fn is_long(self) -> bool {
        self.bit(53)
    }
    pub(super) fn is_default_32(self) -> bool {
        self.bit(54)
    }
    pub(super) fn base(self) -> u64 {
        self.raw >> 16 & 0xff_ffff | self.raw >> 32 & 0xff00_0000
    }
    pub(super) fn limit(self) -> u32 {
        let limit = (self.raw & 0xffff | self.raw >> 32 & 0xf_0000) as u32;
        if self.bit(55) { limit << 12 | 0xfff } else { limit }
    }
    /// The hidden part that a segment register gets.
    pub(super) fn segment(self, selector: u16) -> Segment {
        let attributes = (self.raw >> 40) as u16 & 0xf0ff;
        Segment { selector, base: self.base(), limit: self.limit(), attributes, unusable: false }
    }
}

/// The error code that names a selector: without its privilege bits.
pub(super) fn code(selector: u16) -> u32 {
    u32::from(selector & !3)
}

pub(super) fn gp(selector: u16) -> Stop {
    Exception::general_protection(code(selector)).into()
}

/// Whether a selector is null, whatever its privilege bits.
pub(super) fn is_null(selector: u16) -> bool {
    selector & !3 == 0
}

impl Cpu {
    /// Reads a system structure: the fast way when the current privilege is a supervisor's.
    pub(super) fn read_structure(&mut self, at: u64) -> Result<u64, Stop> {
        if self.cpl() == 0 { self.read(at) } else { self.read_system(at) }
    }

    /// Base of the table that `selector` points into, if `bytes` bytes at its index lie within.
    fn descriptor_address(&self, selector: u16, bytes: u64) -> Option<u64> {
        let index = u64::from(selector & !7);
        let (base, limit) = if selector & 4 == 0 {
            (self.gdtr.base, u64::from(self.gdtr.limit))
        } else if self.ldtr.unusable {
            return None;
        } else {
            (self.ldtr.base, u64::from(self.ldtr.limit))
        };
        (index + bytes - 1 <= limit).then(|| base.wrapping_add(index))
    }

    /// The descriptor of a selector that is not null; `None` past its table's limit.
    pub(super) fn descriptor(&mut self, selector: u16) -> Result<Option<Descriptor>, Stop> {
        let Some(address) = self.descriptor_address(selector, 8) else { return Ok(None) };
        let raw = self.read_structure(address)?;
        Ok(Some(Descriptor { selector, raw, address }))
    }

    /// The upper half of a 16-byte system descriptor; `None` past its table's limit.
    pub(super) fn descriptor_upper(&mut self, selector: u16) -> Result<Option<u64>, Stop> {
        let Some(address) = self.descriptor_address(selector, 16) else { return Ok(None) };
        self.read_structure(address.wrapping_add(8)).map(Some)
    }

    /// Marks a descriptor accessed, in memory and in the copy.
    pub(super) fn mark_accessed(&mut self, descriptor: &mut Descriptor) -> Result<(), Stop> {
        if descriptor.raw & ACCESSED == 0 {
            descriptor.raw |= ACCESSED;
            self.write_system(descriptor.address, descriptor.raw)?;
        }
        Ok(())
    }

    /// Rewrites the type of a system descriptor (a TSS made busy).
    pub(super) fn write_descriptor(&mut self, descriptor: &Descriptor) -> Result<(), Stop> {
        self.write_system(descriptor.address, descriptor.raw)
    }

    /// Loads DS, ES, FS, GS or SS. SS must suit the privilege level `cpl`.
    pub(super) fn load_data_segment(&mut self, index: usize, selector: u16) -> Result<(), Stop> {
        let segment = if !self.is_protected() {
            self.real_segment(index, selector)
        } else if index == seg::SS {
            self.stack_segment(selector, self.cpl(), self.is_64bit())?
        } else {
            self.data_segment(selector)?
        };
        match index {
            seg::FS => self.regs[slot::FS_BASE] = segment.base,
            seg::GS => self.regs[slot::GS_BASE] = segment.base,
            _ => {}
        }
        self.segments[index] = segment;
        Ok(())
    }

    /// What a segment register becomes in real mode (SDM 22.1.1): only selector and base change, so that a limit from
    /// protected mode stays.
    pub(super) fn real_segment(&self, index: usize, selector: u16) -> Segment {
        Segment { selector, base: u64::from(selector) << 4, unusable: false, ..self.segments[index] }
    }

    fn data_segment(&mut self, selector: u16) -> Result<Segment, Stop> {
        if is_null(selector) {
            return Ok(Segment { selector, unusable: true, ..Segment::default() });
        }
        let mut descriptor = self.descriptor(selector)?.ok_or_else(|| gp(selector))?;
        let privileged = self.cpl().max(selector as u8 & 3) > descriptor.dpl();
        if !descriptor.is_readable() || (privileged && !descriptor.is_conforming()) {
            return Err(gp(selector));
        }
        if !descriptor.is_present() {
            return Err(Exception::not_present(code(selector)).into());
        }
        self.mark_accessed(&mut descriptor)?;
        Ok(descriptor.segment(selector))
    }

    /// What SS becomes for privilege level `cpl`; null suits 64-bit code below level 3.
    pub(super) fn stack_segment(&mut self, selector: u16, cpl: u8, long: bool) -> Result<Segment, Stop> {
        if is_null(selector) {
            if cpl == 3 || !long || selector as u8 & 3 != cpl {
                return Err(gp(0));
            }
            return Ok(null_stack(cpl));
        }
        let mut descriptor = self.descriptor(selector)?.ok_or_else(|| gp(selector))?;
        if selector as u8 & 3 != cpl || !descriptor.is_writable() || descriptor.dpl() != cpl {
            return Err(gp(selector));
        }
        if !descriptor.is_present() {
            return Err(Exception::stack(code(selector)).into());
        }
        self.mark_accessed(&mut descriptor)?;
        Ok(descriptor.segment(selector))
    }
}

/// SS holding a null selector: 64-bit mode uses it all the same, at the level it names.
pub(super) fn null_stack(cpl: u8) -> Segment {
    Segment { selector: cpl.into(), base: 0, limit: u32::MAX, attributes: 0xc093 | u16::from(cpl) << 5, unusable: true }
}

/// After a change of SS no interrupt comes before the next instruction is done, which sets RSP.
fn loaded(cpu: &mut Cpu, index: usize) -> Flow {
    if index == seg::SS {
        cpu.interrupt_shadow = true;
        Flow::Sync
    } else {
        Flow::Next
    }
}

pub(super) fn mov_to(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    let index = insn.op0_register().number();
    let selector = match insn.op1_register() {
        Register::None => cpu.load::<u16>(insn)?,
        register => cpu.register(register) as u16,
    };
    cpu.load_data_segment(index, selector)?;
    Ok(loaded(cpu, index))
}

pub(super) fn mov_from(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    let selector = cpu.segments[insn.op1_register().number()].selector;
    if insn.op0_register() == Register::None {
        cpu.store(insn, selector)?;
    } else {
        debug_assert!(operand_bits(insn, 0) >= 16);
        cpu.set_register(insn.op0_register(), selector.into());
    }
    Ok(Flow::Next)
}

pub(super) fn pop(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    let index = insn.op0_register().number();
    let bytes = u64::from(insn.stack_pointer_increment().unsigned_abs());
    let selector = cpu.peek_sized(0, bytes)? as u16;
    // By the stack as it was: the new one may be of another size.
    let sp = cpu.regs[slot::RSP];
    cpu.move_stack(bytes);
    if let Err(stop) = cpu.load_data_segment(index, selector) {
        cpu.regs[slot::RSP] = sp;
        return Err(stop);
    }
    Ok(loaded(cpu, index))
}

/// LDS, LES, LFS, LGS and LSS: a segment register and a general one from a far pointer in memory.
pub(super) fn load_pointer(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    let index = match insn.mnemonic() {
        Mnemonic::Lds => seg::DS,
        Mnemonic::Les => seg::ES,
        Mnemonic::Lfs => seg::FS,
        Mnemonic::Lgs => seg::GS,
        _ => seg::SS,
    };
    let (offset, selector, _) = cpu.far_pointer(insn)?;
    cpu.load_data_segment(index, selector)?;
    cpu.set_register(insn.op0_register(), offset);
    Ok(loaded(cpu, index))
}
