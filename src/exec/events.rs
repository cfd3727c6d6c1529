//! A process as one stream: what it prints and how it ends, in order.

use std::fmt;
use std::pin::Pin;
use std::task::Context;
use std::task::Poll;

use bytes::Bytes;
use futures::Stream;
use futures::stream::FusedStream;
use tokio_util::sync::ReusableBoxFuture;

use crate::exec::ExecChild;
use crate::exec::ExecError;
use crate::exec::ExecExit;
use crate::exec::ExecSignaller;
use crate::exec::lanes::Lane;
use crate::exec::session::SessionResult;

/// Something that a process did.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ExecEvent {
    /// It wrote to its standard output: at most 64 KiB a piece, never empty.
    Stdout(Bytes),
    /// It wrote to its standard error.
    Stderr(Bytes),
    /// It ended; the last event.
    Exit(ExecExit),
}

/// What a process in a guest does, as a [`Stream`] of [`ExecEvent`]s: made for server-sent events and streaming RPCs.
///
/// The two outputs come in the order in which they arrived from the guest, then the exit, then the end of the stream. A session that fails ends with
/// its error in place of the exit. A consumer that is slow slows the process down, as a full pipe does, and nobody else. The
/// process's timeout holds all the same: its exit then comes behind what had been printed.
///
/// # Dropping
/// Dropping the stream drops the child: unless it was built with [`kill_on_drop(false)`](crate::exec::ExecBuilder::kill_on_drop), the process
/// group is killed. So a request handler that streams events needs nothing more to end the command of a client that has gone.
///
/// # Cancel safety
/// Dropping a future of the next event, such as `StreamExt::next`, loses nothing.
///
/// # Examples
/// ```no_run
/// # async fn example() -> Result<(), kiln::exec::ExecError> {
/// use futures::TryStreamExt;
/// use kiln::exec::{ExecBuilder, ExecEvent};
///
/// let child = ExecBuilder::new("/run/vm-exec.sock").argv(["make", "-j4"]).spawn().await?;
/// let mut events = child.events();
/// while let Some(event) = events.try_next().await? {
///     match event {
///         ExecEvent::Stdout(bytes) => println!("out {bytes:?}"),
///         ExecEvent::Stderr(bytes) => println!("err {bytes:?}"),
///         ExecEvent::Exit(exit) => println!("{} after {:?}", exit.status, exit.duration),
///         _ => {}
///     }
/// }
/// # Ok(())
/// # }
/// ```
pub struct ExecEvents {
    child: ExecChild,
    /// The outputs that the child still held.
    held: Vec<Lane>,
    ended: ReusableBoxFuture<'static, SessionResult>,
    over: bool,
}

impl fmt::Debug for ExecEvents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ExecEvents").field("child", &self.child).field("over", &self.over).finish_non_exhaustive()
    }
}

impl ExecEvents {
    pub(crate) fn new(mut child: ExecChild) -> Self {
        drop(child.stdin.take());
        let stdout = child.stdout.as_ref().map(|_| Lane::Stdout);
        let stderr = child.stderr.as_ref().map(|_| Lane::Stderr);
        let ended = ReusableBoxFuture::new(child.state.clone().ended());
        Self { child, held: stdout.into_iter().chain(stderr).collect(), ended, over: false }
    }

    /// The process's id in the guest; see [`ExecChild::id`].
    #[must_use]
    pub fn id(&self) -> Option<u32> {
        self.child.id()
    }

    /// A handle that signals the process while its events are read.
    #[must_use]
    pub fn signaller(&self) -> ExecSignaller {
        self.child.signaller()
    }
}

impl Stream for ExecEvents {
    type Item = Result<ExecEvent, ExecError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        if this.over {
            return Poll::Ready(None);
        }
        match this.child.lanes.poll_piece(&this.held, cx) {
            Poll::Ready(Some(piece)) => Poll::Ready(Some(piece.map(|(lane, bytes)| match lane {
                Lane::Stdout => ExecEvent::Stdout(bytes),
                Lane::Stderr => ExecEvent::Stderr(bytes),
            }))),
            // The lanes end just before the session does.
            Poll::Ready(None) => this.ended.poll(cx).map(|ended| {
                this.over = true;
                Some(ended.map(|ended| ExecEvent::Exit(ended.into())))
            }),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl FusedStream for ExecEvents {
    fn is_terminated(&self) -> bool {
        self.over
    }
}
