//! SSE floating-point arithmetic and comparison, scalar and packed (Intel SDM volume 1, sections 10.4.1, 11.4.1 and
//! 11.5; volume 2 for each instruction).
//!
//! With the environment that programs run in (nearest rounding, all exceptions masked) and plain operands and
//! result, host arithmetic gives the value, and the only exception it can have is precision; once that flag is
//! sticky, nothing else is to be found out. Everything else goes through [`Env`].

use std::cmp::Ordering;

use iced_x86::Instruction;
use iced_x86::Mnemonic;

use crate::hv::soft::cpu::Cpu;
use crate::hv::soft::exec::Executor;
use crate::hv::soft::fault::Flow;
use crate::hv::soft::fault::Stop;
use crate::hv::soft::flags;

use super::access::xmm_index;
use super::lane::Double;
use super::lane::Lane;
use super::lane::Single;
use super::lane::dwords;
use super::lane::from_dwords;
use super::lane::from_qwords;
use super::lane::qwords;
use super::mxcsr::Env;

/// Executors of one operation in its four forms.
macro_rules! binary {
    ($insn:expr, $ps:ident, $pd:ident, $ss:ident, $sd:ident, $f:ident) => {
        match $insn.mnemonic() {
            Mnemonic::$ps => Some((|cpu, insn| packed::<Single>(cpu, insn, $f::<Single>)) as Executor),
            Mnemonic::$pd => Some((|cpu, insn| packed::<Double>(cpu, insn, $f::<Double>)) as Executor),
            Mnemonic::$ss => Some((|cpu, insn| scalar::<Single>(cpu, insn, $f::<Single>)) as Executor),
            Mnemonic::$sd => Some((|cpu, insn| scalar::<Double>(cpu, insn, $f::<Double>)) as Executor),
            _ => None,
        }
    };
}

pub(super) fn executor(insn: &Instruction) -> Option<Executor> {
    binary!(insn, Addps, Addpd, Addss, Addsd, add)
        .or_else(|| binary!(insn, Subps, Subpd, Subss, Subsd, sub))
        .or_else(|| binary!(insn, Mulps, Mulpd, Mulss, Mulsd, mul))
        .or_else(|| binary!(insn, Divps, Divpd, Divss, Divsd, div))
        .or_else(|| binary!(insn, Minps, Minpd, Minss, Minsd, min))
        .or_else(|| binary!(insn, Maxps, Maxpd, Maxss, Maxsd, max))
        .or_else(|| binary!(insn, Sqrtps, Sqrtpd, Sqrtss, Sqrtsd, sqrt))
        .or_else(|| compare_executor(insn))
}

fn compare_executor(insn: &Instruction) -> Option<Executor> {
    Some(match insn.mnemonic() {
        Mnemonic::Cmpps => compare_form::<Single, true>(insn),
        Mnemonic::Cmppd => compare_form::<Double, true>(insn),
        Mnemonic::Cmpss => compare_form::<Single, false>(insn),
        Mnemonic::Cmpsd => compare_form::<Double, false>(insn),
        Mnemonic::Comiss => |cpu, insn| compare_flags::<Single, true>(cpu, insn),
        Mnemonic::Comisd => |cpu, insn| compare_flags::<Double, true>(cpu, insn),
        Mnemonic::Ucomiss => |cpu, insn| compare_flags::<Single, false>(cpu, insn),
        Mnemonic::Ucomisd => |cpu, insn| compare_flags::<Double, false>(cpu, insn),
        Mnemonic::Rcpps => |cpu, insn| estimate_packed(cpu, insn, reciprocal),
        Mnemonic::Rcpss => |cpu, insn| estimate_scalar(cpu, insn, reciprocal),
        Mnemonic::Rsqrtps => |cpu, insn| estimate_packed(cpu, insn, reciprocal_root),
        Mnemonic::Rsqrtss => |cpu, insn| estimate_scalar(cpu, insn, reciprocal_root),
        _ => return None,
    })
}

