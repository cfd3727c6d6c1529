//! A local APIC, in xAPIC and x2APIC form (SDM 3A, chapter 11). Owned by its vCPU's thread.
//!
//! Not here: LINT0 and LINT1 have no source (there is no 8259A and no NMI button), and thermal and
//! performance events never happen; their registers keep what is written. There is no suppression of
//! EOI broadcasts, no CMCI, no SMI.
//!
//! A level-triggered interrupt that arrives while software has disabled the APIC is dropped, and its
//! IOAPIC entry stays in service; hardware would retry. No known guest does this outside shutdown.

use std::sync::Arc;

use super::super::clock::Clock;
use super::super::mailbox::{Mailbox, Signals};
use super::timer::Timer;
use super::{Bus, Delivery, Destination, IoApic, LAPIC_BASE, LapicState, LogicalAddress, Message};
use crate::hv::HvError;
use crate::hv::profile::PHYS_BITS;

pub(super) const MSR_APIC_BASE: u32 = 0x1b;
pub(super) const MSR_TSC_DEADLINE: u32 = 0x6e0;
const MSR_X2APIC_FIRST: u32 = 0x800;
const MSR_X2APIC_LAST: u32 = 0x83f;

const BASE_BSP: u64 = 1 << 8;
const BASE_EXTD: u64 = 1 << 10;
const BASE_ENABLE: u64 = 1 << 11;
const BASE_ADDRESS: u64 = (1 << PHYS_BITS) - (1 << 12);

// Registers by x2APIC index; an xAPIC register's offset is 16 times its index.
const ID: u32 = 0x02;
const VERSION: u32 = 0x03;
const TPR: u32 = 0x08;
const APR: u32 = 0x09;
const PPR: u32 = 0x0a;
const EOI: u32 = 0x0b;
const LDR: u32 = 0x0d;
const DFR: u32 = 0x0e;
const SVR: u32 = 0x0f;
const ISR: u32 = 0x10;
const TMR: u32 = 0x18;
const IRR: u32 = 0x20;
const ESR: u32 = 0x28;
const ICR: u32 = 0x30;
const ICR_HIGH: u32 = 0x31;
const LVT: u32 = 0x32;
const LVT_END: u32 = LVT + 5;
const TIMER_INITIAL: u32 = 0x38;
const TIMER_CURRENT: u32 = 0x39;
const TIMER_DIVIDE: u32 = 0x3e;
const SELF_IPI: u32 = 0x3f;

/// An integrated APIC with six LVT entries.
const VERSION_VALUE: u32 = 0x0005_0014;

const SVR_ENABLE: u32 = 1 << 8;
/// Vector, enable, and focus checking (which does nothing).
const SVR_WRITABLE: u32 = 0x3ff;

const LVT_MASKED: u32 = 1 << 16;
const LVT_TIMER: usize = 0;
const LVT_ERROR: usize = 5;
/// What software may write to each LVT entry.
const LVT_WRITABLE: [u32; 6] = [0x7_00ff, 0x1_07ff, 0x1_07ff, 0x1_a7ff, 0x1_a7ff, 0x1_00ff];
/// Read-only LVT bits, which a write may hold set: delivery status, and LINT's remote IRR.
const LVT_READ_ONLY: u32 = 1 << 12 | 1 << 14;

const ICR_LOGICAL: u32 = 1 << 11;
/// Delivery status: reads as idle, and software writes back what it read.
const ICR_BUSY: u32 = 1 << 12;
const ICR_ASSERT: u32 = 1 << 14;
const ICR_LEVEL: u32 = 1 << 15;
const ICR_WRITABLE: u32 = 0x000c_cfff;

const ERROR_SEND_VECTOR: u32 = 1 << 5;
const ERROR_RECEIVE_VECTOR: u32 = 1 << 6;
const ERROR_REGISTER: u32 = 1 << 7;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Disabled,
    XApic,
    X2Apic,
}

