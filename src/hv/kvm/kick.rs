//! Kicks: out of guest code, out of a halt, and out of the instant before either.
//!
//! A kick is noted first; then the run structure's `immediate_exit` is set, so that a vCPU on its way into the kernel
//! comes back at once; then the thread gets the signal, which brings one that is inside out. The vCPU clears
//! `immediate_exit` first and takes the note after. Whichever way the two interleave, a note is seen now or
//! `immediate_exit` is still set when it next enters: no kick is lost, and one too many costs a look.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::run::RunPage;
use super::signal::{Signal, Thread};
use crate::hv::Kick;

/// What a vCPU's kicks reach it by.
#[derive(Debug)]
pub(super) struct Kicker {
    signal: Signal,
    kicked: AtomicBool,
    /// From bind to drop, on the vCPU's own thread both: a thread that is in here lives.
    bound: Mutex<Option<Bound>>,
}

#[derive(Debug)]
struct Bound {
    thread: Thread,
    page: Arc<RunPage>,
}

impl Kicker {
    pub(super) fn new(signal: Signal) -> Self {
        Self { signal, kicked: AtomicBool::new(false), bound: Mutex::new(None) }
    }

    /// The calling thread is the one to kick from now on, until the result is dropped on it.
    pub(super) fn bind(self: &Arc<Self>, page: Arc<RunPage>) -> Binding {
        let was_blocked = self.signal.unblock();
        *self.lock() = Some(Bound { thread: Thread::current(), page });
        Binding { kicker: Arc::clone(self), was_blocked }
    }

    /// Whether a kick has come since the last call. By the vCPU, before it enters the kernel.
    pub(super) fn take(&self, page: &RunPage) -> bool {
        page.set_immediate_exit(false);
        self.kicked.swap(false, Ordering::SeqCst)
    }

    fn lock(&self) -> MutexGuard<'_, Option<Bound>> {
        self.bound.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kick for Kicker {
    fn kick(&self) {
        // Held over the sending, so that the thread cannot end before it.
        let bound = self.lock();
        self.kicked.store(true, Ordering::SeqCst);
        if let Some(Bound { thread, page }) = &*bound {
            page.set_immediate_exit(true);
            self.signal.send(*thread);
        }
    }
}

/// A vCPU's thread can be kicked for as long as this lives.
#[derive(Debug)]
pub(super) struct Binding {
    kicker: Arc<Kicker>,
    was_blocked: bool,
}

impl Drop for Binding {
    fn drop(&mut self) {
        *self.kicker.lock() = None;
        if self.was_blocked {
            self.kicker.signal.block();
        }
    }
}
