//! Bit tests, bit scans and byte swaps.

use iced_x86::{Instruction, OpKind};

use crate::hv::soft::cpu::Cpu;
use crate::hv::soft::fault::{Flow, Stop};
use crate::hv::soft::flags;
use crate::hv::soft::flags::sext;
use crate::hv::soft::mmu::Access;
use crate::hv::soft::operand::{address_mask, operand_bits, segment_fault};
use crate::mem::Scalar;

/// What a bit test leaves of the operand that has `bit` set in it.
type Change = fn(value: u64, bit: u64) -> u64;

pub(super) fn bt(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    bit_test(cpu, insn, None)
}

pub(super) fn bts(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    bit_test(cpu, insn, Some(|value, bit| value | bit))
}

pub(super) fn btr(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    bit_test(cpu, insn, Some(|value, bit| value & !bit))
}

pub(super) fn btc(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    bit_test(cpu, insn, Some(|value, bit| value ^ bit))
}

fn bit_test(cpu: &mut Cpu, insn: &Instruction, change: Option<Change>) -> Result<Flow, Stop> {
    let bits = operand_bits(insn, 0);
    let index = cpu.operand(insn, 1)?;
    let bit = 1 << (index % u64::from(bits));
    if insn.op0_kind() == OpKind::Memory && insn.op1_kind() == OpKind::Register {
        return bit_string(cpu, insn, bits, index, bit, change);
    }
    let value = match change {
        None => cpu.operand(insn, 0)?,
        Some(change) if insn.has_lock_prefix() => cpu.update_operand(insn, |value| change(value, bit))?,
        Some(change) => {
            let value = cpu.operand_for_write(insn, 0)?;
            cpu.set_operand(insn, 0, change(value, bit))?;
            value
        }
    };
    cpu.flags.set_cf(value & bit != 0);
    Ok(Flow::Next)
}

/// With a register index, memory is a bit string that the index reaches into, signed and far.
fn bit_string(
    cpu: &mut Cpu,
    insn: &Instruction,
    bits: u32,
    index: u64,
    bit: u64,
    change: Option<Change>,
) -> Result<Flow, Stop> {
    let skip = ((sext(index, bits) as i64) >> bits.trailing_zeros()) as u64;
    let bytes = u64::from(bits / 8);
    let offset = cpu.effective_address(insn).wrapping_add(skip.wrapping_mul(bytes)) & address_mask(insn);
    let access = if change.is_some() { Access::Write } else { Access::Read };
    let address = cpu.address_at(insn, offset, bytes, access)?;
    let locked = insn.has_lock_prefix();
    let found = match bits {
        16 => bit_at::<u16>(cpu, address, bit, change, locked),
        32 => bit_at::<u32>(cpu, address, bit, change, locked),
        _ => bit_at::<u64>(cpu, address, bit, change, locked),
    };
    let set = found.map_err(|stop| segment_fault(insn, stop))?;
    cpu.flags.set_cf(set);
    Ok(Flow::Next)
}

fn bit_at<T: Scalar>(
    cpu: &mut Cpu,
    address: u64,
    bit: u64,
    change: Option<Change>,
    locked: bool,
) -> Result<bool, Stop> {
    let changed = |value: T, change: Change| T::narrow(change(value.widen() as u64, bit).into());
    let value = match change {
        None => cpu.read::<T>(address)?,
        Some(change) if locked => cpu.update::<T>(address, |value| changed(value, change))?,
        Some(change) => {
            let value = cpu.read_for_write::<T>(address)?;
            cpu.write(address, changed(value, change))?;
            value
        }
    };
    Ok(value.widen() as u64 & bit != 0)
}

pub(super) fn bsf(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    scan(cpu, insn, |value| value.trailing_zeros())
}

pub(super) fn bsr(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    scan(cpu, insn, |value| 63 - value.leading_zeros())
}

/// A scan of zero leaves the destination as it was, all 64 bits of it. ZF alone is defined; silicon makes PF that
/// of the index and clears the others.
fn scan(cpu: &mut Cpu, insn: &Instruction, find: fn(u64) -> u32) -> Result<Flow, Stop> {
    let value = cpu.operand(insn, 1)?;
    let index = if value == 0 { 0 } else { find(value) };
    if value != 0 {
        cpu.set_register(insn.op0_register(), index.into());
    }
    let parity = if index.count_ones().is_multiple_of(2) { flags::PF } else { 0 };
    cpu.flags.set_rflags(parity | if value == 0 { flags::ZF } else { 0 });
    Ok(Flow::Next)
}

pub(super) fn bswap(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    let register = insn.op0_register();
    let value = cpu.register(register);
    let swapped = match register.size() {
        8 => value.swap_bytes(),
        4 => (value as u32).swap_bytes().into(),
        // Undefined for 16 bits; silicon writes zero.
        _ => 0,
    };
    cpu.set_register(register, swapped);
    Ok(Flow::Next)
}