impl Form {
    /// The form that an IA32_APIC_BASE value selects; `None` for x2APIC without the enable bit.
    fn of(base: u64) -> Option<Self> {
        match (base & BASE_ENABLE != 0, base & BASE_EXTD != 0) {
            (false, false) => Some(Self::Disabled),
            (true, false) => Some(Self::XApic),
            (true, true) => Some(Self::X2Apic),
            (false, true) => None,
        }
    }
}

/// A local APIC.
#[derive(Debug)]
pub(crate) struct Lapic {
    id: u32,
    base: u64,
    form: Form,
    mailbox: Arc<Mailbox>,
    ioapic: Arc<IoApic>,
    timer: Timer,
    tpr: u8,
    /// xAPIC form's logical destination and destination format; x2APIC form derives its address.
    ldr: u32,
    dfr: u32,
    svr: u32,
    esr: u32,
    /// Errors since software last wrote the ESR.
    errors: u32,
    isr: [u32; 8],
    tmr: [u32; 8],
    irr: [u32; 8],
    icr: u64,
    lvt: [u32; 6],
    signals: Signals,
}

impl Lapic {
    /// The local APIC of vCPU `id` after reset: in xAPIC form, disabled by software.
    pub(crate) fn new(id: u32, mailbox: Arc<Mailbox>, clock: Clock, ioapic: Arc<IoApic>) -> Self {
        let mut lapic = Self {
            id,
            base: LAPIC_BASE | BASE_ENABLE | if id == 0 { BASE_BSP } else { 0 },
            form: Form::XApic,
            mailbox,
            ioapic,
            timer: Timer::new(clock),
            tpr: 0,
            ldr: 0,
            dfr: 0,
            svr: 0,
            esr: 0,
            errors: 0,
            isr: [0; 8],
            tmr: [0; 8],
            irr: [0; 8],
            icr: 0,
            lvt: [0; 6],
            signals: Signals::default(),
        };
        lapic.reset();
        lapic
    }

    /// The registers' values after INIT: everything but the id and IA32_APIC_BASE (11.4.7.3).
    pub(crate) fn reset(&mut self) {
        self.timer.reset();
        (self.tpr, self.ldr, self.dfr, self.svr) = (0, 0, u32::MAX, 0xff);
        (self.esr, self.errors, self.icr) = (0, 0, 0);
        (self.isr, self.tmr, self.irr) = ([0; 8], [0; 8], [0; 8]);
        self.lvt = [LVT_MASKED; 6];
        self.publish_address();
    }

    /// Guest-physical address of the register page; `None` when it is off or in x2APIC form.
    #[inline]
    pub(crate) fn mmio_base(&self) -> Option<u64> {
        (self.form == Form::XApic).then_some(self.base & BASE_ADDRESS)
    }

    /// RDMSR of IA32_APIC_BASE, IA32_TSC_DEADLINE or an x2APIC register; `None` is #GP(0).
    pub(crate) fn read_msr(&mut self, msr: u32) -> Option<u64> {
        match msr {
            MSR_APIC_BASE => Some(self.base),
            MSR_TSC_DEADLINE => {
                self.run_timer();
                Some(self.timer.tsc_deadline())
            }
            MSR_X2APIC_FIRST..=MSR_X2APIC_LAST if self.form == Form::X2Apic => {
                match msr - MSR_X2APIC_FIRST {
                    ICR => Some(self.icr),
                    // Not in this form: these exist for xAPIC only.
                    ICR_HIGH | DFR | APR => None,
                    index => self.read_register(index).map(u64::from),
                }
            }
            _ => None,
        }
    }

    /// WRMSR to the same registers; `None` is #GP(0), with nothing changed (11.12.1.3).
    pub(crate) fn write_msr(&mut self, msr: u32, value: u64) -> Option<()> {
        match msr {
            MSR_APIC_BASE => self.write_base(value),
            MSR_TSC_DEADLINE => {
                self.timer.set_tsc_deadline(value);
                Some(())
            }
            MSR_X2APIC_FIRST..=MSR_X2APIC_LAST if self.form == Form::X2Apic => {
                self.write_x2apic(msr - MSR_X2APIC_FIRST, value)
            }
            _ => None,
        }
    }

