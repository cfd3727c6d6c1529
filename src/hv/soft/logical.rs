//! Logical addresses: an offset in a segment becomes a linear address (Intel SDM volume 3A, 3.4, and 6.3 to 6.5 for the
//! checks).
//!
//! 64-bit mode has no segments but the bases of FS and GS. Outside it every access is checked against its segment's
//! limit and type, and linear addresses have 32 bits. Real mode checks limits alone: its segments are whatever their
//! hidden parts say.

use super::cpu::{Cpu, cr0, efer, seg, slot};
use super::fault::{Exception, Stop};
use super::mmu::Access;
use crate::hv::state::x86_64::Segment;

/// One past the last linear address outside 64-bit mode.
const END: u64 = 1 << 32;
/// Descriptor bit 54, as attributes have it: 32-bit code, or a stack whose pointer has 32 bits.
const DEFAULT_32: u16 = 1 << 14;

/// The type field of a segment's attributes.
const CODE: u16 = 1 << 3;
/// Of data: the limit bounds from below.
const EXPAND_DOWN: u16 = 1 << 2;
/// Of data: writable. Of code: readable.
const GRANTS: u16 = 1 << 1;

impl Cpu {
    /// Protected mode, in any of its forms.
    pub(super) fn is_protected(&self) -> bool {
        self.control.cr0 & cr0::PE != 0
    }

    /// Long mode, 64-bit or compatibility.
    pub(super) fn is_long_mode(&self) -> bool {
        self.control.efer & efer::LMA != 0
    }

    /// #UD in real mode, which some system instructions do not have.
    pub(super) fn require_protected(&self) -> Result<(), Stop> {
        if self.is_protected() { Ok(()) } else { Err(Exception::INVALID_OPCODE.into()) }
    }

    /// What instructions are decoded as: 16, 32 or 64 bits.
    pub(super) fn code_bits(&self) -> u32 {
        if self.is_64bit() {
            64
        } else if self.segments[seg::CS].attributes & DEFAULT_32 != 0 {
            32
        } else {
            16
        }
    }

    /// How much of RSP the stack uses.
    #[inline]
    pub(super) fn stack_bits(&self) -> u32 {
        if self.is_64bit() {
            64
        } else if self.segments[seg::SS].attributes & DEFAULT_32 != 0 {
            32
        } else {
            16
        }
    }

    /// The base of a segment outside 64-bit mode.
    pub(super) fn base(&self, index: usize) -> u64 {
        match index {
            seg::FS => self.regs[slot::FS_BASE],
            seg::GS => self.regs[slot::GS_BASE],
            _ => self.segments[index].base,
        }
    }

    /// The linear address of `len` bytes (at least one) at an offset in a segment, outside 64-bit mode.
    ///
    /// # Errors
    /// #SS(0) through the stack segment, #GP(0) through the others.
    pub(super) fn segment_address(&self, index: usize, offset: u64, len: u64, access: Access) -> Result<u64, Stop> {
        let segment = &self.segments[index];
        let allowed = !segment.unusable
            && (!self.is_protected() || grants(segment.attributes, access))
            && within_limit(segment, offset, len);
        if !allowed {
            let fault = if index == seg::SS { Exception::stack(0) } else { Exception::general_protection(0) };
            return Err(fault.into());
        }
        let address = self.base(index).wrapping_add(offset) % END;
        if address + len > END {
            return Err(Stop::Unimplemented("an operand across the end of the linear address space"));
        }
        Ok(address)
    }

    /// The linear address of `len` bytes on the stack.
    #[inline]
    pub(super) fn stack_address(&self, offset: u64, len: u64, access: Access) -> Result<u64, Stop> {
        if self.is_64bit() { Ok(offset) } else { self.segment_address(seg::SS, offset, len, access) }
    }

    /// How many bytes of code the code segment has at an offset, and the linear address of the first; #GP(0) for none.
    pub(super) fn code_address(&self, offset: u64) -> Result<(u64, u64), Stop> {
        if self.is_64bit() {
            return Ok((offset, u64::MAX));
        }
        let address = self.segment_address(seg::CS, offset, 1, Access::Fetch)?;
        let limit = u64::from(self.segments[seg::CS].limit);
        Ok((address, limit.saturating_sub(offset) + 1))
    }

    /// Whether execution may go on at `target`: canonical, or within the code segment.
    #[inline]
    pub(super) fn is_code_address(&self, target: u64) -> bool {
        if self.is_64bit() {
            super::cpu::is_canonical(target)
        } else {
            target <= u64::from(self.segments[seg::CS].limit)
        }
    }
}

/// Whether a segment of protected mode allows an access by its type (SDM 6.5). Fetches were checked when CS was loaded.
fn grants(attributes: u16, access: Access) -> bool {
    match access {
        Access::Read => attributes & CODE == 0 || attributes & GRANTS != 0,
        Access::Write => attributes & (CODE | GRANTS) == GRANTS,
        Access::Fetch => true,
    }
}

/// Whether `len` bytes at `offset` lie within a segment (SDM 6.3).
pub(super) fn within_limit(segment: &Segment, offset: u64, len: u64) -> bool {
    let (limit, last) = (u64::from(segment.limit), offset + (len - 1));
    if segment.attributes & (CODE | EXPAND_DOWN) == EXPAND_DOWN {
        let top = if segment.attributes & DEFAULT_32 != 0 { 0xffff_ffff } else { 0xffff };
        offset > limit && last <= top
    } else {
        last <= limit
    }
}
