//! The state the 64-bit boot protocol enters the kernel in: long mode with the first GiB mapped to
//! itself, flat segments `__BOOT_CS` 0x10 and `__BOOT_DS` 0x18, interrupts off, RSI at `boot_params`.

use super::BootError;
use super::layout;
use super::params::put;
use crate::hv::state::VcpuState;
use crate::hv::state::x86_64::Msrs;
use crate::hv::state::x86_64::Segment;
use crate::hv::state::x86_64::Table;
use crate::mem::GuestRam;
use crate::units::{GuestAddr, PAGE_SIZE};

const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
/// Execute/read, accessed, ring 0, present, long mode, 4 KiB granularity.
const CODE_ATTRIBUTES: u16 = 0xa09b;
/// Read/write, accessed, ring 0, present, 32-bit, 4 KiB granularity.
const DATA_ATTRIBUTES: u16 = 0xc093;
/// Busy 64-bit TSS, present.
const TSS_ATTRIBUTES: u16 = 0x008b;

/// PE, MP, ET, NE, WP, AM, PG.
const CR0: u64 = 0x8005_0033;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME_LMA: u64 = 1 << 8 | 1 << 10;

const PRESENT_WRITABLE: u64 = 0b11;
const LARGE_PAGE: u64 = 1 << 7;
const LARGE_PAGE_SIZE: u64 = 2 << 20;

/// Index of RSP and RSI in `VcpuState::gpr`.
const RSP: usize = 4;
const RSI: usize = 6;

/// Writes GDT and page tables, and returns the boot processor's state at `entry`.
pub(super) fn prepare(ram: &GuestRam, entry: GuestAddr) -> Result<VcpuState, BootError> {
    put(ram, layout::GDT, &gdt())?;
    put(ram, layout::PAGE_TABLES, &page_tables())?;

    let code = flat(CODE_SELECTOR, CODE_ATTRIBUTES);
    let data = flat(DATA_SELECTOR, DATA_ATTRIBUTES);
    let mut gpr = [0; 16];
    gpr[RSP] = layout::STACK_TOP.0;
    gpr[RSI] = layout::BOOT_PARAMS.0;
    let reset = VcpuState::after_reset(0);
    Ok(VcpuState {
        gpr,
        rip: entry.0,
        cr0: CR0,
        cr3: layout::PAGE_TABLES.0,
        cr4: CR4_PAE,
        segments: [data, code, data, data, data, data],
        ldtr: Segment { unusable: true, ..Segment::default() },
        tr: Segment { limit: 0x67, attributes: TSS_ATTRIBUTES, ..Segment::default() },
        gdtr: Table { base: layout::GDT.0, limit: (gdt().len() - 1) as u16 },
        idtr: Table { base: 0, limit: 0 },
        msrs: Msrs { efer: EFER_LME_LMA, ..reset.msrs },
        ..reset
    })
}

fn flat(selector: u16, attributes: u16) -> Segment {
    Segment { selector, base: 0, limit: u32::MAX, attributes, unusable: false }
}

fn gdt() -> Vec<u8> {
    // Limit 0xfffff in the two limit fields; attributes sit at bit 40 as they do in the state.
    let descriptor = |attributes: u16| u64::from(attributes) << 40 | 0xf << 48 | 0xffff;
    [0, 0, descriptor(CODE_ATTRIBUTES), descriptor(DATA_ATTRIBUTES)]
        .iter()
        .flat_map(|d: &u64| d.to_le_bytes())
        .collect()
}

/// The first GiB, each address mapped to itself, by 2 MiB pages: three tables in a row.
fn page_tables() -> Vec<u8> {
    let next = |n: u64| (layout::PAGE_TABLES.0 + n * PAGE_SIZE) | PRESENT_WRITABLE;
    let mut tables = vec![0u64; 3 * 512];
    tables[0] = next(1);
    tables[512] = next(2);
    for n in 0..512 {
        tables[1024 + n] = (n as u64 * LARGE_PAGE_SIZE) | PRESENT_WRITABLE | LARGE_PAGE;
    }
    tables.iter().flat_map(|entry| entry.to_le_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::Bytes;

    #[test]
    fn page_tables_map_the_first_gib_to_itself() {
        let ram = GuestRam::new(Bytes::mib(2)).unwrap();
        let state = prepare(&ram, GuestAddr(0x10_0000)).unwrap();
        for va in [0, 0x7000, 0x10_0000, 0x0123_4567, 0x3fff_ffff] {
            let entry = |table: u64, index: u64| ram.load::<u64>((table & !0xfff) + index * 8).unwrap();
            let pdpt = entry(state.cr3, va >> 39 & 511);
            let pd = entry(pdpt, va >> 30 & 511);
            let page = entry(pd, va >> 21 & 511);
            assert_eq!(page & 0x83, 0x83);
            assert_eq!((page & !0x1f_ffff) | (va & 0x1f_ffff), va);
        }
    }

    #[test]
    fn descriptors_in_memory_agree_with_the_hidden_parts() {
        let ram = GuestRam::new(Bytes::mib(2)).unwrap();
        let state = prepare(&ram, GuestAddr(0x10_0000)).unwrap();
        for segment in state.segments {
            let raw = ram.load::<u64>(state.gdtr.base + u64::from(segment.selector)).unwrap();
            assert_eq!((raw >> 40) as u16 & 0xf0ff, segment.attributes);
            let limit = raw & 0xffff | (raw >> 32) & 0xf_0000;
            assert_eq!((limit << 12 | 0xfff) as u32, segment.limit);
        }
    }
}