    /// A 32-bit read at `offset` of the register page. What is not a register reads as zero and is an error (11.5.3).
    pub(crate) fn mmio_read(&mut self, offset: u64) -> u32 {
        match register_at(offset) {
            // The id stands in the highest byte in this form.
            Some(ID) => self.id << 24,
            Some(ICR) => self.icr as u32,
            Some(ICR_HIGH) => (self.icr >> 32) as u32,
            Some(LDR) => self.ldr,
            Some(DFR) => self.dfr,
            Some(APR) => 0,
            Some(index) => self.read_register(index).unwrap_or_else(|| {
                self.error(ERROR_REGISTER);
                0
            }),
            None => 0,
        }
    }

    /// A 32-bit write at `offset` of the register page. Reserved bits are ignored in this form.
    pub(crate) fn mmio_write(&mut self, offset: u64, value: u32) {
        match register_at(offset) {
            Some(ID | VERSION | APR | PPR | TIMER_CURRENT | ISR..ESR) | None => {}
            Some(TPR) => self.tpr = value as u8,
            Some(EOI) => self.end_of_interrupt(),
            Some(LDR) => {
                self.ldr = value & 0xff00_0000;
                self.publish_address();
            }
            Some(DFR) => {
                self.dfr = value | 0x0fff_ffff;
                self.publish_address();
            }
            Some(ICR) => {
                self.icr = self.icr & !0xffff_ffff | u64::from(value & ICR_WRITABLE);
                self.send_icr();
            }
            Some(ICR_HIGH) => self.icr = self.icr & 0xffff_ffff | u64::from(value & 0xff00_0000) << 32,
            Some(index) => {
                if self.write_register(index, value).is_none() {
                    self.error(ERROR_REGISTER);
                }
            }
        }
    }

    /// CR8: the task priority class.
    #[inline]
    pub(crate) fn tpr(&self) -> u64 {
        u64::from(self.tpr >> 4)
    }

    /// MOV to CR8; its caller has checked that only bits 0 to 3 are set.
    #[inline]
    pub(crate) fn set_tpr(&mut self, cr8: u64) {
        self.tpr = (cr8 as u8) << 4;
    }

    /// Takes in what has been posted and what the timer owes. Cheap when there is nothing.
    pub(crate) fn poll(&mut self) {
        if self.mailbox.any() {
            self.receive();
        }
        self.run_timer();
    }

    /// The interrupt to deliver now, if the processor accepts any: the highest requested vector whose
    /// class is above the processor priority (11.8.3.1).
    pub(crate) fn deliverable(&self) -> Option<u8> {
        if self.form == Form::Disabled {
            return None;
        }
        highest(&self.irr).filter(|vector| vector & 0xf0 > self.ppr() & 0xf0)
    }

    /// The processor has taken `vector`: from requested to in service (11.8.4).
    pub(crate) fn accept(&mut self, vector: u8) {
        set(&mut self.irr, vector, false);
        set(&mut self.isr, vector, true);
    }

    /// When to [`poll`](Self::poll) for the timer's sake, in [`Clock::now_ns`] units.
    pub(crate) fn next_deadline_ns(&self) -> Option<u64> {
        // A masked timer wakes nobody: its expiry is caught up with when software looks.
        if self.lvt[LVT_TIMER] & LVT_MASKED != 0 { None } else { self.timer.next_ns() }
    }

    /// Hands over, once, what was received besides interrupts.
    pub(crate) fn take_signals(&mut self) -> Signals {
        std::mem::take(&mut self.signals)
    }

    /// The registers to keep, with everything posted so far taken in.
    ///
    /// An error that software has not latched by writing the ESR is not part of it.
    pub(crate) fn save(&mut self) -> LapicState {
        self.poll();
        let mut state = LapicState {
            apic_base: self.base,
            id: self.id,
            tpr: self.tpr.into(),
            ldr: self.ldr,
            dfr: self.dfr,
            svr: self.svr,
            esr: self.esr,
            isr: self.isr,
            tmr: self.tmr,
            irr: self.irr,
            icr: self.icr,
            lvt: self.lvt,
            timer_initial: 0,
            timer_divide: 0,
            timer_left_ns: None,
            tsc_deadline: 0,
        };
        self.timer.save(&mut state);
        state
    }

