//! Describing and starting a command.

use std::path::PathBuf;
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use kiln_wire::exit::Exit;
use kiln_wire::frame::Frame;
use kiln_wire::frame::Kind;
use kiln_wire::request::Request;
use kiln_wire::request::StageFile;
use tokio::time::Instant;

use crate::exec::AgentInfo;
use crate::exec::ExecChild;
use crate::exec::ExecError;
use crate::exec::ExecOutcome;
use crate::exec::UnixConnector;
use crate::exec::driver::Mode;
use crate::exec::driver::SIGKILL;
use crate::exec::link::Link;
use crate::exec::session;
use crate::exec::session::Ended;
use crate::exec::session::Session;
use crate::transport::Connector;

/// How long connecting and sending the request may take, unless the timeout is shorter (10 s).
const CONNECT_DEADLINE: Duration = Duration::from_secs(10);

/// How long the agent may take from the request to its word that the process runs (30 s): a guest whose memory is used up may page for a while.
const START_DEADLINE: Duration = Duration::from_secs(30);

/// A command to run in a guest, like `tokio::process::Command`.
///
/// ```no_run
/// # async fn example() -> Result<(), kiln::exec::ExecError> {
/// use std::time::Duration;
/// use kiln::exec::ExecBuilder;
///
/// let out = ExecBuilder::new("/run/vm-exec.sock")
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
    link: Link,
    request: Request,
    timeout: Option<Duration>,
    kill_on_drop: bool,
}

impl ExecBuilder {
    /// A command for the agent behind the Unix socket at `path`: a VM's ([`ExecSocket`](crate::exec::ExecSocket)), or
    /// `kiln-agent --unix PATH`.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self::over(Arc::new(UnixConnector::new(path)))
    }

    /// A command for the agent behind `connector`.
    pub fn over(connector: Arc<dyn Connector>) -> Self {
        Self::for_link(Link::new(connector))
    }

    pub(crate) fn for_link(link: Link) -> Self {
        Self { link, request: Request::default(), timeout: None, kill_on_drop: true }
    }

    /// What the agent can do, where that is known: else the first [`spawn`](Self::spawn) of this builder or its clones asks the agent
    /// with a connection of its own.
    pub fn agent(mut self, info: AgentInfo) -> Self {
        self.link = self.link.knowing(info);
        self
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

    /// Has the agent write a file before the command runs: at once under its name, with mode 0644, owned by root, in a folder that exists.
    ///
    /// The files and the rest of the request together may have about 12 MiB;
    /// [`Vm::write_file`](crate::vm::Vm::write_file) takes any size.
    pub fn stage_file(self, path: impl Into<String>, content: impl AsRef<[u8]>) -> Self {
        self.stage(path.into(), content.as_ref(), None)
    }

    /// As [`stage_file`](Self::stage_file), with permission bits.
    pub fn stage_file_mode(self, path: impl Into<String>, content: impl AsRef<[u8]>, mode: u32) -> Self {
        self.stage(path.into(), content.as_ref(), Some(mode))
    }

    fn stage(mut self, path: String, content: &[u8], mode: Option<u32>) -> Self {
        self.request.stage_files.push(StageFile { path, data_b64: STANDARD.encode(content), mode });
        self
    }

    /// Adds a command to run after `argv`, and after those added before, if the one before it exited with 0: `&&` without a shell.
    ///
    /// All of them share the standard streams; how the last one that ran ended is how the whole ended.
    pub fn chain<S: Into<String>>(mut self, argv: impl IntoIterator<Item = S>) -> Self {
        self.request.chain.push(argv.into_iter().map(Into::into).collect());
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

    /// Starts the command and waits until the agent says that it runs.
    ///
    /// An agent that cannot say so (see [`AgentInfo::tells_starts`]) is not waited for: a program that does not exist then shows when the
    /// child is waited for. A command whose [`timeout`](Self::timeout) passes meanwhile is a child that has timed out. Must be called in a tokio
    /// runtime.
    ///
    /// # Errors
    /// Why it could not be started: [`ExecError::NotFound`], [`ExecError::NotExecutable`], [`ExecError::BadCwd`],
    /// [`ExecError::UnknownUser`], [`ExecError::BadRequest`] (no program, or a request over 16 MiB), [`ExecError::System`],
    /// [`ExecError::Refused`]; or why the agent cannot be reached: [`ExecError::Connect`], [`ExecError::AgentGone`],
    /// [`ExecError::Protocol`], [`ExecError::Timeout`].
    ///
    /// # Cancel safety
    /// Cancelled, the connection is closed; a process that had already been started is killed by the agent.
    pub async fn spawn(mut self) -> Result<ExecChild, ExecError> {
        let started = Instant::now();
        let kill_on_drop = self.kill_on_drop;
        match self.link.tells_starts(self.connect_patience()).await {
            Ok(tells) => self.request.started = tells,
            Err(error) => return Ok(ExecChild::new(self.timed_out(started, error)?, kill_on_drop)),
        }
        let confirmed = self.request.started;
        let mut session = self.start(started, true).await?;
        if confirmed {
            // With a timeout the session ends by itself, as one that timed out.
            session::within(START_DEADLINE, session.state.started()).await?;
        }
        Ok(ExecChild::new(session, kill_on_drop))
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
        let session = self.start(Instant::now(), false).await?;
        ExecChild::new(session, true).wait_with_output().await
    }

    /// Runs the command without input, drops what it prints, and returns how it ended.
    ///
    /// # Errors
    /// As [`output`](Self::output).
    ///
    /// # Cancel safety
    /// Cancelled, the process group is killed.
    pub async fn status(self) -> Result<ExitStatus, ExecError> {
        let session = self.start(Instant::now(), false).await?;
        let mut child = ExecChild::new(session, true);
        drop((child.stdout.take(), child.stderr.take()));
        child.wait().await
    }

    fn connect_patience(&self) -> Duration {
        self.timeout.map_or(CONNECT_DEADLINE, |timeout| timeout.min(CONNECT_DEADLINE))
    }

    async fn start(self, started: Instant, with_stdin: bool) -> Result<Session, ExecError> {
        if self.request.argv.is_empty() {
            return Err(ExecError::BadRequest { detail: "no program given".to_owned() });
        }
        let mut opening = session::opening(Kind::Request, &self.request)?;
        if !with_stdin {
            let end_of_file = Frame::new(Kind::Stdin, &b""[..]).encode(&mut opening);
            end_of_file.map_err(|error| ExecError::BadRequest { detail: error.to_string() })?;
        }
        let patience = self.connect_patience().saturating_sub(started.elapsed());
        match session::within(patience, session::connect(self.link.connector(), &opening)).await {
            Ok(stream) => Ok(Session::new(stream, Mode::Process, with_stdin, started, self.timeout)),
            Err(error) => self.timed_out(started, error),
        }
    }

    /// A command whose timeout passed while the agent was not reachable timed out like any other; otherwise `error`.
    fn timed_out(&self, started: Instant, error: ExecError) -> Result<Session, ExecError> {
        let duration = started.elapsed();
        match (error, self.timeout) {
            (ExecError::Timeout { .. }, Some(timeout)) if duration >= timeout => {
                let exit = Exit { code: 128 + u32::from(SIGKILL), peak_rss_kib: None };
                Ok(Session::ended(Ended { exit, timed_out: true, duration }))
            }
            (ExecError::Timeout { .. }, _) => Err(ExecError::Timeout { after: self.connect_patience() }),
            (error, _) => Err(error),
        }
    }
}
