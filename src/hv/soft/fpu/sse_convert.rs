//! Conversions between integers, singles and doubles in XMM, MMX and general registers (Intel SDM volume 1,
//! sections 10.4.3 and 11.4.1.6).

use iced_x86::Instruction;
use iced_x86::Mnemonic;
use iced_x86::OpKind;

use crate::hv::soft::cpu::Cpu;
use crate::hv::soft::exec::Executor;
use crate::hv::soft::fault::Flow;
use crate::hv::soft::fault::Stop;
use crate::hv::soft::operand::operand_bits;

use super::access::mm_index;
use super::access::xmm_index;
use super::lane::Double;
use super::lane::Lane;
use super::lane::Single;
use super::lane::dwords;
use super::lane::from_dwords;
use super::lane::from_qwords;
use super::lane::qwords;
use super::mxcsr::Env;
use super::real::Mode;
use super::real::Number;
use super::real::Real;
use super::sse_fp::set_lane;

pub(super) fn executor(insn: &Instruction) -> Option<Executor> {
    let wide = |n| operand_bits(insn, n) == 64;
    Some(match insn.mnemonic() {
        Mnemonic::Cvtsi2ss if wide(1) => |cpu, insn| from_gpr::<Single, 64>(cpu, insn),
        Mnemonic::Cvtsi2ss => |cpu, insn| from_gpr::<Single, 32>(cpu, insn),
        Mnemonic::Cvtsi2sd if wide(1) => |cpu, insn| from_gpr::<Double, 64>(cpu, insn),
        Mnemonic::Cvtsi2sd => |cpu, insn| from_gpr::<Double, 32>(cpu, insn),
        Mnemonic::Cvtss2si if wide(0) => |cpu, insn| to_gpr::<Single, 64, false>(cpu, insn),
        Mnemonic::Cvtss2si => |cpu, insn| to_gpr::<Single, 32, false>(cpu, insn),
        Mnemonic::Cvtsd2si if wide(0) => |cpu, insn| to_gpr::<Double, 64, false>(cpu, insn),
        Mnemonic::Cvtsd2si => |cpu, insn| to_gpr::<Double, 32, false>(cpu, insn),
        Mnemonic::Cvttss2si if wide(0) => |cpu, insn| to_gpr::<Single, 64, true>(cpu, insn),
        Mnemonic::Cvttss2si => |cpu, insn| to_gpr::<Single, 32, true>(cpu, insn),
        Mnemonic::Cvttsd2si if wide(0) => |cpu, insn| to_gpr::<Double, 64, true>(cpu, insn),
        Mnemonic::Cvttsd2si => |cpu, insn| to_gpr::<Double, 32, true>(cpu, insn),
        Mnemonic::Cvtss2sd => |cpu, insn| {
            cpu.require_sse()?;
            let source = cpu.low_source::<32>(insn, 1)?;
            let mut env = Env::new(cpu.fpu.mxcsr);
            let result = widen(&mut env, source);
            env.finish(cpu)?;
            set_lane::<Double>(cpu, xmm_index(insn.op0_register()), result);
            Ok(Flow::Next)
        },
        Mnemonic::Cvtsd2ss => |cpu, insn| {
            cpu.require_sse()?;
            let source = cpu.low_source::<64>(insn, 1)?;
            let mut env = Env::new(cpu.fpu.mxcsr);
            let result = narrow(&mut env, source);
            env.finish(cpu)?;
            set_lane::<Single>(cpu, xmm_index(insn.op0_register()), result);
            Ok(Flow::Next)
        },
        _ => return packed_executor(insn),
    })
}

fn packed_executor(insn: &Instruction) -> Option<Executor> {
    Some(match insn.mnemonic() {
        Mnemonic::Cvtps2pd => {
            |cpu, insn| half(cpu, insn, |env, low| from_qwords([widen(env, low & 0xffff_ffff), widen(env, low >> 32)]))
        }
        Mnemonic::Cvtpd2ps => |cpu, insn| {
            whole(cpu, insn, |env, value| {
                let [low, high] = qwords(value).map(|lane| narrow(env, lane));
                u128::from(low | high << 32)
            })
        },
        Mnemonic::Cvtdq2ps => |cpu, insn| {
            whole(cpu, insn, |env, value| {
                from_dwords(dwords(value).map(|n| from_int::<Single>(env, n as i32 as i64) as u32))
            })
        },
        Mnemonic::Cvtdq2pd => |cpu, insn| {
            half(cpu, insn, |env, low| from_qwords(pair(low).map(|n| from_int::<Double>(env, n as i32 as i64))))
        },
        Mnemonic::Cvtps2dq => |cpu, insn| whole(cpu, insn, singles_to_ints::<false>),
        Mnemonic::Cvttps2dq => |cpu, insn| whole(cpu, insn, singles_to_ints::<true>),
        Mnemonic::Cvtpd2dq => |cpu, insn| whole(cpu, insn, |env, value| doubles_to_ints::<false>(env, value).into()),
        Mnemonic::Cvttpd2dq => |cpu, insn| whole(cpu, insn, |env, value| doubles_to_ints::<true>(env, value).into()),
        Mnemonic::Cvtpi2ps => mm_to_singles,
        Mnemonic::Cvtpi2pd => mm_to_doubles,
        Mnemonic::Cvtps2pi => |cpu, insn| singles_to_mm::<false>(cpu, insn),
        Mnemonic::Cvttps2pi => |cpu, insn| singles_to_mm::<true>(cpu, insn),
        Mnemonic::Cvtpd2pi => |cpu, insn| doubles_to_mm::<false>(cpu, insn),
        Mnemonic::Cvttpd2pi => |cpu, insn| doubles_to_mm::<true>(cpu, insn),
        _ => return None,
    })
}