    /// Continues from saved registers.
    ///
    /// # Errors
    /// [`HvError::State`], with nothing changed, when IA32_APIC_BASE holds what no WRMSR can put there
    /// or the state is another APIC's. Reserved bits of other registers are dropped.
    pub(crate) fn restore(&mut self, from: &LapicState) -> Result<(), HvError> {
        if from.id != self.id {
            return Err(HvError::State("local APIC id of another vCPU"));
        }
        let form = Form::of(from.apic_base)
            .filter(|_| from.apic_base & !(BASE_ADDRESS | BASE_ENABLE | BASE_EXTD | BASE_BSP) == 0)
            .ok_or(HvError::State("IA32_APIC_BASE"))?;
        (self.base, self.form) = (from.apic_base, form);
        self.tpr = from.tpr as u8;
        (self.ldr, self.dfr) = (from.ldr & 0xff00_0000, from.dfr | 0x0fff_ffff);
        (self.svr, self.esr, self.errors) = (from.svr & SVR_WRITABLE, from.esr & 0xff, 0);
        (self.isr, self.tmr, self.irr) = (from.isr, from.tmr, from.irr);
        // Vectors 0 to 15 are exceptions: an APIC never holds them.
        for words in [&mut self.isr, &mut self.tmr, &mut self.irr] {
            words[0] &= !0xffff;
        }
        self.icr = from.icr & !u64::from(!ICR_WRITABLE);
        for (entry, (saved, writable)) in self.lvt.iter_mut().zip(from.lvt.into_iter().zip(LVT_WRITABLE)) {
            *entry = saved & writable;
        }
        self.timer.restore(from, self.lvt[LVT_TIMER]);
        self.publish_address();
        Ok(())
    }

    fn bus(&self) -> &Bus {
        self.ioapic.bus()
    }

    fn software_enabled(&self) -> bool {
        self.form != Form::Disabled && self.svr & SVR_ENABLE != 0
    }

    /// Processor priority (11.8.3.1).
    fn ppr(&self) -> u8 {
        let in_service = highest(&self.isr).unwrap_or(0) & 0xf0;
        if self.tpr & 0xf0 >= in_service { self.tpr } else { in_service }
    }

    /// x2APIC's logical address: cluster and member follow from the id (11.12.10.2).
    fn x2apic_ldr(&self) -> u32 {
        self.id >> 4 << 16 | 1 << (self.id & 0xf)
    }

    fn publish_address(&self) {
        let own = (self.ldr >> 24) as u8;
        let address = match self.form {
            _ if !self.software_enabled() => LogicalAddress::None,
            Form::X2Apic => LogicalAddress::X2Apic(self.x2apic_ldr()),
            _ if self.dfr >> 28 == 0xf => LogicalAddress::Flat(own),
            _ if self.dfr >> 28 == 0 => LogicalAddress::Cluster(own),
            _ => LogicalAddress::None,
        };
        self.mailbox.set_address(address.to_bits());
    }

    /// Registers that both forms have in the same layout; `None` is no register to read.
    fn read_register(&mut self, index: u32) -> Option<u32> {
        let word = |words: &[u32; 8], first: u32| words.get((index - first) as usize).copied();
        match index {
            ID => Some(self.id),
            VERSION => Some(VERSION_VALUE),
            TPR => Some(self.tpr.into()),
            PPR => Some(self.ppr().into()),
            LDR => Some(self.x2apic_ldr()),
            SVR => Some(self.svr),
            ISR..TMR => word(&self.isr, ISR),
            TMR..IRR => word(&self.tmr, TMR),
            IRR..ESR => word(&self.irr, IRR),
            ESR => Some(self.esr),
            LVT..=LVT_END => self.lvt.get((index - LVT) as usize).copied(),
            TIMER_INITIAL => Some(self.timer.initial()),
            TIMER_CURRENT => {
                self.run_timer();
                Some(self.timer.current())
            }
            TIMER_DIVIDE => Some(self.timer.divide()),
            _ => None,
        }
    }

