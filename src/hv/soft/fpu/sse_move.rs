//! Moves between XMM and MMX registers, general registers and memory (Intel SDM volume 1, sections 9.4, 10.4 and 11.4).

use iced_x86::Instruction;
use iced_x86::Mnemonic;
use iced_x86::OpKind;
use iced_x86::Register;

use crate::hv::soft::cpu::Cpu;
use crate::hv::soft::cpu::slot;
use crate::hv::soft::exec::Executor;
use crate::hv::soft::fault::Flow;
use crate::hv::soft::fault::Stop;
use crate::hv::soft::mmu::Access;
use crate::hv::soft::operand::segment_fault;

use super::access::mm_index;
use super::access::xmm_index;
use super::lane::bytes;
use super::lane::dwords;
use super::lane::qwords;

const LOW: u128 = u64::MAX as u128;

pub(super) fn executor(insn: &Instruction) -> Option<Executor> {
    let store = insn.op0_kind() == OpKind::Memory;
    Some(match insn.mnemonic() {
        Mnemonic::Movaps | Mnemonic::Movapd | Mnemonic::Movdqa if store => store_aligned,
        Mnemonic::Movaps | Mnemonic::Movapd | Mnemonic::Movdqa => load_aligned,
        Mnemonic::Movups | Mnemonic::Movupd | Mnemonic::Movdqu if store => store_unaligned,
        Mnemonic::Movups | Mnemonic::Movupd | Mnemonic::Movdqu => load_unaligned,
        Mnemonic::Movntps | Mnemonic::Movntpd | Mnemonic::Movntdq => store_aligned,
        Mnemonic::Movntq => mm_store::<64>,
        Mnemonic::Movss => scalar::<32>(insn),
        Mnemonic::Movsd => scalar::<64>(insn),
        Mnemonic::Movd => low::<32>(insn),
        Mnemonic::Movq => low::<64>(insn),
        Mnemonic::Movlps | Mnemonic::Movlpd if store => xmm_store::<64>,
        Mnemonic::Movlps | Mnemonic::Movlpd => load_low,
        Mnemonic::Movhps | Mnemonic::Movhpd if store => store_high,
        Mnemonic::Movhps | Mnemonic::Movhpd => load_high,
        Mnemonic::Movhlps => high_to_low,
        Mnemonic::Movlhps => low_to_high,
        Mnemonic::Movmskps => sign_mask_single,
        Mnemonic::Movmskpd => sign_mask_double,
        Mnemonic::Pmovmskb if insn.op1_register().is_mm() => byte_mask_mm,
        Mnemonic::Pmovmskb => byte_mask_xmm,
        Mnemonic::Movdq2q => xmm_to_mm,
        Mnemonic::Movq2dq => mm_to_xmm,
        Mnemonic::Maskmovq => masked_mm,
        Mnemonic::Maskmovdqu => masked_xmm,
        _ => return None,
    })
}

/// MOVSS and MOVSD: between registers only the low lane changes, a load clears the others.
fn scalar<const BITS: u32>(insn: &Instruction) -> Executor {
    match (insn.op0_kind(), insn.op1_kind()) {
        (OpKind::Memory, _) => xmm_store::<BITS>,
        (_, OpKind::Memory) => xmm_load::<BITS>,
        _ => |cpu, insn| {
            cpu.require_sse()?;
            let lane = u128::MAX >> (128 - BITS);
            let source = cpu.fpu.xmm[xmm_index(insn.op1_register())];
            let target = &mut cpu.fpu.xmm[xmm_index(insn.op0_register())];
            *target = *target & !lane | source & lane;
            Ok(Flow::Next)
        },
    }
}

/// MOVD and MOVQ in all their forms.
fn low<const BITS: u32>(insn: &Instruction) -> Executor {
    let (to, from) = (insn.op0_register(), insn.op1_register());
    if to.is_xmm() {
        return if from.is_xmm() || insn.op1_kind() == OpKind::Memory { xmm_load::<BITS> } else { gpr_to_xmm::<BITS> };
    }
    if to.is_mm() {
        return match insn.op1_kind() {
            OpKind::Memory if BITS == 32 => |cpu, insn| {
                cpu.require_mmx()?;
                let value = cpu.load::<u32>(insn)?;
                cpu.fpu.x87.set_mm(mm_index(insn.op0_register()), value.into());
                Ok(Flow::Next)
            },
            _ if from.is_mm() || insn.op1_kind() == OpKind::Memory => mm_load,
            _ => gpr_to_mm,
        };
    }
    match (from.is_xmm(), insn.op0_kind()) {
        (true, OpKind::Memory) => xmm_store::<BITS>,
        (true, _) => xmm_to_gpr,
        (false, OpKind::Memory) => mm_store::<BITS>,
        (false, _) => mm_to_gpr,
    }
}

