//! What the workload writes, as a stream.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Context;
use std::task::Poll;
use std::task::ready;
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt;
use futures::Stream;
use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::FusedStream;
use kiln_wire::control::Control;
use kiln_wire::control::ControlAck;
use kiln_wire::exit::Exit;
use kiln_wire::failure::Failure;
use kiln_wire::frame::Frame;
use kiln_wire::frame::Kind;
use kiln_wire::lost::Lost;

use crate::exec::ExecError;
use crate::exec::Frames;
use crate::workload::reattach::Losses;
use crate::workload::reattach::Run;

/// Frames without meaning that are skipped at once before other tasks get their turn.
const SKIPPED: usize = 64;

/// A piece of what a workload has written.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum WorkloadLog {
    /// It wrote this to its standard output: never empty.
    Stdout(Bytes),
    /// It wrote this to its standard error.
    Stderr(Bytes),
    /// It wrote this much, to either, which the agent no longer had when this reader came for it.
    Lost {
        /// How many bytes.
        bytes: u64,
    },
}

/// What a workload writes, as a [`Stream`] of [`WorkloadLog`]s that ends when the workload has ended and all it wrote has come.
///
/// It begins with the first byte that the workload wrote, or says how much of that is lost. The two outputs come in the order in which the
/// agent read them. A reader that is slow slows nobody: what it is too slow for is lost, and said to be. A connection that breaks is made again, and the
/// logs go on where they were; only when the guest is gone they end with an error, which is then the last item.
///
/// How the workload ended is told by [`Workload::wait`](crate::workload::Workload::wait).
///
/// # Dropping
/// Closes the connection; the workload does not notice.
///
/// # Cancel safety
/// Dropping a future of the next piece, such as `StreamExt::next`, loses nothing.
///
/// # Examples
/// ```no_run
/// # async fn f(workload: kiln::Workload) -> Result<(), kiln::Error> {
/// use futures::TryStreamExt;
/// use kiln::workload::WorkloadLog;
///
/// let mut logs = workload.logs();
/// while let Some(piece) = logs.try_next().await? {
///     match piece {
///         WorkloadLog::Stdout(bytes) => print!("{}", String::from_utf8_lossy(&bytes)),
///         WorkloadLog::Stderr(bytes) => eprint!("{}", String::from_utf8_lossy(&bytes)),
///         WorkloadLog::Lost { bytes } => eprintln!("({bytes} bytes are lost)"),
///         _ => {}
///     }
/// }
/// # Ok(()) }
/// ```
pub struct WorkloadLogs {
    run: Arc<Run>,
    /// How many bytes have come or are known to be lost.
    offset: u64,
    losses: Losses,
    state: State,
}

enum State {
    /// On the way to a connection.
    Attaching(BoxFuture<'static, Result<(ControlAck, Frames), ExecError>>),
    Attached(Box<Frames>),
    Over,
}

impl fmt::Debug for WorkloadLogs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let over = matches!(self.state, State::Over);
        f.debug_struct("WorkloadLogs")
            .field("run", &self.run)
            .field("offset", &self.offset)
            .field("over", &over)
            .finish()
    }
}

/// What a frame comes to.
enum Step {
    Piece(WorkloadLog),
    Nothing,
    End,
}

impl WorkloadLogs {
    pub(super) fn new(run: Arc<Run>) -> Self {
        let state = State::Attaching(attach(Arc::clone(&run), 0, Duration::ZERO));
        Self { run, offset: 0, losses: Losses::default(), state }
    }

    fn take(&mut self, Frame { kind, payload }: Frame) -> Result<Step, ExecError> {
        let piece = match kind {
            Kind::Stdout => WorkloadLog::Stdout(payload),
            Kind::Stderr => WorkloadLog::Stderr(payload),
            Kind::Lost => WorkloadLog::Lost { bytes: Lost::decode(&payload).map_err(protocol)?.bytes },
            Kind::Exit => return Exit::decode(&payload).map(|_| Step::End).map_err(protocol),
            Kind::Error => return Err(Failure::decode(&payload).into()),
            Kind::Unknown(_) => return Ok(Step::Nothing),
            other => return Err(protocol(format!("unexpected {other:?} frame"))),
        };
        let length = match &piece {
            WorkloadLog::Stdout(bytes) | WorkloadLog::Stderr(bytes) => bytes.len() as u64,
            WorkloadLog::Lost { bytes } => *bytes,
        };
        let beyond = || protocol("more bytes than can be counted");
        self.offset = self.offset.checked_add(length).ok_or_else(beyond)?;
        Ok(if length == 0 { Step::Nothing } else { Step::Piece(piece) })
    }

    /// Makes the connection again, or gives up with `error`.
    fn recover(&mut self, error: ExecError) -> Result<(), ExecError> {
        let pause = self.losses.bear(error)?;
        self.state = State::Attaching(attach(Arc::clone(&self.run), self.offset, pause));
        Ok(())
    }

    /// The next step, `None` when the stream must let others have their turn.
    fn poll_step(&mut self, cx: &mut Context<'_>) -> Poll<Result<Step, ExecError>> {
        let received = match &mut self.state {
            State::Over => return Poll::Ready(Ok(Step::End)),
            State::Attaching(attaching) => match ready!(attaching.poll_unpin(cx)) {
                Ok((_, frames)) => {
                    self.state = State::Attached(Box::new(frames));
                    return Poll::Ready(Ok(Step::Nothing));
                }
                Err(error) => Err(error),
            },
            State::Attached(frames) => match ready!(frames.poll_next_unpin(cx)) {
                Some(frame) => frame.map_err(ExecError::gone),
                None => Err(ExecError::hung_up()),
            },
        };
        Poll::Ready(match received.and_then(|frame| self.take(frame)) {
            Ok(Step::Piece(piece)) => {
                self.losses.forget();
                Ok(Step::Piece(piece))
            }
            Ok(step) => Ok(step),
            Err(error) => self.recover(error).map(|()| Step::Nothing),
        })
    }
}

fn protocol(detail: impl fmt::Display) -> ExecError {
    ExecError::Protocol { detail: detail.to_string() }
}

/// Opens the logs at `from`, after a pause.
fn attach(run: Arc<Run>, from: u64, pause: Duration) -> BoxFuture<'static, Result<(ControlAck, Frames), ExecError>> {
    async move {
        if !pause.is_zero() {
            tokio::time::sleep(pause).await;
        }
        let action = Control::WorkloadLogs { run: Some(run.number), from: Some(from) };
        run.follow(action).await
    }
    .boxed()
}

impl Stream for WorkloadLogs {
    type Item = Result<WorkloadLog, ExecError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        for _ in 0..SKIPPED {
            match ready!(this.poll_step(cx)) {
                Ok(Step::Piece(piece)) => return Poll::Ready(Some(Ok(piece))),
                Ok(Step::Nothing) => {}
                Ok(Step::End) => {
                    this.state = State::Over;
                    return Poll::Ready(None);
                }
                Err(error) => {
                    this.state = State::Over;
                    return Poll::Ready(Some(Err(error)));
                }
            }
        }
        // The connection may never say "not ready", and the caller's task has others to serve.
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

impl FusedStream for WorkloadLogs {
    fn is_terminated(&self) -> bool {
        matches!(self.state, State::Over)
    }
}
