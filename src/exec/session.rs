//! A session: its opening bytes, the task that drives it, and what all its handles share.

use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use kiln_wire::AGENT_PORT;
use kiln_wire::exit::Exit;
use kiln_wire::frame::Frame;
use kiln_wire::frame::Kind;
use serde::Serialize;
use tokio::io::AsyncWriteExt;
use tokio::sync::mpsc;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::exec::ExecError;
use crate::exec::ExecStdin;
use crate::exec::driver::Driver;
use crate::exec::driver::EndGuard;
use crate::exec::driver::Message;
use crate::exec::driver::Mode;
use crate::exec::lanes::Lanes;
use crate::transport::Connector;
use crate::transport::GuestStream;

/// Signals and resizes that may wait for the driver.
const MESSAGES: usize = 16;

/// How a session ended.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ended {
    pub(crate) exit: Exit,
    pub(crate) timed_out: bool,
    pub(crate) duration: Duration,
}

pub(crate) type SessionResult = Result<Ended, ExecError>;

/// What the agent said when it began.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Start {
    /// The process's id in the guest.
    pub(crate) pid: Option<u32>,
    /// The size of the file that is read, in bytes.
    pub(crate) total_len: Option<u64>,
}

/// How far a session is.
#[derive(Clone, Debug, Default)]
pub(crate) struct State {
    pub(crate) start: Option<Start>,
    pub(crate) ended: Option<SessionResult>,
}

/// A session whose first bytes are sent. Dropping it closes the connection.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) stdin: Option<ExecStdin>,
    pub(crate) lanes: Arc<Lanes>,
    pub(crate) state: Progress,
    pub(crate) messages: mpsc::Sender<Message>,
    pub(crate) kill: CancellationToken,
    pub(crate) let_go: CancellationToken,
    pub(crate) driver: AbortOnDropHandle<()>,
}

impl Session {
    /// Drives the session on `stream`, which began at `started`, in a task of its own.
    pub(crate) fn new(
        stream: Box<dyn GuestStream>,
        mode: Mode,
        with_stdin: bool,
        started: Instant,
        timeout: Option<Duration>,
    ) -> Self {
        let lanes = Arc::new(Lanes::default());
        let (stdin, pieces) = if with_stdin { Some(ExecStdin::new()).unzip() } else { (None, None) };
        let (messages, message_queue) = mpsc::channel(MESSAGES);
        let (state, progress) = watch::channel(State::default());
        let (kill, let_go) = (CancellationToken::new(), CancellationToken::new());
        let driver = Driver {
            stream,
            mode,
            lanes: Arc::clone(&lanes),
            guard: Some(EndGuard(Arc::clone(&lanes))),
            stdin: pieces,
            messages: message_queue,
            kill: kill.clone(),
            let_go: let_go.clone(),
            started,
            // A timeout beyond what the clock can express never comes.
            deadline: timeout.and_then(|timeout| started.checked_add(timeout)),
            state,
        };
        let driver = AbortOnDropHandle::new(tokio::spawn(driver.run()));
        Self { stdin, lanes, state: Progress(progress), messages, kill, let_go, driver }
    }

    /// A session that never came to be, and how it ended.
    pub(crate) fn ended(ended: Ended) -> Self {
        let lanes = Arc::new(Lanes::default());
        lanes.end(Ok(()));
        // Whoever holds the other ends is gone: nothing can be written or sent.
        let (stdin, _) = ExecStdin::new();
        let (messages, _) = mpsc::channel(1);
        let (_, progress) = watch::channel(State { start: None, ended: Some(Ok(ended)) });
        let driver = AbortOnDropHandle::new(tokio::spawn(async {}));
        let (kill, let_go) = (CancellationToken::new(), CancellationToken::new());
        Self { stdin: Some(stdin), lanes, state: Progress(progress), messages, kill, let_go, driver }
    }
}

/// Tells how far a session is.
#[derive(Clone, Debug)]
pub(crate) struct Progress(watch::Receiver<State>);

impl Progress {
    /// Waits until the agent has begun. A session that ended without a word about its beginning had one, unless it ended with an error.
    pub(crate) async fn started(&mut self) -> Result<Start, ExecError> {
        match self.0.wait_for(|state| state.start.is_some() || state.ended.is_some()).await.as_deref() {
            Ok(State { start: Some(start), .. }) => Ok(*start),
            Ok(State { ended: Some(ended), .. }) => ended.clone().map(|_| Start::default()),
            // The driver's runtime is gone, and the driver with it.
            _ => Err(ExecError::Dropped),
        }
    }

    /// Waits for the end.
    pub(crate) async fn ended(mut self) -> SessionResult {
        match self.0.wait_for(|state| state.ended.is_some()).await {
            Ok(state) => state.ended.clone().unwrap_or(Err(ExecError::Dropped)),
            Err(_) => Err(ExecError::Dropped),
        }
    }

    /// The end, if it has come.
    pub(crate) fn try_ended(&self) -> Result<Option<Ended>, ExecError> {
        // Asked before the value: a driver that ended between the two questions has published its answer.
        let driver_gone = self.0.has_changed().is_err();
        match self.0.borrow().ended.clone() {
            Some(ended) => ended.map(Some),
            None if driver_gone => Err(ExecError::Dropped),
            None => Ok(None),
        }
    }

    /// The id of the process, while it runs.
    pub(crate) fn pid(&self) -> Option<u32> {
        let state = self.0.borrow();
        if state.ended.is_some() { None } else { state.start.and_then(|start| start.pid) }
    }
}

/// One frame of `kind` with `json`, as the first bytes of a session.
pub(crate) fn opening(kind: Kind, json: &impl Serialize) -> Result<BytesMut, ExecError> {
    let bad = |detail: String| ExecError::BadRequest { detail };
    let json = serde_json::to_vec(json).map_err(|error| bad(error.to_string()))?;
    let mut bytes = BytesMut::new();
    Frame::new(kind, json).encode(&mut bytes).map_err(|error| bad(error.to_string()))?;
    Ok(bytes)
}

/// Connects to the agent and sends the first bytes of a session; the caller has the deadline, see [`within`].
pub(crate) async fn connect(connector: &dyn Connector, opening: &[u8]) -> Result<Box<dyn GuestStream>, ExecError> {
    let connected = connector.connect(AGENT_PORT).await;
    let mut stream = connected.map_err(|error| ExecError::Connect(Arc::new(error)))?;
    stream.write_all(opening).await.map_err(ExecError::gone)?;
    stream.flush().await.map_err(ExecError::gone)?;
    Ok(stream)
}

/// What `work` comes to, or [`ExecError::Timeout`] after `patience`.
pub(crate) async fn within<T>(
    patience: Duration,
    work: impl Future<Output = Result<T, ExecError>>,
) -> Result<T, ExecError> {
    tokio::time::timeout(patience, work).await.unwrap_or(Err(ExecError::Timeout { after: patience }))
}
