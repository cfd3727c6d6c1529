//! MXCSR: how SSE arithmetic rounds, which exceptions it raises and what becomes of them (Intel SDM volume 1,
//! sections 10.2.3 and 11.5); LDMXCSR and STMXCSR.

use iced_x86::Instruction;

use crate::hv::soft::cpu::Cpu;
use crate::hv::soft::cpu::cr4;
use crate::hv::soft::fault::Exception;
use crate::hv::soft::fault::Flow;
use crate::hv::soft::fault::Stop;

use super::lane::Lane;
use super::real::Mode;
use super::real::Number;
use super::real::Outcome;
use super::real::Real;

pub(super) const INVALID: u32 = 1 << 0;
pub(super) const DENORMAL: u32 = 1 << 1;
pub(super) const DIVIDE: u32 = 1 << 2;
pub(super) const OVERFLOW: u32 = 1 << 3;
pub(super) const UNDERFLOW: u32 = 1 << 4;
pub(super) const PRECISION: u32 = 1 << 5;
const DENORMALS_ARE_ZEROS: u32 = 1 << 6;
const MASKS: u32 = 0x3f << 7;
const ROUNDING: u32 = 3 << 13;
const FLUSH_TO_ZERO: u32 = 1 << 15;

/// Bits that may be set; FXSAVE shows it, LDMXCSR and FXRSTOR refuse others.
pub(super) const MASK: u32 = 0xffff;
/// After reset: all exceptions masked, round to nearest.
pub(super) const RESET: u32 = 0x1f80;

/// One SSE instruction's arithmetic: MXCSR as it found it, and the exceptions of its lanes so far.
#[derive(Clone, Copy, Debug)]
pub(super) struct Env {
    mxcsr: u32,
    /// Invalid, denormal and divide-by-zero: known before there is a result.
    before: u32,
    /// Overflow, underflow and precision.
    after: u32,
    /// Round to nearest and all exceptions masked: the host's arithmetic gives a plain result.
    pub(super) nearest: bool,
    /// Besides, PE is sticky already: whether the result is exact need not be known.
    pub(super) plain: bool,
}

impl Env {
    #[inline(always)]
    pub(super) fn new(mxcsr: u32) -> Self {
        let nearest = mxcsr & (MASKS | ROUNDING) == MASKS;
        Self { mxcsr, before: 0, after: 0, nearest, plain: nearest && mxcsr & PRECISION != 0 }
    }

    pub(super) fn mode(&self) -> Mode {
        Mode::from_bits(self.mxcsr >> 13)
    }

    /// Sets the sticky flags; an exception that is not masked stops the instruction.
    #[inline(always)]
    pub(super) fn finish(self, cpu: &mut Cpu) -> Result<(), Stop> {
        if self.before | self.after == 0 {
            return Ok(());
        }
        self.raise(cpu)
    }

    fn raise(self, cpu: &mut Cpu) -> Result<(), Stop> {
        let unmasked = !(self.mxcsr & MASKS) >> 7;
        // With an unmasked exception of the first kind, no lane gets as far as the second kind.
        let raised = if self.before & unmasked != 0 { self.before } else { self.before | self.after };
        cpu.fpu.mxcsr |= raised;
        if raised & unmasked == 0 {
            Ok(())
        } else if cpu.control.cr4 & cr4::OSXMMEXCPT != 0 {
            Err(Exception::SIMD.into())
        } else {
            Err(Exception::INVALID_OPCODE.into())
        }
    }

    pub(super) fn raise_invalid(&mut self) {
        self.before |= INVALID;
    }

    pub(super) fn raise_precision(&mut self) {
        self.after |= PRECISION;
    }

    fn masked(&self, exception: u32) -> bool {
        self.mxcsr >> 7 & exception != 0
    }

    /// A lane that is not a NaN as a number; DAZ applies.
    pub(super) fn number<L: Lane>(&self, bits: u64) -> Number {
        let sign = bits >> (L::BITS - 1) != 0;
        if L::is_denormal(bits) && self.mxcsr & DENORMALS_ARE_ZEROS != 0 {
            return Number::Zero(sign);
        }
        L::number(bits)
    }

