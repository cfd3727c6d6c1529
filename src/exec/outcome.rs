//! How a command ended.

use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::time::Duration;

use kiln_wire::exit::Exit;

use crate::exec::session::Ended;

/// The highest signal number of Linux.
const LAST_SIGNAL: u32 = 64;

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ExecExit {
    /// How it ended. A code of 128+n is reported as signal n, which is how the protocol carries signals.
    pub status: ExitStatus,
    /// From the start of `spawn` to the end of the process.
    pub duration: Duration,
    /// The largest resident set of the process, in KiB, when the guest told.
    pub peak_rss_kib: Option<u64>,
    /// Whether the timeout ended it.
    pub timed_out: bool,
}

impl ExecExit {
    /// Whether it ended by itself with code 0.
    #[must_use]
    pub fn success(&self) -> bool {
        self.status.success() && !self.timed_out
    }
}

impl ExecExit {
    /// The end of a process that had no timeout.
    pub(crate) fn after(exit: Exit, duration: Duration) -> Self {
        Ended { exit, timed_out: false, duration }.into()
    }
}

impl From<Ended> for ExecExit {
    fn from(Ended { exit, timed_out, duration }: Ended) -> Self {
        Self { status: exit_status(exit.code), duration, peak_rss_kib: exit.peak_rss_kib, timed_out }
    }
}

/// A finished command, with what it printed.
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
        let ExecExit { status, duration, peak_rss_kib, timed_out } = ended.into();
        Self { status, stdout, stderr, duration, peak_rss_kib, timed_out }
    }
}

/// The wait status that a code of the protocol stands for.
pub(crate) fn exit_status(code: u32) -> ExitStatus {
    let raw = match code.checked_sub(128) {
        Some(signal @ 1..=LAST_SIGNAL) => signal,
        _ => (code & 0xff) << 8,
    };
    ExitStatus::from_raw(i32::try_from(raw).expect("at most 16 bits"))
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
