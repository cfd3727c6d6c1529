//! A session's process: its standard streams, its chain of commands, its end.

use std::collections::VecDeque;
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use bytes::Bytes;
use kiln_wire::exit::Exit;
use kiln_wire::failure::Failure;
use kiln_wire::frame::Kind;
use kiln_wire::request::Request;
use rustix::event::epoll::EventFlags;

use crate::backlog::Backlog;
use crate::files;
use crate::helper;
use crate::kin::Kin;
use crate::launch;
use crate::launch::AgentEnds;
use crate::launch::Plan;
use crate::launch::ProcessEnds;
use crate::poll::OWN;
use crate::poll::Poll;
use crate::poll::Role;
use crate::poll::Token;
use crate::poll::Watched;
use crate::refusal::Refusal;
use crate::server::Shared;
use crate::sys::process::Reaped;
use crate::sys::signal::kill_group;

/// What a terminal takes for end-of-file (VEOF, control-D).
const END_OF_TRANSMISSION: &[u8] = &[4];

/// How much of a helper's complaint is kept, in bytes (4 KiB: a path and some words).
const MAX_COMPLAINT: usize = 4 << 10;

/// How long after the end of the main process its output is still read while something else (a background child) holds
/// the pipes open. What was written before the end is read whatever that takes.
pub(crate) const DRAIN_GRACE: Duration = Duration::from_millis(100);

/// Where the outputs of a process go.
pub(crate) trait Sink {
    /// Whether more may be read now.
    fn has_room(&self) -> bool;

    /// Reads once from `fd`, which is the output that goes into frames of `kind`; 0 is end-of-file.
    fn fill(&mut self, kind: Kind, fd: BorrowedFd<'_>) -> io::Result<usize>;
}

#[derive(Debug)]
pub(crate) struct Process {
    plan: Plan,
    /// The running command, which leads its process group.
    pid: Option<i32>,
    terminal: bool,
    stdin: Option<Watched>,
    backlog: Backlog,
    stdin_ended: bool,
    outputs: [Option<Output>; 2],
    chain: VecDeque<Vec<String>>,
    /// The other ends of the pipes, kept for the commands of the chain that are still to come.
    ends: Option<ProcessEnds>,
    /// How the session ends, once what was printed before is forwarded.
    exit: Option<Result<Exit, Failure>>,
    grace_over: bool,
    /// What a helper says on its standard error; absent for everything else.
    complaint: Option<Vec<u8>>,
}

#[derive(Debug)]
struct Output {
    fd: Watched,
    /// The frames that it goes into; a helper's complaint goes into none.
    kind: Option<Kind>,
    /// Bytes that the process had written when it ended and that are not forwarded yet.
    owed: usize,
}

/// A task of the agent's own that takes a process, since it may take long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Errand {
    Pack,
    Unpack,
}

impl Process {
    /// Starts what `request` asks for.
    pub(crate) fn start(request: Request, session: u32, shared: &mut Shared) -> Result<Self, Failure> {
        if request.chain.iter().any(Vec::is_empty) {
            return Err(Failure::BadRequest("a command of the chain is empty".to_owned()));
        }
        let plan = Plan::new(&request, &shared.defaults)?;
        for file in &request.stage_files {
            files::write(&file.path, &file.data_b64, file.mode).map_err(|error| error.while_doing("cannot stage"))?;
        }
        let ends = launch::open_ends(&request).map_err(|error| Refusal::system("cannot open pipes", &error))?;
        let mut process = Self::begin(plan, &request.argv, ends, session, shared)?;
        process.terminal = request.tty;
        process.chain = VecDeque::from(request.chain);
        if process.chain.is_empty() {
            process.ends = None;
        }
        Ok(process)
    }

    /// Starts the workload that `request` describes: nothing to read, and its outputs belong to the server itself.
    pub(crate) fn start_workload(request: &Request, shared: &mut Shared) -> Result<Self, Failure> {
        let plan = Plan::new(request, &shared.defaults)?;
        let ends = launch::open_deaf().map_err(|error| Refusal::system("cannot open pipes", &error))?;
        let mut process = Self::begin(plan, &request.argv, ends, OWN, shared)?;
        process.ends = None;
        Ok(process)
    }

