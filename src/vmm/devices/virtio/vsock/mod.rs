//! The socket device (section 5.10), ending in this process: [`VsockConnector`] opens streams to the
//! guest's ports.
//!
//! [`mux`] is the protocol and knows neither queues nor tasks; this file moves its packets through the
//! virtqueues, on the device's thread; [`stream`] is what tokio sees.

mod connection;
mod mux;
mod packet;
mod stream;

pub use stream::{VsockConnector, VsockStream};

use std::io::{Read, Write};
use std::sync::Arc;
use std::time::Instant;

use super::DeviceQueue;
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

/// The device.
#[derive(Debug)]
pub struct Vsock {
    shared: Arc<Shared>,
    payload: Vec<u8>,
}

impl Vsock {
    /// A device, the connector to the guest behind it, and the doorbell to start its transport with.
    #[must_use]
    pub fn new() -> (Self, VsockConnector, Arc<Doorbell>) {
        let shared = Arc::new(Shared::new());
        let doorbell = Arc::clone(&shared.doorbell);
        let device = Self { shared: Arc::clone(&shared), payload: Vec::with_capacity(MAX_PAYLOAD) };
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
        // The event queue's buffers wait for a transport reset, which never comes.
        let [receive, transmit, _event] = queues else { return Ok(Progress::Idle) };
        self.shared.lock().handle_timeout(Instant::now());
        let mut more = self.transmit(transmit, memory)?;
        more |= self.receive(receive, memory)?;
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
        self.shared.lock().reset();
    }
}
