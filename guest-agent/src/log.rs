//! What the workload has written, as far back as a bound allows: the oldest bytes make room for the newest.
//!
//! Bytes of both outputs lie in the order in which they were read. Each has an offset, counted from the start of the run, which never
//! changes: a host that comes back says with it where it was.

use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;

use kiln_wire::frame::Kind;

use crate::process::Sink;

/// Bytes that are kept (256 KiB).
pub(crate) const CAPACITY: usize = 256 << 10;

/// Changes from one output to the other that are kept (4096, so 64 KiB): a process that alternates with every byte must not make the agent
/// keep more notes than bytes.
const MAX_PIECES: usize = 4096;

/// How much one read takes from a pipe, in bytes (32 KiB: half a pipe).
const CHUNK: usize = 32 << 10;

/// How much is read before everybody else gets a turn (64 KiB: a pipe).
const TURN: usize = 64 << 10;

/// Bytes of one output that lie one after the other; they end where the next piece begins.
#[derive(Clone, Copy, Debug)]
struct Piece {
    kind: Kind,
    begin: u64,
}

/// The newest bytes.
#[derive(Debug, Default)]
pub(crate) struct Log {
    bytes: VecDeque<u8>,
    pieces: VecDeque<Piece>,
    /// The offset of the first byte that is kept.
    start: u64,
    /// Where reads arrive, kept from one to the next.
    chunk: Vec<u8>,
}

impl Log {
    /// The offset of the first byte that is kept.
    pub(crate) const fn start(&self) -> u64 {
        self.start
    }

    /// The offset of the next byte that will be written.
    pub(crate) fn end(&self) -> u64 {
        self.start + self.bytes.len() as u64
    }

    /// No more will be written: gives back what only writing needs.
    pub(crate) fn seal(&mut self) {
        self.chunk = Vec::new();
        self.bytes.shrink_to_fit();
        self.pieces.shrink_to_fit();
    }

    fn append(&mut self, kind: Kind, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        // Before they are added, so that the buffer never grows beyond its bound.
        self.forget((self.bytes.len() + bytes.len()).saturating_sub(CAPACITY));
        if self.pieces.back().is_none_or(|last| last.kind != kind) {
            self.pieces.push_back(Piece { kind, begin: self.end() });
        }
        self.bytes.extend(bytes);
        if self.pieces.len() > MAX_PIECES
            && let Some(second) = self.pieces.get(1)
        {
            self.forget(usize::try_from(second.begin - self.start).unwrap_or(usize::MAX));
        }
    }

    /// Drops the oldest `count` bytes.
    fn forget(&mut self, count: usize) {
        let count = count.min(self.bytes.len());
        self.bytes.drain(..count);
        self.start += count as u64;
        while self.pieces.get(1).is_some_and(|second| second.begin <= self.start) {
            self.pieces.pop_front();
        }
    }

    /// Bytes at `offset` and after it that lie together, all of one output; `None` where there are none.
    pub(crate) fn piece(&self, offset: u64) -> Option<(Kind, &[u8])> {
        let skipped = usize::try_from(offset.checked_sub(self.start)?).ok()?;
        let next = self.pieces.partition_point(|piece| piece.begin <= offset);
        let kind = self.pieces.get(next.checked_sub(1)?)?.kind;
        let (front, back) = self.bytes.as_slices();
        let together = front.get(skipped..).filter(|rest| !rest.is_empty());
        let together = together.or_else(|| back.get(skipped.checked_sub(front.len())?..))?;
        let whole = self.pieces.get(next).and_then(|piece| usize::try_from(piece.begin - offset).ok());
        let length = whole.unwrap_or(usize::MAX).min(together.len()).min(CHUNK);
        together.get(..length).filter(|bytes| !bytes.is_empty()).map(|bytes| (kind, bytes))
    }
}

/// Writes to the log until everybody else shall have a turn: a process that never stops writing must not keep the agent to itself.
#[derive(Debug)]
pub(crate) struct Turn<'a> {
    log: &'a mut Log,
    left: usize,
}

