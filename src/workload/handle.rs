//! A workload that was started.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use kiln_wire::control::Control;
use kiln_wire::exit::Exit;
use kiln_wire::failure::Failure;
use kiln_wire::frame::Kind;
use tokio::time::Instant;

use crate::exec;
use crate::exec::ExecError;
use crate::exec::ExecExit;
use crate::exec::Frames;
use crate::workload::ANSWER;
use crate::workload::ESRCH;
use crate::workload::SIGKILL;
use crate::workload::WorkloadLogs;
use crate::workload::reattach::Losses;
use crate::workload::reattach::Run;

/// How long a workload may take to end after SIGKILL (10 s).
const KILL_GRACE: Duration = Duration::from_secs(10);

/// A connection that lasted this long was none in vain.
const LASTING: Duration = Duration::from_secs(1);

/// A run of the workload; cheap to clone, and all clones speak of the same one.
///
/// # Dropping
/// Changes nothing in the guest: the workload goes on. [`WorkloadBuilder::attach`](crate::workload::WorkloadBuilder::attach) finds it again.
///
/// # Examples
/// ```no_run
/// # async fn f(vm: kiln::Vm) -> Result<(), kiln::Error> {
/// use std::time::Duration;
/// use futures::TryStreamExt;
/// use kiln::workload::WorkloadLog;
///
/// let workload = vm.workload().start().await?;
/// let mut logs = workload.logs();
/// while let Some(piece) = logs.try_next().await? {
///     if let WorkloadLog::Stdout(bytes) = piece
///         && bytes.ends_with(b"ready\n")
///     {
///         break;
///     }
/// }
/// let exit = workload.stop(Duration::from_secs(10)).await?;
/// println!("{} after {:?}", exit.status, exit.duration);
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct Workload {
    run: Arc<Run>,
}

impl Workload {
    pub(super) fn new(run: Run) -> Self {
        Self { run: Arc::new(run) }
    }

