//! Describing and starting a command.

use std::path::PathBuf;
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use kiln_wire::AGENT_PORT;
use kiln_wire::exit::Exit;
use kiln_wire::frame::Frame;
use kiln_wire::frame::Kind;
use kiln_wire::request::Request;
use tokio::io::AsyncWriteExt;
use tokio::sync::mpsc;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::exec::ExecChild;
use crate::exec::ExecError;
use crate::exec::ExecOutcome;
use crate::exec::ExecStderr;
use crate::exec::ExecStdin;
use crate::exec::ExecStdout;
use crate::exec::UnixConnector;
use crate::exec::driver::Driver;
use crate::exec::driver::Ended;
use crate::exec::driver::SIGKILL;
use crate::exec::lanes::Lanes;
use crate::transport::Connector;
use crate::transport::GuestStream;

/// How long connecting and sending the request may take, unless the timeout is shorter (10 s).
const CONNECT_DEADLINE: Duration = Duration::from_secs(10);

/// Signals and resizes that may wait for the driver.
const MESSAGES: usize = 16;

/// A command to run in a guest, like `tokio::process::Command`.
///
/// ```no_run
/// # async fn example() -> Result<(), kiln::exec::ExecError> {
/// use std::time::Duration;
/// use kiln::exec::ExecBuilder;
///
/// let out = ExecBuilder::unix("/run/vm-exec.sock")
///     .argv(["sh", "-c", "echo hi; exit 7"])
///     .timeout(Duration::from_secs(30))
///     .output()
///     .await?;
/// assert_eq!(out.status.code(), Some(7));
/// assert_eq!(out.stdout, b"hi\n");
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
#[must_use = "a command does nothing until it is spawned"]
pub struct ExecBuilder {
    connector: Arc<dyn Connector>,
    request: Request,
    timeout: Option<Duration>,
    kill_on_drop: bool,
}

impl ExecBuilder {
    /// A command for the agent behind `connector`.
    pub fn new(connector: Arc<dyn Connector>) -> Self {
        Self { connector, request: Request::default(), timeout: None, kill_on_drop: true }
    }

    /// A command for the agent behind the Unix socket at `path`.
    pub fn unix(path: impl Into<PathBuf>) -> Self {
        Self::new(Arc::new(UnixConnector::new(path)))
    }

    /// The program and its arguments, replacing earlier ones. A program without `/` is looked for in the guest's PATH.
    pub fn argv<S: Into<String>>(mut self, argv: impl IntoIterator<Item = S>) -> Self {
        self.request.argv = argv.into_iter().map(Into::into).collect();
        self
    }

    /// Adds or replaces a variable of the image's environment.
    pub fn env(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.request.env.insert(name.into(), value.into());
        self
    }

    /// The working directory; the image's by default, and a relative path starts there.
    pub fn cwd(mut self, cwd: impl Into<String>) -> Self {
        self.request.cwd = Some(cwd.into());
        self
    }

    /// Who runs it: `name`, `uid`, `name:group` or `uid:gid`, looked up in the image; the image's user by default.
    pub fn user(mut self, user: impl Into<String>) -> Self {
        self.request.user = Some(user.into());
        self
    }

    /// Gives the process a terminal instead of three pipes; everything it prints is then standard output.
    pub fn tty(mut self, tty: bool) -> Self {
        self.request.tty = tty;
        self
    }

    /// The terminal's size, in characters.
    pub fn winsize(mut self, cols: u16, rows: u16) -> Self {
        (self.request.cols, self.request.rows) = (Some(cols), Some(rows));
        self
    }

    /// Kills the process group with SIGKILL when it has not ended this long after `spawn` began.
    ///
    /// Whatever waits returns within 250 ms of the deadline, even when the guest is dead.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }

    /// Whether dropping the [`ExecChild`] ends the process; true by default.
    pub fn kill_on_drop(mut self, kill: bool) -> Self {
        self.kill_on_drop = kill;
        self
    }

    /// Starts the command.
    ///
    /// The protocol does not confirm a start: a program that does not exist shows as [`ExecError::NotFound`] when the child is
    /// waited for, not here. Must be called in a tokio runtime.
    ///
    /// # Errors
    /// [`ExecError::BadRequest`] without a program or with a request over 16 MiB; [`ExecError::Connect`], [`ExecError::AgentGone`]
    /// or [`ExecError::Timeout`] when the agent cannot be reached.
    ///
    /// # Cancel safety
    /// Cancelled, the connection is closed; a process that had already been started is killed by the agent.
    pub async fn spawn(self) -> Result<ExecChild, ExecError> {
        self.start(true).await
    }