    /// Starts a helper, once it is clear that `path` is something that it can work on.
    pub(crate) fn run_errand(errand: Errand, path: &str, session: u32, shared: &mut Shared) -> Result<Self, Refusal> {
        let (flag, ready) = match errand {
            Errand::Pack => (helper::PACK, fs::symlink_metadata(path).map(|_| ())),
            Errand::Unpack => (helper::UNPACK, fs::create_dir_all(path)),
        };
        ready.map_err(|error| Refusal::system(path, &error))?;
        let ends = launch::open_pipes().map_err(|error| Refusal::system("cannot open pipes", &error))?;
        // The program may have no name any more: PID 1 removes its own.
        let argv = ["/proc/self/exe", flag, path].map(str::to_owned);
        let mut process = Self::begin(Plan::own(&shared.defaults), &argv, ends, session, shared)?;
        process.ends = None;
        process.complaint = Some(Vec::new());
        if let [_, Some(stderr)] = &mut process.outputs {
            stderr.kind = None;
        }
        if errand == Errand::Pack {
            process.stdin = None;
        }
        Ok(process)
    }

    fn begin(
        plan: Plan,
        argv: &[String],
        (agent, ends): (AgentEnds, ProcessEnds),
        session: u32,
        shared: &mut Shared,
    ) -> Result<Self, Failure> {
        let pid = plan.start(argv, &ends)?;
        shared.adopt(pid, session);
        let watch = |fd, role| Watched::new(fd, Token { session, role });
        let output = |fd, role, kind| Output { fd: watch(fd, role), kind: Some(kind), owed: 0 };
        Ok(Self {
            plan,
            pid: Some(pid),
            terminal: false,
            stdin: agent.stdin.map(|fd| watch(fd, Role::Stdin)),
            backlog: Backlog::default(),
            stdin_ended: false,
            outputs: [
                Some(output(agent.stdout, Role::Stdout, Kind::Stdout)),
                agent.stderr.map(|fd| output(fd, Role::Stderr, Kind::Stderr)),
            ],
            chain: VecDeque::new(),
            ends: Some(ends),
            exit: None,
            grace_over: false,
            complaint: None,
        })
    }

    /// The running command's id, which is also its group's.
    pub(crate) const fn pid(&self) -> Option<i32> {
        self.pid
    }

    /// Whom the running command's hang-up concerns.
    pub(crate) fn kin(&self) -> Option<Kin> {
        self.pid.map(if self.terminal { Kin::Session } else { Kin::Group })
    }

    /// Whether frames may be read from the host.
    pub(crate) const fn wants_input(&self) -> bool {
        self.backlog.has_room()
    }

