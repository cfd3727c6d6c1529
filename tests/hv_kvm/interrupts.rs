//! Lines, the IOAPIC, and several vCPUs.

use std::num::NonZeroU8;
use std::sync::mpsc;
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::Duration;

use iced_x86::code_asm::*;
use kiln::hv::state::irqchip::IoApicState;
use kiln::hv::state::x86_64::Activity;
use kiln::hv::state::{IrqChipState, VcpuState};
use kiln::hv::{Exit, HvError, Hypervisor, Kick, VmSpec};
use kiln::mem::GuestRam;
use kiln::units::Gsi;

use crate::bare;
use crate::bare::{CODE, EXIT_PORT};
use crate::rig::{
    COUNTER, Guest, HANDLER, IDT, LAPIC, LEVEL, LONG, attach, engine, halting, memory, raw, with_interrupts,
};

fn ioapic(pin: usize, entry: u64) -> IrqChipState {
    let mut ioapic = IoApicState::default();
    ioapic.redirections[pin] = entry;
    IrqChipState { ioapic }
}

const REMOTE_IRR: u64 = 1 << 14;

#[test]
fn an_edge_reaches_its_handler_and_wakes_a_halted_guest() {
    let Some(kvm) = engine("an_edge_reaches_its_handler_and_wakes_a_halted_guest") else { return };
    let mut guest = halting(&kvm);
    guest.vm.restore_irqchip(&ioapic(5, 0x31)).unwrap();
    let line = guest.vm.irq_line(Gsi(5)).unwrap();
    assert!(matches!(guest.vm.irq_line(Gsi(24)), Err(HvError::Unsupported(_))));
    line.raise();
    assert_eq!(guest.vcpu.run().unwrap(), Exit::Kicked, "before the run");
    assert_eq!(guest.ram.load::<u64>(COUNTER), Some(1));
    for round in 2..20 {
        let line = Arc::clone(&line);
        let raiser = thread::spawn(move || {
            thread::sleep(Duration::from_millis(round % 3));
            line.raise();
        });
        assert_eq!(guest.vcpu.run().unwrap(), Exit::Kicked);
        raiser.join().unwrap();
        assert_eq!(guest.ram.load::<u64>(COUNTER), Some(round));
    }
    guest.run_for(Duration::from_millis(10));
    assert_eq!(guest.vcpu.save().unwrap().activity, Activity::Halted);
}

#[test]
fn a_level_asks_again_until_it_is_taken_away() {
    let Some(kvm) = engine("a_level_asks_again_until_it_is_taken_away") else { return };
    let mut guest = halting(&kvm);
    guest.vm.restore_irqchip(&ioapic(9, 0x41 | LEVEL)).unwrap();
    let line = guest.vm.irq_line(Gsi(9)).unwrap();
    line.set_level(true);
    line.set_level(true);
    assert_eq!(guest.vm.save_irqchip().unwrap().ioapic.active, 1 << 9);
    for served in 1..4 {
        assert_eq!(guest.vcpu.run().unwrap(), Exit::Kicked);
        assert_eq!(guest.ram.load::<u64>(COUNTER), Some(served));
    }
    line.set_level(false);
    // What was sent before the line fell is still served.
    guest.run_for(Duration::from_millis(10));
    let served = guest.ram.load::<u64>(COUNTER);
    guest.run_for(Duration::from_millis(10));
    guest.run_for(Duration::from_millis(10));
    assert!(guest.ram.load::<u64>(COUNTER) <= served.map(|served| served + 1));
    let ioapic = guest.vm.save_irqchip().unwrap().ioapic;
    assert_eq!((ioapic.active, ioapic.requests, ioapic.redirections[9]), (0, 0, 0x41 | LEVEL));
}

