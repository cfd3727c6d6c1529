//! RDMSR and WRMSR. What is not here raises #GP(0), which is how a kernel finds out.

use iced_x86::Instruction;

use crate::hv::soft::cpu::{Cpu, cr0, efer, is_canonical, slot};
use crate::hv::soft::fault::{Exception, Flow, Stop};
use crate::hv::state::check::is_valid_pat;
use crate::units::GuestAddr;

use super::mask;

const IA32_TSC: u32 = 0x10;
const IA32_PLATFORM_ID: u32 = 0x17;
const IA32_APIC_BASE: u32 = 0x1b;
const IA32_BIOS_SIGN_ID: u32 = 0x8b;
const IA32_SYSENTER_CS: u32 = 0x174;
const IA32_SYSENTER_ESP: u32 = 0x175;
const IA32_SYSENTER_EIP: u32 = 0x176;
const IA32_MISC_ENABLE: u32 = 0x1a0;
const IA32_PAT: u32 = 0x277;
const IA32_TSC_DEADLINE: u32 = 0x6e0;
const X2APIC_FIRST: u32 = 0x800;
const X2APIC_LAST: u32 = 0x83f;
const IA32_EFER: u32 = 0xc000_0080;
const IA32_STAR: u32 = 0xc000_0081;
const IA32_LSTAR: u32 = 0xc000_0082;
const IA32_CSTAR: u32 = 0xc000_0083;
const IA32_FMASK: u32 = 0xc000_0084;
const IA32_FS_BASE: u32 = 0xc000_0100;
const IA32_GS_BASE: u32 = 0xc000_0101;
const IA32_KERNEL_GS_BASE: u32 = 0xc000_0102;
const IA32_TSC_AUX: u32 = 0xc000_0103;
const MSR_KVM_WALL_CLOCK_NEW: u32 = 0x4b56_4d00;
const MSR_KVM_SYSTEM_TIME_NEW: u32 = 0x4b56_4d01;

const EFER_WRITABLE: u64 = efer::SCE | efer::LME | efer::NXE;
/// Fast strings, and branch trace storage and precise event sampling unavailable.
const MISC_ENABLE: u64 = 1 << 0 | 1 << 11 | 1 << 12;

pub(super) fn rdmsr(cpu: &mut Cpu, _: &Instruction) -> Result<Flow, Stop> {
    cpu.require_cpl0()?;
    let number = cpu.regs[slot::RCX] as u32;
    let value = cpu.read_msr(number).ok_or_else(|| refused(number, None))?;
    cpu.regs[slot::RAX] = value & mask(32);
    cpu.regs[slot::RDX] = value >> 32;
    Ok(Flow::Next)
}

pub(super) fn wrmsr(cpu: &mut Cpu, _: &Instruction) -> Result<Flow, Stop> {
    cpu.require_cpl0()?;
    let number = cpu.regs[slot::RCX] as u32;
    let value = cpu.regs[slot::RAX] & mask(32) | cpu.regs[slot::RDX] << 32;
    cpu.write_msr(number, value).ok_or_else(|| refused(number, Some(value)))?;
    Ok(Flow::Sync)
}

fn refused(number: u32, written: Option<u64>) -> Exception {
    tracing::debug!(msr = format_args!("{number:#x}"), written = ?written, "guest touched an MSR that is not there");
    Exception::general_protection(0)
}

impl Cpu {
    /// The value of an MSR; `None` is #GP(0).
    fn read_msr(&mut self, number: u32) -> Option<u64> {
        let msrs = &self.msrs;
        Some(match number {
            IA32_TSC => self.clock.tsc(),
            IA32_APIC_BASE | IA32_TSC_DEADLINE | X2APIC_FIRST..=X2APIC_LAST => {
                return self.lapic.read_msr(number);
            }
            IA32_PLATFORM_ID | IA32_BIOS_SIGN_ID => 0,
            IA32_SYSENTER_CS => msrs.sysenter_cs,
            IA32_SYSENTER_ESP => msrs.sysenter_esp,
            IA32_SYSENTER_EIP => msrs.sysenter_eip,
            IA32_MISC_ENABLE => MISC_ENABLE,
            IA32_PAT => msrs.pat,
            IA32_EFER => self.control.efer,
            IA32_STAR => msrs.star,
            IA32_LSTAR => msrs.lstar,
            IA32_CSTAR => msrs.cstar,
            IA32_FMASK => msrs.sfmask,
            IA32_FS_BASE => self.regs[slot::FS_BASE],
            IA32_GS_BASE => self.regs[slot::GS_BASE],
            IA32_KERNEL_GS_BASE => msrs.kernel_gs_base,
            IA32_TSC_AUX => msrs.tsc_aux,
            MSR_KVM_SYSTEM_TIME_NEW => msrs.kvm_system_time,
            MSR_KVM_WALL_CLOCK_NEW => msrs.kvm_wall_clock,
            _ => return None,
        })
    }

