//! Random users, crashes and failures, and what must hold after each step.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::Mutex;

use proptest::prelude::*;
use tokio::task::JoinHandle;

use super::*;

/// What happens next. Numbers choose among what is there.
#[derive(Clone, Debug)]
enum Step {
    Acquire,
    TryAcquire,
    Cancel(usize),
    /// Cancels in the same moment in which a lease comes back.
    CancelWhileServed(usize),
    Release(usize),
    Discard(usize),
    Detach(usize),
    CrashAny(usize),
    CrashAndTake(usize),
    StartEnds(usize, bool),
    Time(u64),
}

fn step() -> impl Strategy<Value = Step> {
    let which = 0..8_usize;
    prop_oneof![
        6 => Just(Step::Acquire),
        1 => Just(Step::TryAcquire),
        2 => which.clone().prop_map(Step::Cancel),
        1 => which.clone().prop_map(Step::CancelWhileServed),
        4 => which.clone().prop_map(Step::Release),
        1 => which.clone().prop_map(Step::Discard),
        1 => which.clone().prop_map(Step::Detach),
        2 => which.clone().prop_map(Step::CrashAny),
        1 => which.clone().prop_map(Step::CrashAndTake),
        6 => (which, prop::bool::weighted(0.8)).prop_map(|(which, well)| Step::StartEnds(which, well)),
        2 => (1..4000_u64).prop_map(Step::Time),
    ]
}

fn settings() -> impl Strategy<Value = Settings> {
    (1..6_usize, 0..6_usize, any::<bool>(), 1..4_usize).prop_map(|(max, min, reuse, parallel)| Settings {
        min: min.min(max),
        max,
        reuse,
        parallel,
        ..RULES
    })
}

/// An acquire in a task of its own.
struct User {
    task: JoinHandle<()>,
    outcome: Arc<Mutex<Option<Acquired>>>,
}

struct Play {
    settings: Settings,
    world: World,
    core: Arc<Core<Fake>>,
    /// In the order in which they came; those without an outcome wait.
    users: Vec<User>,
    held: Vec<Lease<Fake>>,
    detached: Vec<Fake>,
    /// Those that some user has had.
    known: HashSet<usize>,
    handed_out: u64,
    failures_told: u64,
    timeouts_told: u64,
}

impl Play {
    fn new(settings: Settings) -> Self {
        let world = World::new();
        // Nobody waits for the first ones: users may come before.
        let (core, built) = world.open(settings);
        drop(built);
        Self {
            settings,
            world,
            core: Arc::new(core),
            users: Vec::new(),
            held: Vec::new(),
            detached: Vec::new(),
            known: HashSet::new(),
            handed_out: 0,
            failures_told: 0,
            timeouts_told: 0,
        }
    }

    async fn step(&mut self, step: &Step) {
        match *step {
            Step::Acquire => {
                let (core, outcome) = (Arc::clone(&self.core), Arc::new(Mutex::new(None)));
                let told = Arc::clone(&outcome);
                let task = tokio::spawn(async move {
                    let acquired = core.acquire().await;
                    *told.lock().expect("no panic") = Some(acquired);
                });
                self.users.push(User { task, outcome });
            }
            Step::TryAcquire => {
                let waiting = self.core.stats().waiting;
                if let Some(lease) = self.core.try_acquire() {
                    assert_eq!(waiting, 0, "it went ahead of the queue");
                    self.took(lease);
                }
            }
            Step::Cancel(which) => self.cancel(which),
            Step::CancelWhileServed(which) => {
                drop(pick(&mut self.held, which));
                self.world.start_ends(true);
                self.cancel(0);
            }
            Step::Release(which) => drop(pick(&mut self.held, which)),
            Step::Discard(which) => pick(&mut self.held, which).into_iter().for_each(Lease::discard),
            Step::Detach(which) => {
                let detached = pick(&mut self.held, which).map(Lease::detach);
                self.detached.extend(detached);
            }
            Step::CrashAny(which) => self.world.crash(which),
            Step::CrashAndTake(which) => {
                self.world.crash(which);
                if let Some(lease) = self.core.try_acquire() {
                    self.took(lease);
                }
            }
            Step::StartEnds(which, well) => {
                self.world.start_at_ends(which, well);
            }
            Step::Time(millis) => tokio::time::sleep(Duration::from_millis(millis)).await,
        }
        settle().await;
        self.look();
        self.check();
    }

