//! x87 loads, stores and moves, with the conversions they imply (Intel SDM volume 1, section 8.3.3).

use iced_x86::Instruction;
use iced_x86::MemorySize;
use iced_x86::Mnemonic;
use iced_x86::OpKind;

use crate::hv::soft::cpu::Cpu;
use crate::hv::soft::exec::Executor;
use crate::hv::soft::fault::Flow;
use crate::hv::soft::fault::Stop;
use crate::hv::soft::mmu::Access;
use crate::hv::soft::operand::segment_fault;

use super::extended::Extended;
use super::extended::INDEFINITE;
use super::lane::Double;
use super::lane::Lane;
use super::lane::Single;
use super::real::Number;
use super::x87::DENORMAL;
use super::x87::INVALID;
use super::x87::PRECISION;
use super::x87::X87;
use super::x87::st_index;

pub(super) fn executor(insn: &Instruction) -> Option<Executor> {
    let memory = insn.op0_kind() == OpKind::Memory;
    Some(match insn.mnemonic() {
        Mnemonic::Fld if !memory => |cpu, insn| {
            cpu.begin_x87()?;
            cpu.note_x87(insn)?;
            let (x87, i) = (&mut cpu.fpu.x87, st_index(insn.op_register(insn.op_count() - 1)));
            if x87.is_empty(i) {
                if let Some(nan) = x87.underflow_stack() {
                    x87.push(nan);
                }
            } else {
                x87.load(|x87| Some(x87.raw(i)));
            }
            Ok(Flow::Next)
        },
        Mnemonic::Fld => match insn.memory_size() {
            MemorySize::Float32 => load_lane::<Single>,
            MemorySize::Float64 => load_lane::<Double>,
            _ => load_extended,
        },
        Mnemonic::Fild => load_int,
        Mnemonic::Fbld => load_decimal,
        Mnemonic::Fst if !memory => |cpu, insn| store_register(cpu, insn, false),
        Mnemonic::Fstp if !memory => |cpu, insn| store_register(cpu, insn, true),
        // An empty ST(0) is no error: nothing is stored.
        Mnemonic::Fstpnce => |cpu, insn| {
            cpu.begin_x87()?;
            cpu.note_x87(insn)?;
            let x87 = &mut cpu.fpu.x87;
            x87.set_c1(false);
            if !x87.is_empty(0) {
                x87.set(st_index(insn.op0_register()), x87.raw(0));
            }
            x87.pop();
            Ok(Flow::Next)
        },
        Mnemonic::Fst => match insn.memory_size() {
            MemorySize::Float32 => |cpu, insn| store_lane::<Single>(cpu, insn, false),
            _ => |cpu, insn| store_lane::<Double>(cpu, insn, false),
        },
        Mnemonic::Fstp => match insn.memory_size() {
            MemorySize::Float32 => |cpu, insn| store_lane::<Single>(cpu, insn, true),
            MemorySize::Float64 => |cpu, insn| store_lane::<Double>(cpu, insn, true),
            _ => store_extended,
        },
        Mnemonic::Fist => |cpu, insn| store_int(cpu, insn, false),
        Mnemonic::Fistp => |cpu, insn| store_int(cpu, insn, true),
        Mnemonic::Fbstp => store_decimal,
        Mnemonic::Fxch => exchange,
        _ => return constant(insn).or_else(|| conditional(insn)),
    })
}

/// Reads 80 bits.
fn read_extended(cpu: &mut Cpu, insn: &Instruction) -> Result<Extended, Stop> {
    let at = cpu.linear_address(insn, 10, Access::Read)?;
    let fault = |stop| segment_fault(insn, stop);
    let sig = cpu.read(at).map_err(fault)?;
    let se = cpu.read(at.wrapping_add(8)).map_err(fault)?;
    Ok(Extended { sig, se })
}

fn write_extended(cpu: &mut Cpu, insn: &Instruction, value: Extended) -> Result<(), Stop> {
    let at = cpu.linear_address(insn, 10, Access::Write)?;
    let fault = |stop| segment_fault(insn, stop);
    cpu.probe_write(at, 10).map_err(fault)?;
    cpu.write(at, value.sig).map_err(fault)?;
    cpu.write(at.wrapping_add(8), value.se).map_err(fault)
}

