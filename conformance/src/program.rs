//! A program under test: its command line, and the process that ends with its owner.

use std::io;
use std::path::Path;
use std::process::Child;
use std::process::Command;
use std::process::ExitStatus;
use std::thread;
use std::time::Duration;
use std::time::Instant;

use anyhow::Result;
use anyhow::ensure;

/// How often a process is looked at that can only be asked, not waited for with a deadline.
pub(crate) const GLANCE: Duration = Duration::from_millis(2);

/// Words of a command line, one of which holds `{socket}`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommandLine(Vec<String>);

impl CommandLine {
    /// Splits `line` at white space.
    ///
    /// # Errors
    /// When it is empty or does not say where the socket goes.
    pub fn split(line: &str) -> Result<Self> {
        Self::new(line.split_whitespace())
    }

    /// A command line of `words`.
    ///
    /// # Errors
    /// As [`split`](Self::split).
    pub fn new(words: impl IntoIterator<Item = impl Into<String>>) -> Result<Self> {
        let words: Vec<String> = words.into_iter().map(Into::into).collect();
        ensure!(words.iter().skip(1).any(|word| word.contains("{socket}")), "the command has no argument {{socket}}");
        Ok(Self(words))
    }

    pub(crate) fn command(&self, socket: &Path) -> Command {
        let mut words = self.0.iter().map(|word| word.replace("{socket}", &socket.to_string_lossy()));
        let mut command = Command::new(words.next().unwrap_or_default());
        command.args(words);
        command
    }
}

/// A process that is killed when it is dropped.
#[derive(Debug)]
pub(crate) struct Running(pub(crate) Child);

impl Running {
    /// How it ended, `None` at the deadline.
    pub(crate) fn wait_until(&mut self, deadline: Instant) -> io::Result<Option<ExitStatus>> {
        loop {
            match self.0.try_wait()? {
                None if Instant::now() < deadline => thread::sleep(GLANCE),
                ended => return Ok(ended),
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Fails when it has ended, which is what is wanted.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
