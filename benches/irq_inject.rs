//! From a device's interrupt line to the first access of the guest's handler.
//!
//! `cargo bench --bench irq_inject`. Per engine, to a guest that spins and to one in HLT; the yardstick is a parked
//! thread of the host. Then the ways that KVM has, by hand, and what each call takes alone.

#[path = "../tests/support/bare.rs"]
mod bare;
mod engines;
mod support;

use std::thread;
use std::time::Duration;
use std::time::Instant;

use kiln::units::Gsi;

use crate::engines::LINE;
use crate::engines::PAUSE;
use crate::engines::Running;
use crate::support::Sample;

const ROUNDS: usize = 300;
const DEADLINE: Duration = Duration::from_secs(10);

fn main() {
    for (name, engine) in engines::engines() {
        for (state, spinning) in [("spinning", true), ("halted", false)] {
            let guest = Running::start(&*engine, &engines::interrupted(spinning));
            guest.said.recv_timeout(DEADLINE).expect("the guest starts");
            let line = guest.vm.irq_line(Gsi(LINE)).expect("a line");
            let mut subject = Sample::new(format!("kiln, {name}, {state}"));
            for _ in 0..ROUNDS {
                thread::sleep(PAUSE);
                let began = Instant::now();
                line.raise();
                let heard = guest.said.recv_timeout(DEADLINE).expect("the handler runs");
                subject.add(heard.saturating_duration_since(began));
            }
            support::report("irq_inject", &subject, &[engines::unpark(ROUNDS)]);
        }
    }
    by_hand();
    support::note_load();
}

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
fn by_hand() {
    use crate::engines::raw_irq::Interruptible;
    use crate::engines::raw_kvm::Controllers;

    type Raise = fn(&Interruptible);
    let ways: [(_, _, Raise); 4] = [
        ("an irqfd to a local APIC", Controllers::Local, Interruptible::by_irqfd),
        ("KVM_SIGNAL_MSI", Controllers::Local, Interruptible::by_message),
        ("KVM_IRQ_LINE to a pin", Controllers::All, Interruptible::by_line),
        ("an irqfd to a pin", Controllers::All, Interruptible::by_irqfd),
    ];
    let mut samples = Vec::new();
    for (name, controllers, raise) in ways {
        let Some(guest) = Interruptible::start(&engines::interrupted(false), controllers) else { return };
        guest.said.recv_timeout(DEADLINE).expect("the guest starts");
        let (mut arrives, mut call) = (Sample::new(name), Sample::new(format!("{name}: call")));
        for _ in 0..ROUNDS {
            thread::sleep(PAUSE);
            let began = Instant::now();
            raise(&guest);
            call.add(began.elapsed());
            let heard = guest.said.recv_timeout(DEADLINE).expect("the handler runs");
            arrives.add(heard.saturating_duration_since(began));
        }
        samples.extend([arrives, call]);
    }
    support::report_tail("irq_inject by hand, to a guest in HLT", &samples.iter().collect::<Vec<_>>());
}

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
fn by_hand() {}
