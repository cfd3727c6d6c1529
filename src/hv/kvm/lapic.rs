//! The local APIC: the kernel's register page (KVM_GET_LAPIC) and the neutral form (Intel SDM volume 3A, chapter 11).
//!
//! The page is that of the xAPIC form in both forms, but for the id, which the x2APIC form has whole.

use kvm_bindings::kvm_lapic_state;

use crate::hv::HvError;
use crate::hv::state::x86_64::Lapic;

const ID: usize = 0x20;
const VERSION: usize = 0x30;
const TPR: usize = 0x80;
const LDR: usize = 0xd0;
const DFR: usize = 0xe0;
const SVR: usize = 0xf0;
const ISR: usize = 0x100;
const TMR: usize = 0x180;
const IRR: usize = 0x200;
const ESR: usize = 0x280;
const ICR: usize = 0x300;
const ICR_HIGH: usize = 0x310;
const LVT: usize = 0x320;
const TIMER_INITIAL: usize = 0x380;
const TIMER_CURRENT: usize = 0x390;
const TIMER_DIVIDE: usize = 0x3e0;

const BASE_BSP: u64 = 1 << 8;
const BASE_EXTD: u64 = 1 << 10;
const BASE_ENABLE: u64 = 1 << 11;
const BASE_ADDRESS: u64 = (1 << crate::hv::profile::PHYS_BITS) - (1 << 12);

const SVR_WRITABLE: u32 = 0x3ff;
const LVT_WRITABLE: [u32; 6] = [0x7_00ff, 0x1_07ff, 0x1_07ff, 0x1_a7ff, 0x1_a7ff, 0x1_00ff];
const ICR_WRITABLE: u64 = 0xffff_ffff_000c_cfff;
/// An integrated APIC with six LVT entries.
const VERSION_VALUE: u32 = 0x0005_0014;

/// What the timer's LVT entry makes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TimerMode {
    OneShot,
    Periodic,
    TscDeadline,
    Reserved,
}

impl TimerMode {
    fn of(lvt: u32) -> Self {
        match lvt >> 17 & 3 {
            0 => Self::OneShot,
            1 => Self::Periodic,
            2 => Self::TscDeadline,
            _ => Self::Reserved,
        }
    }

    /// Whether the count registers are what it runs by.
    pub(super) fn counts(self) -> bool {
        matches!(self, Self::OneShot | Self::Periodic)
    }
}

/// A register page.
#[derive(Clone, Debug)]
pub(super) struct Page(pub(super) kvm_lapic_state);

impl Page {
    fn get(&self, offset: usize) -> u32 {
        let bytes: [u8; 4] = std::array::from_fn(|n| self.0.regs[offset + n] as u8);
        u32::from_le_bytes(bytes)
    }

    fn set(&mut self, offset: usize, value: u32) {
        for (n, byte) in value.to_le_bytes().into_iter().enumerate() {
            self.0.regs[offset + n] = byte as _;
        }
    }

    fn words(&self, first: usize) -> [u32; 8] {
        std::array::from_fn(|n| self.get(first + n * 16))
    }

    fn set_words(&mut self, first: usize, words: [u32; 8]) {
        for (n, word) in words.into_iter().enumerate() {
            self.set(first + n * 16, word);
        }
    }

    /// Whether an interrupt with this vector waits or is in service.
    pub(super) fn has(&self, vector: u8) -> bool {
        let word = usize::from(vector / 32);
        [IRR, ISR].iter().any(|first| self.get(first + word * 16) >> (vector % 32) & 1 != 0)
    }

    pub(super) fn timer_mode(&self) -> TimerMode {
        TimerMode::of(self.get(LVT))
    }

    /// Nanoseconds until a counting timer expires; `None` when it does not count.
    pub(super) fn count_left_ns(&self) -> Option<u64> {
        let left = self.get(TIMER_CURRENT);
        (self.timer_mode().counts() && left != 0).then(|| u64::from(left) * self.divisor())
    }

    /// Whether a timer that counts once has been started, now or ever.
    pub(super) fn was_started(&self) -> bool {
        self.timer_mode() == TimerMode::OneShot && self.get(TIMER_INITIAL) != 0
    }

    /// Lets a counting timer expire in so many nanoseconds, once the kernel is given the page.
    pub(super) fn set_count_left_ns(&mut self, left: u64) {
        // A count of zero would be the whole period again.
        let count = left.div_ceil(self.divisor()).clamp(1, u64::from(self.get(TIMER_INITIAL).max(1)));
        self.set(TIMER_CURRENT, count as u32);
    }

    /// Input ticks a count, which are nanoseconds: bits 3, 1 and 0 are a power of two, beginning at 2 and wrapping to 1.
    fn divisor(&self) -> u64 {
        let divide = self.get(TIMER_DIVIDE);
        1 << (((divide & 3 | divide >> 1 & 4) + 1) & 7)
    }

    /// The neutral form, but for the timer's time, which is not in the page.
    pub(super) fn to_neutral(&self, id: u32, apic_base: u64) -> Lapic {
        let x2apic = apic_base & BASE_EXTD != 0;
        Lapic {
            apic_base,
            id,
            tpr: self.get(TPR) & 0xff,
            // The x2APIC form's follows from the id.
            ldr: if x2apic { 0 } else { self.get(LDR) },
            dfr: if x2apic { u32::MAX } else { self.get(DFR) },
            svr: self.get(SVR) & SVR_WRITABLE,
            esr: self.get(ESR),
            isr: self.words(ISR),
            tmr: self.words(TMR),
            irr: self.words(IRR),
            icr: (u64::from(self.get(ICR)) | u64::from(self.get(ICR_HIGH)) << 32) & ICR_WRITABLE,
            lvt: std::array::from_fn(|n| self.get(LVT + n * 16) & LVT_WRITABLE[n]),
            timer_initial: self.get(TIMER_INITIAL),
            timer_divide: self.get(TIMER_DIVIDE) & 0b1011,
            timer_left_ns: None,
            tsc_deadline: 0,
        }
    }

