//! The KVM engine, through the seam. On a host without a usable `/dev/kvm` each test says that it was not run, and why.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

#[path = "../support/bare.rs"]
mod bare;
#[path = "../support/bare_machine.rs"]
mod bare_machine;
mod interrupts;
mod kicks;
mod machine;
mod rig;
mod running;
mod state;
mod time;