    /// Writes an MSR; `None` is #GP(0).
    fn write_msr(&mut self, number: u32, value: u64) -> Option<()> {
        let canonical = || is_canonical(value).then_some(value);
        let narrow = || (value >> 32 == 0).then_some(value);
        match number {
            IA32_TSC => self.clock.set_tsc(value),
            IA32_APIC_BASE | IA32_TSC_DEADLINE | X2APIC_FIRST..=X2APIC_LAST => {
                return self.lapic.write_msr(number, value);
            }
            // A microcode revision query writes zero first; the enables are all fixed.
            IA32_BIOS_SIGN_ID | IA32_MISC_ENABLE => {}
            IA32_SYSENTER_CS => self.msrs.sysenter_cs = value & mask(32),
            IA32_SYSENTER_ESP => self.msrs.sysenter_esp = canonical()?,
            IA32_SYSENTER_EIP => self.msrs.sysenter_eip = canonical()?,
            IA32_PAT => self.msrs.pat = is_valid_pat(value).then_some(value)?,
            IA32_EFER => return self.write_efer(value),
            IA32_STAR => self.msrs.star = value,
            IA32_LSTAR => self.msrs.lstar = canonical()?,
            IA32_CSTAR => self.msrs.cstar = canonical()?,
            IA32_FMASK => self.msrs.sfmask = narrow()?,
            IA32_FS_BASE => self.regs[slot::FS_BASE] = canonical()?,
            IA32_GS_BASE => self.regs[slot::GS_BASE] = canonical()?,
            IA32_KERNEL_GS_BASE => self.msrs.kernel_gs_base = canonical()?,
            IA32_TSC_AUX => self.msrs.tsc_aux = narrow()?,
            MSR_KVM_SYSTEM_TIME_NEW => self.set_system_time(value),
            MSR_KVM_WALL_CLOCK_NEW => self.set_wall_clock(value),
            _ => return None,
        }
        Some(())
    }

    /// LMA follows LME and paging; with paging on LME cannot change.
    fn write_efer(&mut self, value: u64) -> Option<()> {
        let old = self.control.efer;
        let paging = self.control.cr0 & cr0::PG != 0;
        if value & !(EFER_WRITABLE | efer::LMA) != 0 || (paging && (value ^ old) & efer::LME != 0) {
            return None;
        }
        self.control.efer = value & EFER_WRITABLE | old & efer::LMA;
        if (self.control.efer ^ old) & efer::NXE != 0 {
            self.flush_tlb();
        }
        self.mode_changed();
        Some(())
    }

    /// Publishes the paravirtual clock where the guest asks for it. Its scale never changes, so once is enough.
    fn set_system_time(&mut self, value: u64) {
        self.msrs.kvm_system_time = value;
        if value & 1 != 0 {
            let page = self.clock.pvclock_page();
            self.write_guest(value & !1, &page);
        }
    }

    fn set_wall_clock(&mut self, value: u64) {
        self.msrs.kvm_wall_clock = value;
        let page = self.clock.wall_clock();
        self.write_guest(value, &page);
    }

    /// Writes 4-byte words at a guest-physical address; where there is no RAM, nothing happens.
    fn write_guest(&mut self, gpa: u64, bytes: &[u8]) {
        let (words, _) = bytes.as_chunks::<4>();
        for (at, word) in (gpa..).step_by(4).zip(words) {
            if let Some(offset) = self.ram.offset_of(GuestAddr(at)) {
                // The offset is RAM; a word across its end is the guest's own mistake.
                let _ = self.ram.store(offset, u32::from_le_bytes(*word));
                self.note_ram_write(offset, 4);
            }
        }
    }
}
