//! Control and debug registers, flags that are instructions of their own, and what else steers the processor.

use iced_x86::{Instruction, Register};

use crate::hv::profile::{self, Context, TSC_KHZ};
use crate::hv::soft::cpu::{Cpu, cr0, cr4, efer, is_canonical, seg, slot};
use crate::hv::soft::fault::{Exception, Flow, Stop};
use crate::hv::soft::flags;
use crate::hv::soft::operand::segment_number;
use crate::hv::state::check::is_valid_cr0;

use super::{Executor, mask};

const CR0_KNOWN: u64 =
    cr0::PE | cr0::MP | cr0::EM | cr0::TS | cr0::ET | cr0::NE | cr0::WP | cr0::AM | cr0::NW | cr0::CD | cr0::PG;

const CR4_KNOWN: u64 =
    cr4::TSD | cr4::DE | cr4::PSE | cr4::PAE | cr4::MCE | cr4::PGE | cr4::PCE | cr4::OSFXSR | cr4::OSXMMEXCPT;

/// CS.L in a segment's attributes.
const LONG_CODE: u16 = 1 << 13;

/// Physical addresses have 40 bits.
const CR3_RESERVED: u64 = !mask(40);

fn gp0() -> Stop {
    Exception::general_protection(0).into()
}

pub(super) fn is_valid_cr3(value: u64) -> bool {
    value & CR3_RESERVED == 0
}

pub(super) fn is_valid_cr4(value: u64) -> bool {
    value & !CR4_KNOWN == 0
}

impl Cpu {
    fn set_cr0(&mut self, value: u64) -> Result<Flow, Stop> {
        if !is_valid_cr0(value) {
            return Err(gp0());
        }
        let value = value & CR0_KNOWN | cr0::ET;
        let changed = value ^ self.control.cr0;
        if changed & cr0::PG != 0 {
            self.control.efer = self.efer_with_paging(value & cr0::PG != 0)?;
        }
        self.control.cr0 = value;
        if changed & (cr0::PG | cr0::WP) != 0 {
            self.flush_tlb();
        }
        self.mode_changed();
        Ok(Flow::Sync)
    }

    /// What EFER becomes as paging goes on or off: long mode is entered and left so (SDM 11.8.5).
    fn efer_with_paging(&self, on: bool) -> Result<u64, Stop> {
        let (efer, long_code) = (self.control.efer, self.segments[seg::CS].attributes & LONG_CODE != 0);
        if !on {
            // Not from 64-bit code, which would not go on.
            return if self.is_64bit() { Err(gp0()) } else { Ok(efer & !efer::LMA) };
        }
        if efer & efer::LME == 0 {
            return Ok(efer);
        }
        if long_code || self.control.cr4 & cr4::PAE == 0 {
            return Err(gp0());
        }
        Ok(efer | efer::LMA)
    }

    fn set_cr3(&mut self, value: u64) -> Result<Flow, Stop> {
        if !is_valid_cr3(value) {
            return Err(gp0());
        }
        self.control.cr3 = value;
        self.flush_tlb_local();
        Ok(Flow::Sync)
    }

    fn set_cr4(&mut self, value: u64) -> Result<Flow, Stop> {
        if !is_valid_cr4(value) || (self.is_long_mode() && value & cr4::PAE == 0) {
            return Err(gp0());
        }
        let changed = value ^ self.control.cr4;
        self.control.cr4 = value;
        if changed & (cr4::PGE | cr4::PSE | cr4::PAE) != 0 {
            self.flush_tlb();
        }
        self.mode_changed();
        Ok(Flow::Sync)
    }

    fn set_cr8(&mut self, value: u64) -> Result<Flow, Stop> {
        if value > 15 {
            return Err(gp0());
        }
        self.lapic.set_tpr(value);
        Ok(Flow::Sync)
    }
}

/// MOV to and from a control register, of which there are five.
pub(super) fn control_register(insn: &Instruction) -> Option<Executor> {
    let (executor, register): (Executor, Register) =
        if insn.op0_register().is_cr() { (mov_to, insn.op0_register()) } else { (mov_from, insn.op1_register()) };
    let known = matches!(register, Register::CR0 | Register::CR2 | Register::CR3 | Register::CR4 | Register::CR8);
    // A LOCK prefix names CR8 on some processors, which CPUID would say.
    (known && !insn.has_lock_prefix()).then_some(executor)
}

