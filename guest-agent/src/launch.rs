//! From a REQUEST to a running process: environment, identity, working directory, PATH, pipes or terminal.
//!
//! Everything that allocates or can be refused happens here, before a child exists; [`crate::sys::process`] does the rest.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::io;
use std::os::fd::AsFd;
use std::os::fd::OwnedFd;
use std::path::Path;

use kiln_wire::failure::Failure;
use kiln_wire::request::Request;
use rustix::fs::Mode;
use rustix::fs::OFlags;
use rustix::pipe::PipeFlags;
use rustix::pty::OpenptFlags;
use rustix::termios::Winsize;

use crate::sys::process;
use crate::sys::process::Identity;
use crate::sys::process::Stage;
use crate::sys::process::Start;
use crate::sys::process::StartError;
use crate::users;

/// PATH where neither the image nor the request sets one.
pub(crate) const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What the image (or, outside a guest, the agent's own surroundings) says about every process.
#[derive(Debug)]
pub(crate) struct Defaults {
    pub(crate) env: BTreeMap<String, String>,
    pub(crate) workdir: String,
    pub(crate) user: Option<String>,
    /// Limit of open files for processes, when the agent raised its own.
    pub(crate) open_files: Option<(u64, u64)>,
    /// Signals that the agent was started to ignore.
    pub(crate) ignored: Vec<i32>,
}

/// What all commands of one session share.
#[derive(Debug)]
pub(crate) struct Plan {
    env: Vec<CString>,
    path: String,
    cwd: CString,
    cwd_text: String,
    identity: Option<Identity>,
    terminal: bool,
    open_files: Option<(u64, u64)>,
    ignored: Vec<i32>,
}

/// The agent's ends of a session's pipes or terminal.
#[derive(Debug)]
pub(crate) struct AgentEnds {
    /// Absent where the process has none to read.
    pub(crate) stdin: Option<OwnedFd>,
    pub(crate) stdout: OwnedFd,
    /// Absent with a terminal, which has one output.
    pub(crate) stderr: Option<OwnedFd>,
}

/// The process's ends: kept while more commands of the chain may need them.
#[derive(Debug)]
pub(crate) struct ProcessEnds {
    stdin: OwnedFd,
    stdout: OwnedFd,
    stderr: OwnedFd,
}

fn terminated(text: &str, what: &str) -> Result<CString, Failure> {
    CString::new(text).map_err(|_| Failure::BadRequest(format!("{what} contains a NUL byte")))
}

impl Plan {
    pub(crate) fn new(request: &Request, defaults: &Defaults) -> Result<Self, Failure> {
        let mut env = defaults.env.clone();
        env.extend(request.env.iter().map(|(name, value)| (name.clone(), value.clone())));
        if let Some(name) = env.keys().find(|name| name.is_empty() || name.contains('=')) {
            return Err(Failure::BadRequest(format!("invalid environment name {name:?}")));
        }
        let user = request.user.as_ref().or(defaults.user.as_ref()).map(|spec| users::lookup(spec)).transpose()?;
        let home = user.as_ref().map_or("/root", |user| user.home.as_str());
        env.entry("HOME".to_owned()).or_insert_with(|| home.to_owned());
        if request.tty {
            env.entry("TERM".to_owned()).or_insert_with(|| "xterm".to_owned());
        }
        let path = env.entry("PATH".to_owned()).or_insert_with(|| DEFAULT_PATH.to_owned()).clone();
        let cwd_text = match &request.cwd {
            Some(cwd) => Path::new(&defaults.workdir).join(cwd).to_string_lossy().into_owned(),
            None => defaults.workdir.clone(),
        };
        let env = env
            .iter()
            .map(|(name, value)| terminated(&format!("{name}={value}"), "the environment"))
            .collect::<Result<_, _>>()?;
        let cwd = terminated(&cwd_text, "cwd")?;
        let identity = user.map(|user| user.identity);
        let (open_files, ignored) = (defaults.open_files, defaults.ignored.clone());
        Ok(Self { env, path, cwd, cwd_text, identity, terminal: request.tty, open_files, ignored })
    }

    /// What a process of the agent's own program gets: the agent's identity and folder, and no environment.
    pub(crate) fn own(defaults: &Defaults) -> Self {
        let here = c".".to_owned();
        let (env, path, cwd_text) = (Vec::new(), String::new(), ".".to_owned());
        let (open_files, ignored) = (defaults.open_files, defaults.ignored.clone());
        Self { env, path, cwd: here, cwd_text, identity: None, terminal: false, open_files, ignored }
    }

    /// Starts `argv` on `ends`; the pid is also the process group.
    pub(crate) fn start(&self, argv: &[String], ends: &ProcessEnds) -> Result<i32, Failure> {
        let Some(program) = argv.first().filter(|program| !program.is_empty()) else {
            return Err(Failure::BadRequest("argv is empty".to_owned()));
        };
        let candidates = self.candidates(program)?;
        let c_argv = argv.iter().map(|arg| terminated(arg, "argv")).collect::<Result<Vec<_>, _>>()?;
        let start = Start {
            candidates: &candidates,
            argv: &c_argv,
            env: &self.env,
            cwd: &self.cwd,
            identity: self.identity.as_ref(),
            stdio: [ends.stdin.as_fd(), ends.stdout.as_fd(), ends.stderr.as_fd()],
            terminal: self.terminal,
            open_files: self.open_files,
            ignored: &self.ignored,
        };
        process::start(&start).map_err(|error| self.explain(program, &error))
    }

    /// The paths that `program` may mean, as execvp(3) finds them.
    fn candidates(&self, program: &str) -> Result<Vec<CString>, Failure> {
        if program.contains('/') {
            return Ok(vec![terminated(program, "argv")?]);
        }
        let in_folder = |folder: &str| match folder {
            "" => format!("./{program}"),
            folder => format!("{folder}/{program}"),
        };
        self.path.split(':').map(|folder| terminated(&in_folder(folder), "argv")).collect()
    }

    fn explain(&self, program: &str, StartError { stage, error }: &StartError) -> Failure {
        let reason = reason(error);
        let system = |what: &str| match error.raw_os_error() {
            Some(errno) => Failure::System { errno, detail: format!("{what}: {reason}") },
            None => Failure::Other(format!("{what}: {reason}")),
        };
        match (stage, error.raw_os_error()) {
            (Stage::Cwd, _) => Failure::BadCwd(format!("{}: {reason}", self.cwd_text)),
            (Stage::Exec, Some(libc::ENOENT)) if self.exists(program) => {
                Failure::NotExecutable(format!("{program}: its interpreter does not exist"))
            }
            (Stage::Exec, Some(libc::ENOENT)) => Failure::NotFound(program.to_owned()),
            (Stage::Exec, Some(libc::ENOMEM | libc::EAGAIN | libc::EMFILE | libc::ENFILE)) => {
                system(&format!("cannot execute {program}"))
            }
            (Stage::Exec, Some(libc::E2BIG)) => Failure::BadRequest("argv and env are too long".to_owned()),
            (Stage::Exec, _) => Failure::NotExecutable(format!("{program}: {reason}")),
            (Stage::Identity, _) => system("cannot change user"),
            (Stage::Group | Stage::Fork, _) => system("cannot start a process"),
        }
    }

    fn exists(&self, program: &str) -> bool {
        let cwd = Path::new(&self.cwd_text);
        if program.contains('/') {
            return cwd.join(program).exists();
        }
        self.path.split(':').any(|folder| cwd.join(folder).join(program).exists())
    }
}

/// The system's text for an error, without Rust's "(os error n)".
pub(crate) fn reason(error: &io::Error) -> String {
    let text = error.to_string();
    match text.split_once(" (os error") {
        Some((text, _)) => text.to_owned(),
        None => text,
    }
}

/// Makes the pipes or the terminal of a session; the agent's ends do not block.
pub(crate) fn open_ends(request: &Request) -> io::Result<(AgentEnds, ProcessEnds)> {
    if request.tty { open_terminal(request) } else { open_pipes() }
}

/// Makes three pipes; the agent's ends do not block.
pub(crate) fn open_pipes() -> io::Result<(AgentEnds, ProcessEnds)> {
    let (stdin_of_process, stdin) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
    // Only this end, as below: an unsuspecting program must not find its own standard streams non-blocking.
    rustix::fs::fcntl_setfl(&stdin, OFlags::NONBLOCK)?;
    let (agent, process) = open_outputs(stdin_of_process)?;
    Ok((AgentEnds { stdin: Some(stdin), ..agent }, process))
}

/// Makes two pipes for the outputs of a process that reads `/dev/null`; the agent's ends do not block.
pub(crate) fn open_deaf() -> io::Result<(AgentEnds, ProcessEnds)> {
    let null = rustix::fs::open("/dev/null", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    open_outputs(null)
}

fn open_outputs(stdin_of_process: OwnedFd) -> io::Result<(AgentEnds, ProcessEnds)> {
    let (stdout, stdout_of_process) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
    let (stderr, stderr_of_process) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
    rustix::fs::fcntl_setfl(&stdout, OFlags::NONBLOCK)?;
    rustix::fs::fcntl_setfl(&stderr, OFlags::NONBLOCK)?;
    Ok((
        AgentEnds { stdin: None, stdout, stderr: Some(stderr) },
        ProcessEnds { stdin: stdin_of_process, stdout: stdout_of_process, stderr: stderr_of_process },
    ))
}

fn open_terminal(request: &Request) -> io::Result<(AgentEnds, ProcessEnds)> {
    let stdout = rustix::pty::openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    rustix::pty::unlockpt(&stdout)?;
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let slave = rustix::pty::ioctl_tiocgptpeer(&stdout, flags)?;
    if let (Some(cols), Some(rows)) = (request.cols, request.rows) {
        resize(stdout.as_fd(), cols, rows)?;
    }
    rustix::fs::fcntl_setfl(&stdout, OFlags::NONBLOCK | OFlags::RDWR)?;
    // A second descriptor of the same terminal, because one descriptor can wait for one thing only.
    let stdin = rustix::io::fcntl_dupfd_cloexec(&stdout, 0)?;
    let copy = |fd: &OwnedFd| rustix::io::fcntl_dupfd_cloexec(fd, 0);
    let ends = ProcessEnds { stdin: copy(&slave)?, stdout: copy(&slave)?, stderr: slave };
    Ok((AgentEnds { stdin: Some(stdin), stdout, stderr: None }, ends))
}

/// Tells a terminal its size, in characters.
pub(crate) fn resize(terminal: std::os::fd::BorrowedFd<'_>, cols: u16, rows: u16) -> io::Result<()> {
    let size = Winsize { ws_row: rows, ws_col: cols, ws_xpixel: 0, ws_ypixel: 0 };
    Ok(rustix::termios::tcsetwinsize(terminal, size)?)
}
