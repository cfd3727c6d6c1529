//! Entering the guest, and the structure in which the kernel says why it left (`struct kvm_run`).
//!
//! kvm-ioctls maps the structure too. This is a mapping of our own, for two reasons: other threads set `immediate_exit`
//! in it, and the accesses of a string instruction need the size of one, which kvm-ioctls does not tell.
#![allow(unsafe_code, reason = "unsafe fence: the structure that is shared with the kernel")]

use std::io;
use std::mem::offset_of;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::{NonNull, addr_of};
use std::slice;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use kvm_bindings::{
    KVM_EXIT_FAIL_ENTRY, KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_INTR, KVM_EXIT_IO, KVM_EXIT_IO_IN, KVM_EXIT_IOAPIC_EOI,
    KVM_EXIT_MMIO, KVM_EXIT_SHUTDOWN, KVM_INTERNAL_ERROR_EMULATION,
    KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES, kvm_run,
};
use kvm_ioctls::VcpuFd;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use super::failed;
use super::memory::GuestVcpu;
use crate::hv::HvError;

/// Why the guest was left.
#[derive(Debug)]
pub(super) enum Left<'a> {
    /// By a signal, or at once.
    Interrupted,
    /// Reads from a port: of `size` bytes each, as many as fit.
    In { port: u16, size: usize, data: &'a mut [u8] },
    /// Writes to a port.
    Out { port: u16, size: usize, data: &'a [u8] },
    /// A read of memory that is not RAM.
    Read { addr: u64, data: &'a mut [u8] },
    /// A write to it.
    Write { addr: u64, data: &'a [u8] },
    /// The guest has ended a level interrupt with this vector.
    Ended { vector: u8 },
    /// A triple fault.
    Shutdown,
    /// The processor does not enter the guest.
    Refused(u64),
    /// The kernel cannot emulate an instruction; its bytes, if the kernel tells.
    Unimplemented(Vec<u8>),
    /// The kernel gave up, with its number for why.
    GaveUp(u32),
    /// Something that this engine has not asked for.
    Unknown(u32),
}

/// The mapping.
#[derive(Debug)]
pub(super) struct RunPage {
    base: NonNull<kvm_run>,
    len: usize,
}

// SAFETY: the mapping is memory that any thread may reach. Other threads than the vCPU's touch one byte of it, and that
// by atomic access (`set_immediate_exit`); everything else is reached through `Run`, exclusively.
unsafe impl Send for RunPage {}
// SAFETY: as for Send.
unsafe impl Sync for RunPage {}

impl Drop for RunPage {
    fn drop(&mut self) {
        // SAFETY: `base` and `len` are what `mmap` returned and was given, and nobody else unmaps them. Slices of it
        // borrow the `Run` that holds it.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), self.len) };
    }
}

impl RunPage {
    fn map(fd: &VcpuFd, len: usize) -> Result<Self, HvError> {
        let unmapped = |source| HvError::Call { call: "mmap of a vCPU", source };
        if len < size_of::<kvm_run>() {
            return Err(unmapped(io::ErrorKind::InvalidData.into()));
        }
        // SAFETY: the descriptor is open for as long as `fd` is borrowed.
        let fd = unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) };
        // SAFETY: a fresh mapping at an address of the kernel's choice aliases nothing of this process. It is the
        // structure that the kernel writes while the vCPU runs, `len` bytes of it as KVM_GET_VCPU_MMAP_SIZE says.
        let base =
            unsafe { mmap(std::ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, fd, 0) }
                .map_err(|error| unmapped(error.into()))?;
        let base = NonNull::new(base.cast()).ok_or_else(|| unmapped(io::ErrorKind::OutOfMemory.into()))?;
        Ok(Self { base, len })
    }

    /// Whether the vCPU shall leave the kernel before it enters the guest.
    pub(super) fn set_immediate_exit(&self, exit: bool) {
        // SAFETY: the field lies in the mapping (`map` checked its length).
        let at = unsafe { self.base.as_ptr().cast::<u8>().add(offset_of!(kvm_run, immediate_exit)) };
        // SAFETY: the byte is valid for as long as `self`, aligned as any byte is, and nobody on this side accesses it
        // but by this function.
        unsafe { AtomicU8::from_ptr(at) }.store(u8::from(exit), Ordering::SeqCst);
    }
}

/// A vCPU's descriptor with its run structure.
#[derive(Debug)]
pub(super) struct Run {
    vcpu: GuestVcpu,
    page: Arc<RunPage>,
}

impl Run {
    /// # Errors
    /// [`HvError::Call`] when the host refuses the mapping.
    pub(super) fn new(vcpu: GuestVcpu, run_size: usize) -> Result<Self, HvError> {
        let page = Arc::new(RunPage::map(&vcpu.fd, run_size)?);
        Ok(Self { vcpu, page })
    }

    /// The descriptor, for everything but running.
    pub(super) fn fd(&self) -> &VcpuFd {
        &self.vcpu.fd
    }

    pub(super) fn page(&self) -> &Arc<RunPage> {
        &self.page
    }

    /// Runs the guest until it leaves; what it asks for is answered in the slices of the answer, before the next call.
    ///
    /// # Errors
    /// [`HvError::Call`] when the host refuses.
    pub(super) fn enter(&mut self) -> Result<Left<'_>, HvError> {
        match self.vcpu.fd.run().map(drop) {
            Ok(()) => self.left(),
            // EAGAIN: a vCPU that waits for INIT has been woken, and may have something to do.
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => Ok(Left::Interrupted),
            Err(error) => Err(failed("KVM_RUN")(error)),
        }
    }

    fn left(&mut self) -> Result<Left<'_>, HvError> {
        let run = self.page.base.as_ptr();
        // SAFETY: the field lies in the mapping; the kernel writes it during KVM_RUN only, which needs `&mut self`.
        let reason = unsafe { addr_of!((*run).exit_reason).read_volatile() };
        Ok(match reason {
            KVM_EXIT_INTR => Left::Interrupted,
            KVM_EXIT_IO => return self.port(),
            KVM_EXIT_MMIO => return self.mmio(),
            KVM_EXIT_IOAPIC_EOI => {
                // SAFETY: as above; the reason says that this member of the union was written.
                let ended = unsafe { addr_of!((*run).__bindgen_anon_1.eoi).read_volatile() };
                Left::Ended { vector: ended.vector }
            }
            KVM_EXIT_SHUTDOWN => Left::Shutdown,
            KVM_EXIT_FAIL_ENTRY => {
                // SAFETY: as above; the reason says that this member of the union was written.
                let entry = unsafe { addr_of!((*run).__bindgen_anon_1.fail_entry).read_volatile() };
                Left::Refused(entry.hardware_entry_failure_reason)
            }
            KVM_EXIT_INTERNAL_ERROR => {
                // SAFETY: as above.
                let error = unsafe { addr_of!((*run).__bindgen_anon_1.internal).read_volatile() };
                match error.suberror {
                    KVM_INTERNAL_ERROR_EMULATION => Left::Unimplemented(instruction(error.ndata, &error.data)),
                    other => Left::GaveUp(other),
                }
            }
            other => Left::Unknown(other),
        })
    }

    fn port(&mut self) -> Result<Left<'_>, HvError> {
        // SAFETY: the field lies in the mapping, the kernel writes it during KVM_RUN only, and the reason was that this
        // member of the union was written.
        let io = unsafe { addr_of!((*self.page.base.as_ptr()).__bindgen_anon_1.io).read_volatile() };
        let (size, offset) = (usize::from(io.size), io.data_offset as usize);
        let len = size * io.count as usize;
        if !matches!(size, 1 | 2 | 4) || offset.checked_add(len).is_none_or(|end| end > self.page.len) {
            return Err(HvError::Call { call: "KVM_RUN", source: io::ErrorKind::InvalidData.into() });
        }
        // SAFETY: offset + len <= the mapping's length was just checked.
        let at = unsafe { self.page.base.as_ptr().cast::<u8>().add(offset) };
        // SAFETY: the bytes lie in the mapping, which lives for as long as `self`; the kernel reaches them during KVM_RUN
        // only, and this side through `&mut self` only, which the slice borrows.
        let data = unsafe { slice::from_raw_parts_mut(at, len) };
        Ok(if u32::from(io.direction) == KVM_EXIT_IO_IN {
            Left::In { port: io.port, size, data }
        } else {
            Left::Out { port: io.port, size, data }
        })
    }

    fn mmio(&mut self) -> Result<Left<'_>, HvError> {
        // SAFETY: the member lies in the mapping; the kernel reaches it during KVM_RUN only, and this side through
        // `&mut self` only, which the reference borrows (the byte that other threads write is not in it). The reason was
        // that this member of the union was written, and any bytes are a value of it.
        let mmio = unsafe { &mut (*self.page.base.as_ptr()).__bindgen_anon_1.mmio };
        let addr = mmio.phys_addr;
        let data = mmio.data.get_mut(..mmio.len as usize).filter(|data| !data.is_empty());
        let data = data.ok_or_else(|| HvError::Call { call: "KVM_RUN", source: io::ErrorKind::InvalidData.into() })?;
        Ok(if mmio.is_write != 0 { Left::Write { addr, data } } else { Left::Read { addr, data } })
    }
}

/// The bytes of an instruction that could not be emulated: flags, then a length and at most 15 bytes.
fn instruction(words: u32, data: &[u64; 16]) -> Vec<u8> {
    if words < 3 || data[0] & u64::from(KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES) == 0 {
        return Vec::new();
    }
    let bytes: Vec<u8> = data[1..3].iter().flat_map(|word| word.to_le_bytes()).collect();
    bytes[1..].iter().take(bytes[0].into()).copied().collect()
}
