//! Wakes a device's thread, and holds it back. Rings add up to one: what rang is found by looking at the queues.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tokio::sync::watch;

#[derive(Debug, Default)]
struct State {
    rung: bool,
    closed: bool,
    /// No work shall be begun.
    held: bool,
}

/// A doorbell between any number of ringers and one thread that answers.
#[derive(Debug, Default)]
pub struct Doorbell {
    state: Mutex<State>,
    changed: Condvar,
    /// The thread has seen that it is held, and does nothing.
    quiet: watch::Sender<bool>,
}

/// Why [`Doorbell::wait`] returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wake {
    /// It was rung, or the deadline came.
    Work,
    /// It was closed: nobody will ring any more.
    Closed,
}

impl Doorbell {
    /// Wakes the device's thread, now or when it next waits. Never waits itself.
    pub fn ring(&self) {
        self.lock().rung = true;
        self.changed.notify_one();
    }

    /// Tells the device's thread to end.
    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_one();
    }

    /// Tells the device's thread to finish the piece of work that it is at, and to begin no other.
    pub(in crate::vmm) fn hold(&self) {
        self.lock().held = true;
        self.changed.notify_one();
    }

    /// Lets the device's thread work again, beginning with what rang meanwhile.
    pub(super) fn release(&self) {
        self.lock().held = false;
        self.changed.notify_one();
    }

    /// Waits until a held thread does nothing any more.
    pub(super) async fn quiet(&self) {
        // The sender lives in `self`, so waiting cannot fail.
        let _ = self.quiet.subscribe().wait_for(|quiet| *quiet).await;
    }

    /// Whether the device's thread shall come back to `wait` although it has more to do.
    pub(super) fn interrupts(&self) -> bool {
        let state = self.lock();
        state.closed || state.held
    }

    /// Waits for a ring or the deadline, and for as long as it is held.
    pub(super) fn wait(&self, deadline: Option<Instant>) -> Wake {
        let mut state = self.lock();
        loop {
            if state.closed {
                return Wake::Closed;
            }
            self.set_quiet(state.held);
            if state.held {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            if std::mem::take(&mut state.rung) {
                return Wake::Work;
            }
            state = match deadline {
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(at) => {
                    let left = at.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Wake::Work;
                    }
                    self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }

    /// With `state` locked: so that whoever holds a released thread again finds out about this time, not the last.
    fn set_quiet(&self, quiet: bool) {
        self.quiet.send_if_modified(|now| std::mem::replace(now, quiet) != quiet);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
