//! The OS thread that a vCPU lives on.
//!
//! ```text
//!   spawn -> bind, restore -> run -+-> Shutdown, an error, a panic --> end
//!                              ^   |
//!                              |   +-> Kicked: stop asked? yes ------> end (Stopped)
//!                              +--------------------------- no
//! ```
//!
//! The thread reports how it ended exactly once, whatever happened to it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use crate::hv::Exit;
use crate::hv::HvError;
use crate::hv::IoHandler;
use crate::hv::Kick;
use crate::hv::VcpuSeed;
use crate::hv::state::VcpuState;
use crate::units::VcpuId;

/// The soft engine's handlers call one another up to some two thousand deep where the optimiser does not turn the calls
/// into jumps, in an unoptimised build that is. Only what is touched costs memory.
const STACK_BYTES: usize = 8 << 20;

/// How a vCPU's life ended.
#[derive(Debug)]
pub(super) enum VcpuEnd {
    /// The guest shut down: a triple fault.
    Shutdown,
    /// It was asked to stop.
    Stopped,
    /// The engine failed.
    Failed(HvError),
    /// The engine panicked: a defect in it.
    Panicked,
}

/// A handle to the thread. Dropping it does not stop the vCPU.
#[derive(Debug)]
pub(super) struct VcpuThread {
    kick: Arc<dyn Kick>,
    stop: Arc<AtomicBool>,
}

impl VcpuThread {
    /// Starts a thread on which `seed` runs from `state` on; `ended` is called on it, last of all.
    pub(super) fn spawn(
        id: VcpuId,
        seed: Box<dyn VcpuSeed>,
        io: Box<dyn IoHandler + Send>,
        state: VcpuState,
        ended: impl FnOnce(VcpuEnd) + Send + 'static,
    ) -> io::Result<Self> {
        let kick = seed.kicker();
        let stop = Arc::new(AtomicBool::new(false));
        let asked = Arc::clone(&stop);
        let thread = thread::Builder::new().name(format!("vcpu-{}", id.0)).stack_size(STACK_BYTES);
        thread.spawn(move || {
            let report = Report(Some(ended));
            let end = run(seed, io, &state, &asked);
            report.send(end);
        })?;
        Ok(Self { kick, stop })
    }

    /// Asks the vCPU to stop; returns at once.
    pub(super) fn stop(&self) {
        // Release, paired with the Acquire in `run`: the kick that follows must find the flag set.
        self.stop.store(true, Ordering::Release);
        self.kick.kick();
    }
}

fn run(seed: Box<dyn VcpuSeed>, io: Box<dyn IoHandler>, state: &VcpuState, stop: &AtomicBool) -> VcpuEnd {
    let started = seed.bind(io).and_then(|mut vcpu| vcpu.restore(state).map(|()| vcpu));
    let mut vcpu = match started {
        Ok(vcpu) => vcpu,
        Err(error) => return VcpuEnd::Failed(error),
    };
    loop {
        match vcpu.run() {
            Ok(Exit::Shutdown) => return VcpuEnd::Shutdown,
            Ok(Exit::Kicked) if stop.load(Ordering::Acquire) => return VcpuEnd::Stopped,
            Ok(Exit::Kicked) => {}
            Err(error) => return VcpuEnd::Failed(error),
        }
    }
}

/// Sends the end when told to, or `Panicked` when an unwinding thread drops it.
struct Report<F: FnOnce(VcpuEnd)>(Option<F>);

impl<F: FnOnce(VcpuEnd)> Report<F> {
    fn send(mut self, end: VcpuEnd) {
        if let Some(ended) = self.0.take() {
            ended(end);
        }
    }
}

impl<F: FnOnce(VcpuEnd)> Drop for Report<F> {
    fn drop(&mut self) {
        if let Some(ended) = self.0.take() {
            ended(VcpuEnd::Panicked);
        }
    }
}
