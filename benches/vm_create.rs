//! From nothing to a guest's first instruction, and back: a machine with one vCPU and 64 MiB of memory.
//!
//! `cargo bench --bench vm_create`. Per engine; the yardstick is the kernel's interface by hand, whose calls are also
//! listed one by one.

#[path = "../tests/support/bare.rs"]
mod bare;
mod engines;
mod support;

use std::time::Duration;
use std::time::Instant;

use kiln::engine::EngineFacts;
use kiln::hv::Hypervisor;

use crate::bare::Bare;
use crate::engines::leave;
use crate::engines::memory;
use crate::engines::program;
use crate::support::Sample;

const ROUNDS: usize = 100;

fn main() {
    probe();
    let code = program(leave);
    for (name, engine) in engines::engines() {
        let mut subject = Sample::new(format!("kiln, {name}"));
        let mut yardstick = Sample::new(yardstick::NAME);
        let by_hand = yardstick::Engine::open(&mut |_, _| {});
        for _ in 0..ROUNDS {
            subject.add(first_instruction(&*engine, &code));
            if let Some(time) = by_hand.as_ref().and_then(|engine| engine.first_instruction(&code, &mut |_, _| {})) {
                yardstick.add(time);
            }
        }
        support::report_or_alone("vm_create, to the first instruction", &subject, yardstick);
    }
    calls(&code);
    support::note_load();
}

/// What `Engine::Auto` and the doctor ask of the host, once in a process.
fn probe() {
    let began = Instant::now();
    EngineFacts::of_this_process();
    support::note(&format!("probing the host for engines: {:.1} ms", began.elapsed().as_secs_f64() * 1e3));
}

/// Memory is not counted: it is there before.
fn first_instruction(engine: &dyn Hypervisor, code: &[u8]) -> Duration {
    let ram = memory(code);
    let began = Instant::now();
    let mut guest = Bare::enter(engine, ram);
    guest.run().expect("the guest leaves");
    began.elapsed()
}

/// Each call to the kernel, in order, with the median of its time; at the end what a device adds to them.
fn calls(code: &[u8]) {
    let mut samples: Vec<Sample> = Vec::new();
    for _ in 0..ROUNDS {
        let mut n = 0;
        let mut step = |call, time| {
            if n == samples.len() {
                samples.push(Sample::new(call));
            }
            samples[n].add(time);
            n += 1;
        };
        let Some(engine) = yardstick::Engine::open(&mut step) else { return };
        engine.first_instruction(code, &mut step).expect("it has been run before");
        engine.add_device(&mut step).expect("the kernel takes a device's wires");
    }
    support::report_tail(
        "calls to the first instruction, and for a device, by hand",
        &samples.iter().collect::<Vec<_>>(),
    );
}

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod yardstick {
    use std::time::Duration;
    use std::time::Instant;

    use crate::engines::memory;
    use crate::engines::raw_kvm::Controllers;
    use crate::engines::raw_kvm::RawEngine;
    use crate::engines::raw_kvm::RawKvm;

    pub(crate) const NAME: &str = "the kernel's calls";

    pub(crate) struct Engine(RawEngine);

    impl Engine {
        pub(crate) fn open(step: &mut dyn FnMut(&'static str, Duration)) -> Option<Self> {
            RawEngine::new(step).ok().map(Self)
        }

        pub(crate) fn first_instruction(
            &self,
            code: &[u8],
            step: &mut dyn FnMut(&'static str, Duration),
        ) -> Option<Duration> {
            let ram = memory(code);
            let began = Instant::now();
            let mut machine = RawKvm::new(&self.0, ram, Controllers::Local, step).ok()?;
            let entered = Instant::now();
            machine.run().ok()?;
            step("KVM_RUN", entered.elapsed());
            Some(began.elapsed())
        }

        /// What a device adds. Of a machine of its own: one that has any is slow to go, which the next one would pay for.
        pub(crate) fn add_device(&self, step: &mut dyn FnMut(&'static str, Duration)) -> Option<()> {
            let machine = RawKvm::new(&self.0, memory(&[]), Controllers::Local, &mut |_, _| {}).ok()?;
            machine.add_device(step).ok()
        }
    }
}

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
mod yardstick {
    use std::time::Duration;

    pub(crate) const NAME: &str = "none on this host";

    pub(crate) enum Engine {}

    impl Engine {
        pub(crate) fn open(_: &mut dyn FnMut(&'static str, Duration)) -> Option<Self> {
            None
        }

        pub(crate) fn first_instruction(
            &self,
            _: &[u8],
            _: &mut dyn FnMut(&'static str, Duration),
        ) -> Option<Duration> {
            match *self {}
        }

        pub(crate) fn add_device(&self, _: &mut dyn FnMut(&'static str, Duration)) -> Option<()> {
            match *self {}
        }
    }
}