    pub(crate) fn on_frame(&mut self, kind: Kind, payload: Bytes) {
        match kind {
            Kind::Stdin if payload.is_empty() => self.end_stdin(),
            Kind::Stdin => self.queue_stdin(payload),
            Kind::Signal => {
                if let (Some(&signal), Some(pid)) = (payload.first(), self.pid) {
                    kill_group(pid, signal);
                }
            }
            Kind::Resize => {
                if let (true, &[a, b, c, d], Some(Some(terminal))) = (self.terminal, &payload[..], self.outputs.first())
                {
                    // A terminal that is gone has no size; the process's end is on its way.
                    let _ = launch::resize(terminal.fd.as_fd(), u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]));
                }
            }
            _ => {}
        }
    }

    /// The running command ended: the next one of the chain runs, or the end of the session is known.
    pub(crate) fn on_exit(&mut self, reaped: Reaped, session: u32, shared: &mut Shared) {
        self.pid = None;
        let next = if reaped.code == 0 { self.chain.pop_front() } else { None };
        let end = match (next, &self.ends) {
            (Some(argv), Some(ends)) => match self.plan.start(&argv, ends) {
                Ok(pid) => {
                    if self.chain.is_empty() {
                        self.ends = None;
                    }
                    self.pid = Some(pid);
                    shared.adopt(pid, session);
                    return;
                }
                Err(failure) => Err(failure),
            },
            _ => Ok(Exit { code: reaped.code, peak_rss_kib: Some(reaped.peak_rss_kib) }),
        };
        self.ends = None;
        self.exit = Some(end);
        for output in self.outputs.iter_mut().flatten() {
            output.owed = usize::try_from(rustix::io::ioctl_fionread(&output.fd).unwrap_or(0)).unwrap_or(0);
        }
    }

    /// The time for what others still write to the outputs is over, if the process has ended.
    pub(crate) const fn end_grace(&mut self) {
        self.grace_over = self.exit.is_some();
    }

    /// How the session ends, once everything is forwarded.
    pub(crate) fn end(&self) -> Option<Result<Exit, Failure>> {
        let end = self.exit.as_ref().filter(|_| self.outputs.iter().all(Option::is_none))?;
        Some(match (end, &self.complaint) {
            (Ok(exit), Some(_)) if exit.code == 0 => Ok(Exit { code: 0, peak_rss_kib: None }),
            (Ok(exit), Some(complaint)) => Err(helper::explain(complaint, exit.code)),
            (end, _) => end.clone(),
        })
    }

    pub(crate) fn read_outputs(&mut self, sink: &mut impl Sink) {
        self.read_output(0, sink);
        self.read_output(1, sink);
    }

    /// Forwards what one output has, once: other sessions get their turn.
    pub(crate) fn read_output(&mut self, index: usize, sink: &mut impl Sink) {
        let (exited, grace_over) = (self.exit.is_some(), self.grace_over);
        let Some(slot) = self.outputs.get_mut(index) else { return };
        while let Some(output) = slot {
            if grace_over && output.owed == 0 {
                *slot = None;
                break;
            }
            let read = match (output.kind, &mut self.complaint) {
                (Some(_), _) if !sink.has_room() => break,
                (Some(kind), _) => sink.fill(kind, output.fd.as_fd()),
                (None, complaint) => collect(complaint.get_or_insert_default(), &output.fd),
            };
            match read {
                Ok(read) if read > 0 => {
                    output.owed = output.owed.saturating_sub(read);
                    // While the process runs one read an event is fair; after its end only what is left is read.
                    if !exited {
                        break;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    output.owed = 0;
                    if !grace_over {
                        break;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // End-of-file; a terminal says EIO when its last user is gone.
                Ok(_) | Err(_) => *slot = None,
            }
        }
    }

    /// Waits for what can be done next.
    pub(crate) fn watch(&mut self, poll: &Poll, has_room: bool) -> io::Result<()> {
        for output in self.outputs.iter_mut().flatten() {
            let wanted = has_room || output.kind.is_none();
            output.fd.want(poll, wanted.then_some(EventFlags::IN))?;
        }
        if let Some(stdin) = &mut self.stdin {
            stdin.want(poll, (!self.backlog.is_empty()).then_some(EventFlags::OUT))?;
        }
        Ok(())
    }

    fn queue_stdin(&mut self, payload: Bytes) {
        if self.stdin.is_some() && !self.stdin_ended {
            self.backlog.push(payload);
            self.write_stdin();
        }
    }

    fn end_stdin(&mut self) {
        if self.terminal {
            self.queue_stdin(Bytes::from_static(END_OF_TRANSMISSION));
        } else {
            self.stdin_ended = true;
            self.write_stdin();
        }
    }

    /// Writes what the process takes; a process that closed its input gets no more, and that is not an error.
    pub(crate) fn write_stdin(&mut self) {
        let Some(stdin) = &self.stdin else { return };
        let written = self.backlog.write_to(stdin.as_fd());
        if written.is_err() || (self.stdin_ended && self.backlog.is_empty()) {
            self.stdin = None;
            self.backlog.clear();
        }
    }
}

/// Reads some of a complaint; what is beyond its limit is read and dropped, so that the helper is not held up.
fn collect(complaint: &mut Vec<u8>, from: &Watched) -> io::Result<usize> {
    let mut piece = [0; 512];
    let read = rustix::io::read(from, &mut piece[..])?;
    let room = MAX_COMPLAINT.saturating_sub(complaint.len());
    complaint.extend_from_slice(&piece[..read.min(room)]);
    Ok(read)
}
