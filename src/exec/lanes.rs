//! The two outputs on their way from the driver to their readers: bounded buffers, and what happens when they are full.
//!
//! Beside the bytes the lanes note in which order they came, until somebody reads one output by itself.
//!
//! One lock for both, because whether a full output may lose bytes depends on who waits for the other. It is held for a
//! copy of a buffer at most, never across an await.

use std::collections::VecDeque;
use std::io;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::task::Context;
use std::task::Poll;
use std::task::Waker;

use bytes::Buf;
use bytes::Bytes;
use bytes::BytesMut;
use tokio::io::ReadBuf;
use tokio::sync::Notify;

use crate::exec::ExecError;

/// Unread bytes kept for each output (256 KiB).
const CAPACITY: usize = 256 << 10;

/// Unread bytes kept for each output once the process is killed (4 MiB): more than pipe, agent and transport hold, so that what was written is not lost.
const CAPACITY_AFTER_KILL: usize = 4 << 20;

/// Changes from one output to the other that are noted (4096, so 64 KiB); a process that alternates more often than it is read waits.
const ORDER_CAPACITY: usize = 4096;

/// The most that one event carries (64 KiB).
const EVENT: usize = 64 << 10;

/// Which output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lane {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

impl Lane {
    fn other(self) -> Self {
        match self {
            Self::Stdout => Self::Stderr,
            Self::Stderr => Self::Stdout,
        }
    }
}

#[derive(Debug, Default)]
struct Queue {
    buffer: BytesMut,
    reader: Option<Waker>,
    /// Nobody will ever read.
    closed: bool,
    /// Nobody reads now, and `wait` must come to its end.
    unattended: bool,
    ever_read: bool,
    /// Bytes dropped; nothing is appended after a gap.
    lost: u64,
    /// The guest said end-of-file before the end of the session.
    finished: bool,
}

#[derive(Debug)]
struct Inner {
    stdout: Queue,
    stderr: Queue,
    /// Runs of unread bytes, in the order in which they came; given up once an output is read by itself.
    order: Option<VecDeque<(Lane, usize)>>,
    killed: bool,
    ended: Option<Result<(), ExecError>>,
}

impl Default for Inner {
    fn default() -> Self {
        Self {
            stdout: Queue::default(),
            stderr: Queue::default(),
            order: Some(VecDeque::new()),
            killed: false,
            ended: None,
        }
    }
}

impl Inner {
    fn queue(&mut self, lane: Lane) -> &mut Queue {
        match lane {
            Lane::Stdout => &mut self.stdout,
            Lane::Stderr => &mut self.stderr,
        }
    }

    /// Takes `bytes`, or says that they have to wait.
    fn accept(&mut self, lane: Lane, bytes: &[u8]) -> bool {
        let starving = self.queue(lane.other()).reader.is_some();
        let killed = self.killed;
        let queue = self.queue(lane);
        if queue.closed {
            return true;
        }
        let may_lose = queue.lost > 0 || killed || queue.unattended || (starving && !queue.ever_read);
        let capacity = if killed { CAPACITY_AFTER_KILL } else { CAPACITY };
        if queue.lost == 0 && queue.buffer.len() < capacity {
            if !self.note_order(lane, bytes.len()) {
                if !may_lose {
                    return false;
                }
                // Rather their order than the bytes.
                self.order = None;
            }
            let queue = self.queue(lane);
            queue.buffer.extend_from_slice(bytes);
            wake(&mut queue.reader);
            return true;
        }
        if may_lose {
            queue.lost += bytes.len() as u64;
        }
        may_lose
    }

    /// Notes that `len` bytes of `lane` came last; false when there is no room for the note.
    fn note_order(&mut self, lane: Lane, len: usize) -> bool {
        let Some(order) = &mut self.order else { return true };
        let full = order.len() >= ORDER_CAPACITY;
        match order.back_mut() {
            Some((last, run)) if *last == lane => *run += len,
            _ if full => return false,
            _ => order.push_back((lane, len)),
        }
        true
    }

    /// The next bytes of the outputs in `held`, in the order in which they came as far as that is known.
    fn next_piece(&mut self, held: &[Lane]) -> Option<(Lane, Bytes)> {
        while let Some((lane, run)) = self.order.as_mut().and_then(VecDeque::pop_front) {
            let available = self.queue(lane).buffer.len();
            if !held.contains(&lane) || available == 0 {
                continue;
            }
            let taken = run.min(available).min(EVENT);
            if let (Some(order), rest @ 1..) = (&mut self.order, run - taken) {
                order.push_front((lane, rest));
            }
            return Some((lane, self.queue(lane).buffer.split_to(taken).freeze()));
        }
        let lane = *held.iter().find(|lane| !self.queue(**lane).buffer.is_empty())?;
        let buffer = &mut self.queue(lane).buffer;
        let taken = buffer.len().min(EVENT);
        Some((lane, buffer.split_to(taken).freeze()))
    }
}

