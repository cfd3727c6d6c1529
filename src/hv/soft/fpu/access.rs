//! What every SSE and MMX instruction starts with: whether it may run at all, and its operands.

use iced_x86::Instruction;
use iced_x86::OpKind;
use iced_x86::Register;

use crate::hv::soft::cpu::Cpu;
use crate::hv::soft::cpu::cr0;
use crate::hv::soft::cpu::cr4;
use crate::hv::soft::fault::Exception;
use crate::hv::soft::fault::Stop;
use crate::hv::soft::mmu::Access;
use crate::hv::soft::operand::segment_fault;

use super::lane::Lane;

#[inline(always)]
pub(super) fn xmm_index(register: Register) -> usize {
    (register as usize).wrapping_sub(Register::XMM0 as usize) & 15
}

#[inline(always)]
pub(super) fn mm_index(register: Register) -> usize {
    (register as usize).wrapping_sub(Register::MM0 as usize) & 7
}

impl Cpu {
    /// #UD or #NM unless SSE instructions are enabled (Intel SDM volume 3A, table 14-1).
    #[inline(always)]
    pub(super) fn require_sse(&self) -> Result<(), Stop> {
        if self.control.cr0 & (cr0::EM | cr0::TS) == 0 && self.control.cr4 & cr4::OSFXSR != 0 {
            return Ok(());
        }
        self.refuse_sse()
    }

    #[cold]
    fn refuse_sse(&self) -> Result<(), Stop> {
        if self.control.cr0 & cr0::EM != 0 || self.control.cr4 & cr4::OSFXSR == 0 {
            Err(Exception::INVALID_OPCODE.into())
        } else {
            Err(Exception::NO_FPU.into())
        }
    }

    /// #UD, #NM or a pending #MF unless MMX instructions may run (Intel SDM volume 3A, table 13-1).
    #[inline(always)]
    pub(super) fn require_mmx(&self) -> Result<(), Stop> {
        if self.control.cr0 & cr0::EM != 0 {
            return Err(Exception::INVALID_OPCODE.into());
        }
        if self.control.cr0 & cr0::TS != 0 {
            return Err(Exception::NO_FPU.into());
        }
        self.deliver_pending_x87()
    }

    /// The low 64 bits of a register operand, or the `BITS` bits of a memory operand.
    #[inline(always)]
    pub(super) fn low_source<const BITS: u32>(&mut self, insn: &Instruction, n: u32) -> Result<u64, Stop> {
        if insn.op_kind(n) != OpKind::Memory {
            let low = self.fpu.xmm[xmm_index(insn.op_register(n))] as u64;
            return Ok(if BITS == 32 { u64::from(low as u32) } else { low });
        }
        if BITS == 32 { self.load::<u32>(insn).map(u64::from) } else { self.load::<u64>(insn) }
    }

    /// A scalar operand of a floating-point instruction.
    #[inline(always)]
    pub(super) fn scalar_source<L: Lane>(&mut self, insn: &Instruction, n: u32) -> Result<u64, Stop> {
        if L::BITS == 32 { self.low_source::<32>(insn, n) } else { self.low_source::<64>(insn, n) }
    }

    /// An XMM register, or 128 bits of memory that must be aligned.
    #[inline(always)]
    pub(super) fn xmm_source(&mut self, insn: &Instruction, n: u32) -> Result<u128, Stop> {
        if insn.op_kind(n) != OpKind::Memory {
            return Ok(self.fpu.xmm[xmm_index(insn.op_register(n))]);
        }
        self.load_aligned(insn)
    }

    #[inline(always)]
    pub(super) fn load_aligned(&mut self, insn: &Instruction) -> Result<u128, Stop> {
        let address = self.aligned_address(insn, 16, Access::Read)?;
        self.read(address).map_err(|stop| segment_fault(insn, stop))
    }

    #[inline(always)]
    pub(super) fn store_aligned(&mut self, insn: &Instruction, value: u128) -> Result<(), Stop> {
        let address = self.aligned_address(insn, 16, Access::Write)?;
        self.write(address, value).map_err(|stop| segment_fault(insn, stop))
    }

    /// The memory operand's linear address; #GP(0) when it is not a multiple of 16.
    #[inline(always)]
    pub(super) fn aligned_address(&self, insn: &Instruction, len: u64, access: Access) -> Result<u64, Stop> {
        let address = self.linear_address(insn, len, access)?;
        if address & 15 == 0 { Ok(address) } else { Err(Exception::general_protection(0).into()) }
    }

    /// An MMX register, or 64 bits of memory.
    #[inline(always)]
    pub(super) fn mm_source(&mut self, insn: &Instruction, n: u32) -> Result<u64, Stop> {
        if insn.op_kind(n) != OpKind::Memory {
            return Ok(self.fpu.x87.mm(mm_index(insn.op_register(n))));
        }
        self.load(insn)
    }
}
