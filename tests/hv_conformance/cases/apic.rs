//! Guest code for the interrupt controllers. All of it uses RAX, and RBX where it says so.

use super::*;

// Registers of the local APIC's page (12.4.1).
pub(crate) const ID: u64 = 0x20;
pub(crate) const VERSION: u64 = 0x30;
pub(crate) const TPR: u64 = 0x80;
pub(crate) const PPR: u64 = 0xa0;
pub(crate) const EOI: u64 = 0xb0;
pub(crate) const LDR: u64 = 0xd0;
pub(crate) const DFR: u64 = 0xe0;
pub(crate) const SVR: u64 = 0xf0;
pub(crate) const ISR: u64 = 0x100;
pub(crate) const TMR: u64 = 0x180;
pub(crate) const IRR: u64 = 0x200;
pub(crate) const ESR: u64 = 0x280;
pub(crate) const ICR: u64 = 0x300;
pub(crate) const ICR_HIGH: u64 = 0x310;
pub(crate) const LVT_TIMER: u64 = 0x320;
pub(crate) const LVT_LINT0: u64 = 0x350;
pub(crate) const LVT_ERROR: u64 = 0x370;
pub(crate) const INITIAL_COUNT: u64 = 0x380;
pub(crate) const CURRENT_COUNT: u64 = 0x390;
pub(crate) const DIVIDE: u64 = 0x3e0;

pub(crate) const MASKED: u32 = 1 << 16;
pub(crate) const PERIODIC: u32 = 1 << 17;
pub(crate) const TSC_DEADLINE: u32 = 1 << 18;
pub(crate) const DIVIDE_BY_1: u32 = 0b1011;

// The interrupt command register (12.6.1).
pub(crate) const ASSERT: u32 = 1 << 14;
pub(crate) const LOGICAL: u32 = 1 << 11;
pub(crate) const NMI: u32 = 4 << 8;
pub(crate) const INIT: u32 = 5 << 8;
pub(crate) const START: u32 = 6 << 8;
pub(crate) const TO_SELF: u32 = 1 << 18;
pub(crate) const TO_ALL: u32 = 2 << 18;
pub(crate) const TO_OTHERS: u32 = 3 << 18;

// Redirection entries (82093AA, 3.2.4).
pub(crate) const PIN_LEVEL: u64 = 1 << 15;
pub(crate) const PIN_MASKED: u64 = 1 << 16;
pub(crate) const REMOTE_IRR: u64 = 1 << 14;

pub(crate) fn lapic_write(a: &mut CodeAssembler, register: u64, value: u32) -> Assembled {
    a.mov(rax, LAPIC + register)?;
    a.mov(dword_ptr(rax), value)
}

/// Into EAX.
pub(crate) fn lapic_read(a: &mut CodeAssembler, register: u64) -> Assembled {
    a.mov(rax, LAPIC + register)?;
    a.mov(eax, dword_ptr(rax))
}

/// Enables the local APIC, with vector 0xff for spurious interrupts.
pub(crate) fn enable(a: &mut CodeAssembler) -> Assembled {
    lapic_write(a, SVR, 0x1ff)
}

/// Sends an interprocessor interrupt to the local APIC `to`, or wherever a shorthand in `command` says.
pub(crate) fn send(a: &mut CodeAssembler, to: u32, command: u32) -> Assembled {
    lapic_write(a, ICR_HIGH, to << 24)?;
    lapic_write(a, ICR, command)
}

pub(crate) fn ioapic_write(a: &mut CodeAssembler, index: u32, value: u32) -> Assembled {
    a.mov(rax, IOAPIC)?;
    a.mov(dword_ptr(rax), index)?;
    a.mov(dword_ptr(rax + 0x10), value)
}

/// Into EAX.
pub(crate) fn ioapic_read(a: &mut CodeAssembler, index: u32) -> Assembled {
    a.mov(rax, IOAPIC)?;
    a.mov(dword_ptr(rax), index)?;
    a.mov(eax, dword_ptr(rax + 0x10))
}

/// Writes the redirection entry of `pin`, the half with the mask last.
pub(crate) fn redirect(a: &mut CodeAssembler, pin: u32, entry: u64) -> Assembled {
    ioapic_write(a, 0x11 + pin * 2, (entry >> 32) as u32)?;
    ioapic_write(a, 0x10 + pin * 2, entry as u32)
}

/// The low half of a redirection entry into result `n`.
pub(crate) fn keep_redirection(a: &mut CodeAssembler, n: u64, pin: u32) -> Assembled {
    ioapic_read(a, 0x10 + pin * 2)?;
    keep(a, n, rax)
}

pub(crate) fn end_of_interrupt(a: &mut CodeAssembler) -> Assembled {
    lapic_write(a, EOI, 0)
}

/// A handler that counts in result `n`.
pub(crate) fn counting_handler(guest: &mut Guest, vector: u8, n: u64) {
    guest.handler(vector, |a| {
        a.push(rax)?;
        count(a, n)?;
        end_of_interrupt(a)?;
        a.pop(rax)?;
        a.iretq()
    });
}

/// Spins until result `n` is at least `value`.
pub(crate) fn await_result(a: &mut CodeAssembler, n: u64, value: i32) -> Assembled {
    let mut wait = a.create_label();
    let mut done = a.create_label();
    a.set_label(&mut wait)?;
    a.cmp(qword_ptr(RESULTS + n * 8), value)?;
    a.jae(done)?;
    a.pause()?;
    a.jmp(wait)?;
    a.set_label(&mut done)?;
    a.nop()
}

/// Halts until result `n` is at least `value`, without a moment at which an interrupt could be missed; interrupts are
/// off after it.
pub(crate) fn halt_until(a: &mut CodeAssembler, n: u64, value: i32) -> Assembled {
    let mut again = a.create_label();
    let mut done = a.create_label();
    a.set_label(&mut again)?;
    a.cli()?;
    a.cmp(qword_ptr(RESULTS + n * 8), value)?;
    a.jae(done)?;
    a.sti()?;
    a.hlt()?;
    a.jmp(again)?;
    a.set_label(&mut done)?;
    a.nop()
}

/// A device's line, moved by the guest itself.
pub(crate) fn line(a: &mut CodeAssembler, port: u16, gsi: u8) -> Assembled {
    a.mov(eax, u32::from(gsi))?;
    a.out(u32::from(port), al)
}

/// Executes for a while with interrupts on, so that one that should not come would have come.
pub(crate) fn give_time(a: &mut CodeAssembler) -> Assembled {
    let mut spin = a.create_label();
    a.mov(eax, 2000)?;
    a.set_label(&mut spin)?;
    a.dec(eax)?;
    a.jne(spin)
}
