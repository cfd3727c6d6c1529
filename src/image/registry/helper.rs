//! Credential helpers: programs that keep secrets for Docker (docker-credential-helpers, "Development").
//!
//! `docker-credential-NAME get` reads the registry's name from its input and answers with JSON. A helper is trusted with
//! secrets and with nothing else: it has a deadline, its answer has a bound, and it does not outlive the wait for it.

use std::io;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use rustix::process::Pid;
use rustix::process::Signal;
use serde::Deserialize;
use tokio::io::AsyncReadExt;
use tokio::io::AsyncWriteExt;
use tokio::process::Child;
use tokio::process::Command;
use tokio::time::timeout;

/// How long a helper may take. It may have to unlock a keyring, but nobody is there to be asked for a password.
const DEADLINE: Duration = Duration::from_secs(30);

/// Longest answer, in bytes: tokens have a few KiB.
const MAX_ANSWER: u64 = 64 << 10;

/// How much of what a helper says about its failure gets into an error.
const MAX_MESSAGE: usize = 200;

/// By the protocol, the one failure that is none.
const NOT_FOUND: &str = "credentials not found";

/// How a credential helper failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HelperError {
    /// Its name is not that of a program, or is a path.
    #[error("its name is not the name of a program")]
    Name,
    /// It cannot be started; it is not installed, as a rule.
    #[error("{program} cannot be run")]
    Start {
        /// The program.
        program: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// It cannot be talked to.
    #[error("talking to it failed")]
    Io(#[source] io::Error),
    /// It ended with a failure.
    #[error("it says: {message}")]
    Failed {
        /// The first line of what it says, or how it ended.
        message: String,
    },
    /// It answered, with something else than credentials.
    #[error("its answer is not valid")]
    Answer,
    /// It answered more than any credentials are.
    #[error("its answer is longer than {limit} bytes")]
    TooLarge {
        /// What is accepted, in bytes.
        limit: u64,
    },
    /// It did not end in time, and was killed.
    #[error("it took more than {limit:?}")]
    Timeout {
        /// The deadline.
        limit: Duration,
    },
}

/// A helper's answer.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Answer {
    pub(super) username: String,
    pub(super) secret: String,
}

/// Asks a helper for the credentials of `server`; `None` if it has none.
///
/// Dropping the future kills the helper.
pub(super) async fn get(folder: Option<&Path>, name: &str, server: &str) -> Result<Option<Answer>, HelperError> {
    get_within(folder, name, server, DEADLINE).await
}

async fn get_within(
    folder: Option<&Path>,
    name: &str,
    server: &str,
    limit: Duration,
) -> Result<Option<Answer>, HelperError> {
    if name.is_empty() || name.len() > 64 || !name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b)) {
        return Err(HelperError::Name);
    }
    let program = format!("docker-credential-{name}");
    let path = folder.map_or_else(|| program.clone().into(), |folder| folder.join(&program));
    let mut helper = Helper::start(&path).map_err(|source| HelperError::Start { program, source })?;
    let answer = timeout(limit, helper.ask(server)).await.map_err(|_| HelperError::Timeout { limit })?;
    let (succeeded, text, end) = answer?;
    if succeeded {
        return serde_json::from_slice(&text).map(Some).map_err(|_| HelperError::Answer);
    }
    // The protocol has messages on the standard output.
    let text = String::from_utf8_lossy(&text);
    if text.contains(NOT_FOUND) {
        return Ok(None);
    }
    let line: String = text.trim().lines().next().unwrap_or_default().chars().take(MAX_MESSAGE).collect();
    Err(HelperError::Failed { message: if line.is_empty() { end } else { line } })
}

/// A running helper. Dropping it kills it and what it has started.
struct Helper {
    child: Child,
    /// Its process group, as long as it has not been waited for.
    group: Option<Pid>,
}

impl Helper {
    fn start(path: &Path) -> io::Result<Self> {
        let child = Command::new(path)
            .arg("get")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .process_group(0)
            .kill_on_drop(true)
            .spawn()?;
        let group = child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
        Ok(Self { child, group })
    }

