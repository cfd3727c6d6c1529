//! Packed integers, in MMX and XMM registers (Intel SDM volume 1, sections 9.4, 10.4.4 and 11.4.2).
//!
//! Most operations work lane by lane, so that one function on 128 bits serves MMX too, with the upper half ignored.
//! Packs, unpacks and shuffles cross lanes; what the narrow form makes of them is said where it differs.

use iced_x86::Instruction;
use iced_x86::Mnemonic;
use iced_x86::OpKind;

use crate::hv::soft::cpu::Cpu;
use crate::hv::soft::exec::Executor;
use crate::hv::soft::fault::Flow;
use crate::hv::soft::fault::Stop;

use super::access::mm_index;
use super::access::xmm_index;
use super::lane::bytes;
use super::lane::dwords;
use super::lane::from_bytes;
use super::lane::from_dwords;
use super::lane::from_qwords;
use super::lane::from_words;
use super::lane::qwords;
use super::lane::words;

/// The executor for a lane-wise function, in the form of the instruction's target register.
macro_rules! lanewise {
    ($insn:expr, $f:expr) => {
        if $insn.op0_register().is_mm() {
            (|cpu, insn| mm_binary(cpu, insn, $f)) as Executor
        } else {
            |cpu, insn| xmm_binary(cpu, insn, $f)
        }
    };
}

/// As `lanewise`, with another function for MMX.
macro_rules! crossing {
    ($insn:expr, $f:expr, mm: $mm:expr) => {
        if $insn.op0_register().is_mm() {
            (|cpu, insn| mm_binary(cpu, insn, $mm)) as Executor
        } else {
            |cpu, insn| xmm_binary(cpu, insn, $f)
        }
    };
}

macro_rules! shift {
    ($insn:expr, $f:expr) => {
        match ($insn.op0_register().is_mm(), $insn.op1_kind() == OpKind::Immediate8) {
            (true, true) => (|cpu, insn| mm_shift_immediate(cpu, insn, $f)) as Executor,
            (true, false) => |cpu, insn| mm_binary(cpu, insn, |a, count| $f(a, count as u64)),
            (false, true) => |cpu, insn| xmm_shift_immediate(cpu, insn, $f),
            (false, false) => |cpu, insn| xmm_binary(cpu, insn, |a, count| $f(a, count as u64)),
        }
    };
}

pub(super) fn executor(insn: &Instruction) -> Option<Executor> {
    arithmetic(insn).or_else(|| logic(insn)).or_else(|| rearrange(insn))
}

