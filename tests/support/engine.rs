//! The engine that guests of the tests run on: the software one, whatever this host could do better, unless
//! `cargo xtask test --engine NAME` has set [`VARIABLE`]. Tests of one engine take no notice of it, and the library reads
//! no variables at all.
#![allow(dead_code, unreachable_pub, reason = "each test binary includes this file and uses its part")]

use std::env;
use std::env::VarError;
use std::sync::Arc;

use kiln::engine::Engine;
use kiln::engine::EngineFacts;
use kiln::engine::obstacles;
use kiln::hv::HvError;
use kiln::hv::Hypervisor;
use kiln::hv::soft::Soft;

/// Names the engine.
const VARIABLE: &str = "KILN_TEST_ENGINE";

/// The engine to run guests on.
///
/// # Panics
/// When the engine that was asked for is unknown or cannot be used here: a test that then ran on another one would say
/// nothing about it.
pub fn engine() -> Arc<dyn Hypervisor> {
    match env::var(VARIABLE).as_deref() {
        Err(VarError::NotPresent) | Ok("soft") => Arc::new(Soft::new()),
        // As the library chooses when a program names none.
        Ok("auto") if !obstacles(Engine::Kvm, EngineFacts::of_this_process()).is_empty() => Arc::new(Soft::new()),
        Ok("kvm" | "auto") => {
            kvm().unwrap_or_else(|error| panic!("{VARIABLE} asks for kvm, which is not usable here: {error:?}"))
        }
        other => panic!("{VARIABLE} asks for {other:?}, and there are soft, kvm and auto"),
    }
}

/// The KVM engine.
///
/// # Errors
/// Why this host has none.
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
pub fn kvm() -> Result<Arc<dyn Hypervisor>, HvError> {
    Ok(Arc::new(kiln::hv::kvm::Kvm::new()?))
}

/// The KVM engine, which is not of this system or processor.
///
/// # Errors
/// Always.
#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
pub fn kvm() -> Result<Arc<dyn Hypervisor>, HvError> {
    Err(HvError::Unsupported("KVM on this host"))
}
