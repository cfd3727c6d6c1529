//! A started process: waiting, signalling, collecting.

use std::process::ExitStatus;
use std::sync::Arc;

use tokio::io::AsyncRead;
use tokio::io::AsyncReadExt;
use tokio_util::task::AbortOnDropHandle;

use crate::exec::ExecError;
use crate::exec::ExecEvents;
use crate::exec::ExecOutcome;
use crate::exec::ExecSignaller;
use crate::exec::ExecStderr;
use crate::exec::ExecStdin;
use crate::exec::ExecStdout;
use crate::exec::lanes::Lane;
use crate::exec::lanes::Lanes;
use crate::exec::outcome::exit_status;
use crate::exec::session::Progress;
use crate::exec::session::Session;

/// A process in a guest, like `tokio::process::Child`.
///
/// # Dropping
/// Dropping the child closes the connection, at which the agent sends SIGHUP and half a second later SIGKILL to the process group. That differs from
/// tokio's default because a process in a guest would otherwise have no owner. With
/// [`kill_on_drop(false)`](crate::exec::ExecBuilder::kill_on_drop) the process goes on, and its session is
/// held by a background task until it ends or the guest does. Neither blocks.
#[derive(Debug)]
pub struct ExecChild {
    /// Standard input, unless it was taken or closed.
    pub stdin: Option<ExecStdin>,
    /// Standard output, unless it was taken.
    pub stdout: Option<ExecStdout>,
    /// Standard error, unless it was taken.
    pub stderr: Option<ExecStderr>,
    pub(crate) lanes: Arc<Lanes>,
    pub(crate) state: Progress,
    pub(crate) signaller: ExecSignaller,
    /// Aborts the driver, and so closes the connection; `None` when the process may outlive the child.
    _driver: Option<AbortOnDropHandle<()>>,
}

/// Lets unread outputs be dropped while somebody waits, and no longer.
struct Unattended<'a> {
    lanes: &'a Lanes,
    stdout: bool,
    stderr: bool,
}

impl<'a> Unattended<'a> {
    fn new(child: &'a ExecChild) -> Self {
        let (stdout, stderr) = (child.stdout.is_some(), child.stderr.is_some());
        let this = Self { lanes: &child.lanes, stdout, stderr };
        this.set(true);
        this
    }

    fn set(&self, unattended: bool) {
        if self.stdout {
            self.lanes.set_unattended(Lane::Stdout, unattended);
        }
        if self.stderr {
            self.lanes.set_unattended(Lane::Stderr, unattended);
        }
    }
}

impl Drop for Unattended<'_> {
    fn drop(&mut self) {
        self.set(false);
    }
}

impl ExecChild {
    pub(crate) fn new(session: Session, kill_on_drop: bool) -> Self {
        let Session { stdin, lanes, state, messages, kill, driver, .. } = session;
        let driver = if kill_on_drop {
            Some(driver)
        } else {
            driver.detach();
            None
        };
        Self {
            stdin,
            stdout: Some(ExecStdout::new(Arc::clone(&lanes))),
            stderr: Some(ExecStderr::new(Arc::clone(&lanes))),
            lanes,
            state,
            signaller: ExecSignaller::new(messages, kill),
            _driver: driver,
        }
    }

    /// The process's id in the guest, which is also that of its process group; `None` once it has ended, or when the agent did not
    /// tell ([`AgentInfo::tells_starts`](crate::exec::AgentInfo::tells_starts)).
    #[must_use]
    pub fn id(&self) -> Option<u32> {
        self.state.pid()
    }

    /// Turns the process into a stream of what it prints and how it ends, in order; see [`ExecEvents`].
    ///
    /// Standard input is closed unless it was taken before. An output that was taken before has no events.
    #[must_use = "dropping the events ends the process"]
    pub fn events(self) -> ExecEvents {
        ExecEvents::new(self)
    }