fn arithmetic(insn: &Instruction) -> Option<Executor> {
    Some(match insn.mnemonic() {
        Mnemonic::Paddb => lanewise!(insn, |a, b| map8(a, b, u8::wrapping_add)),
        Mnemonic::Paddw => lanewise!(insn, |a, b| map16(a, b, u16::wrapping_add)),
        Mnemonic::Paddd => lanewise!(insn, |a, b| map32(a, b, u32::wrapping_add)),
        Mnemonic::Paddq => lanewise!(insn, |a, b| map64(a, b, u64::wrapping_add)),
        Mnemonic::Psubb => lanewise!(insn, |a, b| map8(a, b, u8::wrapping_sub)),
        Mnemonic::Psubw => lanewise!(insn, |a, b| map16(a, b, u16::wrapping_sub)),
        Mnemonic::Psubd => lanewise!(insn, |a, b| map32(a, b, u32::wrapping_sub)),
        Mnemonic::Psubq => lanewise!(insn, |a, b| map64(a, b, u64::wrapping_sub)),
        Mnemonic::Paddusb => lanewise!(insn, |a, b| map8(a, b, u8::saturating_add)),
        Mnemonic::Paddusw => lanewise!(insn, |a, b| map16(a, b, u16::saturating_add)),
        Mnemonic::Psubusb => lanewise!(insn, |a, b| map8(a, b, u8::saturating_sub)),
        Mnemonic::Psubusw => lanewise!(insn, |a, b| map16(a, b, u16::saturating_sub)),
        Mnemonic::Paddsb => lanewise!(insn, |a, b| map8(a, b, |x, y| (x as i8).saturating_add(y as i8) as u8)),
        Mnemonic::Paddsw => lanewise!(insn, |a, b| map16(a, b, |x, y| (x as i16).saturating_add(y as i16) as u16)),
        Mnemonic::Psubsb => lanewise!(insn, |a, b| map8(a, b, |x, y| (x as i8).saturating_sub(y as i8) as u8)),
        Mnemonic::Psubsw => lanewise!(insn, |a, b| map16(a, b, |x, y| (x as i16).saturating_sub(y as i16) as u16)),
        Mnemonic::Pmullw => lanewise!(insn, |a, b| map16(a, b, u16::wrapping_mul)),
        Mnemonic::Pmulhw => {
            lanewise!(insn, |a, b| map16(a, b, |x, y| ((i32::from(x as i16) * i32::from(y as i16)) >> 16) as u16))
        }
        Mnemonic::Pmulhuw => lanewise!(insn, |a, b| map16(a, b, |x, y| ((u32::from(x) * u32::from(y)) >> 16) as u16)),
        Mnemonic::Pmuludq => lanewise!(insn, |a, b| map64(a, b, |x, y| u64::from(x as u32) * u64::from(y as u32))),
        Mnemonic::Pmaddwd => lanewise!(insn, |a, b| map32(a, b, multiply_add)),
        Mnemonic::Psadbw => lanewise!(insn, |a, b| map64(a, b, absolute_differences)),
        Mnemonic::Pavgb => {
            lanewise!(insn, |a, b| map8(a, b, |x, y| ((u16::from(x) + u16::from(y) + 1) >> 1) as u8))
        }
        Mnemonic::Pavgw => {
            lanewise!(insn, |a, b| map16(a, b, |x, y| ((u32::from(x) + u32::from(y) + 1) >> 1) as u16))
        }
        Mnemonic::Pminub => lanewise!(insn, |a, b| map8(a, b, u8::min)),
        Mnemonic::Pmaxub => lanewise!(insn, |a, b| map8(a, b, u8::max)),
        Mnemonic::Pminsw => lanewise!(insn, |a, b| map16(a, b, |x, y| (x as i16).min(y as i16) as u16)),
        Mnemonic::Pmaxsw => lanewise!(insn, |a, b| map16(a, b, |x, y| (x as i16).max(y as i16) as u16)),
        Mnemonic::Pcmpeqb => lanewise!(insn, |a, b| map64(a, b, equal_bytes)),
        Mnemonic::Pcmpeqw => lanewise!(insn, |a, b| map16(a, b, |x, y| u16::from(x == y).wrapping_neg())),
        Mnemonic::Pcmpeqd => lanewise!(insn, |a, b| map32(a, b, |x, y| u32::from(x == y).wrapping_neg())),
        Mnemonic::Pcmpgtb => {
            lanewise!(insn, |a, b| map8(a, b, |x, y| u8::from(x as i8 > y as i8).wrapping_neg()))
        }
        Mnemonic::Pcmpgtw => {
            lanewise!(insn, |a, b| map16(a, b, |x, y| u16::from(x as i16 > y as i16).wrapping_neg()))
        }
        Mnemonic::Pcmpgtd => {
            lanewise!(insn, |a, b| map32(a, b, |x, y| u32::from(x as i32 > y as i32).wrapping_neg()))
        }
        _ => return None,
    })
}

