//! States: saved, restored, refused, and carried from engine to engine.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use iced_x86::code_asm::*;
use kiln::hv::soft::Soft;
use kiln::hv::state::VcpuState;
use kiln::hv::state::x86_64::{Activity, Delivery, DeliverySource, Events, Fpu, Lapic, Msrs, Segment, Table};
use kiln::hv::{Exit, HvError, Hypervisor};

use crate::bare;
use crate::bare::EXIT_PORT;
use crate::rig::{GDT, Guest, IDT, SPIN, engine, is_fixed, memory, raw};

/// A state in which no register of any class is as after reset.
fn rich_state() -> VcpuState {
    let data = Segment { selector: 0x18, base: 0, limit: u32::MAX, attributes: 0xc093, unusable: false };
    let mut state = bare::initial_state();
    state.gpr = std::array::from_fn(|n| 0x0101_0101_0101_0101 * (n as u64 + 1));
    state.rflags = 0x8d7;
    (state.cr2, state.cr8) = (0xdead_b000, 5);
    state.dr = [0x1000, 0x2000, 0x3000, 0x4000, 0xffff_0ff1, 0x400];
    state.segments[4] = Segment { base: 0x7fff_0000_1000, ..data };
    state.segments[5] = Segment { base: 0xffff_8000_0000_2000, ..data };
    state.gdtr = Table { base: GDT, limit: 0x1f };
    state.idtr = Table { base: IDT, limit: 0xfff };
    state.msrs = Msrs {
        star: 0x0023_0010_0000_0000,
        lstar: 0xffff_8000_0000_3000,
        cstar: 0xffff_8000_0000_4000,
        sfmask: 0x4_7700,
        kernel_gs_base: 0xffff_8000_0000_5000,
        sysenter_cs: 0x10,
        sysenter_esp: 0xffff_8000_0000_6000,
        sysenter_eip: 0xffff_8000_0000_7000,
        pat: 0x0007_0406_0007_0106,
        tsc_aux: 3,
        tsc: 1_000_000_000_000,
        kvm_system_time: 0x7001,
        kvm_wall_clock: 0x7100,
        ..state.msrs
    };
    state.fpu = Fpu {
        fcw: 0x27f,
        fsw: 0x3800,
        ftw: 0x80,
        st: std::array::from_fn(|n| (0x8000_0000_0000_0000 | n as u64, 0x3fff)),
        mxcsr: 0x1fa0,
        xmm: std::array::from_fn(|n| [n as u64 + 1, !(n as u64)]),
        ..Fpu::default()
    };
    state.lapic = Lapic {
        tpr: 0x53,
        ldr: 0x0100_0000,
        svr: 0x1ff,
        isr: [0, 0, 1, 0, 0, 0, 0, 0],
        irr: [0, 2, 0, 0, 0, 0, 0, 0],
        icr: 0x0200_0000_0000_00fd,
        lvt: [0x2_00ef, 0x1_0000, 0x1_0000, 0x1_0700, 0x400, 0xfe],
        timer_initial: 4_000_000_000,
        timer_divide: 0b1011,
        timer_left_ns: Some(3_000_000_000),
        ..state.lapic
    };
    state
}

/// The state without what time changes.
fn timeless(state: &VcpuState) -> VcpuState {
    let mut state = state.clone();
    (state.msrs.tsc, state.lapic.timer_left_ns) = (0, None);
    state
}

#[test]
fn every_class_of_registers_comes_back_as_it_was_given() {
    let Some(kvm) = engine("every_class_of_registers_comes_back_as_it_was_given") else { return };
    let mut guest = Guest::new(&kvm, &SPIN);
    guest.ram.fill(0x7100, 0x77, 16).unwrap();
    let given = rich_state();
    guest.vcpu.restore(&given).unwrap();
    let got = guest.vcpu.save().unwrap();
    assert_eq!(timeless(&got), timeless(&given));
    let passed = got.msrs.tsc.wrapping_sub(given.msrs.tsc);
    let hz = guest.vm.time_stamp().unwrap().hz;
    assert!(passed < hz * 2 || is_fixed(&kvm), "{passed} ticks since the state was given");
    let left = got.lapic.timer_left_ns.expect("the timer counts");
    assert!((1_000_000_000..=3_000_000_000).contains(&left), "{left}");
    assert_eq!(guest.ram.load::<u64>(0x7100), Some(0x7777_7777_7777_7777), "the wall clock is not written again");

    // Under stopped time nothing moves at all, whatever was there before: a timer of another mode, or the other form of
    // the local APIC.
    guest.vm.stop_time();
    let mut other = bare::initial_state();
    other.lapic = Lapic {
        apic_base: 0xfee0_0d00,
        svr: 0x1ff,
        icr: 0x0000_0001_0000_00fd,
        lvt: [2 << 17 | 0x60, 1 << 16, 1 << 16, 1 << 16, 1 << 16, 1 << 16],
        tsc_deadline: 5_000_000,
        ..other.lapic
    };
    guest.vcpu.restore(&other).unwrap();
    let got = guest.vcpu.save().unwrap();
    assert_eq!((timeless(&got), got.msrs.tsc), (timeless(&other), 0));
    guest.vcpu.restore(&given).unwrap();
    thread::sleep(Duration::from_millis(5));
    assert_eq!(guest.vcpu.save().unwrap(), given);
    guest.vm.start_time();
}

