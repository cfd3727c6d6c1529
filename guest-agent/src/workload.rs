//! The image's main process. The agent owns it, and no connection: hosts come and go, and read what it wrote.
//!
//! ```text
//!   none --workload_start--> running --(its end, outputs drained)--> ended --workload_start--> running ...
//!                               |                                      |
//!                               v                                      v
//!                   Log (the newest 256 KiB) <--read by any number of Followers
//! ```
//! Its outputs are always read, so that it never waits for a host. What a [`Follower`] has not read in time is gone, and the follower says how much
//! that was. Of a run that has ended its log and exit are kept until the next run begins, and by followers that are still reading it.

use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;
use std::time::Instant;

use kiln_wire::control::ControlAck;
use kiln_wire::exit::Exit;
use kiln_wire::failure::Failure;
use kiln_wire::frame::Kind;
use kiln_wire::lost::Lost;
use kiln_wire::request::Request;
use rustix::io::Errno;

use crate::kin::Kin;
use crate::log::Log;
use crate::log::Turn;
use crate::outbox::Outbox;
use crate::poll::OWN;
use crate::poll::Role;
use crate::process::DRAIN_GRACE;
use crate::process::Process;
use crate::process::Sink;
use crate::refusal::Refusal;
use crate::server::Shared;
use crate::sys::process::Reaped;
use crate::sys::signal;

/// How a run ended.
type End = Result<Exit, Failure>;

/// The workload, if there is or was one, and who reads it.
#[derive(Debug, Default)]
pub(crate) struct Workload {
    state: State,
    /// How many runs there have been; the last one has this number.
    runs: u64,
    /// Sessions that are to be told what happens.
    followers: BTreeSet<u32>,
    /// When [`on_timer`] is due.
    timer: Option<Instant>,
}

#[derive(Debug, Default)]
enum State {
    #[default]
    None,
    Running(Box<Running>),
    Ended(Rc<Ended>),
}

/// What is told of every run.
#[derive(Clone, Copy, Debug)]
struct Run {
    number: u64,
    pid: u32,
    began: Instant,
}

#[derive(Debug)]
struct Running {
    run: Run,
    process: Process,
    log: Log,
    /// How long the main process ran, once it has ended.
    ran: Option<Duration>,
}

#[derive(Debug)]
struct Ended {
    run: Run,
    ran: Duration,
    log: Log,
    end: End,
}

/// Starts a run, unless there is one.
pub(crate) fn start(request: &Request, shared: &mut Shared) -> Result<ControlAck, Refusal> {
    if let State::Running(_) = shared.workload.state {
        return Err(Refusal::numbered("a workload is running", Errno::BUSY));
    }
    let mut process = Process::start_workload(request, shared)?;
    let pid = process.pid().and_then(|pid| u32::try_from(pid).ok()).unwrap_or_default();
    if let Err(error) = process.watch(&shared.poll, true) {
        // Nobody would read what it writes.
        if let Some(kin) = process.kin() {
            kin.signal(libc::SIGKILL as u8);
        }
        return Err(Refusal::system("cannot read the workload's output", &error));
    }
    let workload = &mut shared.workload;
    workload.runs += 1;
    let run = Run { number: workload.runs, pid, began: Instant::now() };
    workload.state = State::Running(Box::new(Running { run, process, log: Log::default(), ran: None }));
    Ok(run.ack())
}

/// The main process ended.
pub(crate) fn on_exit(reaped: Reaped, shared: &mut Shared) {
    // Taken out, because the process needs the rest of what is shared.
    match std::mem::take(&mut shared.workload.state) {
        // Not one whose start failed after all, and which was killed.
        State::Running(mut running) if running.process.pid() == Some(reaped.pid) => {
            running.ran = Some(running.run.began.elapsed());
            running.process.on_exit(reaped, OWN, shared);
            running.process.read_outputs(&mut Turn::new(&mut running.log));
            shared.workload.state = State::Running(running);
            set_timer(Some(Instant::now() + DRAIN_GRACE), shared);
        }
        other => shared.workload.state = other,
    }
    settle(shared);
}

/// The time for what others still write to the outputs is over.
pub(crate) fn on_timer(shared: &mut Shared) {
    shared.workload.timer = None;
    if let State::Running(running) = &mut shared.workload.state {
        running.process.end_grace();
        running.process.read_outputs(&mut Turn::new(&mut running.log));
    }
    settle(shared);
}

/// An output has something, or has ended.
pub(crate) fn on_output(role: Role, shared: &mut Shared) {
    if let State::Running(running) = &mut shared.workload.state {
        let index = usize::from(role == Role::Stderr);
        running.process.read_output(index, &mut Turn::new(&mut running.log));
    }
    settle(shared);
}

/// A run whose end is known and whose outputs are read has ended.
fn settle(shared: &mut Shared) {
    let State::Running(running) = &mut shared.workload.state else { return };
    let Some(end) = running.process.end() else { return };
    let (run, ran) = (running.run, running.ran.unwrap_or_default());
    let mut log = std::mem::take(&mut running.log);
    log.seal();
    shared.workload.state = State::Ended(Rc::new(Ended { run, ran, log, end }));
    set_timer(None, shared);
}

