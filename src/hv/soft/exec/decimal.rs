//! Decimal arithmetic (Intel SDM volume 2), which 64-bit mode does not have. Flags that the manual leaves undefined are
//! those of the result, or clear.

use iced_x86::Instruction;

use crate::hv::soft::cpu::{Cpu, slot};
use crate::hv::soft::fault::{Exception, Flow, Stop};
use crate::hv::soft::flags;

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

    /// The flags of AL, with CF and AF as given.
    fn decimal_flags(&mut self, cf: bool, af: bool) {
        let al = self.al();
        self.flags.logic(al, 8);
        let kept = self.flags.rflags() & !(flags::CF | flags::AF | flags::OF);
        let (cf, af) = (if cf { flags::CF } else { 0 }, if af { flags::AF } else { 0 });
        self.flags.set_rflags(kept | cf | af);
    }

    /// Whether the low digit of AL needs adjusting.
    fn low_digit_overflows(&self) -> bool {
        self.al() & 0xf > 9 || self.flags.af()
    }

    /// AAA and AAS: adjusts AX after an addition or subtraction of unpacked digits.
    fn adjust_unpacked(&mut self, adjusted: fn(u64) -> u64) -> Flow {
        let adjusts = self.low_digit_overflows();
        if adjusts {
            let ax = adjusted(self.regs[slot::RAX] & 0xffff);
            self.set_low(slot::RAX, 16, ax);
        }
        let al = self.al() & 0xf;
        self.set_low(slot::RAX, 8, al);
        self.decimal_flags(adjusts, adjusts);
        Flow::Next
    }

    /// DAA and DAS: adjusts AL after an addition or subtraction of packed digits.
    fn adjust_packed(&mut self, apply: fn(u64, u64) -> (u64, bool)) -> Flow {
        let (before, carried) = (self.al(), self.flags.cf());
        let (mut al, mut cf) = (before, false);
        let low = self.low_digit_overflows();
        if low {
            let (value, carries) = apply(al, 6);
            (al, cf) = (value, carried || carries);
        }
        if before > 0x99 || carried {
            (al, cf) = (apply(al, 0x60).0, true);
        }
        self.set_low(slot::RAX, 8, al);
        self.decimal_flags(cf, low);
        Flow::Next
    }
}

pub(super) fn aaa(cpu: &mut Cpu, _: &Instruction) -> Result<Flow, Stop> {
    Ok(cpu.adjust_unpacked(|ax| ax.wrapping_add(0x106)))
}

pub(super) fn aas(cpu: &mut Cpu, _: &Instruction) -> Result<Flow, Stop> {
    Ok(cpu.adjust_unpacked(|ax| ax.wrapping_sub(6).wrapping_sub(0x100)))
}

pub(super) fn daa(cpu: &mut Cpu, _: &Instruction) -> Result<Flow, Stop> {
    Ok(cpu.adjust_packed(|al, by| ((al + by) & 0xff, al + by > 0xff)))
}

pub(super) fn das(cpu: &mut Cpu, _: &Instruction) -> Result<Flow, Stop> {
    Ok(cpu.adjust_packed(|al, by| (al.wrapping_sub(by) & 0xff, al < by)))
}

/// AAM: divides AL by the immediate, ten as a rule.
pub(super) fn aam(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    let (al, base) = (cpu.al(), u64::from(insn.immediate8()));
    let ah = al.checked_div(base).ok_or(Exception::DIVIDE)?;
    cpu.set_ax(ah, al % base);
    cpu.decimal_flags(false, false);
    Ok(Flow::Next)
}

/// AAD: the reverse, before a division.
pub(super) fn aad(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    let value = cpu.al() + cpu.ah() * u64::from(insn.immediate8());
    cpu.set_ax(0, value);
    cpu.decimal_flags(false, false);
    Ok(Flow::Next)
}

/// SALC, which no manual has: AL becomes all ones or zero, as CF says.
pub(super) fn salc(cpu: &mut Cpu, _: &Instruction) -> Result<Flow, Stop> {
    let al = if cpu.flags.cf() { 0xff } else { 0 };
    cpu.set_low(slot::RAX, 8, al);
    Ok(Flow::Next)
}
