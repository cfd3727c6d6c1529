//! An agent as an ordinary process on a Unix socket: the exec layer and the protocol without a guest.

use std::process::Child;
use std::process::Command;
use std::time::Duration;
use std::time::Instant;

use kiln::ExecBuilder;
use kiln::exec::UnixConnector;
use kiln::exec::wait_ready;
use tempfile::TempDir;

/// Longer than an agent's start on a loaded machine.
const DEADLINE: Duration = Duration::from_secs(30);

/// A running agent; killed on drop.
#[derive(Debug)]
pub(crate) struct Agent {
    process: Child,
    exec: ExecBuilder,
    /// Holds the socket.
    _folder: TempDir,
}

impl Agent {
    /// Starts the static agent that guests get too.
    pub(crate) async fn start() -> Self {
        let program = super::agent();
        let folder = tempfile::tempdir().expect("temporary folders can be made");
        let socket = folder.path().join("exec.sock");
        let process = Command::new(program).arg("--unix").arg(&socket).spawn().expect("the agent starts");
        let mut agent = Self { process, exec: ExecBuilder::new(&socket), _folder: folder };
        let info = wait_ready(&UnixConnector::new(&socket), DEADLINE).await.expect("the agent answers");
        agent.exec = agent.exec.clone().agent(info);
        agent
    }

    /// A command for this agent, which has been asked already what it can do.
    pub(crate) fn exec(&self) -> ExecBuilder {
        self.exec.clone()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The yardstick: `/bin/true` by `tokio::process`, as its user would run it.
pub(crate) async fn host_true() -> Duration {
    let started = Instant::now();
    let output = tokio::process::Command::new("/bin/true").output().await.expect("/bin/true starts");
    assert!(output.status.success());
    started.elapsed()
}
