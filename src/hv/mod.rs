//! The hypervisor seam: what a virtual machine needs of the engine that runs its processors.
//!
//! ```text
//!   Hypervisor --create_vm--> HvVm --create_vcpu--> VcpuSeed --bind, on its thread--> Vcpu --run--> Exit
//!                              |                       |
//!                              +--irq_line--> IrqLine  +--kicker--> Kick      (any thread)
//! ```
//!
//! Engines never look up: they know RAM and an [`IoHandler`], not devices. Port and MMIO accesses are
//! served in place through the handler, so [`Exit`] carries only what ends a run.

mod ioapic;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
pub mod kvm;
mod profile;
pub mod soft;
pub mod state;

use std::fmt::Debug;
use std::io;
use std::num::NonZeroU8;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::mem::GuestRam;
use crate::mem::PageSet;
use crate::units::{Gsi, GuestAddr, VcpuId};
use state::IrqChipState;
use state::VcpuState;

/// What an engine could not do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HvError {
    /// This host cannot run the engine.
    #[error("hypervisor unavailable")]
    Unavailable(#[source] io::Error),
    /// The engine does not support the operation.
    #[error("{0} is not supported by this engine")]
    Unsupported(&'static str),
    /// A call to the host failed.
    #[error("{call} failed")]
    Call {
        /// The call that failed.
        call: &'static str,
        /// The host's error.
        #[source]
        source: io::Error,
    },
    /// The guest executed something that the engine knows it cannot do. Never a wrong result instead.
    #[error("the processor cannot execute {bytes:02x?} at {rip:#x}: {what}")]
    Unimplemented {
        /// Virtual address of the instruction.
        rip: u64,
        /// Its bytes, at most 15.
        bytes: Vec<u8>,
        /// What about it is missing.
        what: &'static str,
    },
    /// The host's hypervisor or processor lacks what the engine needs.
    #[error("this host lacks {}", .what.join(", "))]
    Missing {
        /// All that is missing, by the names that manuals use.
        what: Vec<&'static str>,
    },
    /// The host's processor refused to enter the guest in the state that it is in.
    #[error("the host's processor does not enter the guest's state: {reason:#x}")]
    Entry {
        /// The processor's own reason (Intel SDM volume 3C, appendix C; AMD APM volume 2, appendix C).
        reason: u64,
    },
    /// A saved or initial state that no processor can be in.
    #[error("invalid processor state: {0}")]
    State(&'static str),
}

/// What to build: the shape of a virtual machine.
#[derive(Clone, Debug)]
pub struct VmSpec {
    /// How many vCPUs.
    pub vcpus: NonZeroU8,
}

/// A reading of a guest's time stamp counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TimeStamp {
    /// What it shows.
    pub ticks: u64,
    /// Its ticks in a second.
    pub hz: u64,
}

/// Why [`Vcpu::run`] returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Exit {
    /// A [`Kick`] arrived.
    Kicked,
    /// The guest is gone for good: a triple fault.
    Shutdown,
}

/// An engine.
pub trait Hypervisor: Debug + Send + Sync {
    /// Makes a virtual machine over `ram`.
    ///
    /// # Errors
    /// [`HvError`] when the host refuses or the spec asks for what the engine does not have.
    fn create_vm(&self, spec: &VmSpec, ram: Arc<GuestRam>) -> Result<Box<dyn HvVm>, HvError>;

    /// What processor the guest sees, by name. A saved machine goes on only under the name that it was saved under:
    /// a guest looks once at what its processor can do and then relies on it.
    fn cpu_profile(&self) -> &str {
        "unnamed"
    }
}

/// One virtual machine: its interrupt controllers and the source of its vCPUs.
pub trait HvVm: Debug + Send + Sync {
    /// Makes a vCPU, once an id.
    ///
    /// # Errors
    /// [`HvError::Unsupported`] for an id outside the spec or made before.
    fn create_vcpu(&self, id: VcpuId) -> Result<Box<dyn VcpuSeed>, HvError>;

    /// The line into the interrupt controller with number `gsi`.
    ///
    /// # Errors
    /// [`HvError::Unsupported`] for a number the controller does not have.
    fn irq_line(&self, gsi: Gsi) -> Result<Arc<dyn IrqLine>, HvError>;

    /// A file that becomes readable when a vCPU writes at `addr`, which is memory without RAM; from then on no
    /// [`IoHandler`] sees the write, and the vCPU does not wait for anybody. Reading takes eight bytes, a count. For
    /// registers of which only that they are written matters. Once an address. `None` by an engine that has no such
    /// thing: the handler sees the writes then.
    ///
    /// # Errors
    /// [`HvError`] when the host refuses.
    fn doorbell(&self, _addr: GuestAddr) -> Result<Option<OwnedFd>, HvError> {
        Ok(None)
    }

    /// The state of the interrupt controllers, while no vCPU runs and no line changes.
    ///
    /// # Errors
    /// [`HvError::Unsupported`] by an engine that cannot save machines.
    fn save_irqchip(&self) -> Result<IrqChipState, HvError> {
        Err(HvError::Unsupported("saving the interrupt controllers"))
    }

