//! The machine: what turns an engine's bare processors into a computer that boots Linux.
//!
//! It owns memory layout, boot, the port and MMIO bus, devices and the vCPU threads. It knows no
//! images, no exec protocol and no particular engine.

mod balloon;
mod board;
pub mod boot;
pub mod bus;
pub mod console;
mod crew;
pub mod devices;
mod freeze;
mod machine;
mod pause;
mod state;
mod vcpu_thread;

pub use balloon::GiveBackError;
pub use freeze::Frozen;
pub use machine::{Machine, MachineConfig, MachineEnd, MachineError};
pub use state::{FreezeError, MACHINE_STATE_VERSION, MachineState, PauseError, RestoreError, SaveError};
