//! What a case is given: one engine, the others to compare with, and the deadline.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;

use kiln::hv::HvError;
use kiln::hv::Hypervisor;
use kiln::hv::Kick;

use crate::abilities;
use crate::abilities::Ability;
use crate::engines;
use crate::engines::Engine;

/// Why a case cannot say anything here.
#[derive(Clone, Debug)]
pub(crate) struct Skip(pub(crate) String);

/// A case's end; a failed one panics.
pub(crate) type Outcome = Result<(), Skip>;

/// A case.
#[derive(Clone, Copy)]
pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) run: fn(&Bench) -> Outcome,
}

impl fmt::Debug for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

/// A case's name is its path: `group::function`.
macro_rules! cases {
    ($group:ident: $($name:ident),+ $(,)?) => {
        pub(crate) const CASES: &[$crate::bench::Case] = &[$($crate::bench::Case {
            name: concat!(stringify!($group), "::", stringify!($name)),
            run: $name,
        }),+];
    };
}
pub(crate) use cases;

/// The kickers of a case's vCPUs, until its time is up.
#[derive(Debug, Default)]
struct Deadline {
    kickers: Vec<Arc<dyn Kick>>,
    over: bool,
}

/// An engine on the bench, for one case.
#[derive(Clone, Debug)]
pub(crate) struct Bench {
    engine: Engine,
    deadline: Arc<Mutex<Deadline>>,
    /// What this host's engines were found to be able to, by engine and ability.
    probed: Arc<Mutex<HashMap<(&'static str, &'static str), bool>>>,
}

impl Bench {
    pub(crate) fn new(engine: Engine) -> Self {
        Self { engine, deadline: Arc::default(), probed: Arc::default() }
    }

    /// The same, for the next case: with a deadline of its own.
    pub(crate) fn renewed(&self) -> Self {
        Self { deadline: Arc::default(), ..self.clone() }
    }

    /// The engine; a bench is made only for one that is here.
    pub(crate) fn hypervisor(&self) -> &dyn Hypervisor {
        self.engine.hypervisor.as_deref().expect("present")
    }

    pub(crate) fn engine_name(&self) -> &'static str {
        self.engine.name
    }

    pub(crate) fn is_soft(&self) -> bool {
        self.engine.name == engines::SOFT
    }

    /// A software engine of its own, for the same case.
    pub(crate) fn beside(&self) -> Self {
        Self { engine: engines::soft(), ..self.clone() }
    }

    /// Skips the case where the engine lacks an ability, as its probe finds.
    pub(crate) fn needs(&self, ability: &Ability) -> Outcome {
        let key = (self.engine.name, ability.name);
        let known = lock(&self.probed).get(&key).copied();
        let has = known.unwrap_or_else(|| (ability.probe)(self));
        lock(&self.probed).insert(key, has);
        if has { Ok(()) } else { Err(Skip(format!("this host's {} {}", self.engine.name, ability.lack))) }
    }

    /// Remembers a vCPU for the deadline.
    pub(crate) fn watch(&self, kick: &Arc<dyn Kick>) {
        let mut deadline = lock(&self.deadline);
        deadline.kickers.push(Arc::clone(kick));
        if deadline.over {
            kick.kick();
        }
    }

    /// The case's time is up: every vCPU that it has or will have is kicked.
    pub(crate) fn expire(&self) {
        let mut deadline = lock(&self.deadline);
        deadline.over = true;
        deadline.kickers.iter().for_each(|kick| kick.kick());
    }

    pub(crate) fn is_over(&self) -> bool {
        lock(&self.deadline).over
    }

    /// What an engine's refusal means: a skip where it says that it cannot do what it may lack, else a failure.
    pub(crate) fn refused(&self, doing: &str, error: &HvError) -> Skip {
        match abilities::excuse(error) {
            Some(lack) => Skip(format!("this host's {} {lack}", self.engine.name)),
            None => panic!("{doing}: {}", engines::chain(error)),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A case that panics leaves nothing half done in here.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
