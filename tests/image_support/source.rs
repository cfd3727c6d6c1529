//! A reader that does as it is told: gives bytes, has none yet, goes silent, breaks.

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Context;
use std::task::Poll;
use std::time::Duration;

use tokio::io::AsyncRead;
use tokio::io::ReadBuf;
use tokio::sync::Notify;
use tokio::time::Sleep;

pub enum Step {
    /// These bytes, in one read.
    Bytes(Vec<u8>),
    /// Nothing now, and something right after.
    Pause,
    /// Nothing for as long as this.
    Wait(Duration),
    /// Nothing any more; says so when it is asked.
    Stall(Arc<Notify>),
    Fail(io::ErrorKind),
}

pub struct Source {
    steps: VecDeque<Step>,
    sleep: Option<Pin<Box<Sleep>>>,
}

impl Source {
    pub fn new(steps: impl IntoIterator<Item = Step>) -> Self {
        Self { steps: steps.into_iter().collect(), sleep: None }
    }

    /// In pieces of this many bytes.
    pub fn in_pieces(bytes: &[u8], length: usize) -> Self {
        Self::new(bytes.chunks(length).map(|piece| Step::Bytes(piece.to_vec())))
    }

    /// The same, with a pause before each.
    pub fn hesitant(bytes: &[u8], length: usize) -> Self {
        Self::new(bytes.chunks(length).flat_map(|piece| [Step::Pause, Step::Bytes(piece.to_vec())]))
    }
}

impl AsyncRead for Source {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if let Some(sleep) = &mut self.sleep {
            std::task::ready!(sleep.as_mut().poll(cx));
            self.sleep = None;
        }
        match self.steps.pop_front() {
            None => Poll::Ready(Ok(())),
            Some(Step::Bytes(mut bytes)) => {
                let rest = bytes.split_off(bytes.len().min(buffer.remaining()));
                buffer.put_slice(&bytes);
                if !rest.is_empty() {
                    self.steps.push_front(Step::Bytes(rest));
                }
                Poll::Ready(Ok(()))
            }
            Some(Step::Pause) => {
                cx.waker().wake_by_ref();
                Poll::Pending
            }
            Some(Step::Wait(time)) => {
                self.sleep = Some(Box::pin(tokio::time::sleep(time)));
                self.poll_read(cx, buffer)
            }
            Some(Step::Stall(asked)) => {
                asked.notify_one();
                self.steps.push_front(Step::Stall(asked));
                Poll::Pending
            }
            Some(Step::Fail(kind)) => Poll::Ready(Err(kind.into())),
        }
    }
}
