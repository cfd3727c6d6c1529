//! x87 arithmetic that is correctly rounded: the basic operations, square root, scaling, remainders and rounding to
//! integers (Intel SDM volume 1, section 8.3.5, and volume 2 for each instruction).

use iced_x86::Instruction;
use iced_x86::Mnemonic;
use iced_x86::OpKind;

use crate::hv::soft::cpu::Cpu;
use crate::hv::soft::exec::Executor;
use crate::hv::soft::fault::Flow;
use crate::hv::soft::fault::Stop;

use super::extended::Class;
use super::extended::Extended;
use super::real::Mode;
use super::real::Number;
use super::real::Outcome;
use super::real::Real;
use super::x87::C0;
use super::x87::C1;
use super::x87::C2;
use super::x87::C3;
use super::x87::DIVIDE;
use super::x87::PRECISION;
use super::x87::X87;
use super::x87::st_index;
use super::x87_move::read_operand;

/// `f` is given the target's value first.
macro_rules! binary {
    ($pop:expr, $f:expr) => {
        (|cpu, insn| arithmetic(cpu, insn, $pop, $f)) as Executor
    };
}

pub(super) fn executor(insn: &Instruction) -> Option<Executor> {
    Some(match insn.mnemonic() {
        Mnemonic::Fadd | Mnemonic::Fiadd => binary!(false, |a, b, mode| a.add(b, mode)),
        Mnemonic::Faddp => binary!(true, |a, b, mode| a.add(b, mode)),
        Mnemonic::Fsub | Mnemonic::Fisub => binary!(false, |a, b, mode| a.add(b.negate(), mode)),
        Mnemonic::Fsubp => binary!(true, |a, b, mode| a.add(b.negate(), mode)),
        Mnemonic::Fsubr | Mnemonic::Fisubr => binary!(false, |a, b, mode| b.add(a.negate(), mode)),
        Mnemonic::Fsubrp => binary!(true, |a, b, mode| b.add(a.negate(), mode)),
        Mnemonic::Fmul | Mnemonic::Fimul => binary!(false, |a, b, _| a.mul(b)),
        Mnemonic::Fmulp => binary!(true, |a, b, _| a.mul(b)),
        Mnemonic::Fdiv | Mnemonic::Fidiv => binary!(false, |a, b, _| a.div(b)),
        Mnemonic::Fdivp => binary!(true, |a, b, _| a.div(b)),
        Mnemonic::Fdivr | Mnemonic::Fidivr => binary!(false, |a, b, _| b.div(a)),
        Mnemonic::Fdivrp => binary!(true, |a, b, _| b.div(a)),
        Mnemonic::Fsqrt => |cpu, insn| unary(cpu, insn, C1, |x87, a| x87.operate(a, a, false, |a, _, _| a.sqrt())),
        Mnemonic::Fabs => |cpu, insn| unary(cpu, insn, C1, |_, a| Some(a.with_sign(false))),
        Mnemonic::Fchs => |cpu, insn| unary(cpu, insn, C1, |_, a| Some(a.with_sign(!a.sign()))),
        Mnemonic::Frndint => |cpu, insn| unary(cpu, insn, C1, round_to_integer),
        Mnemonic::Fscale => |cpu, insn| with_second(cpu, insn, C1, scale),
        Mnemonic::Fprem => |cpu, insn| with_second(cpu, insn, C1 | C2, |x87, a, b| remainder(x87, a, b, false)),
        Mnemonic::Fprem1 => |cpu, insn| with_second(cpu, insn, C1 | C2, |x87, a, b| remainder(x87, a, b, true)),
        Mnemonic::Fxtract => extract,
        _ => return None,
    })
}

/// The two-operand forms: with memory, ST(0) is the target; with registers, the first operand is.
#[inline(always)]
fn arithmetic(
    cpu: &mut Cpu,
    insn: &Instruction,
    pop: bool,
    f: impl FnOnce(Number, Number, Mode) -> Outcome,
) -> Result<Flow, Stop> {
    cpu.begin_x87()?;
    let memory = if insn.op0_kind() == OpKind::Memory { Some(read_operand(cpu, insn)?) } else { None };
    cpu.note_x87(insn)?;
    let x87 = &mut cpu.fpu.x87;
    let (target, source) = match memory {
        Some(_) => (0, 0),
        None => (st_index(insn.op0_register()), st_index(insn.op1_register())),
    };
    let result = if x87.is_empty(target) || x87.is_empty(source) {
        x87.underflow_stack()
    } else {
        let (value, denormal) = memory.unwrap_or_else(|| (x87.raw(source), false));
        x87.operate(x87.raw(target), value, denormal, f)
    };
    if let Some(result) = result {
        x87.set(target, result);
        if pop {
            x87.pop();
        }
    }
    Ok(Flow::Next)
}

