//! The engines there are, and why one of them is not here.

use std::error::Error;
use std::sync::Arc;

use kiln::hv::HvError;
use kiln::hv::Hypervisor;
use kiln::hv::soft::Soft;

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

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
fn kvm() -> Engine {
    let engine = kiln::hv::kvm::Kvm::new().map(|engine| Arc::new(engine) as Arc<dyn Hypervisor>);
    Engine { name: "kvm", hypervisor: engine.map_err(|error| chain(&error)) }
}

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
fn kvm() -> Engine {
    Engine { name: "kvm", hypervisor: Err("KVM is Linux's, and this engine x86-64 only".to_owned()) }
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
