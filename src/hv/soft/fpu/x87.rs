//! The x87 register stack, control and status words, and its exceptions (Intel SDM volume 1, chapter 8); MMX
//! registers are its significands (chapter 9).

use iced_x86::Instruction;
use iced_x86::OpKind;
use iced_x86::Register;

use crate::hv::soft::cpu::Cpu;
use crate::hv::soft::cpu::cr0;
use crate::hv::soft::cpu::seg;
use crate::hv::soft::fault::Exception;
use crate::hv::soft::fault::Stop;
use crate::hv::soft::operand::segment_number;

use super::extended::Class;
use super::extended::EMAX;
use super::extended::EMIN;
use super::extended::Extended;
use super::extended::INDEFINITE;
use super::lane::Lane;
use super::real::Mode;
use super::real::Number;
use super::real::Outcome;
use super::real::Real;

pub(super) const INVALID: u16 = 1 << 0;
pub(super) const DENORMAL: u16 = 1 << 1;
pub(super) const DIVIDE: u16 = 1 << 2;
pub(super) const OVERFLOW: u16 = 1 << 3;
pub(super) const UNDERFLOW: u16 = 1 << 4;
pub(super) const PRECISION: u16 = 1 << 5;
const STACK_FAULT: u16 = 1 << 6;
/// Error summary: an exception that is not masked is pending.
pub(super) const SUMMARY: u16 = 1 << 7;
pub(super) const C0: u16 = 1 << 8;
pub(super) const C1: u16 = 1 << 9;
pub(super) const C2: u16 = 1 << 10;
pub(super) const C3: u16 = 1 << 14;
/// Busy: a copy of the error summary since the 287.
pub(super) const BUSY: u16 = 1 << 15;
const TOP: u16 = 7 << 11;
/// The exception flags, and the mask bits of the control word.
pub(super) const EXCEPTIONS: u16 = 0x3f;

pub(super) const RESET_CONTROL: u16 = 0x37f;
/// Bit 6 reads as one and the rest of the reserved bits as zero, whatever is loaded, but for the infinity
/// control of the 287, which is kept and has no effect.
const CONTROL_BITS: u16 = 0x1f3f;
const CONTROL_ONES: u16 = 0x0040;

/// How far an exponent is moved when an overflow or underflow is not masked.
const BIAS_ADJUST: i32 = 24576;

/// Where the last instruction that was not a control instruction was, and its operand.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Pointers {
    pub(super) opcode: u16,
    pub(super) ip: u64,
    pub(super) cs: u16,
    pub(super) dp: u64,
    pub(super) ds: u16,
}

#[derive(Clone, Debug)]
pub(super) struct X87 {
    /// Physical registers.
    regs: [Extended; 8],
    /// Which of them hold a value.
    pub(super) valid: u8,
    top: u8,
    pub(super) control: u16,
    /// The status word but TOP.
    pub(super) status: u16,
    pub(super) pointers: Pointers,
}

impl X87 {
    pub(super) fn new() -> Self {
        Self {
            regs: [Extended::default(); 8],
            valid: 0,
            top: 0,
            control: RESET_CONTROL,
            status: 0,
            pointers: Pointers::default(),
        }
    }

    /// FNINIT: the registers keep their contents, tagged empty.
    pub(super) fn init(&mut self) {
        *self = Self { regs: self.regs, ..Self::new() };
    }

    pub(super) fn status_word(&self) -> u16 {
        self.status | u16::from(self.top) << 11
    }

    /// Takes TOP and the flags; the summary follows from them and the control word, so load that first.
    pub(super) fn set_status_word(&mut self, status: u16) {
        self.top = (status >> 11 & 7) as u8;
        self.status = status & !(TOP | SUMMARY | BUSY);
        self.summarize();
    }

    pub(super) fn set_control(&mut self, control: u16) {
        self.control = control & CONTROL_BITS | CONTROL_ONES;
        self.summarize();
    }

    /// Derives the error summary.
    fn summarize(&mut self) {
        self.status &= !(SUMMARY | BUSY);
        if self.status & !self.control & EXCEPTIONS != 0 {
            self.status |= SUMMARY | BUSY;
        }
    }

    pub(super) fn clear_exceptions(&mut self) {
        self.status &= !(EXCEPTIONS | STACK_FAULT | SUMMARY | BUSY);
    }

    pub(super) const fn is_pending(&self) -> bool {
        self.status & SUMMARY != 0
    }

