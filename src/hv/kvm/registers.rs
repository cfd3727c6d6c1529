//! Reading and writing all that the kernel keeps of a vCPU, in the order that it asks for.
#![allow(unsafe_code, reason = "unsafe fence: the kernel is given an XSAVE image of a size that it must not exceed")]

use kvm_bindings::kvm_msr_entry;
use kvm_ioctls::VcpuFd;

use super::failed;
use super::lapic::Page;
use super::state::{MSRS, Native};
use crate::hv::HvError;
use crate::mem::GuestRam;
use crate::units::GuestAddr;

const IA32_TSC_DEADLINE: u32 = 0x6e0;
/// Bytes of `struct pvclock_wall_clock`.
const WALL_CLOCK_BYTES: usize = 12;

/// Everything but time.
pub(super) fn read(fd: &VcpuFd) -> Result<Native, HvError> {
    // First, because asking for it makes the vCPU act on an INIT or a start-up message that has come.
    let mp = fd.get_mp_state().map_err(failed("KVM_GET_MP_STATE"))?;
    Ok(Native {
        mp,
        regs: fd.get_regs().map_err(failed("KVM_GET_REGS"))?,
        sregs: fd.get_sregs().map_err(failed("KVM_GET_SREGS"))?,
        xsave: fd.get_xsave().map_err(failed("KVM_GET_XSAVE"))?,
        debug: fd.get_debug_regs().map_err(failed("KVM_GET_DEBUGREGS"))?,
        lapic: lapic(fd)?,
        msrs: read_msrs(fd, MSRS)?,
        events: fd.get_vcpu_events().map_err(failed("KVM_GET_VCPU_EVENTS"))?,
    })
}

/// Everything but time. The kernel checks much of it; what it refuses is no state.
pub(super) fn write(fd: &VcpuFd, ram: &GuestRam, native: &Native) -> Result<(), HvError> {
    fd.set_mp_state(native.mp).map_err(refused("what the processor waits for", "KVM_SET_MP_STATE"))?;
    fd.set_regs(&native.regs).map_err(refused("general registers", "KVM_SET_REGS"))?;
    fd.set_sregs(&native.sregs).map_err(refused("system registers", "KVM_SET_SREGS"))?;
    // SAFETY: the kernel reads as many bytes as the vCPU's image has. They are at most those of `kvm_xsave`: the image
    // that the vCPU had was read into one, at the latest when it was saved before this, which the kernel refuses of a
    // larger one; and the size is settled when a machine's first vCPU is made.
    unsafe { fd.set_xsave(&native.xsave) }.map_err(refused("x87 and SSE state", "KVM_SET_XSAVE"))?;
    fd.set_debug_regs(&native.debug).map_err(refused("debug registers", "KVM_SET_DEBUGREGS"))?;
    set_lapic(fd, &native.lapic)?;
    if native.lapic.timer_mode().counts() {
        // Once more: when the first makes another mode of the timer's, the kernel forgets the initial count.
        set_lapic(fd, &native.lapic)?;
    }
    restore_msrs(fd, ram, native)?;
    // Last, because others forget what is under way.
    fd.set_vcpu_events(&native.events).map_err(refused("events under way", "KVM_SET_VCPU_EVENTS"))
}

fn refused(what: &'static str, call: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> HvError {
    move |error| if error.errno() == libc::EINVAL { HvError::State(what) } else { failed(call)(error) }
}

/// Writing the wall clock's address makes KVM write the time of day there, which is no part of restoring: memory is as
/// it was saved.
fn restore_msrs(fd: &VcpuFd, ram: &GuestRam, native: &Native) -> Result<(), HvError> {
    let entries: [(u32, u64); MSRS.len()] = std::array::from_fn(|n| (MSRS[n], native.msrs[n]));
    let wall_clock = native.msrs[MSRS.len() - 1];
    let at = ram.offset_of(GuestAddr(wall_clock)).filter(|_| wall_clock != 0);
    let mut bytes = [0; WALL_CLOCK_BYTES];
    let kept = at.and_then(|at| ram.read_bytes(at, &mut bytes));
    let written = write_msrs(fd, &entries);
    if let (Some(at), Some(())) = (at, kept) {
        let words = bytes.as_chunks::<4>().0;
        for (at, word) in (at..).step_by(4).zip(words) {
            // They were just read.
            let _ = ram.store(at, u32::from_le_bytes(*word));
        }
    }
    written
}

/// Writes MSRs, in order.
pub(super) fn write_msrs(fd: &VcpuFd, entries: &[(u32, u64)]) -> Result<(), HvError> {
    let entries: Vec<_> = entries
        .iter()
        .map(|(index, data)| kvm_msr_entry { index: *index, data: *data, ..Default::default() })
        .collect();
    let msrs = msrs(&entries)?;
    match fd.set_msrs(&msrs).map_err(failed("KVM_SET_MSRS"))? {
        all if all == entries.len() => Ok(()),
        first => {
            let index = entries.get(first).map_or(0, |entry| entry.index);
            tracing::debug!(msr = format_args!("{index:#x}"), "an MSR takes no such value");
            Err(HvError::State("an MSR's value"))
        }
    }
}

fn read_msrs<const N: usize>(fd: &VcpuFd, indexes: [u32; N]) -> Result<[u64; N], HvError> {
    let entries = indexes.map(|index| kvm_msr_entry { index, ..Default::default() });
    let mut msrs = msrs(&entries)?;
    if fd.get_msrs(&mut msrs).map_err(failed("KVM_GET_MSRS"))? != N {
        return Err(HvError::Unsupported("an MSR of the state"));
    }
    let read = msrs.as_slice();
    Ok(std::array::from_fn(|n| read[n].data))
}

fn msrs(entries: &[kvm_msr_entry]) -> Result<kvm_bindings::Msrs, HvError> {
    kvm_bindings::Msrs::from_entries(entries).map_err(|_| HvError::Unsupported("so many MSRs"))
}

pub(super) fn lapic(fd: &VcpuFd) -> Result<Page, HvError> {
    fd.get_lapic().map(Page).map_err(failed("KVM_GET_LAPIC"))
}

/// Replaces the registers, and begins a timer that counts anew.
pub(super) fn set_lapic(fd: &VcpuFd, page: &Page) -> Result<(), HvError> {
    fd.set_lapic(&page.0).map_err(refused("local APIC", "KVM_SET_LAPIC"))
}

/// IA32_TSC_DEADLINE: zero unless the timer is armed with it.
pub(super) fn tsc_deadline(fd: &VcpuFd) -> Result<u64, HvError> {
    read_msrs(fd, [IA32_TSC_DEADLINE]).map(|[deadline]| deadline)
}

/// Arms the timer, in the mode for it; of no effect in the others.
pub(super) fn set_tsc_deadline(fd: &VcpuFd, deadline: u64) -> Result<(), HvError> {
    write_msrs(fd, &[(IA32_TSC_DEADLINE, deadline)])
}