fn load_lane<L: Lane>(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    cpu.begin_x87()?;
    let bits = if L::BITS == 32 { cpu.load::<u32>(insn)?.into() } else { cpu.load::<u64>(insn)? };
    cpu.note_x87(insn)?;
    cpu.fpu.x87.load(|x87| {
        let value = Extended::from_lane::<L>(bits);
        if L::is_signaling(bits) {
            return x87.raise(INVALID).then_some(value.quieted());
        }
        if L::is_denormal(bits) {
            // It completes even when that is not masked: nothing is lost.
            x87.raise(DENORMAL);
        }
        Some(value)
    });
    Ok(Flow::Next)
}

fn load_extended(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    cpu.begin_x87()?;
    let value = read_extended(cpu, insn)?;
    cpu.note_x87(insn)?;
    cpu.fpu.x87.load(|_| Some(value));
    Ok(Flow::Next)
}

/// The integer memory operand of FILD and of integer arithmetic.
pub(super) fn read_int(cpu: &mut Cpu, insn: &Instruction) -> Result<i64, Stop> {
    Ok(match insn.memory_size() {
        MemorySize::Int16 => (cpu.load::<u16>(insn)? as i16).into(),
        MemorySize::Int32 => (cpu.load::<u32>(insn)? as i32).into(),
        _ => cpu.load::<u64>(insn)? as i64,
    })
}

fn load_int(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    cpu.begin_x87()?;
    let value = read_int(cpu, insn)?;
    cpu.note_x87(insn)?;
    cpu.fpu.x87.load(|_| Some(Extended::from_int(value)));
    Ok(Flow::Next)
}

/// Eighteen decimal digits, two a byte, and a sign byte; digits above nine are undefined and count as they are.
fn load_decimal(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    cpu.begin_x87()?;
    let Extended { sig, se } = read_extended(cpu, insn)?;
    cpu.note_x87(insn)?;
    let digits = u128::from(sig) | u128::from(se & 0xff) << 64;
    let magnitude = (0..18).rev().fold(0u64, |value, n| value * 10 + (digits >> (4 * n)) as u64 % 16);
    let value = Extended::from_int(magnitude as i64).with_sign(se & 0x8000 != 0);
    cpu.fpu.x87.load(|_| Some(value));
    Ok(Flow::Next)
}

fn store_register(cpu: &mut Cpu, insn: &Instruction, pop: bool) -> Result<Flow, Stop> {
    cpu.begin_x87()?;
    cpu.note_x87(insn)?;
    let (x87, i) = (&mut cpu.fpu.x87, st_index(insn.op0_register()));
    x87.set_c1(false);
    let value = if x87.is_empty(0) { x87.underflow_stack() } else { Some(x87.raw(0)) };
    if let Some(value) = value {
        x87.set(i, value);
        if pop {
            x87.pop();
        }
    }
    Ok(Flow::Next)
}

/// Converts ST(0) with `convert` and writes it with `write`. The status changes only if the write succeeds.
fn store_memory<T>(
    cpu: &mut Cpu,
    insn: &Instruction,
    pop: bool,
    convert: impl FnOnce(&mut X87) -> Option<T>,
    write: impl FnOnce(&mut Cpu, T) -> Result<(), Stop>,
) -> Result<Flow, Stop> {
    cpu.begin_x87()?;
    let mut after = cpu.fpu.x87.clone();
    if let Some(value) = convert(&mut after) {
        write(cpu, value)?;
        if pop {
            after.pop();
        }
    } else {
        // It is not written, but must be writable.
        let len = insn.memory_size().size() as u64;
        let at = cpu.linear_address(insn, len, Access::Write)?;
        cpu.probe_write(at, len).map_err(|stop| segment_fault(insn, stop))?;
    }
    cpu.fpu.x87 = after;
    cpu.note_x87(insn)?;
    Ok(Flow::Next)
}

