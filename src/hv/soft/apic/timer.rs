//! The local APIC's timer (SDM 3A, 11.5.4).
//!
//! The input clock is 1 GHz, the TSC's frequency and what CPUID leaf 0x15 calls the crystal; the
//! divide configuration divides it. A count of one at a divisor of one is thus one nanosecond.

use super::super::clock::Clock;
use super::LapicState;

/// Bits 17 and 18 of the timer's LVT entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    OneShot,
    Periodic,
    TscDeadline,
    /// The reserved encoding: such a timer stands still.
    Reserved,
}

impl Mode {
    fn from_lvt(lvt: u32) -> Self {
        match lvt >> 17 & 3 {
            0 => Self::OneShot,
            1 => Self::Periodic,
            2 => Self::TscDeadline,
            _ => Self::Reserved,
        }
    }
}

/// The timer. It tells when it expires; masking and delivery are the LVT's matter.
#[derive(Debug)]
pub(super) struct Timer {
    clock: Clock,
    mode: Mode,
    initial: u32,
    divide: u32,
    /// When the count reaches zero, in the clock's nanoseconds; `None` when it is not counting.
    expiry_ns: Option<u64>,
    tsc_deadline: u64,
}

impl Timer {
    pub(super) fn new(clock: Clock) -> Self {
        Self { clock, mode: Mode::OneShot, initial: 0, divide: 0, expiry_ns: None, tsc_deadline: 0 }
    }

    /// Stops it and forgets everything, as a reset does.
    pub(super) fn reset(&mut self) {
        *self = Self::new(self.clock.clone());
    }

    /// Follows a write to the timer's LVT entry. Changing between TSC-deadline and counting disarms.
    pub(super) fn set_mode(&mut self, lvt: u32) {
        let mode = Mode::from_lvt(lvt);
        let counts = |mode| matches!(mode, Mode::OneShot | Mode::Periodic);
        if mode != self.mode && !(counts(mode) && counts(self.mode)) {
            self.expiry_ns = None;
            self.tsc_deadline = 0;
        }
        self.mode = mode;
    }

    pub(super) fn initial(&self) -> u32 {
        self.initial
    }

    /// Starts counting down from `count`; zero stops. Ignored in TSC-deadline mode.
    pub(super) fn set_initial(&mut self, count: u32) {
        if matches!(self.mode, Mode::OneShot | Mode::Periodic) {
            self.initial = count;
            self.expiry_ns = (count != 0).then(|| self.clock.now_ns().saturating_add(self.ns(count)));
        }
    }

    pub(super) fn divide(&self) -> u32 {
        self.divide
    }

    /// Changes the divisor; a running count goes on from where it is at the new rate.
    pub(super) fn set_divide(&mut self, divide: u32) {
        let count = self.current();
        self.divide = divide & 0b1011;
        if self.expiry_ns.is_some() && count != 0 {
            self.expiry_ns = Some(self.clock.now_ns().saturating_add(self.ns(count)));
        }
    }

    /// The current count.
    pub(super) fn current(&self) -> u32 {
        let Some(expiry) = self.expiry_ns else { return 0 };
        let now = self.clock.now_ns();
        let left = match (expiry.checked_sub(now), self.mode) {
            (Some(left), _) => left,
            // Expired but not fired yet: already on its way through a later period.
            (None, Mode::Periodic) => self.period() - (now - expiry) % self.period(),
            (None, _) => 0,
        };
        left.div_ceil(self.divisor()) as u32
    }

    /// IA32_TSC_DEADLINE: zero when disarmed and in the other modes.
    pub(super) fn tsc_deadline(&self) -> u64 {
        self.tsc_deadline
    }

    /// Arms the timer for a TSC value; zero disarms. Ignored in the other modes.
    pub(super) fn set_tsc_deadline(&mut self, tsc: u64) {
        if self.mode == Mode::TscDeadline {
            self.tsc_deadline = tsc;
        }
    }

    /// When it expires next, in the clock's nanoseconds.
    pub(super) fn next_ns(&self) -> Option<u64> {
        match self.mode {
            // Not kept as nanoseconds: the guest may move its TSC meanwhile.
            Mode::TscDeadline => (self.tsc_deadline != 0).then(|| self.clock.ns_at_tsc(self.tsc_deadline)),
            _ => self.expiry_ns,
        }
    }

    /// Whether it has expired since the last call; goes on to the next expiry if there is one.
    ///
    /// Periods missed meanwhile are one expiry, as one bit in the IRR would make them anyway.
    pub(super) fn fire(&mut self) -> bool {
        let (Some(expiry), now) = (self.next_ns(), self.clock.now_ns()) else { return false };
        if expiry > now {
            return false;
        }
        self.tsc_deadline = 0;
        self.expiry_ns = match self.mode {
            Mode::Periodic => Some(now.saturating_add(self.period() - (now - expiry) % self.period())),
            _ => None,
        };
        true
    }

    pub(super) fn save(&self, into: &mut LapicState) {
        into.timer_initial = self.initial;
        into.timer_divide = self.divide;
        into.timer_left_ns = self.next_ns().map(|ns| ns.saturating_sub(self.clock.now_ns()));
        into.tsc_deadline = self.tsc_deadline;
    }

    /// Continues a saved timer whose LVT entry was `lvt`. The TSC may be restored before or after.
    pub(super) fn restore(&mut self, from: &LapicState, lvt: u32) {
        self.mode = Mode::from_lvt(lvt);
        self.initial = from.timer_initial;
        self.divide = from.timer_divide & 0b1011;
        let counting = match self.mode {
            Mode::OneShot => true,
            // A period of zero could not be stepped through.
            Mode::Periodic => self.initial != 0,
            Mode::TscDeadline | Mode::Reserved => false,
        };
        let left = from.timer_left_ns.filter(|_| counting);
        self.expiry_ns = left.map(|left| self.clock.now_ns().saturating_add(left));
        self.tsc_deadline = if self.mode == Mode::TscDeadline { from.tsc_deadline } else { 0 };
    }

