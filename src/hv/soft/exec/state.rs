//! The processor as plain data: reset, saving and restoring.

use std::sync::Arc;

use crate::hv::profile::SIGNATURE;
use crate::hv::soft::apic::{IoApic, Lapic};
use crate::hv::soft::clock::Clock;
use crate::hv::soft::code_image::GeneralCode;
use crate::hv::soft::code_map::CodeMap;
use crate::hv::soft::cpu::{Control, Cpu, SystemMsrs, cr0, seg, slot};
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

use super::validate::validate;

/// PAT, DR6 and DR7 after reset.
const PAT_RESET: u64 = 0x0007_0406_0007_0406;
const DR_RESET: [u64; 6] = [0, 0, 0, 0, 0xffff_0ff0, 0x400];

impl Cpu {
    /// A processor after reset.
    pub(in crate::hv::soft) fn new(
        ram: Arc<GuestRam>,
        io: Box<dyn IoHandler>,
        lapic: Lapic,
        ioapic: Arc<IoApic>,
        clock: Clock,
        sharing: Sharing,
    ) -> Self {
        let mut cpu = Self {
            regs: [0; 256],
            flags: Flags::new(),
            system_flags: 0,
            rip: 0,
            interrupt_shadow: false,
            nmi_masked: false,
            control: Control { cr0: cr0::CD | cr0::NW, ..Control::default() },
            msrs: SystemMsrs { pat: PAT_RESET, ..SystemMsrs::default() },
            segments: [Segment::default(); 6],
            ldtr: Segment::default(),
            tr: Segment::default(),
            gdtr: Table::default(),
            idtr: Table::default(),
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
            single_step: false,
            budget: 0,
            patch: None,
            miss: Miss { va: 0, size: 0 },
            stop: Stop::Unimplemented("nothing stopped"),
            crossings: CrossingCache::new(),
        };
        cpu.init();
        cpu
    }

    /// INIT (Intel SDM volume 3A, table 10-1 and 11.4.7.3): as after reset, but caches, x87, SSE, most MSRs and the time stamp counter
    /// stay as they were.
    pub(in crate::hv::soft) fn init(&mut self) {
        let data = Segment { limit: 0xffff, attributes: 0x93, ..Segment::default() };
        let table = Table { base: 0, limit: 0xffff };
        self.regs[..16].fill(0);
        self.regs[slot::RDX] = SIGNATURE.into();
        (self.regs[slot::FS_BASE], self.regs[slot::GS_BASE]) = (0, 0);
        self.segments = [data; 6];
        self.segments[seg::CS] = Segment { selector: 0xf000, base: 0xffff_0000, attributes: 0x9b, ..data };
        self.rip = 0xfff0;
        self.set_rflags(0);
        let caches = self.control.cr0 & (cr0::CD | cr0::NW);
        self.control = Control { cr0: caches | cr0::ET, ..Control::default() };
        self.ldtr = Segment { attributes: 0x82, ..data };
        self.tr = Segment { attributes: 0x8b, ..data };
        (self.gdtr, self.idtr) = (table, table);
        self.dr = DR_RESET;
        (self.interrupt_shadow, self.nmi_masked) = (false, false);
        self.lapic.reset();
        self.flush_tlb();
        self.mode_changed();
    }

    /// Starts where a start-up message says: in real mode, at the begin of a page of the first megabyte (SDM 9.4.4).
    pub(in crate::hv::soft) fn start_up(&mut self, vector: u8) {
        self.segments[seg::CS] = self.real_segment(seg::CS, u16::from(vector) << 8);
        self.rip = 0;
    }

    /// The architectural state; what it does and was told is the run loop's to add.
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
            events: Events { nmi_masked: self.nmi_masked, ..Events::default() },
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

    /// Replaces the architectural state, and forgets all translations. What it does and was told is the run loop's.
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
        self.nmi_masked = state.events.nmi_masked;
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
