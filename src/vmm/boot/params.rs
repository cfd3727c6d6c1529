//! `struct boot_params` and what hangs off it (Linux `Documentation/arch/x86/boot.rst` and
//! `zero-page.rst`): memory map, command line, initramfs, and the random seed in `setup_data`.

use vm_memory::{Bytes as _, GuestAddress};

use super::BootError;
use super::layout;
use crate::mem::GuestRam;
use crate::units::GuestAddr;

/// Bytes of host entropy handed over; the kernel credits them and so has its generator ready before
/// the first user, which otherwise costs a fifth of a boot.
pub const RNG_SEED_LEN: usize = 64;

const BOOT_PARAMS_SIZE: usize = 4096;
const E820_MAX: usize = 128;
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
const SETUP_RNG_SEED: u32 = 9;

/// Offsets within `struct boot_params`.
mod at {
    pub(super) const E820_ENTRIES: usize = 0x1e8;
    pub(super) const BOOT_FLAG: usize = 0x1fe;
    pub(super) const HEADER: usize = 0x202;
    pub(super) const VERSION: usize = 0x206;
    pub(super) const TYPE_OF_LOADER: usize = 0x210;
    pub(super) const LOADFLAGS: usize = 0x211;
    pub(super) const RAMDISK_IMAGE: usize = 0x218;
    pub(super) const RAMDISK_SIZE: usize = 0x21c;
    pub(super) const CMD_LINE_PTR: usize = 0x228;
    pub(super) const KERNEL_ALIGNMENT: usize = 0x230;
    pub(super) const CMDLINE_SIZE: usize = 0x238;
    pub(super) const SETUP_DATA: usize = 0x250;
    pub(super) const E820_TABLE: usize = 0x2d0;
}

/// Where the initramfs was put.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Ramdisk {
    pub(super) start: u32,
    pub(super) size: u32,
}

/// Writes command line, seed and `boot_params`.
pub(super) fn write(
    ram: &GuestRam,
    cmdline: &str,
    seed: &[u8; RNG_SEED_LEN],
    ramdisk: Ramdisk,
) -> Result<(), BootError> {
    if cmdline.len() >= layout::CMDLINE_MAX {
        return Err(BootError::CommandLineTooLong(cmdline.len()));
    }
    if cmdline.contains('\0') {
        return Err(BootError::CommandLineNul);
    }
    let mut terminated = cmdline.as_bytes().to_vec();
    terminated.push(0);
    put(ram, layout::CMDLINE, &terminated)?;
    put(ram, layout::SETUP_DATA, &rng_seed(seed))?;
    put(ram, layout::BOOT_PARAMS, &boot_params(ram, cmdline.len(), ramdisk)?)
}

pub(super) fn put(ram: &GuestRam, at: GuestAddr, bytes: &[u8]) -> Result<(), BootError> {
    ram.memory().write_slice(bytes, GuestAddress(at.0)).map_err(|_| BootError::TooLittleMemory)
}

fn boot_params(ram: &GuestRam, cmdline_len: usize, ramdisk: Ramdisk) -> Result<Vec<u8>, BootError> {
    let mut raw = vec![0; BOOT_PARAMS_SIZE];
    let mut set = |at: usize, bytes: &[u8]| raw[at..at + bytes.len()].copy_from_slice(bytes);
    set(at::BOOT_FLAG, &0xaa55u16.to_le_bytes());
    set(at::HEADER, b"HdrS");
    set(at::VERSION, &0x020fu16.to_le_bytes());
    set(at::TYPE_OF_LOADER, &[0xff]); // a loader without a registered number
    set(at::LOADFLAGS, &[1]); // LOADED_HIGH
    set(at::RAMDISK_IMAGE, &ramdisk.start.to_le_bytes());
    set(at::RAMDISK_SIZE, &ramdisk.size.to_le_bytes());
    set(at::CMD_LINE_PTR, &(layout::CMDLINE.0 as u32).to_le_bytes());
    set(at::KERNEL_ALIGNMENT, &0x0100_0000u32.to_le_bytes());
    set(at::CMDLINE_SIZE, &(cmdline_len as u32).to_le_bytes());
    set(at::SETUP_DATA, &layout::SETUP_DATA.0.to_le_bytes());

    let map = e820(ram);
    if map.len() > E820_MAX {
        return Err(BootError::TooLittleMemory);
    }
    set(at::E820_ENTRIES, &[map.len() as u8]);
    for (n, (start, end, kind)) in map.into_iter().enumerate() {
        let entry = at::E820_TABLE + n * 20;
        set(entry, &start.to_le_bytes());
        set(entry + 8, &(end - start).to_le_bytes());
        set(entry + 16, &kind.to_le_bytes());
    }
    Ok(raw)
}