fn set_timer(when: Option<Instant>, shared: &mut Shared) {
    shared.timers.replace_session(OWN, shared.workload.timer, when);
    shared.workload.timer = when;
}

impl Workload {
    /// Sends `signum` to the process group, if `run` is the one that runs.
    pub(crate) fn signal(&self, signum: u8, run: Option<u64>) -> Result<ControlAck, Refusal> {
        let running = match &self.state {
            State::Running(running) if run.is_none_or(|run| run == running.run.number) => running,
            _ => return Err(no_such_run()),
        };
        // While the outputs are drained there is no main process any more, and its number may be another's.
        let pid = running.process.pid().ok_or_else(no_such_run)?;
        signal::signal_group(pid, signum)
            .map_err(|error| Refusal::system(&format!("signal {signum} to process {pid}"), &error))?;
        Ok(running.run.ack())
    }

    /// Whom the agent's own end concerns.
    pub(crate) fn kin(&self) -> Option<Kin> {
        match &self.state {
            State::Running(running) => running.process.kin(),
            State::None | State::Ended(_) => None,
        }
    }

    /// The sessions that follow.
    pub(crate) fn followers(&self) -> Vec<u32> {
        self.followers.iter().copied().collect()
    }

    /// Session `id` is over.
    pub(crate) fn unfollow(&mut self, id: u32) {
        self.followers.remove(&id);
    }

    /// Lets session `id` follow `run`, or the last one: its output, without the first `from` bytes, or only its end.
    pub(crate) fn follow(
        &mut self,
        id: u32,
        run: Option<u64>,
        from: Option<u64>,
    ) -> Result<(Follower, ControlAck), Refusal> {
        let (found, log, ran, source) = match &self.state {
            State::None => return Err(no_such_run()),
            State::Running(running) => {
                let ran = running.ran.unwrap_or_else(|| running.run.began.elapsed());
                (running.run, &running.log, ran, Source::Current)
            }
            State::Ended(ended) => (ended.run, &ended.log, ended.ran, Source::Ended(Rc::clone(ended))),
        };
        if run.is_some_and(|run| run != found.number) {
            return Err(no_such_run());
        }
        if from.is_some_and(|from| from > log.end()) {
            return Err(Refusal::numbered(format!("only {} bytes have been written", log.end()), Errno::INVAL));
        }
        self.followers.insert(id);
        let ran_ms = Some(u64::try_from(ran.as_millis()).unwrap_or(u64::MAX));
        Ok((Follower { run: found.number, source, next: from }, ControlAck { ran_ms, ..found.ack() }))
    }
}

impl Run {
    fn ack(&self) -> ControlAck {
        ControlAck { pid: Some(self.pid), run: Some(self.number), ..ControlAck::done() }
    }
}

fn no_such_run() -> Refusal {
    Refusal::numbered("no such workload is running", Errno::SRCH)
}

/// One host's way through a run.
#[derive(Debug)]
pub(crate) struct Follower {
    run: u64,
    source: Source,
    /// The offset of the next byte to send; `None` for a host that waits for the end only.
    next: Option<u64>,
}

/// Where a follower reads.
#[derive(Debug)]
enum Source {
    /// In the workload that there is.
    Current,
    /// In one that has ended, which another may have replaced since.
    Ended(Rc<Ended>),
}

impl Follower {
    /// Queues what there is to send, as far as there is room; the end once everything before it is queued.
    pub(crate) fn send(&mut self, workload: &Workload, outbox: &mut Outbox) -> Option<End> {
        let (log, end) = match (&self.source, &workload.state) {
            (Source::Ended(ended), _) => (&ended.log, Some(&ended.end)),
            (Source::Current, State::Running(running)) if running.run.number == self.run => (&running.log, None),
            (Source::Current, State::Ended(ended)) if ended.run.number == self.run => {
                self.source = Source::Ended(Rc::clone(ended));
                (&ended.log, Some(&ended.end))
            }
            // Not reached: every follower is told of the end before another run can begin.
            (Source::Current, _) => return Some(Err(Failure::Other("the workload was replaced".to_owned()))),
        };
        if let Some(next) = &mut self.next {
            catch_up(next, log, outbox);
        }
        end.filter(|_| self.next.is_none_or(|next| next >= log.end())).cloned()
    }

    /// Whether there is more to send as soon as the host takes it.
    pub(crate) fn is_behind(&self, workload: &Workload) -> bool {
        let log = match (&self.source, &workload.state) {
            (Source::Ended(ended), _) => &ended.log,
            (Source::Current, State::Running(running)) => &running.log,
            (Source::Current, _) => return true,
        };
        self.next.is_some_and(|next| next < log.end())
    }
}

/// Queues what is in `log` from `next` on, as far as there is room.
fn catch_up(next: &mut u64, log: &Log, outbox: &mut Outbox) {
    while outbox.has_room() {
        if let Some(bytes) = log.start().checked_sub(*next).filter(|bytes| *bytes > 0) {
            outbox.push(Kind::Lost, &Lost { bytes }.encode());
            *next = log.start();
        }
        let Some((kind, bytes)) = log.piece(*next) else { return };
        outbox.push(kind, bytes);
        *next += bytes.len() as u64;
    }
}
