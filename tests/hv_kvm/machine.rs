//! Whole machines, and the log of written pages.

use iced_x86::code_asm::*;
use kiln::hv::kvm::Kvm;
use kiln::hv::{Exit, HvError, Hypervisor};
use kiln::mem::GuestRam;
use kiln::vmm::{Machine, MachineState};

use crate::bare::EXIT_PORT;
use crate::bare_machine;
use crate::rig::{Guest, engine, raw};

#[test]
fn the_dirty_log_names_what_vcpus_wrote() {
    let Some(kvm) = engine("the_dirty_log_names_what_vcpus_wrote") else { return };
    let code = raw(|a| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        for page in [0x30_0000u64, 0x30_1000, 0x90_0000] {
            a.mov(rbx, page)?;
            a.mov(qword_ptr(rbx), rbx)?;
        }
        a.mov(dx, u32::from(EXIT_PORT))?;
        a.out(dx, al)?;
        a.jmp(again)
    });
    let mut guest = Guest::new(&kvm, &code);
    let run = |guest: &mut Guest| assert_eq!(guest.vcpu.run().unwrap(), Exit::Kicked);
    assert!(matches!(guest.vm.take_dirty_log(), Err(HvError::Unsupported(_))));
    run(&mut guest);
    guest.vm.start_dirty_log().unwrap();
    let written = |guest: &Guest| {
        let pages = guest.vm.take_dirty_log().unwrap();
        // Page tables are written by the processor itself.
        pages.iter().filter(|page| *page >= 0x10_0000).collect::<Vec<_>>()
    };
    assert_eq!(written(&guest), [0u64; 0]);
    for _ in 0..3 {
        run(&mut guest);
        assert_eq!(written(&guest), [0x30_0000, 0x30_1000, 0x90_0000]);
        assert_eq!(written(&guest), [0u64; 0]);
    }
    run(&mut guest);
    guest.vm.start_dirty_log().unwrap();
    assert_eq!(written(&guest), [0u64; 0], "what was noted before is forgotten");
    guest.vm.stop_dirty_log().unwrap();
    guest.vm.stop_dirty_log().unwrap();
    run(&mut guest);
    assert!(guest.vm.take_dirty_log().is_err());
}

async fn machine(kvm: &Kvm, state: &MachineState, ram: GuestRam) -> Machine {
    let mut machine = Machine::restore(kvm, state, ram, &[]).await.expect("a valid state");
    machine.resume();
    machine
}

/// The GiB of devices and interrupt controllers by 2 MiB pages, as not every host has larger ones.
fn map_devices(ram: &GuestRam) {
    ram.store(0x2000 + 3 * 8, 0x6003u64).unwrap();
    for n in 0..512u64 {
        ram.store(0x6000 + n * 8, 0xc000_0000 | n << 21 | 0x83).unwrap();
    }
}

#[tokio::test]
async fn a_guests_ring_reaches_its_device() {
    let Some(kvm) = engine("a_guests_ring_reaches_its_device") else { return };
    const DESCRIPTORS: u64 = 0x7000;
    const AVAILABLE: u64 = 0x7100;
    const USED: u64 = 0x7200;
    const BUFFER: u64 = 0x7300;
    // Makes a buffer available to the entropy device, rings, and waits for it: twice.
    let code = bare_machine::program(|a| {
        for round in 1..=2u32 {
            let mut wait = a.create_label();
            bare_machine::await_flag(a)?;
            a.mov(qword_ptr(bare_machine::FLAG), 0)?;
            a.mov(word_ptr(AVAILABLE + 2), round)?;
            a.mov(rbx, 0xd000_1050u64)?;
            a.mov(dword_ptr(rbx), 0)?;
            a.set_label(&mut wait)?;
            a.cmp(word_ptr(USED + 2), round)?;
            a.jne(wait)?;
            bare_machine::say(a, b'0' + round as u8)?;
        }
        Ok(())
    });
    let (mut state, ram) = bare_machine::fresh(&code);
    map_devices(&ram);
    state.cpu_profile = kvm.cpu_profile().to_owned();
    // Acknowledged, driver, features agreed, ready; a queue of eight.
    let entropy = &mut state.virtio[1];
    (entropy.status, entropy.active, entropy.accepted) = (15, true, 1 << 32);
    let queue = &mut entropy.queues[0];
    (queue.size, queue.ready) = (8, true);
    (queue.descriptors, queue.driver, queue.device) = (DESCRIPTORS, AVAILABLE, USED);
    // 32 bytes for the device to write.
    ram.store(DESCRIPTORS, BUFFER).unwrap();
    ram.store(DESCRIPTORS + 8, 32u64 | 2 << 32).unwrap();
    let mut machine = machine(&kvm, &state, ram).await;
    bare_machine::set_flag(&machine);
    bare_machine::heard(&machine, "1").await;
    let first = [0, 8, 16, 24].map(|at| machine.memory().load::<u64>(BUFFER + at).unwrap());
    assert_ne!(first, [0; 4]);
    // A pause holds the device's thread; afterwards it hears the guest again.
    machine.pause().await.unwrap();
    machine.resume();
    bare_machine::set_flag(&machine);
    bare_machine::heard(&machine, "12").await;
    assert_ne!([0, 8, 16, 24].map(|at| machine.memory().load::<u64>(BUFFER + at).unwrap()), first);
    machine.stop();
    machine.ended().await;
}

#[tokio::test]
async fn a_whole_machine_pauses_and_goes_on_in_another() {
    let Some(kvm) = engine("a_whole_machine_pauses_and_goes_on_in_another") else { return };
    let code = bare_machine::program(|a| {
        bare_machine::say(a, b'a')?;
        // A ring for a device that no driver has started: of no consequence.
        a.mov(rbx, 0xd000_0050u64)?;
        a.mov(dword_ptr(rbx), 0)?;
        bare_machine::await_flag(a)?;
        bare_machine::say(a, b'b')
    });
    let (mut state, ram) = bare_machine::fresh(&code);
    let refused = Machine::restore(&kvm, &state, bare_machine::fresh(&code).1, &[]).await;
    assert_eq!(refused.is_ok(), state.cpu_profile == kvm.cpu_profile());
    drop(refused);
    state.cpu_profile = kvm.cpu_profile().to_owned();
    map_devices(&ram);
    let mut first = machine(&kvm, &state, ram).await;
    bare_machine::heard(&first, "a").await;
    for _ in 0..20 {
        first.pause().await.unwrap();
        first.resume();
    }
    first.pause().await.unwrap();
    let saved = first.save().await.unwrap();
    assert_eq!(first.save().await.unwrap(), saved);
    let second = machine(&kvm, &saved, bare_machine::copy(&first)).await;
    bare_machine::set_flag(&second);
    bare_machine::heard(&second, "b").await;
    first.resume();
    bare_machine::set_flag(&first);
    bare_machine::heard(&first, "b").await;
    first.stop();
    first.ended().await;
}
