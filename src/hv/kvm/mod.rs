//! The KVM engine: guests on the host's processor, by way of `/dev/kvm` (Linux, `Documentation/virt/kvm/api.rst`).
//!
//! ```text
//!   Kvm --create_vm--> KvmVm ---- Shared: VM descriptor, RAM, clock, IOAPIC
//!                        |           |
//!                        |           +-- Slot a vCPU: its descriptor, behind a mutex that a run holds
//!                        +--create_vcpu--> Seed --bind--> KvmVcpu  (its thread)
//!                                            \--kicker--> Kicker   (any thread)
//! ```
//!
//! The local APICs are the kernel's; the IOAPIC is the one that every engine has (a "split" interrupt controller), for
//! the sake of lines that deliver at once. There is neither an 8259A pair nor an 8254 timer: the guests of this machine
//! model have the local APIC's. What only one of the engines needs to know (memory slots, the
//! run structure, the kick's signal, the offset of the time stamp counter) is in files of its own; those with `unsafe`
//! say so in their first lines.
//!
//! **What differs from `soft`.** A vCPU that writes its time stamp counter changes its own and not the machine's. After a
//! restore, a one-shot timer that has expired reads as if it had never been started, because the kernel would let it
//! expire again.

mod clock;
mod dirty;
mod engine;
mod eventfd;
mod irq;
mod kick;
mod lapic;
mod machine;
mod memory;
mod profile;
mod registers;
mod run;
mod signal;
mod state;
mod tsc;
mod vcpu;

pub use engine::{Kvm, Profile};

use std::io;

use super::HvError;

/// What a failed call makes.
fn failed(call: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> HvError {
    move |error| HvError::Call { call, source: io::Error::from_raw_os_error(error.errno()) }
}
