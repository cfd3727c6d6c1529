//! Operands of a decoded instruction, as the general executor reads and writes them.
//!
//! Instructions are decoded with their offset in the page as the instruction pointer, so that one decoding serves
//! wherever the page is mapped: RIP-relative addresses and branch targets get [`slot::PAGE`] added here.

use iced_x86::{CodeSize, Instruction, OpKind, Register};

use crate::mem::Scalar;

use super::cpu::{Cpu, seg, slot, stack_fault};
use super::fault::Stop;
use super::mmu::Access;

impl Cpu {
    /// The low bits of a general register that `register` names, zero-extended.
    #[inline]
    pub(super) fn register(&self, register: Register) -> u64 {
        let number = register.full_register().number();
        let full = self.regs[number & 15];
        match register.size() {
            1 if is_high_byte(register) => full >> 8 & 0xff,
            1 => full & 0xff,
            2 => full & 0xffff,
            4 => full & 0xffff_ffff,
            _ => full,
        }
    }

    /// Writes a general register: 32-bit writes clear the upper half, narrower ones keep the rest.
    #[inline]
    pub(super) fn set_register(&mut self, register: Register, value: u64) {
        let full = &mut self.regs[register.full_register().number() & 15];
        *full = match register.size() {
            1 if is_high_byte(register) => *full & !0xff00 | (value & 0xff) << 8,
            1 => *full & !0xff | value & 0xff,
            2 => *full & !0xffff | value & 0xffff,
            4 => value & 0xffff_ffff,
            _ => value,
        };
    }

    /// The effective address without segment base: what LEA computes.
    pub(super) fn effective_address(&self, insn: &Instruction) -> u64 {
        let (base, index) = (insn.memory_base(), insn.memory_index());
        let displacement = insn.memory_displacement64();
        let mut address = match base {
            // The displacement then holds the whole in-page target.
            Register::RIP | Register::EIP => displacement.wrapping_add(self.regs[slot::PAGE]),
            Register::None => displacement,
            _ => displacement.wrapping_add(self.register(base)),
        };
        if index != Register::None {
            address = address.wrapping_add(self.register(index).wrapping_mul(u64::from(insn.memory_index_scale())));
        }
        address & address_mask(insn)
    }

    /// The base of the segment that `register` names; zero but for FS and GS in 64-bit mode.
    #[inline]
    pub(super) fn segment_base(&self, register: Register) -> u64 {
        match register {
            Register::FS => self.regs[slot::FS_BASE],
            Register::GS => self.regs[slot::GS_BASE],
            _ => 0,
        }
    }

    /// The linear address of the memory operand, `len` bytes long.
    ///
    /// # Errors
    /// #GP(0) or #SS(0) when its segment does not allow the access; 64-bit mode allows all here.
    #[inline]
    pub(super) fn linear_address(&self, insn: &Instruction, len: u64, access: Access) -> Result<u64, Stop> {
        self.address_at(insn, self.effective_address(insn), len, access)
    }

    /// As [`linear_address`](Self::linear_address), of an offset in the memory operand's segment.
    #[inline]
    pub(super) fn address_at(&self, insn: &Instruction, offset: u64, len: u64, access: Access) -> Result<u64, Stop> {
        if insn.code_size() == CodeSize::Code64 {
            return Ok(offset.wrapping_add(self.segment_base(insn.memory_segment())));
        }
        self.segment_address(segment_number(insn.memory_segment()), offset, len, access)
    }

    /// Reads the memory operand.
    pub(super) fn load<T: Scalar>(&mut self, insn: &Instruction) -> Result<T, Stop> {
        let address = self.linear_address(insn, T::SIZE, Access::Read)?;
        self.read(address).map_err(|stop| segment_fault(insn, stop))
    }

    /// Reads the memory operand of an instruction that will write it.
    pub(super) fn load_for_store<T: Scalar>(&mut self, insn: &Instruction) -> Result<T, Stop> {
        let address = self.linear_address(insn, T::SIZE, Access::Write)?;
        self.read_for_write(address).map_err(|stop| segment_fault(insn, stop))
    }

    /// Writes the memory operand.
    pub(super) fn store<T: Scalar>(&mut self, insn: &Instruction, value: T) -> Result<(), Stop> {
        let address = self.linear_address(insn, T::SIZE, Access::Write)?;
        self.write(address, value).map_err(|stop| segment_fault(insn, stop))
    }

