//! A whole machine as plain data, the same under every engine; and why one could not be paused, saved or restored.

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::boot::layout::MAX_VCPUS;
use super::devices::serial::SerialState;
use super::devices::virtio::TransportState;
use super::machine::MachineError;
use crate::hv::HvError;
use crate::hv::state::IrqChipState;
use crate::hv::state::VcpuState;
use crate::mem::RamError;
use crate::units::Bytes;

/// The version of [`MachineState`] that this library writes, and the only one that it restores. It changes with the
/// meaning or the set of the fields, of the states in it, and of the machine's fixed addresses and interrupts.
pub const MACHINE_STATE_VERSION: u32 = 3;

/// A paused machine without its memory. Holds nothing of the host's: not an address, a path or an open file.
///
/// Equal machines give equal states, byte for byte once they are written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineState {
    /// [`MACHINE_STATE_VERSION`].
    pub version: u32,
    /// What the guest's processor is: [`Hypervisor::cpu_profile`](crate::hv::Hypervisor::cpu_profile).
    pub cpu_profile: String,
    /// Size of RAM, from which its layout follows.
    pub memory: Bytes,
    /// The vCPUs, in the order of their ids. The first one's time stamp counter is the machine's time.
    pub vcpus: Vec<VcpuState>,
    /// The interrupt controllers.
    pub irqchip: IrqChipState,
    /// The serial port.
    pub serial: SerialState,
    /// The virtio devices, slot by slot: disks, then sockets, entropy and the balloon.
    pub virtio: Vec<TransportState>,
}

/// Why a machine did not pause. It runs on then, if it has not ended.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PauseError {
    /// The machine has ended.
    #[error("the machine has ended")]
    Ended,
    /// A device's work did not come to its end, as when the host's disk hangs.
    #[error("the machine did not come to rest within {after:?}")]
    TimedOut {
        /// How long it was waited for.
        after: Duration,
    },
}

/// Why a machine's state could not be taken. The machine is as it was.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SaveError {
    /// The machine is not paused.
    #[error("the machine is not paused")]
    NotPaused,
    /// The machine has ended.
    #[error("the machine has ended")]
    Ended,
    /// The engine refused.
    #[error("the engine cannot save the machine")]
    Hv(#[from] HvError),
}

/// Why a machine could not be kept as it is. It goes on as it was, if it has not ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FreezeError {
    /// It did not come to rest.
    #[error(transparent)]
    Pause(#[from] PauseError),
    /// Its state could not be taken.
    #[error(transparent)]
    Save(#[from] SaveError),
    /// Its memory could not be copied.
    #[error("guest memory")]
    Memory(#[from] RamError),
    /// The runtime is shutting down.
    #[error("the runtime is shutting down")]
    Shutdown,
}

/// Why a machine could not be restored. Nothing is left running.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RestoreError {
    /// The state was written by another version of the library.
    #[error("a machine state of version {found}, where {MACHINE_STATE_VERSION} is supported")]
    Version {
        /// The state's version.
        found: u32,
    },
    /// The guest was started on another processor.
    #[error("the guest knows the processor {found:?}, the engine offers {offered:?}")]
    CpuProfile {
        /// The state's profile.
        found: String,
        /// The engine's.
        offered: String,
    },
    /// The memory is not the machine's.
    #[error("{} bytes of memory for a machine that has {}", given.0, wanted.0)]
    Memory {
        /// What the state says.
        wanted: Bytes,
        /// What there was.
        given: Bytes,
    },
    /// A number of processors that this machine model does not have.
    #[error("{found} processors, where 1 to {MAX_VCPUS} are supported")]
    Vcpus {
        /// What the state says.
        found: usize,
    },
    /// A processor's APIC id is not its number, as when two have the same.
    #[error("processor {vcpu} has the APIC id {found}")]
    ApicId {
        /// The processor's number.
        vcpu: u32,
        /// What the state says.
        found: u32,
    },
    /// The machine had another number of devices: of disks, that is.
    #[error("a machine with {wanted} virtio devices, and disks for {given}")]
    Devices {
        /// What the state says.
        wanted: usize,
        /// What the given disks make.
        given: usize,
    },
    /// A device cannot go on from its state.
    #[error("virtio device {slot}: {what}")]
    Device {
        /// The device's slot, from 0.
        slot: usize,
        /// What does not fit.
        what: &'static str,
    },
    /// The serial port cannot go on from its state.
    #[error("the serial port holds more than it has room for")]
    Serial,
    /// A processor cannot be in its state.
    #[error("a processor's state")]
    Vcpu(#[source] Arc<HvError>),
    /// The engine panicked: a defect in it.
    #[error("the engine panicked")]
    EnginePanicked,
    /// The machine could not be built.
    #[error("building the machine")]
    Machine(#[from] MachineError),
}
