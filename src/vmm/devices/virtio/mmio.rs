//! The MMIO transport (section 4.2), version 2: a device's registers.
//!
//! ```text
//!   0 --ACKNOWLEDGE--> --DRIVER--> --FEATURES_OK, if we agree--> --DRIVER_OK--> running
//!   ^                                                                            |
//!   +---- write 0 ---------- NEEDS_RESET <--- the driver broke a queue ----------+
//! ```
//!
//! What the driver does out of turn (queues before DRIVER, features after FEATURES_OK, ...) is ignored.

use std::io;
use std::sync::Arc;

use virtio_queue::{Queue, QueueT};

use super::DeviceQueue;
use super::Doorbell;
use super::F_EVENT_IDX;
use super::F_INDIRECT_DESC;
use super::F_VERSION_1;
use super::Interrupt;
use super::LiveConfig;
use super::Misfit;
use super::QueueState;
use super::TransportState;
use super::VirtioDevice;
use super::state::require;
use super::worker::Shared;
use super::worker::Work;
use super::worker::Worker;
use crate::hv::IrqLine;
use crate::mem::GuestRam;
use crate::vmm::bus::BusDevice;

/// Register offsets (table 4.1).
mod register {
    pub(super) const MAGIC_VALUE: u64 = 0x000;
    pub(super) const VERSION: u64 = 0x004;
    pub(super) const DEVICE_ID: u64 = 0x008;
    pub(super) const VENDOR_ID: u64 = 0x00c;
    pub(super) const DEVICE_FEATURES: u64 = 0x010;
    pub(super) const DEVICE_FEATURES_SEL: u64 = 0x014;
    pub(super) const DRIVER_FEATURES: u64 = 0x020;
    pub(super) const DRIVER_FEATURES_SEL: u64 = 0x024;
    pub(super) const QUEUE_SEL: u64 = 0x030;
    pub(super) const QUEUE_NUM_MAX: u64 = 0x034;
    pub(super) const QUEUE_NUM: u64 = 0x038;
    pub(super) const QUEUE_READY: u64 = 0x044;
    pub(super) const QUEUE_NOTIFY: u64 = 0x050;
    pub(super) const INTERRUPT_STATUS: u64 = 0x060;
    pub(super) const INTERRUPT_ACK: u64 = 0x064;
    pub(super) const STATUS: u64 = 0x070;
    pub(super) const QUEUE_DESC_LOW: u64 = 0x080;
    pub(super) const QUEUE_DESC_HIGH: u64 = 0x084;
    pub(super) const QUEUE_DRIVER_LOW: u64 = 0x090;
    pub(super) const QUEUE_DRIVER_HIGH: u64 = 0x094;
    pub(super) const QUEUE_DEVICE_LOW: u64 = 0x0a0;
    pub(super) const QUEUE_DEVICE_HIGH: u64 = 0x0a4;
    pub(super) const SHM_LEN_LOW: u64 = 0x0b0;
    pub(super) const SHM_LEN_HIGH: u64 = 0x0b4;
    pub(super) const SHM_BASE_LOW: u64 = 0x0b8;
    pub(super) const SHM_BASE_HIGH: u64 = 0x0bc;
    pub(super) const CONFIG_GENERATION: u64 = 0x0fc;
    pub(super) const CONFIG: u64 = 0x100;
}

/// Device status bits (section 2.1).
mod status {
    pub(super) const DRIVER: u32 = 2;
    pub(super) const DRIVER_OK: u32 = 4;
    pub(super) const FEATURES_OK: u32 = 8;
    pub(super) const NEEDS_RESET: u32 = 64;
}

/// The register whose being written is all that matters about it: rings add up, and which queue rang is found by looking.
pub(in crate::vmm) const QUEUE_NOTIFY: u64 = register::QUEUE_NOTIFY;

const MAGIC: u32 = 0x7472_6976; // "virt"
const VENDOR: u32 = u32::from_le_bytes(*b"KILN");

