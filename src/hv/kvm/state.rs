//! A vCPU's registers: the kernel's structures and the neutral form.
//!
//! [`Native`] is all that the kernel keeps of a vCPU, as it hands it out and takes it back, so that an attempt to restore
//! that fails half way can put back what was there.

use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_SIPI_RECEIVED,
    KVM_MP_STATE_UNINITIALIZED, KVM_VCPUEVENT_VALID_NMI_PENDING, KVM_VCPUEVENT_VALID_SHADOW,
    KVM_VCPUEVENT_VALID_SIPI_VECTOR, KVM_X86_SHADOW_INT_STI, kvm_debugregs, kvm_dtable, kvm_mp_state, kvm_regs,
    kvm_segment, kvm_sregs, kvm_vcpu_events, kvm_xsave,
};

use super::lapic::Page;
use crate::hv::HvError;
use crate::hv::state::VcpuState;
use crate::hv::state::check::{check, require};
use crate::hv::state::x86_64::{Activity, Delivery, DeliverySource, Events, Fpu, Lapic, Msrs, Segment, Table};

/// MSRs that are restored by writing them, in the order of [`msr_values`]; the time's are not among them.
pub(super) const MSRS: [u32; 12] = [
    0xc000_0081,
    0xc000_0082,
    0xc000_0083,
    0xc000_0084,
    0xc000_0102,
    0x174,
    0x175,
    0x176,
    0x277,
    0xc000_0103,
    0x4b56_4d01,
    0x4b56_4d00,
];

/// What the kernel keeps of a vCPU, but for its time.
#[derive(Debug)]
pub(super) struct Native {
    pub(super) mp: kvm_mp_state,
    pub(super) regs: kvm_regs,
    pub(super) sregs: kvm_sregs,
    pub(super) xsave: kvm_xsave,
    pub(super) debug: kvm_debugregs,
    pub(super) lapic: Page,
    pub(super) msrs: [u64; MSRS.len()],
    pub(super) events: kvm_vcpu_events,
}

impl Native {
    /// The neutral form, but for what time does to it.
    pub(super) fn to_neutral(&self, id: u8) -> VcpuState {
        let (r, s, d) = (&self.regs, &self.sregs, &self.debug);
        let mut lapic = self.lapic.to_neutral(id.into(), s.apic_base);
        let mut events = from_events(&self.events, self.mp.mp_state);
        ask_again(&mut events, &mut lapic);
        VcpuState {
            gpr: [
                r.rax, r.rcx, r.rdx, r.rbx, r.rsp, r.rbp, r.rsi, r.rdi, r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14,
                r.r15,
            ],
            rip: r.rip,
            rflags: r.rflags,
            cr0: s.cr0,
            cr2: s.cr2,
            cr3: s.cr3,
            cr4: s.cr4,
            cr8: s.cr8,
            dr: [d.db[0], d.db[1], d.db[2], d.db[3], d.dr6, d.dr7],
            segments: [s.es, s.cs, s.ss, s.ds, s.fs, s.gs].map(|segment| from_segment(&segment)),
            ldtr: from_segment(&s.ldt),
            tr: from_segment(&s.tr),
            gdtr: Table { base: s.gdt.base, limit: s.gdt.limit },
            idtr: Table { base: s.idt.base, limit: s.idt.limit },
            msrs: self.neutral_msrs(),
            fpu: from_xsave(&self.xsave),
            lapic,
            interrupt_shadow: self.events.interrupt.shadow != 0,
            activity: from_mp_state(self.mp.mp_state),
            events,
        }
    }

    fn neutral_msrs(&self) -> Msrs {
        let [star, lstar, cstar, sfmask, kernel_gs_base, sysenter_cs, sysenter_esp, sysenter_eip, rest @ ..] =
            self.msrs;
        let [pat, tsc_aux, kvm_system_time, kvm_wall_clock] = rest;
        let efer = self.sregs.efer;
        Msrs {
            efer,
            star,
            lstar,
            cstar,
            sfmask,
            kernel_gs_base,
            sysenter_cs,
            sysenter_esp,
            sysenter_eip,
            pat,
            tsc_aux,
            tsc: 0,
            kvm_system_time,
            kvm_wall_clock,
        }
    }

    /// # Errors
    /// [`HvError::State`] for what the kernel would take and the processor then refuse, or change without a word.
    pub(super) fn from_neutral(state: &VcpuState, id: u8) -> Result<Self, HvError> {
        validate(state).map_err(HvError::State)?;
        if state.events.delivering.is_some_and(|event| event.source == DeliverySource::Software) {
            // KVM executes the instruction again, and does not tell its length.
            return Err(HvError::Unsupported("a software interrupt that is under way"));
        }
        let [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15] = state.gpr;
        let (rip, rflags, m) = (state.rip, state.rflags, &state.msrs);
        Ok(Self {
            mp: kvm_mp_state { mp_state: to_mp_state(state)? },
            regs: kvm_regs {
                rax,
                rbx,
                rcx,
                rdx,
                rsi,
                rdi,
                rsp,
                rbp,
                r8,
                r9,
                r10,
                r11,
                r12,
                r13,
                r14,
                r15,
                rip,
                rflags,
            },
            sregs: to_sregs(state),
            xsave: to_xsave(&state.fpu),
            debug: kvm_debugregs {
                db: [state.dr[0], state.dr[1], state.dr[2], state.dr[3]],
                dr6: state.dr[4],
                dr7: state.dr[5],
                ..Default::default()
            },
            lapic: Page::from_neutral(&state.lapic, id.into(), state.cr8)?,
            msrs: [
                m.star,
                m.lstar,
                m.cstar,
                m.sfmask,
                m.kernel_gs_base,
                m.sysenter_cs,
                m.sysenter_esp,
                m.sysenter_eip,
                m.pat,
                m.tsc_aux,
                m.kvm_system_time,
                m.kvm_wall_clock,
            ],
            events: to_events(state),
        })
    }
}

