//! The machine that both processors are: memory map, descriptor tables and control registers.
//!
//! ```text
//!   0x1000 page tables   0x8000 GDT   0x9000 TSS   0xa000 IDT   0xb000 handlers   0xd000 kernel stack
//!   0x10000 code (user)      0x100000 window: 4 pages, unmapped pages on both sides
//!   0x110000 read-only page  0x120000 supervisor page       0x180000 user stack: 2 pages
//! ```
//!
//! Handler n is `out n, al; hlt`: the port number tells which vector was taken, and the frame on the
//! kernel stack tells the rest.

use kiln::mem::GuestRam;

pub(crate) const RAM_BYTES: u64 = 4 << 20;

pub(crate) const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PD: u64 = 0x3000;
const PT: u64 = 0x4000;
pub(crate) const GDT: u64 = 0x8000;
pub(crate) const GDT_LIMIT: u16 = 0x47;
pub(crate) const TSS: u64 = 0x9000;
pub(crate) const TSS_LIMIT: u32 = 0x67;
pub(crate) const IDT: u64 = 0xa000;
pub(crate) const IDT_LIMIT: u16 = 0xfff;
const HANDLERS: u64 = 0xb000;
pub(crate) const KERNEL_STACK_TOP: u64 = 0xe000;

pub(crate) const CODE: u64 = 0x1_0000;
pub(crate) const CODE_BYTES: u64 = 0x1_0000;
pub(crate) const WINDOW: u64 = 0x10_0000;
pub(crate) const WINDOW_BYTES: u64 = 0x4000;
pub(crate) const READ_ONLY: u64 = 0x11_0000;
pub(crate) const SUPERVISOR: u64 = 0x12_0000;
pub(crate) const STACK: u64 = 0x18_0000;
pub(crate) const STACK_BYTES: u64 = 0x2000;
/// The bases of FS and GS.
pub(crate) const FS_BASE: u64 = 0x1000;
pub(crate) const GS_BASE: u64 = 0x2000;

pub(crate) const CR0: u64 = 0x8005_0033;
pub(crate) const CR4: u64 = 0x620;
pub(crate) const EFER: u64 = 0xd01;

pub(crate) const USER_CS: u16 = 0x2b;
pub(crate) const USER_SS: u16 = 0x23;
const KERNEL_CS: u64 = 0x08;
pub(crate) const TSS_SELECTOR: u16 = 0x30;

const PRESENT: u64 = 1;
const WRITABLE: u64 = 2;
const USER: u64 = 4;
const ACCESSED_DIRTY: u64 = 0x60;
const NO_EXECUTE: u64 = 1 << 63;

fn put(ram: &GuestRam, at: u64, value: u64) {
    ram.store(at, value).expect("the machine's tables lie in its RAM");
}

/// Lays out everything but code and data.
pub(crate) fn build(ram: &GuestRam) {
    let table = PRESENT | WRITABLE | USER | ACCESSED_DIRTY;
    put(ram, PML4, PDPT | table);
    put(ram, PDPT, PD | table);
    put(ram, PD, PT | table);
    let map = |from: u64, bytes: u64, flags: u64| {
        for page in (from..from + bytes).step_by(0x1000) {
            // Accessed and dirty from the start, so that both memories stay the same.
            put(ram, PT + page / 0x1000 * 8, page | PRESENT | ACCESSED_DIRTY | flags);
        }
    };
    map(0x1000, 0xf000, WRITABLE);
    map(CODE, CODE_BYTES, USER);
    map(WINDOW, WINDOW_BYTES, WRITABLE | USER | NO_EXECUTE);
    map(READ_ONLY, 0x1000, USER | NO_EXECUTE);
    map(SUPERVISOR, 0x1000, WRITABLE | NO_EXECUTE);
    map(STACK, STACK_BYTES, WRITABLE | USER | NO_EXECUTE);

    for (index, descriptor) in [
        0,
        0x00af_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0,
        0x00cf_f300_0000_ffff,
        0x00af_fb00_0000_ffff,
        // The TSS's descriptor is two entries: base 0x9000, busy.
        u64::from(TSS_LIMIT) | (TSS & 0xff_ffff) << 16 | 0x8b << 40,
        0,
        0,
    ]
    .into_iter()
    .enumerate()
    {
        put(ram, GDT + index as u64 * 8, descriptor);
    }
    put(ram, TSS + 4, KERNEL_STACK_TOP);
    // IST1, which all gates use: a program at privilege level 0 may have any stack pointer.
    put(ram, TSS + 36, KERNEL_STACK_TOP);
    ram.store(TSS + 102, 0x68u16).expect("the TSS lies in RAM");
    for vector in 0..256 {
        let handler = HANDLERS + vector * 16;
        // 64-bit interrupt gate with IST1 and DPL 3.
        put(ram, IDT + vector * 16, handler & 0xffff | KERNEL_CS << 16 | 1 << 32 | 0xee << 40 | (handler >> 16) << 48);
        put(ram, IDT + vector * 16 + 8, 0);
        // out vector, al; hlt; jmp $-2
        ram.store(handler, u64::from_le_bytes([0xe6, vector as u8, 0xf4, 0xeb, 0xfd, 0xcc, 0xcc, 0xcc]))
            .expect("handlers lie in RAM");
    }
}

/// Whether the processor pushes an error code for a vector.
pub(crate) fn has_error_code(vector: u8) -> bool {
    matches!(vector, 8 | 10..=14 | 17 | 21)
}