#[test]
fn the_ioapics_state_comes_back() {
    let Some(kvm) = engine("the_ioapics_state_comes_back") else { return };
    let mut guest = halting(&kvm);
    // The local APIC has the interrupt that is in service.
    let mut vcpu = guest.vcpu.save().unwrap();
    vcpu.lapic.irr[2] |= 1 << 1;
    guest.vcpu.restore(&vcpu).unwrap();
    let mut state = IoApicState { select: 0x22, id: 0x0300_0000, ..IoApicState::default() };
    state.redirections[3] = 0x0100_0000_0000_0833;
    state.redirections[9] = 0x41 | LEVEL | REMOTE_IRR;
    state.redirections[10] = 0x42 | LEVEL | 1 << 16;
    (state.active, state.requests) = (1 << 9 | 1 << 10, 1 << 9 | 1 << 10);
    let state = IrqChipState { ioapic: state };
    guest.vm.restore_irqchip(&state).unwrap();
    assert_eq!(guest.vm.save_irqchip().unwrap(), state);
    let hostile = IoApicState {
        select: u32::MAX,
        id: u32::MAX,
        redirections: [u64::MAX; 24],
        requests: u32::MAX,
        active: u32::MAX,
    };
    guest.vm.restore_irqchip(&IrqChipState { ioapic: hostile }).unwrap();
    let kept = guest.vm.save_irqchip().unwrap().ioapic;
    assert_eq!(
        (kept.select, kept.id, kept.redirections[0]),
        (0xff, 0x0f00_0000, 0xff00_0000_0001_afff),
        "nothing is in service"
    );
    guest.vm.restore_irqchip(&IrqChipState::default()).unwrap();
    assert_eq!(guest.vm.save_irqchip().unwrap(), IrqChipState::default());
}

#[test]
fn a_level_that_nobody_has_any_more_is_over_in_a_saved_state_and_asks_in_the_restored_one() {
    let Some(kvm) = engine("a_level_that_nobody_has_any_more_is_over_in_a_saved_state_and_asks_in_the_restored_one")
    else {
        return;
    };
    let mut guest = halting(&kvm);
    let mut state = ioapic(9, 0x41 | LEVEL | REMOTE_IRR);
    (state.ioapic.active, state.ioapic.requests) = (1 << 9, 1 << 9);
    guest.vm.restore_irqchip(&state).unwrap();
    // As after an EOI of which the vCPU has not told yet.
    let saved = guest.vm.save_irqchip().unwrap();
    assert_eq!(saved.ioapic.redirections[9], 0x41 | LEVEL);
    assert_eq!(guest.vcpu.save().unwrap().lapic.irr, [0; 8]);
    guest.vm.restore_irqchip(&saved).unwrap();
    assert_eq!(guest.vcpu.save().unwrap().lapic.irr[2], 1 << 1);
    assert_eq!(guest.vm.save_irqchip().unwrap(), state);
    assert_eq!(guest.vcpu.run().unwrap(), Exit::Kicked);
    assert_eq!(guest.ram.load::<u64>(COUNTER), Some(1));
}

#[test]
fn an_edge_is_in_the_state_that_is_saved_after_it() {
    let Some(kvm) = engine("an_edge_is_in_the_state_that_is_saved_after_it") else { return };
    let mut guest = halting(&kvm);
    let line = guest.vm.irq_line(Gsi(5)).unwrap();
    let mut without = guest.vcpu.save().unwrap();
    without.lapic.ldr = 1 << 24;
    // For one by its id, which goes through the irqfd, for one by its logical address, for the lowest priority, for all.
    for entry in [0x31, 0x0100_0000_0000_0831, 0x0100_0000_0000_0931, 0xff00_0000_0000_0031] {
        guest.vm.restore_irqchip(&ioapic(5, entry)).unwrap();
        for round in 0..2_000 {
            guest.vcpu.restore(&without).unwrap();
            line.raise();
            let saved = guest.vcpu.save().unwrap();
            assert_eq!(saved.lapic.irr[1], 1 << 17, "{entry:#x}, round {round}");
        }
    }
    guest.vcpu.restore(&without).unwrap();
    guest.vm.restore_irqchip(&ioapic(5, 0x1_0031)).unwrap();
    line.raise();
    guest.vm.restore_irqchip(&ioapic(5, 0x31)).unwrap();
    assert_eq!(guest.vcpu.save().unwrap().lapic.irr, [0; 8], "a masked edge is lost");
}

