//! Wires between the guest and threads of this process that need no run of a vCPU to end: KVM_IOEVENTFD and KVM_IRQFD.
#![allow(unsafe_code, reason = "unsafe fence: the requests, for which kvm-ioctls wants another crate's descriptor")]

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use kvm_bindings::{KVMIO, kvm_ioeventfd, kvm_irqfd};
use kvm_ioctls::VmFd;
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;
use rustix::ioctl::{Opcode, Setter, ioctl, opcode};

use crate::hv::HvError;
use crate::units::GuestAddr;

const IRQFD: Opcode = opcode::write::<kvm_irqfd>(KVMIO as u8, 0x76);
const IOEVENTFD: Opcode = opcode::write::<kvm_ioeventfd>(KVMIO as u8, 0x79);

/// An eventfd that counts the writes at `addr`, of whatever length and value. The kernel keeps it for as long as the
/// machine lives.
pub(super) fn on_write(vm: &VmFd, addr: GuestAddr) -> Result<OwnedFd, HvError> {
    let bell = new()?;
    // No length is any length, which on some processors saves the kernel looking at the instruction.
    let request = kvm_ioeventfd { addr: addr.0, len: 0, fd: bell.as_raw_fd(), ..Default::default() };
    // SAFETY: the request takes a `kvm_ioeventfd`, which it reads; the kernel takes a reference to the eventfd of its own.
    unsafe { ioctl(borrow(vm), Setter::<IOEVENTFD, kvm_ioeventfd>::new(request)) }.map_err(failed("KVM_IOEVENTFD"))?;
    Ok(bell)
}

/// An eventfd of which every write raises the line `gsi`, wherever it is routed to by then; until it is closed.
pub(super) fn raising(vm: &VmFd, gsi: u32) -> Result<OwnedFd, HvError> {
    let wire = new()?;
    // Descriptors that are open are not negative.
    let request = kvm_irqfd { fd: wire.as_raw_fd() as u32, gsi, ..Default::default() };
    // SAFETY: the request takes a `kvm_irqfd`, which it reads; the kernel takes a reference to the eventfd of its own.
    unsafe { ioctl(borrow(vm), Setter::<IRQFD, kvm_irqfd>::new(request)) }.map_err(failed("KVM_IRQFD"))?;
    Ok(wire)
}

fn new() -> Result<OwnedFd, HvError> {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(failed("eventfd"))
}

fn borrow(vm: &VmFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open for as long as `vm` is borrowed.
    unsafe { BorrowedFd::borrow_raw(vm.as_raw_fd()) }
}

fn failed(call: &'static str) -> impl FnOnce(Errno) -> HvError {
    move |error| HvError::Call { call, source: error.into() }
}