    /// Its success, its answer, and how it ended.
    async fn ask(&mut self, server: &str) -> Result<(bool, Vec<u8>, String), HelperError> {
        let (stdin, stdout) = (self.child.stdin.take(), self.child.stdout.take());
        let (Some(mut stdin), Some(stdout)) = (stdin, stdout) else {
            return Err(HelperError::Io(io::Error::from(io::ErrorKind::BrokenPipe)));
        };
        // A few bytes, which the pipe holds: that nobody reads them yet makes nobody wait.
        match stdin.write_all(format!("{server}\n").as_bytes()).await {
            // It may know its answer without asking for whom.
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => return Err(HelperError::Io(error)),
            _ => drop(stdin),
        }
        let mut text = Vec::new();
        stdout.take(MAX_ANSWER + 1).read_to_end(&mut text).await.map_err(HelperError::Io)?;
        if text.len() as u64 > MAX_ANSWER {
            return Err(HelperError::TooLarge { limit: MAX_ANSWER });
        }
        let status = self.child.wait().await.map_err(HelperError::Io)?;
        // From now on the number may be another's.
        self.group = None;
        Ok((status.success(), text, status.to_string()))
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        if let Some(group) = self.group {
            // It is gone already, or ours to kill: not waited for, so the number is still its own.
            let _ = rustix::process::kill_process_group(group, Signal::KILL);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    async fn ask(script: &str) -> Result<Option<(String, String)>, HelperError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("docker-credential-test");
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        let limit = Duration::from_millis(1500);
        loop {
            match get_within(Some(folder.path()), "test", "registry.example", limit).await {
                // Another test's child may hold the script open for writing between its fork and its exec.
                Err(HelperError::Start { source, .. }) if source.kind() == io::ErrorKind::ExecutableFileBusy => {}
                answer => return answer.map(|found| found.map(|answer| (answer.username, answer.secret))),
            }
        }
    }

    #[tokio::test]
    async fn the_server_goes_in_and_credentials_come_out() {
        let script = r#"read server; echo "{\"ServerURL\":\"$server\",\"Username\":\"$1\",\"Secret\":\"$server\"}""#;
        let answer = ask(script).await.unwrap();
        assert_eq!(answer, Some(("get".to_owned(), "registry.example".to_owned())));
    }

    #[tokio::test]
    async fn one_that_has_none_and_one_that_does_not_read() {
        assert_eq!(ask("echo credentials not found in native keychain; exit 1").await.unwrap(), None);
        let answer = ask(r#"exec <&-; echo '{"Username":"u","Secret":"s"}'"#).await.unwrap();
        assert_eq!(answer, Some(("u".to_owned(), "s".to_owned())));
    }

    #[tokio::test]
    async fn failures_are_told_apart() {
        let error = ask("echo the keyring is locked; exit 1").await.unwrap_err();
        assert!(matches!(&error, HelperError::Failed { message } if message == "the keyring is locked"), "{error:?}");
        let error = ask("kill -9 $$").await.unwrap_err();
        assert!(matches!(&error, HelperError::Failed { message } if message.contains("signal")), "{error:?}");
        assert!(matches!(ask("echo '{}'").await, Err(HelperError::Answer)));
        assert!(matches!(ask("yes").await, Err(HelperError::TooLarge { .. })));
        let missing = get(Some(Path::new("/nonexistent")), "test", "x").await;
        assert!(matches!(missing, Err(HelperError::Start { .. })));
        for name in ["", "../x", "a/b", "a b", "a\0"] {
            assert!(matches!(get(None, name, "x").await, Err(HelperError::Name)), "{name:?}");
        }
    }

    #[tokio::test]
    async fn one_that_hangs_is_killed_with_what_it_started() {
        let folder = tempfile::tempdir().unwrap();
        let note = folder.path().join("pid");
        let error = ask(&format!("sleep 600 & echo $! > {}; wait", note.display())).await.unwrap_err();
        assert!(matches!(error, HelperError::Timeout { .. }), "{error:?}");
        let pid = fs::read_to_string(&note).unwrap();
        let stat = format!("/proc/{}/stat", pid.trim());
        // Killed, it stays a zombie until whoever inherited it takes notice.
        let is_running = || fs::read_to_string(&stat).is_ok_and(|stat| !stat.contains(") Z "));
        while is_running() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}