    /// The page of a saved state, in which CR8 is `cr8`. Bits that the hardware does not have are dropped.
    ///
    /// # Errors
    /// What cannot be, when the state is another vCPU's or IA32_APIC_BASE holds what no WRMSR can put there.
    pub(super) fn from_neutral(from: &Lapic, id: u32, cr8: u64) -> Result<Self, HvError> {
        if from.id != id {
            return Err(HvError::State("local APIC id of another vCPU"));
        }
        let known = from.apic_base & !(BASE_ADDRESS | BASE_ENABLE | BASE_EXTD | BASE_BSP) == 0;
        if !known || from.apic_base & (BASE_ENABLE | BASE_EXTD) == BASE_EXTD {
            return Err(HvError::State("IA32_APIC_BASE"));
        }
        let x2apic = from.apic_base & BASE_EXTD != 0;
        let mut page = Self(kvm_lapic_state { regs: [0; 1024] });
        page.set(ID, if x2apic { id } else { id << 24 });
        page.set(VERSION, VERSION_VALUE);
        // CR8 is the high half of the same register; where they differ, it counts.
        let tpr = from.tpr & 0xff;
        page.set(TPR, if u64::from(tpr >> 4) == cr8 { tpr } else { (cr8 as u32 & 0xf) << 4 });
        page.set(LDR, from.ldr & 0xff00_0000);
        page.set(DFR, from.dfr | 0x0fff_ffff);
        page.set(SVR, from.svr & SVR_WRITABLE);
        page.set(ESR, from.esr & 0xff);
        for (first, mut words) in [(ISR, from.isr), (TMR, from.tmr), (IRR, from.irr)] {
            // Vectors 0 to 15 are exceptions: an APIC never holds them.
            words[0] &= !0xffff;
            page.set_words(first, words);
        }
        let icr = from.icr & ICR_WRITABLE;
        page.set(ICR, icr as u32);
        page.set(ICR_HIGH, (icr >> 32) as u32);
        for (n, (entry, writable)) in from.lvt.into_iter().zip(LVT_WRITABLE).enumerate() {
            page.set(LVT + n * 16, entry & writable);
        }
        page.set(TIMER_DIVIDE, from.timer_divide & 0b1011);
        if page.timer_mode().counts() {
            // The kernel starts a timer that has an initial count: one that has expired must not have one.
            if let Some(left) = from.timer_left_ns {
                page.set(TIMER_INITIAL, from.timer_initial);
                page.set_count_left_ns(left);
            }
        } else {
            page.set(TIMER_INITIAL, from.timer_initial);
        }
        Ok(page)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_and_the_neutral_form_say_the_same() {
        let lapic = Lapic {
            tpr: 0x35,
            ldr: 0x0200_0000,
            svr: 0x1ff,
            isr: [0, 0, 0, 1, 0, 0, 0, 0],
            tmr: [0, 4, 0, 0, 0, 0, 0, 0],
            irr: [0, 4, 0, 0, 0, 0, 0, 1 << 31],
            icr: 0x0300_0000_0000_40fd,
            lvt: [0x2_0040, 0x1_0000, 0x1_0000, 0x1_0700, 0x400, 0x1_00fe],
            timer_initial: 1_000,
            timer_divide: 0b0011,
            timer_left_ns: Some(160),
            ..Lapic::default()
        };
        let page = Page::from_neutral(&lapic, 0, 3).unwrap();
        let back = page.to_neutral(0, lapic.apic_base);
        assert_eq!(Lapic { timer_left_ns: page.count_left_ns(), ..back }, lapic);
    }

    #[test]
    fn impossible_pages_are_refused_and_reserved_bits_dropped() {
        let base = |apic_base| Page::from_neutral(&Lapic { apic_base, ..Lapic::default() }, 0, 0).is_ok();
        assert!(base(0xfee0_0900) && base(0xfee0_0d00) && base(0xfee0_0100));
        assert!(!base(0xfee0_0500) && !base(0xfee0_0901) && !base(1 << 40));
        assert!(Page::from_neutral(&Lapic::default(), 1, 0).is_err());
        let hostile = Lapic {
            tpr: u32::MAX,
            svr: u32::MAX,
            esr: u32::MAX,
            icr: u64::MAX,
            isr: [u32::MAX; 8],
            lvt: [u32::MAX; 6],
            timer_left_ns: Some(u64::MAX),
            timer_initial: u32::MAX,
            timer_divide: u32::MAX,
            ..Lapic::default()
        };
        let back = Page::from_neutral(&hostile, 0, 15).unwrap().to_neutral(0, hostile.apic_base);
        assert_eq!((back.tpr, back.svr, back.lvt, back.isr[0]), (0xff, 0x3ff, LVT_WRITABLE, 0xffff_0000));
    }

    #[test]
    fn an_expired_one_shot_timer_is_not_started_again() {
        let expired = Lapic { timer_initial: 77, lvt: [0x40, 0, 0, 0, 0, 0], ..Lapic::default() };
        assert_eq!(Page::from_neutral(&expired, 0, 0).unwrap().get(TIMER_INITIAL), 0);
        let due = Lapic { timer_left_ns: Some(0), ..expired };
        let page = Page::from_neutral(&due, 0, 0).unwrap();
        assert_eq!((page.get(TIMER_INITIAL), page.count_left_ns()), (77, Some(2)));
    }
}
