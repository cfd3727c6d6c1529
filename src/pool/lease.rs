//! One resource with its user, or on the way to one; and a place in the queue.

use std::sync::Arc;

use tokio::sync::oneshot;

use super::core::Refusal;
use super::core::Resource;
use super::core::Shared;
use super::state::Phase;
use super::state::Return;
use super::state::State;

/// What a waiter is told.
pub(super) type Answer<R> = Result<Lease<R>, Refusal<<R as Resource>::Error>>;

/// A resource that is out of the pool. Dropping gives it back: fresh while nobody had it in hand, else used.
pub(super) struct Lease<R: Resource> {
    shared: Arc<Shared<R>>,
    id: u64,
    resource: Option<R>,
    condition: Return,
}

impl<R: Resource> Lease<R> {
    /// Lends an idle resource, unless somebody waits for it.
    pub(super) fn idle(shared: &Arc<Shared<R>>, state: &mut State<R>) -> Option<Self> {
        let free = state.phase == Phase::Open && state.waiters.is_empty();
        let resource = if free { state.take_idle() } else { None }?;
        Some(Self::of(shared, state, resource))
    }

    /// Lends `resource`.
    pub(super) fn of(shared: &Arc<Shared<R>>, state: &mut State<R>, resource: R) -> Self {
        let id = state.lend(&resource);
        Self { shared: Arc::clone(shared), id, resource: Some(resource), condition: Return::Fresh }
    }

    /// From now on a user has it.
    pub(super) fn in_hand(mut self) -> Self {
        self.condition = Return::Used;
        self.shared.lock().counts.handed_out += 1;
        self
    }

    /// The resource.
    pub(super) fn get(&self) -> &R {
        self.resource.as_ref().expect("it is taken only by what consumes the lease")
    }

    /// Gives it back as something that nobody shall have again.
    pub(super) fn discard(mut self) {
        self.condition = Return::Discarded;
    }

    /// Takes it out of the pool for good.
    pub(super) fn detach(mut self) -> R {
        let resource = self.resource.take().expect("it is taken only by what consumes the lease");
        self.shared.lock().forget(self.id);
        self.shared.wake.notify_one();
        resource
    }
}

impl<R: Resource> Drop for Lease<R> {
    fn drop(&mut self) {
        let Some(resource) = self.resource.take() else { return };
        let refused = self.shared.lock().give_back(self.id, resource, self.condition);
        self.shared.wake.notify_one();
        // Outside of the lock: what a resource does when it is dropped is its own business.
        drop(refused);
    }
}

/// A place in the queue. Dropping leaves it; what has been sent already is dropped, and so given back.
pub(super) struct Waiting<R: Resource> {
    shared: Arc<Shared<R>>,
    ticket: u64,
    answer: oneshot::Receiver<Answer<R>>,
}

impl<R: Resource> Waiting<R> {
    /// Takes the last place.
    pub(super) fn queue(shared: &Arc<Shared<R>>, state: &mut State<R>) -> Self {
        let (waiter, answer) = oneshot::channel();
        Self { shared: Arc::clone(shared), ticket: state.queue(waiter), answer }
    }

    /// Waits for its turn.
    pub(super) async fn answer(mut self) -> Answer<R> {
        (&mut self.answer).await.unwrap_or(Err(Refusal::Closed))
    }
}

impl<R: Resource> Drop for Waiting<R> {
    fn drop(&mut self) {
        let waiter = self.shared.lock().waiters.remove(&self.ticket);
        drop(waiter);
    }
}