fn logic(insn: &Instruction) -> Option<Executor> {
    Some(match insn.mnemonic() {
        Mnemonic::Pand => lanewise!(insn, |a, b| a & b),
        Mnemonic::Pandn => lanewise!(insn, |a, b| !a & b),
        Mnemonic::Por => lanewise!(insn, |a, b| a | b),
        Mnemonic::Pxor => lanewise!(insn, |a, b| a ^ b),
        // The same, by another name for another kind of content; they raise no exceptions.
        Mnemonic::Andps | Mnemonic::Andpd => |cpu, insn| xmm_binary(cpu, insn, |a, b| a & b),
        Mnemonic::Andnps | Mnemonic::Andnpd => |cpu, insn| xmm_binary(cpu, insn, |a, b| !a & b),
        Mnemonic::Orps | Mnemonic::Orpd => |cpu, insn| xmm_binary(cpu, insn, |a, b| a | b),
        Mnemonic::Xorps | Mnemonic::Xorpd => |cpu, insn| xmm_binary(cpu, insn, |a, b| a ^ b),
        Mnemonic::Psllw => shift!(insn, |a, n: u64| per16(a, |x| if n < 16 { x << n } else { 0 })),
        Mnemonic::Pslld => shift!(insn, |a, n: u64| per32(a, |x| if n < 32 { x << n } else { 0 })),
        Mnemonic::Psllq => shift!(insn, |a, n: u64| per64(a, |x| if n < 64 { x << n } else { 0 })),
        Mnemonic::Psrlw => shift!(insn, |a, n: u64| per16(a, |x| if n < 16 { x >> n } else { 0 })),
        Mnemonic::Psrld => shift!(insn, |a, n: u64| per32(a, |x| if n < 32 { x >> n } else { 0 })),
        Mnemonic::Psrlq => shift!(insn, |a, n: u64| per64(a, |x| if n < 64 { x >> n } else { 0 })),
        Mnemonic::Psraw => shift!(insn, |a, n: u64| per16(a, |x| (x as i16 >> n.min(15)) as u16)),
        Mnemonic::Psrad => shift!(insn, |a, n: u64| per32(a, |x| (x as i32 >> n.min(31)) as u32)),
        Mnemonic::Pslldq => |cpu, insn| xmm_shift_immediate(cpu, insn, |a, n| if n < 16 { a << (8 * n) } else { 0 }),
        Mnemonic::Psrldq => |cpu, insn| xmm_shift_immediate(cpu, insn, |a, n| if n < 16 { a >> (8 * n) } else { 0 }),
        _ => return None,
    })
}

