//! The signal that brings a vCPU's thread out of the kernel.
//!
//! KVM_RUN comes back when a signal is pending, and there is no other way in from outside. The signal is a real-time one
//! that nobody had a use for: looked for once in a process, from the last one downward, among those with the default
//! disposition. Its handler does nothing; that it runs is the point. A program that takes the same number later only has
//! to keep a handler on it, as any handler does. The handler restarts system calls (`SA_RESTART`, which KVM_RUN does
//! not heed), so a signal that comes late disturbs nothing. It is sent to vCPUs' threads and to no other, and only
//! there is it let through, if the program blocks it.
#![allow(unsafe_code, reason = "unsafe fence: the disposition, mask and sending of one signal, by the C library")]

use std::io;
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::OnceLock;

/// The kick's signal.
#[derive(Clone, Copy, Debug)]
pub(super) struct Signal(libc::c_int);

/// A thread of this process.
#[derive(Clone, Copy, Debug)]
pub(super) struct Thread(libc::pid_t);

extern "C" fn nothing(_: libc::c_int) {}

impl Signal {
    /// The signal, with its handler in place.
    ///
    /// # Errors
    /// [`io::ErrorKind::ResourceBusy`] when the program uses all real-time signals itself.
    pub(super) fn get() -> io::Result<Self> {
        static CHOSEN: OnceLock<Option<Signal>> = OnceLock::new();
        let chosen = CHOSEN.get_or_init(|| (libc::SIGRTMIN()..=libc::SIGRTMAX()).rev().map(Signal).find(Self::claim));
        chosen.ok_or_else(|| io::ErrorKind::ResourceBusy.into())
    }

    /// Installs the handler if nobody has one; false when somebody has.
    fn claim(&self) -> bool {
        // SAFETY: an all-zero `sigaction` is a value of it: no flags, an empty mask, the default disposition.
        let mut handler: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
        handler.sa_sigaction = nothing as extern "C" fn(libc::c_int) as libc::sighandler_t;
        handler.sa_flags = libc::SA_RESTART;
        if self.exchange(None).is_none_or(|now| now.sa_sigaction != libc::SIG_DFL) {
            return false;
        }
        match self.exchange(Some(&handler)) {
            Some(before) if before.sa_sigaction == libc::SIG_DFL => true,
            // Somebody came in between: theirs it is.
            Some(before) => {
                let _ = self.exchange(Some(&before));
                false
            }
            None => false,
        }
    }

    /// The disposition until now, and another one from now on if there is one.
    fn exchange(self, new: Option<&libc::sigaction>) -> Option<libc::sigaction> {
        let mut old = MaybeUninit::uninit();
        // SAFETY:
        // - `new` is null or points to a disposition that is the default, somebody's that was in place, or `nothing`,
        //   which is async-signal-safe as it touches nothing;
        // - `old` is valid for writing one `sigaction`.
        let done = unsafe { libc::sigaction(self.0, new.map_or(ptr::null(), ptr::from_ref), old.as_mut_ptr()) };
        // SAFETY: the call writes the old disposition when it succeeds.
        (done == 0).then(|| unsafe { old.assume_init() })
    }

    /// Lets the signal through to the calling thread; whether it was blocked there.
    pub(super) fn unblock(self) -> bool {
        self.mask(libc::SIG_UNBLOCK)
    }

    /// Blocks the signal for the calling thread.
    pub(super) fn block(self) {
        self.mask(libc::SIG_BLOCK);
    }

    fn mask(self, how: libc::c_int) -> bool {
        let (mut set, mut old) = (MaybeUninit::uninit(), MaybeUninit::uninit());
        // SAFETY: `set` is valid for writing; the call makes it an empty set.
        unsafe { libc::sigemptyset(set.as_mut_ptr()) };
        // SAFETY: `set` was just initialised, and the signal is one the system has.
        unsafe { libc::sigaddset(set.as_mut_ptr(), self.0) };
        // SAFETY: `set` is initialised and `old` valid for writing; only the calling thread's mask changes, by a signal
        // that this module owns.
        let done = unsafe { libc::pthread_sigmask(how, set.as_ptr(), old.as_mut_ptr()) };
        // SAFETY: the call writes the old mask when it succeeds.
        done == 0 && unsafe { libc::sigismember(old.as_ptr(), self.0) } == 1
    }

    /// Sends the signal. Of a thread that has ended nothing happens, unless its number is another's by now, of this
    /// process; whoever sends sees to it that it is not (see `kick`).
    pub(super) fn send(self, to: Thread) {
        // SAFETY: `tgkill` takes three numbers. The signal's handler does nothing.
        unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), to.0, self.0) };
    }
}

impl Thread {
    /// The calling thread.
    pub(super) fn current() -> Self {
        // SAFETY: `gettid` takes nothing and cannot fail.
        Self(unsafe { libc::gettid() })
    }
}
