//! The event loop: accepts connections, routes readiness to sessions, reaps children, keeps time.
//!
//! One thread and no locks, so that a child never inherits a lock that nobody will release.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::io;
use std::os::fd::AsFd;
use std::os::fd::OwnedFd;
use std::time::Duration;
use std::time::Instant;

use rustix::event::epoll::EventFlags;
use rustix::net::SocketFlags;

use crate::kin::Kin;
use crate::launch::Defaults;
use crate::poll::OWN;
use crate::poll::Poll;
use crate::poll::Ready;
use crate::poll::Role;
use crate::poll::Token;
use crate::poll::Watched;
use crate::session::Fate;
use crate::session::Session;
use crate::sys::process;
use crate::sys::signal;
use crate::uploads::Uploads;
use crate::workload;
use crate::workload::Workload;

/// Sessions open at once; further connections wait in the listener's queue.
const MAX_SESSIONS: usize = 2048;

/// Bytes taken from a socket at once (64 KiB).
const SCRATCH: usize = 64 << 10;

/// Between SIGHUP and SIGKILL for the process group of a host that disconnected.
const HANG_UP_GRACE: Duration = Duration::from_millis(500);

/// How long to leave the listener alone after the system refused a connection for want of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Timer {
    Session(u32),
    Kill(Kin),
    Accept,
}

/// What is to happen when.
#[derive(Debug, Default)]
pub(crate) struct Timers {
    queue: BTreeSet<(Instant, Timer)>,
}

impl Timers {
    /// Wakes session `id` at `new` instead of `old`.
    pub(crate) fn replace_session(&mut self, id: u32, old: Option<Instant>, new: Option<Instant>) {
        if let Some(old) = old {
            self.queue.remove(&(old, Timer::Session(id)));
        }
        self.queue.extend(new.map(|when| (when, Timer::Session(id))));
    }

    /// What process `leader` led needs no killing any more, if `gone` agrees.
    fn spare(&mut self, leader: i32, gone: impl Fn(Kin) -> bool) {
        self.queue.retain(|(_, timer)| match timer {
            Timer::Kill(kin) if kin.leader() == leader => !gone(*kin),
            _ => true,
        });
    }

    fn next(&self) -> Option<Instant> {
        self.queue.first().map(|(when, _)| *when)
    }

    fn pop_due(&mut self, now: Instant) -> Option<Timer> {
        let &(when, timer) = self.queue.first()?;
        (when <= now).then(|| {
            self.queue.pop_first();
            timer
        })
    }
}

/// What all sessions use.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) poll: Poll,
    pub(crate) defaults: Defaults,
    /// Which session each running process belongs to.
    pub(crate) children: BTreeMap<i32, u32>,
    pub(crate) timers: Timers,
    pub(crate) uploads: Uploads,
    pub(crate) workload: Workload,
    /// Whether the agent is the first process of a guest, whose clock and names are its to set.
    pub(crate) owns_machine: bool,
    pub(crate) scratch: Box<[u8]>,
}

impl Shared {
    /// Process `pid` has been started for `session`.
    pub(crate) fn adopt(&mut self, pid: i32, session: u32) {
        // Should the number have belonged to a group that hung up, it is another's now.
        self.timers.spare(pid, |_| true);
        self.children.insert(pid, session);
    }

    /// SIGHUP for `kin` now, SIGKILL for what is left of it after a grace.
    ///
    /// The number cannot name another group by then, save in one unlikely case: it stays taken while the group or session has a process or
    /// its leader is not reaped; the agent withdraws the SIGKILL when it reaps the leader of a group that is otherwise
    /// gone, and when it starts a process of that number itself. What is left are processes of the group that outlive their leader and
    /// all end within the grace, while the system's counter of numbers goes round once.
    pub(crate) fn hang_up(&mut self, kin: Kin) {
        kin.signal(libc::SIGHUP as u8);
        // A stopped process would not act on the signal.
        kin.signal(libc::SIGCONT as u8);
        self.timers.queue.insert((Instant::now() + HANG_UP_GRACE, Timer::Kill(kin)));
    }
}

/// The server of one listening socket.
#[derive(Debug)]
pub(crate) struct Server {
    shared: Shared,
    listener: Watched,
    signals: Watched,
    sessions: BTreeMap<u32, Session>,
    next_id: u32,
    stopping: bool,
}

impl Server {
    /// Serves `listener`, which must not block, as the first process of a guest if it `owns_machine`. Blocks SIGCHLD, and
    /// SIGTERM and SIGINT elsewhere, where they stop it, for good.
    pub(crate) fn new(listener: OwnedFd, defaults: Defaults, owns_machine: bool) -> io::Result<Self> {
        signal::ignore_sigpipe();
        let watched: &[i32] =
            if owns_machine { &[libc::SIGCHLD] } else { &[libc::SIGCHLD, libc::SIGTERM, libc::SIGINT] };
        let signals = signal::signal_fd(watched)?;
        let poll = Poll::new()?;
        let mut listener = Watched::new(listener, Token { session: OWN, role: Role::Listener });
        let mut signals = Watched::new(signals, Token { session: OWN, role: Role::Signals });
        listener.want(&poll, Some(EventFlags::IN))?;
        signals.want(&poll, Some(EventFlags::IN))?;
        let scratch = vec![0; SCRATCH].into_boxed_slice();
        let (children, timers, uploads) = (BTreeMap::new(), Timers::default(), Uploads::default());
        let workload = Workload::default();
        let shared = Shared { poll, defaults, children, timers, uploads, workload, owns_machine, scratch };
        Ok(Self { shared, listener, signals, sessions: BTreeMap::new(), next_id: 1, stopping: false })
    }

