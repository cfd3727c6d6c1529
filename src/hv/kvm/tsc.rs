//! The time stamp counter: the host's, and what KVM adds to it for a vCPU
//! (Linux, `Documentation/virt/kvm/devices/vcpu.rst`, KVM_VCPU_TSC_OFFSET; since Linux 5.16).
//!
//! The offset and not the counter itself is what is set, because a vCPU's counter that is set to within a second of what
//! KVM expects is taken for an attempt to synchronise it with the other vCPUs' and not set at all.
#![allow(unsafe_code, reason = "unsafe fence: an attribute that kvm-ioctls does not have, and RDTSC")]

use std::os::fd::{AsRawFd, BorrowedFd};

use kvm_bindings::{KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, kvm_device_attr};
use kvm_ioctls::VcpuFd;
use rustix::io::Errno;
use rustix::ioctl::{Opcode, Setter, ioctl, opcode};

use crate::hv::HvError;

const SET_ATTRIBUTE: Opcode = opcode::write::<kvm_device_attr>(KVMIO as u8, 0xe1);
const GET_ATTRIBUTE: Opcode = opcode::write::<kvm_device_attr>(KVMIO as u8, 0xe2);

/// The host's counter now.
pub(super) fn host() -> u64 {
    // SAFETY: RDTSC is there on every x86-64 processor, and allowed unless somebody forbids it this process (PR_SET_TSC),
    // who then wants it to end by the signal.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// The vCPU's offset.
pub(super) fn offset(vcpu: &VcpuFd) -> Result<u64, HvError> {
    let mut value = 0u64;
    // SAFETY: `value` is eight bytes that are valid for writing, and outlives the call.
    unsafe { request::<GET_ATTRIBUTE>(vcpu, &raw mut value) }.map_err(failed("KVM_GET_DEVICE_ATTR"))?;
    Ok(value)
}

/// Whether an offset does anything. Leaves one behind.
pub(super) fn heeds_offset(vcpu: &VcpuFd) -> Result<bool, HvError> {
    const SOME: u64 = 1 << 40;
    set_offset(vcpu, SOME)?;
    Ok(offset(vcpu)? == SOME)
}

/// Replaces the vCPU's offset.
pub(super) fn set_offset(vcpu: &VcpuFd, mut value: u64) -> Result<(), HvError> {
    // SAFETY: `value` is eight bytes that are valid for reading, and outlives the call.
    unsafe { request::<SET_ATTRIBUTE>(vcpu, &raw mut value) }.map_err(failed("KVM_SET_DEVICE_ATTR"))
}

/// # Safety
/// `value` must be valid for what the request does with it during the call: write or read eight bytes.
unsafe fn request<const REQUEST: Opcode>(vcpu: &VcpuFd, value: *mut u64) -> Result<(), Errno> {
    let attribute =
        kvm_device_attr { flags: 0, group: KVM_VCPU_TSC_CTRL, attr: KVM_VCPU_TSC_OFFSET.into(), addr: value as u64 };
    // SAFETY: the descriptor is open for as long as `vcpu` is borrowed.
    let fd = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
    // SAFETY: both requests take a `kvm_device_attr`, which they read, and reach eight bytes at its `addr`, which is the
    // caller's promise.
    unsafe { ioctl(fd, Setter::<REQUEST, kvm_device_attr>::new(attribute)) }
}

fn failed(call: &'static str) -> impl FnOnce(Errno) -> HvError {
    move |error| HvError::Call { call, source: error.into() }
}