/// Applies `f` to the lanes of two operands.
#[inline(always)]
fn lanes<L: Lane>(env: &mut Env, a: u128, b: u128, f: impl Fn(&mut Env, u64, u64) -> u64) -> u128 {
    if L::BITS == 32 {
        let (a, b) = (dwords(a), dwords(b));
        from_dwords(std::array::from_fn(|n| f(env, a[n].into(), b[n].into()) as u32))
    } else {
        let (a, b) = (qwords(a), qwords(b));
        from_qwords(std::array::from_fn(|n| f(env, a[n], b[n])))
    }
}

#[inline(always)]
fn packed<L: Lane>(cpu: &mut Cpu, insn: &Instruction, f: impl Fn(&mut Env, u64, u64) -> u64) -> Result<Flow, Stop> {
    cpu.require_sse()?;
    let b = cpu.xmm_source(insn, 1)?;
    let target = xmm_index(insn.op0_register());
    let mut env = Env::new(cpu.fpu.mxcsr);
    let result = lanes::<L>(&mut env, cpu.fpu.xmm[target], b, f);
    env.finish(cpu)?;
    cpu.fpu.xmm[target] = result;
    Ok(Flow::Next)
}

/// Replaces the low lane.
#[inline(always)]
pub(super) fn set_lane<L: Lane>(cpu: &mut Cpu, index: usize, lane: u64) {
    let target = &mut cpu.fpu.xmm[index];
    *target = *target & !(u128::MAX >> (128 - L::BITS)) | u128::from(lane);
}

#[inline(always)]
fn lane<L: Lane>(value: u128) -> u64 {
    value as u64 & (u64::MAX >> (64 - L::BITS))
}

#[inline(always)]
fn scalar<L: Lane>(cpu: &mut Cpu, insn: &Instruction, f: impl Fn(&mut Env, u64, u64) -> u64) -> Result<Flow, Stop> {
    cpu.require_sse()?;
    let b = cpu.scalar_source::<L>(insn, 1)?;
    let target = xmm_index(insn.op0_register());
    let mut env = Env::new(cpu.fpu.mxcsr);
    let result = f(&mut env, lane::<L>(cpu.fpu.xmm[target]), b);
    env.finish(cpu)?;
    set_lane::<L>(cpu, target, result);
    Ok(Flow::Next)
}

#[inline(always)]
fn add<L: Lane>(env: &mut Env, a: u64, b: u64) -> u64 {
    if env.nearest && L::is_plain(a) && L::is_plain(b) {
        let sum = L::host_add(a, b);
        // A zero sum of plain numbers is exact.
        if sum & !L::SIGN == 0 || L::is_safely_normal(sum) && (env.plain || is_exact_sum::<L>(a, b, sum)) {
            return sum;
        }
    }
    add_fully::<L>(env, a, b)
}

/// Whether a finite sum lost nothing: its rounding error, as Knuth's two-sum finds it, is zero.
#[inline(always)]
fn is_exact_sum<L: Lane>(a: u64, b: u64, sum: u64) -> bool {
    let from_b = L::host_sub(sum, a);
    let from_a = L::host_sub(sum, from_b);
    let error = L::host_add(L::host_sub(a, from_a), L::host_sub(b, from_b));
    error & !L::SIGN == 0
}

fn add_fully<L: Lane>(env: &mut Env, a: u64, b: u64) -> u64 {
    env.nan::<L>(a, b).unwrap_or_else(|| {
        let sum = env.number::<L>(a).add(env.number::<L>(b), env.mode());
        env.outcome::<L>(sum, &[a, b])
    })
}

#[inline(always)]
fn sub<L: Lane>(env: &mut Env, a: u64, b: u64) -> u64 {
    if env.nearest && L::is_plain(a) && L::is_plain(b) {
        let difference = L::host_sub(a, b);
        let exact = || env.plain || is_exact_sum::<L>(a, b ^ L::SIGN, difference);
        if difference & !L::SIGN == 0 || L::is_safely_normal(difference) && exact() {
            return difference;
        }
    }
    sub_fully::<L>(env, a, b)
}