    /// Registers that both forms write in the same way, reserved bits dropped; `None` is no such register.
    fn write_register(&mut self, index: u32, value: u32) -> Option<()> {
        match index {
            SVR => self.write_svr(value & SVR_WRITABLE),
            ESR => self.esr = std::mem::take(&mut self.errors),
            LVT..=LVT_END => self.write_lvt((index - LVT) as usize, value),
            TIMER_INITIAL => {
                self.run_timer();
                self.timer.set_initial(value);
            }
            TIMER_DIVIDE => {
                self.run_timer();
                self.timer.set_divide(value);
            }
            _ => return None,
        }
        Some(())
    }

    /// WRMSR in x2APIC form, where a reserved bit is #GP (11.12.1.3).
    fn write_x2apic(&mut self, index: u32, value: u64) -> Option<()> {
        if index == ICR {
            return self.write_x2apic_icr(value);
        }
        let value = u32::try_from(value).ok()?;
        let allowed = match index {
            TPR | SELF_IPI => 0xff,
            EOI | ESR => 0,
            SVR => SVR_WRITABLE,
            LVT..=LVT_END => LVT_WRITABLE[(index - LVT) as usize] | LVT_READ_ONLY,
            TIMER_INITIAL => u32::MAX,
            TIMER_DIVIDE => 0b1011,
            _ => return None,
        };
        if value & !allowed != 0 {
            return None;
        }
        match index {
            TPR => self.tpr = value as u8,
            EOI => self.end_of_interrupt(),
            SELF_IPI => self.request(value as u8, false, ERROR_SEND_VECTOR),
            _ => return self.write_register(index, value),
        }
        Some(())
    }

    fn write_x2apic_icr(&mut self, value: u64) -> Option<()> {
        let low = value as u32;
        if low & !(ICR_WRITABLE | ICR_BUSY) != 0 {
            return None;
        }
        self.icr = value & !u64::from(ICR_BUSY);
        self.send_icr();
        Some(())
    }

    /// IA32_APIC_BASE (11.4.3, 11.4.4) and the transitions between the forms (11.12.5).
    fn write_base(&mut self, value: u64) -> Option<()> {
        if value & !(BASE_ADDRESS | BASE_ENABLE | BASE_EXTD | BASE_BSP) != 0 {
            return None;
        }
        let form = Form::of(value)?;
        if matches!((self.form, form), (Form::X2Apic, Form::XApic) | (Form::Disabled, Form::X2Apic)) {
            return None;
        }
        self.base = value & !BASE_BSP | self.base & BASE_BSP;
        self.form = form;
        match form {
            // An APIC that is enabled again begins as after power-up.
            Form::Disabled => self.reset(),
            Form::XApic | Form::X2Apic => self.publish_address(),
        }
        Some(())
    }

    fn write_svr(&mut self, value: u32) {
        self.svr = value;
        if !self.software_enabled() {
            // 11.4.7.2: all entries are masked and stay so.
            self.run_timer();
            self.lvt.iter_mut().for_each(|entry| *entry |= LVT_MASKED);
        }
        self.publish_address();
    }

    fn write_lvt(&mut self, entry: usize, value: u32) {
        let mut value = value & LVT_WRITABLE[entry];
        if !self.software_enabled() {
            value |= LVT_MASKED;
        }
        if entry == LVT_TIMER {
            // What expired under the old entry is the old entry's.
            self.run_timer();
            self.timer.set_mode(value);
        }
        self.lvt[entry] = value;
    }