#[test]
fn what_a_processor_waits_for_and_what_is_under_way_come_back() {
    let Some(kvm) = engine("what_a_processor_waits_for_and_what_is_under_way_come_back") else { return };
    let mut guest = Guest::new(&kvm, &SPIN);
    let base = bare::initial_state();
    let events = |events| VcpuState { events, ..base.clone() };
    let delivering = |vector, error, source| {
        events(Events { delivering: Some(Delivery { vector, error, source }), ..Events::default() })
    };
    let waits = Activity::WaitsForStartUp;
    let states = [
        VcpuState { activity: Activity::Halted, ..base.clone() },
        VcpuState { activity: Activity::WaitsForInit, ..base.clone() },
        VcpuState { activity: waits, ..base.clone() },
        VcpuState { activity: waits, events: Events { start_up: Some(0x9a), ..Events::default() }, ..base.clone() },
        VcpuState { interrupt_shadow: true, rflags: 0x202, ..base.clone() },
        events(Events { nmi_pending: true, nmi_masked: true, ..Events::default() }),
        delivering(14, Some(2), DeliverySource::Exception),
        delivering(0x31, None, DeliverySource::External),
        delivering(2, None, DeliverySource::Nmi),
    ];
    guest.vm.stop_time();
    for state in states {
        guest.vcpu.restore(&state).unwrap_or_else(|error| panic!("{:?} {:?}: {error}", state.activity, state.events));
        let got = guest.vcpu.save().unwrap();
        if state.events.start_up.is_some() {
            // The kernel acts on it when it is asked: real mode, at the page that the message names.
            assert_eq!((got.activity, got.segments[1].base, got.rip), (Activity::Running, 0x9_a000, 0));
            continue;
        }
        assert_eq!(timeless(&got), timeless(&state));
    }
    let before = guest.vcpu.save().unwrap();
    let software = delivering(3, None, DeliverySource::Software);
    assert!(matches!(guest.vcpu.restore(&software), Err(HvError::Unsupported(_))));
    assert_eq!(guest.vcpu.save().unwrap(), before);
}

/// What makes a state impossible.
type Change = fn(&mut VcpuState);

#[test]
fn a_state_that_cannot_be_is_refused_and_the_old_one_stands() {
    let Some(kvm) = engine("a_state_that_cannot_be_is_refused_and_the_old_one_stands") else { return };
    let mut guest = Guest::new(&kvm, &SPIN);
    guest.vm.stop_time();
    let given = rich_state();
    guest.vcpu.restore(&given).unwrap();
    let wrong: [(&str, Change); 17] = [
        ("RFLAGS", |s| s.rflags = 0),
        ("RFLAGS", |s| s.rflags |= 1 << 40),
        ("RFLAGS.VM", |s| s.rflags |= 1 << 17),
        ("CR0", |s| s.cr0 = 1 << 31),
        ("CR4", |s| s.cr4 |= 1 << 40),
        ("CR8", |s| s.cr8 = 16),
        ("CR3", |s| s.cr3 = u64::MAX),
        ("EFER", |s| s.msrs.efer = u64::MAX),
        ("PAT", |s| s.msrs.pat = 2),
        ("LSTAR", |s| s.msrs.lstar = 1 << 63),
        ("RIP", |s| s.rip = 1 << 60),
        ("FS", |s| s.segments[4].base = 1 << 50),
        ("MXCSR", |s| s.fpu.mxcsr = u32::MAX),
        ("DR7", |s| s.dr[5] = u64::MAX),
        ("APIC id", |s| s.lapic.id = 7),
        ("APIC base", |s| s.lapic.apic_base = u64::MAX),
        ("start-up", |s| s.events.start_up = Some(1)),
    ];
    for (what, change) in wrong {
        let mut state = bare::initial_state();
        state.gpr[0] = 0xbad;
        change(&mut state);
        let refused = guest.vcpu.restore(&state);
        assert!(matches!(refused, Err(HvError::State(_))), "{what}: {refused:?}");
        assert_eq!(guest.vcpu.save().unwrap(), given, "{what}");
    }
}

#[test]
fn a_guest_goes_from_soft_to_kvm_and_back() {
    let Some(kvm) = engine("a_guest_goes_from_soft_to_kvm_and_back") else { return };
    // Three parts of a sum, each ended by the exit port.
    let code = raw(|a| {
        for part in 1..=3u32 {
            a.mov(ecx, 1_000 * part)?;
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            a.add(rbx, rcx)?;
            a.dec(ecx)?;
            a.jne(again)?;
            a.mov(dx, u32::from(EXIT_PORT))?;
            a.out(dx, al)?;
        }
        a.hlt()
    });
    let soft = Soft::new();
    let mut state = bare::initial_state();
    state.gpr[3] = 0;
    state.fpu.xmm[2] = [3, 5];
    let ram = memory(&code);
    let engines: [&dyn Hypervisor; 3] = [&soft, &kvm, &soft];
    for engine in engines {
        let mut guest = Guest::on(engine, Arc::clone(&ram), 1, &state);
        assert_eq!(guest.vcpu.run().unwrap(), Exit::Kicked);
        guest.vm.stop_time();
        let next = guest.vcpu.save().unwrap();
        assert!(next.msrs.tsc > state.msrs.tsc || is_fixed(&kvm));
        state = next;
    }
    let sum = |n: u64| n * (n + 1) / 2;
    assert_eq!(state.gpr[3], sum(1_000) + sum(2_000) + sum(3_000));
    assert_eq!(state.fpu.xmm[2], [3, 5]);
}