fn sub_fully<L: Lane>(env: &mut Env, a: u64, b: u64) -> u64 {
    env.nan::<L>(a, b).unwrap_or_else(|| {
        let difference = env.number::<L>(a).add(env.number::<L>(b).negate(), env.mode());
        env.outcome::<L>(difference, &[a, b])
    })
}

#[inline(always)]
fn mul<L: Lane>(env: &mut Env, a: u64, b: u64) -> u64 {
    if env.plain && L::is_plain(a) && L::is_plain(b) {
        let product = L::host_mul(a, b);
        if L::is_safely_normal(product) {
            return product;
        }
    }
    mul_fully::<L>(env, a, b)
}

fn mul_fully<L: Lane>(env: &mut Env, a: u64, b: u64) -> u64 {
    env.nan::<L>(a, b).unwrap_or_else(|| {
        let product = env.number::<L>(a).mul(env.number::<L>(b));
        env.outcome::<L>(product, &[a, b])
    })
}

#[inline(always)]
fn div<L: Lane>(env: &mut Env, a: u64, b: u64) -> u64 {
    if env.plain && L::is_plain(a) && L::is_plain(b) {
        let quotient = L::host_div(a, b);
        if L::is_safely_normal(quotient) {
            return quotient;
        }
    }
    div_fully::<L>(env, a, b)
}

fn div_fully<L: Lane>(env: &mut Env, a: u64, b: u64) -> u64 {
    env.nan::<L>(a, b).unwrap_or_else(|| {
        let quotient = env.number::<L>(a).div(env.number::<L>(b));
        env.outcome::<L>(quotient, &[a, b])
    })
}

#[inline(always)]
fn sqrt<L: Lane>(env: &mut Env, _: u64, b: u64) -> u64 {
    if env.plain && L::is_safely_normal(b) && b & L::SIGN == 0 {
        return L::host_sqrt(b);
    }
    env.nan::<L>(b, b).unwrap_or_else(|| {
        let root = env.number::<L>(b).sqrt();
        env.outcome::<L>(root, &[b])
    })
}

/// Orders two operands for MIN and MAX, which return the second for zeros and for any NaN.
fn order<L: Lane>(env: &mut Env, a: u64, b: u64) -> Option<Ordering> {
    if L::is_nan(a) || L::is_nan(b) {
        env.raise_invalid();
        return None;
    }
    env.note_denormals::<L>(&[a, b]);
    Some(env.number::<L>(a).compare(env.number::<L>(b)))
}

fn min<L: Lane>(env: &mut Env, a: u64, b: u64) -> u64 {
    if order::<L>(env, a, b) == Some(Ordering::Less) { env.flushed::<L>(a) } else { env.flushed::<L>(b) }
}

fn max<L: Lane>(env: &mut Env, a: u64, b: u64) -> u64 {
    if order::<L>(env, a, b) == Some(Ordering::Greater) { env.flushed::<L>(a) } else { env.flushed::<L>(b) }
}

/// Compares; `None` when unordered. `signal` makes quiet NaNs invalid too.
#[inline(always)]
fn compare<L: Lane>(env: &mut Env, a: u64, b: u64, signal: bool) -> Option<Ordering> {
    if L::is_plain(a) && L::is_plain(b) {
        return Some(if L::host_lt(a, b) {
            Ordering::Less
        } else if L::host_lt(b, a) {
            Ordering::Greater
        } else {
            Ordering::Equal
        });
    }
    compare_fully::<L>(env, a, b, signal)
}

fn compare_fully<L: Lane>(env: &mut Env, a: u64, b: u64, signal: bool) -> Option<Ordering> {
    if L::is_nan(a) || L::is_nan(b) {
        if signal || L::is_signaling(a) || L::is_signaling(b) {
            env.raise_invalid();
        }
        return None;
    }
    env.note_denormals::<L>(&[a, b]);
    Some(env.number::<L>(a).compare(env.number::<L>(b)))
}