    /// Notes denormal operands, unless DAZ makes them zeros.
    pub(super) fn note_denormals<L: Lane>(&mut self, operands: &[u64]) {
        if self.mxcsr & DENORMALS_ARE_ZEROS == 0 && operands.iter().any(|&bits| L::is_denormal(bits)) {
            self.before |= DENORMAL;
        }
    }

    /// What DAZ makes of an operand that is returned as it is (MIN, MAX).
    pub(super) fn flushed<L: Lane>(&self, bits: u64) -> u64 {
        if L::is_denormal(bits) && self.mxcsr & DENORMALS_ARE_ZEROS != 0 { bits & L::SIGN } else { bits }
    }

    /// The NaN that an operation with a NaN operand gives: the first operand if it is one, else the second, made
    /// quiet (Intel SDM volume 1, table 4-7).
    pub(super) fn nan<L: Lane>(&mut self, a: u64, b: u64) -> Option<u64> {
        let nan = if L::is_nan(a) {
            a
        } else if L::is_nan(b) {
            b
        } else {
            return None;
        };
        if L::is_signaling(a) || L::is_signaling(b) {
            self.raise_invalid();
        }
        Some(nan | L::QUIET)
    }

    /// Encodes what an operation on `operands` gave, with its exceptions.
    pub(super) fn outcome<L: Lane>(&mut self, outcome: Outcome, operands: &[u64]) -> u64 {
        match outcome {
            Outcome::Invalid => {
                self.raise_invalid();
                L::INDEFINITE
            }
            Outcome::DivideByZero(sign) => {
                self.before |= DIVIDE;
                L::infinity(sign)
            }
            Outcome::Number(number) => {
                self.note_denormals::<L>(operands);
                self.encode::<L>(number)
            }
        }
    }

    pub(super) fn encode<L: Lane>(&mut self, number: Number) -> u64 {
        match number {
            Number::Zero(sign) => L::zero(sign),
            Number::Infinity(sign) => L::infinity(sign),
            Number::Finite(real) => self.round::<L>(real),
        }
    }

    fn round<L: Lane>(&mut self, real: Real) -> u64 {
        let mode = self.mode();
        let rounded = real.round(L::PRECISION, mode);
        let inexact = if rounded.inexact { PRECISION } else { 0 };
        if rounded.exp > L::EMAX {
            self.after |= OVERFLOW | if self.masked(OVERFLOW) { PRECISION } else { inexact };
            return if mode.overflows_to_infinity(real.sign) {
                L::infinity(real.sign)
            } else {
                L::infinity(real.sign) - 1
            };
        }
        if rounded.exp >= L::EMIN {
            self.after |= inexact;
            return L::encode(real.sign, rounded.exp, rounded.sig);
        }
        if !self.masked(UNDERFLOW) {
            self.after |= UNDERFLOW | inexact;
            return L::zero(real.sign);
        }
        if self.mxcsr & FLUSH_TO_ZERO != 0 {
            self.after |= UNDERFLOW | PRECISION;
            return L::zero(real.sign);
        }
        let rounded = real.round_subnormal(L::PRECISION, L::EMIN, mode);
        if rounded.inexact {
            self.after |= UNDERFLOW | PRECISION;
        }
        L::encode(real.sign, rounded.exp, rounded.sig)
    }
}

pub(super) fn ldmxcsr(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    cpu.require_sse()?;
    let value = cpu.load::<u32>(insn)?;
    if value & !MASK != 0 {
        return Err(Exception::general_protection(0).into());
    }
    cpu.fpu.mxcsr = value;
    Ok(Flow::Next)
}

pub(super) fn stmxcsr(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    cpu.require_sse()?;
    cpu.store(insn, cpu.fpu.mxcsr)?;
    Ok(Flow::Next)
}
