//! Frames on their way to the host: one buffer a session, filled straight from the process's pipes.

use std::io;
use std::os::fd::BorrowedFd;

use kiln_wire::frame::HEADER_LEN;
use kiln_wire::frame::Kind;
use kiln_wire::frame::MAX_FRAME;
use kiln_wire::frame::header;

use crate::process::Sink;

/// Over this many unsent bytes the process's output is not read (128 KiB); the process then blocks on its pipe.
const HIGH_WATER: usize = 128 << 10;

/// How much one read takes from a pipe, in bytes (32 KiB: half a pipe).
const CHUNK: usize = 32 << 10;

/// Unsent bytes.
#[derive(Debug, Default)]
pub(crate) struct Outbox {
    buffer: Vec<u8>,
    sent: usize,
}

impl Outbox {
    pub(crate) fn is_empty(&self) -> bool {
        self.buffer.is_empty()
    }

    /// Queues one frame; a payload over the limit is cut, which only a message of ours could be.
    pub(crate) fn push(&mut self, kind: Kind, payload: &[u8]) {
        let payload = payload.get(..MAX_FRAME).unwrap_or(payload);
        if let Ok(header) = header(kind, payload.len()) {
            self.buffer.extend_from_slice(&header);
            self.buffer.extend_from_slice(payload);
        }
    }

    /// Writes as much as `socket` takes.
    pub(crate) fn flush(&mut self, socket: BorrowedFd<'_>) -> io::Result<()> {
        while self.sent < self.buffer.len() {
            match rustix::io::write(socket, &self.buffer[self.sent..]) {
                Ok(written) => self.sent += written,
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => {
                    self.compact();
                    return Ok(());
                }
                Err(error) => return Err(error.into()),
            }
        }
        // An idle session keeps no buffer: hundreds may be open in a small guest.
        *self = Self::default();
        Ok(())
    }

    fn compact(&mut self) {
        if self.sent >= HIGH_WATER / 2 {
            self.buffer.drain(..self.sent);
            self.sent = 0;
        }
    }
}

impl Sink for Outbox {
    fn has_room(&self) -> bool {
        self.buffer.len() - self.sent < HIGH_WATER
    }

    /// 0 queues nothing.
    fn fill(&mut self, kind: Kind, fd: BorrowedFd<'_>) -> io::Result<usize> {
        let at = self.buffer.len();
        self.buffer.extend_from_slice(&[0; HEADER_LEN]);
        self.buffer.reserve(CHUNK);
        let read = match rustix::io::read(fd, rustix::buffer::spare_capacity(&mut self.buffer)) {
            Ok(read) => read,
            Err(error) => {
                self.buffer.truncate(at);
                return Err(error.into());
            }
        };
        match header(kind, read) {
            Ok(header) if read > 0 => self.buffer[at..at + HEADER_LEN].copy_from_slice(&header),
            _ => self.buffer.truncate(at),
        }
        Ok(read)
    }
}