    /// Replaces the state of the interrupt controllers, while no vCPU runs and no line changes, and after the vCPUs have
    /// theirs: a line that asks is served at once. Bits that the hardware does not have are dropped.
    ///
    /// # Errors
    /// [`HvError::Unsupported`] by an engine that cannot restore machines.
    fn restore_irqchip(&self, _state: &IrqChipState) -> Result<(), HvError> {
        Err(HvError::Unsupported("restoring the interrupt controllers"))
    }

    /// Makes the guest's time stand still: the time stamp counter, and with it the paravirtual clock and all timers.
    /// Called when no vCPU runs. Idempotent.
    ///
    /// An engine that cannot do it lets time run on, and the guest sees a pause as time in which it was not scheduled.
    fn stop_time(&self) {}

    /// Lets time go on from where it stood, without a jump. Idempotent.
    fn start_time(&self) {}

    /// The guest's time stamp counter now, the same on all vCPUs; `None` by an engine that cannot tell while the guest
    /// runs.
    fn time_stamp(&self) -> Option<TimeStamp> {
        None
    }

    /// Begins to note which pages the vCPUs write, from now on; what was noted before is forgotten. Called when no vCPU
    /// runs. What devices write goes through memory's own view and is not in this log.
    ///
    /// # Errors
    /// [`HvError`] by an engine that keeps no log, or when the host refuses.
    fn start_dirty_log(&self) -> Result<(), HvError> {
        Err(HvError::Unsupported("a log of written pages"))
    }

    /// The pages that vCPUs have written since the log was begun or last taken. May be called while vCPUs run: a write
    /// is then in this log or in the next, never in none.
    ///
    /// # Errors
    /// [`HvError`] when no log is kept, or the host refuses.
    fn take_dirty_log(&self) -> Result<PageSet, HvError> {
        Err(HvError::Unsupported("a log of written pages"))
    }

    /// Ends the log, and what it costs. Called when no vCPU runs. Idempotent.
    ///
    /// # Errors
    /// [`HvError`] when the host refuses.
    fn stop_dirty_log(&self) -> Result<(), HvError> {
        Ok(())
    }
}

/// A vCPU that has not met its thread yet.
pub trait VcpuSeed: Debug + Send {
    /// Usable before [`bind`](Self::bind): an early kick is remembered and ends the first run.
    fn kicker(&self) -> Arc<dyn Kick>;

    /// Binds the vCPU to the current thread, with the handler that serves its port and MMIO accesses.
    ///
    /// # Errors
    /// [`HvError`] when the host refuses.
    fn bind(self: Box<Self>, io: Box<dyn IoHandler>) -> Result<Box<dyn Vcpu>, HvError>;
}

/// A vCPU bound to the current thread; not `Send`, on purpose.
///
/// ```compile_fail,E0277
/// fn send<T: ?Sized + Send>() {}
/// send::<dyn kiln::hv::Vcpu>();
/// ```
pub trait Vcpu: Debug {
    /// Runs guest code until something ends it. An idle guest sleeps inside this call.
    ///
    /// # Errors
    /// [`HvError::Unimplemented`] when the guest meets a limit of the engine; the state is then that
    /// before the instruction.
    fn run(&mut self) -> Result<Exit, HvError>;

    /// The processor's state, between two instructions.
    ///
    /// # Errors
    /// [`HvError`] when the host refuses.
    fn save(&mut self) -> Result<VcpuState, HvError>;

    /// Replaces the processor's state.
    ///
    /// # Errors
    /// [`HvError::State`] when no processor can be in it; the old state then stands.
    fn restore(&mut self, state: &VcpuState) -> Result<(), HvError>;
}

/// Makes a running vCPU return [`Exit::Kicked`] soon, also out of a halt. Idempotent, from any thread.
pub trait Kick: Debug + Send + Sync {
    /// Kicks.
    fn kick(&self);
}

/// Serves a vCPU's port and MMIO accesses in place. `data` is 1, 2, 4 or 8 bytes, little endian.
///
/// Reads of nothing should fill `data` with `0xff`, as a bus without a device does.
pub trait IoHandler: Debug {
    /// A read of guest-physical memory that is not RAM.
    fn mmio_read(&mut self, addr: GuestAddr, data: &mut [u8]);
    /// A write to guest-physical memory that is not RAM.
    fn mmio_write(&mut self, addr: GuestAddr, data: &[u8]);
    /// An `in` from a port.
    fn pio_in(&mut self, port: u16, data: &mut [u8]);
    /// An `out` to a port.
    fn pio_out(&mut self, port: u16, data: &[u8]);
}

/// A line into the interrupt controller; devices see this and no engine.
pub trait IrqLine: Debug + Send + Sync {
    /// Signals an edge.
    fn raise(&self);
    /// Sets the level, for lines the guest has programmed as level-triggered.
    fn set_level(&self, high: bool);
}
