//! One connection: its first frame, its process, and the bytes between them.
//!
//! ```text
//!   Waiting --REQUEST--> Running --(exit, outputs drained)--> Closing --(sent, host closed)--> gone
//!      |  \--CONTROL, or a REQUEST that fails------------------^
//!      \------- host disconnects at any point: the process group is killed -------------------> gone
//! ```
//! Memory is bounded both ways: while [`Outbox`] is full the process's pipes are not read, and while
//! [`STDIN_BACKLOG`] bytes wait for the process's standard input the socket is not read. A SIGNAL behind those bytes waits with them;
//! a host that must kill a process which does not read its input closes the connection, which always works.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;
use std::os::fd::OwnedFd;
use std::time::Duration;
use std::time::Instant;

use bytes::Buf;
use bytes::Bytes;
use bytes::BytesMut;
use kiln_wire::exit::Exit;
use kiln_wire::failure::Failure;
use kiln_wire::frame::Frame;
use kiln_wire::frame::FrameParser;
use kiln_wire::frame::Kind;
use kiln_wire::request::Request;
use rustix::event::epoll::EventFlags;

use crate::control;
use crate::files;
use crate::launch;
use crate::launch::AgentEnds;
use crate::launch::Plan;
use crate::launch::ProcessEnds;
use crate::outbox::Outbox;
use crate::poll::Role;
use crate::poll::Token;
use crate::poll::Watched;
use crate::server::Shared;
use crate::sys::process::Reaped;
use crate::sys::signal::kill_group;

/// Bytes that may wait for a process to read its standard input (128 KiB), beside the pipe itself.
const STDIN_BACKLOG: usize = 128 << 10;

/// How long after the end of the main process its output is still forwarded while something else (a background child) holds
/// the pipes open. What was written before the end is forwarded whatever that takes.
const DRAIN_GRACE: Duration = Duration::from_millis(100);

/// How long a finished session waits for the host to close.
const LINGER: Duration = Duration::from_secs(2);

/// What a terminal takes for end-of-file (VEOF, control-D).
const END_OF_TRANSMISSION: &[u8] = &[4];

/// What becomes of a session after an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    Continues,
    Over,
}

/// A connection.
#[derive(Debug)]
pub(crate) struct Session {
    id: u32,
    socket: Watched,
    parser: FrameParser,
    inbox: BytesMut,
    outbox: Outbox,
    state: State,
    /// When [`Session::on_timer`] is due.
    timer: Option<Instant>,
}

#[derive(Debug)]
enum State {
    Waiting,
    Running(Box<Process>),
    /// The last frame is queued; what the host still sends is discarded. True once all is sent and our direction shut.
    Closing(bool),
}

#[derive(Debug)]
struct Process {
    plan: Plan,
    /// The running command, which leads its process group.
    pid: Option<i32>,
    terminal: bool,
    stdin: Option<Watched>,
    backlog: VecDeque<Bytes>,
    backlog_len: usize,
    stdin_ended: bool,
    outputs: [Option<Output>; 2],
    chain: VecDeque<Vec<String>>,
    /// The other ends of the pipes, kept for the commands of the chain that are still to come.
    ends: Option<ProcessEnds>,
    exit: Option<Exit>,
    grace_over: bool,
}

#[derive(Debug)]
struct Output {
    fd: Watched,
    kind: Kind,
    /// Bytes that the process had written when it ended and that are not forwarded yet.
    owed: usize,
}

impl Session {
    pub(crate) fn new(id: u32, socket: OwnedFd, shared: &Shared) -> io::Result<Self> {
        let mut socket = Watched::new(socket, Token { session: id, role: Role::Socket });
        socket.want(&shared.poll, Some(EventFlags::IN | EventFlags::RDHUP))?;
        let parser = FrameParser::streaming();
        Ok(Self {
            id,
            socket,
            parser,
            inbox: BytesMut::new(),
            outbox: Outbox::default(),
            state: State::Waiting,
            timer: None,
        })
    }

    /// Something is ready, or may be: does all that can be done now.
    pub(crate) fn on_ready(&mut self, role: Role, flags: EventFlags, shared: &mut Shared) -> Fate {
        let worked = match role {
            Role::Socket => self.on_socket(flags, shared),
            Role::Stdin => self.on_stdin(shared),
            Role::Stdout => self.read_output(0),
            Role::Stderr => self.read_output(1),
            Role::Listener | Role::Signals => Ok(()),
        };
        self.settle(worked, shared)
    }