    fn cancel(&mut self, which: usize) {
        let user = pick(&mut self.users, which);
        user.iter().for_each(|user| user.task.abort());
    }

    /// Sees who was served since the last look.
    fn look(&mut self) {
        let mut waits = false;
        for user in std::mem::take(&mut self.users) {
            let outcome = user.outcome.lock().expect("no panic").take();
            let Some(outcome) = outcome else {
                waits = true;
                self.users.push(user);
                continue;
            };
            assert!(!waits, "somebody was served before one who came earlier");
            match outcome {
                Ok(lease) => self.took(lease),
                Err(Refusal::Failed(Refused)) => self.failures_told += 1,
                Err(Refusal::Timeout) => self.timeouts_told += 1,
                Err(Refusal::Closed) => panic!("nobody closed it"),
            }
        }
    }

    fn took(&mut self, lease: Lease<Fake>) {
        self.handed_out += 1;
        let number = lease.get().number();
        let new = self.known.insert(number);
        assert!(new || self.settings.reuse, "{number} had a user before");
        let others = self.held.iter().map(Lease::get).chain(&self.detached);
        assert!(others.map(Fake::number).all(|other| other != number), "{number} has two users");
        self.held.push(lease);
    }

    /// What holds whenever nothing is left to happen.
    fn check(&self) {
        let (stats, settings) = (self.core.stats(), self.settings);
        let existing = stats.idle + stats.starting + stats.in_use + stats.stopping;
        assert!(existing <= settings.max, "{stats:?}");
        assert!(self.world.most() <= settings.max + self.detached.len(), "more existed than may");
        assert_eq!((stats.in_use, stats.waiting), (self.held.len(), self.users.len()), "{stats:?}");
        assert_eq!((stats.stopping, stats.starting), (0, self.world.starts()), "{stats:?}");
        assert!(stats.waiting == 0 || stats.idle == 0, "somebody waits beside idle ones: {stats:?}");
        let served = stats.starting >= stats.waiting || existing == settings.max;
        assert!(served, "somebody waits and nothing starts: {stats:?}");
        assert_eq!((stats.handed_out, stats.timed_out), (self.handed_out, self.timeouts_told), "{stats:?}");
        assert!(stats.failed_starts >= self.failures_told, "{stats:?}");
        // Nothing lost: whatever started is somewhere, or has gone one of the known ways.
        let gone = stats.crashed + stats.discarded + stats.expired + self.detached.len() as u64;
        assert_eq!(stats.started, (stats.idle + stats.in_use) as u64 + gone, "{stats:?}");
    }

    /// Everything is given back, and time passes.
    async fn end(mut self) {
        self.held.clear();
        while !self.users.is_empty() {
            while self.world.start_ends(true) {}
            settle().await;
            self.look();
            self.held.clear();
        }
        // The longest rest, and the time to be idle.
        for _ in 0..40 {
            while self.world.start_ends(true) {}
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        self.check();
        let stats = self.core.stats();
        assert_eq!(now(stats), (self.settings.min, 0, 0, 0), "{stats:?}");
        self.detached.clear();
        assert_eq!(self.world.alive(), self.settings.min);
        self.core.shutdown().await;
        self.world.assert_over();
    }
}

fn pick<T>(from: &mut Vec<T>, which: usize) -> Option<T> {
    (!from.is_empty()).then(|| from.remove(which % from.len()))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn nothing_is_lost_doubled_or_overtaken(
        settings in settings(),
        steps in prop::collection::vec(step(), 0..80),
    ) {
        paused(async {
            let mut play = Play::new(settings);
            settle().await;
            for step in &steps {
                play.step(step).await;
            }
            play.end().await;
        });
    }
}
