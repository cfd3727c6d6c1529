//! One connection: its first frame, what that opened, and the bytes between the two.
//!
//! ```text
//!   Waiting --REQUEST, pack, unpack--> Running --(exit, outputs drained)--> Closing --(sent, host closed)--> gone
//!      |  \--open_read, open_write, connect--> Relaying --(its end)-----------^
//!      |  \--workload_logs, workload_wait--> Following --(the workload's end)-^
//!      |   \--any other CONTROL, or what fails to open------------------------^
//!      \------- host disconnects at any point: the process group is killed -----------------------------> gone
//! ```
//! Memory is bounded both ways: while [`Outbox`] is full the process's pipes (or the file, or the TCP connection) are not read, and
//! while a [`crate::backlog::Backlog`] is full the host's socket is not. A SIGNAL behind those bytes waits with them;
//! a host that must kill a process which does not read its input closes the connection, which always works.

use std::io;
use std::os::fd::AsFd;
use std::os::fd::OwnedFd;
use std::time::Duration;
use std::time::Instant;

use bytes::BytesMut;
use kiln_wire::control::Control;
use kiln_wire::control::ControlAck;
use kiln_wire::exit::Exit;
use kiln_wire::failure::Failure;
use kiln_wire::frame::Frame;
use kiln_wire::frame::FrameParser;
use kiln_wire::frame::Kind;
use kiln_wire::request::Request;
use kiln_wire::started::Started;
use rustix::event::epoll::EventFlags;

use crate::control;
use crate::outbox::Outbox;
use crate::poll::Role;
use crate::poll::Token;
use crate::poll::Watched;
use crate::process::DRAIN_GRACE;
use crate::process::Errand;
use crate::process::Process;
use crate::process::Sink;
use crate::refusal::Refusal;
use crate::relay::Download;
use crate::relay::Relay;
use crate::relay::Step;
use crate::relay::Upload;
use crate::server::Shared;
use crate::sys::process::Reaped;
use crate::tcp::Tcp;
use crate::workload::Follower;