    /// Closes standard input and waits for the process to end. Later calls give the same answer at once.
    ///
    /// Outputs whose handle is still inside the child do not keep the process from ending: their first 256 KiB can be read
    /// afterwards, the rest is dropped. A handle that was taken has to be read.
    ///
    /// # Errors
    /// Why the process did not start, or why its end is not known.
    ///
    /// # Cancel safety
    /// Cancel safe, except that standard input is closed.
    pub async fn wait(&mut self) -> Result<ExitStatus, ExecError> {
        drop(self.stdin.take());
        let _unattended = Unattended::new(self);
        let ended = self.state.clone().ended().await?;
        Ok(exit_status(ended.exit.code))
    }

    /// How the process ended, if it has.
    ///
    /// # Errors
    /// As [`wait`](Self::wait).
    pub fn try_wait(&mut self) -> Result<Option<ExitStatus>, ExecError> {
        Ok(self.state.try_ended()?.map(|ended| exit_status(ended.exit.code)))
    }

    /// Closes standard input, reads the outputs that were not taken to their end, and waits.
    ///
    /// Everything is kept in memory: for a process that may print without limit, read the handles instead.
    ///
    /// # Errors
    /// As [`wait`](Self::wait).
    ///
    /// # Cancel safety
    /// Not cancel safe: what was read is lost, and the child is dropped.
    pub async fn wait_with_output(mut self) -> Result<ExecOutcome, ExecError> {
        drop(self.stdin.take());
        let (stdout, stderr) = (self.stdout.take(), self.stderr.take());
        let (stdout, stderr, ended) = tokio::join!(collect(stdout), collect(stderr), self.state.clone().ended());
        Ok(ExecOutcome::new(ended?, stdout, stderr))
    }

    /// Sends signal `number` to the whole process group; see [`ExecSignaller::signal`].
    ///
    /// # Errors
    /// As [`ExecSignaller::signal`].
    ///
    /// # Cancel safety
    /// Cancelled, the signal was either queued or not.
    pub async fn signal(&self, number: u8) -> Result<(), ExecError> {
        self.signaller.signal(number).await
    }

    /// A handle that signals this process while `wait` borrows the child.
    #[must_use]
    pub fn signaller(&self) -> ExecSignaller {
        self.signaller.clone()
    }

    /// Tells the process's terminal its size, in characters; ignored without a terminal.
    ///
    /// # Errors
    /// As [`ExecSignaller::signal`].
    ///
    /// # Cancel safety
    /// Cancelled, the size was either queued or not.
    pub async fn resize(&self, cols: u16, rows: u16) -> Result<(), ExecError> {
        self.signaller.resize(cols, rows).await
    }

    /// Starts to kill the process group with SIGKILL, without waiting for the end.
    ///
    /// # Errors
    /// [`ExecError::Ended`] when the process has ended.
    pub fn start_kill(&mut self) -> Result<(), ExecError> {
        if matches!(self.state.try_ended(), Ok(None)) {
            self.signaller.kill();
            Ok(())
        } else {
            Err(ExecError::Ended)
        }
    }

    /// Kills the process group with SIGKILL and waits for the end, five seconds at most; an ended process is no error.
    ///
    /// # Errors
    /// As [`wait`](Self::wait).
    ///
    /// # Cancel safety
    /// Cancelled, the kill still happens.
    pub async fn kill(&mut self) -> Result<(), ExecError> {
        self.signaller.kill();
        self.wait().await.map(|_| ())
    }

    /// Whether the timeout ended the process.
    #[must_use]
    pub fn timed_out(&self) -> bool {
        self.state.try_ended().ok().flatten().is_some_and(|ended| ended.timed_out)
    }

    /// The largest resident set of the ended process, in KiB, when the guest told.
    #[must_use]
    pub fn peak_rss_kib(&self) -> Option<u64> {
        self.state.try_ended().ok().flatten().and_then(|ended| ended.exit.peak_rss_kib)
    }
}

/// What can be read to the end; an error of the session is reported by the session's result.
async fn collect(output: Option<impl AsyncRead + Unpin>) -> Vec<u8> {
    let mut bytes = Vec::new();
    if let Some(mut output) = output {
        let _ = output.read_to_end(&mut bytes).await;
    }
    bytes
}
