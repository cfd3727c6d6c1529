//! One instruction at a time, from its bytes: for what decoded code cannot serve.
//!
//! Used for all code outside 64-bit mode, for instructions that cross a page (the second page may change its meaning
//! without the first one noticing), for single-stepping, for the instruction in an interrupt shadow, and after a miss.

use iced_x86::{Decoder, DecoderOptions, Instruction};

use crate::units::PAGE_SIZE;

use super::cpu::{Cpu, slot};
use super::exec::{self, Executor};
use super::fault::{Exception, Flow, Stop};

/// The longest instruction (Intel SDM volume 2A, section 2.3.11).
pub(super) const MAX_LENGTH: usize = 15;

#[derive(Clone, Copy, Debug)]
struct Crossing {
    at: u64,
    bits: u32,
    bytes: [u8; MAX_LENGTH],
    insn: Instruction,
    execute: Executor,
}

/// The last instruction decoded at each of a number of addresses, good while the bytes there are the same: of a few for
/// the instructions that cross a page, of more once all code comes here.
#[derive(Debug)]
pub(super) struct CrossingCache(Vec<Option<Crossing>>);

/// Crossing instructions lie at page ends: the page number tells them apart.
const FEW: usize = 64;
/// About what a program of 32 bits runs through again and again; some 300 KiB.
const MANY: usize = 4096;

impl CrossingCache {
    pub(super) fn new() -> Self {
        Self(vec![None; FEW])
    }

    /// The place of what was decoded at `at` as code of `bits`.
    fn place(&mut self, at: u64, bits: u32) -> &mut Option<Crossing> {
        if bits != 64 && self.0.len() == FEW {
            self.0 = vec![None; MANY];
        }
        let index = (at ^ (at >> 12)) as usize & (self.0.len() - 1);
        &mut self.0[index]
    }
}

/// What lies where the next instruction begins.
struct Fetched {
    /// Linear address of its first byte.
    at: u64,
    bytes: [u8; MAX_LENGTH],
    len: usize,
    /// What awaits beyond the bytes that are there.
    beyond: Option<Stop>,
}

impl Cpu {
    /// Executes the instruction at `rip`, and leaves `rip` at the next one. On an error it is where it was.
    pub(super) fn step(&mut self) -> Result<Flow, Stop> {
        let (rip, bits) = (self.rip, self.code_bits());
        let Fetched { at, bytes, len, beyond } = self.fetch_bytes(rip)?;
        // Outside 64-bit mode branch targets count from the code segment's base.
        self.regs[slot::PAGE] = rip.wrapping_sub(at % PAGE_SIZE);
        if let Some(Crossing { at: known, bits: width, bytes: same, insn, execute }) = *self.crossings.place(at, bits)
            && (known, width) == (at, bits)
            && len == MAX_LENGTH
            && same == bytes
        {
            return self.execute_at(rip, bits, &insn, execute);
        }
        let insn = decode(bits, &bytes[..len], at % PAGE_SIZE).map_err(|too_short| match (too_short, beyond) {
            (true, Some(stop)) => stop,
            // Longer than 15 bytes is #GP, anything else undefined is #UD.
            _ if is_too_long(bits, &bytes[..len]) => Exception::general_protection(0).into(),
            _ => Stop::Fault(Exception::INVALID_OPCODE),
        })?;
        let Some(execute) = exec::executor(&insn) else {
            return Err(Exception::INVALID_OPCODE.into());
        };
        if len == MAX_LENGTH {
            *self.crossings.place(at, bits) = Some(Crossing { at, bits, bytes, insn, execute });
        }
        self.execute_at(rip, bits, &insn, execute)
    }

    fn execute_at(&mut self, rip: u64, bits: u32, insn: &Instruction, execute: Executor) -> Result<Flow, Stop> {
        let next = rip.wrapping_add(insn.len() as u64);
        self.rip = if bits == 64 { next } else { next & 0xffff_ffff };
        execute(self, insn).inspect_err(|_| self.rip = rip)
    }

    /// The bytes at `rip`, as many as there are up to 15, and the fault that awaits beyond them.
    fn fetch_bytes(&mut self, rip: u64) -> Result<Fetched, Stop> {
        let (at, room) = self.code_address(rip)?;
        let mut fetched = Fetched { at, bytes: [0; MAX_LENGTH], len: MAX_LENGTH, beyond: None };
        if room < MAX_LENGTH as u64 {
            (fetched.len, fetched.beyond) = (room as usize, Some(Exception::general_protection(0).into()));
        }
        let in_page = (PAGE_SIZE - at % PAGE_SIZE) as usize;
        let first = self.fetch_offset(at)?;
        let (here, there) = fetched.bytes.split_at_mut(in_page.min(fetched.len));
        let _ = self.ram.read_bytes(first, here);
        if fetched.len <= in_page {
            return Ok(fetched);
        }
        match self.fetch_offset(self.code_address(rip.wrapping_add(in_page as u64))?.0) {
            Ok(second) => {
                let _ = self.ram.read_bytes(second, &mut there[..fetched.len - in_page]);
            }
            Err(stop) => (fetched.len, fetched.beyond) = (in_page, Some(stop)),
        }
        Ok(fetched)
    }

    /// The bytes at `rip` for an error report.
    pub(super) fn bytes_at_rip(&mut self) -> Vec<u8> {
        self.fetch_bytes(self.rip).map(|fetched| fetched.bytes[..fetched.len].to_vec()).unwrap_or_default()
    }
}

/// A decoder of 64-bit code that begins at `offset` in their page.
pub(super) fn decoder(bytes: &[u8], offset: u64) -> Decoder<'_> {
    Decoder::with_ip(64, bytes, offset, DecoderOptions::AMD)
}

/// Whether bytes that are no instruction begin one of more than 15 bytes: such a one has a prefix too many, and without it
/// would be one or begin one. The decoder calls both undefined, but looks at all of them only then.
fn is_too_long(bits: u32, bytes: &[u8]) -> bool {
    const LOCK: u8 = 0xf0;
    let Ok(mut bytes) = <[u8; MAX_LENGTH]>::try_from(bytes) else { return false };
    if Decoder::with_ip(bits, &bytes, 0, DecoderOptions::AMD).decode().len() < MAX_LENGTH {
        return false;
    }
    // LOCK is not one too many: it may be what makes the rest undefined.
    if bytes[0] == LOCK {
        bytes.swap(0, 1);
    }
    !matches!(decode(bits, &bytes[1..], 0), Err(false))
}

/// Decodes one instruction of `bits`-bit code at `offset` in its page; the error is whether more bytes were wanted.
pub(super) fn decode(bits: u32, bytes: &[u8], offset: u64) -> Result<Instruction, bool> {
    let mut decoder = Decoder::with_ip(bits, bytes, offset, DecoderOptions::AMD);
    let insn = decoder.decode();
    if insn.is_invalid() {
        return Err(decoder.last_error() == iced_x86::DecoderError::NoMoreBytes);
    }
    Ok(insn)
}
