//! Bytes from the host that wait for a descriptor to take them.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;

use bytes::Buf;
use bytes::Bytes;

/// Bytes that may wait (128 KiB), beside what the descriptor itself holds.
const ENOUGH: usize = 128 << 10;

/// Waiting bytes, in order.
#[derive(Debug, Default)]
pub(crate) struct Backlog {
    pieces: VecDeque<Bytes>,
    len: usize,
}

impl Backlog {
    /// Whether more may be read from the host.
    pub(crate) const fn has_room(&self) -> bool {
        self.len < ENOUGH
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    pub(crate) fn push(&mut self, piece: Bytes) {
        self.len += piece.len();
        self.pieces.push_back(piece);
    }

    pub(crate) fn clear(&mut self) {
        *self = Self::default();
    }

    /// Writes what `fd`, which does not block, takes.
    pub(crate) fn write_to(&mut self, fd: BorrowedFd<'_>) -> rustix::io::Result<()> {
        while let Some(front) = self.pieces.front_mut() {
            match rustix::io::write(fd, front) {
                Ok(written) => {
                    self.len -= written;
                    front.advance(written);
                    if front.is_empty() {
                        self.pieces.pop_front();
                    }
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}
