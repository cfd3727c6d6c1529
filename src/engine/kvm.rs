//! What is asked of `/dev/kvm` itself, and the engine on it. See Linux, `Documentation/virt/kvm/api.rst`, sections 4.1 and 4.4.
#![cfg_attr(
    target_os = "linux",
    allow(unsafe_code, reason = "unsafe fence: two requests to KVM's device that take and return numbers")
)]

use std::io;
use std::path::Path;
use std::sync::Arc;

use super::KvmDevice;
use crate::hv::HvError;
use crate::hv::Hypervisor;

/// The engine, when it is part of this build and the host lets it open.
pub(super) fn open() -> Result<Arc<dyn Hypervisor>, HvError> {
    Err(HvError::Unsupported("KVM"))
}

/// Opens the device at `path` and asks what it is.
#[cfg(not(target_os = "linux"))]
pub(super) fn examine(_path: &Path) -> io::Result<KvmDevice> {
    Ok(KvmDevice::Absent)
}

/// Opens the device at `path` and asks what it is.
#[cfg(target_os = "linux")]
pub(super) fn examine(path: &Path) -> io::Result<KvmDevice> {
    use rustix::ioctl::{Opcode, ioctl, opcode};

    const GET_API_VERSION: Opcode = opcode::none(0xae, 0x00);
    const CHECK_EXTENSION: Opcode = opcode::none(0xae, 0x03);
    /// `linux/kvm.h`: what a Linux guest on our machine model needs.
    const NEEDED: [(&str, usize); 7] = [
        ("KVM_CAP_IRQCHIP", 0),
        ("KVM_CAP_USER_MEMORY", 3),
        ("KVM_CAP_EXT_CPUID", 7),
        ("KVM_CAP_MP_STATE", 14),
        ("KVM_CAP_XSAVE", 55),
        ("KVM_CAP_GET_TSC_KHZ", 61),
        ("KVM_CAP_IMMEDIATE_EXIT", 136),
    ];

    let device = std::fs::File::options().read(true).write(true).open(path)?;
    // SAFETY: KVM_GET_API_VERSION takes zero and returns a number; no memory of ours is touched. A device that is not
    // KVM and understands the number differently gets no address from us either.
    let api_version = unsafe { ioctl(&device, number::Number::<GET_API_VERSION>(0)) }?;
    let mut missing = Vec::new();
    for (name, extension) in NEEDED {
        // SAFETY: as above; KVM_CHECK_EXTENSION takes a number and returns one.
        let answer = unsafe { ioctl(&device, number::Number::<CHECK_EXTENSION>(extension)) }?;
        if answer == 0 {
            missing.push(name.to_owned());
        }
    }
    Ok(KvmDevice::Open { api_version, missing })
}

#[cfg(target_os = "linux")]
mod number {
    use std::ffi::c_void;

    use rustix::io;
    use rustix::ioctl::{Ioctl, IoctlOutput, Opcode};

    /// A request that takes a number and whose answer is what the call returns.
    pub(super) struct Number<const OPCODE: Opcode>(pub(super) usize);

    // SAFETY: the argument is a number and no pointer, the answer is the call's own value, and nothing is written.
    unsafe impl<const OPCODE: Opcode> Ioctl for Number<OPCODE> {
        type Output = IoctlOutput;
        const IS_MUTATING: bool = false;

        fn opcode(&self) -> Opcode {
            OPCODE
        }

        fn as_ptr(&mut self) -> *mut c_void {
            std::ptr::without_provenance_mut(self.0)
        }

        unsafe fn output_from_ptr(out: IoctlOutput, _: *mut c_void) -> io::Result<IoctlOutput> {
            Ok(out)
        }
    }
}
