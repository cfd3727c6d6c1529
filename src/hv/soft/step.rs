//! One instruction at a time, from its bytes: for what decoded code cannot serve.
//!
//! Used for instructions that cross a page (the second page may change its meaning without the first one noticing),
//! for single-stepping, for the instruction in an interrupt shadow, and after a miss.

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
    bytes: [u8; MAX_LENGTH],
    insn: Instruction,
    execute: Executor,
}

/// The last instruction decoded at each of a few addresses, good while the bytes there are the same.
#[derive(Debug)]
pub(super) struct CrossingCache([Option<Crossing>; 64]);

impl CrossingCache {
    pub(super) fn new() -> Self {
        Self([None; 64])
    }

    fn index(at: u64) -> usize {
        // Crossing instructions lie at page ends: the page number tells them apart.
        (at ^ (at >> 12)) as usize & 63
    }
}

impl Cpu {
    /// Executes the instruction at `rip`, and leaves `rip` at the next one. On an error it is where it was.
    pub(super) fn step(&mut self) -> Result<Flow, Stop> {
        let at = self.rip;
        self.regs[slot::PAGE] = at & !(PAGE_SIZE - 1);
        let (bytes, len, fault) = self.fetch_bytes(at)?;
        let index = CrossingCache::index(at);
        if let Some(Crossing { at: known, bytes: same, insn, execute }) = self.crossings.0[index]
            && known == at
            && len == MAX_LENGTH
            && same == bytes
        {
            return self.execute_at(at, &insn, execute);
        }
        let insn = decode(&bytes[..len], at % PAGE_SIZE).map_err(|too_short| match (too_short, fault) {
            (true, Some(stop)) => stop,
            // Longer than 15 bytes is #GP, anything else undefined is #UD.
            (true, None) => Exception::general_protection(0).into(),
            (false, _) => Stop::Fault(Exception::INVALID_OPCODE),
        })?;
        let Some(execute) = exec::executor(&insn) else {
            return Err(Exception::INVALID_OPCODE.into());
        };
        if len == MAX_LENGTH {
            self.crossings.0[index] = Some(Crossing { at, bytes, insn, execute });
        }
        self.execute_at(at, &insn, execute)
    }

    fn execute_at(&mut self, at: u64, insn: &Instruction, execute: Executor) -> Result<Flow, Stop> {
        self.rip = at.wrapping_add(insn.len() as u64);
        execute(self, insn).inspect_err(|_| self.rip = at)
    }

    /// The bytes at `at`, as many as there are up to 15, and the fault that awaits beyond them.
    fn fetch_bytes(&mut self, at: u64) -> Result<([u8; MAX_LENGTH], usize, Option<Stop>), Stop> {
        let mut bytes = [0; MAX_LENGTH];
        let in_page = ((PAGE_SIZE - at % PAGE_SIZE) as usize).min(MAX_LENGTH);
        let first = self.fetch_offset(at)?;
        let _ = self.ram.read_bytes(first, &mut bytes[..in_page]);
        if in_page == MAX_LENGTH {
            return Ok((bytes, MAX_LENGTH, None));
        }
        match self.fetch_offset(at.wrapping_add(in_page as u64)) {
            Ok(second) => {
                let _ = self.ram.read_bytes(second, &mut bytes[in_page..]);
                Ok((bytes, MAX_LENGTH, None))
            }
            Err(stop) => Ok((bytes, in_page, Some(stop))),
        }
    }

    /// The bytes at `rip` for an error report.
    pub(super) fn bytes_at_rip(&mut self) -> Vec<u8> {
        self.fetch_bytes(self.rip).map(|(bytes, len, _)| bytes[..len].to_vec()).unwrap_or_default()
    }
}

/// A decoder of bytes that begin at `offset` in their page.
pub(super) fn decoder(bytes: &[u8], offset: u64) -> Decoder<'_> {
    Decoder::with_ip(64, bytes, offset, DecoderOptions::AMD)
}

/// Decodes one instruction at `offset` in its page; the error is whether more bytes were wanted.
pub(super) fn decode(bytes: &[u8], offset: u64) -> Result<Instruction, bool> {
    let mut decoder = decoder(bytes, offset);
    let insn = decoder.decode();
    if insn.is_invalid() {
        return Err(decoder.last_error() == iced_x86::DecoderError::NoMoreBytes);
    }
    Ok(insn)
}