fn store_lane<L: Lane>(cpu: &mut Cpu, insn: &Instruction, pop: bool) -> Result<Flow, Stop> {
    let convert = |x87: &mut X87| {
        if x87.is_empty(0) {
            return x87.underflow_stack().map(|_| L::INDEFINITE);
        }
        x87.round_to_lane::<L>(x87.raw(0))
    };
    store_memory(cpu, insn, pop, convert, |cpu, bits| {
        if L::BITS == 32 { cpu.store(insn, bits as u32) } else { cpu.store(insn, bits) }
    })
}

fn store_extended(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    let convert = |x87: &mut X87| {
        x87.set_c1(false);
        if x87.is_empty(0) { x87.underflow_stack() } else { Some(x87.raw(0)) }
    };
    store_memory(cpu, insn, true, convert, |cpu, value| write_extended(cpu, insn, value))
}

/// ST(0) as an integer's magnitude and sign, at most `limit` (one more when negative, if `twos`).
fn to_magnitude(x87: &mut X87, limit: u64, twos: bool) -> Option<Option<(bool, u64)>> {
    if x87.is_empty(0) {
        return x87.underflow_stack().map(|_| None);
    }
    x87.set_c1(false);
    let value = x87.raw(0);
    let real = match value.number() {
        Some(Number::Zero(sign)) => return Some(Some((sign, 0))),
        Some(Number::Finite(real)) => real,
        _ => return x87.invalid().map(|_| None),
    };
    match real.round_to_integer(x87.mode()) {
        Some((magnitude, inexact, up)) if magnitude <= limit + u64::from(twos && real.sign) => {
            if inexact {
                x87.raise(PRECISION);
                x87.set_c1(up);
            }
            Some(Some((real.sign, magnitude)))
        }
        _ => x87.invalid().map(|_| None),
    }
}

fn store_int(cpu: &mut Cpu, insn: &Instruction, pop: bool) -> Result<Flow, Stop> {
    let bits = insn.memory_size().size() as u32 * 8;
    let limit = (1u64 << (bits - 1)) - 1;
    let convert = |x87: &mut X87| {
        Some(match to_magnitude(x87, limit, true)? {
            Some((true, magnitude)) => magnitude.wrapping_neg(),
            Some((false, magnitude)) => magnitude,
            // The integer indefinite.
            None => limit + 1,
        })
    };
    store_memory(cpu, insn, pop, convert, |cpu, value| match bits {
        16 => cpu.store(insn, value as u16),
        32 => cpu.store(insn, value as u32),
        _ => cpu.store(insn, value),
    })
}

fn store_decimal(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    const LIMIT: u64 = 999_999_999_999_999_999;
    let convert = |x87: &mut X87| {
        Some(match to_magnitude(x87, LIMIT, false)? {
            Some((sign, magnitude)) => {
                let mut rest = magnitude;
                let mut digits = 0u128;
                for n in 0..18 {
                    digits |= u128::from(rest % 10) << (4 * n);
                    rest /= 10;
                }
                Extended { sig: digits as u64, se: (digits >> 64) as u16 | u16::from(sign) << 15 }
            }
            // The packed decimal indefinite.
            None => Extended { sig: 0xc000_0000_0000_0000, se: 0xffff },
        })
    };
    store_memory(cpu, insn, true, convert, |cpu, value| write_extended(cpu, insn, value))
}

fn exchange(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    cpu.begin_x87()?;
    cpu.note_x87(insn)?;
    let x87 = &mut cpu.fpu.x87;
    let i = st_index(if insn.op_count() > 1 { insn.op1_register() } else { insn.op0_register() });
    x87.set_c1(false);
    if x87.is_empty(0) || x87.is_empty(i) {
        if x87.underflow_stack().is_none() {
            return Ok(Flow::Next);
        }
        for n in [0, i] {
            if x87.is_empty(n) {
                x87.set(n, INDEFINITE);
            }
        }
    }
    let (a, b) = (x87.raw(0), x87.raw(i));
    x87.set_raw(0, b);
    x87.set_raw(i, a);
    Ok(Flow::Next)
}