/// How long a finished session waits for the host to close.
const LINGER: Duration = Duration::from_secs(2);

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
    Relaying(Box<Relay>),
    Following(Follower),
    /// The last frame is queued; what the host still sends is discarded. True once all is sent and our direction shut.
    Closing(bool),
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
        let worked = match (role, &mut self.state) {
            (Role::Socket, _) => self.on_socket(flags, shared),
            (Role::Stdin, State::Running(process)) => {
                process.write_stdin();
                // Room for frames that were held back.
                self.parse(shared)
            }
            (Role::Stdout, State::Running(process)) => {
                process.read_output(0, &mut self.outbox);
                Ok(())
            }
            (Role::Stderr, State::Running(process)) => {
                process.read_output(1, &mut self.outbox);
                Ok(())
            }
            (Role::Peer, State::Relaying(relay)) => {
                let step = relay.on_peer(flags, &mut self.outbox);
                self.follow(step, shared);
                // Room for frames that were held back, until now or until the connection is there.
                self.parse(shared)
            }
            _ => Ok(()),
        };
        self.settle(worked, shared)
    }

    /// The process `reaped`, which is this session's, ended.
    pub(crate) fn on_exit(&mut self, reaped: Reaped, shared: &mut Shared) -> Fate {
        let State::Running(process) = &mut self.state else {
            return Fate::Continues;
        };
        process.on_exit(reaped, self.id, shared);
        process.read_outputs(&mut self.outbox);
        let fate = self.settle(Ok(()), shared);
        if fate == Fate::Continues && matches!(self.state, State::Running(_)) {
            self.set_timer(Some(Instant::now() + DRAIN_GRACE), shared);
        }
        fate
    }

    /// The session's timer fired: the drain grace, or the linger, is over.
    pub(crate) fn on_timer(&mut self, shared: &mut Shared) -> Fate {
        self.timer = None;
        match &mut self.state {
            State::Waiting | State::Relaying(_) | State::Following(_) => Fate::Continues,
            State::Closing(_) => Fate::Over,
            State::Running(process) => {
                process.end_grace();
                process.read_outputs(&mut self.outbox);
                self.settle(Ok(()), shared)
            }
        }
    }

    /// The host is gone, or the agent stops: the process group goes too, and on a terminal every job.
    pub(crate) fn abandon(&self, shared: &mut Shared) {
        if let State::Running(process) = &self.state
            && let Some(kin) = process.kin()
        {
            shared.children.remove(&kin.leader());
            shared.hang_up(kin);
        }
    }

    fn on_socket(&mut self, flags: EventFlags, shared: &mut Shared) -> io::Result<()> {
        if flags.contains(EventFlags::OUT) {
            self.outbox.flush(self.socket.as_fd())?;
            match &mut self.state {
                State::Running(process) => process.read_outputs(&mut self.outbox),
                State::Relaying(relay) => {
                    let step = relay.on_turn(&mut self.outbox);
                    self.follow(step, shared);
                }
                State::Following(_) => self.follow_workload(shared),
                State::Waiting | State::Closing(_) => {}
            }
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
            State::Running(process) => process.wants_input(),
            State::Relaying(relay) => relay.wants_input(),
            State::Waiting | State::Following(_) | State::Closing(_) => true,
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
            (State::Waiting, Kind::Request) => {
                if let Err(failure) = self.start(&payload, shared) {
                    self.fail(&failure, shared);
                }
            }
            (State::Waiting, Kind::Control) => {
                if let Err(refusal) = self.control(&payload, shared) {
                    self.answer(&refusal.into(), shared);
                }
            }
            (State::Waiting, _) => {
                let failure = Failure::BadRequest("the first frame is neither REQUEST nor CONTROL".to_owned());
                self.fail(&failure, shared);
            }
            (State::Running(process), kind) => process.on_frame(kind, payload),
            (State::Relaying(relay), kind) => {
                let step = relay.on_frame(kind, payload);
                self.follow(step, shared);
            }
            (State::Following(_) | State::Closing(_), _) => {}
        }
    }

    fn start(&mut self, payload: &[u8], shared: &mut Shared) -> Result<(), Failure> {
        let request: Request =
            serde_json::from_slice(payload).map_err(|error| Failure::BadRequest(format!("REQUEST: {error}")))?;
        let announce = request.started;
        let process = Process::start(request, self.id, shared)?;
        if let Some(pid) = process.pid().and_then(|pid| u32::try_from(pid).ok()).filter(|_| announce) {
            self.outbox.push(Kind::Started, &Started { pid }.encode());
        }
        self.state = State::Running(Box::new(process));
        Ok(())
    }

    fn control(&mut self, payload: &[u8], shared: &mut Shared) -> Result<(), Refusal> {
        let action =
            serde_json::from_slice(payload).map_err(|error| Refusal::new(format!("malformed CONTROL: {error}")))?;
        match action {
            Control::Pack { path } => self.run_errand(Errand::Pack, &path, shared)?,
            Control::Unpack { path } => self.run_errand(Errand::Unpack, &path, shared)?,
            Control::OpenRead { path } => {
                let (download, ack) = Download::open(path)?;
                self.relay(Relay::Download(download), Some(&ack));
            }
            Control::OpenWrite { path, mode } => {
                let upload = Upload::open(path, mode)?;
                self.relay(Relay::Upload(upload), Some(&ControlAck::done()));
            }
            // The answer comes when the connection is there, or is not.
            Control::Connect { port } => self.relay(Relay::Tcp(Tcp::dial(self.id, port)?), None),
            Control::WorkloadLogs { run, from } => self.start_following(run, Some(from.unwrap_or(0)), shared)?,
            Control::WorkloadWait { run } => self.start_following(run, None, shared)?,
            action => {
                let ack = control::act(action, shared)?;
                self.answer(&ack, shared);
            }
        }
        Ok(())
    }

    fn run_errand(&mut self, errand: Errand, path: &str, shared: &mut Shared) -> Result<(), Refusal> {
        let process = Process::run_errand(errand, path, self.id, shared)?;
        self.acknowledge(&ControlAck::done());
        self.state = State::Running(Box::new(process));
        Ok(())
    }

    fn start_following(&mut self, run: Option<u64>, from: Option<u64>, shared: &mut Shared) -> Result<(), Refusal> {
        let (follower, ack) = shared.workload.follow(self.id, run, from)?;
        self.acknowledge(&ack);
        self.state = State::Following(follower);
        self.follow_workload(shared);
        Ok(())
    }

    /// The workload did something.
    pub(crate) fn on_workload(&mut self, shared: &mut Shared) -> Fate {
        self.follow_workload(shared);
        self.settle(Ok(()), shared)
    }

    fn follow_workload(&mut self, shared: &mut Shared) {
        let State::Following(follower) = &mut self.state else { return };
        match follower.send(&shared.workload, &mut self.outbox) {
            None => {}
            Some(Ok(exit)) => self.finish(Kind::Exit, &exit.encode(), shared),
            Some(Err(failure)) => self.fail(&failure, shared),
        }
    }

    fn relay(&mut self, relay: Relay, ack: Option<&ControlAck>) {
        if let Some(ack) = ack {
            self.acknowledge(ack);
        }
        self.state = State::Relaying(Box::new(relay));
    }

    /// Acts on what a stream has come to.
    fn follow(&mut self, step: Step, shared: &mut Shared) {
        match step {
            Step::Continues => {}
            Step::Opened => self.acknowledge(&ControlAck::done()),
            Step::Refused(refusal) => self.answer(&refusal.into(), shared),
            Step::Over => self.finish(Kind::Exit, &Exit { code: 0, peak_rss_kib: None }.encode(), shared),
            Step::Failed(failure) => self.fail(&failure, shared),
        }
    }

    fn acknowledge(&mut self, ack: &ControlAck) {
        self.outbox.push(Kind::Control, &serde_json::to_vec(ack).unwrap_or_default());
    }

    /// Queues the only answer that there will be.
    fn answer(&mut self, ack: &ControlAck, shared: &mut Shared) {
        self.finish(Kind::Control, &serde_json::to_vec(ack).unwrap_or_default(), shared);
    }

    fn fail(&mut self, failure: &Failure, shared: &mut Shared) {
        self.finish(Kind::Error, failure.to_string().as_bytes(), shared);
    }

    /// Queues the last frame.
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
        if let State::Running(process) = &self.state
            && let Some(end) = process.end()
        {
            match end {
                Ok(exit) => self.finish(Kind::Exit, &exit.encode(), shared),
                Err(failure) => self.fail(&failure, shared),
            }
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
        let wants_turn = match &self.state {
            State::Relaying(relay) => relay.wants_turn(),
            State::Following(follower) => follower.is_behind(&shared.workload),
            State::Waiting | State::Running(_) | State::Closing(_) => false,
        };
        let mut socket = EventFlags::RDHUP;
        socket.set(EventFlags::IN, self.wants_input());
        socket.set(EventFlags::OUT, wants_turn || !self.outbox.is_empty());
        self.socket.want(&shared.poll, Some(socket))?;
        let has_room = self.outbox.has_room();
        match &mut self.state {
            State::Running(process) => process.watch(&shared.poll, has_room),
            State::Relaying(relay) => relay.watch(&shared.poll, has_room),
            State::Waiting | State::Following(_) | State::Closing(_) => Ok(()),
        }
    }
}