impl<'a> Turn<'a> {
    pub(crate) const fn new(log: &'a mut Log) -> Self {
        Self { log, left: TURN }
    }
}

impl Sink for Turn<'_> {
    fn has_room(&self) -> bool {
        self.left > 0
    }

    fn fill(&mut self, kind: Kind, fd: BorrowedFd<'_>) -> io::Result<usize> {
        let mut chunk = std::mem::take(&mut self.log.chunk);
        chunk.clear();
        chunk.reserve_exact(CHUNK);
        let read = rustix::io::read(fd, rustix::buffer::spare_capacity(&mut chunk));
        self.log.append(kind, &chunk);
        self.log.chunk = chunk;
        let read = read?;
        self.left = self.left.saturating_sub(read);
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Everything from `offset` on, a letter for the output and the bytes.
    fn read(log: &Log, mut offset: u64) -> Vec<(Kind, Vec<u8>)> {
        let mut pieces: Vec<(Kind, Vec<u8>)> = Vec::new();
        while let Some((kind, bytes)) = log.piece(offset) {
            offset += bytes.len() as u64;
            match pieces.last_mut() {
                Some((last, all)) if *last == kind => all.extend(bytes),
                _ => pieces.push((kind, bytes.to_vec())),
            }
        }
        assert_eq!(offset, log.end());
        pieces
    }

    #[test]
    fn what_was_written_is_read_from_any_offset() {
        let mut log = Log::default();
        assert_eq!(log.piece(0), None);
        log.append(Kind::Stdout, b"one");
        log.append(Kind::Stdout, b"two");
        log.append(Kind::Stderr, b"!");
        log.append(Kind::Stderr, b"");
        log.append(Kind::Stdout, b"three");
        let expected =
            [(Kind::Stdout, b"onetwo".to_vec()), (Kind::Stderr, b"!".to_vec()), (Kind::Stdout, b"three".to_vec())];
        assert_eq!(read(&log, 0), expected);
        assert_eq!(read(&log, 4), [(Kind::Stdout, b"wo".to_vec()), expected[1].clone(), expected[2].clone()]);
        assert_eq!(read(&log, 6), expected[1..]);
        assert_eq!(read(&log, 7), expected[2..]);
        assert_eq!(log.piece(12), None);
        assert_eq!(log.piece(u64::MAX), None);
    }

    #[test]
    fn the_oldest_bytes_make_room() {
        let mut log = Log::default();
        log.append(Kind::Stderr, b"first");
        for _ in 0..3 * CAPACITY / CHUNK {
            log.append(Kind::Stdout, &[b'x'; CHUNK]);
            assert!(log.bytes.capacity() <= 2 * CAPACITY, "{}", log.bytes.capacity());
        }
        log.append(Kind::Stderr, b"last");
        assert_eq!(log.end(), 5 + 3 * CAPACITY as u64 + 4);
        assert_eq!(log.end() - log.start(), CAPACITY as u64);
        assert_eq!(log.piece(log.start() - 1), None);
        let kept = read(&log, log.start());
        assert_eq!(kept.len(), 2);
        assert_eq!((kept[0].0, kept[0].1.len()), (Kind::Stdout, CAPACITY - 4));
        assert_eq!(kept[1], (Kind::Stderr, b"last".to_vec()));
    }

    #[test]
    fn changes_of_output_are_bounded_too() {
        let mut log = Log::default();
        for index in 0..3 * MAX_PIECES {
            log.append(if index % 2 == 0 { Kind::Stdout } else { Kind::Stderr }, b"ab");
        }
        assert_eq!(log.pieces.len(), MAX_PIECES);
        assert_eq!(log.start(), 4 * MAX_PIECES as u64);
        let kept = read(&log, log.start());
        assert_eq!(kept.len(), MAX_PIECES);
        assert!(kept.iter().all(|(_, bytes)| bytes == b"ab"));
        assert_eq!(kept[0].0, Kind::Stdout);
    }
}
