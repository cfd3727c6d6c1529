//! x87's transcendental instructions (Intel SDM volume 1, section 8.3.7 and following, and volume 2).
//!
//! Results are those of [`wide`](super::wide), rounded once: within half a unit in the last place of the function,
//! after the argument reduction with silicon's 66-bit pi. Silicon's own are within one unit, and its C1 follows
//! no such rule; here it tells of rounding up, as for arithmetic.

use iced_x86::Instruction;
use iced_x86::Mnemonic;

use crate::hv::soft::cpu::Cpu;
use crate::hv::soft::exec::Executor;
use crate::hv::soft::fault::Flow;
use crate::hv::soft::fault::Stop;

use super::extended::Extended;
use super::real::Number;
use super::real::Real;
use super::wide;
use super::x87::C1;
use super::x87::C2;
use super::x87::DIVIDE;
use super::x87::PRECISION;
use super::x87::X87;
use super::x87_arith::unary;

/// Arguments of trigonometric functions from here on are refused with C2.
const LIMIT_EXP: i32 = 63;

const ONE: Extended = Extended::encode(false, 0, 1 << 63);

pub(super) fn executor(insn: &Instruction) -> Option<Executor> {
    Some(match insn.mnemonic() {
        Mnemonic::Fsin => |cpu, insn| one_result(cpu, insn, sin),
        Mnemonic::Fcos => |cpu, insn| one_result(cpu, insn, cos),
        Mnemonic::Fsincos => |cpu, insn| two_results(cpu, insn, |x87, a| Some((sin(x87, a)?, cos(x87, a)?))),
        Mnemonic::Fptan => |cpu, insn| two_results(cpu, insn, tan),
        Mnemonic::F2xm1 => |cpu, insn| unary(cpu, insn, C1, exponential),
        Mnemonic::Fpatan => |cpu, insn| popping(cpu, insn, arc_tangent),
        Mnemonic::Fyl2x => |cpu, insn| popping(cpu, insn, logarithm),
        Mnemonic::Fyl2xp1 => |cpu, insn| popping(cpu, insn, logarithm_of_successor),
        _ => return None,
    })
}

/// A result that is not exact, whatever its trailing bits say.
fn inexact(x87: &mut X87, real: Real) -> Extended {
    x87.round(Number::Finite(Real { sig: real.sig | 1, ..real }), 64)
}

/// What is common to trigonometric operands: `Err` has the result when there is nothing to compute.
fn angle(x87: &mut X87, a: Extended) -> Result<Number, Option<Extended>> {
    if let Some(result) = x87.nan(a, a) {
        return Err(result);
    }
    match a.number() {
        None | Some(Number::Infinity(_)) => Err(x87.invalid()),
        Some(number) => {
            if x87.note_denormals(a, a, false) {
                Ok(number)
            } else {
                Err(None)
            }
        }
    }
}

fn is_out_of_range(a: Extended) -> bool {
    matches!(a.number(), Some(Number::Finite(real)) if real.exp >= LIMIT_EXP)
}

/// Sine of the reduced argument, `quadrant` quarter turns on.
fn turned_sin(r: Option<Real>, quadrant: u64) -> Option<Real> {
    let value = match r {
        Some(r) if quadrant & 1 == 0 => wide::sin(r),
        Some(r) => wide::cos(r),
        None if quadrant & 1 == 0 => return None,
        None => Real::from_magnitude(false, 1),
    };
    Some(value.negate_if(quadrant & 2 != 0))
}

fn sin(x87: &mut X87, a: Extended) -> Option<Extended> {
    match angle(x87, a) {
        Err(result) => result,
        Ok(Number::Finite(real)) => {
            let (r, quadrant) = wide::reduce(real);
            Some(turned_sin(r, quadrant).map_or(Extended::zero(a.sign()), |value| inexact(x87, value)))
        }
        Ok(_) => Some(a),
    }
}

fn cos(x87: &mut X87, a: Extended) -> Option<Extended> {
    match angle(x87, a) {
        Err(result) => result,
        Ok(Number::Finite(real)) => {
            let (r, quadrant) = wide::reduce(real);
            let value = turned_sin(r, quadrant.wrapping_add(1));
            Some(value.map_or(Extended::zero(false), |value| inexact(x87, value)))
        }
        Ok(_) => Some(ONE),
    }
}

