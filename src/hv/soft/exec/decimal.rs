//! Decimal arithmetic (Intel SDM volume 2), which 64-bit mode does not have. Flags that the manual leaves undefined are as
//! AMD's silicon leaves them: those of the addition or subtraction that adjusts.

use iced_x86::Instruction;

use crate::hv::soft::cpu::{Cpu, slot};
use crate::hv::soft::fault::{Exception, Flow, Stop};
use crate::hv::soft::flags;
use crate::hv::soft::flags::Flags;

/// An addition or a subtraction of operands of some bits, which leaves its flags.
type Operation = fn(&mut Flags, u64, u64, u32) -> u64;

fn plus(flags: &mut Flags, a: u64, b: u64, bits: u32) -> u64 {
    flags.add(a, b, a.wrapping_add(b), bits);
    a.wrapping_add(b)
}

fn minus(flags: &mut Flags, a: u64, b: u64, bits: u32) -> u64 {
    flags.sub(a, b, a.wrapping_sub(b), bits);
    a.wrapping_sub(b)
}

impl Cpu {
    fn al(&self) -> u64 {
        self.regs[slot::RAX] & 0xff
    }

    fn ah(&self) -> u64 {
        self.regs[slot::RAX] >> 8 & 0xff
    }

    fn set_ax(&mut self, ah: u64, al: u64) {
        self.set_low(slot::RAX, 16, (ah & 0xff) << 8 | al & 0xff);
    }

    /// Replaces CF and AF.
    fn set_carries(&mut self, cf: bool, af: bool) {
        let kept = self.flags.rflags() & !(flags::CF | flags::AF);
        let (cf, af) = (if cf { flags::CF } else { 0 }, if af { flags::AF } else { 0 });
        self.flags.set_rflags(kept | cf | af);
    }

    /// Whether the low digit of AL needs adjusting.
    fn low_digit_overflows(&self) -> bool {
        self.al() & 0xf > 9 || self.flags.af()
    }

    /// AAA and AAS: adjusts AX after an addition or subtraction of unpacked digits.
    fn adjust_unpacked(&mut self, operation: Operation) -> Flow {
        let adjusts = self.low_digit_overflows();
        let by = if adjusts { 0x106 } else { 0 };
        let ax = operation(&mut self.flags, self.regs[slot::RAX] & 0xffff, by, 16);
        self.set_ax(ax >> 8, ax & 0xf);
        self.set_carries(adjusts, adjusts);
        Flow::Next
    }

    /// DAA and DAS: adjusts AL after an addition or subtraction of packed digits.
    fn adjust_packed(&mut self, operation: Operation) -> Flow {
        let al = self.al();
        let (low, high) = (self.low_digit_overflows(), al > 0x99 || self.flags.cf());
        let by = if low { 6 } else { 0 } + if high { 0x60 } else { 0 };
        let adjusted = operation(&mut self.flags, al, by, 8);
        self.set_low(slot::RAX, 8, adjusted);
        // The adjustment of the low digit alone can carry too: the borrow of DAS.
        self.set_carries(high || self.flags.cf(), low);
        Flow::Next
    }
}

pub(super) fn aaa(cpu: &mut Cpu, _: &Instruction) -> Result<Flow, Stop> {
    Ok(cpu.adjust_unpacked(plus))
}

pub(super) fn aas(cpu: &mut Cpu, _: &Instruction) -> Result<Flow, Stop> {
    Ok(cpu.adjust_unpacked(minus))
}

pub(super) fn daa(cpu: &mut Cpu, _: &Instruction) -> Result<Flow, Stop> {
    Ok(cpu.adjust_packed(plus))
}

pub(super) fn das(cpu: &mut Cpu, _: &Instruction) -> Result<Flow, Stop> {
    Ok(cpu.adjust_packed(minus))
}

/// AAM: divides AL by the immediate, ten as a rule.
pub(super) fn aam(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    let (al, base) = (cpu.al(), u64::from(insn.immediate8()));
    let ah = al.checked_div(base).ok_or(Exception::DIVIDE)?;
    cpu.set_ax(ah, al % base);
    cpu.flags.logic(al % base, 8);
    Ok(Flow::Next)
}

/// AAD: the reverse, before a division.
pub(super) fn aad(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    let (al, tens) = (cpu.al(), cpu.ah() * u64::from(insn.immediate8()));
    let al = plus(&mut cpu.flags, al, tens, 8);
    cpu.set_ax(0, al);
    Ok(Flow::Next)
}

/// SALC, which no manual has: AL becomes all ones or zero, as CF says.
pub(super) fn salc(cpu: &mut Cpu, _: &Instruction) -> Result<Flow, Stop> {
    let al = if cpu.flags.cf() { 0xff } else { 0 };
    cpu.set_low(slot::RAX, 8, al);
    Ok(Flow::Next)
}