fn load_aligned(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    cpu.require_sse()?;
    cpu.fpu.xmm[xmm_index(insn.op0_register())] = cpu.xmm_source(insn, 1)?;
    Ok(Flow::Next)
}

fn load_unaligned(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    cpu.require_sse()?;
    let value = match insn.op1_kind() {
        OpKind::Memory => cpu.load(insn)?,
        _ => cpu.fpu.xmm[xmm_index(insn.op1_register())],
    };
    cpu.fpu.xmm[xmm_index(insn.op0_register())] = value;
    Ok(Flow::Next)
}

fn store_aligned(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    cpu.require_sse()?;
    cpu.store_aligned(insn, cpu.fpu.xmm[xmm_index(insn.op1_register())])?;
    Ok(Flow::Next)
}

fn store_unaligned(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    cpu.require_sse()?;
    cpu.store(insn, cpu.fpu.xmm[xmm_index(insn.op1_register())])?;
    Ok(Flow::Next)
}

fn xmm_load<const BITS: u32>(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    cpu.require_sse()?;
    let value = cpu.low_source::<BITS>(insn, 1)?;
    cpu.fpu.xmm[xmm_index(insn.op0_register())] = value.into();
    Ok(Flow::Next)
}

fn xmm_store<const BITS: u32>(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    cpu.require_sse()?;
    let value = cpu.fpu.xmm[xmm_index(insn.op1_register())];
    if insn.op0_kind() != OpKind::Memory {
        // MOVQ between registers, in its store encoding.
        cpu.fpu.xmm[xmm_index(insn.op0_register())] = value & LOW;
    } else if BITS == 32 {
        cpu.store(insn, value as u32)?;
    } else {
        cpu.store(insn, value as u64)?;
    }
    Ok(Flow::Next)
}

fn gpr_to_xmm<const BITS: u32>(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    cpu.require_sse()?;
    cpu.fpu.xmm[xmm_index(insn.op0_register())] = cpu.register(insn.op1_register()).into();
    Ok(Flow::Next)
}

fn xmm_to_gpr(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    cpu.require_sse()?;
    cpu.set_register(insn.op0_register(), cpu.fpu.xmm[xmm_index(insn.op1_register())] as u64);
    Ok(Flow::Next)
}

fn mm_load(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    cpu.require_mmx()?;
    let value = cpu.mm_source(insn, 1)?;
    cpu.fpu.x87.set_mm(mm_index(insn.op0_register()), value);
    Ok(Flow::Next)
}

fn mm_store<const BITS: u32>(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    cpu.require_mmx()?;
    let value = cpu.fpu.x87.mm(mm_index(insn.op1_register()));
    if insn.op0_kind() != OpKind::Memory {
        cpu.fpu.x87.set_mm(mm_index(insn.op0_register()), value);
    } else if BITS == 32 {
        cpu.store(insn, value as u32)?;
    } else {
        cpu.store(insn, value)?;
    }
    cpu.fpu.x87.enter_mmx();
    Ok(Flow::Next)
}

fn gpr_to_mm(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    cpu.require_mmx()?;
    let value = cpu.register(insn.op1_register());
    cpu.fpu.x87.set_mm(mm_index(insn.op0_register()), value);
    Ok(Flow::Next)
}

fn mm_to_gpr(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    cpu.require_mmx()?;
    cpu.fpu.x87.enter_mmx();
    cpu.set_register(insn.op0_register(), cpu.fpu.x87.mm(mm_index(insn.op1_register())));
    Ok(Flow::Next)
}

fn load_low(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    cpu.require_sse()?;
    let value = cpu.load::<u64>(insn)?;
    let target = &mut cpu.fpu.xmm[xmm_index(insn.op0_register())];
    *target = *target & !LOW | u128::from(value);
    Ok(Flow::Next)
}

fn load_high(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    cpu.require_sse()?;
    let value = cpu.load::<u64>(insn)?;
    let target = &mut cpu.fpu.xmm[xmm_index(insn.op0_register())];
    *target = *target & LOW | u128::from(value) << 64;
    Ok(Flow::Next)
}

fn store_high(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    cpu.require_sse()?;
    cpu.store(insn, (cpu.fpu.xmm[xmm_index(insn.op1_register())] >> 64) as u64)?;
    Ok(Flow::Next)
}

fn high_to_low(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    cpu.require_sse()?;
    let source = cpu.fpu.xmm[xmm_index(insn.op1_register())];
    let target = &mut cpu.fpu.xmm[xmm_index(insn.op0_register())];
    *target = *target & !LOW | source >> 64;
    Ok(Flow::Next)
}