/// A conversion of a whole register or aligned memory.
#[inline(always)]
fn whole(cpu: &mut Cpu, insn: &Instruction, f: impl Fn(&mut Env, u128) -> u128) -> Result<Flow, Stop> {
    cpu.require_sse()?;
    let source = cpu.xmm_source(insn, 1)?;
    let mut env = Env::new(cpu.fpu.mxcsr);
    let result = f(&mut env, source);
    env.finish(cpu)?;
    cpu.fpu.xmm[xmm_index(insn.op0_register())] = result;
    Ok(Flow::Next)
}

/// A conversion of the low half of a register, or of 64 bits of memory.
#[inline(always)]
fn half(cpu: &mut Cpu, insn: &Instruction, f: impl Fn(&mut Env, u64) -> u128) -> Result<Flow, Stop> {
    cpu.require_sse()?;
    let source = cpu.low_source::<64>(insn, 1)?;
    let mut env = Env::new(cpu.fpu.mxcsr);
    let result = f(&mut env, source);
    env.finish(cpu)?;
    cpu.fpu.xmm[xmm_index(insn.op0_register())] = result;
    Ok(Flow::Next)
}

const fn pair(value: u64) -> [u32; 2] {
    [value as u32, (value >> 32) as u32]
}

#[inline(always)]
fn from_int<L: Lane>(env: &mut Env, value: i64) -> u64 {
    // Small enough to be exact in either format.
    if value.unsigned_abs() < 1 << (L::PRECISION - 1) {
        return if L::BITS == 32 { (value as f32).to_bits().into() } else { (value as f64).to_bits() };
    }
    env.encode::<L>(Number::Finite(Real::from_magnitude(value < 0, value.unsigned_abs())))
}

#[inline(always)]
fn from_gpr<L: Lane, const BITS: u32>(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    cpu.require_sse()?;
    let source = cpu.operand(insn, 1)?;
    let value = if BITS == 32 { i64::from(source as i32) } else { source as i64 };
    let mut env = Env::new(cpu.fpu.mxcsr);
    let result = from_int::<L>(&mut env, value);
    env.finish(cpu)?;
    set_lane::<L>(cpu, xmm_index(insn.op0_register()), result);
    Ok(Flow::Next)
}

/// A float as an integer of `BITS` bits, sign-extended; the integer indefinite when it does not fit.
#[inline(always)]
fn to_int<L: Lane, const BITS: u32, const TRUNCATE: bool>(env: &mut Env, bits: u64) -> u64 {
    if TRUNCATE && L::BITS == 64 {
        let value = f64::from_bits(bits);
        let limit = if BITS == 32 { 2_147_483_648.0 } else { 9_223_372_036_854_775_808.0 };
        if L::is_plain(bits) && value.abs() < limit {
            let integer = value as i64;
            if integer as f64 != value {
                env.raise_precision();
            }
            return integer as u64;
        }
    }
    let mode = if TRUNCATE { Mode::Zero } else { env.mode() };
    to_int_fully::<L, BITS>(env, bits, mode)
}

fn to_int_fully<L: Lane, const BITS: u32>(env: &mut Env, bits: u64, mode: Mode) -> u64 {
    let limit = 1u64 << (BITS - 1);
    let indefinite = limit.wrapping_neg();
    if L::is_nan(bits) {
        env.raise_invalid();
        return indefinite;
    }
    let Number::Finite(real) = env.number::<L>(bits) else {
        if bits & L::EXPONENT != 0 {
            env.raise_invalid();
            return indefinite;
        }
        return 0;
    };
    match real.round_to_integer(mode) {
        Some((magnitude, inexact, _)) if magnitude < limit + u64::from(real.sign) => {
            if inexact {
                env.raise_precision();
            }
            if real.sign { magnitude.wrapping_neg() } else { magnitude }
        }
        _ => {
            env.raise_invalid();
            indefinite
        }
    }
}

