//! Starting and reaping processes.
//!
//! A process starts with `clone(CLONE_VM | CLONE_VFORK)`: the child borrows the agent's memory on a stack of its own
//! while the agent is suspended, until it executes the program or gives up. No page table is copied, which is
//! most of the cost of `fork` in a small guest, and the reason of a failure comes back through a plain variable.

use std::ffi::CStr;
use std::ffi::CString;
use std::ffi::c_char;
use std::ffi::c_int;
use std::ffi::c_void;
use std::io;
use std::os::fd::AsRawFd;
use std::os::fd::BorrowedFd;
use std::ptr;

/// The child's stack, in 16-byte units (64 KiB): it makes a dozen system calls and no deep calls.
const STACK_UNITS: usize = 4096;

/// Numeric identity of a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Supplementary groups.
    pub(crate) groups: Vec<u32>,
}

/// Everything the child needs, prepared before it exists.
#[derive(Debug)]
pub(crate) struct Start<'a> {
    /// Paths to try, in order.
    pub(crate) candidates: &'a [CString],
    pub(crate) argv: &'a [CString],
    pub(crate) env: &'a [CString],
    pub(crate) cwd: &'a CStr,
    /// The agent's own identity when `None`.
    pub(crate) identity: Option<&'a Identity>,
    pub(crate) stdio: [BorrowedFd<'a>; 3],
    /// Whether `stdio` is a terminal that becomes the controlling one.
    pub(crate) terminal: bool,
    /// The soft and hard limit of open files to give back, if the agent raised its own.
    pub(crate) open_files: Option<(u64, u64)>,
    /// Signals that the agent was told to ignore, which concerns nobody else.
    pub(crate) ignored: &'a [i32],
}

/// What the child was doing when it gave up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    Fork,
    Group,
    Identity,
    Cwd,
    Exec,
}

/// Why no program runs.
#[derive(Debug)]
pub(crate) struct StartError {
    pub(crate) stage: Stage,
    pub(crate) error: io::Error,
}

/// A process that ended.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reaped {
    pub(crate) pid: i32,
    /// The exit code, or 128+n after signal n.
    pub(crate) code: u32,
    pub(crate) peak_rss_kib: u64,
}

/// The child's view of [`Start`], and where it leaves its reason.
struct Shared<'a> {
    start: &'a Start<'a>,
    argv: &'a [*const c_char],
    env: &'a [*const c_char],
    failed: Option<(Stage, c_int)>,
}

/// Starts a process and returns its pid, which is also its process group.
pub(crate) fn start(start: &Start<'_>) -> Result<i32, StartError> {
    let argv = pointers(start.argv);
    let env = pointers(start.env);
    let mut stack = Vec::<u128>::with_capacity(STACK_UNITS);
    let mut shared = Shared { start, argv: &argv, env: &env, failed: None };
    // SAFETY: one past the end of the allocation, which is where a stack that grows downwards starts; u128 aligns it to 16.
    let top = unsafe { stack.as_mut_ptr().add(STACK_UNITS) };
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
    // SAFETY:
    // - CLONE_VFORK suspends this thread, the only one, until the child has executed a program or exited, so
    //   `shared` and `stack` outlive the child's use of them and nothing else touches them meanwhile;
    // - `child` is an `extern "C" fn(*mut c_void) -> c_int` and gets the pointer to `Shared` that it expects;
    // - no handler is installed in this process, so no signal runs other code on the borrowed memory.
    let pid = unsafe { libc::clone(child, top.cast(), flags, (&raw mut shared).cast()) };
    if pid < 0 {
        return Err(StartError { stage: Stage::Fork, error: io::Error::last_os_error() });
    }
    // SAFETY: `failed` lives in this frame; the volatile read keeps the compiler from assuming that clone did not write it.
    match unsafe { ptr::read_volatile(&raw const shared.failed) } {
        None => Ok(pid),
        Some((stage, errno)) => {
            // The child has exited already; its zombie must not be mistaken for a session's process.
            // SAFETY: waitpid with a null status writes nothing.
            unsafe { libc::waitpid(pid, ptr::null_mut(), 0) };
            Err(StartError { stage, error: io::Error::from_raw_os_error(errno) })
        }
    }
}

fn pointers(strings: &[CString]) -> Vec<*const c_char> {
    strings.iter().map(|s| s.as_ptr()).chain([ptr::null()]).collect()
}

