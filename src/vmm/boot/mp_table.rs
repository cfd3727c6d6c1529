//! The MP configuration table (Intel MultiProcessor Specification 1.4, chapter 4).
//!
//! Without ACPI it is how the kernel learns of the processors, the IOAPIC and which interrupt enters
//! at which pin. Every pin is wired as an ISA interrupt (edge, active high) of the same number, which
//! covers the serial port and all virtio-mmio slots.

use vm_memory::{Bytes as _, GuestAddress};

use super::BootError;
use super::layout;
use crate::mem::GuestRam;
use crate::units::GuestAddr;

const SPEC_1_4: u8 = 4;
const APIC_VERSION: u8 = 0x14;
const IOAPIC_VERSION: u8 = 0x11;
const ISA_BUS: u8 = 0;
const POINTER_SIZE: usize = 16;
const HEADER_SIZE: usize = 44;

const ENTRY_PROCESSOR: u8 = 0;
const ENTRY_BUS: u8 = 1;
const ENTRY_IOAPIC: u8 = 2;
const ENTRY_INTERRUPT: u8 = 3;
const ENTRY_LOCAL_INTERRUPT: u8 = 4;

const VECTORED: u8 = 0;
const NMI: u8 = 1;
const EXTINT: u8 = 3;

/// Writes the table for `vcpus` processors into the extended BIOS data area.
pub(super) fn write(ram: &GuestRam, vcpus: u8) -> Result<(), BootError> {
    let at = GuestAddr(layout::EBDA.0 + POINTER_SIZE as u64);
    let table = table(vcpus);
    if at.0 + table.len() as u64 > layout::EBDA_END.0 {
        return Err(BootError::TooManyVcpus(vcpus));
    }
    let put = |at: GuestAddr, bytes: &[u8]| ram.memory().write_slice(bytes, GuestAddress(at.0));
    put(layout::EBDA, &pointer(at)).and_then(|()| put(at, &table)).map_err(|_| BootError::TooLittleMemory)
}

fn pointer(table: GuestAddr) -> [u8; POINTER_SIZE] {
    let mut raw = [0; POINTER_SIZE];
    raw[..4].copy_from_slice(b"_MP_");
    raw[4..8].copy_from_slice(&(table.0 as u32).to_le_bytes());
    raw[8] = 1; // length, in 16-byte units
    raw[9] = SPEC_1_4;
    raw[10] = checksum(&raw);
    raw
}

fn table(vcpus: u8) -> Vec<u8> {
    let mut entries = Vec::new();
    let mut count = 0u16;
    let mut entry = |bytes: &[u8]| {
        entries.extend_from_slice(bytes);
        count += 1;
    };
    let ioapic_id = vcpus;
    for id in 0..vcpus {
        entry(&processor(id));
    }
    entry(&[ENTRY_BUS, ISA_BUS, b'I', b'S', b'A', b' ', b' ', b' ']);
    let ioapic = (layout::IOAPIC.0 as u32).to_le_bytes();
    entry(&[ENTRY_IOAPIC, ioapic_id, IOAPIC_VERSION, 1, ioapic[0], ioapic[1], ioapic[2], ioapic[3]]);
    for pin in 0..layout::IOAPIC_PINS {
        entry(&[ENTRY_INTERRUPT, VECTORED, 0, 0, ISA_BUS, pin, ioapic_id, pin]);
    }
    entry(&[ENTRY_LOCAL_INTERRUPT, EXTINT, 0, 0, ISA_BUS, 0, 0, 0]);
    entry(&[ENTRY_LOCAL_INTERRUPT, NMI, 0, 0, ISA_BUS, 0, 0xff, 1]);

    let mut table = header(entries.len(), count);
    table.extend_from_slice(&entries);
    table[7] = checksum(&table);
    table
}

fn header(entries_len: usize, count: u16) -> Vec<u8> {
    let mut raw = vec![0; HEADER_SIZE];
    raw[..4].copy_from_slice(b"PCMP");
    raw[4..6].copy_from_slice(&((HEADER_SIZE + entries_len) as u16).to_le_bytes());
    raw[6] = SPEC_1_4;
    raw[8..16].copy_from_slice(b"KILN    ");
    raw[16..28].copy_from_slice(b"MICROVM     ");
    raw[34..36].copy_from_slice(&count.to_le_bytes());
    raw[36..40].copy_from_slice(&(layout::LAPIC.0 as u32).to_le_bytes());
    raw
}

fn processor(id: u8) -> [u8; 20] {
    const ENABLED: u8 = 1;
    const BOOT: u8 = 2;
    let mut raw = [0; 20];
    raw[0] = ENTRY_PROCESSOR;
    raw[1] = id;
    raw[2] = APIC_VERSION;
    raw[3] = if id == 0 { ENABLED | BOOT } else { ENABLED };
    raw
}

/// The byte that makes the sum of all bytes zero, for a table whose checksum byte is still zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)).wrapping_neg()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::Bytes;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn a_scan_for_the_pointer_finds_a_table_with_valid_sums() {
        let ram = GuestRam::new(Bytes::mib(1)).unwrap();
        write(&ram, 2).unwrap();
        let mut ebda = [0; 1024];
        ram.read_bytes(layout::EBDA.0, &mut ebda).unwrap();
        assert_eq!(&ebda[..4], b"_MP_");
        assert_eq!(sum(&ebda[..16]), 0);
        let table = &ebda[16..];
        assert_eq!(&table[..4], b"PCMP");
        let len = usize::from(u16::from_le_bytes([table[4], table[5]]));
        assert_eq!(sum(&table[..len]), 0);
    }

    #[test]
    fn entries_walk_to_the_end_and_are_as_many_as_the_header_says() {
        let table = table(3);
        let mut at = HEADER_SIZE;
        let mut kinds = [0u16; 5];
        while at < table.len() {
            kinds[usize::from(table[at])] += 1;
            at += if table[at] == ENTRY_PROCESSOR { 20 } else { 8 };
        }
        assert_eq!(at, table.len());
        assert_eq!(kinds, [3, 1, 1, 24, 2]);
        assert_eq!(u16::from_le_bytes([table[34], table[35]]), kinds.iter().sum::<u16>());
    }

    #[test]
    fn more_processors_than_the_area_holds_are_refused() {
        let ram = GuestRam::new(Bytes::mib(1)).unwrap();
        assert!(matches!(write(&ram, 200), Err(BootError::TooManyVcpus(200))));
    }
}
