//! The one task of a pool: it starts, watches and stops, and serves the queue.
//!
//! Each turn looks at the whole state, so it matters little what woke it. It ends once the pool is closed and what the
//! pool had has stopped; whatever else is under way ends with it, since it owns all of it.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use tokio::sync::oneshot;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::core::Refusal;
use super::core::Resource;
use super::core::Shared;
use super::lease::Answer;
use super::lease::Lease;
use super::state::Idle;
use super::state::Phase;
use super::state::State;
use super::state::Watch;

/// What came to an end.
enum Event {
    /// The idle resource that is watched under this number.
    Ended(u64),
    /// A watch that nobody needs any more.
    Unwatched,
    /// A resource that had to stop.
    Stopped,
}

/// An answer on its way; sent outside of the lock, since a waiter that is gone gives it back, which takes the lock.
type Delivery<R> = (oneshot::Sender<Answer<R>>, Answer<R>);

/// The task's own part.
pub(super) struct Driver<R: Resource, M, F> {
    shared: Arc<Shared<R>>,
    make: M,
    starts: FuturesUnordered<F>,
    events: FuturesUnordered<BoxFuture<'static, Event>>,
    deliveries: Vec<Delivery<R>>,
    /// When those in use are stopped; set once the pool is being shut down.
    grace_ends: Option<Instant>,
}

