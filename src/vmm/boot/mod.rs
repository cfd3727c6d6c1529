//! Direct boot of an ELF `vmlinux` by the 64-bit Linux boot protocol
//! (`Documentation/arch/x86/boot.rst`): everything that lies in RAM before the first instruction,
//! and the states of the processors at it. No firmware, ACPI or PCI.

pub mod cpio;
mod elf;
mod entry;
pub mod layout;
mod mp_table;
mod params;

pub use elf::ElfError;
pub use params::RNG_SEED_LEN;

use std::io::{Read, Seek};
use std::num::NonZeroU8;

use vm_memory::ReadVolatile;

use crate::hv::state::VcpuState;
use crate::mem::GuestRam;
use crate::units::PAGE_SIZE;

/// What every guest's command line begins with. `reboot=t`: a reboot is a triple fault, which the
/// engine reports as the end. `noreplace-smp`: do not patch thousands of lock prefixes at boot.
pub const BASE_CMDLINE: &str = "console=ttyS0 reboot=t panic=-1 noreplace-smp";

/// Why a guest could not be made ready to boot.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BootError {
    /// The kernel file cannot be used.
    #[error("the guest kernel cannot be loaded")]
    Kernel(#[from] ElfError),
    /// Kernel, initramfs and boot structures do not fit into RAM.
    #[error("the guest's memory is too small for its kernel and initramfs")]
    TooLittleMemory,
    /// The kernel would cut the command line.
    #[error("the command line has {0} bytes, the kernel takes {max}", max = layout::CMDLINE_MAX - 1)]
    CommandLineTooLong(usize),
    /// The command line would end at a NUL.
    #[error("the command line contains a NUL byte")]
    CommandLineNul,
    /// The machine, or its MP table, has no room for so many.
    #[error("{0} vCPUs are more than the machine has room for")]
    TooManyVcpus(u8),
}

/// What to boot, next to the kernel.
#[derive(Debug)]
pub struct BootSpec<'a> {
    /// The command line, whole.
    pub cmdline: &'a str,
    /// The initramfs, possibly empty.
    pub initramfs: &'a [u8],
    /// Processors to announce.
    pub vcpus: NonZeroU8,
    /// Entropy for the kernel's generator. From the host's, except where a test wants it fixed.
    pub rng_seed: [u8; RNG_SEED_LEN],
}

/// Puts kernel, initramfs and boot structures into `ram`, which must be fresh, and returns the states of the processors:
/// the first is that in which the boot processor enters the kernel, the others wait until the kernel calls them.
///
/// # Errors
/// [`BootError`]; `ram` is then of no further use.
pub fn load<F>(ram: &GuestRam, kernel: &mut F, spec: &BootSpec<'_>) -> Result<Vec<VcpuState>, BootError>
where
    F: Read + Seek + ReadVolatile,
{
    if spec.vcpus.get() > layout::MAX_VCPUS {
        return Err(BootError::TooManyVcpus(spec.vcpus.get()));
    }
    let kernel = elf::load(ram, kernel)?;
    let ramdisk = place_initramfs(ram, spec.initramfs, kernel.end.0)?;
    params::write(ram, spec.cmdline, &spec.rng_seed, ramdisk)?;
    mp_table::write(ram, spec.vcpus.get())?;
    let boot = entry::prepare(ram, kernel.entry)?;
    Ok(std::iter::once(boot).chain((1..spec.vcpus.get()).map(VcpuState::after_reset)).collect())
}

/// As high in low RAM as it goes, on a page boundary, so that the kernel need not move it.
fn place_initramfs(ram: &GuestRam, bytes: &[u8], kernel_end: u64) -> Result<params::Ramdisk, BootError> {
    if bytes.is_empty() {
        return Ok(params::Ramdisk::default());
    }
    let size = u32::try_from(bytes.len()).map_err(|_| BootError::TooLittleMemory)?;
    let start = elf::low_ram_end(ram)
        .0
        .checked_sub(u64::from(size))
        .map(|start| start & !(PAGE_SIZE - 1))
        .filter(|start| *start >= kernel_end)
        .ok_or(BootError::TooLittleMemory)?;
    params::put(ram, crate::units::GuestAddr(start), bytes)?;
    // Low RAM ends below 4 GiB, so the start fits.
    Ok(params::Ramdisk { start: start as u32, size })
}
