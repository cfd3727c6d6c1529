//! A device's end of a split virtqueue (section 2.7): chains of guest buffers out, used buffers back.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT, Reader, Writer};
use vm_memory::bitmap::MS;

use super::Interrupt;
use crate::mem::GuestMemory;

/// What a driver put on a queue makes no sense.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QueueError {
    /// The ring itself is broken.
    #[error("the virtqueue is broken: {0}")]
    Ring(virtio_queue::Error),
    /// A chain does not have the form the device asks for.
    #[error("malformed descriptor chain: {0}")]
    Chain(&'static str),
}

impl From<virtio_queue::Error> for QueueError {
    fn from(error: virtio_queue::Error) -> Self {
        Self::Ring(error)
    }
}

/// Buffers that the driver made available together.
#[derive(Debug)]
pub struct Chain<'m> {
    memory: &'m GuestMemory,
    chain: DescriptorChain<&'m GuestMemory>,
}

impl<'m> Chain<'m> {
    /// The part the device reads.
    ///
    /// # Errors
    /// [`QueueError`] when a buffer lies outside RAM.
    pub fn reader(&self) -> Result<Reader<'m, MS<'m, GuestMemory>>, QueueError> {
        Reader::new(self.memory, self.chain.clone()).map_err(QueueError::Ring)
    }

    /// The part the device writes.
    ///
    /// # Errors
    /// [`QueueError`] when a buffer lies outside RAM.
    pub fn writer(&self) -> Result<Writer<'m, MS<'m, GuestMemory>>, QueueError> {
        Writer::new(self.memory, self.chain.clone()).map_err(QueueError::Ring)
    }
}

/// A queue that the driver has set up.
#[derive(Debug)]
pub struct DeviceQueue {
    queue: Queue,
    interrupt: Arc<Interrupt>,
}

impl DeviceQueue {
    /// A queue over what the driver has configured, which the caller has validated.
    pub(super) fn new(queue: Queue, interrupt: Arc<Interrupt>) -> Self {
        Self { queue, interrupt }
    }

    /// Takes the next chain. When there is none, the driver will ring for the next one.
    ///
    /// # Errors
    /// [`QueueError`] when the ring claims more chains than it can hold.
    pub fn pop<'m>(&mut self, memory: &'m GuestMemory) -> Result<Option<Chain<'m>>, QueueError> {
        if let Some(chain) = self.queue.iter(memory)?.next() {
            return Ok(Some(Chain { memory, chain }));
        }
        // A chain that came before the driver could know that it must ring is taken now.
        if self.queue.enable_notification(memory)? {
            return Ok(self.queue.iter(memory)?.next().map(|chain| Chain { memory, chain }));
        }
        Ok(None)
    }

    /// Has the driver made chains available that were not taken yet?
    ///
    /// # Errors
    /// [`QueueError`] when the ring is broken.
    pub fn is_pending(&self, memory: &GuestMemory) -> Result<bool, QueueError> {
        Ok(self.queue.avail_idx(memory, Ordering::Acquire)?.0 != self.queue.next_avail())
    }

    /// How far the device is: the indices of the next available and the next used entry.
    pub(super) fn position(&self) -> (u16, u16) {
        (self.queue.next_avail(), self.queue.next_used())
    }

    /// How far the driver is: the index of the next entry that it will make available.
    ///
    /// # Errors
    /// [`QueueError`] when the ring is broken.
    pub fn driver_position(&self, memory: &GuestMemory) -> Result<u16, QueueError> {
        Ok(self.queue.avail_idx(memory, Ordering::Acquire)?.0)
    }

    /// Lets the driver ring when it makes the next entry available, also while others wait to be popped.
    ///
    /// # Errors
    /// [`QueueError`] when the ring is broken.
    pub fn watch_driver(&mut self, memory: &GuestMemory) -> Result<(), QueueError> {
        let (next, driver) = (self.queue.next_avail(), self.driver_position(memory)?);
        // It asks to be told of the entry after its position, so that has to be the driver's for a moment.
        self.queue.set_next_avail(driver);
        let asked = self.queue.enable_notification(memory);
        self.queue.set_next_avail(next);
        asked?;
        Ok(())
    }

    /// Puts the chain that `pop` returned last back.
    pub fn put_back(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Returns a chain to the driver; the device wrote `written` bytes into it.
    ///
    /// # Errors
    /// [`QueueError`] when the chain's head is not a descriptor of the queue.
    pub fn complete(&mut self, chain: &Chain<'_>, written: u32) -> Result<(), QueueError> {
        Ok(self.queue.add_used(chain.memory, chain.chain.head_index(), written)?)
    }

    /// Interrupts the driver if it wants to know of what was completed since the last call.
    ///
    /// # Errors
    /// [`QueueError`] when the ring is broken.
    pub fn notify(&mut self, memory: &GuestMemory) -> Result<(), QueueError> {
        if self.queue.needs_notification(memory)? {
            self.interrupt.used_buffer();
        }
        Ok(())
    }
}