fn rearrange(insn: &Instruction) -> Option<Executor> {
    let mm = insn.op0_register().is_mm();
    Some(match insn.mnemonic() {
        // Packing the two narrow operands side by side gives the narrow result in the low half.
        Mnemonic::Packsswb => crossing!(insn, pack_signed_words, mm: |a, b| pack_signed_words(a | b << 64, 0)),
        Mnemonic::Packssdw => crossing!(insn, pack_signed_dwords, mm: |a, b| pack_signed_dwords(a | b << 64, 0)),
        Mnemonic::Packuswb => crossing!(insn, pack_unsigned_words, mm: |a, b| pack_unsigned_words(a | b << 64, 0)),
        Mnemonic::Punpcklbw if mm => |cpu, insn| mm_unpack_low(cpu, insn, interleave8),
        Mnemonic::Punpcklwd if mm => |cpu, insn| mm_unpack_low(cpu, insn, interleave16),
        Mnemonic::Punpckldq if mm => |cpu, insn| mm_unpack_low(cpu, insn, interleave32),
        Mnemonic::Punpcklbw => |cpu, insn| xmm_binary(cpu, insn, interleave8),
        Mnemonic::Punpcklwd => |cpu, insn| xmm_binary(cpu, insn, interleave16),
        Mnemonic::Punpckldq | Mnemonic::Unpcklps => |cpu, insn| xmm_binary(cpu, insn, interleave32),
        Mnemonic::Punpcklqdq | Mnemonic::Unpcklpd => |cpu, insn| xmm_binary(cpu, insn, |a, b| low(a) | b << 64),
        // The wide interleaving of narrow operands has the narrow high one in its upper half.
        Mnemonic::Punpckhbw => {
            crossing!(insn, |a, b| interleave8(a >> 64, b >> 64), mm: |a, b| interleave8(a, b) >> 64)
        }
        Mnemonic::Punpckhwd => {
            crossing!(insn, |a, b| interleave16(a >> 64, b >> 64), mm: |a, b| interleave16(a, b) >> 64)
        }
        Mnemonic::Punpckhdq => {
            crossing!(insn, |a, b| interleave32(a >> 64, b >> 64), mm: |a, b| interleave32(a, b) >> 64)
        }
        Mnemonic::Unpckhps => |cpu, insn| xmm_binary(cpu, insn, |a, b| interleave32(a >> 64, b >> 64)),
        Mnemonic::Punpckhqdq | Mnemonic::Unpckhpd => |cpu, insn| xmm_binary(cpu, insn, |a, b| a >> 64 | b >> 64 << 64),
        Mnemonic::Pshufw => mm_shuffle,
        Mnemonic::Pshufd => |cpu, insn| xmm_immediate(cpu, insn, |_, b, order| shuffle32(b, b, order)),
        Mnemonic::Pshuflw => {
            |cpu, insn| xmm_immediate(cpu, insn, |_, b, order| b >> 64 << 64 | u128::from(shuffle16(b as u64, order)))
        }
        Mnemonic::Pshufhw => |cpu, insn| {
            xmm_immediate(cpu, insn, |_, b, order| low(b) | u128::from(shuffle16((b >> 64) as u64, order)) << 64)
        },
        Mnemonic::Shufps => |cpu, insn| xmm_immediate(cpu, insn, shuffle32),
        Mnemonic::Shufpd => |cpu, insn| {
            xmm_immediate(cpu, insn, |a, b, order| {
                let (a, b) = (qwords(a), qwords(b));
                from_qwords([a[usize::from(order & 1)], b[usize::from(order >> 1 & 1)]])
            })
        },
        Mnemonic::Pextrw if insn.op1_register().is_mm() => extract_mm,
        Mnemonic::Pextrw => extract_xmm,
        Mnemonic::Pinsrw if mm => insert_mm,
        Mnemonic::Pinsrw => insert_xmm,
        _ => return None,
    })
}

#[inline(always)]
fn xmm_binary(cpu: &mut Cpu, insn: &Instruction, f: impl Fn(u128, u128) -> u128) -> Result<Flow, Stop> {
    cpu.require_sse()?;
    let b = cpu.xmm_source(insn, 1)?;
    let target = &mut cpu.fpu.xmm[xmm_index(insn.op0_register())];
    *target = f(*target, b);
    Ok(Flow::Next)
}

#[inline(always)]
fn mm_binary(cpu: &mut Cpu, insn: &Instruction, f: impl Fn(u128, u128) -> u128) -> Result<Flow, Stop> {
    cpu.require_mmx()?;
    let b = cpu.mm_source(insn, 1)?;
    mm_apply(cpu, insn, b, f)
}

#[inline(always)]
fn mm_apply(cpu: &mut Cpu, insn: &Instruction, b: u64, f: impl Fn(u128, u128) -> u128) -> Result<Flow, Stop> {
    let target = mm_index(insn.op0_register());
    let a = cpu.fpu.x87.mm(target);
    cpu.fpu.x87.set_mm(target, f(a.into(), b.into()) as u64);
    Ok(Flow::Next)
}

/// The narrow unpacks of low halves read only 32 bits of memory.
#[inline(always)]
fn mm_unpack_low(cpu: &mut Cpu, insn: &Instruction, f: impl Fn(u128, u128) -> u128) -> Result<Flow, Stop> {
    cpu.require_mmx()?;
    let b = match insn.op1_kind() {
        OpKind::Memory => cpu.load::<u32>(insn)?.into(),
        _ => cpu.mm_source(insn, 1)?,
    };
    mm_apply(cpu, insn, b, f)
}