    /// The main process's id in the guest, which is also that of its process group; it is its own no longer once the workload has ended.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.run.pid
    }

    /// What the workload has written and goes on to write, from the start, as far as the agent still has it; see [`WorkloadLogs`].
    ///
    /// Any number of readers may read at once.
    #[must_use]
    pub fn logs(&self) -> WorkloadLogs {
        WorkloadLogs::new(Arc::clone(&self.run))
    }

    /// Sends signal `number` to the workload's process group.
    ///
    /// # Errors
    /// [`ExecError::Ended`] when the main process has ended; [`ExecError::System`] for a number that is no signal; or why the agent cannot be reached.
    ///
    /// # Cancel safety
    /// Cancelled, the signal was sent or not.
    ///
    /// # Examples
    /// ```no_run
    /// # async fn f(workload: kiln::Workload) -> Result<(), kiln::Error> {
    /// use kiln::workload::signal_number;
    ///
    /// workload.signal(signal_number("SIGHUP").expect("a signal")).await?;
    /// # Ok(()) }
    /// ```
    pub async fn signal(&self, number: u8) -> Result<(), ExecError> {
        if self.run.exit.get().is_some() {
            return Err(ExecError::Ended);
        }
        let action = Control::Signal { signum: number, run: Some(self.run.number) };
        let (ack, _) = exec::ask(self.run.link.connector(), &action, ANSWER).await?;
        match ack.errno {
            Some(ESRCH) if !ack.ok => Err(ExecError::Ended),
            _ => exec::accepted(ack).map(|_| ()),
        }
    }

    /// Stops the workload: sends the image's STOPSIGNAL, or SIGTERM, waits for as long as `grace`, then sends SIGKILL. Returns how it
    /// ended, also when it had ended before.
    ///
    /// # Errors
    /// As [`wait`](Self::wait); [`ExecError::Timeout`] when it does not end within ten seconds of SIGKILL either.
    ///
    /// # Cancel safety
    /// Cancelled, what was sent was sent: no SIGKILL follows any more.
    ///
    /// # Examples
    /// ```no_run
    /// # async fn f(workload: kiln::Workload) -> Result<(), kiln::Error> {
    /// let exit = workload.stop(std::time::Duration::from_secs(10)).await?;
    /// println!("{}", exit.status);
    /// # Ok(()) }
    /// ```
    pub async fn stop(&self, grace: Duration) -> Result<ExecExit, ExecError> {
        let first = self.run.stop_signal;
        let reached = self.send(first).await?;
        if reached
            && first != SIGKILL
            && let Ok(ended) = tokio::time::timeout(grace, self.wait()).await
        {
            return ended;
        }
        self.kill().await
    }

    /// Kills the workload's process group with SIGKILL and waits for the end, ten seconds at most; one that has ended is no error.
    ///
    /// # Errors
    /// As [`wait`](Self::wait); [`ExecError::Timeout`].
    ///
    /// # Cancel safety
    /// Cancelled, SIGKILL was sent or not.
    ///
    /// # Examples
    /// ```no_run
    /// # async fn f(workload: kiln::Workload) -> Result<(), kiln::Error> {
    /// workload.kill().await?;
    /// # Ok(()) }
    /// ```
    pub async fn kill(&self) -> Result<ExecExit, ExecError> {
        self.send(SIGKILL).await?;
        exec::within(KILL_GRACE, self.wait()).await
    }

    /// Sends signal `number`; false when the main process had ended before.
    async fn send(&self, number: u8) -> Result<bool, ExecError> {
        match self.signal(number).await {
            Ok(()) => Ok(true),
            Err(ExecError::Ended) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Waits for the end of the workload. The same answer each time, once one of its handles has seen the end.
    ///
    /// A connection that breaks is made again, so that only the loss of the guest is the loss of the answer.
    ///
    /// # Errors
    /// [`ExecError::Replaced`] when another run has been started since and this one's end was not seen here; else why the agent cannot be reached.
    ///
    /// # Cancel safety
    /// Cancel safe.
    ///
    /// # Examples
    /// ```no_run
    /// # async fn f(workload: kiln::Workload) -> Result<(), kiln::Error> {
    /// let exit = workload.wait().await?;
    /// assert!(exit.success(), "{}", exit.status);
    /// # Ok(()) }
    /// ```
    pub async fn wait(&self) -> Result<ExecExit, ExecError> {
        let mut losses = Losses::default();
        loop {
            if let Some(exit) = self.run.exit.get() {
                return Ok(*exit);
            }
            let began = Instant::now();
            let error = match self.wait_on_one_connection().await {
                Ok(exit) => return Ok(exit),
                Err(error) => error,
            };
            if began.elapsed() >= LASTING {
                losses.forget();
            }
            tokio::time::sleep(losses.bear(error)?).await;
        }
    }

    async fn wait_on_one_connection(&self) -> Result<ExecExit, ExecError> {
        let action = Control::WorkloadWait { run: Some(self.run.number) };
        let (ack, frames) = Arc::clone(&self.run).follow(action).await?;
        let (ran, attached) = (Duration::from_millis(ack.ran_ms.unwrap_or(0)), Instant::now());
        let exit = exit_of(frames).await?;
        let duration = ran.saturating_add(attached.elapsed());
        // Another handle may have been faster; then its answer is everybody's.
        Ok(*self.run.exit.get_or_init(|| ExecExit::after(exit, duration)))
    }
}

/// The EXIT that comes, and nothing before it.
async fn exit_of(mut frames: Frames) -> Result<Exit, ExecError> {
    let protocol = |detail: String| ExecError::Protocol { detail };
    let frame = frames.next().await.ok_or_else(ExecError::hung_up)?.map_err(ExecError::gone)?;
    match frame.kind {
        Kind::Exit => Exit::decode(&frame.payload).map_err(|error| protocol(error.to_string())),
        Kind::Error => Err(Failure::decode(&frame.payload).into()),
        other => Err(protocol(format!("unexpected {other:?} frame"))),
    }
}