/// A device's registers, on the bus.
#[derive(Debug)]
pub struct Transport {
    shared: Arc<Shared>,
    device_type: u32,
    offered: u64,
    config: Vec<u8>,
    live_config: Option<Arc<dyn LiveConfig>>,
    status: u32,
    accepted: u64,
    offered_word: u32,
    accepted_word: u32,
    selected: u32,
    queues: Vec<QueueSetup>,
}

/// A queue as the driver describes it. What no queue can be is kept as it was written, and found out when the driver
/// starts the device: one that passed over it would work on rings that are not where the driver has put them.
#[derive(Debug)]
struct QueueSetup {
    max_size: u16,
    /// Without positions.
    set: QueueState,
}

impl QueueSetup {
    fn new(max_size: u16) -> Self {
        let set = QueueState {
            size: max_size,
            ready: false,
            descriptors: 0,
            driver: 0,
            device: 0,
            next_avail: 0,
            next_used: 0,
        };
        Self { max_size, set }
    }

    fn write(&mut self, offset: u64, value: u32) {
        let set = &mut self.set;
        match offset {
            // No queue has size zero.
            register::QUEUE_NUM => set.size = u16::try_from(value).unwrap_or(0),
            register::QUEUE_DESC_LOW => set_low(&mut set.descriptors, value),
            register::QUEUE_DESC_HIGH => set_high(&mut set.descriptors, value),
            register::QUEUE_DRIVER_LOW => set_low(&mut set.driver, value),
            register::QUEUE_DRIVER_HIGH => set_high(&mut set.driver, value),
            register::QUEUE_DEVICE_LOW => set_low(&mut set.device, value),
            register::QUEUE_DEVICE_HIGH => set_high(&mut set.device, value),
            _ => {}
        }
    }
}

impl Transport {
    /// Puts `device` behind registers, with its interrupt on `irq`, and starts its thread under
    /// `name`. `doorbell` wakes the thread; the device's backend may keep a copy to ring it.
    ///
    /// # Errors
    /// The host's, when it refuses a thread.
    pub fn start(
        name: &str,
        device: Box<dyn VirtioDevice>,
        ram: Arc<GuestRam>,
        irq: Arc<dyn IrqLine>,
        doorbell: Arc<Doorbell>,
    ) -> io::Result<(Self, Worker)> {
        let (transport, work) = Self::new(device, ram, irq, doorbell);
        Ok((transport, Worker::spawn(name.to_owned(), work)?))
    }

    /// The same without a thread: whoever has the [`Work`] does it, a step at a time, and needs no doorbell to know when.
    #[must_use]
    pub fn new(
        device: Box<dyn VirtioDevice>,
        ram: Arc<GuestRam>,
        irq: Arc<dyn IrqLine>,
        doorbell: Arc<Doorbell>,
    ) -> (Self, Work) {
        let queues = device.queue_sizes().iter().map(|size| QueueSetup::new(*size)).collect();
        let transport = Self {
            device_type: device.device_type(),
            offered: device.features() | F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX,
            config: device.config(),
            live_config: device.live_config(),
            shared: Arc::new(Shared::new(device, ram, Interrupt::new(irq), doorbell)),
            status: 0,
            accepted: 0,
            offered_word: 0,
            accepted_word: 0,
            selected: 0,
            queues,
        };
        let work = Work::new(Arc::clone(&transport.shared));
        (transport, work)
    }

