//! Where things lie in guest-physical memory: the machine's fixed addresses, in one place.
//!
//! ```text
//!   0x0500   GDT                       0x9fc00   MP table (extended BIOS data area), up to 0xa0000
//!   0x7000   boot_params               0x100000  kernel, from its ELF headers
//!   0x9000   page tables (3 pages)     ...
//!   0x10000  setup_data                top of low RAM: initramfs, page-aligned
//!   0x20000  command line              0xd0000000  virtio-mmio slots, a page each, in the MMIO hole
//! ```

use crate::units::{Gsi, GuestAddr};

/// Most vCPUs of a machine.
pub const MAX_VCPUS: u8 = 8;

/// The global descriptor table the guest starts with.
pub const GDT: GuestAddr = GuestAddr(0x500);
/// `struct boot_params`, one page.
pub const BOOT_PARAMS: GuestAddr = GuestAddr(0x7000);
/// The first stack; the kernel replaces it before it pushes anything.
pub const STACK_TOP: GuestAddr = GuestAddr(0x8ff0);
/// Top-level page table; two more levels follow, a page each.
pub const PAGE_TABLES: GuestAddr = GuestAddr(0x9000);
/// The list of `setup_data`.
pub const SETUP_DATA: GuestAddr = GuestAddr(0x1_0000);
/// The command line.
pub const CMDLINE: GuestAddr = GuestAddr(0x2_0000);
/// Longest command line with its terminator: the kernel's `COMMAND_LINE_SIZE`.
pub const CMDLINE_MAX: usize = 2048;
/// End of conventional memory, and where the kernel looks for the MP floating pointer.
pub const EBDA: GuestAddr = GuestAddr(0x9_fc00);
/// End of the extended BIOS data area.
pub const EBDA_END: GuestAddr = GuestAddr(0xa_0000);
/// Start of memory above 1 MiB: the lowest address a kernel may be loaded to.
pub const HIGH_MEMORY: GuestAddr = GuestAddr(0x10_0000);

/// Local APIC page.
pub const LAPIC: GuestAddr = GuestAddr(0xfee0_0000);
/// IOAPIC registers; the engine serves them.
pub const IOAPIC: GuestAddr = GuestAddr(0xfec0_0000);
/// Inputs of the IOAPIC.
pub const IOAPIC_PINS: u8 = 24;

/// First port of the serial port.
pub const SERIAL_PORT: u16 = 0x3f8;
/// The serial port's interrupt, as on every PC.
pub const SERIAL_GSI: Gsi = Gsi(4);

/// First virtio-mmio slot.
pub const VIRTIO_MMIO: GuestAddr = GuestAddr(0xd000_0000);
/// Size of a virtio-mmio slot.
pub const VIRTIO_MMIO_SIZE: u64 = 0x1000;
/// The first virtio-mmio slot's interrupt; each slot has its own.
pub const VIRTIO_FIRST_GSI: u32 = 5;
/// Most slots: the pins left on the IOAPIC.
pub const VIRTIO_SLOTS: u32 = IOAPIC_PINS as u32 - VIRTIO_FIRST_GSI;