fn mov_to(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    cpu.require_cpl0()?;
    let value = cpu.register(insn.op1_register());
    match insn.op0_register() {
        Register::CR0 => cpu.set_cr0(value),
        Register::CR2 => {
            cpu.control.cr2 = value;
            Ok(Flow::Sync)
        }
        Register::CR3 => cpu.set_cr3(value),
        Register::CR4 => cpu.set_cr4(value),
        _ => cpu.set_cr8(value),
    }
}

fn mov_from(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    cpu.require_cpl0()?;
    let value = match insn.op1_register() {
        Register::CR0 => cpu.control.cr0,
        Register::CR2 => cpu.control.cr2,
        Register::CR3 => cpu.control.cr3,
        Register::CR4 => cpu.control.cr4,
        _ => cpu.lapic.tpr(),
    };
    cpu.set_register(insn.op0_register(), value);
    Ok(Flow::Next)
}

const DR6: usize = 4;
const DR7: usize = 5;
const DR6_ONES: u64 = 0xffff_0ff0;
const DR6_DETECTED: u64 = 1 << 13;
const DR7_DETECT: u64 = 1 << 13;

/// MOV to and from a debug register. Breakpoints can be set and read back but never match.
pub(super) fn mov_dr(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    let to = insn.op0_register().is_dr();
    let register = if to { insn.op0_register() } else { insn.op1_register() };
    let index = match register.number() {
        n @ 0..=3 => n,
        4 | 5 if cpu.control.cr4 & cr4::DE != 0 => return Err(Exception::INVALID_OPCODE.into()),
        4 | 6 => DR6,
        5 | 7 => DR7,
        _ => return Err(Exception::INVALID_OPCODE.into()),
    };
    cpu.require_cpl0()?;
    if cpu.dr[DR7] & DR7_DETECT != 0 {
        cpu.dr[DR6] |= DR6_DETECTED;
        return Err(Exception::DEBUG.into());
    }
    if !to {
        cpu.set_register(insn.op0_register(), cpu.dr[index]);
        return Ok(Flow::Next);
    }
    let value = cpu.register(insn.op1_register());
    if index >= DR6 && value >> 32 != 0 {
        return Err(gp0());
    }
    cpu.dr[index] = match index {
        DR6 => value & 0xe00f | DR6_ONES,
        DR7 => value & 0xffff_2bff | 0x400,
        _ => value,
    };
    Ok(Flow::Sync)
}

pub(super) fn lmsw(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    cpu.require_cpl0()?;
    let value = cpu.operand(insn, 0)?;
    // It can set PE but not clear it.
    let kept = cpu.control.cr0 & !(cr0::MP | cr0::EM | cr0::TS);
    cpu.set_cr0(kept | value & (cr0::PE | cr0::MP | cr0::EM | cr0::TS))
}

pub(super) fn smsw(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    let value = cpu.control.cr0;
    cpu.set_operand(insn, 0, value)?;
    Ok(Flow::Next)
}

pub(super) fn clts(cpu: &mut Cpu, _: &Instruction) -> Result<Flow, Stop> {
    cpu.require_cpl0()?;
    cpu.control.cr0 &= !cr0::TS;
    Ok(Flow::Sync)
}

pub(super) fn swapgs(cpu: &mut Cpu, _: &Instruction) -> Result<Flow, Stop> {
    cpu.require_cpl0()?;
    std::mem::swap(&mut cpu.regs[slot::GS_BASE], &mut cpu.msrs.kernel_gs_base);
    Ok(Flow::Next)
}

impl Cpu {
    /// The linear address that INVLPG names, whatever its segment allows.
    fn invalidated_address(&self, insn: &Instruction) -> u64 {
        let offset = self.effective_address(insn);
        if self.is_64bit() {
            offset.wrapping_add(self.segment_base(insn.memory_segment()))
        } else {
            self.base(segment_number(insn.memory_segment())).wrapping_add(offset) & mask(32)
        }
    }
}

pub(super) fn invlpg(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    cpu.require_cpl0()?;
    let address = cpu.invalidated_address(insn);
    // Not an access: what cannot be translated is not cached either.
    if is_canonical(address) {
        cpu.flush_tlb_page(address);
    }
    Ok(Flow::Sync)
}

