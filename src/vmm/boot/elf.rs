//! Loads an ELF64 `vmlinux` (System V ABI, "Object Files"; x86-64 supplement) into guest RAM.
//!
//! The file is not trusted: every address and length is checked before it is used, and segment
//! contents go from the file to RAM without a copy in between. Segments go to their *physical*
//! address, as the kernel's own entry code expects. Sections, symbols and relocations are ignored.

use std::io::{self, Read, Seek, SeekFrom};

use vm_memory::{Bytes as _, GuestAddress, ReadVolatile};

use super::layout;
use crate::mem::GuestRam;
use crate::units::GuestAddr;

const HEADER_SIZE: usize = 64;
const PROGRAM_HEADER_SIZE: usize = 56;
/// More than any kernel has (five); bounds what a hostile file makes us read.
const MAX_PROGRAM_HEADERS: u16 = 64;
const ET_EXEC: u16 = 2;
const EM_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;

/// Why a kernel could not be loaded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ElfError {
    /// The file does not begin as an ELF file does.
    #[error("the kernel is not an ELF file (a bzImage must be given as its vmlinux)")]
    NotElf,
    /// An ELF file, but not a 64-bit little-endian x86-64 executable.
    #[error("the kernel is an ELF file, but not a 64-bit x86-64 executable: {0}")]
    Unsuitable(&'static str),
    /// Its headers contradict each other or the file.
    #[error("the kernel's ELF headers are malformed: {0}")]
    Malformed(&'static str),
    /// A segment does not fit into the guest's RAM.
    #[error("the kernel's segment at {start}, {size:#x} bytes, is outside the guest's RAM")]
    OutsideRam {
        /// Where the segment wants to be.
        start: GuestAddr,
        /// Its size in memory.
        size: u64,
    },
    /// The file could not be read.
    #[error("reading the kernel")]
    Read(#[source] io::Error),
}

/// A kernel in RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LoadedKernel {
    /// Where it is entered.
    pub(super) entry: GuestAddr,
    /// The first byte of its lowest segment.
    pub(super) start: GuestAddr,
    /// The byte after its highest segment, zero-filled part included.
    pub(super) end: GuestAddr,
}

struct Header {
    entry: u64,
    program_headers: u64,
    count: u16,
}

struct ProgramHeader {
    kind: u32,
    offset: u64,
    physical: u64,
    file_size: u64,
    memory_size: u64,
}

/// Loads `file` into `ram`, whose untouched part must still be zero (it becomes `.bss`).
///
/// # Errors
/// [`ElfError`]; RAM may then hold a part of the kernel.
pub(super) fn load<F: Read + Seek + ReadVolatile>(ram: &GuestRam, file: &mut F) -> Result<LoadedKernel, ElfError> {
    let file_len = file.seek(SeekFrom::End(0)).map_err(ElfError::Read)?;
    let mut raw = [0; HEADER_SIZE];
    if file_len < HEADER_SIZE as u64 {
        return Err(ElfError::NotElf);
    }
    read_at(file, 0, &mut raw)?;
    let header = parse_header(&raw)?;
    let mut kernel = LoadedKernel { entry: GuestAddr(header.entry), start: GuestAddr(u64::MAX), end: GuestAddr(0) };
    for n in 0..header.count {
        let mut raw = [0; PROGRAM_HEADER_SIZE];
        let at = header
            .program_headers
            .checked_add(u64::from(n) * PROGRAM_HEADER_SIZE as u64)
            .filter(|at| file_len.checked_sub(PROGRAM_HEADER_SIZE as u64).is_some_and(|last| *at <= last))
            .ok_or(ElfError::Malformed("program headers outside the file"))?;
        read_at(file, at, &mut raw)?;
        let segment = parse_program_header(&raw);
        if segment.kind == PT_LOAD && segment.memory_size > 0 {
            let (start, end) = load_segment(ram, file, file_len, &segment)?;
            kernel.start = kernel.start.min(start);
            kernel.end = kernel.end.max(end);
        }
    }
    if kernel.end == GuestAddr(0) {
        return Err(ElfError::Malformed("no loadable segment"));
    }
    if !(kernel.start..kernel.end).contains(&kernel.entry) {
        return Err(ElfError::Malformed("entry point outside every segment"));
    }
    Ok(kernel)
}

fn load_segment<F: Seek + ReadVolatile>(
    ram: &GuestRam,
    file: &mut F,
    file_len: u64,
    segment: &ProgramHeader,
) -> Result<(GuestAddr, GuestAddr), ElfError> {
    let outside = ElfError::OutsideRam { start: GuestAddr(segment.physical), size: segment.memory_size };
    if segment.file_size > segment.memory_size {
        return Err(ElfError::Malformed("segment larger in the file than in memory"));
    }
    if segment.offset.checked_add(segment.file_size).is_none_or(|end| end > file_len) {
        return Err(ElfError::Malformed("segment outside the file"));
    }
    let low = low_ram_end(ram);
    let Some(end) = segment.physical.checked_add(segment.memory_size).filter(|end| *end <= low.0) else {
        return Err(outside);
    };
    if segment.physical < layout::HIGH_MEMORY.0 {
        return Err(outside);
    }
    file.seek(SeekFrom::Start(segment.offset)).map_err(ElfError::Read)?;
    ram.memory()
        .read_exact_volatile_from(GuestAddress(segment.physical), file, segment.file_size as usize)
        .map_err(|e| ElfError::Read(io::Error::other(e)))?;
    Ok((GuestAddr(segment.physical), GuestAddr(end)))
}

/// The end of the RAM piece that begins at 0.
pub(super) fn low_ram_end(ram: &GuestRam) -> GuestAddr {
    ram.pieces().first().map_or(GuestAddr(0), |(start, size)| GuestAddr(start.0 + size.0))
}

fn parse_header(raw: &[u8; HEADER_SIZE]) -> Result<Header, ElfError> {
    if !raw.starts_with(b"\x7fELF") {
        return Err(ElfError::NotElf);
    }
    if raw[4] != 2 || raw[5] != 1 {
        return Err(ElfError::Unsuitable("not 64-bit little-endian"));
    }
    if u16_at(raw, 18) != EM_X86_64 {
        return Err(ElfError::Unsuitable("made for another processor"));
    }
    if u16_at(raw, 16) != ET_EXEC {
        return Err(ElfError::Unsuitable("not an executable with fixed addresses"));
    }
    if usize::from(u16_at(raw, 54)) != PROGRAM_HEADER_SIZE {
        return Err(ElfError::Malformed("unexpected program header size"));
    }
    let count = u16_at(raw, 56);
    if count > MAX_PROGRAM_HEADERS {
        return Err(ElfError::Malformed("too many program headers"));
    }
    Ok(Header { entry: u64_at(raw, 24), program_headers: u64_at(raw, 32), count })
}

fn parse_program_header(raw: &[u8; PROGRAM_HEADER_SIZE]) -> ProgramHeader {
    ProgramHeader {
        kind: u32::from_le_bytes([raw[0], raw[1], raw[2], raw[3]]),
        offset: u64_at(raw, 8),
        physical: u64_at(raw, 24),
        file_size: u64_at(raw, 32),
        memory_size: u64_at(raw, 40),
    }
}

fn read_at<F: Read + Seek>(file: &mut F, at: u64, into: &mut [u8]) -> Result<(), ElfError> {
    file.seek(SeekFrom::Start(at)).and_then(|_| file.read_exact(into)).map_err(ElfError::Read)
}

fn u16_at(raw: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([raw[at], raw[at + 1]])
}

fn u64_at(raw: &[u8], at: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&raw[at..at + 8]);
    u64::from_le_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use proptest::prelude::*;

    use super::*;
    use crate::units::Bytes;

    /// A kernel of one segment: `code` at 1 MiB, with a page of `.bss` behind it.
    fn vmlinux(code: &[u8]) -> Vec<u8> {
        let mut file = vec![0; HEADER_SIZE + PROGRAM_HEADER_SIZE];
        file[..6].copy_from_slice(b"\x7fELF\x02\x01");
        file[16..18].copy_from_slice(&ET_EXEC.to_le_bytes());
        file[18..20].copy_from_slice(&EM_X86_64.to_le_bytes());
        file[24..32].copy_from_slice(&0x10_0000u64.to_le_bytes());
        file[32..40].copy_from_slice(&64u64.to_le_bytes());
        file[54..56].copy_from_slice(&56u16.to_le_bytes());
        file[56..58].copy_from_slice(&1u16.to_le_bytes());
        let segment = &mut file[HEADER_SIZE..];
        segment[0] = 1;
        segment[8..16].copy_from_slice(&120u64.to_le_bytes());
        segment[24..32].copy_from_slice(&0x10_0000u64.to_le_bytes());
        segment[32..40].copy_from_slice(&(code.len() as u64).to_le_bytes());
        segment[40..48].copy_from_slice(&(code.len() as u64 + 4096).to_le_bytes());
        file.extend_from_slice(code);
        file
    }

    fn load_into_4_mib(file: &[u8]) -> Result<LoadedKernel, ElfError> {
        load(&GuestRam::new(Bytes::mib(4)).unwrap(), &mut Cursor::new(file))
    }

    #[test]
    fn a_segment_lands_at_its_physical_address() {
        let ram = GuestRam::new(Bytes::mib(4)).unwrap();
        let kernel = load(&ram, &mut Cursor::new(&vmlinux(b"\xf4code"))).unwrap();
        assert_eq!(kernel.entry, GuestAddr(0x10_0000));
        assert_eq!((kernel.start, kernel.end), (GuestAddr(0x10_0000), GuestAddr(0x10_1005)));
        let mut code = [0; 5];
        ram.read_bytes(0x10_0000, &mut code).unwrap();
        assert_eq!(&code, b"\xf4code");
    }

    #[test]
    fn what_is_not_a_suitable_elf_file_says_so() {
        assert!(matches!(load_into_4_mib(b""), Err(ElfError::NotElf)));
        assert!(matches!(load_into_4_mib(&[0; 4096]), Err(ElfError::NotElf)));
        let mut arm = vmlinux(b"code");
        arm[18] = 183;
        assert!(matches!(load_into_4_mib(&arm), Err(ElfError::Unsuitable(_))));
        let mut narrow = vmlinux(b"code");
        narrow[4] = 1;
        assert!(matches!(load_into_4_mib(&narrow), Err(ElfError::Unsuitable(_))));
    }

    #[test]
    fn segments_outside_ram_or_file_are_refused() {
        for physical in [0, 0x7000, 0x3f_f000, u64::MAX - 100] {
            let mut file = vmlinux(b"code");
            file[HEADER_SIZE + 24..HEADER_SIZE + 32].copy_from_slice(&u64::to_le_bytes(physical));
            assert!(matches!(load_into_4_mib(&file), Err(ElfError::OutsideRam { .. })), "{physical:#x}");
        }
        let mut file = vmlinux(b"code");
        file.truncate(file.len() - 1);
        assert!(matches!(load_into_4_mib(&file), Err(ElfError::Malformed(_))));
    }

    #[test]
    fn an_entry_point_outside_the_kernel_is_refused() {
        let mut file = vmlinux(b"code");
        file[24..32].copy_from_slice(&0x20_0000u64.to_le_bytes());
        assert!(matches!(load_into_4_mib(&file), Err(ElfError::Malformed(_))));
    }

    proptest! {
        #[test]
        fn no_damage_to_a_kernel_file_panics(
            damage in prop::collection::vec((0usize..124, any::<u8>()), 0..12),
            keep in 0usize..=124,
        ) {
            let mut file = vmlinux(b"code");
            for (at, value) in damage {
                file[at] = value;
            }
            file.truncate(keep);
            let _ = load_into_4_mib(&file);
        }
    }
}
