//! The engines there are, and why one of them is not here.

use std::error::Error;
use std::sync::Arc;

use kiln::hv::HvError;
use kiln::hv::Hypervisor;
use kiln::hv::soft::Soft;

#[path = "../support/engine.rs"]
mod engine;

/// The engine that is always present, and may skip nothing.
pub(crate) const SOFT: &str = "soft";

/// An engine.
#[derive(Clone, Debug)]
pub(crate) struct Engine {
    pub(crate) name: &'static str,
    /// The engine, or why this host has none.
    pub(crate) hypervisor: Result<Arc<dyn Hypervisor>, String>,
}

/// All of them.
pub(crate) fn all() -> Vec<Engine> {
    vec![soft(), kvm()]
}

/// A software engine that shares nothing with others.
pub(crate) fn soft() -> Engine {
    Engine { name: SOFT, hypervisor: Ok(Arc::new(Soft::new())) }
}

fn kvm() -> Engine {
    Engine { name: "kvm", hypervisor: engine::kvm().map_err(|error| chain(&error)) }
}

/// An error with what caused it.
pub(crate) fn chain(error: &HvError) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}
