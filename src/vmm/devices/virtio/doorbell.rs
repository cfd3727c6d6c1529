//! Wakes a device's thread, and holds it back. Rings add up to one: what rang is found by looking at the queues.
//!
//! The thread waits for a condition, or for a file that the engine writes to when the guest rings. Then everybody writes
//! to it: a ring that nobody has looked at stays in the file, over a pause too. (A machine that is restored rings all its
//! devices, so that none is lost on that way either.)

use std::os::fd::OwnedFd;
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
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
    /// In the stead of `changed`, from before the thread begins.
    bell: OnceLock<OwnedFd>,
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
    /// Listens to `bell` too, which becomes readable when the guest rings and takes eight bytes to ring it from here, as
    /// an eventfd does; reading must not wait. Before the device's thread begins, once.
    pub(in crate::vmm) fn listen(&self, bell: OwnedFd) {
        // A second one would be a mistake of the machine's, and is not heard.
        let _ = self.bell.set(bell);
    }

    /// Wakes the device's thread, now or when it next waits. Never waits itself.
    pub fn ring(&self) {
        self.change(|state| state.rung = true);
    }

    /// Tells the device's thread to end.
    pub(super) fn close(&self) {
        self.change(|state| state.closed = true);
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.lock());
        match self.bell.get() {
            None => self.changed.notify_one(),
            // A counter that is full wakes as well.
            Some(bell) => drop(rustix::io::write(bell, &1u64.to_ne_bytes())),
        }
    }

    /// Tells the device's thread to finish the piece of work that it is at, and to begin no other.
    pub(in crate::vmm) fn hold(&self) {
        self.change(|state| state.held = true);
    }

    /// Lets the device's thread work again, beginning with what rang meanwhile.
    pub(super) fn release(&self) {
        self.change(|state| state.held = false);
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
            if !state.held && std::mem::take(&mut state.rung) {
                return Wake::Work;
            }
            // What is held waits for no deadline.
            let left = deadline.filter(|_| !state.held).map(|at| at.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return Wake::Work;
            }
            state = self.sleep(state, left);
        }
    }

    /// Waits for a change, a ring or so much time; spuriously it may end sooner.
    fn sleep<'a>(&'a self, state: MutexGuard<'a, State>, left: Option<Duration>) -> MutexGuard<'a, State> {
        match (self.bell.get(), left) {
            (None, None) => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            (None, Some(left)) => self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0,
            (Some(bell), left) => {
                drop(state);
                let rung = hear(bell, left);
                let mut state = self.lock();
                // Whatever it was: who has nothing to do finds out by looking.
                state.rung |= rung;
                state
            }
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

/// Waits until `bell` rings, and takes the ring; false when the time is over, or a signal came.
fn hear(bell: &OwnedFd, left: Option<Duration>) -> bool {
    let left = left.and_then(|left| Timespec::try_from(left).ok());
    let _ = poll(&mut [PollFd::new(bell, PollFlags::IN)], left.as_ref());
    let mut count = [0; size_of::<u64>()];
    rustix::io::read(bell, &mut count).is_ok()
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use std::sync::Arc;
    use std::sync::mpsc;
    use std::thread;

    use rustix::event::{EventfdFlags, eventfd};

    use super::*;

    const LONG: Duration = Duration::from_secs(20);
    const SHORT: Duration = Duration::from_millis(20);

    /// A doorbell with a bell, what the guest's side writes to, and what the thread that answers has woken for.
    fn answered() -> (Arc<Doorbell>, OwnedFd, mpsc::Receiver<Wake>) {
        let bell = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        let guests = bell.try_clone().unwrap();
        let doorbell = Arc::new(Doorbell::default());
        doorbell.listen(bell);
        let (woken, wakes) = mpsc::channel();
        let thread = Arc::clone(&doorbell);
        thread::spawn(move || {
            loop {
                let wake = thread.wait(None);
                if woken.send(wake).is_err() || wake == Wake::Closed {
                    return;
                }
            }
        });
        (doorbell, guests, wakes)
    }

    fn ring(bell: &OwnedFd) {
        rustix::io::write(bell, &1u64.to_ne_bytes()).unwrap();
    }

    #[test]
    fn guest_and_host_ring_the_same_bell() {
        let (doorbell, guests, wakes) = answered();
        for _ in 0..100 {
            ring(&guests);
            assert_eq!(wakes.recv_timeout(LONG), Ok(Wake::Work));
            doorbell.ring();
            assert_eq!(wakes.recv_timeout(LONG), Ok(Wake::Work));
        }
        doorbell.close();
        assert!(wakes.iter().any(|wake| wake == Wake::Closed));
    }

    #[tokio::test]
    async fn a_ring_while_held_is_answered_after() {
        let (doorbell, guests, wakes) = answered();
        for _ in 0..20 {
            doorbell.hold();
            doorbell.quiet().await;
            while wakes.try_recv().is_ok() {}
            ring(&guests);
            assert!(wakes.recv_timeout(SHORT).is_err(), "held");
            doorbell.release();
            assert_eq!(wakes.recv_timeout(LONG), Ok(Wake::Work));
        }
        doorbell.close();
    }

    #[test]
    fn a_deadline_wakes_without_a_ring() {
        let doorbell = Doorbell::default();
        doorbell.listen(eventfd(0, EventfdFlags::NONBLOCK).unwrap());
        let at = Instant::now() + SHORT;
        assert_eq!(doorbell.wait(Some(at)), Wake::Work);
        assert!(Instant::now() >= at);
    }
}