/// Runs in the child, on borrowed memory: system calls only, no allocation, no unwinding.
extern "C" fn child(arg: *mut c_void) -> c_int {
    // SAFETY: `start` passes a pointer to its `Shared`, which it does not touch before this process execs or exits.
    let shared = unsafe { &mut *arg.cast::<Shared<'_>>() };
    let (stage, errno) = become_program(shared);
    // SAFETY: as above; volatile so that the write is not dropped before _exit.
    unsafe { ptr::write_volatile(&raw mut shared.failed, Some((stage, errno))) };
    // SAFETY: _exit ends this process without running the agent's exit handlers.
    unsafe { libc::_exit(127) }
}

fn errno() -> c_int {
    // SAFETY: the C library's errno location is always valid in a running thread.
    unsafe { *libc::__errno_location() }
}

/// Returns only when something failed.
fn become_program(shared: &Shared<'_>) -> (Stage, c_int) {
    let start = shared.start;
    if let Err(errno) = enter_group(start) {
        return (Stage::Group, errno);
    }
    reset_inherited(start);
    if let Some(identity) = start.identity
        && let Err(errno) = assume_identity(identity)
    {
        return (Stage::Identity, errno);
    }
    // SAFETY: `cwd` is a terminated string.
    if unsafe { libc::chdir(start.cwd.as_ptr()) } != 0 {
        return (Stage::Cwd, errno());
    }
    let mut reason = libc::ENOENT;
    for path in start.candidates {
        // SAFETY: `path` is terminated; both arrays are null-terminated arrays of pointers to terminated strings that live.
        unsafe { libc::execve(path.as_ptr(), shared.argv.as_ptr(), shared.env.as_ptr()) };
        match errno() {
            // Nothing there: a later folder of PATH may have it, and an earlier "permission denied" says more.
            libc::ENOENT | libc::ENOTDIR => {}
            libc::EACCES => reason = libc::EACCES,
            other => return (Stage::Exec, other),
        }
    }
    (Stage::Exec, reason)
}

fn enter_group(start: &Start<'_>) -> Result<(), c_int> {
    let [stdin, stdout, stderr] = start.stdio;
    if start.terminal {
        // SAFETY: these take numbers only.
        if unsafe { libc::setsid() < 0 || libc::ioctl(stdin.as_raw_fd(), libc::TIOCSCTTY, 0) < 0 } {
            return Err(errno());
        }
    // SAFETY: setpgid takes numbers only.
    } else if unsafe { libc::setpgid(0, 0) } != 0 {
        return Err(errno());
    }
    for (from, to) in [(stdin, 0), (stdout, 1), (stderr, 2)] {
        // SAFETY: dup2 takes numbers only; this process has its own descriptor table (no CLONE_FILES), so the
        // agent's descriptors 0 to 2 are not replaced.
        if unsafe { libc::dup2(from.as_raw_fd(), to) } < 0 {
            return Err(errno());
        }
    }
    Ok(())
}

/// Undoes what the agent set for itself: ignored SIGPIPE, blocked signals, raised limit of open files; and what signals it was started to
/// ignore, as under `nohup` or in the background of a script: a program expects ^C to end it.
fn reset_inherited(start: &Start<'_>) {
    for &signal in start.ignored.iter().chain(&[libc::SIGPIPE]) {
        // SAFETY: SIG_DFL runs no code, and without CLONE_SIGHAND the agent's own disposition stays.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    let mut none = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigemptyset initialises the set before sigprocmask reads it.
    unsafe {
        libc::sigemptyset(none.as_mut_ptr());
        libc::sigprocmask(libc::SIG_SETMASK, none.as_ptr(), ptr::null_mut());
    }
    if let Some((soft, hard)) = start.open_files {
        let limit = libc::rlimit { rlim_cur: soft, rlim_max: hard };
        // SAFETY: `limit` outlives the call.
        unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) };
    }
}

/// Raw system calls: the C library's wrappers broadcast to all threads, whose list is the agent's.
fn assume_identity(identity: &Identity) -> Result<(), c_int> {
    let (uid, gid) = (identity.uid, identity.gid);
    // SAFETY: the pointer and length describe the slice; the other calls take numbers only.
    let changed = unsafe {
        libc::syscall(libc::SYS_setgroups, identity.groups.len(), identity.groups.as_ptr()) == 0
            && libc::syscall(libc::SYS_setresgid, gid, gid, gid) == 0
            && libc::syscall(libc::SYS_setresuid, uid, uid, uid) == 0
    };
    if changed { Ok(()) } else { Err(errno()) }
}

/// Takes one ended child, of any kind, without waiting.
pub(crate) fn reap() -> Option<Reaped> {
    let mut status: c_int = 0;
    // SAFETY: rusage is plain data for which all-zero is valid.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: both pointers are to live variables of the right type.
    let pid = unsafe { libc::wait4(-1, &raw mut status, libc::WNOHANG, &raw mut usage) };
    if pid <= 0 {
        return None;
    }
    let code = if libc::WIFSIGNALED(status) { 128 + libc::WTERMSIG(status) } else { libc::WEXITSTATUS(status) };
    Some(Reaped {
        pid,
        code: u32::try_from(code).unwrap_or(u32::MAX),
        peak_rss_kib: u64::try_from(usage.ru_maxrss).unwrap_or(0),
    })
}
