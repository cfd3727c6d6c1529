//! What the guest wrote to its serial console: the last 64 KiB, for error reports and for who follows it.
//!
//! The writer is the vCPU thread, so nothing here waits for a reader: a follower that is too slow
//! misses the oldest bytes and is told how many.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

/// How much is kept: several boots' worth of messages, and all of a long crash report.
const KEPT: usize = 64 * 1024;
/// The longest part of a line that is searched for a kernel panic.
const LINE_MAX: usize = 1024;
const PANIC: &str = "Kernel panic - not syncing: ";

#[derive(Debug, Default)]
struct State {
    kept: VecDeque<u8>,
    /// Bytes ever written; the last `kept.len()` of them are in `kept`.
    total: u64,
    line: Vec<u8>,
    panic: Option<String>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// Mirrors `State::total`, for followers to wait on.
    written: watch::Sender<u64>,
}

/// The console's last output; clones share it.
#[derive(Clone, Debug)]
pub struct Console {
    shared: Arc<Shared>,
}

impl Default for Console {
    fn default() -> Self {
        Self::new()
    }
}

impl Console {
    /// A console to which nothing was written yet.
    #[must_use]
    pub fn new() -> Self {
        let shared = Shared { state: Mutex::default(), written: watch::Sender::new(0) };
        Self { shared: Arc::new(shared) }
    }

    /// What is kept, as text; what is not UTF-8 becomes replacement characters.
    #[must_use]
    pub fn text(&self) -> String {
        let state = self.lock();
        let (first, second) = state.kept.as_slices();
        String::from_utf8_lossy(&[first, second].concat()).into_owned()
    }

    /// The last `n` lines that are not empty.
    #[must_use]
    pub fn last_lines(&self, n: usize) -> Vec<String> {
        let text = self.text();
        let mut lines: Vec<String> =
            text.lines().rev().map(str::trim_end).filter(|l| !l.is_empty()).take(n).map(str::to_owned).collect();
        lines.reverse();
        lines
    }

    /// The message of the guest kernel's panic, if it had one.
    #[must_use]
    pub fn kernel_panic(&self) -> Option<String> {
        self.lock().panic.clone()
    }

    /// Follows the console, from the oldest byte that is kept.
    #[must_use]
    pub fn follow(&self) -> ConsoleFollower {
        ConsoleFollower { console: self.clone(), written: self.shared.written.subscribe(), next: 0 }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn push(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            if self.kept.len() == KEPT {
                self.kept.pop_front();
            }
            self.kept.push_back(byte);
            if byte == b'\n' {
                self.end_line();
            } else if self.line.len() < LINE_MAX {
                self.line.push(byte);
            }
        }
        self.total += bytes.len() as u64;
    }

    fn end_line(&mut self) {
        let line = String::from_utf8_lossy(&self.line);
        if self.panic.is_none()
            && let Some((_, message)) = line.split_once(PANIC)
        {
            self.panic = Some(message.trim_end().to_owned());
        }
        self.line.clear();
    }
}

/// The serial port's side. Never fails and never waits.
impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let total = {
            let mut state = self.lock();
            state.push(bytes);
            state.total
        };
        self.shared.written.send_replace(total);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A piece of console output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConsoleOutput {
    /// Bytes lost before this piece, because the follower was too slow for what is kept.
    pub missed: u64,
    /// The bytes.
    pub bytes: Vec<u8>,
}

/// Follows a [`Console`].
#[derive(Debug)]
pub struct ConsoleFollower {
    console: Console,
    written: watch::Receiver<u64>,
    next: u64,
}

impl ConsoleFollower {
    /// Waits for output that was not seen yet. Never ends by itself: a silent guest is not a dead one.
    ///
    /// # Cancel safety
    /// Cancel safe: output is either returned or will be by the next call.
    pub async fn next(&mut self) -> ConsoleOutput {
        // The sender lives in `self.console`, so waiting cannot fail.
        let next = self.next;
        let _ = self.written.wait_for(|total| *total > next).await;
        let state = self.console.lock();
        let oldest = state.total - state.kept.len() as u64;
        let from = self.next.max(oldest);
        let output = ConsoleOutput {
            missed: from - self.next,
            bytes: state.kept.iter().skip((from - oldest) as usize).copied().collect(),
        };
        self.next = state.total;
        output
    }

    /// Waits until `text` has appeared since this follower began or last found something.
    ///
    /// # Cancel safety
    /// Not cancel safe: what was read before is forgotten.
    pub async fn find(&mut self, text: &str) {
        let mut seen = Vec::new();
        loop {
            seen.extend_from_slice(&self.next().await.bytes);
            if seen.windows(text.len()).any(|window| window == text.as_bytes()) {
                return;
            }
            // Only a part of `text` can still be completed by what follows.
            seen.drain(..seen.len().saturating_sub(text.len()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_bytes_are_kept_and_the_rest_is_forgotten() {
        let mut console = Console::new();
        console.write_all(&vec![b'a'; KEPT]).unwrap();
        console.write_all(b"\none\r\n\r\ntwo\r\n").unwrap();
        assert_eq!(console.text().len(), KEPT);
        assert_eq!(console.last_lines(2), ["one", "two"]);
    }

    #[test]
    fn a_kernel_panic_is_recognised_across_writes() {
        let mut console = Console::new();
        for part in ["[    0.1] Kernel panic - not ", "syncing: No working init", " found.\r\n", "later\n"] {
            console.write_all(part.as_bytes()).unwrap();
        }
        assert_eq!(console.kernel_panic().as_deref(), Some("No working init found."));
    }

    #[tokio::test]
    async fn a_follower_sees_everything_once_and_learns_what_it_missed() {
        let mut console = Console::new();
        let mut follower = console.follow();
        console.write_all(b"abc").unwrap();
        assert_eq!(follower.next().await, ConsoleOutput { missed: 0, bytes: b"abc".to_vec() });
        console.write_all(&vec![b'x'; KEPT + 5]).unwrap();
        assert_eq!(follower.next().await.missed, 5);
        let waiting = tokio::spawn(async move { follower.next().await });
        console.write_all(b"z").unwrap();
        assert_eq!(waiting.await.unwrap().bytes, b"z");
    }
}