/// FPTAN's two results: the tangent, and the one that is pushed after it.
fn tan(x87: &mut X87, a: Extended) -> Option<(Extended, Extended)> {
    match angle(x87, a) {
        Err(result) => result.map(|nan| (nan, nan)),
        Ok(Number::Finite(real)) => {
            let (r, quadrant) = wide::reduce(real);
            let sine = turned_sin(r, quadrant);
            let cosine = turned_sin(r, quadrant.wrapping_add(1));
            let tangent = match (sine, cosine) {
                (Some(sine), Some(cosine)) => inexact(x87, wide::div(sine, cosine)),
                (None, _) => Extended::zero(a.sign()),
                (_, None) => Extended::infinity(a.sign()),
            };
            Some((tangent, ONE))
        }
        Ok(_) => Some((a, ONE)),
    }
}

fn one_result(
    cpu: &mut Cpu,
    insn: &Instruction,
    f: impl FnOnce(&mut X87, Extended) -> Option<Extended>,
) -> Result<Flow, Stop> {
    unary(cpu, insn, C1 | C2, |x87, a| {
        if is_out_of_range(a) {
            x87.set_condition(C2, C2);
            return Some(a);
        }
        f(x87, a)
    })
}

/// The first result replaces ST(0), the second is pushed.
fn two_results(
    cpu: &mut Cpu,
    insn: &Instruction,
    f: impl FnOnce(&mut X87, Extended) -> Option<(Extended, Extended)>,
) -> Result<Flow, Stop> {
    cpu.begin_x87()?;
    cpu.note_x87(insn)?;
    let x87 = &mut cpu.fpu.x87;
    x87.set_condition(C1 | C2, 0);
    let value = x87.raw(0);
    let results = if x87.is_empty(0) || !x87.is_empty(7) {
        let overflow = !x87.is_empty(0);
        let nan = x87.underflow_stack();
        x87.set_c1(overflow);
        nan.map(|nan| (nan, nan))
    } else if is_out_of_range(value) {
        x87.set_condition(C2, C2);
        None
    } else {
        f(x87, value)
    };
    if let Some((first, second)) = results {
        x87.set(0, first);
        x87.push(second);
    }
    Ok(Flow::Next)
}

/// An operation on ST(1) and ST(0), in this order, that replaces both.
fn popping(
    cpu: &mut Cpu,
    insn: &Instruction,
    f: impl FnOnce(&mut X87, Extended, Extended) -> Option<Extended>,
) -> Result<Flow, Stop> {
    cpu.begin_x87()?;
    cpu.note_x87(insn)?;
    let x87 = &mut cpu.fpu.x87;
    x87.set_c1(false);
    let (y, x) = (x87.raw(1), x87.raw(0));
    let result = if x87.is_empty(0) || x87.is_empty(1) {
        x87.underflow_stack()
    } else if let Some(result) = x87.nan(x, y) {
        result
    } else {
        f(x87, y, x)
    };
    if let Some(result) = result {
        x87.set(1, result);
        x87.pop();
    }
    Ok(Flow::Next)
}

/// F2XM1; from one on the operand is returned: right for one, and what silicon does where it is not defined.
fn exponential(x87: &mut X87, a: Extended) -> Option<Extended> {
    if let Some(result) = x87.nan(a, a) {
        return result;
    }
    match a.number() {
        None => x87.invalid(),
        Some(Number::Zero(_)) => Some(a),
        Some(Number::Infinity(sign)) => Some(if sign { Extended::encode(true, 0, 1 << 63) } else { a }),
        Some(Number::Finite(real)) => {
            if !x87.note_denormals(a, a, false) {
                return None;
            }
            match real.exp {
                // Exact, but silicon says otherwise.
                0 if real.sig == 1 << 127 && real.sign => {
                    x87.raise(PRECISION);
                    Some(Extended::encode(true, -1, 1 << 63))
                }
                0.. => {
                    x87.raise(PRECISION);
                    Some(a)
                }
                _ => Some(inexact(x87, wide::exp2_minus_1(real))),
            }
        }
    }
}

