//! The pool of anything that is made, ends and is stopped; what it is made of is a VM, or a pretended one in tests.
//!
//! ```text
//!   Core, Lease ──lock──> State <──lock── Driver ──> starts, ends, stops
//!         └────────────── wake ─────────────^
//! ```
//! One task, the [`Driver`], does all that takes time. What handles do takes none: they take from the idle, queue up
//! and give back, under a lock that is never held across an await. An inbox in its place would have to be bounded, and
//! then a drop, which cannot wait, could find it full; state has no such limit, and its size is bounded by `max` and by
//! the callers that wait.

use std::future::Future;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::time::Duration;

use futures::future::BoxFuture;
use tokio::sync::Notify;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use super::driver::Driver;
use super::lease::Lease;
use super::lease::Waiting;
use super::state::Phase;
use super::state::State;
use super::stats::PoolStats;

/// What a pool can hold.
pub(super) trait Resource: Send + 'static {
    /// Why there is none.
    type Error: Send + 'static;

    /// Whether it has ended and is of no use.
    fn has_ended(&self) -> bool;

    /// Waits for its end, and does not keep it alive.
    fn ended(&self) -> BoxFuture<'static, ()>;

    /// Once polled, stops it and waits for its end; does not keep it alive.
    fn stop(&self) -> BoxFuture<'static, ()>;
}

/// The rules of one pool.
#[derive(Clone, Copy, Debug)]
pub(super) struct Settings {
    /// How many there are at least, idle or in use.
    pub(super) min: usize,
    /// How many exist at most, whatever they do.
    pub(super) max: usize,
    /// How long one beyond `min` may be idle.
    pub(super) idle_timeout: Duration,
    /// How long a user waits.
    pub(super) acquire_timeout: Duration,
    /// How long those in use may go on when the pool is shut down.
    pub(super) grace: Duration,
    /// Whether what one user gives back goes to another.
    pub(super) reuse: bool,
    /// How many are started at once when nobody waits for them.
    pub(super) parallel: usize,
}

/// Why an acquire got nothing.
#[derive(Debug)]
pub(super) enum Refusal<E> {
    /// A start failed.
    Failed(E),
    /// Time was up.
    Timeout,
    /// There is no pool any more.
    Closed,
}

/// What the handles and the driver have in common.
pub(super) struct Shared<R: Resource> {
    state: Mutex<State<R>>,
    /// Tells the driver to look at the state; one call is kept when it is busy.
    pub(super) wake: Notify,
    /// Cancelled when the driver is gone.
    pub(super) over: CancellationToken,
}

impl<R: Resource> Shared<R> {
    pub(super) fn lock(&self) -> MutexGuard<'_, State<R>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The answer to whoever builds the pool: all of the first ones are there, or why not.
pub(super) type Built<E> = oneshot::Receiver<Result<(), E>>;

/// The owner's handle. Dropping it closes the pool and waits for nothing.
pub(super) struct Core<R: Resource> {
    shared: Arc<Shared<R>>,
    acquire_timeout: Duration,
}

impl<R: Resource> Core<R> {
    /// Starts the driver of a pool that gets its resources from `make`.
    pub(super) fn open<M, F>(settings: Settings, make: M) -> (Self, Built<R::Error>)
    where
        M: Fn() -> F + Send + 'static,
        F: Future<Output = Result<R, R::Error>> + Send + 'static,
    {
        let (built, answer) = oneshot::channel();
        let state = Mutex::new(State::new(settings, built));
        let shared = Arc::new(Shared { state, wake: Notify::new(), over: CancellationToken::new() });
        tokio::spawn(Driver::new(Arc::clone(&shared), make).run());
        (Self { shared, acquire_timeout: settings.acquire_timeout }, answer)
    }

    /// Takes an idle one, or queues up for the next. Cancelled, what was on the way goes to the next in the queue.
    pub(super) async fn acquire(&self) -> Result<Lease<R>, Refusal<R::Error>> {
        let waiting = match self.enter()? {
            Entry::Served(lease) => return Ok(lease.in_hand()),
            Entry::Queued(waiting) => waiting,
        };
        if let Ok(answer) = tokio::time::timeout(self.acquire_timeout, waiting.answer()).await {
            return answer.map(Lease::in_hand);
        }
        self.shared.lock().counts.timed_out += 1;
        Err(Refusal::Timeout)
    }

    /// Takes an idle one that nobody waits for.
    pub(super) fn try_acquire(&self) -> Option<Lease<R>> {
        let lease = Lease::idle(&self.shared, &mut self.shared.lock());
        // Also without one: some may have been found that have ended.
        self.shared.wake.notify_one();
        lease.map(Lease::in_hand)
    }

    fn enter(&self) -> Result<Entry<R>, Refusal<R::Error>> {
        let mut state = self.shared.lock();
        if state.phase != Phase::Open {
            return Err(Refusal::Closed);
        }
        let entry = match Lease::idle(&self.shared, &mut state) {
            Some(lease) => Entry::Served(lease),
            None => Entry::Queued(Waiting::queue(&self.shared, &mut state)),
        };
        drop(state);
        self.shared.wake.notify_one();
        Ok(entry)
    }

    /// The pool at this moment.
    pub(super) fn stats(&self) -> PoolStats {
        self.shared.lock().stats()
    }

    /// Closes the pool and waits until everything has stopped; what is in use is given the grace for that.
    pub(super) async fn shutdown(&self) {
        self.shared.lock().close(true);
        self.shared.wake.notify_one();
        self.shared.over.cancelled().await;
    }
}

impl<R: Resource> Drop for Core<R> {
    fn drop(&mut self) {
        self.shared.lock().close(false);
        self.shared.wake.notify_one();
    }
}

/// What an acquire finds.
enum Entry<R: Resource> {
    Served(Lease<R>),
    Queued(Waiting<R>),
}
