//! Where things lie in a guest's memory.
//!
//! ```text
//!   0x1000 page tables    0x8000 GDT    0x9000 TSSs    0xa000 IDT    0xb000 results
//!   0xc000 trap stubs     0x1_0000 handlers of a case
//!   0x2_0000 code         0x3_0000 code of the second vCPU           0x4_0000 data
//!   0x5_0000 stacks       0x6_0000 stacks of the second vCPU
//!   0x7_0000 user code    0x7_4000 user data     0x7_8000 user stack
//!   0x8_0000 start-up code
//!   0x20_0000 window: 2 MiB that are not mapped until a case does
//!   0x40_0000 everything from here on by 2 MiB pages, past the end of memory too
//! ```
//! Virtual and physical addresses are the same, but for what a case maps itself.

use kiln::units::Bytes;

pub(crate) const RAM: Bytes = Bytes::mib(16);

pub(crate) const PML4: u64 = 0x1000;
pub(crate) const PDPT: u64 = 0x2000;
/// The first GiB's directory.
pub(crate) const DIRECTORY: u64 = 0x3000;
/// Tables of the first and second 2 MiB.
pub(crate) const LOW_TABLE: u64 = 0x4000;
pub(crate) const WINDOW_TABLE: u64 = 0x5000;
/// The directory of the GiB below 4 GiB: the interrupt controllers and a hole.
pub(crate) const HIGH_DIRECTORY: u64 = 0x6000;

pub(crate) const GDT: u64 = 0x8000;
pub(crate) const GDT_LIMIT: u16 = 0x7f;
pub(crate) const TSS: u64 = 0x9000;
pub(crate) const TSS_LIMIT: u16 = 0x67;
pub(crate) const IDT: u64 = 0xa000;
pub(crate) const IDT_LIMIT: u16 = 0xfff;
/// Where cases leave what they found, in quadwords.
pub(crate) const RESULTS: u64 = 0xb000;
pub(crate) const STUBS: u64 = 0xc000;
pub(crate) const STUB_BYTES: u64 = 32;
pub(crate) const HANDLERS: u64 = 0x1_0000;
pub(crate) const HANDLER_BYTES: u64 = 0x400;

pub(crate) const CODE: u64 = 0x2_0000;
pub(crate) const SECOND_CODE: u64 = 0x3_0000;
pub(crate) const DATA: u64 = 0x4_0000;

/// Stacks grow down from here; the second vCPU's lie [`PER_VCPU`] above.
pub(crate) const STACK: u64 = 0x5_8000;
pub(crate) const IST1: u64 = 0x5_a000;
pub(crate) const IST2: u64 = 0x5_c000;
/// The stack of privilege level 0 that a switch from level 3 takes.
pub(crate) const RSP0: u64 = 0x5_e000;
pub(crate) const PER_VCPU: u64 = 0x1_0000;

pub(crate) const USER_CODE: u64 = 0x7_0000;
pub(crate) const USER_DATA: u64 = 0x7_4000;
pub(crate) const USER_STACK: u64 = 0x7_c000;
/// A page below 1 MiB for a start-up message.
pub(crate) const START_UP: u64 = 0x8_0000;

pub(crate) const WINDOW: u64 = 0x20_0000;
/// Physical memory that nothing else uses, for pages of the window.
pub(crate) const FRAMES: u64 = 0x60_0000;
pub(crate) const LARGE: u64 = 0x40_0000;

/// Guest-physical addresses where nothing is: right after memory, and one in the high GiB.
pub(crate) const HOLE: u64 = RAM.0;
pub(crate) const DEVICE: u64 = 0xd000_0000;
pub(crate) const IOAPIC: u64 = 0xfec0_0000;
pub(crate) const LAPIC: u64 = 0xfee0_0000;

// Selectors.
pub(crate) const KERNEL_CS: u16 = 0x08;
pub(crate) const KERNEL_SS: u16 = 0x10;
/// The selector that SYSRET's code and stack selectors are counted from.
pub(crate) const SYSRET_BASE: u16 = 0x1b;
pub(crate) const USER_SS: u16 = 0x23;
pub(crate) const USER_CS: u16 = 0x2b;
pub(crate) const TSS_SELECTOR: u16 = 0x30;
/// A data segment that is not present.
pub(crate) const ABSENT: u16 = 0x58;
/// A second code segment of level 0, and a read-only data segment.
pub(crate) const OTHER_CS: u16 = 0x60;
pub(crate) const READ_ONLY: u16 = 0x68;
/// Past the end of the GDT.
pub(crate) const BEYOND_GDT: u16 = 0x80;

// Page-table entry bits (SDM volume 3A, 4.5.4).
pub(crate) const P: u64 = 1 << 0;
pub(crate) const RW: u64 = 1 << 1;
pub(crate) const US: u64 = 1 << 2;
pub(crate) const PCD: u64 = 1 << 4;
pub(crate) const A: u64 = 1 << 5;
pub(crate) const D: u64 = 1 << 6;
pub(crate) const PS: u64 = 1 << 7;
pub(crate) const G: u64 = 1 << 8;
pub(crate) const NX: u64 = 1 << 63;