/// What the kernel would take and the processor then refuse, or change without a word.
fn validate(state: &VcpuState) -> Result<(), &'static str> {
    const VM: u64 = 1 << 17;
    const LMA: u64 = 1 << 10;
    check(state)?;
    require(state.msrs.efer & LMA == 0 || state.rflags & VM == 0, "virtual 8086 mode in long mode")?;
    require(state.segments[1].attributes & 0x6000 != 0x6000, "CS of 64 and of 32 bits")?;
    require(state.msrs.kvm_wall_clock & 3 == 0, "a wall clock that is not aligned")?;
    require(state.fpu.mxcsr >> 16 == 0, "MXCSR with reserved bits")
}

fn from_segment(from: &kvm_segment) -> Segment {
    let bit = |value: u8, at: u16| u16::from(value & 1) << at;
    let attributes = u16::from(from.type_ & 0xf)
        | bit(from.s, 4)
        | u16::from(from.dpl & 3) << 5
        | bit(from.present, 7)
        | bit(from.avl, 12)
        | bit(from.l, 13)
        | bit(from.db, 14)
        | bit(from.g, 15);
    let (base, limit, selector) = (from.base, from.limit, from.selector);
    Segment { selector, base, limit, attributes, unusable: from.unusable != 0 }
}

fn to_segment(from: &Segment) -> kvm_segment {
    let bit = |at: u16| (from.attributes >> at & 1) as u8;
    kvm_segment {
        base: from.base,
        limit: from.limit,
        selector: from.selector,
        type_: (from.attributes & 0xf) as u8,
        present: bit(7),
        dpl: (from.attributes >> 5 & 3) as u8,
        db: bit(14),
        s: bit(4),
        l: bit(13),
        g: bit(15),
        avl: bit(12),
        unusable: from.unusable.into(),
        padding: 0,
    }
}

fn to_sregs(state: &VcpuState) -> kvm_sregs {
    let [es, cs, ss, ds, fs, gs] = state.segments.map(|segment| to_segment(&segment));
    let table = |from: &Table| kvm_dtable { base: from.base, limit: from.limit, ..Default::default() };
    kvm_sregs {
        cs,
        ds,
        es,
        fs,
        gs,
        ss,
        tr: to_segment(&state.tr),
        ldt: to_segment(&state.ldtr),
        gdt: table(&state.gdtr),
        idt: table(&state.idtr),
        cr0: state.cr0,
        cr2: state.cr2,
        cr3: state.cr3,
        cr4: state.cr4,
        cr8: state.cr8,
        efer: state.msrs.efer,
        apic_base: state.lapic.apic_base,
        // What it would say is in the events.
        interrupt_bitmap: [0; 4],
    }
}

/// Words of the XSAVE image (Intel SDM volume 1, 10.5.1 and 13.4).
mod image {
    pub(super) const FIP: usize = 8 / 4;
    pub(super) const FDP: usize = 16 / 4;
    pub(super) const MXCSR: usize = 24 / 4;
    pub(super) const ST: usize = 32 / 4;
    pub(super) const XMM: usize = 160 / 4;
    pub(super) const XSTATE_BV: usize = 512 / 4;
    pub(super) const X87: u32 = 1;
    pub(super) const SSE: u32 = 2;
}

fn from_xsave(xsave: &kvm_xsave) -> Fpu {
    let words = &xsave.region;
    let get = |word: usize| u64::from(words[word]) | u64::from(words[word + 1]) << 32;
    let mut fpu = Fpu::default();
    // A component that is not in the image is as after reset; MXCSR is none's.
    if words[image::XSTATE_BV] & image::X87 != 0 {
        (fpu.fcw, fpu.fsw) = (words[0] as u16, (words[0] >> 16) as u16);
        (fpu.ftw, fpu.fop) = (words[1] as u8, (words[1] >> 16) as u16 & 0x7ff);
        (fpu.fip, fpu.fdp) = (get(image::FIP), get(image::FDP));
        fpu.st = std::array::from_fn(|n| (get(image::ST + n * 4), words[image::ST + 2 + n * 4] as u16));
    }
    fpu.mxcsr = words[image::MXCSR];
    if words[image::XSTATE_BV] & image::SSE != 0 {
        fpu.xmm = std::array::from_fn(|n| [get(image::XMM + n * 4), get(image::XMM + 2 + n * 4)]);
    }
    fpu
}

