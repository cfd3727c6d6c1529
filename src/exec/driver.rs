//! The task that owns a session's stream: frames in, frames out, deadlines.
//!
//! Reading and writing are two futures in one task, so that a process which does not read its input never keeps its output
//! from arriving. The session ends with the reader: EXIT, ERROR, or the loss of the connection.

use std::future;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::SinkExt;
use futures::StreamExt;
use kiln_wire::codec::FrameCodec;
use kiln_wire::control::ControlAck;
use kiln_wire::exit::Exit;
use kiln_wire::failure::Failure;
use kiln_wire::frame::Frame;
use kiln_wire::frame::Kind;
use kiln_wire::started::Started;
use tokio::io::ReadHalf;
use tokio::io::WriteHalf;
use tokio::sync::mpsc;
use tokio::sync::watch;
use tokio::task::coop;
use tokio::time::Instant;
use tokio_util::codec::FramedRead;
use tokio_util::codec::FramedWrite;
use tokio_util::sync::CancellationToken;

use crate::exec::ExecError;
use crate::exec::control;
use crate::exec::lanes::Lane;
use crate::exec::lanes::Lanes;
use crate::exec::session::Ended;
use crate::exec::session::Start;
use crate::exec::session::State;
use crate::transport::GuestStream;

/// Bytes read from the stream at once (64 KiB).
const READ_BUFFER: usize = 64 << 10;

/// How long after a timeout's SIGKILL the EXIT may take; the caller gets its answer within 250 ms of the deadline.
const TIMEOUT_GRACE: Duration = Duration::from_millis(150);

/// How long after a SIGKILL the EXIT may take before the connection is closed, at which the agent kills the group itself.
const KILL_GRACE: Duration = Duration::from_secs(5);

/// How long a stream that was let go may take for what is on its way.
const LET_GO_GRACE: Duration = Duration::from_secs(5);

/// The code of a process that SIGKILL ended.
const CODE_KILLED: u32 = 128 + SIGKILL as u32;

/// SIGKILL, the same number on every Linux.
pub(crate) const SIGKILL: u8 = 9;

/// What kind of session it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// A process, opened by REQUEST.
    Process,
    /// A stream, opened by CONTROL: an acknowledgement comes first, and an empty STDOUT frame is the guest's end-of-file.
    Stream,
}

/// What goes to the agent between the bytes of standard input.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Message {
    /// A signal for the process group.
    Signal(u8),
    /// The terminal's new width and height.
    Resize(u16, u16),
}

impl Message {
    fn into_frame(self) -> Frame {
        match self {
            Self::Signal(number) => Frame::new(Kind::Signal, vec![number]),
            Self::Resize(cols, rows) => {
                let [a, b] = cols.to_be_bytes();
                let [c, d] = rows.to_be_bytes();
                Frame::new(Kind::Resize, vec![a, b, c, d])
            }
        }
    }
}

/// A session whose first frame is sent.
#[derive(Debug)]
pub(crate) struct Driver {
    pub(crate) stream: Box<dyn GuestStream>,
    pub(crate) mode: Mode,
    pub(crate) lanes: Arc<Lanes>,
    /// Until the driver runs to its end.
    pub(crate) guard: Option<EndGuard>,
    /// `None` when the end-of-file is sent already.
    pub(crate) stdin: Option<mpsc::Receiver<Bytes>>,
    pub(crate) messages: mpsc::Receiver<Message>,
    pub(crate) kill: CancellationToken,
    /// Nobody waits for the end any more; what is on its way shall still arrive.
    pub(crate) let_go: CancellationToken,
    pub(crate) started: Instant,
    pub(crate) deadline: Option<Instant>,
    pub(crate) state: watch::Sender<State>,
}

/// Tells the readers when the driver goes away without an end, because it was aborted. A part of the driver and not of its future's
/// frame: an abort may come before the future's first poll.
#[derive(Debug)]
pub(crate) struct EndGuard(pub(crate) Arc<Lanes>);