    /// Serves until a stop signal; then every process group is killed.
    pub(crate) fn run(mut self) -> io::Result<()> {
        let mut ready = Vec::new();
        while !self.stopping {
            let timeout = self.shared.timers.next().map(|when| when.saturating_duration_since(Instant::now()));
            self.shared.poll.wait(timeout, &mut ready)?;
            for event in ready.drain(..) {
                self.dispatch(event)?;
            }
            self.fire_timers()?;
        }
        self.stop();
        Ok(())
    }

    fn dispatch(&mut self, Ready { token, flags }: Ready) -> io::Result<()> {
        match token.role {
            Role::Listener => self.accept(),
            Role::Signals => {
                self.on_signals();
                Ok(())
            }
            role if token.session == OWN => {
                workload::on_output(role, &mut self.shared);
                self.tell_followers();
                Ok(())
            }
            role => {
                let id = token.session;
                if let Some(session) = self.sessions.get_mut(&id) {
                    let fate = session.on_ready(role, flags, &mut self.shared);
                    self.conclude(id, fate);
                }
                Ok(())
            }
        }
    }

    fn conclude(&mut self, id: u32, fate: Fate) {
        if fate == Fate::Over
            && let Some(mut session) = self.sessions.remove(&id)
        {
            session.set_timer(None, &mut self.shared);
            self.shared.workload.unfollow(id);
        }
    }

    /// The workload did something that those who follow it may want to send on.
    fn tell_followers(&mut self) {
        for id in self.shared.workload.followers() {
            if let Some(session) = self.sessions.get_mut(&id) {
                let fate = session.on_workload(&mut self.shared);
                self.conclude(id, fate);
            }
        }
    }

    fn accept(&mut self) -> io::Result<()> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        while self.sessions.len() < MAX_SESSIONS {
            match rustix::net::accept_with(&self.listener, flags) {
                Ok(socket) => {
                    let id = self.next_id;
                    self.next_id = self.next_id.wrapping_add(1).max(1);
                    // Without a place in the queue the connection cannot be served; the host sees it close.
                    if let Ok(session) = Session::new(id, socket, &self.shared) {
                        self.sessions.insert(id, session);
                    }
                }
                Err(rustix::io::Errno::AGAIN) => return Ok(()),
                Err(rustix::io::Errno::INTR | rustix::io::Errno::CONNABORTED) => {}
                Err(_) => break,
            }
        }
        // Full: asking again at once would only spin.
        self.listener.want(&self.shared.poll, None)?;
        self.shared.timers.queue.insert((Instant::now() + ACCEPT_PAUSE, Timer::Accept));
        Ok(())
    }

    fn on_signals(&mut self) {
        while let Some(number) = signal::next_signal(self.signals.as_fd()) {
            if number != libc::SIGCHLD {
                self.stopping = true;
            }
        }
        // One SIGCHLD may stand for many ends.
        while let Some(reaped) = process::reap() {
            let session = self.shared.children.remove(&reaped.pid);
            if session.is_none() {
                self.shared.timers.spare(reaped.pid, |kin| !kin.exists());
            }
            if session == Some(OWN) {
                workload::on_exit(reaped, &mut self.shared);
                self.tell_followers();
            }
            if let Some(id) = session
                && let Some(session) = self.sessions.get_mut(&id)
            {
                let fate = session.on_exit(reaped, &mut self.shared);
                self.conclude(id, fate);
            }
        }
    }

    fn fire_timers(&mut self) -> io::Result<()> {
        let now = Instant::now();
        while let Some(timer) = self.shared.timers.pop_due(now) {
            match timer {
                Timer::Kill(kin) => kin.signal(libc::SIGKILL as u8),
                Timer::Accept => self.listener.want(&self.shared.poll, Some(EventFlags::IN))?,
                Timer::Session(OWN) => {
                    workload::on_timer(&mut self.shared);
                    self.tell_followers();
                }
                Timer::Session(id) => {
                    if let Some(session) = self.sessions.get_mut(&id) {
                        let fate = session.on_timer(&mut self.shared);
                        self.conclude(id, fate);
                    }
                }
            }
        }
        Ok(())
    }

    fn stop(&mut self) {
        for session in self.sessions.values() {
            session.abandon(&mut self.shared);
        }
        if let Some(kin) = self.shared.workload.kin() {
            self.shared.hang_up(kin);
        }
        for (_, timer) in std::mem::take(&mut self.shared.timers.queue) {
            if let Timer::Kill(kin) = timer {
                kin.signal(libc::SIGKILL as u8);
            }
        }
    }
}