/// The memory map: start, end, type.
fn e820(ram: &GuestRam) -> Vec<(u64, u64, u32)> {
    let mut map = vec![(0, layout::EBDA.0, E820_RAM), (layout::EBDA.0, layout::EBDA_END.0, E820_RESERVED)];
    for (start, size) in ram.pieces() {
        let end = start.0 + size.0;
        let start = start.0.max(layout::HIGH_MEMORY.0);
        if start < end {
            map.push((start, end, E820_RAM));
        }
    }
    map
}

/// `struct setup_data { u64 next; u32 type; u32 len; u8 data[] }`; the kernel wipes it after use.
fn rng_seed(seed: &[u8; RNG_SEED_LEN]) -> Vec<u8> {
    let mut raw = 0u64.to_le_bytes().to_vec();
    raw.extend_from_slice(&SETUP_RNG_SEED.to_le_bytes());
    raw.extend_from_slice(&(RNG_SEED_LEN as u32).to_le_bytes());
    raw.extend_from_slice(seed);
    raw
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mem::HOLE_END;
    use crate::units::Bytes;

    #[test]
    fn the_memory_map_is_ram_without_the_legacy_area_and_the_hole() {
        let ram = GuestRam::new(Bytes::gib(4)).unwrap();
        let gib = Bytes::gib(1).0;
        assert_eq!(
            e820(&ram),
            [
                (0, 0x9_fc00, E820_RAM),
                (0x9_fc00, 0xa_0000, E820_RESERVED),
                (0x10_0000, 3 * gib, E820_RAM),
                (HOLE_END.0, 5 * gib, E820_RAM)
            ]
        );
    }

    #[test]
    fn a_command_line_the_kernel_would_cut_is_refused() {
        let ram = GuestRam::new(Bytes::mib(2)).unwrap();
        let write = |line: &str| write(&ram, line, &[7; RNG_SEED_LEN], Ramdisk::default());
        assert!(matches!(write(&"x".repeat(2048)), Err(BootError::CommandLineTooLong(2048))));
        assert!(matches!(write("a\0b"), Err(BootError::CommandLineNul)));
        write(&"x".repeat(2047)).unwrap();
        assert_eq!(ram.load::<u8>(layout::CMDLINE.0 + 2047), Some(0));
    }

    #[test]
    fn boot_params_lead_to_seed_and_command_line() {
        let ram = GuestRam::new(Bytes::mib(2)).unwrap();
        write(&ram, "quiet", &[7; RNG_SEED_LEN], Ramdisk { start: 0x10_0000, size: 5 }).unwrap();
        let base = layout::BOOT_PARAMS.0;
        assert_eq!(ram.load::<u32>(base + 0x202), Some(u32::from_le_bytes(*b"HdrS")));
        let data = ram.load::<u64>(base + 0x250).unwrap();
        assert_eq!(ram.load::<u32>(data + 8), Some(SETUP_RNG_SEED));
        assert_eq!(ram.load::<u64>(data + 16), Some(0x0707_0707_0707_0707));
        let line = u64::from(ram.load::<u32>(base + 0x228).unwrap());
        assert_eq!(ram.load::<u32>(line), Some(u32::from_le_bytes(*b"quie")));
    }
}
