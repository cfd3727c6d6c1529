//! Wakes a device's thread. Rings add up to one: what rang is found by looking at the queues.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

#[derive(Debug, Default)]
struct State {
    rung: bool,
    closed: bool,
}

/// A doorbell between any number of ringers and one thread that answers.
#[derive(Debug, Default)]
pub struct Doorbell {
    state: Mutex<State>,
    changed: Condvar,
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

    pub(super) fn is_closed(&self) -> bool {
        self.lock().closed
    }

    /// Waits for a ring or the deadline.
    pub(super) fn wait(&self, deadline: Option<Instant>) -> Wake {
        let mut state = self.lock();
        loop {
            if state.closed {
                return Wake::Closed;
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

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
