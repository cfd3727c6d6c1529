//! The processor's architectural state, and the small vocabulary that instructions are written in.

use std::sync::Arc;

use crate::hv::IoHandler;
use crate::hv::ioapic;
pub(super) use crate::hv::state::check::is_canonical;
use crate::hv::state::x86_64::{Segment, Table};
use crate::mem::GuestRam;

use super::apic::{IoApic, Lapic};
use super::clock::Clock;
use super::code_image::GeneralCode;
use super::code_map::CodeMap;
use super::fast::branch::JumpCache;
use super::fast::{Miss, Patch};
use super::fault::{Exception, Stop};
use super::fetches::Fetches;
use super::flags::{self, Flags};
use super::fpu::FpuState;
use super::peers::Sharing;
use super::step::CrossingCache;
use super::tlb::Tlb;

/// Register slots of [`Cpu::regs`], which is as long as an index byte reaches so that no access needs a check.
pub(super) mod slot {
    pub(in super::super) const RAX: usize = 0;
    pub(in super::super) const RCX: usize = 1;
    pub(in super::super) const RDX: usize = 2;
    pub(in super::super) const RBX: usize = 3;
    pub(in super::super) const RSP: usize = 4;
    pub(in super::super) const RBP: usize = 5;
    pub(in super::super) const RSI: usize = 6;
    pub(in super::super) const RDI: usize = 7;
    pub(in super::super) const R11: usize = 11;
    /// Always zero: the base or index of an address that has none.
    pub(in super::super) const ZERO: usize = 16;
    /// Linear address of the page that holds the running instruction. Decoded code is position
    /// independent: RIP-relative addresses and branch targets count from here.
    pub(in super::super) const PAGE: usize = 17;
    /// Base of the FS segment, as an address component.
    pub(in super::super) const FS_BASE: usize = 18;
    /// Base of the GS segment.
    pub(in super::super) const GS_BASE: usize = 19;
}

/// Segment register numbers, in the order of instruction encoding.
pub(super) mod seg {
    pub(in super::super) const ES: usize = 0;
    pub(in super::super) const CS: usize = 1;
    pub(in super::super) const SS: usize = 2;
    pub(in super::super) const DS: usize = 3;
    pub(in super::super) const FS: usize = 4;
    pub(in super::super) const GS: usize = 5;
}

/// Control registers but CR8 (which is the LAPIC's task priority).
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Control {
    pub(super) cr0: u64,
    pub(super) cr2: u64,
    pub(super) cr3: u64,
    pub(super) cr4: u64,
    pub(super) efer: u64,
}

/// Model-specific registers with no other home.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct SystemMsrs {
    pub(super) star: u64,
    pub(super) lstar: u64,
    pub(super) cstar: u64,
    pub(super) sfmask: u64,
    pub(super) kernel_gs_base: u64,
    pub(super) sysenter_cs: u64,
    pub(super) sysenter_esp: u64,
    pub(super) sysenter_eip: u64,
    pub(super) pat: u64,
    pub(super) tsc_aux: u64,
    pub(super) kvm_system_time: u64,
    pub(super) kvm_wall_clock: u64,
}

pub(super) mod cr0 {
    pub(in super::super) const PE: u64 = 1 << 0;
    pub(in super::super) const MP: u64 = 1 << 1;
    pub(in super::super) const EM: u64 = 1 << 2;
    pub(in super::super) const TS: u64 = 1 << 3;
    pub(in super::super) const ET: u64 = 1 << 4;
    pub(in super::super) const NE: u64 = 1 << 5;
    pub(in super::super) const WP: u64 = 1 << 16;
    pub(in super::super) const AM: u64 = 1 << 18;
    pub(in super::super) const NW: u64 = 1 << 29;
    pub(in super::super) const CD: u64 = 1 << 30;
    pub(in super::super) const PG: u64 = 1 << 31;
}

pub(super) mod cr4 {
    pub(in super::super) const TSD: u64 = 1 << 2;
    pub(in super::super) const DE: u64 = 1 << 3;
    pub(in super::super) const PSE: u64 = 1 << 4;
    pub(in super::super) const PAE: u64 = 1 << 5;
    pub(in super::super) const MCE: u64 = 1 << 6;
    pub(in super::super) const PGE: u64 = 1 << 7;
    pub(in super::super) const PCE: u64 = 1 << 8;
    pub(in super::super) const OSFXSR: u64 = 1 << 9;
    pub(in super::super) const OSXMMEXCPT: u64 = 1 << 10;
}

pub(super) mod efer {
    pub(in super::super) const SCE: u64 = 1 << 0;
    pub(in super::super) const LME: u64 = 1 << 8;
    pub(in super::super) const LMA: u64 = 1 << 10;
    pub(in super::super) const NXE: u64 = 1 << 11;
}

