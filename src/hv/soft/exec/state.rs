//! The processor as plain data: reset, saving and restoring.

use std::sync::Arc;

use crate::hv::soft::apic::{IoApic, Lapic};
use crate::hv::soft::clock::Clock;
use crate::hv::soft::code_image::GeneralCode;
use crate::hv::soft::code_map::CodeMap;
use crate::hv::soft::cpu::{Control, Cpu, SystemMsrs, cr0, efer, is_canonical, seg, slot};
use crate::hv::soft::fast::Miss;
use crate::hv::soft::fast::branch::JumpCache;
use crate::hv::soft::fault::Stop;
use crate::hv::soft::fetches::Fetches;
use crate::hv::soft::flags::Flags;
use crate::hv::soft::fpu::FpuState;
use crate::hv::soft::peers::Sharing;
use crate::hv::soft::step::CrossingCache;
use crate::hv::soft::tlb::Tlb;
use crate::hv::state::VcpuState;
use crate::hv::state::x86_64::{Activity, Events, Msrs, Segment, Table};
use crate::hv::{HvError, IoHandler};
use crate::mem::GuestRam;

use super::control::{is_valid_cr0, is_valid_cr3, is_valid_cr4};
use super::msr::is_valid_pat;

/// PAT, DR6 and DR7 after reset.
const PAT_RESET: u64 = 0x0007_0406_0007_0406;
const DR_RESET: [u64; 6] = [0, 0, 0, 0, 0xffff_0ff0, 0x400];

const EFER_KNOWN: u64 = efer::SCE | efer::LME | efer::LMA | efer::NXE;

impl Cpu {
    /// A processor after reset. It cannot run before [`restore`](Self::restore) gives it a 64-bit state.
    pub(in crate::hv::soft) fn new(
        ram: Arc<GuestRam>,
        io: Box<dyn IoHandler>,
        lapic: Lapic,
        ioapic: Arc<IoApic>,
        clock: Clock,
        sharing: Sharing,
    ) -> Self {
        let data = Segment { limit: 0xffff, attributes: 0x93, ..Segment::default() };
        let mut segments = [data; 6];
        segments[seg::CS] = Segment { selector: 0xf000, base: 0xffff_0000, attributes: 0x9b, ..data };
        let table = Table { base: 0, limit: 0xffff };
        Self {
            regs: [0; 256],
            flags: Flags::new(),
            system_flags: 0,
            rip: 0xfff0,
            interrupt_shadow: false,
            control: Control { cr0: cr0::CD | cr0::NW | cr0::ET, ..Control::default() },
            msrs: SystemMsrs { pat: PAT_RESET, ..SystemMsrs::default() },
            segments,
            ldtr: Segment { attributes: 0x82, ..data },
            tr: Segment { attributes: 0x8b, ..data },
            gdtr: table,
            idtr: table,
            dr: DR_RESET,
            fpu: FpuState::new(),
            tlb: Tlb::new(),
            lapic,
            clock,
            sharing,
            ioapic,
            code_map: CodeMap::new(ram.size().0),
            ram,
            io,
            code_writes: Vec::new(),
            fetches: Fetches::new(),
            sse_ready: false,
            jumps: JumpCache::new(),
            general: GeneralCode::default(),
            budget: 0,
            patch: None,
            miss: Miss { va: 0, size: 0 },
            stop: Stop::Unimplemented("nothing stopped"),
            crossings: CrossingCache::new(),
        }
    }

    /// The architectural state; whether it is halted is the run loop's to add.
    pub(in crate::hv::soft) fn save(&mut self) -> VcpuState {
        let mut gpr = [0; 16];
        gpr.copy_from_slice(&self.regs[..16]);
        let mut segments = self.segments;
        segments[seg::FS].base = self.regs[slot::FS_BASE];
        segments[seg::GS].base = self.regs[slot::GS_BASE];
        VcpuState {
            gpr,
            rip: self.rip,
            rflags: self.rflags(),
            cr0: self.control.cr0,
            cr2: self.control.cr2,
            cr3: self.control.cr3,
            cr4: self.control.cr4,
            cr8: self.lapic.tpr(),
            dr: self.dr,
            segments,
            ldtr: self.ldtr,
            tr: self.tr,
            gdtr: self.gdtr,
            idtr: self.idtr,
            msrs: self.save_msrs(),
            fpu: self.fpu.save(),
            lapic: self.lapic.save(),
            interrupt_shadow: self.interrupt_shadow,
            activity: Activity::Running,
            events: Events::default(),
        }
    }