    /// The process `reaped`, which is this session's, ended.
    pub(crate) fn on_exit(&mut self, reaped: Reaped, shared: &mut Shared) -> Fate {
        let State::Running(process) = &mut self.state else {
            return Fate::Continues;
        };
        process.pid = None;
        let next = if reaped.code == 0 { process.chain.pop_front() } else { None };
        let worked = match (next, &process.ends) {
            (Some(argv), Some(ends)) => {
                let started = process.plan.start(&argv, ends);
                if process.chain.is_empty() || started.is_err() {
                    process.ends = None;
                }
                match started {
                    Ok(pid) => {
                        process.pid = Some(pid);
                        shared.children.insert(pid, self.id);
                        Ok(())
                    }
                    Err(failure) => {
                        self.finish(Kind::Error, failure.to_string().as_bytes(), shared);
                        Ok(())
                    }
                }
            }
            _ => {
                process.ends = None;
                process.exit = Some(Exit { code: reaped.code, peak_rss_kib: Some(reaped.peak_rss_kib) });
                for output in process.outputs.iter_mut().flatten() {
                    output.owed = usize::try_from(rustix::io::ioctl_fionread(&output.fd).unwrap_or(0)).unwrap_or(0);
                }
                self.read_output(0).and_then(|()| self.read_output(1))
            }
        };
        let fate = self.settle(worked, shared);
        if fate == Fate::Continues && matches!(self.state, State::Running(_)) {
            self.set_timer(Some(Instant::now() + DRAIN_GRACE), shared);
        }
        fate
    }

    /// The session's timer fired: the drain grace, or the linger, is over.
    pub(crate) fn on_timer(&mut self, shared: &mut Shared) -> Fate {
        self.timer = None;
        match &mut self.state {
            State::Waiting => Fate::Continues,
            State::Closing(_) => Fate::Over,
            State::Running(process) => {
                process.grace_over = process.exit.is_some();
                let worked = self.read_output(0).and_then(|()| self.read_output(1));
                self.settle(worked, shared)
            }
        }
    }

    /// The host is gone, or the agent stops: the process group goes too.
    pub(crate) fn abandon(&self, shared: &mut Shared) {
        if let State::Running(process) = &self.state
            && let Some(pid) = process.pid
        {
            shared.children.remove(&pid);
            shared.hang_up(pid);
        }
    }

