//! From a device's interrupt line to the first access of the guest's handler.
//!
//! `cargo bench --bench irq_inject`. Per engine, to a guest that spins and to one in HLT; the yardstick is a parked
//! thread of the host. Then the two ways that KVM has, by hand: KVM_IRQ_LINE and an irqfd, and what each call takes alone.

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

    type Raise = fn(&Interruptible);
    let ways: [(_, Raise); 2] =
        [("KVM_IRQ_LINE, by hand", Interruptible::by_line), ("an irqfd, by hand", Interruptible::by_irqfd)];
    let Some(guest) = Interruptible::start(&engines::interrupted(false)) else { return };
    guest.said.recv_timeout(DEADLINE).expect("the guest starts");
    let measured = ways.map(|(name, raise)| {
        let (mut arrives, mut call) = (Sample::new(name), Sample::new(format!("{name}: call")));
        for _ in 0..ROUNDS {
            thread::sleep(PAUSE);
            let began = Instant::now();
            raise(&guest);
            call.add(began.elapsed());
            let heard = guest.said.recv_timeout(DEADLINE).expect("the handler runs");
            arrives.add(heard.saturating_duration_since(began));
        }
        (arrives, call)
    });
    let samples: Vec<_> = measured.iter().flat_map(|(arrives, call)| [arrives, call]).collect();
    support::report_tail("irq_inject, to a guest in HLT", &samples);
}

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
fn by_hand() {}