    fn save_msrs(&self) -> Msrs {
        let msrs = &self.msrs;
        Msrs {
            efer: self.control.efer,
            star: msrs.star,
            lstar: msrs.lstar,
            cstar: msrs.cstar,
            sfmask: msrs.sfmask,
            kernel_gs_base: msrs.kernel_gs_base,
            sysenter_cs: msrs.sysenter_cs,
            sysenter_esp: msrs.sysenter_esp,
            sysenter_eip: msrs.sysenter_eip,
            pat: msrs.pat,
            tsc_aux: msrs.tsc_aux,
            tsc: self.clock.tsc(),
            kvm_system_time: msrs.kvm_system_time,
            kvm_wall_clock: msrs.kvm_wall_clock,
        }
    }

    /// Replaces the architectural state, and forgets all translations. Halting is the run loop's.
    ///
    /// # Errors
    /// [`HvError::State`] when no processor can be in it or this one does not run it; nothing has changed then.
    pub(in crate::hv::soft) fn restore(&mut self, state: &VcpuState) -> Result<(), HvError> {
        validate(state).map_err(HvError::State)?;
        self.lapic.restore(&state.lapic)?;
        self.regs[..16].copy_from_slice(&state.gpr);
        self.regs[slot::FS_BASE] = state.segments[seg::FS].base;
        self.regs[slot::GS_BASE] = state.segments[seg::GS].base;
        self.rip = state.rip;
        self.set_rflags(state.rflags);
        self.control =
            Control { cr0: state.cr0, cr2: state.cr2, cr3: state.cr3, cr4: state.cr4, efer: state.msrs.efer };
        self.lapic.set_tpr(state.cr8);
        self.dr = state.dr;
        self.segments = state.segments;
        self.ldtr = state.ldtr;
        self.tr = state.tr;
        self.gdtr = state.gdtr;
        self.idtr = state.idtr;
        self.restore_msrs(&state.msrs);
        self.fpu = FpuState::restore(&state.fpu);
        self.interrupt_shadow = state.interrupt_shadow;
        self.flush_tlb();
        self.mode_changed();
        Ok(())
    }

    fn restore_msrs(&mut self, msrs: &Msrs) {
        // One clock for all: the boot processor's state says what it shows, in whatever order they are restored.
        if self.lapic.id() == 0 {
            self.clock.set_tsc(msrs.tsc);
        }
        self.msrs = SystemMsrs {
            star: msrs.star,
            lstar: msrs.lstar,
            cstar: msrs.cstar,
            sfmask: msrs.sfmask,
            kernel_gs_base: msrs.kernel_gs_base,
            sysenter_cs: msrs.sysenter_cs,
            sysenter_esp: msrs.sysenter_esp,
            sysenter_eip: msrs.sysenter_eip,
            pat: msrs.pat,
            tsc_aux: msrs.tsc_aux,
            kvm_system_time: msrs.kvm_system_time,
            kvm_wall_clock: msrs.kvm_wall_clock,
        };
    }
}

fn validate(state: &VcpuState) -> Result<(), &'static str> {
    let require = |holds: bool, what| if holds { Ok(()) } else { Err(what) };
    let msrs = &state.msrs;
    require(is_valid_cr0(state.cr0), "CR0 without paging, or contradicting itself")?;
    require(is_valid_cr3(state.cr3), "CR3 past the physical address width")?;
    require(is_valid_cr4(state.cr4), "CR4 with bits this processor does not have, or without PAE")?;
    require(state.cr8 <= 15, "CR8 above 15")?;
    require(msrs.efer & !EFER_KNOWN == 0, "EFER with bits this processor does not have")?;
    require(msrs.efer & (efer::LME | efer::LMA) == efer::LME | efer::LMA, "EFER outside long mode")?;
    let code = &state.segments[seg::CS];
    require(code.attributes & 0x6098 == 0x2098, "CS is not a present 64-bit code segment")?;
    let addresses = [
        state.rip,
        state.gdtr.base,
        state.idtr.base,
        state.ldtr.base,
        state.tr.base,
        state.segments[seg::FS].base,
        state.segments[seg::GS].base,
        msrs.lstar,
        msrs.cstar,
        msrs.kernel_gs_base,
        msrs.sysenter_esp,
        msrs.sysenter_eip,
    ];
    require(addresses.into_iter().all(is_canonical), "an address is not canonical")?;
    let segments = state.segments.iter().chain([&state.ldtr, &state.tr]);
    require(segments.into_iter().all(|s| s.attributes & 0x0f00 == 0), "segment attributes with limit bits")?;
    require(is_valid_pat(msrs.pat), "PAT names no memory type")?;
    require(state.rflags & 2 != 0 && state.rflags >> 22 == 0, "RFLAGS with reserved bits")?;
    require(matches!(state.activity, Activity::Running | Activity::Halted), "a processor that nobody has started")?;
    require(state.events == Events::default(), "an event under way that this processor does not know")?;
    require(state.dr[4] >> 32 == 0 && state.dr[5] >> 32 == 0, "DR6 or DR7 wider than 32 bits")?;
    require(msrs.sfmask >> 32 == 0 && msrs.tsc_aux >> 32 == 0, "an MSR wider than 32 bits")
}