#[inline(always)]
fn compare_flags<L: Lane, const SIGNAL: bool>(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    cpu.require_sse()?;
    let b = cpu.scalar_source::<L>(insn, 1)?;
    let a = lane::<L>(cpu.fpu.xmm[xmm_index(insn.op0_register())]);
    let mut env = Env::new(cpu.fpu.mxcsr);
    let order = compare::<L>(&mut env, a, b, SIGNAL);
    env.finish(cpu)?;
    cpu.flags.set_rflags(match order {
        None => flags::ZF | flags::PF | flags::CF,
        Some(Ordering::Less) => flags::CF,
        Some(Ordering::Equal) => flags::ZF,
        Some(Ordering::Greater) => 0,
    });
    Ok(Flow::Next)
}

/// Predicate `P` of CMPPS and its kind: the lowest bit pairs it with another operand order, bit 2 negates.
#[inline(always)]
fn predicate<L: Lane, const P: u8>(env: &mut Env, a: u64, b: u64) -> u64 {
    let order = compare::<L>(env, a, b, matches!(P & 3, 1 | 2));
    let holds = match P & 3 {
        0 => order == Some(Ordering::Equal),
        1 => order == Some(Ordering::Less),
        2 => matches!(order, Some(Ordering::Less | Ordering::Equal)),
        _ => order.is_none(),
    };
    if holds != (P & 4 != 0) { u64::MAX >> (64 - L::BITS) } else { 0 }
}

fn compare_form<L: Lane, const PACKED: bool>(insn: &Instruction) -> Executor {
    fn form<L: Lane, const PACKED: bool, const P: u8>(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
        if PACKED { packed::<L>(cpu, insn, predicate::<L, P>) } else { scalar::<L>(cpu, insn, predicate::<L, P>) }
    }
    match insn.immediate8() & 7 {
        0 => form::<L, PACKED, 0>,
        1 => form::<L, PACKED, 1>,
        2 => form::<L, PACKED, 2>,
        3 => form::<L, PACKED, 3>,
        4 => form::<L, PACKED, 4>,
        5 => form::<L, PACKED, 5>,
        6 => form::<L, PACKED, 6>,
        _ => form::<L, PACKED, 7>,
    }
}

fn estimate_packed(cpu: &mut Cpu, insn: &Instruction, f: fn(u32) -> u32) -> Result<Flow, Stop> {
    cpu.require_sse()?;
    let b = cpu.xmm_source(insn, 1)?;
    cpu.fpu.xmm[xmm_index(insn.op0_register())] = from_dwords(dwords(b).map(f));
    Ok(Flow::Next)
}

fn estimate_scalar(cpu: &mut Cpu, insn: &Instruction, f: fn(u32) -> u32) -> Result<Flow, Stop> {
    cpu.require_sse()?;
    let b = cpu.low_source::<32>(insn, 1)? as u32;
    set_lane::<Single>(cpu, xmm_index(insn.op0_register()), f(b).into());
    Ok(Flow::Next)
}

const SIGN: u32 = 1 << 31;
const INFINITY: u32 = 0x7f80_0000;
const QUIET: u32 = 1 << 22;
const INDEFINITE: u32 = 0xffc0_0000;

/// RCPPS may be off by 1.5 * 2^-12 of the value, and silicon differs between vendors; here it is the correctly
/// rounded quotient. What the manuals fix is kept: denormals count as zeros on either side, and no exceptions.
fn reciprocal(bits: u32) -> u32 {
    let (sign, magnitude) = (bits & SIGN, bits & !SIGN);
    if magnitude > INFINITY {
        bits | QUIET
    } else if magnitude < 1 << 23 {
        sign | INFINITY
    } else {
        let quotient = (1.0 / f32::from_bits(magnitude)).to_bits();
        if quotient < 1 << 23 { sign } else { sign | quotient }
    }
}

/// RSQRTPS, with the same freedom; through double precision, correctly rounded but for one case in 2^28.
fn reciprocal_root(bits: u32) -> u32 {
    let (sign, magnitude) = (bits & SIGN, bits & !SIGN);
    if magnitude > INFINITY {
        bits | QUIET
    } else if magnitude < 1 << 23 {
        sign | INFINITY
    } else if sign != 0 {
        INDEFINITE
    } else {
        ((1.0 / f64::from(f32::from_bits(bits)).sqrt()) as f32).to_bits()
    }
}
