//! The vCPU threads of a machine: asked for something together, and at their end together.
//!
//! The first vCPU that ends, ends the machine: the others are stopped. How it ended is told once the last thread is about
//! to be over, so that nobody who has heard of the end finds a vCPU still running.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::bus::Buses;
use super::machine::MachineError;
use super::vcpu_thread::Ended;
use super::vcpu_thread::VcpuEnd;
use super::vcpu_thread::VcpuThread;
use crate::hv::HvError;
use crate::hv::HvVm;
use crate::hv::state::VcpuState;
use crate::units::VcpuId;

/// How the machine ends.
struct Ending {
    /// Of the vCPU that was first.
    first: Option<VcpuEnd>,
    /// Threads that have not reported.
    left: usize,
    /// Those that were started, to be stopped.
    started: Vec<VcpuThread>,
    report: Option<Box<dyn FnOnce(VcpuEnd) + Send>>,
}

#[derive(Clone)]
struct Shared(Arc<Mutex<Ending>>);

impl Shared {
    fn new(vcpus: usize, report: impl FnOnce(VcpuEnd) + Send + 'static) -> Self {
        let ending = Ending { first: None, left: vcpus, started: Vec::new(), report: Some(Box::new(report)) };
        Self(Arc::new(Mutex::new(ending)))
    }

    fn lock(&self) -> MutexGuard<'_, Ending> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One more thread; it is stopped if another has ended already.
    fn started(&self, thread: VcpuThread) {
        let mut ending = self.lock();
        if ending.first.is_some() {
            thread.stop();
        }
        ending.started.push(thread);
    }

    /// On a thread, as the last that it does.
    fn ended(&self, end: VcpuEnd) {
        let mut ending = self.lock();
        if ending.first.is_none() {
            ending.first = Some(end);
            ending.started.iter().for_each(VcpuThread::stop);
        }
        ending.left -= 1;
        if ending.left > 0 {
            return;
        }
        let (first, report) = (ending.first.take(), ending.report.take());
        drop(ending);
        if let Some((end, report)) = first.zip(report) {
            report(end);
        }
    }
}

/// Handles to the threads, in the order of the vCPUs' ids. Dropping them does not stop the vCPUs.
#[derive(Debug)]
pub(super) struct Crew {
    threads: Vec<VcpuThread>,
}

impl Crew {
    /// Starts a thread for each of `states`, on which a vCPU of `vm` begins in it, at once or paused. `ended` is told how
    /// the first of them ended, once none runs any more.
    ///
    /// # Errors
    /// [`MachineError`]; those that were started are stopped then, and `ended` may not be called.
    pub(super) fn spawn(
        vm: &dyn HvVm,
        io: &Buses,
        states: Vec<VcpuState>,
        paused: bool,
        ended: impl FnOnce(VcpuEnd) + Send + 'static,
    ) -> Result<Self, MachineError> {
        let ids = || (0..=u8::MAX).map(VcpuId);
        let seeds: Result<Vec<_>, HvError> = ids().zip(&states).map(|(id, _)| vm.create_vcpu(id)).collect();
        let shared = Shared::new(states.len(), ended);
        let mut threads = Vec::new();
        for ((id, seed), state) in ids().zip(seeds?).zip(states) {
            let own = shared.clone();
            match VcpuThread::spawn(id, seed, Box::new(io.clone()), state, paused, move |end| own.ended(end)) {
                Ok(thread) => {
                    shared.started(thread.clone());
                    threads.push(thread);
                }
                Err(source) => {
                    threads.iter().for_each(VcpuThread::stop);
                    return Err(MachineError::Host { what: "thread", source });
                }
            }
        }
        Ok(Self { threads })
    }

    /// Asks all to stop, also when they are paused; returns at once.
    pub(super) fn stop(&self) {
        self.threads.iter().for_each(VcpuThread::stop);
    }

    /// Asks all to pause, and waits until the last of them has.
    ///
    /// # Cancel safety
    /// The pause stays asked for.
    pub(super) async fn pause(&self) -> Result<(), Ended> {
        // All first: one that waits for another, which is paused already, must not spin for long.
        self.threads.iter().for_each(VcpuThread::ask_to_pause);
        for thread in &self.threads {
            thread.at_rest().await?;
        }
        Ok(())
    }

    /// Lets paused vCPUs go on; returns at once.
    pub(super) fn resume(&self) {
        self.threads.iter().for_each(VcpuThread::resume);
    }

    /// The states of vCPUs that are paused.
    ///
    /// # Cancel safety
    /// Cancel safe: nothing changes.
    pub(super) async fn save(&self) -> Result<Result<Vec<VcpuState>, HvError>, Ended> {
        let mut states = Vec::new();
        for thread in &self.threads {
            match thread.save().await? {
                Ok(state) => states.push(state),
                Err(error) => return Ok(Err(error)),
            }
        }
        Ok(Ok(states))
    }
}