fn arc_tangent(x87: &mut X87, y: Extended, x: Extended) -> Option<Extended> {
    let (Some(up), Some(right)) = (y.number(), x.number()) else { return x87.invalid() };
    if !x87.note_denormals(y, x, false) {
        return None;
    }
    let sign = up.sign();
    let pi_times = |x87: &mut X87, quarters: u64| {
        let pi = if quarters == 3 { wide::mul(wide::PI, Real::from_magnitude(false, 3)) } else { wide::PI };
        let exp = pi.exp - [0, 2, 1, 2, 0][quarters as usize];
        Some(inexact(x87, Real { sign, exp, ..pi }))
    };
    match (up, right) {
        (Number::Infinity(_), Number::Infinity(left)) => pi_times(x87, if left { 3 } else { 1 }),
        (Number::Infinity(_), _) => pi_times(x87, 2),
        (Number::Zero(_), _) | (_, Number::Infinity(_)) => {
            if right.sign() {
                pi_times(x87, 4)
            } else {
                Some(Extended::zero(sign))
            }
        }
        (_, Number::Zero(_)) => pi_times(x87, 2),
        (Number::Finite(up), Number::Finite(right)) => Some(inexact(x87, wide::atan2(up, right))),
    }
}

/// FYL2X: ST(1) times the binary logarithm of ST(0).
fn logarithm(x87: &mut X87, y: Extended, x: Extended) -> Option<Extended> {
    let (Some(factor), Some(value)) = (y.number(), x.number()) else { return x87.invalid() };
    let one = Number::Finite(Real::from_magnitude(false, 1));
    let logarithm = match value {
        Number::Zero(_) => {
            return match factor {
                Number::Zero(_) => x87.invalid(),
                Number::Infinity(sign) => Some(Extended::infinity(!sign)),
                Number::Finite(real) => x87.raise(DIVIDE).then_some(Extended::infinity(!real.sign)),
            };
        }
        _ if value.sign() => return x87.invalid(),
        Number::Infinity(_) => value,
        _ if value == one => Number::Zero(false),
        // Exact powers of two give exact logarithms.
        Number::Finite(real) if real.sig == 1 << 127 => {
            Number::Finite(Real::from_magnitude(real.exp < 0, real.exp.unsigned_abs().into()))
        }
        Number::Finite(real) => Number::Finite(wide::log2(real)),
    };
    times(x87, y, x, factor, logarithm)
}

/// FYL2XP1: ST(1) times the binary logarithm of ST(0) plus one.
fn logarithm_of_successor(x87: &mut X87, y: Extended, x: Extended) -> Option<Extended> {
    let (Some(factor), Some(value)) = (y.number(), x.number()) else { return x87.invalid() };
    let logarithm = match value {
        Number::Zero(_) | Number::Infinity(false) => value,
        Number::Infinity(true) => return x87.invalid(),
        // Where the instruction is not defined, silicon returns the operand.
        Number::Finite(real) if real.sign && real.exp >= 0 => {
            if !x87.note_denormals(y, x, false) {
                return None;
            }
            return Some(match factor {
                Number::Zero(sign) => Extended::zero(!sign),
                Number::Infinity(sign) => Extended::infinity(!sign),
                Number::Finite(_) => {
                    x87.raise(PRECISION);
                    x
                }
            });
        }
        Number::Finite(real) => {
            let logarithm = wide::log2_1p(real);
            Number::Finite(Real { sig: logarithm.sig | 1, ..logarithm })
        }
    };
    times(x87, y, x, factor, logarithm)
}

/// The product of a factor and a logarithm, which is exact only if short.
fn times(x87: &mut X87, y: Extended, x: Extended, factor: Number, logarithm: Number) -> Option<Extended> {
    match (factor, logarithm) {
        (Number::Infinity(_), Number::Zero(_)) | (Number::Zero(_), Number::Infinity(_)) => return x87.invalid(),
        _ => {}
    }
    if !x87.note_denormals(y, x, false) {
        return None;
    }
    let sign = factor.sign() ^ logarithm.sign();
    Some(match (factor, logarithm) {
        (Number::Infinity(_), _) | (_, Number::Infinity(_)) => Extended::infinity(sign),
        (Number::Zero(_), _) | (_, Number::Zero(_)) => Extended::zero(sign),
        (Number::Finite(factor), Number::Finite(logarithm)) => {
            if logarithm.sig as u64 == 0 {
                x87.round(Number::Finite(factor.mul(logarithm)), 64)
            } else {
                inexact(x87, wide::mul(factor, logarithm))
            }
        }
    })
}