    pub(super) fn mode(&self) -> Mode {
        Mode::from_bits(u32::from(self.control >> 10))
    }

    /// Significand bits that the control word's PC field asks for; the reserved value works as extended.
    pub(super) const fn precision(&self) -> u32 {
        match self.control >> 8 & 3 {
            0 => 24,
            2 => 53,
            _ => 64,
        }
    }

    const fn physical(&self, i: u8) -> usize {
        (self.top.wrapping_add(i) & 7) as usize
    }

    /// ST(i) whether or not it is empty.
    pub(super) const fn raw(&self, i: u8) -> Extended {
        self.regs[self.physical(i)]
    }

    pub(super) const fn set_raw(&mut self, i: u8, value: Extended) {
        self.regs[self.physical(i)] = value;
    }

    pub(super) const fn is_empty(&self, i: u8) -> bool {
        self.valid >> self.physical(i) & 1 == 0
    }

    pub(super) fn set(&mut self, i: u8, value: Extended) {
        self.set_raw(i, value);
        self.valid |= 1 << self.physical(i);
    }

    pub(super) fn free(&mut self, i: u8) {
        self.valid &= !(1 << self.physical(i));
    }

    pub(super) fn pop(&mut self) {
        self.free(0);
        self.rotate(1);
    }

    /// Adds to TOP.
    pub(super) fn rotate(&mut self, by: u8) {
        self.top = self.top.wrapping_add(by) & 7;
    }

    /// Makes room and sets ST(0); the caller has checked that ST(7) is empty.
    pub(super) fn push(&mut self, value: Extended) {
        self.rotate(7);
        self.set(0, value);
    }

    /// Sets flags; false when one that is not masked keeps the instruction from completing: all do but
    /// overflow, underflow and precision.
    pub(super) fn raise(&mut self, flags: u16) -> bool {
        self.status |= flags;
        let unmasked = flags & !self.control & EXCEPTIONS;
        if unmasked != 0 {
            self.status |= SUMMARY | BUSY;
        }
        unmasked & (INVALID | DENORMAL | DIVIDE) == 0
    }

    pub(super) fn masked(&self, exception: u16) -> bool {
        self.control & exception != 0
    }

    pub(super) fn set_condition(&mut self, mask: u16, value: u16) {
        self.status = self.status & !mask | value;
    }

    pub(super) fn set_c1(&mut self, set: bool) {
        self.set_condition(C1, if set { C1 } else { 0 });
    }

    /// An operand was in an empty register: the indefinite NaN, or nothing when that is not masked.
    pub(super) fn underflow_stack(&mut self) -> Option<Extended> {
        self.set_c1(false);
        self.raise(INVALID | STACK_FAULT).then_some(INDEFINITE)
    }

    /// Pushes what `value` gives; with no room, the indefinite NaN.
    pub(super) fn load(&mut self, value: impl FnOnce(&mut Self) -> Option<Extended>) {
        self.set_c1(false);
        if self.is_empty(7) {
            if let Some(value) = value(self) {
                self.push(value);
            }
        } else {
            self.set_c1(true);
            if self.raise(INVALID | STACK_FAULT) {
                self.push(INDEFINITE);
            }
        }
    }

    pub(super) fn invalid(&mut self) -> Option<Extended> {
        self.raise(INVALID).then_some(INDEFINITE)
    }

    /// The result of an operation with a NaN or unsupported operand: `None` when there is none, `Some(None)` when
    /// an exception that is not masked leaves no result (Intel SDM volume 1, table 4-7).
    pub(super) fn nan(&mut self, a: Extended, b: Extended) -> Option<Option<Extended>> {
        let classes = [a.class(), b.class()];
        if classes.contains(&Class::Unsupported) {
            return Some(self.invalid());
        }
        let nan = match (a.is_nan(), b.is_nan()) {
            (false, false) => return None,
            (true, false) => a,
            (false, true) => b,
            // A quiet one wins over a signaling one, then the larger significand, then the positive one.
            (true, true) => match classes {
                [Class::Quiet, Class::Signaling] => a,
                [Class::Signaling, Class::Quiet] => b,
                _ if a.sig != b.sig => {
                    if a.sig > b.sig {
                        a
                    } else {
                        b
                    }
                }
                _ => {
                    if a.sign() {
                        b
                    } else {
                        a
                    }
                }
            },
        };
        if classes.contains(&Class::Signaling) && !self.raise(INVALID) {
            return Some(None);
        }
        Some(Some(nan.quieted()))
    }

