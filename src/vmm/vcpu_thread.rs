//! The OS thread that a vCPU lives on.
//!
//! ```text
//!   spawn -> bind, restore -> may run? -- stop asked -----------------------> end (Stopped)
//!                              ^  |  \--- pause asked: wait, save if asked --+
//!                              |  |  ^---------------------------------------+
//!                              |  v
//!                              | run -+-> Shutdown, an error, a panic ------> end
//!                              +------+ Kicked
//! ```
//!
//! What is asked for is a [`Wanted`] behind a mutex that is held for a moment only; what became of it is a [`Phase`]
//! that async code can wait for. The thread reports how it ended exactly once, whatever happened to it.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use tokio::sync::oneshot;
use tokio::sync::watch;

use crate::hv::Exit;
use crate::hv::HvError;
use crate::hv::IoHandler;
use crate::hv::Kick;
use crate::hv::Vcpu;
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

/// Where the thread is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Phase {
    /// Not in guest code yet.
    #[default]
    Starting,
    /// In guest code, or about to be.
    Running,
    /// Between two instructions, and stays there.
    Paused,
    /// Over.
    Ended,
}

/// What others want of the thread.
#[derive(Debug, Default)]
struct Wanted {
    stop: bool,
    paused: bool,
    /// Where the state goes; taken up while paused.
    save: Option<oneshot::Sender<Result<VcpuState, HvError>>>,
}

#[derive(Debug, Default)]
struct Control {
    wanted: Mutex<Wanted>,
    changed: Condvar,
    phase: watch::Sender<Phase>,
}

impl Control {
    fn lock(&self) -> MutexGuard<'_, Wanted> {
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes what is wanted, and wakes the thread if it waits.
    fn want(&self, change: impl FnOnce(&mut Wanted)) {
        change(&mut self.lock());
        self.changed.notify_one();
    }

    fn enter(&self, phase: Phase) {
        self.phase.send_if_modified(|now| std::mem::replace(now, phase) != phase);
    }

    /// On the vCPU's thread, between two runs: waits for as long as a pause is wanted; false when it shall end.
    fn may_run(&self, vcpu: &mut dyn Vcpu) -> bool {
        let mut wanted = self.lock();
        loop {
            if wanted.stop {
                return false;
            }
            if !wanted.paused {
                // Under the lock, so that a pause that is asked for next finds the phase that it must wait out.
                self.enter(Phase::Running);
                return true;
            }
            self.enter(Phase::Paused);
            let Some(reply) = wanted.save.take() else {
                wanted = self.changed.wait(wanted).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            drop(wanted);
            // Whoever asked may have given up.
            let _ = reply.send(vcpu.save());
            wanted = self.lock();
        }
    }
}

/// The thread is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ended;

/// A handle to the thread. Dropping it does not stop the vCPU.
#[derive(Clone, Debug)]
pub(super) struct VcpuThread {
    kick: Arc<dyn Kick>,
    control: Arc<Control>,
}

impl VcpuThread {
    /// Starts a thread on which `seed` runs from `state` on, at once or paused; `ended` is called on it, last of all.
    pub(super) fn spawn(
        id: VcpuId,
        seed: Box<dyn VcpuSeed>,
        io: Box<dyn IoHandler + Send>,
        state: VcpuState,
        paused: bool,
        ended: impl FnOnce(VcpuEnd) + Send + 'static,
    ) -> io::Result<Self> {
        let kick = seed.kicker();
        let control = Arc::new(Control::default());
        control.lock().paused = paused;
        let own = Arc::clone(&control);
        let thread = thread::Builder::new().name(format!("vcpu-{}", id.0)).stack_size(STACK_BYTES);
        thread.spawn(move || {
            // Dropped after the report, also when unwinding: who sees the phase finds the report there.
            let over = Over(own);
            let report = Report(Some(ended));
            let end = run(seed, io, &state, &over.0);
            report.send(end);
        })?;
        Ok(Self { kick, control })
    }

    /// Asks the vCPU to stop, also when it is paused; returns at once.
    pub(super) fn stop(&self) {
        self.control.want(|wanted| wanted.stop = true);
        self.kick.kick();
    }

    /// Asks the vCPU to pause; returns at once.
    pub(super) fn ask_to_pause(&self) {
        self.control.want(|wanted| wanted.paused = true);
        self.kick.kick();
    }

    /// Waits until a vCPU that was asked to pause has.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub(super) async fn at_rest(&self) -> Result<(), Ended> {
        let mut phase = self.control.phase.subscribe();
        // The sender lives in `self`, so waiting cannot fail.
        let reached = phase.wait_for(|phase| matches!(phase, Phase::Paused | Phase::Ended)).await;
        if reached.is_ok_and(|phase| *phase == Phase::Paused) { Ok(()) } else { Err(Ended) }
    }

    /// Lets a paused vCPU go on; returns at once.
    pub(super) fn resume(&self) {
        self.control.want(|wanted| wanted.paused = false);
    }

    /// The state of a vCPU that is paused.
    ///
    /// # Cancel safety
    /// Cancel safe: nothing changes.
    pub(super) async fn save(&self) -> Result<Result<VcpuState, HvError>, Ended> {
        let (reply, state) = oneshot::channel();
        self.control.want(|wanted| wanted.save = Some(reply));
        let mut phase = self.control.phase.subscribe();
        tokio::select! {
            state = state => state.map_err(|_| Ended),
            // An ended thread answers nobody.
            _ = phase.wait_for(|phase| *phase == Phase::Ended) => Err(Ended),
        }
    }
}

fn run(seed: Box<dyn VcpuSeed>, io: Box<dyn IoHandler>, state: &VcpuState, control: &Control) -> VcpuEnd {
    let started = seed.bind(io).and_then(|mut vcpu| vcpu.restore(state).map(|()| vcpu));
    let mut vcpu = match started {
        Ok(vcpu) => vcpu,
        Err(error) => return VcpuEnd::Failed(error),
    };
    while control.may_run(&mut *vcpu) {
        match vcpu.run() {
            Ok(Exit::Shutdown) => return VcpuEnd::Shutdown,
            Ok(Exit::Kicked) => {}
            Err(error) => return VcpuEnd::Failed(error),
        }
    }
    VcpuEnd::Stopped
}

/// Says that the thread is over when it drops this.
struct Over(Arc<Control>);

impl Drop for Over {
    fn drop(&mut self) {
        self.0.enter(Phase::Ended);
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
