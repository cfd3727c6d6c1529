//! Multiplication and division.

use iced_x86::Instruction;

use crate::hv::soft::cpu::{Cpu, slot};
use crate::hv::soft::fault::{Exception, Flow, Stop};
use crate::hv::soft::flags;
use crate::hv::soft::flags::sext;
use crate::hv::soft::operand::operand_bits;

use super::mask;

impl Cpu {
    /// RDX:RAX, or AX for bytes, as one operand of twice `bits`.
    fn double_accumulator(&self, bits: u32) -> u128 {
        let (low, high) = (self.regs[slot::RAX], self.regs[slot::RDX]);
        if bits == 8 {
            u128::from(low & 0xffff)
        } else {
            u128::from(low & mask(bits)) | u128::from(high & mask(bits)) << bits
        }
    }

    fn set_double_accumulator(&mut self, bits: u32, low: u64, high: u64) {
        if bits == 8 {
            self.set_low(slot::RAX, 16, low & 0xff | (high & 0xff) << 8);
        } else {
            self.set_low(slot::RAX, bits, low);
            self.set_low(slot::RDX, bits, high);
        }
    }

    /// Writes the low bits of a general register as instructions of that size do.
    pub(super) fn set_low(&mut self, index: usize, bits: u32, value: u64) {
        let full = &mut self.regs[index];
        *full = match bits {
            64 => value,
            32 => value & mask(32),
            _ => *full & !mask(bits) | value & mask(bits),
        };
    }

    /// CF and OF say that the upper half is significant; the other flags are undefined, and stay.
    fn multiplied(&mut self, overflow: bool) {
        self.flags.set_cf(overflow);
        self.flags.set_of(overflow);
    }

    /// All flags are undefined; AMD's silicon keeps CF and OF, sets AF and clears the others.
    fn divided(&mut self) {
        let kept = self.flags.rflags() & (flags::CF | flags::OF);
        self.flags.set_rflags(kept | flags::AF);
    }
}

pub(super) fn mul(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    let bits = operand_bits(insn, 0);
    let b = cpu.operand(insn, 0)?;
    let product = u128::from(cpu.regs[slot::RAX] & mask(bits)) * u128::from(b);
    let high = (product >> bits) as u64;
    cpu.set_double_accumulator(bits, product as u64, high);
    cpu.multiplied(high != 0);
    Ok(Flow::Next)
}

fn signed(value: u64, bits: u32) -> i128 {
    i128::from(sext(value, bits) as i64)
}

pub(super) fn imul(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    let bits = operand_bits(insn, 0);
    let (a, b) = match insn.op_count() {
        1 => (cpu.regs[slot::RAX], cpu.operand(insn, 0)?),
        2 => (cpu.operand(insn, 0)?, cpu.operand(insn, 1)?),
        _ => (cpu.operand(insn, 1)?, cpu.operand(insn, 2)?),
    };
    let product = signed(a, bits) * signed(b, bits);
    if insn.op_count() == 1 {
        cpu.set_double_accumulator(bits, product as u64, (product >> bits) as u64);
    } else {
        cpu.set_register(insn.op0_register(), product as u64);
    }
    cpu.multiplied(signed(product as u64, bits) != product);
    Ok(Flow::Next)
}

pub(super) fn div(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    let bits = operand_bits(insn, 0);
    let divisor = u128::from(cpu.operand(insn, 0)?);
    let dividend = cpu.double_accumulator(bits);
    let quotient = dividend.checked_div(divisor).ok_or(Exception::DIVIDE)?;
    if quotient > u128::from(mask(bits)) {
        return Err(Exception::DIVIDE.into());
    }
    cpu.set_double_accumulator(bits, quotient as u64, (dividend % divisor) as u64);
    cpu.divided();
    Ok(Flow::Next)
}

pub(super) fn idiv(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    let bits = operand_bits(insn, 0);
    let divisor = signed(cpu.operand(insn, 0)?, bits);
    let unused = 128 - 2 * bits;
    let dividend = (cpu.double_accumulator(bits) << unused) as i128 >> unused;
    // No quotient for zero, nor for the smallest dividend by -1.
    let quotient = dividend.checked_div(divisor).ok_or(Exception::DIVIDE)?;
    if signed(quotient as u64, bits) != quotient {
        return Err(Exception::DIVIDE.into());
    }
    cpu.set_double_accumulator(bits, quotient as u64, (dividend % divisor) as u64);
    cpu.divided();
    Ok(Flow::Next)
}