impl Drop for EndGuard {
    fn drop(&mut self) {
        self.0.end(Err(ExecError::Dropped));
    }
}

impl Driver {
    /// Drives the session to its end and publishes it.
    pub(crate) async fn run(mut self) {
        let _guard = self.guard.take();
        let lanes = Arc::clone(&self.lanes);
        let state = self.state.clone();
        let started = self.started;
        let ended =
            self.session().await.map(|(exit, timed_out)| Ended { exit, timed_out, duration: started.elapsed() });
        tracing::debug!(?ended, "exec session ended");
        lanes.end(ended.as_ref().map(|_| ()).map_err(Clone::clone));
        state.send_modify(|state| state.ended = Some(ended));
    }

    /// The exit, and whether the deadline passed before it.
    async fn session(self) -> Result<(Exit, bool), ExecError> {
        let Self { stream, mode, lanes, stdin, messages, kill, let_go, deadline, state, .. } = self;
        let (read, write) = tokio::io::split(stream);
        let frames = FramedRead::with_capacity(read, FrameCodec::streaming(), READ_BUFFER);
        let reader = Reader { mode, lanes: &lanes, state: &state, begun: false };
        let reader = reader.run(frames);
        let sink = FramedWrite::new(write, FrameCodec::streaming());
        let writer = write_frames(sink, stdin, messages, &kill);
        tokio::pin!(reader, writer);
        let (mut timed_out, mut killed, mut writing) = (false, false, true);
        let mut give_up = None;
        loop {
            tokio::select! {
                // Deadlines first: a guest that floods us must not be able to outrun them.
                biased;
                () = sleep_until(deadline), if !timed_out => {
                    timed_out = true;
                    kill.cancel();
                    give_up = Some(Instant::now() + TIMEOUT_GRACE);
                }
                () = kill.cancelled(), if !killed => {
                    killed = true;
                    lanes.kill();
                    give_up = give_up.or_else(|| Some(Instant::now() + KILL_GRACE));
                }
                () = let_go.cancelled(), if give_up.is_none() => give_up = Some(Instant::now() + LET_GO_GRACE),
                () = sleep_until(give_up) => {
                    return if timed_out { Ok((Exit { code: CODE_KILLED, peak_rss_kib: None }, true)) } else { Err(ExecError::hung_up()) };
                }
                // Whether writing failed shows in what the reader meets: the EXIT may be on its way.
                () = &mut writer, if writing => writing = false,
                read = &mut reader => {
                    return match read {
                        Ok(exit) => Ok((exit, timed_out)),
                        Err(_) if timed_out => Ok((Exit { code: CODE_KILLED, peak_rss_kib: None }, true)),
                        Err(error) => Err(error),
                    };
                }
            }
        }
    }
}

/// Sleeps until `when`; for ever without one.
async fn sleep_until(when: Option<Instant>) {
    match when {
        Some(when) => tokio::time::sleep_until(when).await,
        None => future::pending().await,
    }
}

/// What becomes of the agent's frames.
struct Reader<'a> {
    mode: Mode,
    lanes: &'a Lanes,
    state: &'a watch::Sender<State>,
    /// Whether the agent's beginning was told.
    begun: bool,
}

