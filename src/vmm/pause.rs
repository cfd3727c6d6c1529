//! Pausing a machine and letting it go on; its state, and a machine made from one.
//!
//! ```text
//!   running --pause: devices quiet, then vCPUs between instructions, then time stands still--> paused
//!      ^                                                                                           |  ^
//!      +------------- resume: time, vCPUs, devices -------------------------------------------------+  |
//!                                            save: a MachineState, the machine stays as it is <----+  |
//!                                            restore: a machine made from one ------------------------+
//! ```
//!
//! Devices come first: an interrupt that one of them raises while it finishes is then in a vCPU's or the
//! controller's state when those are taken; so is one that a vCPU sends to another, since all have come to rest before any
//! is saved. They are let go last: an interrupt needs the controllers' state in place.
//!
//! **Time.** The guest's clocks stand still from pause to resume and from save to restore: the time stamp counter and
//! CLOCK_MONOTONIC go on from the same value, an armed timer keeps the time that it had left. The guest's time of day
//! is late by as much afterwards; that is its agent's to set.

use std::num::NonZeroU8;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use super::Machine;
use super::MachineEnd;
use super::boot::layout::MAX_VCPUS;
use super::machine::Parts;
use super::machine::virtio_devices;
use super::state::MACHINE_STATE_VERSION;
use super::state::MachineState;
use super::state::PauseError;
use super::state::RestoreError;
use super::state::SaveError;
use super::vcpu_thread::Ended;
use crate::block::BlockBackend;
use crate::hv::Hypervisor;
use crate::hv::TimeStamp;
use crate::mem::GuestRam;
use crate::units::GuestTime;

/// A vCPU comes to rest in microseconds and a device in the time that one request takes; this is for a host that hangs.
const PAUSE_TIMEOUT: Duration = Duration::from_secs(10);
/// Two clocks read within this time are read at once (20 us)...
const GUEST_TIME_CLOSE: Duration = Duration::from_micros(20);
/// ...and so often is it tried.
const GUEST_TIME_ATTEMPTS: u32 = 5;

impl Machine {
    /// Brings the machine to rest: its processors each between two instructions, its devices between two requests, its time
    /// standing still. Of no effect when it is paused already. A paused machine can be stopped.
    ///
    /// Streams into the guest stay open and move nothing.
    ///
    /// # Errors
    /// [`PauseError`]; the machine then runs on, if it has not ended.
    ///
    /// # Cancel safety
    /// Cancelled, the machine runs on.
    ///
    /// # Examples
    /// ```no_run
    /// # async fn f(mut machine: kiln::vmm::Machine) -> Result<(), Box<dyn std::error::Error>> {
    /// machine.pause().await?;
    /// let state = machine.save().await?;
    /// machine.resume();
    /// # Ok(()) }
    /// ```
    pub async fn pause(&mut self) -> Result<(), PauseError> {
        if self.paused {
            return Ok(());
        }
        let attempt = Attempt { machine: self, done: false };
        match tokio::time::timeout(PAUSE_TIMEOUT, attempt.machine.come_to_rest()).await {
            Ok(Ok(())) => attempt.succeed(),
            Ok(Err(Ended)) => return Err(PauseError::Ended),
            Err(_) => return Err(PauseError::TimedOut { after: PAUSE_TIMEOUT }),
        }
        self.vm.stop_time();
        self.paused = true;
        Ok(())
    }

    /// Lets a paused machine go on from where it is. Of no effect on one that runs. Returns at once.
    pub fn resume(&mut self) {
        if std::mem::take(&mut self.paused) {
            self.vm.start_time();
            self.let_go();
        }
    }

    /// Whether the machine is paused.
    #[must_use]
    pub fn is_paused(&self) -> bool {
        self.paused
    }

    /// Now, by the host's clock and by the guest's time stamp counter; `None` when the engine cannot tell. In a paused
    /// machine the counter stands still.
    #[must_use]
    pub fn guest_time(&self) -> Option<GuestTime> {
        let mut best: Option<(Duration, GuestTime)> = None;
        // Between the two readings this thread may lose its processor; the closest pair counts.
        for _ in 0..GUEST_TIME_ATTEMPTS {
            let (began, at) = (Instant::now(), SystemTime::now());
            let TimeStamp { ticks, hz } = self.vm.time_stamp()?;
            let apart = began.elapsed();
            if best.is_none_or(|(least, _)| apart < least) {
                best = Some((apart, GuestTime { at, ticks, hz }));
            }
            if apart < GUEST_TIME_CLOSE {
                break;
            }
        }
        best.map(|(_, time)| time)
    }

