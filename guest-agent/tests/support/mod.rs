//! An agent as an ordinary process on a Unix socket of its own.
#![allow(dead_code, reason = "each test file uses its part")]

use std::io::Write;
use std::path::Path;
use std::path::PathBuf;
use std::process::Child;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use kiln::exec::ExecBuilder;
use kiln::exec::UnixConnector;
use kiln::exec::wait_ready;

/// Longer than anything here takes on a busy machine, so that a hang is a failure and not a wait for ever.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) struct Agent {
    pub(crate) process: Child,
    pub(crate) folder: tempfile::TempDir,
}

impl Agent {
    /// Started, whether or not it listens yet.
    pub(crate) fn launch() -> Self {
        Self::launch_by(&mut Command::new(env!("CARGO_BIN_EXE_kiln-agent")))
    }

    /// Started by `command`, to which the agent's arguments are added.
    pub(crate) fn launch_by(command: &mut Command) -> Self {
        let folder = tempfile::tempdir().expect("temporary folder");
        let process = command
            .arg("--unix")
            .arg(folder.path().join("exec.sock"))
            .current_dir(folder.path())
            .env("FROM_AGENT", "yes")
            .spawn()
            .expect("the agent starts");
        Self { process, folder }
    }

    pub(crate) async fn start() -> Self {
        Self::launch().ready().await
    }

    /// Waits until it answers.
    pub(crate) async fn ready(self) -> Self {
        wait_ready(&*self.connector(), PATIENCE).await.expect("the agent answers");
        self
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.folder.path().join("exec.sock")
    }

    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub(crate) fn connector(&self) -> Arc<UnixConnector> {
        Arc::new(UnixConnector::new(self.socket()))
    }

    pub(crate) fn exec<const N: usize>(&self, argv: [&str; N]) -> ExecBuilder {
        ExecBuilder::new(self.socket()).argv(argv)
    }

    pub(crate) fn sh(&self, script: &str) -> ExecBuilder {
        self.exec(["sh", "-c", script])
    }

    pub(crate) fn pid(&self) -> i32 {
        i32::try_from(self.process.id()).expect("a pid")
    }

    /// What the agent has open, as `/proc` names it.
    pub(crate) fn descriptors(&self) -> Vec<String> {
        let entries = std::fs::read_dir(format!("/proc/{}/fd", self.pid())).expect("the agent runs").flatten();
        let targets = entries.filter_map(|entry| std::fs::read_link(entry.path()).ok());
        targets.map(|target| target.display().to_string()).collect()
    }

    /// Waits until the agent has no connection, also none that is just being closed: its one socket is the listener.
    pub(crate) async fn idle(&self) {
        let sockets = || self.descriptors().iter().filter(|name| name.starts_with("socket:")).count();
        tokio::time::timeout(PATIENCE, async {
            while sockets() > 1 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await
        .unwrap_or_else(|_| panic!("{} sockets are open", sockets()));
    }

    /// Kills the agent, and waits until it is gone with all that it had open.
    pub(crate) fn kill(&mut self) {
        self.process.kill().expect("the agent runs");
        self.process.wait().expect("our child");
    }

    pub(crate) fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_raw(self.pid()).expect("a pid");
        rustix::process::kill_process(pid, signal).expect("the agent is alive");
    }

    /// Waits for the agent itself to end, and returns its exit code.
    pub(crate) async fn ended(mut self) -> Option<i32> {
        let status = tokio::task::spawn_blocking(move || self.process.wait().expect("our child"));
        status.await.expect("no panic").code()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A pipe with a name, at which a script waits with `read x < NAME` until it is let through.
pub(crate) struct Gate(std::fs::File);

impl Gate {
    pub(crate) fn new(path: &Path) -> Self {
        let mode = rustix::fs::Mode::from_raw_mode(0o600);
        rustix::fs::mknodat(rustix::fs::CWD, path, rustix::fs::FileType::Fifo, mode, 0).expect("made");
        // Both ends are open for as long as the gate is there: nobody waits for the other, and no script meets an end-of-file.
        Self(std::fs::OpenOptions::new().read(true).write(true).open(path).expect("opens"))
    }

    /// Lets one through, also one that comes later.
    pub(crate) fn open(&mut self) {
        self.0.write_all(b"go\n").expect("a pipe has room");
    }
}

/// Waits until no process has `marker` in its command line.
pub(crate) async fn gone(marker: &str) {
    tokio::time::timeout(PATIENCE, async {
        while running(marker) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .unwrap_or_else(|_| panic!("a process with {marker} is still running"));
}

/// Waits until a process has `marker` in its command line.
pub(crate) async fn started(marker: &str) {
    tokio::time::timeout(PATIENCE, async {
        while !running(marker) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .unwrap_or_else(|_| panic!("no process with {marker} appeared"));
}

pub(crate) fn running(marker: &str) -> bool {
    let Ok(processes) = std::fs::read_dir("/proc") else { return false };
    processes.flatten().any(|process| {
        let line = std::fs::read(process.path().join("cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).split('\0').any(|argument| argument == marker)
    })
}