    /// An operation on one or two operands (give the one twice). `denormal`: a memory operand was one, which its
    /// extended form does not show.
    pub(super) fn operate(
        &mut self,
        a: Extended,
        b: Extended,
        denormal: bool,
        f: impl FnOnce(Number, Number, Mode) -> Outcome,
    ) -> Option<Extended> {
        self.set_c1(false);
        if let Some(result) = self.nan(a, b) {
            return result;
        }
        let (Some(x), Some(y)) = (a.number(), b.number()) else { return self.invalid() };
        match f(x, y, self.mode()) {
            Outcome::Invalid => self.invalid(),
            Outcome::DivideByZero(sign) => self.raise(DIVIDE).then_some(Extended::infinity(sign)),
            Outcome::Number(number) => {
                if !self.note_denormals(a, b, denormal) {
                    return None;
                }
                Some(self.round(number, self.precision()))
            }
        }
    }

    /// Raises the denormal exception for denormal operands; false when it is not masked.
    pub(super) fn note_denormals(&mut self, a: Extended, b: Extended, denormal: bool) -> bool {
        let denormal = denormal || a.class() == Class::Denormal || b.class() == Class::Denormal;
        !denormal || self.raise(DENORMAL)
    }

    /// Rounds a result for a register; C1 tells of rounding up.
    pub(super) fn round(&mut self, number: Number, precision: u32) -> Extended {
        let real = match number {
            Number::Zero(sign) => return Extended::zero(sign),
            Number::Infinity(sign) => return Extended::infinity(sign),
            Number::Finite(real) => real,
        };
        let mode = self.mode();
        let rounded = real.round(precision, mode);
        let inexact = if rounded.inexact { PRECISION } else { 0 };
        if rounded.exp > EMAX {
            return self.overflow(real, precision);
        }
        if rounded.exp < EMIN {
            return self.underflow(real, precision);
        }
        self.raise(inexact);
        self.set_c1(rounded.up);
        Extended::encode(real.sign, rounded.exp, rounded.sig)
    }

    fn overflow(&mut self, real: Real, precision: u32) -> Extended {
        let mode = self.mode();
        if self.masked(OVERFLOW) {
            self.raise(OVERFLOW | PRECISION);
            let infinite = mode.overflows_to_infinity(real.sign);
            self.set_c1(infinite);
            return if infinite {
                Extended::infinity(real.sign)
            } else {
                Extended::encode(real.sign, EMAX, u64::MAX << (64 - precision))
            };
        }
        let rounded = real.round(precision, mode);
        self.raise(OVERFLOW | if rounded.inexact { PRECISION } else { 0 });
        self.set_c1(rounded.up);
        if rounded.exp - BIAS_ADJUST > EMAX {
            // Only scaling gets so far.
            self.raise(PRECISION);
            self.set_c1(true);
            return Extended::infinity(real.sign);
        }
        Extended::encode(real.sign, rounded.exp - BIAS_ADJUST, rounded.sig)
    }

    fn underflow(&mut self, real: Real, precision: u32) -> Extended {
        let mode = self.mode();
        if self.masked(UNDERFLOW) {
            let rounded = real.round_subnormal(precision, EMIN, mode);
            if rounded.inexact {
                self.raise(UNDERFLOW | PRECISION);
            }
            self.set_c1(rounded.up);
            return Extended::encode(real.sign, EMIN, rounded.sig);
        }
        let rounded = real.round(precision, mode);
        self.raise(UNDERFLOW | if rounded.inexact { PRECISION } else { 0 });
        self.set_c1(rounded.up);
        if rounded.exp + BIAS_ADJUST < EMIN {
            self.raise(PRECISION);
            self.set_c1(false);
            return Extended::zero(real.sign);
        }
        Extended::encode(real.sign, rounded.exp + BIAS_ADJUST, rounded.sig)
    }

