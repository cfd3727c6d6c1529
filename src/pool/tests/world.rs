//! Pretended resources, and the world in which they start, crash and stop.

use std::collections::VecDeque;
use std::future::Future;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::Weak;
use std::time::Duration;

use futures::future::BoxFuture;
use tokio::sync::oneshot;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::sync::DropGuard;

use super::super::core::Built;
use super::super::core::Core;
use super::super::core::Resource;
use super::super::core::Settings;

/// How long stopping takes.
const STOPPING: Duration = Duration::from_micros(200);

/// Lets everything happen that can: paused time goes on only when no task has anything to do.
pub(crate) async fn settle() {
    tokio::time::sleep(Duration::from_millis(2)).await;
}

/// Why nothing was made.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Refused;

#[derive(Default)]
struct Inner {
    starts: VecDeque<oneshot::Sender<bool>>,
    fakes: Vec<Weak<End>>,
    /// Those that exist, starting ones among them, and the most there ever were.
    existing: usize,
    most: usize,
    made: usize,
}

/// Where they all are.
#[derive(Clone)]
pub(crate) struct World {
    inner: Arc<Mutex<Inner>>,
    /// Gone once the driver has dropped what makes resources.
    maker: Arc<Mutex<Weak<()>>>,
}

/// One that is counted as existing.
struct Existing(World);

impl Existing {
    fn new(world: &World) -> Self {
        let mut inner = world.lock();
        inner.existing += 1;
        inner.most = inner.most.max(inner.existing);
        Self(world.clone())
    }
}

impl Drop for Existing {
    fn drop(&mut self) {
        self.0.lock().existing -= 1;
    }
}

/// How one ended: not yet, by itself, or stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Life {
    Runs,
    Crashed,
    Stopped,
}

struct End(watch::Sender<Life>);

/// A pretended resource.
pub(crate) struct Fake {
    number: usize,
    end: Arc<End>,
    _existing: Existing,
}

impl Fake {
    pub(crate) fn number(&self) -> usize {
        self.number
    }

    pub(crate) fn crash(&self) {
        self.end.0.send_replace(Life::Crashed);
    }

    pub(crate) fn is_stopped(&self) -> bool {
        *self.end.0.borrow() == Life::Stopped
    }
}

impl Resource for Fake {
    type Error = Refused;

    fn has_ended(&self) -> bool {
        *self.end.0.borrow() != Life::Runs
    }

    fn ended(&self) -> BoxFuture<'static, ()> {
        let mut life = self.end.0.subscribe();
        Box::pin(async move {
            let _ = life.wait_for(|life| *life != Life::Runs).await;
        })
    }

    fn stop(&self) -> BoxFuture<'static, ()> {
        let end = Arc::downgrade(&self.end);
        Box::pin(async move {
            tokio::time::sleep(STOPPING).await;
            if let Some(end) = end.upgrade() {
                end.0.send_if_modified(|life| {
                    let runs = *life == Life::Runs;
                    if runs {
                        *life = Life::Stopped;
                    }
                    runs
                });
            }
        })
    }
}

impl World {
    pub(crate) fn new() -> Self {
        Self { inner: Arc::default(), maker: Arc::new(Mutex::new(Weak::new())) }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("no test panics with it")
    }

    /// A pool in this world.
    pub(crate) fn open(&self, settings: Settings) -> (Core<Fake>, Built<Refused>) {
        let maker = Arc::new(());
        *self.maker.lock().expect("no test panics with it") = Arc::downgrade(&maker);
        let world = self.clone();
        Core::open(settings, move || {
            let _held = &maker;
            world.make()
        })
    }

    fn make(&self) -> impl Future<Output = Result<Fake, Refused>> + Send + use<> {
        let world = self.clone();
        async move {
            let existing = Existing::new(&world);
            let (start, ends) = oneshot::channel();
            world.lock().starts.push_back(start);
            if !ends.await.expect("the world answers, or the start is cancelled") {
                return Err(Refused);
            }
            let mut inner = world.lock();
            inner.made += 1;
            let end = Arc::new(End(watch::Sender::new(Life::Runs)));
            inner.fakes.push(Arc::downgrade(&end));
            Ok(Fake { number: inner.made, end, _existing: existing })
        }
    }

    /// Starts under way.
    pub(crate) fn starts(&self) -> usize {
        let mut inner = self.lock();
        inner.starts.retain(|start| !start.is_closed());
        inner.starts.len()
    }

    /// Ends the oldest start; false without one.
    pub(crate) fn start_ends(&self, well: bool) -> bool {
        self.start_at_ends(0, well)
    }

    /// Ends one of the starts; false without one.
    pub(crate) fn start_at_ends(&self, which: usize, well: bool) -> bool {
        let starts = self.starts();
        if starts == 0 {
            return false;
        }
        let start = self.lock().starts.remove(which % starts);
        start.expect("there are that many").send(well).expect("it was not closed");
        true
    }

    /// Lets every start succeed until the guard is dropped.
    pub(crate) fn serve_starts(&self) -> DropGuard {
        let (world, over) = (self.clone(), CancellationToken::new());
        let guard = over.clone().drop_guard();
        tokio::spawn(over.run_until_cancelled_owned(async move {
            loop {
                while world.start_ends(true) {}
                settle().await;
            }
        }));
        guard
    }

    /// Those that run, wherever they are.
    fn running(&self) -> Vec<Arc<End>> {
        let mut running: Vec<_> = self.lock().fakes.iter().filter_map(Weak::upgrade).collect();
        running.retain(|end| *end.0.borrow() == Life::Runs);
        running
    }

    /// How many run.
    pub(crate) fn alive(&self) -> usize {
        self.running().len()
    }

    /// Ends all of them.
    pub(crate) fn crash_all(&self) {
        for end in self.running() {
            end.0.send_replace(Life::Crashed);
        }
    }

    /// Ends one of them, if there is any.
    pub(crate) fn crash(&self, which: usize) {
        let running = self.running();
        if let Some(end) = running.get(which % running.len().max(1)) {
            end.0.send_replace(Life::Crashed);
        }
    }

    /// How many were made.
    pub(crate) fn made(&self) -> usize {
        self.lock().made
    }

    /// The most that ever existed at the same time.
    pub(crate) fn most(&self) -> usize {
        self.lock().most
    }

    /// Whether the driver is gone, with what it makes resources with.
    pub(crate) fn is_forgotten(&self) -> bool {
        self.maker.lock().expect("no test panics with it").upgrade().is_none()
    }

    /// Nothing exists any more and nobody works.
    pub(crate) fn assert_over(&self) {
        let existing = self.lock().existing;
        assert_eq!((existing, self.starts()), (0, 0));
        assert!(self.is_forgotten());
    }
}