/// FLDPI and its like: the constant to 66 bits, rounded as the control word says (always to 64 bits).
fn constant(insn: &Instruction) -> Option<Executor> {
    macro_rules! load {
        ($sig:expr, $exp:expr, $nearest:expr, $directed:expr) => {
            |cpu, insn| push_constant(cpu, insn, $sig, $exp, $nearest, $directed)
        };
    }
    // Significand truncated to 64 bits, exponent, and whether it is one more to nearest, and upwards.
    Some(match insn.mnemonic() {
        Mnemonic::Fldz => |cpu, insn| {
            cpu.begin_x87()?;
            cpu.note_x87(insn)?;
            cpu.fpu.x87.load(|_| Some(Extended::zero(false)));
            Ok(Flow::Next)
        },
        Mnemonic::Fld1 => load!(0x8000_0000_0000_0000, 0, false, false),
        Mnemonic::Fldpi => load!(0xc90f_daa2_2168_c234, 1, true, true),
        Mnemonic::Fldl2t => load!(0xd49a_784b_cd1b_8afe, 1, false, true),
        Mnemonic::Fldl2e => load!(0xb8aa_3b29_5c17_f0bb, 0, true, true),
        Mnemonic::Fldlg2 => load!(0x9a20_9a84_fbcf_f798, -2, true, true),
        Mnemonic::Fldln2 => load!(0xb172_17f7_d1cf_79ab, -1, true, true),
        _ => return None,
    })
}

fn push_constant(
    cpu: &mut Cpu,
    insn: &Instruction,
    sig: u64,
    exp: i32,
    nearest: bool,
    upward: bool,
) -> Result<Flow, Stop> {
    use super::real::Mode;
    cpu.begin_x87()?;
    cpu.note_x87(insn)?;
    let up = match cpu.fpu.x87.mode() {
        Mode::Nearest => nearest,
        Mode::Up => upward,
        Mode::Down | Mode::Zero => false,
    };
    cpu.fpu.x87.load(|_| Some(Extended::encode(false, exp, sig + u64::from(up))));
    Ok(Flow::Next)
}

/// FCMOVcc.
fn conditional(insn: &Instruction) -> Option<Executor> {
    macro_rules! when {
        ($cc:expr) => {
            |cpu, insn| move_if(cpu, insn, $cc)
        };
    }
    // Condition codes as Jcc numbers them.
    Some(match insn.mnemonic() {
        Mnemonic::Fcmovb => when!(2),
        Mnemonic::Fcmovnb => when!(3),
        Mnemonic::Fcmove => when!(4),
        Mnemonic::Fcmovne => when!(5),
        Mnemonic::Fcmovbe => when!(6),
        Mnemonic::Fcmovnbe => when!(7),
        Mnemonic::Fcmovu => when!(10),
        Mnemonic::Fcmovnu => when!(11),
        _ => return None,
    })
}

fn move_if(cpu: &mut Cpu, insn: &Instruction, cc: u8) -> Result<Flow, Stop> {
    cpu.begin_x87()?;
    cpu.note_x87(insn)?;
    let moves = cpu.flags.condition(cc);
    let (x87, i) = (&mut cpu.fpu.x87, st_index(insn.op1_register()));
    if x87.is_empty(0) || x87.is_empty(i) {
        if let Some(value) = x87.underflow_stack() {
            x87.set(0, value);
        }
    } else if moves {
        x87.set_raw(0, x87.raw(i));
    }
    Ok(Flow::Next)
}

/// A floating-point memory operand of arithmetic, and whether it was denormal.
pub(super) fn read_operand(cpu: &mut Cpu, insn: &Instruction) -> Result<(Extended, bool), Stop> {
    Ok(match insn.memory_size() {
        MemorySize::Float32 => {
            let bits = cpu.load::<u32>(insn)?.into();
            (Extended::from_lane::<Single>(bits), Single::is_denormal(bits))
        }
        MemorySize::Float64 => {
            let bits = cpu.load::<u64>(insn)?;
            (Extended::from_lane::<Double>(bits), Double::is_denormal(bits))
        }
        _ => (Extended::from_int(read_int(cpu, insn)?), false),
    })
}
