//! The socket device (section 5.10), ending in this process: [`VsockConnector`] opens streams to the
//! guest's ports.
//!
//! `mux` is the protocol and knows neither queues nor tasks; this file moves its packets through the
//! virtqueues, on the device's thread; `stream` is what tokio sees.

mod connection;
mod mux;
mod packet;
mod stream;
#[cfg(test)]
mod tests;

pub use stream::{VsockConnector, VsockStream};

use std::io::{Read, Write};
use std::sync::Arc;
use std::time::Instant;

use super::DeviceQueue;
use super::DeviceState;
use super::Doorbell;
use super::Progress;
use super::QueueError;
use super::VirtioDevice;
use crate::mem::GuestMemory;
use packet::HEADER_LEN;
use packet::Header;
use stream::Shared;

const DEVICE_TYPE: u32 = 19;
/// Receive, transmit, event.
const QUEUE_SIZES: [u16; 3] = [256, 256, 16];
/// Most payload in a packet, either way: Linux's own limit.
const MAX_PAYLOAD: usize = 64 << 10;
/// Packets moved in each direction before a reset may come in between.
const BATCH: usize = 32;
/// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET, the one event there is (section 5.10.6.7).
const EVENT_TRANSPORT_RESET: u32 = 0;

/// After a restore the guest must hear that its connections are gone before it hears of new ones: it resets all that
/// it has when it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reset {
    /// The guest knows.
    Heard,
    /// It is to be told, as soon as it offers a buffer; and it may be hearing of an earlier reset.
    Owed { earlier: Option<u16> },
    /// It is told, and has heard once it has given a buffer back: at this index of the event queue's available ring.
    Told { heard_at: u16 },
}

/// The device.
#[derive(Debug)]
pub struct Vsock {
    shared: Arc<Shared>,
    payload: Vec<u8>,
    reset: Reset,
}

impl Vsock {
    /// A device, the connector to the guest behind it, and the doorbell to start its transport with.
    #[must_use]
    pub fn new() -> (Self, VsockConnector, Arc<Doorbell>) {
        let shared = Arc::new(Shared::new());
        let doorbell = Arc::clone(&shared.doorbell);
        let device =
            Self { shared: Arc::clone(&shared), payload: Vec::with_capacity(MAX_PAYLOAD), reset: Reset::Heard };
        (device, VsockConnector { shared }, doorbell)
    }

    /// Takes packets from the guest; is there possibly more?
    fn transmit(&mut self, queue: &mut DeviceQueue, memory: &GuestMemory) -> Result<bool, QueueError> {
        for _ in 0..BATCH {
            if !self.shared.lock().has_room() {
                return Ok(false);
            }
            let Some(chain) = queue.pop(memory)? else { return Ok(false) };
            let mut reader = chain.reader()?;
            let mut raw = [0; HEADER_LEN];
            reader.read_exact(&mut raw).map_err(|_| QueueError::Chain("packet without a header"))?;
            let header = Header::parse(&raw);
            let len = header.len as usize;
            if len > MAX_PAYLOAD || len > reader.available_bytes() {
                return Err(QueueError::Chain("packet length"));
            }
            self.payload.resize(len, 0);
            reader.read_exact(&mut self.payload).map_err(|_| QueueError::Chain("packet payload"))?;
            self.shared.lock().handle_packet(&header, &self.payload);
            queue.complete(&chain, 0)?;
        }
        Ok(true)
    }