impl<R, M, F> Driver<R, M, F>
where
    R: Resource,
    M: Fn() -> F + Send + 'static,
    F: Future<Output = Result<R, R::Error>> + Send + 'static,
{
    pub(super) fn new(shared: Arc<Shared<R>>, make: M) -> Self {
        let (starts, events) = (FuturesUnordered::new(), FuturesUnordered::new());
        Self { shared, make, starts, events, deliveries: Vec::new(), grace_ends: None }
    }

    /// Runs until the pool is closed.
    pub(super) async fn run(mut self) {
        loop {
            let next = self.turn();
            for (waiter, answer) in self.deliveries.drain(..) {
                // A waiter that is gone: the answer is dropped, and a resource in it goes back.
                let _ = waiter.send(answer);
            }
            let next = match next {
                Next::Over => return,
                Next::At(next) => next,
            };
            tokio::select! {
                biased;
                Some(made) = self.starts.next() => self.made(made),
                Some(event) = self.events.next() => self.happened(event),
                () = self.shared.wake.notified() => {}
                () = sleep_until(next) => {}
            }
            // What else is ready, so that a turn sees all of it.
            while let Some(Some(made)) = self.starts.next().now_or_never() {
                self.made(made);
            }
            while let Some(Some(event)) = self.events.next().now_or_never() {
                self.happened(event);
            }
        }
    }

    /// Does what the state asks for, and says when to look again at the latest.
    fn turn(&mut self) -> Next {
        let shared = Arc::clone(&self.shared);
        let mut state = shared.lock();
        let now = Instant::now();
        let next = if state.phase == Phase::Open { self.serve(&mut state, now) } else { self.close(&mut state, now) };
        for resource in state.to_stop.drain(..) {
            let stopped = resource.stop();
            self.events.push(Box::pin(async move {
                stopped.await;
                drop(resource);
                Event::Stopped
            }));
        }
        let (open, missing) = (state.phase == Phase::Open, state.missing(now));
        state.starting += missing;
        drop(state);
        if !open {
            // Cancelled, and nothing of them stays.
            self.starts.clear();
        }
        // A closure and an async function that was not polled: nothing of a VM runs yet.
        self.starts.extend((0..missing).map(|_| (self.make)()));
        next
    }

    /// A turn of an open pool.
    fn serve(&mut self, state: &mut State<R>, now: Instant) -> Next {
        while let Some((ticket, waiter)) = state.waiters.pop_first() {
            let Some(resource) = state.take_idle() else {
                // Back to its place.
                state.waiters.insert(ticket, waiter);
                break;
            };
            self.deliveries.push((waiter, Ok(Lease::of(&self.shared, state, resource))));
        }
        self.watch(state, now);
        while state.expiry().is_some_and(|expiry| expiry <= now) {
            let Some(oldest) = state.idle.pop_front() else { break };
            state.counts.expired += 1;
            state.retire(oldest.resource);
        }
        let ready = state.idle.len() + state.in_use.len() >= state.settings.min;
        if let Some(built) = state.built.take_if(|_| ready) {
            // Nobody listens: the pool is about to be closed.
            let _ = built.send(Ok(()));
        }
        let rested = state.backoff.rests_until(now).filter(|_| state.live() < state.settings.min);
        Next::At(state.expiry().into_iter().chain(rested).min())
    }

    /// Begins to watch the idle that are not watched.
    fn watch(&mut self, state: &mut State<R>, now: Instant) {
        for at in 0..state.idle.len() {
            if state.idle[at].watch.is_some() {
                continue;
            }
            let (number, token) = (state.number(), CancellationToken::new());
            let ended = state.idle[at].resource.ended();
            state.idle[at].watch = Some(Watch { number, since: now, _guard: token.clone().drop_guard() });
            self.events.push(Box::pin(async move {
                tokio::select! {
                    biased;
                    () = token.cancelled_owned() => Event::Unwatched,
                    () = ended => Event::Ended(number),
                }
            }));
        }
    }

    /// A turn of a pool that is closing.
    fn close(&mut self, state: &mut State<R>, now: Instant) -> Next {
        state.starting = 0;
        state.built = None;
        while let Some((_, waiter)) = state.waiters.pop_first() {
            self.deliveries.push((waiter, Err(Refusal::Closed)));
        }
        while let Some(idle) = state.idle.pop_front() {
            state.retire(idle.resource);
        }
        let users = state.phase == Phase::Closing { users: true };
        if !users {
            return if state.stopping == 0 { Next::Over } else { Next::At(None) };
        }
        let grace_ends = *self.grace_ends.get_or_insert_with(|| deadline(now, state.settings.grace));
        if grace_ends <= now {
            for (_, stop) in state.in_use.drain() {
                state.stopping += 1;
                self.events.push(Box::pin(stop.map(|()| Event::Stopped)));
            }
        }
        match (state.in_use.is_empty(), state.stopping) {
            (true, 0) => Next::Over,
            (true, _) => Next::At(None),
            (false, _) => Next::At(Some(grace_ends)),
        }
    }

    /// A start is over.
    fn made(&mut self, made: Result<R, R::Error>) {
        let shared = Arc::clone(&self.shared);
        let mut state = shared.lock();
        state.starting = state.starting.saturating_sub(1);
        let error = match made {
            Ok(resource) => {
                state.proven = true;
                state.counts.started += 1;
                state.idle.push_back(Idle { resource, watch: None });
                return;
            }
            Err(error) => error,
        };
        state.counts.failed_starts += 1;
        state.backoff.failed(Instant::now());
        if let Some(built) = state.built.take() {
            let _ = built.send(Err(error));
        } else if let Some((_, waiter)) = state.waiters.pop_first() {
            self.deliveries.push((waiter, Err(Refusal::Failed(error))));
        } else {
            tracing::warn!("a VM that a pool shall keep ready did not start");
        }
    }

    fn happened(&mut self, event: Event) {
        let mut state = self.shared.lock();
        match event {
            Event::Unwatched => {}
            Event::Stopped => state.stopping = state.stopping.saturating_sub(1),
            Event::Ended(number) => {
                let watched = |idle: &Idle<R>| idle.watch.as_ref().is_some_and(|it| it.number == number);
                // It may have been handed out a moment ago; its user will see.
                let found = state.idle.iter().position(watched).and_then(|at| state.idle.remove(at));
                if let Some(idle) = found {
                    state.backoff.failed(Instant::now());
                    state.crashed(idle.resource);
                }
            }
        }
    }
}

/// The driver's runtime may also have been shut down around it; nobody may wait for it then.
impl<R: Resource, M, F> Drop for Driver<R, M, F> {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.phase = Phase::Closed;
        state.starting = 0;
        state.stopping = 0;
        let idle = std::mem::take(&mut state.idle);
        let to_stop = std::mem::take(&mut state.to_stop);
        let waiters = std::mem::take(&mut state.waiters);
        let built = state.built.take();
        drop(state);
        // Outside of the lock, since what is dropped may wake others or come back here.
        drop((idle, to_stop, waiters, built));
        self.deliveries.clear();
        self.shared.over.cancel();
    }
}

/// How a turn ends.
enum Next {
    /// Look again then, or when something happens.
    At(Option<Instant>),
    /// There is nothing left to do.
    Over,
}

/// A deadline too far away to be told is one in a year.
fn deadline(now: Instant, after: Duration) -> Instant {
    const YEAR: Duration = Duration::from_secs(365 * 24 * 3600);
    now.checked_add(after).unwrap_or(now + YEAR)
}

/// Never, without a time.
async fn sleep_until(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time).await,
        None => std::future::pending().await,
    }
}