#[inline(always)]
fn xmm_immediate(cpu: &mut Cpu, insn: &Instruction, f: impl Fn(u128, u128, u8) -> u128) -> Result<Flow, Stop> {
    cpu.require_sse()?;
    let b = cpu.xmm_source(insn, 1)?;
    let target = &mut cpu.fpu.xmm[xmm_index(insn.op0_register())];
    *target = f(*target, b, insn.immediate8());
    Ok(Flow::Next)
}

#[inline(always)]
fn xmm_shift_immediate(cpu: &mut Cpu, insn: &Instruction, f: impl Fn(u128, u64) -> u128) -> Result<Flow, Stop> {
    cpu.require_sse()?;
    let target = &mut cpu.fpu.xmm[xmm_index(insn.op0_register())];
    *target = f(*target, insn.immediate8().into());
    Ok(Flow::Next)
}

#[inline(always)]
fn mm_shift_immediate(cpu: &mut Cpu, insn: &Instruction, f: impl Fn(u128, u64) -> u128) -> Result<Flow, Stop> {
    cpu.require_mmx()?;
    let count = insn.immediate8().into();
    mm_apply(cpu, insn, 0, |a, _| f(a, count))
}

fn mm_shuffle(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    cpu.require_mmx()?;
    let b = cpu.mm_source(insn, 1)?;
    cpu.fpu.x87.set_mm(mm_index(insn.op0_register()), shuffle16(b, insn.immediate8()));
    Ok(Flow::Next)
}

fn extract_xmm(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    cpu.require_sse()?;
    let lane = words(cpu.fpu.xmm[xmm_index(insn.op1_register())])[usize::from(insn.immediate8() & 7)];
    cpu.set_register(insn.op0_register(), lane.into());
    Ok(Flow::Next)
}

fn extract_mm(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    cpu.require_mmx()?;
    cpu.fpu.x87.enter_mmx();
    let value = cpu.fpu.x87.mm(mm_index(insn.op1_register()));
    cpu.set_register(insn.op0_register(), value >> (16 * (insn.immediate8() & 3)) & 0xffff);
    Ok(Flow::Next)
}

fn word_source(cpu: &mut Cpu, insn: &Instruction) -> Result<u16, Stop> {
    match insn.op1_kind() {
        OpKind::Memory => cpu.load(insn),
        _ => Ok(cpu.register(insn.op1_register()) as u16),
    }
}

fn insert_xmm(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    cpu.require_sse()?;
    let word = word_source(cpu, insn)?;
    let target = &mut cpu.fpu.xmm[xmm_index(insn.op0_register())];
    let mut lanes = words(*target);
    lanes[usize::from(insn.immediate8() & 7)] = word;
    *target = from_words(lanes);
    Ok(Flow::Next)
}

fn insert_mm(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    cpu.require_mmx()?;
    let word = word_source(cpu, insn)?;
    let target = mm_index(insn.op0_register());
    let at = 16 * (insn.immediate8() & 3);
    let value = cpu.fpu.x87.mm(target) & !(0xffff << at) | u64::from(word) << at;
    cpu.fpu.x87.set_mm(target, value);
    Ok(Flow::Next)
}

#[inline(always)]
fn map8(a: u128, b: u128, f: impl Fn(u8, u8) -> u8) -> u128 {
    let (a, b) = (bytes(a), bytes(b));
    from_bytes(std::array::from_fn(|n| f(a[n], b[n])))
}

#[inline(always)]
fn map16(a: u128, b: u128, f: impl Fn(u16, u16) -> u16) -> u128 {
    let (a, b) = (words(a), words(b));
    from_words(std::array::from_fn(|n| f(a[n], b[n])))
}

#[inline(always)]
fn map32(a: u128, b: u128, f: impl Fn(u32, u32) -> u32) -> u128 {
    let (a, b) = (dwords(a), dwords(b));
    from_dwords(std::array::from_fn(|n| f(a[n], b[n])))
}

