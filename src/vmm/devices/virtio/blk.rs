//! The block device (section 5.2), read-only.
//!
//! Answers reads, flushes and identification; a write is an I/O error, as the specification has it for
//! read-only devices; anything else is unsupported. A chain that has no room for the answer stops the
//! device.

use std::io::{self, Read, Write};
use std::sync::Arc;

use super::Chain;
use super::DeviceQueue;
use super::Progress;
use super::QueueError;
use super::VirtioDevice;
use crate::block::BlockBackend;
use crate::mem::GuestMemory;

const DEVICE_TYPE: u32 = 2;
const QUEUE_SIZE: u16 = 256;
const SECTOR: u64 = 512;
const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_FLUSH: u64 = 1 << 9;
/// Longest read served: three times what Linux asks for at once.
const MAX_READ: usize = 4 << 20;
/// Read from the backend in pieces of this size.
const PIECE: usize = 128 << 10;
const ID_LEN: usize = 20;
const HEADER_LEN: usize = 16;

mod request {
    pub(super) const IN: u32 = 0;
    pub(super) const OUT: u32 = 1;
    pub(super) const FLUSH: u32 = 4;
    pub(super) const GET_ID: u32 = 8;
}

/// The last byte of a request: how it went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

/// A read-only disk.
#[derive(Debug)]
pub struct Blk {
    backend: Arc<dyn BlockBackend>,
    id: [u8; ID_LEN],
    piece: Vec<u8>,
}

impl Blk {
    /// A disk over `backend`, known to the guest by `id`, of which it sees the first 20 bytes.
    #[must_use]
    pub fn new(backend: Arc<dyn BlockBackend>, id: &str) -> Self {
        let mut padded = [0; ID_LEN];
        let len = id.len().min(ID_LEN);
        padded[..len].copy_from_slice(&id.as_bytes()[..len]);
        Self { backend, id: padded, piece: Vec::new() }
    }

    /// A last sector that is not whole counts, and reads as zeros past the end.
    fn sectors(&self) -> u64 {
        self.backend.size().0.div_ceil(SECTOR)
    }

    /// Serves one request; returns how many bytes were written into the chain.
    fn serve(&mut self, chain: &Chain<'_>) -> Result<u32, QueueError> {
        let mut header = [0; HEADER_LEN];
        chain.reader()?.read_exact(&mut header).map_err(|_| QueueError::Chain("request without a header"))?;
        let kind = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
        let sector = u64::from_le_bytes([
            header[8], header[9], header[10], header[11], header[12], header[13], header[14], header[15],
        ]);
        let mut data = chain.writer()?;
        let room = data.available_bytes().checked_sub(1).ok_or(QueueError::Chain("request without a status"))?;
        let mut answer = data.split_at(room)?;
        let status = match kind {
            request::IN => self.read(sector, room, &mut data),
            request::GET_ID => data.write_all(&self.id[..room.min(ID_LEN)]).map_or(Status::IoError, |()| Status::Ok),
            request::FLUSH => Status::Ok,
            request::OUT => Status::IoError,
            _ => Status::Unsupported,
        };
        answer.write_all(&[status as u8]).map_err(|_| QueueError::Chain("status buffer"))?;
        Ok(data.bytes_written() as u32 + 1)
    }

    fn read(&mut self, sector: u64, len: usize, to: &mut impl Write) -> Status {
        let fits = sector.checked_add(len as u64 / SECTOR).is_some_and(|end| end <= self.sectors());
        if !fits || !(len as u64).is_multiple_of(SECTOR) || len > MAX_READ {
            return Status::IoError;
        }
        // In range, so the product is at most the backend's size and a sector.
        let start = sector * SECTOR;
        for at in (0..len).step_by(PIECE) {
            let wanted = PIECE.min(len - at);
            // Made when it is needed: many guests that are restored never read their disk.
            if self.piece.len() < wanted {
                self.piece.resize(wanted, 0);
            }
            let piece = &mut self.piece[..wanted];
            if let Err(error) = read_padded(&*self.backend, start + at as u64, piece) {
                tracing::warn!(offset = start + at as u64, %error, "reading a disk image");
                return Status::IoError;
            }
            if to.write_all(piece).is_err() {
                return Status::IoError;
            }
        }
        Status::Ok
    }
}

/// Reads, with zeros past the end of the backend.
fn read_padded(backend: &dyn BlockBackend, offset: u64, into: &mut [u8]) -> io::Result<()> {
    let left = backend.size().0.saturating_sub(offset);
    let (inside, past) = into.split_at_mut(into.len().min(usize::try_from(left).unwrap_or(usize::MAX)));
    past.fill(0);
    if inside.is_empty() { Ok(()) } else { backend.read_at(offset, inside) }
}

impl VirtioDevice for Blk {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        F_SEG_MAX | F_RO | F_FLUSH
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    /// `struct virtio_blk_config`: capacity, size_max, seg_max, then what we do not offer.
    fn config(&self) -> Vec<u8> {
        let mut config = vec![0; 60];
        config[..8].copy_from_slice(&self.sectors().to_le_bytes());
        // Header and status take two descriptors of the chain.
        config[12..16].copy_from_slice(&u32::from(QUEUE_SIZE - 2).to_le_bytes());
        config
    }

    fn process(&mut self, queues: &mut [DeviceQueue], memory: &GuestMemory) -> Result<Progress, QueueError> {
        let [queue] = queues else { return Ok(Progress::Idle) };
        let Some(chain) = queue.pop(memory)? else { return Ok(Progress::Idle) };
        let written = self.serve(&chain)?;
        queue.complete(&chain, written)?;
        queue.notify(memory)?;
        Ok(Progress::More)
    }
}
