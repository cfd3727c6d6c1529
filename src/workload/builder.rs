//! Describing the workload, starting it, or finding the one that there is.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use kiln_wire::control::Control;
use kiln_wire::control::ControlAck;
use kiln_wire::failure::Failure;

use crate::exec;
use crate::exec::ExecError;
use crate::exec::Link;
use crate::exec::UnixConnector;
use crate::transport::Connector;
use crate::workload::ANSWER;
use crate::workload::EBUSY;
use crate::workload::ESRCH;
use crate::workload::SIGTERM;
use crate::workload::Workload;
use crate::workload::WorkloadError;
use crate::workload::reattach::Run;

/// What an agent says to an action that it does not know.
const UNKNOWN_ACTION: &str = "unknown CONTROL action";

/// The workload of a guest, before it runs: the image's command, which [`Vm::workload`](crate::vm::Vm::workload) fills in, or another.
#[derive(Clone, Debug)]
#[must_use = "a workload does nothing until it is started"]
pub struct WorkloadBuilder {
    link: Link,
    argv: Vec<String>,
    env: BTreeMap<String, String>,
    cwd: Option<String>,
    user: Option<String>,
    stop_signal: u8,
}

impl WorkloadBuilder {
    /// A workload for the agent behind the Unix socket at `path`; it has no command yet.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self::over(Arc::new(UnixConnector::new(path)))
    }

    /// A workload for the agent behind `connector`; it has no command yet.
    pub fn over(connector: Arc<dyn Connector>) -> Self {
        Self::for_link(Link::new(connector))
    }

    pub(crate) fn for_link(link: Link) -> Self {
        Self { link, argv: Vec::new(), env: BTreeMap::new(), cwd: None, user: None, stop_signal: SIGTERM }
    }

    /// The program and its arguments, in place of the image's ENTRYPOINT and CMD.
    pub fn argv<S: Into<String>>(mut self, argv: impl IntoIterator<Item = S>) -> Self {
        self.argv = argv.into_iter().map(Into::into).collect();
        self
    }

    /// Adds or replaces a variable of the image's environment.
    pub fn env(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.env.insert(name.into(), value.into());
        self
    }

    /// The working directory; the image's by default, and a relative path starts there.
    pub fn cwd(mut self, cwd: impl Into<String>) -> Self {
        self.cwd = Some(cwd.into());
        self
    }

    /// Who runs it: `name`, `uid`, `name:group` or `uid:gid`, looked up in the image; the image's user by default.
    pub fn user(mut self, user: impl Into<String>) -> Self {
        self.user = Some(user.into());
        self
    }

    /// The signal with which [`Workload::stop`] begins, in place of the image's STOPSIGNAL; [`signal_number`](crate::workload::signal_number)
    /// has the numbers.
    pub fn stop_signal(mut self, number: u8) -> Self {
        self.stop_signal = number;
        self
    }

    /// Starts the workload; it reads nothing, and goes on whatever happens to the handles.
    ///
    /// One that has ended is replaced, and its logs and its exit are gone unless somebody is still reading them.
    ///
    /// # Errors
    /// [`WorkloadError::NoCommand`], [`WorkloadError::AlreadyRunning`], [`WorkloadError::Unsupported`]; [`WorkloadError::Exec`] with the reasons of
    /// [`ExecBuilder::spawn`](crate::exec::ExecBuilder::spawn).
    ///
    /// # Cancel safety
    /// Cancelled, it was started or not; [`attach`](Self::attach) tells.
    ///
    /// # Examples
    /// ```no_run
    /// # async fn f(vm: kiln::Vm) -> Result<(), kiln::Error> {
    /// let workload = vm.workload().env("LOG_LEVEL", "debug").start().await?;
    /// println!("process {} ended: {}", workload.id(), workload.wait().await?.status);
    /// # Ok(()) }
    /// ```
    pub async fn start(self) -> Result<Workload, WorkloadError> {
        let Self { link, argv, env, cwd, user, stop_signal } = self;
        if argv.is_empty() {
            return Err(WorkloadError::NoCommand);
        }
        let action = Control::WorkloadStart { argv, env, cwd, user };
        let (ack, _) = exec::ask(link.connector(), &action, ANSWER).await?;
        let ack = match ack.errno {
            _ if ack.ok => ack,
            Some(EBUSY) => return Err(WorkloadError::AlreadyRunning),
            Some(_) => exec::accepted(ack)?,
            None => return Err(not_started(ack.error)),
        };
        found(link, stop_signal, &ack)
    }

    /// Finds the workload that was started last, whether or not it still runs: after a program has lost its handle, or in another program.
    ///
    /// Of what was described only the stop signal counts.
    ///
    /// # Errors
    /// [`WorkloadError::NotStarted`], [`WorkloadError::Unsupported`]; [`WorkloadError::Exec`] when the agent cannot be reached.
    ///
    /// # Cancel safety
    /// Cancel safe.
    ///
    /// # Examples
    /// ```no_run
    /// # async fn f() -> Result<(), kiln::Error> {
    /// use std::time::Duration;
    /// use kiln::workload::WorkloadBuilder;
    ///
    /// let workload = WorkloadBuilder::new("/run/vm-exec.sock").attach().await?;
    /// workload.stop(Duration::from_secs(10)).await?;
    /// # Ok(()) }
    /// ```
    pub async fn attach(self) -> Result<Workload, WorkloadError> {
        let (ack, _) = exec::ask(self.link.connector(), &Control::WorkloadWait { run: None }, ANSWER).await?;
        let ack = match ack.errno {
            Some(ESRCH) if !ack.ok => return Err(WorkloadError::NotStarted),
            None if !ack.ok => return Err(not_started(ack.error)),
            _ => exec::accepted(ack)?,
        };
        found(self.link, self.stop_signal, &ack)
    }
}

/// What the agent's words mean, which are those of an ERROR frame.
fn not_started(text: Option<String>) -> WorkloadError {
    match text {
        Some(text) if text == UNKNOWN_ACTION => WorkloadError::Unsupported,
        text => ExecError::from(Failure::decode(text.unwrap_or_default().as_bytes())).into(),
    }
}

/// The run that the agent's answer is about.
fn found(link: Link, stop_signal: u8, ack: &ControlAck) -> Result<Workload, WorkloadError> {
    let (Some(pid), Some(number)) = (ack.pid, ack.run) else {
        let detail = "the answer names no process and run of the workload".to_owned();
        return Err(ExecError::Protocol { detail }.into());
    };
    Ok(Workload::new(Run { link, number, pid, stop_signal, exit: std::sync::OnceLock::new() }))
}
