//! Which engine runs a guest: a choice by name or a given one, what this host has, and why an engine cannot be used.
//!
//! ```text
//!   host --probe--> EngineFacts --obstacles--> Obstacle: what is in the way, and the remedy
//!                    (once a process)             none --> the engine is usable
//! ```
//! Judging is apart from looking: everything that is judged is plain data.

mod facts;
mod kvm;
mod obstacle;
mod trial;

pub use facts::{EngineFacts, KvmDevice, KvmFacts};
pub use obstacle::{KERNEL_MIPS_LEAST, Obstacle, obstacles};
pub use trial::Trial;

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::hv::Hypervisor;

/// An engine by name.
///
/// ```
/// use kiln::{Engine, VmConfig};
/// let config = VmConfig::new().engine(Engine::Soft);
/// # drop(config);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Engine {
    /// The best that this host has: hardware's when it is usable for Linux guests, else [`Soft`](Self::Soft).
    #[default]
    Auto,
    /// kiln's own processor, on any host.
    Soft,
    /// The processor's virtualization, by Linux's KVM.
    Kvm,
}

impl Engine {
    /// The engines that there are, best first.
    pub const ALL: [Self; 2] = [Self::Kvm, Self::Soft];
}

impl fmt::Display for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Soft => "soft",
            Self::Kvm => "kvm",
        })
    }
}

/// What a guest is to run on.
///
/// ```
/// use std::sync::Arc;
/// use kiln::engine::EngineChoice;
/// use kiln::{Engine, hv::soft::Soft};
///
/// let by_name: EngineChoice = Engine::Auto.into();
/// let given: EngineChoice = Arc::new(Soft::new()).into();
/// # drop((by_name, given));
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum EngineChoice {
    /// One by its name.
    Named(Engine),
    /// This one.
    Given(Arc<dyn Hypervisor>),
}

impl Default for EngineChoice {
    fn default() -> Self {
        Self::Named(Engine::Auto)
    }
}

impl From<Engine> for EngineChoice {
    fn from(engine: Engine) -> Self {
        Self::Named(engine)
    }
}

impl From<Arc<dyn Hypervisor>> for EngineChoice {
    fn from(engine: Arc<dyn Hypervisor>) -> Self {
        Self::Given(engine)
    }
}

impl<H: Hypervisor + 'static> From<Arc<H>> for EngineChoice {
    fn from(engine: Arc<H>) -> Self {
        Self::Given(engine)
    }
}

/// The engine that was asked for cannot run guests here.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("the engine {engine} cannot run guests here: {}", told(.obstacles))]
pub struct EngineError {
    /// Which one.
    pub engine: Engine,
    /// What is in the way, at least one thing.
    pub obstacles: Vec<Obstacle>,
}

/// Obstacles with their remedies, as one line.
fn told(obstacles: &[Obstacle]) -> String {
    let each = obstacles.iter().map(|obstacle| match obstacle.remedy() {
        Some(remedy) => format!("{obstacle} ({remedy})"),
        None => obstacle.to_string(),
    });
    each.collect::<Vec<_>>().join("; ")
}

impl EngineChoice {
    /// Opens what was chosen; `soft` makes the software engine where that is it. The first time in a process that
    /// another engine is in question the host is probed, which blocks for some milliseconds.
    ///
    /// A saved guest goes on only with the processor, by its `profile`, that it knows: where the choice is ours, the
    /// software engine has it if another does not.
    pub(crate) fn open(
        &self,
        profile: Option<&str>,
        soft: impl FnOnce() -> Arc<dyn Hypervisor>,
    ) -> Result<Arc<dyn Hypervisor>, EngineError> {
        match self {
            Self::Given(engine) => Ok(Arc::clone(engine)),
            Self::Named(Engine::Soft) => Ok(soft()),
            Self::Named(Engine::Auto) => {
                let kvm = open_kvm(EngineFacts::of_this_process())
                    .inspect_err(|reason| tracing::debug!(%reason, "guests run on the software engine"));
                let fits = |engine: &Arc<dyn Hypervisor>| profile.is_none_or(|wanted| engine.cpu_profile() == wanted);
                Ok(kvm.ok().filter(fits).unwrap_or_else(soft))
            }
            Self::Named(Engine::Kvm) => open_kvm(EngineFacts::of_this_process()),
        }
    }
}

fn open_kvm(facts: &EngineFacts) -> Result<Arc<dyn Hypervisor>, EngineError> {
    let in_the_way = |obstacles| EngineError { engine: Engine::Kvm, obstacles };
    let found = obstacles(Engine::Kvm, facts);
    if !found.is_empty() {
        return Err(in_the_way(found));
    }
    kvm::open().map_err(|error| in_the_way(Obstacle::of_error(&error)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hv::soft::Soft;

    fn soft() -> Arc<dyn Hypervisor> {
        Arc::new(Soft::new())
    }

    #[test]
    fn a_given_engine_and_the_software_one_are_always_to_be_had() {
        let given = soft();
        let opened = EngineChoice::from(Arc::clone(&given)).open(None, || panic!("it is given")).unwrap();
        assert!(Arc::ptr_eq(&given, &opened));
        let opened = EngineChoice::from(Engine::Soft).open(Some("of no engine"), || Arc::clone(&given)).unwrap();
        assert!(Arc::ptr_eq(&given, &opened));
        EngineChoice::default().open(None, soft).expect("some engine is always usable");
        // Where the choice is ours, a guest that knows a processor which no other engine has is the software engine's.
        let opened = EngineChoice::default().open(Some("of no engine"), || Arc::clone(&given)).unwrap();
        assert!(Arc::ptr_eq(&given, &opened));
    }

    #[test]
    fn an_engine_that_was_named_and_is_not_usable_says_why_and_what_helps() {
        let error = open_kvm(&EngineFacts::made_up(KvmFacts::default())).unwrap_err();
        assert_eq!(
            (error.engine, &error.obstacles[..]),
            (Engine::Kvm, &[Obstacle::NoDevice { virtualization: None }][..])
        );
        let text = error.to_string();
        assert!(text.starts_with("the engine kvm cannot run guests here: there is no /dev/kvm ("), "{text}");
    }

    #[test]
    fn a_named_engine_is_what_the_facts_of_this_process_allow() {
        let facts = EngineFacts::of_this_process();
        let named = EngineChoice::from(Engine::Kvm).open(None, || panic!("another was named"));
        assert_eq!(named.is_ok(), obstacles(Engine::Kvm, facts).is_empty(), "{named:?}");
    }
}