#[inline(always)]
fn map64(a: u128, b: u128, f: impl Fn(u64, u64) -> u64) -> u128 {
    let (a, b) = (qwords(a), qwords(b));
    from_qwords([f(a[0], b[0]), f(a[1], b[1])])
}

#[inline(always)]
fn per16(a: u128, f: impl Fn(u16) -> u16) -> u128 {
    from_words(words(a).map(f))
}

#[inline(always)]
fn per32(a: u128, f: impl Fn(u32) -> u32) -> u128 {
    from_dwords(dwords(a).map(f))
}

#[inline(always)]
fn per64(a: u128, f: impl Fn(u64) -> u64) -> u128 {
    from_qwords(qwords(a).map(f))
}

const fn low(value: u128) -> u128 {
    value as u64 as u128
}

fn multiply_add(a: u32, b: u32) -> u32 {
    let product = |shift: u32| i32::from((a >> shift) as i16) * i32::from((b >> shift) as i16);
    product(0).wrapping_add(product(16)) as u32
}

/// All ones in each byte where the operands are equal. String functions live on it, so: eight at a time.
fn equal_bytes(a: u64, b: u64) -> u64 {
    const LOW_BITS: u64 = 0x7f7f_7f7f_7f7f_7f7f;
    let differ = a ^ b;
    let equal = !(((differ & LOW_BITS) + LOW_BITS) | differ | LOW_BITS);
    (equal >> 7) * 0xff
}

fn absolute_differences(a: u64, b: u64) -> u64 {
    let pairs = a.to_le_bytes().into_iter().zip(b.to_le_bytes());
    pairs.map(|(x, y)| u64::from(x.abs_diff(y))).sum()
}

fn pack16(a: u128, b: u128, saturate: impl Fn(i16) -> u8) -> u128 {
    let (a, b) = (words(a), words(b));
    from_bytes(std::array::from_fn(|n| saturate(if n < 8 { a[n] } else { b[n - 8] } as i16)))
}

fn pack_signed_words(a: u128, b: u128) -> u128 {
    pack16(a, b, |x| x.clamp(i8::MIN.into(), i8::MAX.into()) as u8)
}

fn pack_unsigned_words(a: u128, b: u128) -> u128 {
    pack16(a, b, |x| x.clamp(0, 255) as u8)
}

fn pack_signed_dwords(a: u128, b: u128) -> u128 {
    let (a, b) = (dwords(a), dwords(b));
    let saturate = |x: u32| (x as i32).clamp(i16::MIN.into(), i16::MAX.into()) as u16;
    from_words(std::array::from_fn(|n| saturate(if n < 4 { a[n] } else { b[n - 4] })))
}

/// Interleaves the bytes of the low halves.
fn interleave8(a: u128, b: u128) -> u128 {
    let (a, b) = (bytes(a), bytes(b));
    from_bytes(std::array::from_fn(|n| if n % 2 == 0 { a[n / 2] } else { b[n / 2] }))
}

fn interleave16(a: u128, b: u128) -> u128 {
    let (a, b) = (words(a), words(b));
    from_words(std::array::from_fn(|n| if n % 2 == 0 { a[n / 2] } else { b[n / 2] }))
}

fn interleave32(a: u128, b: u128) -> u128 {
    let (a, b) = (dwords(a), dwords(b));
    from_dwords([a[0], b[0], a[1], b[1]])
}

/// Two lanes of `a`, then two of `b`, as the four fields of `order` pick them.
fn shuffle32(a: u128, b: u128, order: u8) -> u128 {
    let (a, b) = (dwords(a), dwords(b));
    let pick = |n: u32| usize::from(order >> (2 * n) & 3);
    from_dwords([a[pick(0)], a[pick(1)], b[pick(2)], b[pick(3)]])
}

fn shuffle16(value: u64, order: u8) -> u64 {
    (0..4).rev().fold(0, |out, n| out << 16 | value >> (16 * (order >> (2 * n) & 3)) & 0xffff)
}
