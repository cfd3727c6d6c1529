//! A started process: waiting, signalling, collecting.

use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::AsyncRead;
use tokio::io::AsyncReadExt;
use tokio::sync::mpsc;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::exec::ExecError;
use crate::exec::ExecStderr;
use crate::exec::ExecStdin;
use crate::exec::ExecStdout;
use crate::exec::driver::Ended;
use crate::exec::driver::Message;
use crate::exec::driver::SessionResult;
use crate::exec::lanes::Lane;
use crate::exec::lanes::Lanes;

/// The highest signal number of Linux.
const LAST_SIGNAL: u32 = 64;

/// A finished command.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ExecOutcome {
    /// How it ended. A code of 128+n is reported as signal n, which is how the protocol carries signals.
    pub status: ExitStatus,
    /// What it wrote to standard output, if that was collected.
    pub stdout: Vec<u8>,
    /// What it wrote to standard error, if that was collected.
    pub stderr: Vec<u8>,
    /// From the start of `spawn` to the end of the process.
    pub duration: Duration,
    /// The largest resident set of the process, in KiB, when the guest told.
    pub peak_rss_kib: Option<u64>,
    /// Whether the timeout ended it.
    pub timed_out: bool,
}

impl ExecOutcome {
    /// Whether it ended by itself with code 0.
    #[must_use]
    pub fn success(&self) -> bool {
        self.status.success() && !self.timed_out
    }

    pub(crate) fn new(ended: Ended, stdout: Vec<u8>, stderr: Vec<u8>) -> Self {
        let Ended { exit, timed_out, duration } = ended;
        Self { status: exit_status(exit.code), stdout, stderr, duration, peak_rss_kib: exit.peak_rss_kib, timed_out }
    }
}

/// The wait status that a code of the protocol stands for.
fn exit_status(code: u32) -> ExitStatus {
    let raw = match code.checked_sub(128) {
        Some(signal @ 1..=LAST_SIGNAL) => signal,
        _ => (code & 0xff) << 8,
    };
    ExitStatus::from_raw(i32::try_from(raw).expect("at most 16 bits"))
}

/// Sends signals to a process while another task waits for it.
///
/// Does not keep the process alive: once its [`ExecChild`] is dropped, signals go nowhere.
#[derive(Clone, Debug)]
pub struct ExecSignaller {
    messages: mpsc::Sender<Message>,
    kill: CancellationToken,
}

impl ExecSignaller {
    /// Sends signal `number` to the whole process group.
    ///
    /// A signal is sent after the input that was already handed to the agent. While the process does not read its input and more than the agent
    /// buffers (128 KiB and a pipe) is waiting, a signal waits too; [`kill`](Self::kill) does not: after five seconds it closes the
    /// connection, at which the agent kills the group.
    ///
    /// # Errors
    /// [`ExecError::Ended`] when the process has ended.
    ///
    /// # Cancel safety
    /// Cancelled, the signal was either queued or not.
    pub async fn signal(&self, number: u8) -> Result<(), ExecError> {
        self.messages.send(Message::Signal(number)).await.map_err(|_| ExecError::Ended)
    }

    /// Starts to kill the process group with SIGKILL; does nothing when it has ended.
    pub fn kill(&self) {
        self.kill.cancel();
    }
}

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
    pub(crate) result: watch::Receiver<Option<SessionResult>>,
    pub(crate) messages: mpsc::Sender<Message>,
    pub(crate) kill: CancellationToken,
    /// Aborts the driver, and so closes the connection; `None` when the process may outlive the child.
    pub(crate) _driver: Option<AbortOnDropHandle<()>>,
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
        let ended = ended(self.result.clone()).await?;
        Ok(exit_status(ended.exit.code))
    }

    /// How the process ended, if it has.
    ///
    /// # Errors
    /// As [`wait`](Self::wait).
    pub fn try_wait(&mut self) -> Result<Option<ExitStatus>, ExecError> {
        Ok(self.try_ended()?.map(|ended| exit_status(ended.exit.code)))
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
        let (stdout, stderr, ended) = tokio::join!(collect(stdout), collect(stderr), ended(self.result.clone()));
        Ok(ExecOutcome::new(ended?, stdout, stderr))
    }

    /// Sends signal `number` to the whole process group; see [`ExecSignaller::signal`].
    ///
    /// # Errors
    /// [`ExecError::Ended`] when the process has ended.
    ///
    /// # Cancel safety
    /// Cancelled, the signal was either queued or not.
    pub async fn signal(&self, number: u8) -> Result<(), ExecError> {
        self.signaller().signal(number).await
    }

    /// A handle that signals this process while `wait` borrows the child.
    #[must_use]
    pub fn signaller(&self) -> ExecSignaller {
        ExecSignaller { messages: self.messages.clone(), kill: self.kill.clone() }
    }

    /// Tells the process's terminal its size, in characters; ignored without a terminal.
    ///
    /// # Errors
    /// [`ExecError::Ended`] when the process has ended.
    ///
    /// # Cancel safety
    /// Cancelled, the size was either queued or not.
    pub async fn resize(&self, cols: u16, rows: u16) -> Result<(), ExecError> {
        self.messages.send(Message::Resize(cols, rows)).await.map_err(|_| ExecError::Ended)
    }

    /// Starts to kill the process group with SIGKILL, without waiting for the end.
    ///
    /// # Errors
    /// [`ExecError::Ended`] when the process has ended.
    pub fn start_kill(&mut self) -> Result<(), ExecError> {
        if self.result.borrow().is_some() {
            return Err(ExecError::Ended);
        }
        self.kill.cancel();
        Ok(())
    }

    /// Kills the process group with SIGKILL and waits for the end, five seconds at most; an ended process is no error.
    ///
    /// # Errors
    /// As [`wait`](Self::wait).
    ///
    /// # Cancel safety
    /// Cancelled, the kill still happens.
    pub async fn kill(&mut self) -> Result<(), ExecError> {
        self.kill.cancel();
        self.wait().await.map(|_| ())
    }

    /// Whether the timeout ended the process.
    #[must_use]
    pub fn timed_out(&self) -> bool {
        matches!(self.try_ended(), Ok(Some(Ended { timed_out: true, .. })))
    }

    /// The largest resident set of the ended process, in KiB, when the guest told.
    #[must_use]
    pub fn peak_rss_kib(&self) -> Option<u64> {
        self.try_ended().ok().flatten().and_then(|ended| ended.exit.peak_rss_kib)
    }

    fn try_ended(&self) -> Result<Option<Ended>, ExecError> {
        // Asked before the value: a driver that ended between the two questions has published its answer.
        let driver_gone = self.result.has_changed().is_err();
        match self.result.borrow().clone() {
            Some(ended) => ended.map(Some),
            None if driver_gone => Err(ExecError::Dropped),
            None => Ok(None),
        }
    }
}

async fn ended(mut result: watch::Receiver<Option<SessionResult>>) -> SessionResult {
    match result.wait_for(Option::is_some).await {
        Ok(ended) => ended.clone().unwrap_or(Err(ExecError::Dropped)),
        // The driver's runtime is gone, and the driver with it.
        Err(_) => Err(ExecError::Dropped),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_over_128_are_signals_as_far_as_linux_has_them() {
        assert_eq!(exit_status(7).code(), Some(7));
        assert_eq!(exit_status(128).code(), Some(128));
        assert_eq!(exit_status(137).signal(), Some(9));
        assert_eq!(exit_status(192).signal(), Some(64));
        assert_eq!(exit_status(193).code(), Some(193));
        assert_eq!(exit_status(255).code(), Some(255));
    }
}