impl Reader<'_> {
    async fn run(
        mut self,
        mut frames: FramedRead<ReadHalf<Box<dyn GuestStream>>, FrameCodec>,
    ) -> Result<Exit, ExecError> {
        while let Some(frame) = frames.next().await {
            // The stream may never say "not ready", and neither may the lanes: the deadlines need their turn.
            coop::consume_budget().await;
            if let Some(exit) = self.frame(frame.map_err(ExecError::gone)?).await? {
                return Ok(exit);
            }
        }
        Err(ExecError::hung_up())
    }

    /// Takes one frame; the exit when it is the last.
    async fn frame(&mut self, Frame { kind, payload }: Frame) -> Result<Option<Exit>, ExecError> {
        let protocol = |detail: String| ExecError::Protocol { detail };
        match kind {
            Kind::Error => return Err(Failure::decode(&payload).into()),
            // Only a workload's logs have gaps; elsewhere the frame says nothing.
            Kind::Unknown(_) | Kind::Lost => return Ok(None),
            Kind::Control if self.mode == Mode::Stream && !self.begun => {
                self.begin(acknowledged(&payload)?);
                return Ok(None);
            }
            Kind::Started if self.mode == Mode::Process => {
                let Started { pid } = Started::decode(&payload).map_err(|error| protocol(error.to_string()))?;
                self.begin(Start { pid: Some(pid), ..Start::default() });
                return Ok(None);
            }
            _ if self.mode == Mode::Stream && !self.begun => {
                return Err(protocol(format!("{kind:?} frame before the acknowledgement")));
            }
            // An agent that has output to send has begun, whether or not it says so.
            _ => self.begin(Start::default()),
        }
        match kind {
            Kind::Stdout if payload.is_empty() && self.mode == Mode::Stream => self.lanes.finish(Lane::Stdout),
            Kind::Stdout => self.lanes.push(Lane::Stdout, &payload).await,
            Kind::Stderr => self.lanes.push(Lane::Stderr, &payload).await,
            Kind::Exit => return self.exit(&payload).map(Some),
            other => return Err(protocol(format!("unexpected {other:?} frame"))),
        }
        Ok(None)
    }

    fn exit(&self, payload: &[u8]) -> Result<Exit, ExecError> {
        let exit = Exit::decode(payload).map_err(|error| ExecError::Protocol { detail: error.to_string() })?;
        // A stream has no exit code; what it asked for was done or not.
        if self.mode == Mode::Stream && exit.code != 0 {
            return Err(ExecError::Refused { text: format!("the agent's helper exited with {}", exit.code) });
        }
        Ok(exit)
    }

    /// Tells the handles that the agent has begun, the first time.
    fn begin(&mut self, start: Start) {
        if !self.begun {
            self.begun = true;
            self.state.send_modify(|state| state.start = Some(start));
        }
    }
}

/// What the acknowledgement of a stream says.
fn acknowledged(json: &[u8]) -> Result<Start, ExecError> {
    let ack: ControlAck =
        serde_json::from_slice(json).map_err(|error| ExecError::Protocol { detail: error.to_string() })?;
    let ack = control::accepted(ack)?;
    Ok(Start { total_len: ack.total_len, ..Start::default() })
}

/// Writes until the stream fails; ends early only then.
async fn write_frames(
    mut sink: FramedWrite<WriteHalf<Box<dyn GuestStream>>, FrameCodec>,
    mut stdin: Option<mpsc::Receiver<Bytes>>,
    mut messages: mpsc::Receiver<Message>,
    kill: &CancellationToken,
) {
    let (mut kill_sent, mut messages_open) = (false, true);
    loop {
        let frame = tokio::select! {
            // What is urgent overtakes what waits.
            biased;
            () = kill.cancelled(), if !kill_sent => {
                kill_sent = true;
                Message::Signal(SIGKILL).into_frame()
            }
            message = messages.recv(), if messages_open => match message {
                Some(message) => message.into_frame(),
                None => {
                    messages_open = false;
                    continue;
                }
            },
            piece = next_piece(&mut stdin) => {
                // End-of-file is an empty frame.
                let payload = piece.unwrap_or_else(|| {
                    stdin = None;
                    Bytes::new()
                });
                Frame::new(Kind::Stdin, payload)
            }
        };
        if let Err(error) = sink.send(frame).await {
            tracing::debug!(%error, "exec stream no longer takes input");
            // Dropping `stdin` here is what tells its writer.
            return;
        }
    }
}

/// The next piece of standard input, `None` once at its end; for ever when that is behind us.
async fn next_piece(stdin: &mut Option<mpsc::Receiver<Bytes>>) -> Option<Bytes> {
    match stdin {
        Some(pieces) => pieces.recv().await,
        None => future::pending().await,
    }
}
