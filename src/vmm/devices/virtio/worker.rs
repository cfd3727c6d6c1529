//! The thread that does a device's work.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use super::DeviceQueue;
use super::Doorbell;
use super::Interrupt;
use super::Progress;
use super::VirtioDevice;
use super::doorbell::Wake;
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
    pub(super) ram: Arc<GuestRam>,
    pub(super) interrupt: Arc<Interrupt>,
    pub(super) doorbell: Arc<Doorbell>,
    needs_reset: AtomicBool,
}

impl Shared {
    pub(super) fn new(
        device: Box<dyn VirtioDevice>,
        ram: Arc<GuestRam>,
        interrupt: Interrupt,
        doorbell: Arc<Doorbell>,
    ) -> Self {
        let core = Mutex::new(Core { device, queues: None });
        Self { core, ram, interrupt: Arc::new(interrupt), doorbell, needs_reset: AtomicBool::new(false) }
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

    pub(super) fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::Acquire)
    }

    /// Stops the device until the driver resets it, and tells the driver (section 2.1.2).
    pub(super) fn fail(&self) {
        self.stop(&mut self.lock());
    }

    fn stop(&self, core: &mut Core) {
        core.queues = None;
        self.needs_reset.store(true, Ordering::Release);
        self.interrupt.config_change();
    }

    fn lock(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One bounded piece of work.
    fn step(&self) -> Progress {
        let mut core = self.lock();
        let Core { device, queues } = &mut *core;
        let Some(queues) = queues else { return Progress::Idle };
        match device.process(queues, self.ram.memory()) {
            Ok(progress) => progress,
            Err(error) => {
                tracing::warn!(device = device.device_type(), %error, "virtio device stopped until reset");
                self.stop(&mut core);
                Progress::Idle
            }
        }
    }
}

/// Owns a device's thread: dropping it ends the thread, without waiting for it.
#[derive(Debug)]
pub struct Worker {
    doorbell: Arc<Doorbell>,
}

impl Worker {
    pub(super) fn spawn(name: String, shared: Arc<Shared>) -> io::Result<Self> {
        let doorbell = Arc::clone(&shared.doorbell);
        thread::Builder::new().name(name).spawn(move || {
            loop {
                let deadline = shared.lock().device.deadline();
                if shared.doorbell.wait(deadline) == Wake::Closed {
                    return;
                }
                while shared.step() == Progress::More {
                    if shared.doorbell.is_closed() {
                        return;
                    }
                }
            }
        })?;
        Ok(Self { doorbell })
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.doorbell.close();
    }
}