#[test]
fn a_second_vcpu_starts_by_init_and_a_start_up_message() {
    let Some(kvm) = engine("a_second_vcpu_starts_by_init_and_a_start_up_message") else { return };
    let code = raw(|a| {
        a.mov(rbx, LAPIC)?;
        for message in [0x4500, 0x460c] {
            a.mov(dword_ptr(rbx + 0x310), 1 << 24)?;
            a.mov(dword_ptr(rbx + 0x300), message)?;
        }
        let mut wait = a.create_label();
        a.mov(rbx, COUNTER)?;
        a.set_label(&mut wait)?;
        a.cmp(byte_ptr(rbx), 0x55)?;
        a.jne(wait)?;
        a.mov(dx, u32::from(EXIT_PORT))?;
        a.out(dx, al)
    });
    let ram = memory(&code);
    // In real mode: mov al, 0x55; mov [0x8000], al; hlt; jmp $-1
    for (at, byte) in (0xc000..).zip([0xb0u8, 0x55, 0xa2, 0x00, 0x80, 0xf4, 0xeb, 0xfd]) {
        ram.store(at, byte).unwrap();
    }
    let mut first = bare::initial_state();
    first.lapic.svr = 0x1ff;
    let mut guest = Guest::on(&kvm, ram, 2, &first);
    let vm = &guest.vm;
    let (ready, started) = mpsc::channel();
    thread::scope(|scope| {
        let second = scope.spawn(move || {
            let (mut vcpu, _, kick) = attach(&**vm, 1);
            let mut state = bare::initial_state();
            state.activity = Activity::WaitsForInit;
            (state.lapic.id, state.lapic.apic_base) = (1, 0xfee0_0800);
            vcpu.restore(&state).unwrap();
            ready.send(kick).unwrap();
            assert_eq!(vcpu.run().unwrap(), Exit::Kicked);
            vcpu.save().unwrap()
        });
        let kick = started.recv_timeout(LONG).unwrap();
        let late = Arc::clone(&guest.kick);
        let (done, over) = mpsc::channel::<()>();
        let watchdog = scope.spawn(move || {
            if over.recv_timeout(LONG).is_err() {
                late.kick();
            }
        });
        assert_eq!(guest.vcpu.run().unwrap(), Exit::Kicked);
        let _ = done.send(());
        watchdog.join().unwrap();
        assert_eq!(guest.ram.load::<u8>(COUNTER), Some(0x55), "the second one has not started");
        thread::sleep(Duration::from_millis(20));
        kick.kick();
        let state = second.join().unwrap();
        assert_eq!((state.activity, state.rip, state.segments[1].base), (Activity::Halted, 6, 0xc000));
        assert_eq!(state.lapic.id, 1);
    });
    // Both show the same time.
    guest.vm.stop_time();
    assert_eq!(guest.vcpu.save().unwrap().msrs.tsc, guest.vm.time_stamp().unwrap().ticks);
}

/// Goes on with two vCPUs for a while, and returns where they are then.
fn go_on(engine: &dyn Hypervisor, ram: &Arc<GuestRam>, states: [VcpuState; 2], for_: Duration) -> [VcpuState; 2] {
    let vcpus = NonZeroU8::new(2).expect("not zero");
    let vm = engine.create_vm(&VmSpec { vcpus }, Arc::clone(ram)).expect("machine");
    vm.stop_time();
    let step = Barrier::new(3);
    thread::scope(|scope| {
        let (kicks, kickers) = mpsc::channel();
        let threads = [0, 1].map(|id: u8| {
            let (state, vm, step, kicks) = (&states[usize::from(id)], &*vm, &step, kicks.clone());
            scope.spawn(move || {
                let (mut vcpu, _, kick) = attach(vm, id);
                vcpu.restore(state).expect("a valid state");
                kicks.send(kick).unwrap();
                step.wait();
                step.wait();
                assert_eq!(vcpu.run().expect("a run"), Exit::Kicked);
                step.wait();
                step.wait();
                vcpu.save().expect("a state")
            })
        });
        step.wait();
        vm.start_time();
        step.wait();
        thread::sleep(for_);
        kickers.iter().take(2).for_each(|kick: Arc<dyn Kick>| kick.kick());
        step.wait();
        vm.stop_time();
        step.wait();
        threads.map(|thread| thread.join().unwrap())
    })
}