    /// Runs the command without input and collects what it prints.
    ///
    /// A command that the timeout ended is an outcome with `timed_out`, with what it had printed. Everything is kept in
    /// memory: for a process that may print without limit, [`spawn`](Self::spawn) and read.
    ///
    /// # Errors
    /// Why the process did not start, or why its end is not known.
    ///
    /// # Cancel safety
    /// Cancelled, the process group is killed and what was read is lost.
    pub async fn output(self) -> Result<ExecOutcome, ExecError> {
        let started = Instant::now();
        let timeout = self.timeout;
        match self.start(false).await {
            Ok(child) => child.wait_with_output().await,
            Err(error) => timed_out_before_start(timeout, started, error),
        }
    }

    /// Runs the command without input, drops what it prints, and returns how it ended.
    ///
    /// # Errors
    /// As [`output`](Self::output).
    ///
    /// # Cancel safety
    /// Cancelled, the process group is killed.
    pub async fn status(self) -> Result<ExitStatus, ExecError> {
        let started = Instant::now();
        let timeout = self.timeout;
        match self.start(false).await {
            Ok(mut child) => {
                drop((child.stdout.take(), child.stderr.take()));
                child.wait().await
            }
            Err(error) => Ok(timed_out_before_start(timeout, started, error)?.status),
        }
    }

    async fn start(self, with_stdin: bool) -> Result<ExecChild, ExecError> {
        let started = Instant::now();
        let opening = self.opening(with_stdin)?;
        let patience = self.timeout.map_or(CONNECT_DEADLINE, |timeout| timeout.min(CONNECT_DEADLINE));
        let stream = tokio::time::timeout(patience, open(&*self.connector, &opening))
            .await
            .unwrap_or(Err(ExecError::Timeout { after: patience }))?;
        let lanes = Arc::new(Lanes::default());
        let (stdin, pieces) = if with_stdin { Some(ExecStdin::new()).unzip() } else { (None, None) };
        let (messages, message_queue) = mpsc::channel(MESSAGES);
        let (result_sender, result) = watch::channel(None);
        let kill = CancellationToken::new();
        let driver = Driver {
            stream,
            lanes: Arc::clone(&lanes),
            stdin: pieces,
            messages: message_queue,
            kill: kill.clone(),
            started,
            // A timeout beyond what the clock can express never comes.
            deadline: self.timeout.and_then(|timeout| started.checked_add(timeout)),
            result: result_sender,
        };
        let task = tokio::spawn(driver.run());
        let driver = self.kill_on_drop.then(|| AbortOnDropHandle::new(task));
        Ok(ExecChild {
            stdin,
            stdout: Some(ExecStdout::new(Arc::clone(&lanes))),
            stderr: Some(ExecStderr::new(Arc::clone(&lanes))),
            lanes,
            result,
            messages,
            kill,
            _driver: driver,
        })
    }

    /// The first bytes of the session: REQUEST, and the end of the input when there is none.
    fn opening(&self, with_stdin: bool) -> Result<BytesMut, ExecError> {
        let bad = |detail: String| ExecError::BadRequest { detail };
        if self.request.argv.is_empty() {
            return Err(bad("no program given".to_owned()));
        }
        let json = serde_json::to_vec(&self.request).map_err(|error| bad(error.to_string()))?;
        let mut bytes = BytesMut::new();
        let encoded = Frame::new(Kind::Request, json).encode(&mut bytes);
        encoded.map_err(|error| bad(error.to_string()))?;
        if !with_stdin {
            Frame::new(Kind::Stdin, &b""[..]).encode(&mut bytes).map_err(|error| bad(error.to_string()))?;
        }
        Ok(bytes)
    }
}

/// Connects to the agent and sends the first bytes of a session.
pub(crate) async fn open(connector: &dyn Connector, opening: &[u8]) -> Result<Box<dyn GuestStream>, ExecError> {
    let connected = connector.connect(AGENT_PORT).await;
    let mut stream = connected.map_err(|error| ExecError::Connect(Arc::new(error)))?;
    stream.write_all(opening).await.map_err(ExecError::gone)?;
    stream.flush().await.map_err(ExecError::gone)?;
    Ok(stream)
}

/// A command whose timeout passed while the agent was not reachable timed out like any other.
fn timed_out_before_start(
    timeout: Option<Duration>,
    started: Instant,
    error: ExecError,
) -> Result<ExecOutcome, ExecError> {
    let duration = started.elapsed();
    match (&error, timeout) {
        (ExecError::Timeout { .. }, Some(timeout)) if duration >= timeout => {
            let exit = Exit { code: 128 + u32::from(SIGKILL), peak_rss_kib: None };
            Ok(ExecOutcome::new(Ended { exit, timed_out: true, duration }, Vec::new(), Vec::new()))
        }
        _ => Err(error),
    }
}
