//! From a device's interrupt line to the first access of the guest's handler.
//!
//! `cargo bench --bench irq_inject`. Per engine, to a guest that spins and to one in HLT; the yardstick is a parked
//! thread of the host.

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
    support::note_load();
}