/// WBINVD and INVD: there is no cache to write back.
pub(super) fn wbinvd(cpu: &mut Cpu, _: &Instruction) -> Result<Flow, Stop> {
    cpu.require_cpl0()?;
    Ok(Flow::Sync)
}

/// No cache, but the access rights of a read.
pub(super) fn clflush(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    cpu.load::<u8>(insn)?;
    Ok(Flow::Next)
}

pub(super) fn rdtsc(cpu: &mut Cpu, _: &Instruction) -> Result<Flow, Stop> {
    if cpu.control.cr4 & cr4::TSD != 0 && cpu.cpl() != 0 {
        return Err(gp0());
    }
    let tsc = cpu.clock.tsc();
    cpu.regs[slot::RAX] = tsc & mask(32);
    cpu.regs[slot::RDX] = tsc >> 32;
    Ok(Flow::Next)
}

pub(super) fn rdtscp(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    let flow = rdtsc(cpu, insn)?;
    cpu.regs[slot::RCX] = cpu.msrs.tsc_aux & mask(32);
    Ok(flow)
}

/// There is no performance counter.
pub(super) fn rdpmc(_: &mut Cpu, _: &Instruction) -> Result<Flow, Stop> {
    Err(gp0())
}

pub(super) fn hlt(cpu: &mut Cpu, _: &Instruction) -> Result<Flow, Stop> {
    cpu.require_cpl0()?;
    Ok(Flow::Halt)
}

fn require_iopl(cpu: &Cpu) -> Result<(), Stop> {
    if cpu.cpl() <= cpu.iopl() { Ok(()) } else { Err(gp0()) }
}

pub(super) fn cli(cpu: &mut Cpu, _: &Instruction) -> Result<Flow, Stop> {
    require_iopl(cpu)?;
    cpu.system_flags &= !flags::IF;
    Ok(Flow::Next)
}

pub(super) fn sti(cpu: &mut Cpu, _: &Instruction) -> Result<Flow, Stop> {
    require_iopl(cpu)?;
    if cpu.system_flags & flags::IF == 0 {
        cpu.system_flags |= flags::IF;
        cpu.interrupt_shadow = true;
    }
    Ok(Flow::Sync)
}

pub(super) fn cld(cpu: &mut Cpu, _: &Instruction) -> Result<Flow, Stop> {
    cpu.system_flags &= !flags::DF;
    Ok(Flow::Next)
}

pub(super) fn std(cpu: &mut Cpu, _: &Instruction) -> Result<Flow, Stop> {
    cpu.system_flags |= flags::DF;
    Ok(Flow::Next)
}

pub(super) fn clc(cpu: &mut Cpu, _: &Instruction) -> Result<Flow, Stop> {
    cpu.flags.set_cf(false);
    Ok(Flow::Next)
}

pub(super) fn stc(cpu: &mut Cpu, _: &Instruction) -> Result<Flow, Stop> {
    cpu.flags.set_cf(true);
    Ok(Flow::Next)
}

pub(super) fn cmc(cpu: &mut Cpu, _: &Instruction) -> Result<Flow, Stop> {
    cpu.flags.set_cf(!cpu.flags.cf());
    Ok(Flow::Next)
}

pub(super) fn cpuid(cpu: &mut Cpu, _: &Instruction) -> Result<Flow, Stop> {
    const APIC_BASE: u32 = 0x1b;
    const APIC_ENABLED: u64 = 1 << 11;
    let context = Context {
        apic_id: cpu.lapic.id(),
        vcpus: cpu.sharing.vcpus() as u32,
        apic_enabled: cpu.lapic.read_msr(APIC_BASE).is_some_and(|base| base & APIC_ENABLED != 0),
        cr4: cpu.control.cr4,
        tsc_khz: TSC_KHZ,
    };
    let (leaf, subleaf) = (cpu.regs[slot::RAX] as u32, cpu.regs[slot::RCX] as u32);
    let [eax, ebx, ecx, edx] = profile::cpuid(leaf, subleaf, context);
    cpu.regs[slot::RAX] = eax.into();
    cpu.regs[slot::RBX] = ebx.into();
    cpu.regs[slot::RCX] = ecx.into();
    cpu.regs[slot::RDX] = edx.into();
    // Serialising: what another vCPU has written over the instructions that follow is seen.
    Ok(Flow::Sync)
}