fn to_xsave(fpu: &Fpu) -> kvm_xsave {
    let mut xsave = kvm_xsave::default();
    let words = &mut xsave.region;
    words[0] = u32::from(fpu.fcw) | u32::from(fpu.fsw) << 16;
    words[1] = u32::from(fpu.ftw) | u32::from(fpu.fop & 0x7ff) << 16;
    words[image::MXCSR] = fpu.mxcsr;
    words[image::XSTATE_BV] = image::X87 | image::SSE;
    let mut put = |word: usize, value: u64| {
        words[word] = value as u32;
        words[word + 1] = (value >> 32) as u32;
    };
    put(image::FIP, fpu.fip);
    put(image::FDP, fpu.fdp);
    for (n, (low, high)) in fpu.st.iter().enumerate() {
        put(image::ST + n * 4, *low);
        put(image::ST + 2 + n * 4, (*high).into());
    }
    for (n, [low, high]) in fpu.xmm.iter().enumerate() {
        put(image::XMM + n * 4, *low);
        put(image::XMM + 2 + n * 4, *high);
    }
    xsave
}

fn from_mp_state(mp_state: u32) -> Activity {
    match mp_state {
        KVM_MP_STATE_HALTED => Activity::Halted,
        KVM_MP_STATE_UNINITIALIZED => Activity::WaitsForInit,
        KVM_MP_STATE_INIT_RECEIVED | KVM_MP_STATE_SIPI_RECEIVED => Activity::WaitsForStartUp,
        _ => Activity::Running,
    }
}

fn to_mp_state(state: &VcpuState) -> Result<u32, HvError> {
    match (state.activity, state.events.start_up) {
        (Activity::WaitsForStartUp, None) => Ok(KVM_MP_STATE_INIT_RECEIVED),
        (Activity::WaitsForStartUp, Some(_)) => Ok(KVM_MP_STATE_SIPI_RECEIVED),
        (_, Some(_)) => Err(HvError::State("a start-up message for a processor that waits for none")),
        (Activity::Running, None) => Ok(KVM_MP_STATE_RUNNABLE),
        (Activity::Halted, None) => Ok(KVM_MP_STATE_HALTED),
        (Activity::WaitsForInit, None) => Ok(KVM_MP_STATE_UNINITIALIZED),
    }
}

fn from_events(from: &kvm_vcpu_events, mp_state: u32) -> Events {
    const NMI: u8 = 2;
    let (exception, interrupt) = (&from.exception, &from.interrupt);
    let delivering = if exception.injected | exception.pending != 0 {
        let error = (exception.has_error_code != 0).then_some(exception.error_code);
        Some(Delivery { vector: exception.nr, error, source: DeliverySource::Exception })
    } else if interrupt.injected != 0 {
        Some(Delivery { vector: interrupt.nr, error: None, source: DeliverySource::External })
    } else if from.nmi.injected != 0 {
        Some(Delivery { vector: NMI, error: None, source: DeliverySource::Nmi })
    } else {
        None
    };
    Events {
        nmi_pending: from.nmi.pending != 0,
        nmi_masked: from.nmi.masked != 0,
        start_up: (mp_state == KVM_MP_STATE_SIPI_RECEIVED).then_some(from.sipi_vector as u8),
        delivering,
    }
}

/// An interrupt that the local APIC has handed over and whose delivery has not begun is the same as one that it is about
/// to hand over, which every engine knows.
fn ask_again(events: &mut Events, lapic: &mut Lapic) {
    let Some(Delivery { vector, source: DeliverySource::External, .. }) = events.delivering else { return };
    let (word, bit) = (usize::from(vector / 32), 1 << (vector % 32));
    if lapic.isr[word] & bit != 0 {
        lapic.isr[word] &= !bit;
        lapic.irr[word] |= bit;
        events.delivering = None;
    }
}

fn to_events(state: &VcpuState) -> kvm_vcpu_events {
    let events = &state.events;
    let mut to =
        kvm_vcpu_events { flags: KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW, ..Default::default() };
    to.nmi.pending = events.nmi_pending.into();
    to.nmi.masked = events.nmi_masked.into();
    to.interrupt.shadow = if state.interrupt_shadow { KVM_X86_SHADOW_INT_STI as u8 } else { 0 };
    if let Some(vector) = events.start_up {
        to.sipi_vector = vector.into();
        to.flags |= KVM_VCPUEVENT_VALID_SIPI_VECTOR;
    }
    match events.delivering {
        None => {}
        Some(Delivery { vector, error, source: DeliverySource::Exception }) => {
            to.exception.injected = 1;
            to.exception.nr = vector;
            to.exception.has_error_code = error.is_some().into();
            to.exception.error_code = error.unwrap_or(0);
        }
        Some(Delivery { source: DeliverySource::Nmi, .. }) => to.nmi.injected = 1,
        Some(Delivery { vector, .. }) => {
            to.interrupt.injected = 1;
            to.interrupt.nr = vector;
        }
    }
    to
}
