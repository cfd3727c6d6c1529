//! From a kick to the end of the vCPU's run.
//!
//! `cargo bench --bench vcpu_kick`. Per engine, of a guest that spins with interrupts off and of one that halts for ever;
//! the yardstick is a parked thread of the host.

#[path = "../tests/support/bare.rs"]
mod bare;
mod engines;
mod support;

use std::thread;
use std::time::Duration;
use std::time::Instant;

use crate::engines::PAUSE;
use crate::engines::Running;
use crate::support::Sample;

const ROUNDS: usize = 300;
const DEADLINE: Duration = Duration::from_secs(10);

fn main() {
    for (name, engine) in engines::engines() {
        for (state, spinning) in [("spinning", true), ("halted", false)] {
            let guest = Running::start(&*engine, &wedged(spinning));
            let mut subject = Sample::new(format!("kiln, {name}, {state}"));
            for _ in 0..ROUNDS {
                thread::sleep(PAUSE);
                let began = Instant::now();
                guest.kick.kick();
                let stopped = guest.stopped.recv_timeout(DEADLINE).expect("the run ends");
                subject.add(stopped.saturating_duration_since(began));
                guest.again();
            }
            support::report("vcpu_kick", &subject, &[engines::unpark(ROUNDS)]);
        }
    }
    support::note_load();
}

fn wedged(spinning: bool) -> Vec<u8> {
    engines::program(|a| {
        let mut wait = a.create_label();
        a.cli()?;
        a.set_label(&mut wait)?;
        if !spinning {
            a.hlt()?;
        }
        a.jmp(wait)
    })
}
