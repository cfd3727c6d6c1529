//! A machine's descriptor with its RAM, which are memory slots: one for each piece.
//!
//! A vCPU keeps its machine, and the machine its memory: so that nothing can run in memory that is not there any more.
#![allow(unsafe_code, reason = "unsafe fence: tells KVM where guest memory lies in this process")]

use std::sync::Arc;

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::{VcpuFd, VmFd};
use vm_memory::GuestAddress;
use vm_memory::GuestMemoryBackend as _;

use super::failed;
use crate::hv::HvError;
use crate::mem::GuestRam;

/// Whether the kernel notes which pages are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Logging {
    Off,
    On,
}

/// A machine with its memory.
#[derive(Debug)]
pub(super) struct Guest {
    // Dropped in this order: the machine before the memory it maps.
    vm: VmFd,
    ram: Arc<GuestRam>,
}

/// A vCPU's descriptor.
#[derive(Debug)]
pub(super) struct GuestVcpu {
    // Dropped in this order: nothing can run in the memory once its machine is let go.
    pub(super) fd: VcpuFd,
    _guest: Arc<Guest>,
}

impl Guest {
    /// Gives `vm` its memory.
    pub(super) fn new(vm: VmFd, ram: Arc<GuestRam>) -> Result<Self, HvError> {
        let guest = Self { vm, ram };
        guest.map(Logging::Off)?;
        Ok(guest)
    }

    /// The descriptor, for everything but making vCPUs, which is [`vcpu`](Self::vcpu)'s.
    pub(super) fn vm(&self) -> &VmFd {
        &self.vm
    }

    pub(super) fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// Makes a vCPU.
    pub(super) fn vcpu(self: &Arc<Self>, id: u8) -> Result<GuestVcpu, HvError> {
        let fd = self.vm.create_vcpu(id.into()).map_err(failed("KVM_CREATE_VCPU"))?;
        Ok(GuestVcpu { fd, _guest: Arc::clone(self) })
    }

    /// Registers all of the memory, or changes whether it is watched.
    pub(super) fn map(&self, logging: Logging) -> Result<(), HvError> {
        for (slot, (start, size)) in (0..).zip(self.ram.pieces()) {
            let host = self.ram.memory().get_host_address(GuestAddress(start.0));
            // `pieces` and `memory` are two views of one mapping.
            let host = host.map_err(|_| HvError::State("a piece of RAM that is not mapped"))?;
            let region = kvm_userspace_memory_region {
                slot,
                flags: if logging == Logging::On { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
                guest_phys_addr: start.0,
                memory_size: size.0,
                userspace_addr: host as u64,
            };
            // SAFETY:
            // - the mapping of `ram` is `size` bytes long from `host` (`pieces`), readable and writable;
            // - it lives for as long as a guest can run: a vCPU's descriptor holds `self`, and that the memory;
            // - the guest's accesses are those of another thread to memory that Rust has no references into, which is
            //   what `GuestRam` is made for.
            unsafe { self.vm.set_user_memory_region(region) }.map_err(failed("KVM_SET_USER_MEMORY_REGION"))?;
        }
        Ok(())
    }
}
