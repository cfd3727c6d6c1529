//! Guest time: the time stamp counter and the paravirtual clock made from it.
//!
//! The TSC runs at a fixed [`TSC_HZ`] of 1 GHz: one tick is one nanosecond of the host's monotonic
//! clock. There is one TSC in a machine, as on processors whose counters are synchronised and
//! invariant, so every clone of a [`Clock`] sees it move when one sets it.
//!
//! kvmclock (Linux, `Documentation/virt/kvm/x86/msr.rst`) is defined here as the TSC itself: the page
//! says "zero at TSC zero, one nanosecond a tick". It therefore never has to be rewritten, and a
//! saved TSC carries the guest's system time through save and restore.
//!
//! Time can be stopped, for a pause of the machine: everything here then stands still and goes on from the same
//! value, so that neither a pause nor the way through a file is time to the guest.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

pub(crate) use crate::hv::profile::TSC_HZ;

/// `pvclock_vcpu_time_info.flags`: the page is the same on every vCPU, so readers need no monotonicity guard.
const PVCLOCK_TSC_STABLE: u8 = 1 << 0;

/// Time does not stand still.
const RUNNING: u64 = u64::MAX;

#[derive(Debug)]
enum Source {
    /// The host's monotonic clock since this instant.
    Host(Instant),
    /// Set by a test.
    #[cfg(test)]
    Manual(AtomicU64),
}

#[derive(Debug)]
struct Shared {
    source: Source,
    /// Nanoseconds of the source's that passed while time stood still.
    stopped: AtomicU64,
    /// What [`Clock::now_ns`] says while time stands still, or [`RUNNING`].
    frozen: AtomicU64,
    /// TSC minus nanoseconds, wrapping.
    tsc_offset: AtomicU64,
    /// Last version given to a pvclock page or wall clock; even outside an update.
    version: AtomicU32,
}

/// A machine's time; clones share it.
#[derive(Debug, Clone)]
pub(crate) struct Clock {
    shared: Arc<Shared>,
}

impl Clock {
    /// Time that starts now, with the TSC at zero.
    pub(crate) fn new() -> Self {
        Self::with_source(Source::Host(Instant::now()))
    }

    /// Time that stands still until [`advance`](Self::advance).
    #[cfg(test)]
    pub(crate) fn manual() -> Self {
        Self::with_source(Source::Manual(AtomicU64::new(0)))
    }

    fn with_source(source: Source) -> Self {
        let shared = Shared {
            source,
            stopped: AtomicU64::new(0),
            frozen: AtomicU64::new(RUNNING),
            tsc_offset: AtomicU64::new(0),
            version: AtomicU32::new(0),
        };
        Self { shared: Arc::new(shared) }
    }

    /// Moves manual time on by `ns`.
    #[cfg(test)]
    pub(crate) fn advance(&self, ns: u64) {
        match &self.shared.source {
            Source::Host(_) => panic!("the host's clock cannot be moved"),
            Source::Manual(now) => now.fetch_add(ns, Ordering::Relaxed),
        };
    }

    /// Nanoseconds since the machine was made, without those in which time stood still. Never goes back; setting the
    /// TSC does not change it.
    #[inline]
    pub(crate) fn now_ns(&self) -> u64 {
        // Acquire, paired with the Release in `start`: who sees time run also sees how long it stood still.
        match self.shared.frozen.load(Ordering::Acquire) {
            RUNNING => self.source_ns() - self.shared.stopped.load(Ordering::Relaxed),
            frozen => frozen,
        }
    }

    fn source_ns(&self) -> u64 {
        match &self.shared.source {
            // 584 years fit.
            Source::Host(start) => start.elapsed().as_nanos() as u64,
            #[cfg(test)]
            Source::Manual(now) => now.load(Ordering::Relaxed),
        }
    }

    /// Makes time stand still. Idempotent; not to be called by two threads at once.
    pub(crate) fn stop(&self) {
        let now = self.now_ns();
        self.shared.frozen.store(now, Ordering::Release);
    }