    /// Input ticks a count: bits 3, 1 and 0 are a power of two, beginning at 2 and wrapping to 1.
    fn divisor(&self) -> u64 {
        let bits = self.divide & 3 | self.divide >> 1 & 4;
        1 << ((bits + 1) & 7)
    }

    fn ns(&self, count: u32) -> u64 {
        u64::from(count) * self.divisor()
    }

    /// At least one nanosecond: only a nonzero initial count starts the timer.
    fn period(&self) -> u64 {
        self.ns(self.initial).max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIVIDE_BY_1: u32 = 0b1011;
    const DIVIDE_BY_16: u32 = 0b0011;
    const PERIODIC: u32 = 1 << 17;
    const TSC_DEADLINE: u32 = 2 << 17;

    fn timer(lvt: u32, divide: u32) -> (Timer, Clock) {
        let clock = Clock::manual();
        let mut timer = Timer::new(clock.clone());
        timer.set_mode(lvt);
        timer.set_divide(divide);
        (timer, clock)
    }

    #[test]
    fn sdm_11_5_4_divide_configuration() {
        for (bits, divisor) in [(0, 2), (1, 4), (2, 8), (3, 16), (8, 32), (9, 64), (10, 128), (11, 1)] {
            assert_eq!(timer(0, bits).0.divisor(), divisor, "{bits:#b}");
        }
    }

    #[test]
    fn sdm_11_5_4_one_shot_counts_down_and_fires_once() {
        let (mut timer, clock) = timer(0, DIVIDE_BY_16);
        timer.set_initial(10);
        assert_eq!((timer.current(), timer.next_ns()), (10, Some(160)));
        clock.advance(33);
        assert_eq!(timer.current(), 8);
        assert!(!timer.fire());
        clock.advance(127);
        assert_eq!(timer.current(), 0);
        assert!(timer.fire());
        assert!(!timer.fire());
        assert_eq!((timer.current(), timer.next_ns(), timer.initial()), (0, None, 10));
    }

    #[test]
    fn sdm_11_5_4_periodic_reloads_and_joins_missed_periods() {
        let (mut timer, clock) = timer(PERIODIC, DIVIDE_BY_1);
        timer.set_initial(100);
        clock.advance(100);
        assert!(timer.fire());
        assert_eq!((timer.next_ns(), timer.current()), (Some(200), 100));
        clock.advance(250);
        assert_eq!(timer.current(), 50, "read before it was noticed");
        assert!(timer.fire());
        assert!(!timer.fire());
        assert_eq!((timer.next_ns(), timer.current()), (Some(400), 50));
        timer.set_initial(0);
        assert_eq!((timer.next_ns(), timer.current()), (None, 0));
    }

    #[test]
    fn sdm_11_5_4_changing_the_divisor_keeps_the_count() {
        let (mut timer, clock) = timer(0, DIVIDE_BY_1);
        timer.set_initial(100);
        clock.advance(40);
        timer.set_divide(DIVIDE_BY_16);
        assert_eq!((timer.current(), timer.next_ns()), (60, Some(40 + 60 * 16)));
        clock.advance(60 * 16);
        assert!(timer.fire());
        timer.set_divide(DIVIDE_BY_1);
        assert!(!timer.fire(), "what has expired stays so");
        assert_eq!(timer.next_ns(), None);
    }

    #[test]
    fn sdm_11_5_4_1_tsc_deadline_fires_and_clears_itself() {
        let (mut timer, clock) = timer(TSC_DEADLINE, 0);
        clock.set_tsc(1_000);
        timer.set_tsc_deadline(1_500);
        assert_eq!((timer.tsc_deadline(), timer.next_ns()), (1_500, Some(500)));
        clock.advance(499);
        assert!(!timer.fire());
        clock.advance(1);
        assert!(timer.fire());
        assert_eq!((timer.tsc_deadline(), timer.next_ns()), (0, None));
        timer.set_tsc_deadline(3);
        assert!(timer.fire(), "a deadline in the past fires at once");
        timer.set_tsc_deadline(9_999);
        timer.set_tsc_deadline(0);
        assert_eq!(timer.next_ns(), None);
    }

    #[test]
    fn sdm_11_5_4_1_the_modes_ignore_each_others_registers() {
        let (mut timer, _) = timer(TSC_DEADLINE, 0);
        timer.set_initial(5);
        assert_eq!((timer.initial(), timer.current(), timer.next_ns()), (0, 0, None));
        timer.set_tsc_deadline(77);
        timer.set_mode(0);
        assert_eq!((timer.tsc_deadline(), timer.next_ns()), (0, None));
        timer.set_tsc_deadline(77);
        assert_eq!(timer.tsc_deadline(), 0);
        timer.set_initial(5);
        timer.set_mode(PERIODIC);
        assert_eq!(timer.next_ns(), Some(10), "counting modes hand the count over");
        timer.set_mode(TSC_DEADLINE);
        assert_eq!(timer.next_ns(), None);
        timer.set_mode(3 << 17);
        timer.set_initial(5);
        assert_eq!(timer.next_ns(), None);
    }

    #[test]
    fn the_longest_count_does_not_overflow() {
        let (mut timer, clock) = timer(PERIODIC, 0b1010);
        clock.advance(u64::MAX - 10);
        timer.set_initial(u32::MAX);
        assert_eq!(timer.next_ns(), Some(u64::MAX));
    }
}