#[inline(always)]
fn to_gpr<L: Lane, const BITS: u32, const TRUNCATE: bool>(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    cpu.require_sse()?;
    let source = cpu.scalar_source::<L>(insn, 1)?;
    let mut env = Env::new(cpu.fpu.mxcsr);
    let result = to_int::<L, BITS, TRUNCATE>(&mut env, source);
    env.finish(cpu)?;
    cpu.set_register(insn.op0_register(), result);
    Ok(Flow::Next)
}

/// The payload of a NaN keeps its most significant bits.
fn widen(env: &mut Env, single: u64) -> u64 {
    if env.nan::<Single>(single, single).is_some() {
        let fraction = (single & Single::FRACTION) << 29;
        return (single & Single::SIGN) << 32 | Double::EXPONENT | Double::QUIET | fraction;
    }
    env.note_denormals::<Single>(&[single]);
    let number = env.number::<Single>(single);
    env.encode::<Double>(number)
}

fn narrow(env: &mut Env, double: u64) -> u64 {
    if env.plain && Double::is_plain(double) {
        let single = u64::from((f64::from_bits(double) as f32).to_bits());
        if Single::is_safely_normal(single) {
            return single;
        }
    }
    if env.nan::<Double>(double, double).is_some() {
        let fraction = (double & Double::FRACTION) >> 29;
        return (double & Double::SIGN) >> 32 | Single::EXPONENT | Single::QUIET | fraction;
    }
    env.note_denormals::<Double>(&[double]);
    let number = env.number::<Double>(double);
    env.encode::<Single>(number)
}

fn singles_to_ints<const TRUNCATE: bool>(env: &mut Env, value: u128) -> u128 {
    from_dwords(dwords(value).map(|lane| to_int::<Single, 32, TRUNCATE>(env, lane.into()) as u32))
}

fn doubles_to_ints<const TRUNCATE: bool>(env: &mut Env, value: u128) -> u64 {
    let [low, high] = qwords(value).map(|lane| u64::from(to_int::<Double, 32, TRUNCATE>(env, lane) as u32));
    low | high << 32
}

/// With a memory operand it is no MMX instruction. Otherwise, and for all of these, the MMX registers count as used
/// even when an exception keeps the result from being written.
fn mm_to_singles(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    cpu.require_sse()?;
    let memory = insn.op1_kind() == OpKind::Memory;
    if !memory {
        cpu.require_mmx()?;
    }
    let source = cpu.mm_source(insn, 1)?;
    let mut env = Env::new(cpu.fpu.mxcsr);
    let [low, high] = pair(source).map(|n| from_int::<Single>(&mut env, n as i32 as i64));
    if !memory {
        cpu.fpu.x87.enter_mmx();
    }
    env.finish(cpu)?;
    set_lane::<Double>(cpu, xmm_index(insn.op0_register()), low | high << 32);
    Ok(Flow::Next)
}

/// Exact; with a memory operand no MMX instruction either.
fn mm_to_doubles(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    cpu.require_sse()?;
    if insn.op1_kind() != OpKind::Memory {
        cpu.require_mmx()?;
    }
    let source = cpu.mm_source(insn, 1)?;
    if insn.op1_kind() != OpKind::Memory {
        cpu.fpu.x87.enter_mmx();
    }
    let result = pair(source).map(|n| f64::from(n as i32).to_bits());
    cpu.fpu.xmm[xmm_index(insn.op0_register())] = from_qwords(result);
    Ok(Flow::Next)
}

fn singles_to_mm<const TRUNCATE: bool>(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    cpu.require_sse()?;
    cpu.require_mmx()?;
    let source = cpu.low_source::<64>(insn, 1)?;
    let mut env = Env::new(cpu.fpu.mxcsr);
    let [low, high] = pair(source).map(|lane| to_int::<Single, 32, TRUNCATE>(&mut env, lane.into()) as u32);
    cpu.fpu.x87.enter_mmx();
    env.finish(cpu)?;
    cpu.fpu.x87.set_mm(mm_index(insn.op0_register()), u64::from(low) | u64::from(high) << 32);
    Ok(Flow::Next)
}

fn doubles_to_mm<const TRUNCATE: bool>(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    cpu.require_sse()?;
    cpu.require_mmx()?;
    let source = cpu.xmm_source(insn, 1)?;
    let mut env = Env::new(cpu.fpu.mxcsr);
    let result = doubles_to_ints::<TRUNCATE>(&mut env, source);
    cpu.fpu.x87.enter_mmx();
    env.finish(cpu)?;
    cpu.fpu.x87.set_mm(mm_index(insn.op0_register()), result);
    Ok(Flow::Next)
}