/// An operation on ST(0); `clear` are the condition codes that it clears first.
pub(super) fn unary(
    cpu: &mut Cpu,
    insn: &Instruction,
    clear: u16,
    f: impl FnOnce(&mut X87, Extended) -> Option<Extended>,
) -> Result<Flow, Stop> {
    cpu.begin_x87()?;
    cpu.note_x87(insn)?;
    let x87 = &mut cpu.fpu.x87;
    x87.set_condition(clear, 0);
    let result = if x87.is_empty(0) { x87.underflow_stack() } else { f(x87, x87.raw(0)) };
    if let Some(result) = result {
        x87.set(0, result);
    }
    Ok(Flow::Next)
}

/// An operation on ST(0) and ST(1), which stays; `clear` as for [`unary`].
fn with_second(
    cpu: &mut Cpu,
    insn: &Instruction,
    clear: u16,
    f: impl FnOnce(&mut X87, Extended, Extended) -> Option<Extended>,
) -> Result<Flow, Stop> {
    cpu.begin_x87()?;
    cpu.note_x87(insn)?;
    let x87 = &mut cpu.fpu.x87;
    x87.set_condition(clear, 0);
    let result =
        if x87.is_empty(0) || x87.is_empty(1) { x87.underflow_stack() } else { f(x87, x87.raw(0), x87.raw(1)) };
    if let Some(result) = result {
        x87.set(0, result);
    }
    Ok(Flow::Next)
}

fn round_to_integer(x87: &mut X87, a: Extended) -> Option<Extended> {
    if let Some(result) = x87.nan(a, a) {
        return result;
    }
    let Some(Number::Finite(real)) = a.number() else { return Some(a) };
    if real.exp >= 63 {
        return Some(a);
    }
    if !x87.note_denormals(a, a, false) {
        return None;
    }
    let (magnitude, inexact, up) = real.round_to_integer(x87.mode())?;
    if inexact {
        x87.raise(PRECISION);
        x87.set_c1(up);
    }
    if magnitude == 0 {
        return Some(Extended::zero(real.sign));
    }
    let shift = magnitude.leading_zeros();
    Some(Extended::encode(real.sign, 63 - shift as i32, magnitude << shift))
}

/// FSCALE: ST(0) times two to the power of ST(1) truncated.
fn scale(x87: &mut X87, a: Extended, b: Extended) -> Option<Extended> {
    if let Some(result) = x87.nan(a, b) {
        return result;
    }
    let (Some(value), Some(by)) = (a.number(), b.number()) else { return x87.invalid() };
    let result = match (value, by) {
        (Number::Zero(_), Number::Infinity(false)) | (Number::Infinity(_), Number::Infinity(true)) => {
            return x87.invalid();
        }
        (Number::Infinity(_), _) => value,
        (Number::Zero(_), _) => value,
        (Number::Finite(real), Number::Infinity(sign)) => {
            if sign {
                Number::Zero(real.sign)
            } else {
                Number::Infinity(real.sign)
            }
        }
        (_, Number::Zero(_)) => value,
        (Number::Finite(real), Number::Finite(by)) => {
            // Beyond this every value over- or underflows even with its exponent adjusted.
            const FAR: u64 = 0x1_0000;
            let steps = by.round_to_integer(Mode::Zero).map_or(FAR, |(magnitude, ..)| magnitude.min(FAR)) as i32;
            Number::Finite(Real { exp: real.exp + if by.sign { -steps } else { steps }, ..real })
        }
    };
    if !x87.note_denormals(a, b, false) {
        return None;
    }
    Some(x87.round(result, 64))
}

