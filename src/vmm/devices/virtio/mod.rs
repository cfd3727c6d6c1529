//! Virtio devices (Virtual I/O Device, version 1.2).
//!
//! ```text
//!   vCPU thread             device's own thread                 backend
//!   mmio::Transport --ring--> worker --process--> VirtioDevice -- file, entropy, streams
//!      registers                  \--- DeviceQueue: chains out of and back into guest RAM
//! ```
//!
//! A register access only records or rings; what takes time happens on the device's thread. All that
//! lies in guest RAM is hostile: a chain that makes no sense costs the guest its device (it must reset
//! it), and nothing else.

pub mod balloon;
pub mod blk;
mod doorbell;
pub mod mmio;
mod queue;
pub mod rng;
mod state;
#[cfg(test)]
mod tests;
pub mod vsock;
mod worker;

pub use doorbell::Doorbell;
pub use queue::{Chain, DeviceQueue, QueueError};
pub(in crate::vmm) use state::Misfit;
pub use state::{DeviceState, QueueState, TransportState};
pub use worker::{Work, Worker};

use std::fmt::Debug;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use crate::hv::IrqLine;
use crate::mem::GuestMemory;

/// VIRTIO_F_VERSION_1: not a legacy device.
pub const F_VERSION_1: u64 = 1 << 32;
/// VIRTIO_F_INDIRECT_DESC.
pub const F_INDIRECT_DESC: u64 = 1 << 28;
/// VIRTIO_F_EVENT_IDX: notifications only when the other side waits for one.
pub const F_EVENT_IDX: u64 = 1 << 29;

/// Is there more to do at once?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Yes: call again. Lets a reset come in between.
    More,
    /// Not before the next ring.
    Idle,
}

/// A device behind a transport. Lives on its worker's thread.
pub trait VirtioDevice: Debug + Send {
    /// The device type (section 5).
    fn device_type(&self) -> u32;

    /// The features it offers, next to those of the transport and the ring.
    fn features(&self) -> u64;

    /// The largest size of each of its queues.
    fn queue_sizes(&self) -> &[u16];

    /// The configuration space, when it does not change.
    fn config(&self) -> Vec<u8>;

    /// The configuration space when it changes, in the stead of [`config`](Self::config).
    fn live_config(&self) -> Option<Arc<dyn LiveConfig>> {
        None
    }

    /// Does a bounded amount of work on the queues.
    ///
    /// # Errors
    /// [`QueueError`] when the driver put nonsense on a queue; the device is then stopped until reset.
    fn process(&mut self, queues: &mut [DeviceQueue], memory: &GuestMemory) -> Result<Progress, QueueError>;

    /// Whether the driver is to be told that the configuration has changed; asked after each
    /// [`process`](Self::process), and true once a change.
    fn take_config_change(&mut self) -> bool {
        false
    }

    /// When it wants to be called although nothing rings.
    fn deadline(&self) -> Option<Instant> {
        None
    }

    /// Forgets everything since the last activation.
    fn reset(&mut self) {}

    /// What it keeps between two calls of [`process`](Self::process), besides what it was made with.
    fn save(&self) -> DeviceState {
        DeviceState::Stateless
    }

    /// Goes on from a saved state, before the first [`process`](Self::process) and with queues if `active`; false when
    /// it is another kind of device's.
    fn restore(&mut self, state: &DeviceState, active: bool) -> bool {
        let _ = active;
        *state == DeviceState::Stateless
    }
}

/// A configuration space that changes while the device is at work. vCPU threads reach it, so it answers at once.
pub trait LiveConfig: Debug + Send + Sync {
    /// Reads from `offset` on; zeros past its end.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// The driver writes at `offset`.
    fn write(&self, offset: u64, data: &[u8]);

    /// Another number after each change of the device's (section 2.5, `ConfigGeneration`).
    fn generation(&self) -> u32;
}

/// A device's interrupt: the status register and the line (section 4.2.2, `InterruptStatus`).
#[derive(Debug)]
pub struct Interrupt {
    status: AtomicU32,
    line: Arc<dyn IrqLine>,
}

impl Interrupt {
    const USED_BUFFER: u32 = 1;
    const CONFIG_CHANGE: u32 = 2;

    /// An interrupt on `line`, not pending.
    #[must_use]
    pub fn new(line: Arc<dyn IrqLine>) -> Self {
        Self { status: AtomicU32::new(0), line }
    }

    /// Used buffers wait for the driver.
    pub fn used_buffer(&self) {
        self.signal(Self::USED_BUFFER);
    }

    /// Configuration or status changed.
    pub fn config_change(&self) {
        self.signal(Self::CONFIG_CHANGE);
    }

    fn signal(&self, bit: u32) {
        // Release, paired with Acquire in `status`: who sees the bit also sees the used ring.
        self.status.fetch_or(bit, Ordering::Release);
        self.line.raise();
    }

    fn status(&self) -> u32 {
        self.status.load(Ordering::Acquire)
    }

    /// Continues with a saved status. The line is not raised: the interrupt controller was saved too.
    fn restore(&self, status: u32) {
        self.status.store(status & (Self::USED_BUFFER | Self::CONFIG_CHANGE), Ordering::Release);
    }

    fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::AcqRel);
    }
}