fn wake(reader: &mut Option<Waker>) {
    if let Some(waker) = reader.take() {
        waker.wake();
    }
}

/// Both outputs of one session.
#[derive(Debug, Default)]
pub(crate) struct Lanes {
    inner: Mutex<Inner>,
    /// Something changed that may let the driver go on.
    changed: Notify,
}

impl Lanes {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Each critical section leaves the queues consistent at every point where it could panic.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut Inner)) {
        change(&mut self.lock());
        self.changed.notify_one();
    }

    /// Hands `bytes` to `lane`, waiting for room. Only the driver calls it.
    pub(crate) async fn push(&self, lane: Lane, bytes: &[u8]) {
        while !self.lock().accept(lane, bytes) {
            self.changed.notified().await;
        }
    }

    /// The process is being killed: from now on nothing waits for a reader.
    pub(crate) fn kill(&self) {
        self.change(|inner| inner.killed = true);
    }

    /// No more bytes come; readers get what is buffered and then end-of-file or the error. Only the first call counts.
    pub(crate) fn end(&self, how: Result<(), ExecError>) {
        let mut inner = self.lock();
        if inner.ended.is_none() {
            inner.ended = Some(how);
            wake(&mut inner.stdout.reader);
            wake(&mut inner.stderr.reader);
        }
    }

    /// The guest's end-of-file on `lane`, which comes before the end of the session.
    pub(crate) fn finish(&self, lane: Lane) {
        let mut inner = self.lock();
        let queue = inner.queue(lane);
        queue.finished = true;
        wake(&mut queue.reader);
    }

    /// Whether the caller sits in `wait` with the handle of `lane` still inside the child.
    pub(crate) fn set_unattended(&self, lane: Lane, unattended: bool) {
        self.change(|inner| inner.queue(lane).unattended = unattended);
    }

    /// The handle of `lane` is gone.
    pub(crate) fn close(&self, lane: Lane) {
        self.change(|inner| {
            let queue = inner.queue(lane);
            queue.closed = true;
            queue.reader = None;
            queue.buffer = BytesMut::new();
        });
    }

    /// `AsyncRead::poll_read` of `lane`.
    pub(crate) fn poll_read(&self, lane: Lane, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let mut inner = self.lock();
        inner.order = None;
        let ended = inner.ended.clone();
        let queue = inner.queue(lane);
        queue.ever_read = true;
        let read = if !queue.buffer.is_empty() {
            let taken = queue.buffer.len().min(buf.remaining());
            buf.put_slice(&queue.buffer[..taken]);
            queue.buffer.advance(taken);
            Poll::Ready(Ok(()))
        } else if queue.lost > 0 {
            Poll::Ready(Err(ExecError::OutputLost { bytes: queue.lost }.into()))
        } else if queue.finished {
            Poll::Ready(Ok(()))
        } else if let Some(ended) = ended {
            Poll::Ready(ended.map_err(io::Error::from))
        } else {
            queue.reader = Some(cx.waker().clone());
            Poll::Pending
        };
        drop(inner);
        self.changed.notify_one();
        read
    }

    /// The next piece of the outputs in `held`, `None` after the last. A gap is an error, once.
    pub(crate) fn poll_piece(
        &self,
        held: &[Lane],
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<(Lane, Bytes), ExecError>>> {
        let mut inner = self.lock();
        for lane in held {
            let queue = inner.queue(*lane);
            queue.ever_read = true;
            queue.reader = None;
        }
        let next = if let Some(piece) = inner.next_piece(held) {
            Poll::Ready(Some(Ok(piece)))
        } else if let Some(lane) = held.iter().find(|lane| inner.queue(**lane).lost > 0) {
            let bytes = std::mem::take(&mut inner.queue(*lane).lost);
            inner.queue(*lane).closed = true;
            Poll::Ready(Some(Err(ExecError::OutputLost { bytes })))
        } else if inner.ended.is_some() {
            Poll::Ready(None)
        } else {
            held.iter().for_each(|lane| inner.queue(*lane).reader = Some(cx.waker().clone()));
            Poll::Pending
        };
        drop(inner);
        self.changed.notify_one();
        next
    }
}
