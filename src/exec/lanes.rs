//! The two outputs on their way from the driver to their readers: bounded buffers, and what happens when they are full.
//!
//! One lock for both, because whether a full output may lose bytes depends on who waits for the other. It is held for a
//! copy of a buffer at most, never across an await.

use std::io;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::task::Context;
use std::task::Poll;
use std::task::Waker;

use bytes::Buf;
use bytes::BytesMut;
use tokio::io::ReadBuf;
use tokio::sync::Notify;

use crate::exec::ExecError;

/// Unread bytes kept for each output (256 KiB).
const CAPACITY: usize = 256 << 10;

/// Unread bytes kept for each output once the process is killed (4 MiB): more than pipe, agent and transport hold, so that what was written is not lost.
const CAPACITY_AFTER_KILL: usize = 4 << 20;

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
}

#[derive(Debug, Default)]
struct Inner {
    stdout: Queue,
    stderr: Queue,
    killed: bool,
    ended: Option<Result<(), ExecError>>,
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
        let capacity = if killed { CAPACITY_AFTER_KILL } else { CAPACITY };
        if queue.lost == 0 && queue.buffer.len() < capacity {
            queue.buffer.extend_from_slice(bytes);
            wake(&mut queue.reader);
            return true;
        }
        let may_lose = queue.lost > 0 || killed || queue.unattended || (starving && !queue.ever_read);
        if may_lose {
            queue.lost += bytes.len() as u64;
        }
        may_lose
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
        let ended = inner.ended.clone();
        let queue = inner.queue(lane);
        queue.ever_read = true;
        let read = if !queue.buffer.is_empty() {
            let taken = queue.buffer.len().min(buf.remaining());
            buf.put_slice(&queue.buffer[..taken]);
            queue.buffer.advance(taken);
            Poll::Ready(Ok(()))
        } else if queue.lost > 0 {
            let lost = queue.lost;
            Poll::Ready(Err(io::Error::other(format!("{lost} bytes were dropped because nobody read them"))))
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
}