fn low_to_high(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    cpu.require_sse()?;
    let source = cpu.fpu.xmm[xmm_index(insn.op1_register())];
    let target = &mut cpu.fpu.xmm[xmm_index(insn.op0_register())];
    *target = *target & LOW | source << 64;
    Ok(Flow::Next)
}

fn sign_mask_single(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    cpu.require_sse()?;
    let lanes = dwords(cpu.fpu.xmm[xmm_index(insn.op1_register())]);
    let mask = lanes.iter().rev().fold(0, |mask, lane| mask << 1 | lane >> 31);
    cpu.set_register(insn.op0_register(), mask.into());
    Ok(Flow::Next)
}

fn sign_mask_double(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    cpu.require_sse()?;
    let value = cpu.fpu.xmm[xmm_index(insn.op1_register())];
    cpu.set_register(insn.op0_register(), (value >> 127 << 1) as u64 | (value >> 63) as u64 & 1);
    Ok(Flow::Next)
}

/// The top bits of all bytes, gathered by a multiplication that moves each of a half's eight to its place.
fn sign_bits(value: u128) -> u64 {
    let [low, high] = qwords(value).map(|half| {
        let bits = half >> 7 & 0x0101_0101_0101_0101;
        bits.wrapping_mul(0x0102_0408_1020_4080) >> 56
    });
    low | high << 8
}

fn byte_mask_xmm(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    cpu.require_sse()?;
    cpu.set_register(insn.op0_register(), sign_bits(cpu.fpu.xmm[xmm_index(insn.op1_register())]));
    Ok(Flow::Next)
}

fn byte_mask_mm(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    cpu.require_mmx()?;
    cpu.fpu.x87.enter_mmx();
    let value = cpu.fpu.x87.mm(mm_index(insn.op1_register()));
    cpu.set_register(insn.op0_register(), sign_bits(value.into()));
    Ok(Flow::Next)
}

fn xmm_to_mm(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    cpu.require_sse()?;
    cpu.require_mmx()?;
    let value = cpu.fpu.xmm[xmm_index(insn.op1_register())] as u64;
    cpu.fpu.x87.set_mm(mm_index(insn.op0_register()), value);
    Ok(Flow::Next)
}

fn mm_to_xmm(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    cpu.require_sse()?;
    cpu.require_mmx()?;
    cpu.fpu.x87.enter_mmx();
    cpu.fpu.xmm[xmm_index(insn.op0_register())] = cpu.fpu.x87.mm(mm_index(insn.op1_register())).into();
    Ok(Flow::Next)
}

fn masked_mm(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    cpu.require_mmx()?;
    let value = cpu.fpu.x87.mm(mm_index(insn.op1_register()));
    let mask = cpu.fpu.x87.mm(mm_index(insn.op2_register()));
    masked(cpu, insn, &value.to_le_bytes(), sign_bits(mask.into()))?;
    cpu.fpu.x87.enter_mmx();
    Ok(Flow::Next)
}

fn masked_xmm(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    cpu.require_sse()?;
    let value = cpu.fpu.xmm[xmm_index(insn.op1_register())];
    let mask = cpu.fpu.xmm[xmm_index(insn.op2_register())];
    masked(cpu, insn, &bytes(value), sign_bits(mask))?;
    Ok(Flow::Next)
}

/// Writes the bytes that `mask` selects at DS:RDI; only they can fault, and all are checked before one is written.
fn masked(cpu: &mut Cpu, insn: &Instruction, value: &[u8], mask: u64) -> Result<(), Stop> {
    let wrap = match insn.op0_kind() {
        OpKind::MemorySegDI => 0xffff,
        OpKind::MemorySegEDI => 0xffff_ffff,
        _ => u64::MAX,
    };
    let offset = cpu.regs[slot::RDI] & wrap;
    // Outside 64-bit mode all of it must lie in the segment, whatever is written.
    let base = cpu.address_at(insn, offset, value.len() as u64, Access::Write)?;
    let fault = |stop| if insn.memory_segment() == Register::SS { segment_fault(insn, stop) } else { stop };
    let selected = |n: usize| mask >> n & 1 == 1;
    for n in (0..value.len()).filter(|&n| selected(n)) {
        cpu.probe_write(base.wrapping_add(n as u64), 1).map_err(fault)?;
    }
    for (n, &byte) in value.iter().enumerate().filter(|&(n, _)| selected(n)) {
        cpu.write(base.wrapping_add(n as u64), byte).map_err(fault)?;
    }
    Ok(())
}
