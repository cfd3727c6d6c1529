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
    queues: Vec<Queue>,
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
        let queues = new_queues(device.queue_sizes())?;
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
        let worker = Worker::spawn(name.to_owned(), Arc::clone(&transport.shared))?;
        Ok((transport, worker))
    }

    fn read_register(&self, offset: u64) -> u32 {
        let queue = self.queues.get(self.selected as usize);
        match offset {
            register::MAGIC_VALUE => MAGIC,
            register::VERSION => 2,
            register::DEVICE_ID => self.device_type,
            register::VENDOR_ID => VENDOR,
            register::DEVICE_FEATURES => word(self.offered, self.offered_word),
            register::QUEUE_NUM_MAX => queue.map_or(0, |queue| u32::from(queue.max_size())),
            register::QUEUE_READY => queue.map_or(0, |queue| u32::from(queue.ready())),
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
            0 => self.accepted = self.accepted & !0xffff_ffff | u64::from(value),
            1 => self.accepted = self.accepted & 0xffff_ffff | u64::from(value) << 32,
            _ => {}
        }
    }

    fn configure_queue(&mut self, offset: u64, value: u32) {
        let ready_to = self.status & status::DRIVER != 0 && self.status & status::DRIVER_OK == 0;
        let Some(queue) = self.queues.get_mut(self.selected as usize).filter(|_| ready_to) else { return };
        if offset == register::QUEUE_READY {
            queue.set_ready(value == 1);
        }
        if queue.ready() {
            return;
        }
        match offset {
            // Sizes and addresses that virtio forbids are ignored by the queue, and caught when it is validated.
            register::QUEUE_NUM => queue.set_size(u16::try_from(value).unwrap_or(0)),
            register::QUEUE_DESC_LOW => queue.set_desc_table_address(Some(value), None),
            register::QUEUE_DESC_HIGH => queue.set_desc_table_address(None, Some(value)),
            register::QUEUE_DRIVER_LOW => queue.set_avail_ring_address(Some(value), None),
            register::QUEUE_DRIVER_HIGH => queue.set_avail_ring_address(None, Some(value)),
            register::QUEUE_DEVICE_LOW => queue.set_used_ring_address(Some(value), None),
            register::QUEUE_DEVICE_HIGH => queue.set_used_ring_address(None, Some(value)),
            _ => {}
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
        let memory = self.shared.ram.memory();
        // Our devices use every queue they have, and so do their drivers.
        if !self.queues.iter().all(|queue| queue.is_valid(memory)) {
            tracing::warn!(device = self.device_type, "the driver started a virtio device with unusable queues");
            return self.shared.fail();
        }
        let active = self.queues.iter().filter_map(|configured| self.device_queue(configured.state()));
        self.shared.activate(active.collect());
    }

    /// The device's end of a queue.
    fn device_queue(&self, state: virtio_queue::QueueState) -> Option<DeviceQueue> {
        let mut queue = Queue::try_from(state).ok()?;
        queue.set_event_idx(self.accepted & F_EVENT_IDX != 0);
        Some(DeviceQueue::new(queue, Arc::clone(&self.shared.interrupt)))
    }

    /// Everything that the guest may rely on, while the worker is quiet and no access happens.
    #[must_use]
    pub fn save(&self) -> TransportState {
        let (positions, device) = self.shared.save();
        let position = |n: usize| positions.as_ref().and_then(|all| all.get(n)).copied().unwrap_or_default();
        let queue = |(n, queue): (usize, &Queue)| {
            let ((next_avail, next_used), state) = (position(n), queue.state());
            QueueState {
                size: state.size,
                ready: state.ready,
                descriptors: state.desc_table,
                driver: state.avail_ring,
                device: state.used_ring,
                next_avail,
                next_used,
            }
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
            let unpositioned = QueueState { next_avail: 0, next_used: 0, ..*saved };
            *queue = restored_queue(queue.max_size(), &unpositioned)?;
        }
        let queues = if state.active { Some(self.restored_queues(state)?) } else { None };
        self.shared.restore(queues, state)
    }

    /// The device's ends of the queues of a device that was at work.
    fn restored_queues(&self, state: &TransportState) -> Result<Vec<DeviceQueue>, Misfit> {
        let running = status::DRIVER | status::FEATURES_OK | status::DRIVER_OK;
        let at_work = state.status & running == running && self.features_agreed() && !state.needs_reset;
        require(at_work, "a device at work whose driver is not")?;
        let memory = self.shared.ram.memory();
        let restored = self.queues.iter().zip(&state.queues).map(|(configured, saved)| {
            require(configured.is_valid(memory), "a queue outside the guest's memory")?;
            let queue = restored_queue(configured.max_size(), saved)?;
            self.device_queue(queue.state()).ok_or(UNUSABLE_QUEUE)
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
        self.queues.iter_mut().for_each(QueueT::reset);
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

const UNUSABLE_QUEUE: Misfit = Misfit("a queue that no driver can set up");

fn restored_queue(max_size: u16, saved: &QueueState) -> Result<Queue, Misfit> {
    let state = virtio_queue::QueueState {
        max_size,
        next_avail: saved.next_avail,
        next_used: saved.next_used,
        event_idx_enabled: false,
        size: saved.size,
        ready: saved.ready,
        desc_table: saved.descriptors,
        avail_ring: saved.driver,
        used_ring: saved.device,
    };
    Queue::try_from(state).map_err(|_| UNUSABLE_QUEUE)
}

fn new_queues(sizes: &[u16]) -> io::Result<Vec<Queue>> {
    sizes.iter().map(|size| Queue::new(*size).map_err(io::Error::other)).collect()
}

fn word(features: u64, select: u32) -> u32 {
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}