    /// The state of a paused machine; its memory is [`Machine::memory`]'s. The machine does not change.
    ///
    /// # Errors
    /// [`SaveError`], when the machine is not paused or has been stopped.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn save(&self) -> Result<MachineState, SaveError> {
        if !self.paused {
            return Err(SaveError::NotPaused);
        }
        let vcpus = self.crew.save().await.map_err(|Ended| SaveError::Ended)??;
        let (serial, virtio) = self.board.save();
        Ok(MachineState {
            version: MACHINE_STATE_VERSION,
            cpu_profile: self.cpu_profile.clone(),
            memory: self.ram.size(),
            vcpus,
            irqchip: self.vm.save_irqchip()?,
            serial,
            virtio,
        })
    }

    /// A machine that goes on from `state`, with the memory that the state was saved with and the same disks; paused
    /// until [`Machine::resume`].
    ///
    /// The guest hears that its socket connections are gone, before it hears of new ones. Nothing of the memory is
    /// read here. A state from a stranger is checked: what it makes the guest do is the guest's matter, as ever.
    ///
    /// # Errors
    /// [`RestoreError`]; nothing is left running then.
    ///
    /// # Cancel safety
    /// Cancelled, nothing is left running.
    pub async fn restore(
        engine: &dyn Hypervisor,
        state: &MachineState,
        memory: GuestRam,
        disks: &[Arc<dyn BlockBackend>],
    ) -> Result<Self, RestoreError> {
        let vcpus = check(engine, state, &memory)?;
        let memory = Arc::new(memory);
        let (devices, host) = virtio_devices(disks, &memory);
        if devices.len() != state.virtio.len() {
            return Err(RestoreError::Devices { wanted: state.virtio.len(), given: devices.len() });
        }
        let mut parts = Parts::build(engine, vcpus, memory, devices, host, true)?;
        parts.vm.stop_time();
        parts.board.restore(state)?;
        let machine = parts.run(state.vcpus.clone(), true)?;
        if let Err(Ended) = machine.crew.pause().await {
            return Err(match machine.ended().await {
                MachineEnd::Failed(error) => RestoreError::Vcpu(error),
                _ => RestoreError::EnginePanicked,
            });
        }
        // The vCPUs have their states, and the devices are still held.
        machine.vm.restore_irqchip(&state.irqchip).map_err(|error| RestoreError::Machine(error.into()))?;
        Ok(machine)
    }

    async fn come_to_rest(&self) -> Result<(), Ended> {
        self.board.hold();
        self.board.quiet().await;
        self.crew.pause().await
    }

    fn let_go(&self) {
        self.crew.resume();
        self.board.release();
    }
}

/// Lets the machine go on unless the attempt to pause it succeeds.
struct Attempt<'a> {
    machine: &'a Machine,
    done: bool,
}

impl Attempt<'_> {
    fn succeed(mut self) {
        self.done = true;
    }
}

impl Drop for Attempt<'_> {
    fn drop(&mut self) {
        if !self.done {
            self.machine.let_go();
        }
    }
}

/// The number of the state's processors, when engine and memory are those that it was saved with.
fn check(engine: &dyn Hypervisor, state: &MachineState, memory: &GuestRam) -> Result<NonZeroU8, RestoreError> {
    if state.version != MACHINE_STATE_VERSION {
        return Err(RestoreError::Version { found: state.version });
    }
    if state.cpu_profile != engine.cpu_profile() {
        let offered = engine.cpu_profile().to_owned();
        return Err(RestoreError::CpuProfile { found: state.cpu_profile.clone(), offered });
    }
    if state.memory != memory.size() {
        return Err(RestoreError::Memory { wanted: state.memory, given: memory.size() });
    }
    let found = state.vcpus.len();
    let vcpus = u8::try_from(found).ok().filter(|vcpus| *vcpus <= MAX_VCPUS).and_then(NonZeroU8::new);
    let vcpus = vcpus.ok_or(RestoreError::Vcpus { found })?;
    for (vcpu, state) in (0..).zip(&state.vcpus) {
        if state.lapic.id != vcpu {
            return Err(RestoreError::ApicId { vcpu, found: state.lapic.id });
        }
    }
    Ok(vcpus)
}
