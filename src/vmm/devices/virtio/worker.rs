//! The thread that does a device's work.

use std::fmt::Display;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Instant;

use super::DeviceQueue;
use super::DeviceState;
use super::Doorbell;
use super::Interrupt;
use super::Misfit;
use super::Progress;
use super::TransportState;
use super::VirtioDevice;
use super::doorbell::Wake;
use super::state::require;
use crate::mem::GuestRam;

/// A device and, once the driver is ready, its queues.
#[derive(Debug)]
pub(super) struct Core {
    pub(super) device: Box<dyn VirtioDevice>,
    queues: Option<Vec<DeviceQueue>>,
}

/// What the transport and the worker share.
#[derive(Debug)]
pub(super) struct Shared {
    // Held for one `process` at a time, which is bounded: a reset waits at most that long, and after
    // it no thread touches the old queues any more.
    core: Mutex<Core>,
    /// Whose turn at `core` is next. The worker takes `core` again as soon as it has let go of it, which a driver that
    /// keeps it busy makes it do for ever; a vCPU that waits here meanwhile gets it first.
    turn: Mutex<()>,
    pub(super) ram: Arc<GuestRam>,
    pub(super) interrupt: Arc<Interrupt>,
    pub(super) doorbell: Arc<Doorbell>,
    needs_reset: AtomicBool,
    /// The host was warned of this guest's driver.
    warned: AtomicBool,
}

impl Shared {
    pub(super) fn new(
        device: Box<dyn VirtioDevice>,
        ram: Arc<GuestRam>,
        interrupt: Interrupt,
        doorbell: Arc<Doorbell>,
    ) -> Self {
        let core = Mutex::new(Core { device, queues: None });
        Self {
            core,
            turn: Mutex::new(()),
            ram,
            interrupt: Arc::new(interrupt),
            doorbell,
            needs_reset: AtomicBool::new(false),
            warned: AtomicBool::new(false),
        }
    }

    pub(super) fn activate(&self, queues: Vec<DeviceQueue>) {
        self.lock().queues = Some(queues);
        self.doorbell.ring();
    }

    pub(super) fn reset(&self) {
        let mut core = self.lock();
        core.queues = None;
        core.device.reset();
        self.needs_reset.store(false, Ordering::Release);
        self.interrupt.acknowledge(u32::MAX);
    }

    /// The positions of the queues if the device has them, and what the device keeps. While the worker is quiet.
    pub(super) fn save(&self) -> (Option<Vec<(u16, u16)>>, DeviceState) {
        let core = self.lock();
        let positions = core.queues.as_ref().map(|queues| queues.iter().map(DeviceQueue::position).collect());
        (positions, core.device.save())
    }

    /// Goes on from a saved state, while the worker is quiet.
    pub(super) fn restore(&self, queues: Option<Vec<DeviceQueue>>, state: &TransportState) -> Result<(), Misfit> {
        let mut core = self.lock();
        require(core.device.restore(&state.device, queues.is_some()), "the state of another kind of device")?;
        core.queues = queues;
        self.needs_reset.store(state.needs_reset, Ordering::Release);
        self.interrupt.restore(state.interrupt);
        // Chains may wait that were made available before.
        self.doorbell.ring();
        Ok(())
    }

    pub(super) fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::Acquire)
    }

    /// Stops the device until the driver resets it, and tells the driver (section 2.1.2).
    pub(super) fn fail(&self) {
        self.stop(&mut self.lock());
    }

    /// Says that the driver did what none may: as a warning the first time, for a driver that goes on like that is not to
    /// fill the host's logs.
    pub(super) fn complain(&self, device: u32, what: &dyn Display) {
        if self.warned.swap(true, Ordering::Relaxed) {
            tracing::debug!(device, %what, "virtio device stopped until reset, again");
        } else {
            tracing::warn!(device, %what, "virtio device stopped until reset");
        }
    }

    fn stop(&self, core: &mut Core) {
        core.queues = None;
        // The backend learns at once that nothing will come any more.
        core.device.reset();
        self.needs_reset.store(true, Ordering::Release);
        self.interrupt.config_change();
    }

    fn lock(&self) -> MutexGuard<'_, Core> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// When to work unasked; a device that is not running never has to.
    fn deadline(&self) -> Option<Instant> {
        let core = self.lock();
        core.queues.as_ref().and_then(|_| core.device.deadline())
    }

    /// One bounded piece of work.
    fn step(&self) -> Progress {
        let mut core = self.lock();
        let Core { device, queues } = &mut *core;
        let Some(queues) = queues else { return Progress::Idle };
        let processed = device.process(queues, self.ram.memory());
        if device.take_config_change() {
            self.interrupt.config_change();
        }
        match processed {
            Ok(progress) => progress,
            Err(error) => {
                self.complain(device.device_type(), &error);
                self.stop(&mut core);
                Progress::Idle
            }
        }
    }
}

impl Shared {
    /// A piece of work in which a panic is a defect of the device's and costs the guest that device, until it resets it.
    /// The thread lives on, or the machine could not be paused any more.
    fn step_or_stop(&self) -> Progress {
        catch_unwind(AssertUnwindSafe(|| self.step())).unwrap_or_else(|_| {
            tracing::error!("a virtio device panicked, which is a defect in it; stopped until reset");
            self.fail();
            Progress::Idle
        })
    }
}

/// What a device has to do, for the one thread that does it.
#[derive(Debug)]
pub struct Work {
    shared: Arc<Shared>,
}

impl Work {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// Does one bounded piece of work; nothing while no driver has set the device up.
    pub fn step(&self) -> Progress {
        self.shared.step()
    }
}

/// Owns a device's thread: dropping it ends the thread, without waiting for it.
#[derive(Debug)]
pub struct Worker {
    doorbell: Arc<Doorbell>,
}

impl Worker {
    /// Starts a thread under `name` that does `work` whenever the doorbell of its device rings.
    pub(super) fn spawn(name: String, work: Work) -> io::Result<Self> {
        let shared = work.shared;
        let doorbell = Arc::clone(&shared.doorbell);
        thread::Builder::new().name(name).spawn(move || {
            loop {
                let deadline = shared.deadline();
                if shared.doorbell.wait(deadline) == Wake::Closed {
                    return;
                }
                while shared.step_or_stop() == Progress::More {
                    if shared.doorbell.interrupts() {
                        // For when it may go on.
                        shared.doorbell.ring();
                        break;
                    }
                }
            }
        })?;
        Ok(Self { doorbell })
    }

    /// Tells the thread to finish what it is at and to take up nothing more.
    pub fn hold(&self) {
        self.doorbell.hold();
    }

    /// Waits until a held thread does nothing any more: a bounded piece of work, in which the host's disk may be slow.
    ///
    /// # Cancel safety
    /// Cancel safe: it stays held.
    pub async fn quiet(&self) {
        self.doorbell.quiet().await;
    }

    /// Lets the thread go on.
    pub fn release(&self) {
        self.doorbell.release();
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.doorbell.close();
    }
}