    fn read_register(&self, offset: u64) -> u32 {
        let queue = self.queues.get(self.selected as usize);
        match offset {
            register::MAGIC_VALUE => MAGIC,
            register::VERSION => 2,
            register::DEVICE_ID => self.device_type,
            register::VENDOR_ID => VENDOR,
            register::DEVICE_FEATURES => word(self.offered, self.offered_word),
            register::QUEUE_NUM_MAX => queue.map_or(0, |queue| u32::from(queue.max_size)),
            register::QUEUE_READY => queue.map_or(0, |queue| u32::from(queue.set.ready)),
            register::INTERRUPT_STATUS => self.shared.interrupt.status(),
            register::STATUS if self.shared.needs_reset() => self.status | status::NEEDS_RESET,
            register::STATUS => self.status,
            // Shared memory: none, which a length of all ones says.
            register::SHM_LEN_LOW | register::SHM_LEN_HIGH | register::SHM_BASE_LOW | register::SHM_BASE_HIGH => {
                u32::MAX
            }
            register::CONFIG_GENERATION => self.live_config.as_ref().map_or(0, |config| config.generation()),
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        match offset {
            register::DEVICE_FEATURES_SEL => self.offered_word = value,
            register::DRIVER_FEATURES_SEL => self.accepted_word = value,
            register::DRIVER_FEATURES => self.accept_features(value),
            register::QUEUE_SEL => self.selected = value,
            register::QUEUE_NOTIFY if self.status & status::DRIVER_OK != 0 => self.shared.doorbell.ring(),
            register::INTERRUPT_ACK => self.shared.interrupt.acknowledge(value),
            register::STATUS => self.set_status(value),
            _ => self.configure_queue(offset, value),
        }
    }

    fn accept_features(&mut self, value: u32) {
        if self.status & status::DRIVER == 0 || self.status & status::FEATURES_OK != 0 {
            return;
        }
        match self.accepted_word {
            0 => set_low(&mut self.accepted, value),
            1 => set_high(&mut self.accepted, value),
            _ => {}
        }
    }

    fn configure_queue(&mut self, offset: u64, value: u32) {
        let ready_to = self.status & status::DRIVER != 0 && self.status & status::DRIVER_OK == 0;
        let Some(queue) = self.queues.get_mut(self.selected as usize).filter(|_| ready_to) else { return };
        if offset == register::QUEUE_READY {
            queue.set.ready = value == 1;
        } else if !queue.set.ready {
            queue.write(offset, value);
        }
    }

    fn set_status(&mut self, value: u32) {
        if value == 0 {
            return self.reset();
        }
        // A driver may add bits, and take none away but by a reset.
        let mut added = value & !self.status & !status::NEEDS_RESET;
        if added & status::FEATURES_OK != 0 && !self.features_agreed() {
            added &= !status::FEATURES_OK;
        }
        if added & status::DRIVER_OK != 0 && (self.status | added) & status::FEATURES_OK == 0 {
            added &= !status::DRIVER_OK;
        }
        self.status |= added;
        if added & status::DRIVER_OK != 0 {
            self.activate();
        }
    }

    fn features_agreed(&self) -> bool {
        self.accepted & !self.offered == 0 && self.accepted & F_VERSION_1 != 0
    }

    fn activate(&mut self) {
        // Our devices use every queue they have, and so do their drivers.
        let queues: Option<Vec<_>> =
            self.queues.iter().map(|queue| self.device_queue(queue.max_size, &queue.set)).collect();
        match queues {
            Some(queues) => self.shared.activate(queues),
            None => {
                self.shared.complain(self.device_type, &"started with unusable queues");
                self.shared.fail();
            }
        }
    }

    /// The device's end of a queue; `None` when there can be none, or none in this guest's memory.
    fn device_queue(&self, max_size: u16, set: &QueueState) -> Option<DeviceQueue> {
        let queue = Queue::try_from(virtio_queue::QueueState {
            max_size,
            next_avail: set.next_avail,
            next_used: set.next_used,
            event_idx_enabled: self.accepted & F_EVENT_IDX != 0,
            size: set.size,
            ready: set.ready,
            desc_table: set.descriptors,
            avail_ring: set.driver,
            used_ring: set.device,
        });
        let queue = queue.ok().filter(|queue| queue.is_valid(self.shared.ram.memory()))?;
        Some(DeviceQueue::new(queue, Arc::clone(&self.shared.interrupt)))
    }

    /// Everything that the guest may rely on, while the worker is quiet and no access happens.
    #[must_use]
    pub fn save(&self) -> TransportState {
        let (positions, device) = self.shared.save();
        let position = |n: usize| positions.as_ref().and_then(|all| all.get(n)).copied().unwrap_or_default();
        let queue = |(n, queue): (usize, &QueueSetup)| {
            let (next_avail, next_used) = position(n);
            QueueState { next_avail, next_used, ..queue.set }
        };
        TransportState {
            device_type: self.device_type,
            config: self.config.clone(),
            status: self.status,
            needs_reset: self.shared.needs_reset(),
            active: positions.is_some(),
            accepted: self.accepted,
            offered_word: self.offered_word,
            accepted_word: self.accepted_word,
            selected: self.selected,
            interrupt: self.shared.interrupt.status(),
            queues: self.queues.iter().enumerate().map(queue).collect(),
            device,
        }
    }

    /// Goes on from a saved state, before any access and while the worker is held. The transport is of no use after
    /// an error.
    pub(in crate::vmm) fn restore(&mut self, state: &TransportState) -> Result<(), Misfit> {
        require(state.device_type == self.device_type, "another device was here")?;
        require(state.config == self.config, "the device had another configuration, as a disk of another size has")?;
        require(state.accepted & !self.offered == 0, "features that the device does not offer")?;
        require(state.queues.len() == self.queues.len(), "another number of queues")?;
        require(state.status & status::NEEDS_RESET == 0, "a status that no driver can write")?;
        (self.status, self.accepted) = (state.status, state.accepted);
        (self.offered_word, self.accepted_word) = (state.offered_word, state.accepted_word);
        self.selected = state.selected;
        for (queue, saved) in self.queues.iter_mut().zip(&state.queues) {
            queue.set = QueueState { next_avail: 0, next_used: 0, ..*saved };
        }
        let queues = if state.active { Some(self.restored_queues(state)?) } else { None };
        self.shared.restore(queues, state)
    }

    /// The device's ends of the queues of a device that was at work.
    fn restored_queues(&self, state: &TransportState) -> Result<Vec<DeviceQueue>, Misfit> {
        let running = status::DRIVER | status::FEATURES_OK | status::DRIVER_OK;
        let at_work = state.status & running == running && self.features_agreed() && !state.needs_reset;
        require(at_work, "a device at work whose driver is not")?;
        let restored = self.queues.iter().zip(&state.queues).map(|(queue, saved)| {
            self.device_queue(queue.max_size, saved).ok_or(Misfit("a queue that no driver can set up in this memory"))
        });
        restored.collect()
    }

    fn reset(&mut self) {
        self.shared.reset();
        self.status = 0;
        self.accepted = 0;
        self.offered_word = 0;
        self.accepted_word = 0;
        self.selected = 0;
        self.queues.iter_mut().for_each(|queue| *queue = QueueSetup::new(queue.max_size));
    }
}

impl BusDevice for Transport {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let Some(at) = offset.checked_sub(register::CONFIG) {
            match &self.live_config {
                Some(config) => config.read(at, data),
                None => read_padded(&self.config, at, data),
            }
        } else if let Ok(data) = <&mut [u8; 4]>::try_from(&mut *data) {
            *data = self.read_register(offset).to_le_bytes();
        } else {
            // Registers are 32 bits wide and accessed whole (section 4.2.2.2).
            data.fill(0);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(at) = offset.checked_sub(register::CONFIG) {
            // Configuration that does not change is not the driver's to change either.
            if let Some(config) = &self.live_config {
                config.write(at, data);
            }
        } else if let Ok(value) = <[u8; 4]>::try_from(data) {
            self.write_register(offset, u32::from_le_bytes(value));
        }
    }
}

/// Reads `from` at `offset`, with zeros past its end.
pub(super) fn read_padded(from: &[u8], offset: u64, data: &mut [u8]) {
    for (n, byte) in (offset..).zip(data) {
        *byte = usize::try_from(n).ok().and_then(|n| from.get(n)).copied().unwrap_or(0);
    }
}

fn set_low(address: &mut u64, value: u32) {
    *address = *address & !0xffff_ffff | u64::from(value);
}

fn set_high(address: &mut u64, value: u32) {
    *address = *address & 0xffff_ffff | u64::from(value) << 32;
}

fn word(features: u64, select: u32) -> u32 {
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}