    /// Has the guest heard that the connections it may know are gone?
    fn tell_reset(&mut self, events: &mut DeviceQueue, memory: &GuestMemory) -> Result<bool, QueueError> {
        if let Reset::Owed { earlier } = self.reset {
            let Some(chain) = events.pop(memory)? else { return Ok(false) };
            let written = chain.writer()?.write_all(&EVENT_TRANSPORT_RESET.to_le_bytes());
            written.map_err(|_| QueueError::Chain("event buffer too small"))?;
            // It takes up the event only when it is in the used ring, and gives a buffer back after that.
            let position = events.driver_position(memory)?;
            let waits = earlier.filter(|at| !reached(position, *at));
            self.reset = Reset::Told { heard_at: waits.unwrap_or(position).wrapping_add(1) };
            events.complete(&chain, EVENT_TRANSPORT_RESET.to_le_bytes().len() as u32)?;
            events.watch_driver(memory)?;
            events.notify(memory)?;
        }
        let Reset::Told { heard_at } = self.reset else { return Ok(true) };
        if !reached(events.driver_position(memory)?, heard_at) {
            events.watch_driver(memory)?;
            // Looked at again, for a driver that went on before it could know that it must ring.
            if !reached(events.driver_position(memory)?, heard_at) {
                return Ok(false);
            }
        }
        self.reset = Reset::Heard;
        Ok(true)
    }

    /// Gives packets to the guest; is there possibly more, and room for it?
    fn receive(&mut self, queue: &mut DeviceQueue, memory: &GuestMemory) -> Result<bool, QueueError> {
        for _ in 0..BATCH {
            if !self.shared.lock().has_packets() {
                return Ok(false);
            }
            let Some(chain) = queue.pop(memory)? else { return Ok(false) };
            let mut writer = chain.writer()?;
            // Not even a byte of payload: the driver could never receive anything.
            let room = writer.available_bytes().checked_sub(HEADER_LEN).filter(|room| *room > 0);
            let room = room.ok_or(QueueError::Chain("receive buffer too small"))?;
            let Some(header) = self.shared.lock().poll_packet(room.min(MAX_PAYLOAD), &mut self.payload) else {
                queue.put_back();
                return Ok(false);
            };
            writer
                .write_all(&header.to_bytes())
                .and_then(|()| writer.write_all(&self.payload))
                .map_err(|_| QueueError::Chain("receive buffer"))?;
            queue.complete(&chain, (HEADER_LEN + self.payload.len()) as u32)?;
        }
        Ok(true)
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    /// `struct virtio_vsock_config`: the guest's address.
    fn config(&self) -> Vec<u8> {
        mux::GUEST_CID.to_le_bytes().to_vec()
    }

    fn process(&mut self, queues: &mut [DeviceQueue], memory: &GuestMemory) -> Result<Progress, QueueError> {
        let [receive, transmit, events] = queues else { return Ok(Progress::Idle) };
        self.shared.lock().handle_timeout(Instant::now());
        let mut more = self.transmit(transmit, memory)?;
        if self.reset == Reset::Heard || self.tell_reset(events, memory)? {
            more |= self.receive(receive, memory)?;
        }
        // Refusals that were given just now have made room.
        more |= self.shared.lock().has_room() && transmit.is_pending(memory)?;
        transmit.notify(memory)?;
        receive.notify(memory)?;
        Ok(if more { Progress::More } else { Progress::Idle })
    }

    fn deadline(&self) -> Option<Instant> {
        self.shared.lock().deadline()
    }

    fn reset(&mut self) {
        // A driver that begins anew has no connections to hear about.
        self.reset = Reset::Heard;
        self.shared.lock().reset();
    }

    fn save(&self) -> DeviceState {
        let resets_heard_at = match self.reset {
            Reset::Heard => None,
            Reset::Owed { earlier } => earlier,
            Reset::Told { heard_at } => Some(heard_at),
        };
        DeviceState::Vsock { next_port: self.shared.lock().next_port(), resets_heard_at }
    }

    fn restore(&mut self, state: &DeviceState, active: bool) -> bool {
        let DeviceState::Vsock { next_port, resets_heard_at } = *state else { return false };
        self.shared.lock().continue_ports(next_port);
        self.reset = if active { Reset::Owed { earlier: resets_heard_at } } else { Reset::Heard };
        true
    }
}

/// Whether a ring's index has come to `at`; indices wrap.
fn reached(index: u16, at: u16) -> bool {
    index.wrapping_sub(at) < 1 << 15
}