    /// Lets time go on. Idempotent; not to be called by two threads at once.
    pub(crate) fn start(&self) {
        let frozen = self.shared.frozen.load(Ordering::Acquire);
        if frozen != RUNNING {
            self.shared.stopped.store(self.source_ns() - frozen, Ordering::Relaxed);
            self.shared.frozen.store(RUNNING, Ordering::Release);
        }
    }

    /// The host instant at which [`now_ns`](Self::now_ns) reaches `ns`, if time runs until then; `None` when it is
    /// past what the host can say (and so need not be waited for).
    pub(crate) fn instant_at(&self, ns: u64) -> Option<Instant> {
        let ns = ns.saturating_add(self.shared.stopped.load(Ordering::Relaxed));
        match &self.shared.source {
            Source::Host(start) => start.checked_add(Duration::from_nanos(ns)),
            #[cfg(test)]
            Source::Manual(now) => {
                Instant::now().checked_add(Duration::from_nanos(ns.saturating_sub(now.load(Ordering::Relaxed))))
            }
        }
    }

    /// The time stamp counter now.
    #[inline]
    pub(crate) fn tsc(&self) -> u64 {
        self.now_ns().wrapping_add(self.shared.tsc_offset.load(Ordering::Relaxed))
    }

    /// Sets the time stamp counter, of the whole machine; kvmclock moves with it.
    pub(crate) fn set_tsc(&self, value: u64) {
        self.shared.tsc_offset.store(value.wrapping_sub(self.now_ns()), Ordering::Relaxed);
    }

    /// The [`now_ns`](Self::now_ns) at which the TSC reaches `tsc`: now when it already has, and
    /// `u64::MAX` when that is further off than nanoseconds can count.
    pub(crate) fn ns_at_tsc(&self, tsc: u64) -> u64 {
        let now = self.now_ns();
        let left = tsc.saturating_sub(now.wrapping_add(self.shared.tsc_offset.load(Ordering::Relaxed)));
        now.saturating_add(left)
    }

    /// What MSR_KVM_SYSTEM_TIME_NEW makes the processor write: `struct pvclock_vcpu_time_info`.
    ///
    /// The guest computes `system_time + (((tsc - tsc_timestamp) << shift) * mul >> 32)`.
    pub(crate) fn pvclock_page(&self) -> [u8; 32] {
        let mut page = [0; 32];
        page[0..4].copy_from_slice(&self.next_version().to_le_bytes());
        // tsc_timestamp (8..16) and system_time (16..24) are zero: see the module's text.
        // A multiplier of 1.0 does not fit 0.32 fixed point; one half of twice the ticks does.
        page[24..28].copy_from_slice(&0x8000_0000u32.to_le_bytes());
        page[28] = 1;
        page[29] = PVCLOCK_TSC_STABLE;
        page
    }

    /// What MSR_KVM_WALL_CLOCK_NEW makes the processor write: `struct pvclock_wall_clock`, the time
    /// of day at system time zero.
    pub(crate) fn wall_clock(&self) -> [u8; 12] {
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        // A TSC ahead of 1970 (a guest may set anything) has no time of day at zero: the epoch then.
        let at_zero = since_epoch.saturating_sub(Duration::from_nanos(self.tsc()));
        let mut page = [0; 12];
        page[0..4].copy_from_slice(&self.next_version().to_le_bytes());
        // The structure has 32 bits of seconds: until 2106.
        page[4..8].copy_from_slice(&(at_zero.as_secs() as u32).to_le_bytes());
        page[8..12].copy_from_slice(&at_zero.subsec_nanos().to_le_bytes());
        page
    }

