//! Writes that wake a device's thread without leaving the kernel (KVM_IOEVENTFD).
#![allow(unsafe_code, reason = "unsafe fence: the request, for which kvm-ioctls wants another crate's descriptor")]

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use kvm_bindings::{KVMIO, kvm_ioeventfd};
use kvm_ioctls::VmFd;
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;
use rustix::ioctl::{Opcode, Setter, ioctl, opcode};

use crate::hv::HvError;
use crate::units::GuestAddr;

const IOEVENTFD: Opcode = opcode::write::<kvm_ioeventfd>(KVMIO as u8, 0x79);

/// An eventfd that counts the writes at `addr`, of whatever length and value. The kernel keeps it for as long as the
/// machine lives.
pub(super) fn on_write(vm: &VmFd, addr: GuestAddr) -> Result<OwnedFd, HvError> {
    let failed = |call| move |error: Errno| HvError::Call { call, source: error.into() };
    let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(failed("eventfd"))?;
    // No length is any length, which on some processors saves the kernel looking at the instruction.
    let request = kvm_ioeventfd { addr: addr.0, len: 0, fd: bell.as_raw_fd(), ..Default::default() };
    // SAFETY: the descriptor is open for as long as `vm` is borrowed.
    let vm = unsafe { BorrowedFd::borrow_raw(vm.as_raw_fd()) };
    // SAFETY: the request takes a `kvm_ioeventfd`, which it reads; the kernel takes a reference to the eventfd of its own.
    unsafe { ioctl(vm, Setter::<IOEVENTFD, kvm_ioeventfd>::new(request)) }.map_err(failed("KVM_IOEVENTFD"))?;
    Ok(bell)
}