    fn load_sized(&mut self, insn: &Instruction, bits: u32) -> Result<u64, Stop> {
        Ok(match bits {
            8 => self.load::<u8>(insn)?.into(),
            16 => self.load::<u16>(insn)?.into(),
            32 => self.load::<u32>(insn)?.into(),
            _ => self.load::<u64>(insn)?,
        })
    }

    /// An integer operand, zero-extended (immediates: as the instruction extends them, cut to its size).
    pub(super) fn operand(&mut self, insn: &Instruction, n: u32) -> Result<u64, Stop> {
        match insn.op_kind(n) {
            OpKind::Register => Ok(self.register(insn.op_register(n))),
            OpKind::Memory => self.load_sized(insn, memory_bits(insn)),
            _ => Ok(insn.immediate(n)),
        }
    }

    /// As [`operand`](Self::operand), for one that the same instruction will write.
    pub(super) fn operand_for_write(&mut self, insn: &Instruction, n: u32) -> Result<u64, Stop> {
        match insn.op_kind(n) {
            OpKind::Memory => match memory_bits(insn) {
                8 => Ok(self.load_for_store::<u8>(insn)?.into()),
                16 => Ok(self.load_for_store::<u16>(insn)?.into()),
                32 => Ok(self.load_for_store::<u32>(insn)?.into()),
                _ => self.load_for_store::<u64>(insn),
            },
            _ => self.operand(insn, n),
        }
    }

    /// Replaces the integer in memory by what `new` makes of it, as one access, and returns what was there: LOCK. `new` may
    /// be called several times, and only the last call counts.
    pub(super) fn update_operand(&mut self, insn: &Instruction, mut new: impl FnMut(u64) -> u64) -> Result<u64, Stop> {
        let at = self.linear_address(insn, u64::from(memory_bits(insn) / 8), Access::Write)?;
        let old = match memory_bits(insn) {
            8 => self.update::<u8>(at, |old| new(old.into()) as u8).map(u64::from),
            16 => self.update::<u16>(at, |old| new(old.into()) as u16).map(u64::from),
            32 => self.update::<u32>(at, |old| new(old.into()) as u32).map(u64::from),
            _ => self.update::<u64>(at, new),
        };
        old.map_err(|stop| segment_fault(insn, stop))
    }

    /// Writes an integer operand's low bits.
    pub(super) fn set_operand(&mut self, insn: &Instruction, n: u32, value: u64) -> Result<(), Stop> {
        match insn.op_kind(n) {
            OpKind::Memory => match memory_bits(insn) {
                8 => self.store(insn, value as u8),
                16 => self.store(insn, value as u16),
                32 => self.store(insn, value as u32),
                _ => self.store(insn, value),
            },
            _ => {
                self.set_register(insn.op_register(n), value);
                Ok(())
            }
        }
    }

    /// The target of a near branch.
    #[inline]
    pub(super) fn branch_target(&self, insn: &Instruction) -> u64 {
        insn.near_branch_target().wrapping_add(self.regs[slot::PAGE])
    }
}

/// The size in bits of operand `n`: its register's, its memory's.
pub(super) fn operand_bits(insn: &Instruction, n: u32) -> u32 {
    match insn.op_kind(n) {
        OpKind::Memory => memory_bits(insn),
        _ => insn.op_register(n).size() as u32 * 8,
    }
}

fn memory_bits(insn: &Instruction) -> u32 {
    insn.memory_size().size() as u32 * 8
}

fn is_high_byte(register: Register) -> bool {
    matches!(register, Register::AH | Register::CH | Register::DH | Register::BH)
}

/// The bits of an effective address that count: as many as its registers have, or its displacement.
#[inline]
pub(super) fn address_mask(insn: &Instruction) -> u64 {
    let bytes = match (insn.memory_base(), insn.memory_index()) {
        (Register::None, Register::None) => insn.memory_displ_size() as usize,
        (Register::None, index) => index.size(),
        (base, _) => base.size(),
    };
    match bytes {
        2 => 0xffff,
        4 => 0xffff_ffff,
        _ => u64::MAX,
    }
}

/// The number of a segment register, DS for none.
pub(super) fn segment_number(register: Register) -> usize {
    match register {
        Register::ES => seg::ES,
        Register::CS => seg::CS,
        Register::SS => seg::SS,
        Register::FS => seg::FS,
        Register::GS => seg::GS,
        _ => seg::DS,
    }
}

/// Non-canonical addresses fault with #SS through the stack segment, with #GP through the others.
pub(super) fn segment_fault(insn: &Instruction, stop: Stop) -> Stop {
    if insn.memory_segment() == Register::SS { stack_fault(stop) } else { stop }
}