    fn on_socket(&mut self, flags: EventFlags, shared: &mut Shared) -> io::Result<()> {
        if flags.contains(EventFlags::OUT) {
            self.outbox.flush(self.socket.as_fd())?;
            self.read_output(0)?;
            self.read_output(1)?;
        }
        if flags.contains(EventFlags::IN) && self.wants_input() {
            match rustix::io::read(&self.socket, &mut shared.scratch[..]) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(read) => {
                    self.inbox.extend_from_slice(&shared.scratch[..read]);
                    self.parse(shared)?;
                }
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        } else if flags.intersects(EventFlags::HUP | EventFlags::RDHUP | EventFlags::ERR) {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        Ok(())
    }

    fn wants_input(&self) -> bool {
        match &self.state {
            State::Running(process) => process.backlog_len < STDIN_BACKLOG,
            State::Waiting | State::Closing(_) => true,
        }
    }

    fn parse(&mut self, shared: &mut Shared) -> io::Result<()> {
        while self.wants_input() {
            if matches!(self.state, State::Closing(_)) {
                self.inbox.clear();
                return Ok(());
            }
            match self.parser.parse(&mut self.inbox)? {
                Some(frame) => self.on_frame(frame, shared),
                None => break,
            }
        }
        if self.inbox.is_empty() {
            self.inbox = BytesMut::new();
        }
        Ok(())
    }

    fn on_frame(&mut self, Frame { kind, payload }: Frame, shared: &mut Shared) {
        match (&mut self.state, kind) {
            (State::Waiting, Kind::Request) => match self.start(&payload, shared) {
                Ok(process) => self.state = State::Running(Box::new(process)),
                Err(failure) => self.finish(Kind::Error, failure.to_string().as_bytes(), shared),
            },
            (State::Waiting, Kind::Control) => {
                let ack = control::serve(&payload);
                let json = serde_json::to_vec(&ack).unwrap_or_default();
                self.finish(Kind::Control, &json, shared);
            }
            (State::Waiting, _) => {
                let failure = Failure::BadRequest("the first frame is neither REQUEST nor CONTROL".to_owned());
                self.finish(Kind::Error, failure.to_string().as_bytes(), shared);
            }
            (State::Running(process), kind) => process.on_frame(kind, payload),
            (State::Closing(_), _) => {}
        }
    }

    fn start(&self, payload: &[u8], shared: &mut Shared) -> Result<Process, Failure> {
        let request: Request =
            serde_json::from_slice(payload).map_err(|error| Failure::BadRequest(format!("REQUEST: {error}")))?;
        if request.chain.iter().any(Vec::is_empty) {
            return Err(Failure::BadRequest("a command of the chain is empty".to_owned()));
        }
        let plan = Plan::new(&request, &shared.defaults)?;
        for file in &request.stage_files {
            files::write(&file.path, &file.data_b64, file.mode)
                .map_err(|error| Failure::Other(format!("cannot stage {error}")))?;
        }
        let (AgentEnds { stdin, stdout, stderr }, ends) = launch::open_ends(&request)
            .map_err(|error| Failure::Other(format!("cannot open pipes: {}", launch::reason(&error))))?;
        let pid = plan.start(&request.argv, &ends)?;
        shared.children.insert(pid, self.id);
        let watch = |fd, role| Watched::new(fd, Token { session: self.id, role });
        let output = |fd, role, kind| Output { fd: watch(fd, role), kind, owed: 0 };
        let chain = VecDeque::from(request.chain);
        Ok(Process {
            plan,
            pid: Some(pid),
            terminal: request.tty,
            stdin: Some(watch(stdin, Role::Stdin)),
            backlog: VecDeque::new(),
            backlog_len: 0,
            stdin_ended: false,
            outputs: [
                Some(output(stdout, Role::Stdout, Kind::Stdout)),
                stderr.map(|fd| output(fd, Role::Stderr, Kind::Stderr)),
            ],
            ends: (!chain.is_empty()).then_some(ends),
            chain,
            exit: None,
            grace_over: false,
        })
    }

    fn on_stdin(&mut self, shared: &mut Shared) -> io::Result<()> {
        if let State::Running(process) = &mut self.state {
            process.write_stdin();
        }
        // Room for frames that were held back.
        self.parse(shared)
    }

    /// Forwards what one output has, once: other sessions get their turn.
    fn read_output(&mut self, index: usize) -> io::Result<()> {
        let State::Running(process) = &mut self.state else {
            return Ok(());
        };
        let (exited, grace_over) = (process.exit.is_some(), process.grace_over);
        let Some(slot) = process.outputs.get_mut(index) else {
            return Ok(());
        };
        while let Some(output) = slot {
            if grace_over && output.owed == 0 {
                *slot = None;
                break;
            }
            if !self.outbox.has_room() {
                break;
            }
            match self.outbox.fill(output.kind, output.fd.as_fd()) {
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
                // End-of-file; a terminal says EIO when its last user is gone.
                Ok(_) | Err(_) => *slot = None,
            }
        }
        self.outbox.flush(self.socket.as_fd())
    }

    fn finish(&mut self, kind: Kind, payload: &[u8], shared: &mut Shared) {
        self.outbox.push(kind, payload);
        self.state = State::Closing(false);
        self.inbox.clear();
        // A slow host may take longer to read the output than the drain grace.
        self.set_timer(None, shared);
    }

    /// Replaces the session's timer; an idle guest is not woken for one that has lost its purpose.
    pub(crate) fn set_timer(&mut self, when: Option<Instant>, shared: &mut Shared) {
        shared.timers.replace_session(self.id, self.timer, when);
        self.timer = when;
    }

    /// Brings the session to rest after an event: last frame, socket, and what to wait for next.
    fn settle(&mut self, worked: io::Result<()>, shared: &mut Shared) -> Fate {
        if worked.is_err() {
            self.abandon(shared);
            return Fate::Over;
        }
        if let State::Running(process) = &mut self.state
            && let Some(exit) = process.exit
            && process.outputs.iter().all(Option::is_none)
        {
            self.finish(Kind::Exit, &exit.encode(), shared);
        }
        if self.outbox.flush(self.socket.as_fd()).is_err() {
            self.abandon(shared);
            return Fate::Over;
        }
        if let State::Closing(shut @ false) = &mut self.state
            && self.outbox.is_empty()
        {
            *shut = true;
            self.set_timer(Some(Instant::now() + LINGER), shared);
            if rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Write).is_err() {
                return Fate::Over;
            }
        }
        match self.update_interests(shared) {
            Ok(()) => Fate::Continues,
            Err(_) => {
                self.abandon(shared);
                Fate::Over
            }
        }
    }

    fn update_interests(&mut self, shared: &Shared) -> io::Result<()> {
        let mut socket = EventFlags::RDHUP;
        socket.set(EventFlags::IN, self.wants_input());
        socket.set(EventFlags::OUT, !self.outbox.is_empty());
        self.socket.want(&shared.poll, Some(socket))?;
        let has_room = self.outbox.has_room();
        if let State::Running(process) = &mut self.state {
            for output in process.outputs.iter_mut().flatten() {
                output.fd.want(&shared.poll, has_room.then_some(EventFlags::IN))?;
            }
            if let Some(stdin) = &mut process.stdin {
                let waiting = !process.backlog.is_empty();
                stdin.want(&shared.poll, waiting.then_some(EventFlags::OUT))?;
            }
        }
        Ok(())
    }
}

impl Process {
    fn on_frame(&mut self, kind: Kind, payload: Bytes) {
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

    fn queue_stdin(&mut self, payload: Bytes) {
        if self.stdin.is_some() && !self.stdin_ended {
            self.backlog_len += payload.len();
            self.backlog.push_back(payload);
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
    fn write_stdin(&mut self) {
        while let (Some(stdin), Some(front)) = (&self.stdin, self.backlog.front_mut()) {
            match rustix::io::write(stdin, front) {
                Ok(written) => {
                    self.backlog_len -= written;
                    front.advance(written);
                    if front.is_empty() {
                        self.backlog.pop_front();
                    }
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => return,
                Err(_) => self.stdin = None,
            }
        }
        if self.stdin_ended {
            self.stdin = None;
        }
        if self.stdin.is_none() {
            self.backlog.clear();
            self.backlog_len = 0;
        }
    }
}