#[test]
fn no_interrupt_between_vcpus_is_lost_on_the_way_through_saved_states() {
    let Some(kvm) = engine("no_interrupt_between_vcpus_is_lost_on_the_way_through_saved_states") else { return };
    const ROUNDS: u32 = 20_000;
    const VECTOR: u64 = 0x70;
    const QUIET_HANDLER: u64 = HANDLER + 0x800;
    const DONE: u64 = COUNTER + 8;
    // The first one sends an interrupt and waits until it has been counted, over and over; the second one counts.
    let code = raw(|a| {
        let (mut next, mut wait, mut end) = (a.create_label(), a.create_label(), a.create_label());
        a.mov(rbx, LAPIC)?;
        a.mov(rsi, COUNTER)?;
        a.mov(ecx, ROUNDS)?;
        a.set_label(&mut next)?;
        a.mov(rax, qword_ptr(rsi))?;
        a.mov(dword_ptr(rbx + 0x310), 1 << 24)?;
        a.mov(dword_ptr(rbx + 0x300), 0x4000 + VECTOR as i32)?;
        a.set_label(&mut wait)?;
        a.cmp(qword_ptr(rsi), rax)?;
        a.je(wait)?;
        a.dec(ecx)?;
        a.jne(next)?;
        a.mov(byte_ptr(rsi + 8), 1)?;
        a.set_label(&mut end)?;
        a.hlt()?;
        a.jmp(end)
    });
    let handler = || {
        let mut a = CodeAssembler::new(64)?;
        a.mov(rbx, COUNTER)?;
        a.inc(qword_ptr(rbx))?;
        a.mov(rbx, LAPIC + 0xb0)?;
        a.mov(dword_ptr(rbx), 0)?;
        a.iretq()?;
        a.assemble(QUIET_HANDLER)
    };
    let ram = memory(&code);
    let first = with_interrupts(&ram);
    for (at, byte) in (QUIET_HANDLER..).zip(handler().expect("the handler assembles")) {
        ram.store(at, byte).unwrap();
    }
    ram.store(IDT + VECTOR * 16, QUIET_HANDLER as u16).unwrap();
    // sti; hlt; jmp $-1
    for (at, byte) in (CODE + 0x2000..).zip([0xfbu8, 0xf4, 0xeb, 0xfd]) {
        ram.store(at, byte).unwrap();
    }
    let mut second = VcpuState { rip: CODE + 0x2000, ..first.clone() };
    (second.lapic.id, second.lapic.apic_base) = (1, 0xfee0_0800);
    second.gpr[4] -= 0x1000;
    let mut states = [first, second];
    let (mut machines, mut idle) = (0, 0);
    while ram.load::<u8>(DONE) == Some(0) {
        let before = ram.load::<u64>(COUNTER);
        states = go_on(&kvm, &ram, states, Duration::from_millis(10));
        machines += 1;
        // A busy host may run neither of them for a while; but not each time.
        idle = if ram.load::<u64>(COUNTER) == before { idle + 1 } else { 0 };
        assert!(idle < 100, "stuck at {before:?} after {machines} machines");
    }
    assert_eq!(ram.load::<u64>(COUNTER), Some(ROUNDS.into()));
    assert!(machines > 1, "all in one go proves nothing");
}