/// FPREM and FPREM1. A quotient below 2^64 is found whole; from farther apart, the exponent difference shrinks
/// by at most 63 and C2 says that the reduction is not finished.
fn remainder(x87: &mut X87, a: Extended, b: Extended, nearest: bool) -> Option<Extended> {
    if let Some(result) = x87.nan(a, b) {
        return result;
    }
    let (dividend, divisor) = match (a.number(), b.number()) {
        (Some(Number::Infinity(_)), _) | (_, Some(Number::Zero(_))) | (None, _) | (_, None) => return x87.invalid(),
        (Some(Number::Finite(a)), Some(Number::Finite(b))) => (a, b),
        (Some(number), Some(_)) => {
            if !x87.note_denormals(a, b, false) {
                return None;
            }
            x87.set_condition(C0 | C3, 0);
            return Some(x87.round(number, 64));
        }
    };
    if !x87.note_denormals(a, b, false) {
        return None;
    }
    x87.set_condition(C0 | C3, 0);
    let apart = dividend.exp - divisor.exp;
    if apart < -1 || apart == -1 && !nearest {
        return Some(x87.round(Number::Finite(dividend), 64));
    }
    if apart >= 64 {
        let steps = 32 + apart % 32;
        let (rest, _) = reduce(dividend.sig, divisor.sig >> 64, steps);
        x87.set_condition(C2, C2);
        let number = as_number(dividend.sign, rest, divisor.exp + apart - steps);
        return Some(x87.round(number, 64));
    }
    let (mut rest, mut quotient, unit, exp) = if apart < 0 {
        // The divisor is the longer by one bit.
        (dividend.sig >> 64, 0, divisor.sig >> 63, dividend.exp)
    } else {
        let (rest, quotient) = reduce(dividend.sig, divisor.sig >> 64, apart);
        (rest, quotient, divisor.sig >> 64, divisor.exp)
    };
    let mut sign = dividend.sign;
    if nearest && (2 * rest > unit || 2 * rest == unit && quotient & 1 == 1) {
        rest = unit - rest;
        quotient += 1;
        sign = !sign;
    }
    let bit = |n: u32, flag: u16| if quotient >> n & 1 == 1 { flag } else { 0 };
    x87.set_condition(C0 | C1 | C3, bit(2, C0) | bit(1, C3) | bit(0, C1));
    let condition = x87.status & C1;
    let result = if rest == 0 { Extended::zero(dividend.sign) } else { x87.round(as_number(sign, rest, exp), 64) };
    x87.set_condition(C1, condition);
    Some(result)
}

/// Long division of two 64-bit significands, the dividend's scaled up by `steps` bits: remainder and the low
/// quotient bits.
fn reduce(dividend: u128, divisor: u128, steps: i32) -> (u128, u64) {
    let mut rest = dividend >> 64;
    let mut quotient = u64::from(rest >= divisor);
    if rest >= divisor {
        rest -= divisor;
    }
    for _ in 0..steps {
        rest <<= 1;
        quotient <<= 1;
        if rest >= divisor {
            rest -= divisor;
            quotient |= 1;
        }
    }
    (rest, quotient)
}

/// A 64-bit magnitude in units of 2^(exp - 63).
fn as_number(sign: bool, magnitude: u128, exp: i32) -> Number {
    if magnitude == 0 { Number::Zero(sign) } else { Number::Finite(Real::new(sign, exp, magnitude << 64)) }
}

/// FXTRACT: the exponent stays in place of the value, the significand is pushed.
fn extract(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    cpu.begin_x87()?;
    cpu.note_x87(insn)?;
    let x87 = &mut cpu.fpu.x87;
    x87.set_c1(false);
    let value = x87.raw(0);
    if x87.is_empty(0) || !x87.is_empty(7) {
        let overflow = !x87.is_empty(0);
        if let Some(nan) = x87.underflow_stack() {
            x87.set(0, nan);
            x87.push(nan);
        }
        x87.set_c1(overflow);
        return Ok(Flow::Next);
    }
    let parts = match x87.nan(value, value) {
        Some(result) => result.map(|nan| (nan, nan)),
        None => split(x87, value),
    };
    if let Some((exponent, significand)) = parts {
        x87.set(0, exponent);
        x87.push(significand);
    }
    Ok(Flow::Next)
}

fn split(x87: &mut X87, value: Extended) -> Option<(Extended, Extended)> {
    match value.number()? {
        Number::Zero(_) => x87.raise(DIVIDE).then_some((Extended::infinity(true), value)),
        Number::Infinity(_) => Some((Extended::infinity(false), value)),
        Number::Finite(real) => {
            if value.class() == Class::Denormal && !x87.note_denormals(value, value, false) {
                return None;
            }
            Some((Extended::from_int(real.exp.into()), Extended::encode(real.sign, 0, (real.sig >> 64) as u64)))
        }
    }
}