    /// Rounds a register to a single or double for memory; `None` when an exception that is not masked keeps it
    /// from being stored.
    pub(super) fn round_to_lane<L: Lane>(&mut self, value: Extended) -> Option<u64> {
        self.set_c1(false);
        let real = match value.class() {
            Class::Unsupported => return self.raise(INVALID).then_some(L::INDEFINITE),
            Class::Signaling | Class::Quiet => {
                if value.class() == Class::Signaling && !self.raise(INVALID) {
                    return None;
                }
                let fraction = value.sig >> (64 - L::PRECISION) & L::FRACTION;
                return Some(L::infinity(value.sign()) | L::QUIET | fraction);
            }
            _ => match value.number()? {
                Number::Zero(sign) => return Some(L::zero(sign)),
                Number::Infinity(sign) => return Some(L::infinity(sign)),
                Number::Finite(real) => real,
            },
        };
        let mode = self.mode();
        let mut rounded = real.round(L::PRECISION, mode);
        if rounded.exp > L::EMAX {
            if !self.masked(OVERFLOW) {
                self.raise(OVERFLOW);
                return None;
            }
            self.raise(OVERFLOW | PRECISION);
            let infinite = mode.overflows_to_infinity(real.sign);
            self.set_c1(infinite);
            return Some(L::infinity(real.sign) - u64::from(!infinite));
        }
        if rounded.exp < L::EMIN {
            if !self.masked(UNDERFLOW) {
                self.raise(UNDERFLOW);
                return None;
            }
            rounded = real.round_subnormal(L::PRECISION, L::EMIN, mode);
            if rounded.inexact {
                self.raise(UNDERFLOW);
            }
        }
        if rounded.inexact {
            self.raise(PRECISION);
        }
        self.set_c1(rounded.up);
        Some(L::encode(real.sign, rounded.exp, rounded.sig))
    }

    /// MMX register `i`.
    pub(super) const fn mm(&self, i: usize) -> u64 {
        self.regs[i & 7].sig
    }

    /// Writes an MMX register: its exponent becomes all ones, and the whole file turns to MMX use.
    #[inline]
    pub(super) fn set_mm(&mut self, i: usize, value: u64) {
        self.regs[i & 7] = Extended { sig: value, se: 0xffff };
        self.enter_mmx();
    }

    /// What every MMX instruction but EMMS does: TOP is zero and no register is empty.
    #[inline]
    pub(super) const fn enter_mmx(&mut self) {
        self.top = 0;
        self.valid = 0xff;
    }
}

/// The `i` of an ST(i) register.
pub(super) fn st_index(register: Register) -> u8 {
    (register as usize).wrapping_sub(Register::ST0 as usize) as u8 & 7
}

impl Cpu {
    /// #MF when an x87 exception that is not masked is pending.
    #[inline]
    pub(super) fn deliver_pending_x87(&self) -> Result<(), Stop> {
        if !self.fpu.x87.is_pending() {
            return Ok(());
        }
        if self.control.cr0 & cr0::NE == 0 {
            // It would assert FERR#, for an external interrupt controller of the PC/AT to report.
            return Err(Stop::Unimplemented("x87 exception reporting with CR0.NE clear"));
        }
        Err(Exception::X87.into())
    }

    /// #NM unless x87 instructions may run.
    pub(super) fn require_x87(&self) -> Result<(), Stop> {
        if self.control.cr0 & (cr0::EM | cr0::TS) != 0 { Err(Exception::NO_FPU.into()) } else { Ok(()) }
    }

    /// The checks of a waiting instruction that computes.
    pub(super) fn begin_x87(&mut self) -> Result<(), Stop> {
        self.require_x87()?;
        self.deliver_pending_x87()
    }

    /// Remembers where the instruction is, after its memory operand has been reached.
    pub(super) fn note_x87(&mut self, insn: &Instruction) -> Result<(), Stop> {
        let ip = self.rip.wrapping_sub(insn.len() as u64);
        let code = self.code_address(ip)?.0;
        let mut opcode = 0;
        // The decoded form does not keep the opcode; it follows the prefixes, and none of them looks like it.
        for at in 0..insn.len() as u64 {
            let byte = self.read::<u8>(code.wrapping_add(at))?;
            if byte >> 3 == 0b11011 {
                let modrm = self.read::<u8>(code.wrapping_add(at + 1))?;
                opcode = u16::from(byte & 7) << 8 | u16::from(modrm);
                break;
            }
        }
        let memory = insn.op0_kind() == OpKind::Memory;
        let dp = if memory { self.effective_address(insn) } else { self.fpu.x87.pointers.dp };
        let ds = if memory {
            self.segments[segment_number(insn.memory_segment())].selector
        } else {
            self.fpu.x87.pointers.ds
        };
        self.fpu.x87.pointers = Pointers { opcode, ip, cs: self.segments[seg::CS].selector, dp, ds };
        Ok(())
    }
}
