//! Signals: blocked and read from a descriptor, and sent by number.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::os::fd::BorrowedFd;
use std::os::fd::FromRawFd;
use std::os::fd::OwnedFd;
use std::ptr;

/// The highest signal number of Linux.
const LAST_SIGNAL: i32 = 64;

/// Blocks `signals` for this process and returns a non-blocking descriptor that reports them.
pub(crate) fn signal_fd(signals: &[i32]) -> io::Result<OwnedFd> {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigemptyset initialises the set that it is given.
    let mut set = unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        set.assume_init()
    };
    for &signal in signals {
        // SAFETY: `set` is an initialised set; an invalid number is an error return, not undefined.
        unsafe { libc::sigaddset(&raw mut set, signal) };
    }
    // SAFETY: `set` is initialised and outlives the call; the old mask is not asked for.
    if unsafe { libc::sigprocmask(libc::SIG_BLOCK, &raw const set, ptr::null_mut()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `set` is initialised and outlives the call.
    let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: signalfd just returned this descriptor and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The number of the next pending signal of a [`signal_fd`], if there is one.
pub(crate) fn next_signal(fd: BorrowedFd<'_>) -> Option<i32> {
    let mut info = MaybeUninit::<libc::signalfd_siginfo>::uninit();
    let size = size_of::<libc::signalfd_siginfo>();
    // SAFETY: the buffer is `size` bytes long and outlives the call.
    let read = unsafe { libc::read(fd.as_raw_fd(), info.as_mut_ptr().cast(), size) };
    if usize::try_from(read) != Ok(size) {
        return None;
    }
    // SAFETY: the kernel wrote the whole structure, and any bytes are a valid value of it.
    let info = unsafe { info.assume_init() };
    i32::try_from(info.ssi_signo).ok()
}

/// The signals that this process ignores, as whoever started it wished.
pub(crate) fn ignored() -> Vec<i32> {
    (1..=LAST_SIGNAL).filter(|signal| is_ignored(*signal)).collect()
}

fn is_ignored(signal: i32) -> bool {
    let mut action = MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: no new action is given, and the old one goes to a structure of its type that outlives the call.
    if unsafe { libc::sigaction(signal, ptr::null(), action.as_mut_ptr()) } != 0 {
        // The C library keeps a few to itself.
        return false;
    }
    // SAFETY: sigaction succeeded, so it has written the structure.
    unsafe { action.assume_init() }.sa_sigaction == libc::SIG_IGN
}

/// Makes writes to a closed pipe or socket an error instead of the end of the agent.
pub(crate) fn ignore_sigpipe() {
    // SAFETY: SIG_IGN runs no code, so no handler's obligations arise.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
}

/// Sends `signal` to every process of group `pgid`; a group that is gone is no error to the agent.
pub(crate) fn kill_group(pgid: i32, signal: u8) {
    let _ = signal_group(pgid, signal);
}

/// The same, for whoever has to know whether it was sent.
pub(crate) fn signal_group(pgid: i32, signal: u8) -> io::Result<()> {
    // SAFETY: kill takes numbers only; group 0 (our own) and -1 (everyone) are excluded.
    if pgid > 1 && unsafe { libc::kill(-pgid, i32::from(signal)) } == 0 {
        return Ok(());
    }
    Err(if pgid > 1 { io::Error::last_os_error() } else { io::ErrorKind::InvalidInput.into() })
}

/// Whether group `pgid` has a process, a zombie included.
pub(crate) fn group_exists(pgid: i32) -> bool {
    // SAFETY: kill takes numbers only; signal 0 is not delivered, and group 0 and -1 are excluded.
    pgid > 1 && (unsafe { libc::kill(-pgid, 0) } == 0 || io::Error::last_os_error().raw_os_error() != Some(libc::ESRCH))
}