/// One processor. Laid out as written: the registers come first, where the shortest instructions reach them.
#[derive(Debug)]
#[repr(C)]
pub(super) struct Cpu {
    /// General registers 0 to 15, then the other [`slot`]s.
    pub(super) regs: [u64; 256],
    pub(super) flags: Flags,
    /// RFLAGS but the six arithmetic flags and the fixed bit 1.
    pub(super) system_flags: u64,
    /// Address of the next instruction. Current only between instructions and inside the general
    /// executor; decoded code keeps it implicit (see [`slot::PAGE`]).
    pub(super) rip: u64,
    /// The last instruction was an STI or MOV SS: take no interrupt before the next one is done.
    pub(super) interrupt_shadow: bool,
    /// The running instruction ends in a single-step trap.
    pub(super) single_step: bool,
    /// A non-maskable interrupt is being handled: the next one waits for IRET.
    pub(super) nmi_masked: bool,
    pub(super) control: Control,
    pub(super) msrs: SystemMsrs,
    /// FS and GS bases live in [`slot`]s; `segments[FS].base` and `[GS].base` are not used.
    pub(super) segments: [Segment; 6],
    pub(super) ldtr: Segment,
    pub(super) tr: Segment,
    pub(super) gdtr: Table,
    pub(super) idtr: Table,
    pub(super) dr: [u64; 6],
    pub(super) fpu: FpuState,
    pub(super) tlb: Tlb,
    pub(super) lapic: Lapic,
    pub(super) clock: Clock,
    pub(super) ioapic: Arc<IoApic>,
    pub(super) ram: Arc<GuestRam>,
    pub(super) io: Box<dyn IoHandler>,
    /// RAM offsets and lengths that the guest wrote on pages that hold decoded instructions; the run
    /// loop drops what was decoded from them.
    pub(super) code_writes: Vec<(u64, u32)>,
    /// What it owes the other vCPUs.
    pub(super) sharing: Sharing,
    /// Which RAM the run loop has decoded.
    pub(super) code_map: CodeMap,
    /// For how long what is remembered by address of decoded code is good.
    pub(super) fetches: Fetches,
    /// Whether SSE instructions may execute: CR0.EM and TS clear, CR4.OSFXSR set.
    pub(super) sse_ready: bool,
    /// Blocks by linear address.
    pub(super) jumps: JumpCache,
    /// Instructions of decoded code that the general executor runs.
    pub(super) general: GeneralCode,
    /// Instructions left before the chain of operations returns to the run loop.
    pub(super) budget: i32,
    /// The branch that the next lookup is for.
    pub(super) patch: Option<Patch>,
    /// The access that sent a handler to the miss path.
    pub(super) miss: Miss,
    /// What ended the chain with [`Leave::Stopped`](super::fast::Leave::Stopped).
    pub(super) stop: Stop,
    /// The last page-crossing instruction decoded at each of a few addresses.
    pub(super) crossings: CrossingCache,
}

impl Cpu {
    /// Current privilege level.
    #[inline(always)]
    pub(super) fn cpl(&self) -> u8 {
        (self.segments[seg::SS].attributes >> 5 & 3) as u8
    }

    /// RFLAGS as PUSHF shows it.
    pub(super) fn rflags(&self) -> u64 {
        self.flags.rflags() | self.system_flags | 2
    }

    /// Replaces RFLAGS whole; callers mask what their instruction may change.
    pub(super) fn set_rflags(&mut self, rflags: u64) {
        self.flags.set_rflags(rflags);
        self.system_flags =
            rflags & (flags::TF | flags::IF | flags::DF | flags::IOPL | flags::NT | flags::RF | flags::AC | flags::ID);
    }

    pub(super) fn iopl(&self) -> u8 {
        (self.system_flags >> 12 & 3) as u8
    }

    /// Long mode with a 64-bit code segment: the only mode in which decoded code is used.
    pub(super) fn is_64bit(&self) -> bool {
        self.control.efer & efer::LMA != 0 && self.segments[seg::CS].attributes & (1 << 13) != 0
    }

    /// To be called after any change of CPL, CR0, CR4 or EFER: brings what is derived from them up to date.
    pub(super) fn mode_changed(&mut self) {
        self.sse_ready = self.control.cr0 & (cr0::EM | cr0::TS) == 0 && self.control.cr4 & cr4::OSFXSR != 0;
        self.tlb.mode = u64::from(self.cpl() == 3);
    }

    /// Forgets all translations (CR0, CR4 and EFER changes).
    pub(super) fn flush_tlb(&mut self) {
        self.tlb.flush_all();
        self.fetches.forget_all();
    }

    /// Forgets translations of pages that are not global (a CR3 write).
    pub(super) fn flush_tlb_local(&mut self) {
        self.tlb.flush_local();
        self.fetches.forget_local();
    }

    /// Forgets one page's translation (INVLPG).
    pub(super) fn flush_tlb_page(&mut self, va: u64) {
        self.tlb.flush_page(va);
        self.fetches.forget_page(va);
    }

    /// #GP(0) unless at privilege level 0.
    pub(super) fn require_cpl0(&self) -> Result<(), Stop> {
        if self.cpl() == 0 { Ok(()) } else { Err(Exception::general_protection(0).into()) }
    }
}

/// A non-canonical address gives #GP in general and #SS through the stack segment.
pub(super) fn stack_fault(stop: Stop) -> Stop {
    match stop {
        Stop::Fault(e) if e == Exception::general_protection(0) => Stop::Fault(Exception::stack(0)),
        other => other,
    }
}

impl Cpu {
    /// Serves a read of the APICs' pages, which are the engine's own; false for any other address.
    pub(super) fn apic_read(&mut self, gpa: u64, into: &mut [u8]) -> bool {
        if self.lapic.mmio_base() != Some(gpa & !0xfff) {
            return self.ioapic.mmio_read(gpa, into);
        }
        ioapic::show(self.lapic.mmio_read(gpa & 0xfff), into);
        true
    }

    /// Serves a write to the APICs' pages; false for any other address.
    pub(super) fn apic_write(&mut self, gpa: u64, data: &[u8]) -> bool {
        if self.lapic.mmio_base() != Some(gpa & !0xfff) {
            return self.ioapic.mmio_write(gpa, data);
        }
        self.lapic.mmio_write(gpa & 0xfff, ioapic::word(data));
        true
    }
}