    fn receive(&mut self) {
        let mail = self.mailbox.collect();
        self.signals.nmi |= mail.signals.nmi;
        if mail.signals.init {
            self.signals.init = true;
            self.signals.sipi = None;
        }
        self.signals.sipi = mail.signals.sipi.or(self.signals.sipi);
        if !self.software_enabled() {
            return;
        }
        let illegal = mail.vectors[0] & 0xffff != 0;
        for word in 0..8 {
            let vectors = mail.vectors[word] & if word == 0 { !0xffff } else { u32::MAX };
            self.irr[word] |= vectors;
            self.tmr[word] = self.tmr[word] & !vectors | mail.level[word] & vectors;
        }
        if illegal {
            self.error(ERROR_RECEIVE_VECTOR);
        }
    }

    fn run_timer(&mut self) {
        if self.timer.fire() {
            self.trigger(LVT_TIMER);
        }
    }

    /// A local source's interrupt, by its LVT entry.
    fn trigger(&mut self, entry: usize) {
        if self.lvt[entry] & LVT_MASKED == 0 {
            self.request(self.lvt[entry] as u8, false, ERROR_RECEIVE_VECTOR);
        }
    }

    /// Requests `vector` of this processor; one below 16 is the error `illegal` instead.
    fn request(&mut self, vector: u8, level: bool, illegal: u32) {
        if vector < 16 {
            self.error(illegal);
        } else if self.software_enabled() {
            set(&mut self.irr, vector, true);
            set(&mut self.tmr, vector, level);
        }
    }

    /// Notes an error and requests the error interrupt (11.5.3).
    fn error(&mut self, bit: u32) {
        self.errors |= bit;
        let entry = self.lvt[LVT_ERROR];
        // Not `trigger`: an error entry with an illegal vector would be its own next error.
        if entry & LVT_MASKED == 0 && entry & 0xff >= 16 {
            self.request(entry as u8, false, 0);
        }
    }

    /// EOI (11.8.5): ends the highest interrupt in service; a level-triggered one is broadcast.
    fn end_of_interrupt(&mut self) {
        let Some(vector) = highest(&self.isr) else { return };
        set(&mut self.isr, vector, false);
        if self.tmr[usize::from(vector / 32)] >> (vector % 32) & 1 != 0 {
            self.ioapic.eoi(vector);
        }
    }

    /// Sends what the ICR says (11.6.1).
    fn send_icr(&mut self) {
        let low = self.icr as u32;
        let Some(delivery) = Delivery::from_bits(low >> 8) else { return };
        if delivery == Delivery::Init && low & (ICR_ASSERT | ICR_LEVEL) == ICR_LEVEL {
            // INIT level de-assert: processors since the Pentium 4 do nothing.
            return;
        }
        let vector = low as u8;
        let carries_vector = matches!(delivery, Delivery::Fixed | Delivery::LowestPriority);
        if carries_vector && vector < 16 {
            return self.error(ERROR_SEND_VECTOR);
        }
        let logical = low & ICR_LOGICAL != 0;
        let to = match (low >> 18 & 3, self.form) {
            (1, _) => Destination::Physical(self.id),
            (2, _) => Destination::All,
            (3, _) => Destination::AllBut(self.id),
            (_, Form::X2Apic) => Destination::wide((self.icr >> 32) as u32, logical),
            _ => Destination::narrow((self.icr >> 56) as u8, logical),
        };
        // IPIs are edge-triggered whatever the trigger bit says.
        self.bus().send(to, Message { delivery, vector, level: false });
        if self.mailbox.any() {
            // It may have been for ourselves, and then the next instruction may already see it.
            self.receive();
        }
    }
}

fn register_at(offset: u64) -> Option<u32> {
    offset.is_multiple_of(16).then_some((offset / 16) as u32)
}

fn highest(words: &[u32; 8]) -> Option<u8> {
    let word = words.iter().rposition(|word| *word != 0)?;
    Some((word * 32) as u8 + (31 - words[word].leading_zeros()) as u8)
}

fn set(words: &mut [u32; 8], vector: u8, on: bool) {
    let (word, bit) = (usize::from(vector / 32), 1 << (vector % 32));
    if on {
        words[word] |= bit;
    } else {
        words[word] &= !bit;
    }
}

#[cfg(test)]
#[path = "lapic_tests.rs"]
mod tests;
