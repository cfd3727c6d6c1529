//! Kicks, whenever they come.

use std::num::NonZeroU8;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use kiln::hv::state::VcpuState;
use kiln::hv::state::x86_64::Activity;
use kiln::hv::{Exit, Hypervisor, VmSpec};
use kiln::units::VcpuId;

use crate::bare;
use crate::bare::CODE;
use crate::rig::{Guest, Recorder, SPIN, engine, memory};

#[test]
fn early_kicks_are_remembered_once() {
    let Some(kvm) = engine("early_kicks_are_remembered_once") else { return };
    let ram = memory(&SPIN);
    let vm = kvm.create_vm(&VmSpec { vcpus: NonZeroU8::MIN }, ram).unwrap();
    let seed = vm.create_vcpu(VcpuId(0)).unwrap();
    let kick = seed.kicker();
    kick.kick();
    kick.kick();
    let mut vcpu = seed.bind(Box::new(Recorder::default())).unwrap();
    vcpu.restore(&bare::initial_state()).unwrap();
    assert_eq!(vcpu.run().unwrap(), Exit::Kicked);
    kick.kick();
    assert_eq!(vcpu.run().unwrap(), Exit::Kicked, "between two runs");
    let began = Instant::now();
    let late = Arc::clone(&kick);
    thread::spawn(move || {
        thread::sleep(Duration::from_millis(20));
        late.kick();
    });
    assert_eq!(vcpu.run().unwrap(), Exit::Kicked);
    assert!(began.elapsed() >= Duration::from_millis(20), "a kick that was served came again");
    drop(vcpu);
    kick.kick();
}

#[test]
fn no_kick_is_lost_whenever_it_comes() {
    let Some(kvm) = engine("no_kick_is_lost_whenever_it_comes") else { return };
    for (code, rounds) in [(&SPIN[..], 2_000), (&[0xf4, 0xeb, 0xfd][..], 2_000)] {
        let mut guest = Guest::new(&kvm, code);
        let kick = Arc::clone(&guest.kick);
        let (asked, ask) = mpsc::channel();
        let kicker = thread::spawn(move || {
            // Each round asks for one kick; a lost one would leave the vCPU in the guest for ever.
            for (round, ()) in ask.iter().enumerate() {
                (0..round % 97 * 20).for_each(|_| std::hint::spin_loop());
                kick.kick();
            }
        });
        for _ in 0..rounds {
            asked.send(()).unwrap();
            assert_eq!(guest.vcpu.run().unwrap(), Exit::Kicked);
        }
        drop(asked);
        kicker.join().unwrap();
        let at = guest.vcpu.save().unwrap().rip;
        assert!((CODE..CODE + 3).contains(&at), "{at:#x}");
    }
}

#[test]
fn a_vcpu_that_waits_to_be_called_can_be_kicked() {
    let Some(kvm) = engine("a_vcpu_that_waits_to_be_called_can_be_kicked") else { return };
    for activity in [Activity::WaitsForInit, Activity::WaitsForStartUp] {
        let state = VcpuState { activity, ..bare::initial_state() };
        let mut guest = Guest::on(&kvm, memory(&SPIN), 1, &state);
        for _ in 0..3 {
            assert_eq!(guest.run_for(Duration::from_millis(5)), Exit::Kicked);
        }
        let saved = guest.vcpu.save().unwrap();
        assert_eq!((saved.activity, saved.rip), (activity, CODE));
    }
}
