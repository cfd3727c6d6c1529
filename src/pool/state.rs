//! What a pool knows, and its rules. Nothing here waits, and nothing here runs anything.
//!
//! ```text
//!              start          hand out
//!   (starting) ────> (idle) ──────────> (in use) ── detach ──> gone
//!                      │  ^────fresh──────┘ │
//!                      └──> (stopping) <────┘ used, or ended
//! ```

use std::collections::BTreeMap;
use std::collections::HashMap;
use std::collections::VecDeque;

use futures::future::BoxFuture;
use tokio::sync::oneshot;
use tokio::time::Instant;
use tokio_util::sync::DropGuard;

use super::backoff::Backoff;
use super::core::Resource;
use super::core::Settings;
use super::lease::Answer;
use super::stats::PoolStats;

/// Where a pool is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// It serves.
    Open,
    /// It stops what it has, and what is in use too if somebody waits for that.
    Closing { users: bool },
    /// Its driver is gone.
    Closed,
}

/// How a resource comes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Return {
    /// Its user never had it.
    Fresh,
    /// Its user is done with it.
    Used,
    /// Its user says that nobody shall have it again.
    Discarded,
}

/// A resource that waits for a user.
pub(super) struct Idle<R> {
    pub(super) resource: R,
    /// Added by the driver, as soon as it sees the resource.
    pub(super) watch: Option<Watch>,
}

/// The driver's eye on an idle resource.
pub(super) struct Watch {
    pub(super) number: u64,
    pub(super) since: Instant,
    /// Ends the watching.
    pub(super) _guard: DropGuard,
}

/// The state of a pool.
pub(super) struct State<R: Resource> {
    pub(super) settings: Settings,
    pub(super) phase: Phase,
    /// To be told when the first ones are there.
    pub(super) built: Option<oneshot::Sender<Result<(), R::Error>>>,
    /// The one that was used the longest ago first; the last is handed out, so that those beyond `min` stay idle.
    pub(super) idle: VecDeque<Idle<R>>,
    /// How to stop each that is out, should its user not give it back.
    pub(super) in_use: HashMap<u64, BoxFuture<'static, ()>>,
    /// By ticket, that is, in the order of their coming.
    pub(super) waiters: BTreeMap<u64, oneshot::Sender<Answer<R>>>,
    pub(super) starting: usize,
    /// For the driver to be stopped; counted in `stopping` already.
    pub(super) to_stop: Vec<R>,
    pub(super) stopping: usize,
    /// A start has succeeded.
    pub(super) proven: bool,
    pub(super) backoff: Backoff,
    pub(super) counts: PoolStats,
    numbers: u64,
}

impl<R: Resource> State<R> {
    pub(super) fn new(settings: Settings, built: oneshot::Sender<Result<(), R::Error>>) -> Self {
        Self {
            settings,
            phase: Phase::Open,
            built: Some(built),
            idle: VecDeque::new(),
            in_use: HashMap::new(),
            waiters: BTreeMap::new(),
            starting: 0,
            to_stop: Vec::new(),
            stopping: 0,
            proven: false,
            backoff: Backoff::default(),
            counts: PoolStats::default(),
            numbers: 0,
        }
    }

    /// A number that was not given before.
    pub(super) fn number(&mut self) -> u64 {
        self.numbers += 1;
        self.numbers
    }

    pub(super) fn stats(&self) -> PoolStats {
        PoolStats {
            idle: self.idle.len(),
            starting: self.starting,
            in_use: self.in_use.len(),
            stopping: self.stopping,
            waiting: self.waiters.len(),
            ..self.counts
        }
    }

    /// Those that serve or will.
    pub(super) fn live(&self) -> usize {
        self.idle.len() + self.in_use.len() + self.starting
    }

    /// How many starts are missing.
    pub(super) fn missing(&self, now: Instant) -> usize {
        if self.phase != Phase::Open {
            return 0;
        }
        let Settings { min, max, parallel, .. } = self.settings;
        let for_waiters = self.waiters.len().saturating_sub(self.starting);
        // The first prepares what the others then find.
        let at_once = if self.proven { parallel } else { 1 };
        let short = min.saturating_sub(self.live()).min(at_once.saturating_sub(self.starting));
        let for_min = if self.backoff.rests_until(now).is_some() { 0 } else { short };
        for_waiters.max(for_min).min(max.saturating_sub(self.live() + self.stopping))
    }

    /// When the first of the idle ones beyond `min` has been idle for too long.
    pub(super) fn expiry(&self) -> Option<Instant> {
        let oldest = self.idle.front()?.watch.as_ref()?;
        (self.live() > self.settings.min).then(|| oldest.since.checked_add(self.settings.idle_timeout))?
    }

    /// Takes the idle one that was used last; those that have ended go.
    pub(super) fn take_idle(&mut self) -> Option<R> {
        while let Some(Idle { resource, .. }) = self.idle.pop_back() {
            if !resource.has_ended() {
                return Some(resource);
            }
            self.crashed(resource);
        }
        None
    }

    /// Notes that `resource` is out.
    pub(super) fn lend(&mut self, resource: &R) -> u64 {
        let id = self.number();
        self.in_use.insert(id, resource.stop());
        id
    }

    /// Notes that what was lent as `id` is the pool's no more.
    pub(super) fn forget(&mut self, id: u64) {
        self.in_use.remove(&id);
    }

    /// Takes back what was lent as `id`; returned when it is the caller's to drop.
    pub(super) fn give_back(&mut self, id: u64, resource: R, condition: Return) -> Option<R> {
        // Without an entry its user kept it beyond the grace: it is being stopped.
        let known = self.in_use.remove(&id).is_some();
        if !known || self.phase == Phase::Closed {
            return Some(resource);
        }
        let fit = match condition {
            Return::Fresh => true,
            Return::Used => self.settings.reuse,
            Return::Discarded => false,
        };
        if resource.has_ended() {
            self.crashed(resource);
        } else if fit && self.phase == Phase::Open {
            self.idle.push_back(Idle { resource, watch: None });
        } else {
            self.counts.discarded += u64::from(condition != Return::Fresh);
            self.retire(resource);
        }
        None
    }

    /// Takes the last place in the queue.
    pub(super) fn queue(&mut self, waiter: oneshot::Sender<Answer<R>>) -> u64 {
        let ticket = self.number();
        self.waiters.insert(ticket, waiter);
        ticket
    }

    /// `resource` ended by itself.
    pub(super) fn crashed(&mut self, resource: R) {
        self.counts.crashed += 1;
        self.retire(resource);
    }

    /// Leaves `resource` to the driver to be stopped.
    pub(super) fn retire(&mut self, resource: R) {
        self.stopping += 1;
        self.to_stop.push(resource);
    }

    /// Serves no more. `users`: stop those in use too, after their grace.
    pub(super) fn close(&mut self, users: bool) {
        self.phase = match self.phase {
            Phase::Open => Phase::Closing { users },
            // What was asked for once stays.
            Phase::Closing { users: before } => Phase::Closing { users: before || users },
            Phase::Closed => Phase::Closed,
        };
    }
}