    /// A version no page had before, even (odd means "being written") and not zero ("never written").
    fn next_version(&self) -> u32 {
        let version = self.shared.version.fetch_add(2, Ordering::Relaxed).wrapping_add(2);
        if version == 0 { self.next_version() } else { version }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn u32_at(page: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(page[at..at + 4].try_into().unwrap())
    }

    fn u64_at(page: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(page[at..at + 8].try_into().unwrap())
    }

    /// The guest's side of the protocol, as `pvclock_clocksource_read` computes it.
    fn system_time(page: &[u8; 32], tsc: u64) -> u64 {
        let delta = tsc - u64_at(page, 8);
        let shifted = if (page[28] as i8) < 0 { delta >> -(page[28] as i8) } else { delta << page[28] };
        u64_at(page, 16) + ((u128::from(shifted) * u128::from(u32_at(page, 24))) >> 32) as u64
    }

    #[test]
    fn sdm_19_17_the_tsc_is_one_for_all_clones_and_counts_nanoseconds() {
        let clock = Clock::manual();
        let other = clock.clone();
        clock.advance(5);
        assert_eq!((clock.tsc(), other.now_ns()), (5, 5));
        other.set_tsc(1_000);
        clock.advance(7);
        assert_eq!((clock.tsc(), clock.now_ns()), (1_007, 12));
        clock.set_tsc(0);
        assert_eq!(other.tsc(), 0);
    }

    #[test]
    fn time_that_stood_still_goes_on_without_a_jump() {
        let clock = Clock::manual();
        clock.set_tsc(1_000);
        clock.advance(5);
        clock.stop();
        clock.advance(100);
        clock.stop();
        assert_eq!((clock.now_ns(), clock.tsc()), (5, 1_005));
        clock.start();
        clock.start();
        clock.advance(2);
        assert_eq!((clock.now_ns(), clock.tsc(), clock.ns_at_tsc(1_010)), (7, 1_007, 10));
        clock.stop();
        clock.advance(50);
        clock.set_tsc(0);
        clock.start();
        assert_eq!((clock.now_ns(), clock.tsc()), (7, 0));
        assert!(clock.instant_at(17).unwrap() <= Instant::now() + Duration::from_nanos(10));
    }

    #[test]
    fn sdm_19_17_the_hosts_clock_never_goes_back() {
        let clock = Clock::new();
        let first = clock.tsc();
        assert!(clock.tsc() >= first);
        assert!(clock.instant_at(clock.now_ns() + 1_000_000_000).unwrap() > Instant::now());
        assert!(clock.instant_at(0).unwrap() <= Instant::now());
    }

    #[test]
    fn a_tsc_value_maps_to_the_time_it_is_reached() {
        let clock = Clock::manual();
        clock.set_tsc(500);
        clock.advance(100);
        assert_eq!(clock.ns_at_tsc(700), 200);
        assert_eq!(clock.ns_at_tsc(3), 100, "already past");
        assert_eq!(clock.ns_at_tsc(u64::MAX), u64::MAX - 500);
    }

    #[test]
    fn kvmclock_is_the_tsc_in_nanoseconds() {
        let clock = Clock::manual();
        clock.set_tsc(123_456_789_012_345);
        let page = clock.pvclock_page();
        assert_eq!(system_time(&page, clock.tsc()), 123_456_789_012_345);
        clock.advance(1);
        assert_eq!(system_time(&page, clock.tsc()), 123_456_789_012_346);
        assert_eq!(page[29], PVCLOCK_TSC_STABLE);
    }

    #[test]
    fn versions_are_even_and_never_repeat() {
        let clock = Clock::manual();
        let versions =
            [u32_at(&clock.pvclock_page(), 0), u32_at(&clock.wall_clock(), 0), u32_at(&clock.pvclock_page(), 0)];
        assert_eq!(versions, [2, 4, 6]);
        clock.shared.version.store(u32::MAX - 1, Ordering::Relaxed);
        assert_eq!(u32_at(&clock.pvclock_page(), 0), 2, "zero is skipped");
    }

    #[test]
    fn wall_clock_plus_system_time_is_the_time_of_day() {
        let clock = Clock::manual();
        clock.set_tsc(90 * TSC_HZ + 5);
        let before = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let page = clock.wall_clock();
        let after = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let told = Duration::new(u64::from(u32_at(&page, 4)), u32_at(&page, 8)) + Duration::from_nanos(clock.tsc());
        assert!(before <= told && told <= after, "{before:?} {told:?} {after:?}");
    }

    #[test]
    fn a_tsc_beyond_the_time_of_day_does_not_panic() {
        let clock = Clock::manual();
        clock.set_tsc(u64::MAX);
        assert_eq!(clock.wall_clock()[4..12], [0; 8]);
    }
}
