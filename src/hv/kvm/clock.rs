//! A machine's time: one time stamp counter for all vCPUs, which can stand still.
//!
//! The guest's counter is the host's, scaled if the processor can, plus an offset. Setting time and letting it go on
//! are both choosing an offset, the same for all vCPUs, so that their counters agree to the tick. kvmclock counts the
//! nanoseconds of the same counter: with a machine that is restored it is set from it, and over a pause it is kept.
//!
//! There are hosts whose KVM takes an offset and does not heed it, as those do that run guests without the processor's
//! help. Guests there see the host's counter, always; the engine's profile says so. A state that is saved then says what the
//! counter was when time was stopped, and the guest finds it further on when it goes on.

use std::sync::{Mutex, MutexGuard, PoisonError};

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use super::failed;
use super::tsc;
use crate::hv::HvError;
use crate::hv::TimeStamp;

const IA32_TSC: u32 = 0x10;

/// Time while it stands still.
#[derive(Clone, Copy, Debug)]
struct Still {
    tsc: u64,
    /// The host's counter when it began.
    since: u64,
    kvmclock_ns: u64,
}

#[derive(Debug)]
struct State {
    /// The host's counter at an instant when...
    host: u64,
    /// ...the guest's was this.
    guest: u64,
    /// What makes it so, once a vCPU has been there to ask.
    offset: Option<u64>,
    still: Option<Still>,
}

/// A machine's time.
#[derive(Debug)]
pub(super) struct Clock {
    rate: Rate,
    state: Mutex<State>,
}

/// How a guest's counter follows from the host's.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rate {
    pub(super) guest_khz: u32,
    pub(super) host_khz: u32,
    /// Whether the host heeds an offset.
    pub(super) steered: bool,
}

impl Clock {
    /// Time that begins now, with the counter at zero.
    pub(super) fn new(rate: Rate) -> Self {
        let state = State { host: tsc::host(), guest: 0, offset: None, still: None };
        Self { rate, state: Mutex::new(state) }
    }

    /// The guest's counter now.
    pub(super) fn now(&self) -> TimeStamp {
        let state = self.lock();
        let ticks = state.still.map_or_else(|| self.at(&state, tsc::host()), |still| still.tsc);
        TimeStamp { ticks, hz: u64::from(self.rate.guest_khz) * 1_000 }
    }

    /// The guest's counter, if time stands still.
    pub(super) fn still(&self) -> Option<u64> {
        self.lock().still.map(|still| still.tsc)
    }

    /// Stops at this instant; `kvmclock_ns` is what kvmclock shows. False when it stood still already.
    pub(super) fn stop(&self, kvmclock_ns: u64) -> bool {
        let mut state = self.lock();
        if state.still.is_some() {
            return false;
        }
        let since = tsc::host();
        state.still = Some(Still { tsc: self.at(&state, since), since, kvmclock_ns });
        true
    }

    /// Goes on at this instant. What kvmclock is to show; `None` when it did not stand still.
    pub(super) fn start(&self) -> Option<u64> {
        let mut state = self.lock();
        let still = state.still.take()?;
        let host = tsc::host();
        // What an offset was measured with stays in it: no counter goes back by asking anew.
        let passed = self.scale(host.saturating_sub(still.since));
        let offset = state.offset.map(|offset| offset.wrapping_sub(passed));
        (state.host, state.guest, state.offset) = (host, still.tsc, offset);
        Some(still.kvmclock_ns)
    }

    /// Sets the counter. What kvmclock is to show at once; `None` while time stands still.
    pub(super) fn set(&self, tsc: u64) -> Option<u64> {
        let kvmclock_ns = self.ns(tsc);
        let mut state = self.lock();
        let host = tsc::host();
        (state.host, state.guest, state.offset) = (host, tsc, None);
        let Some(still) = &mut state.still else { return Some(kvmclock_ns) };
        *still = Still { tsc, since: host, kvmclock_ns };
        None
    }

    /// The offset that makes a vCPU show this time.
    pub(super) fn offset(&self, vcpu: &VcpuFd) -> Result<u64, HvError> {
        if !self.rate.steered {
            return Ok(0);
        }
        let mut state = self.lock();
        if let Some(offset) = state.offset {
            return Ok(offset);
        }
        let offset = state.guest.wrapping_sub(self.scaled_host(vcpu, state.host)?);
        state.offset = Some(offset);
        Ok(offset)
    }

    /// Whether the guest's counter runs at another rate than the host's.
    pub(super) fn scales(&self) -> bool {
        self.rate.guest_khz != self.rate.host_khz
    }

    /// Nanoseconds that so many ticks take.
    pub(super) fn ns(&self, ticks: u64) -> u64 {
        scale(ticks, 1_000_000, self.rate.guest_khz)
    }

    fn at(&self, state: &State, host: u64) -> u64 {
        if !self.rate.steered {
            return host;
        }
        state.guest.wrapping_add(self.scale(host.saturating_sub(state.host)))
    }

    fn scale(&self, host_ticks: u64) -> u64 {
        scale(host_ticks, self.rate.guest_khz, self.rate.host_khz)
    }

    /// The host's counter at `host` as the processor scales it for guests. The factor is rounded in a way that only the
    /// kernel knows, and the counter large: so it is asked what a vCPU shows, and the difference is small.
    fn scaled_host(&self, vcpu: &VcpuFd, host: u64) -> Result<u64, HvError> {
        if !self.scales() {
            return Ok(host);
        }
        let now = tsc::host();
        let scaled = read(vcpu)?.wrapping_sub(tsc::offset(vcpu)?);
        Ok(scaled.wrapping_sub(self.scale(now.saturating_sub(host))))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The vCPU's counter now.
pub(super) fn read(vcpu: &VcpuFd) -> Result<u64, HvError> {
    let entry = kvm_msr_entry { index: IA32_TSC, ..Default::default() };
    let mut msrs = Msrs::from_entries(&[entry]).map_err(|_| HvError::State("too many MSRs"))?;
    vcpu.get_msrs(&mut msrs).map_err(failed("KVM_GET_MSRS"))?;
    Ok(msrs.as_slice()[0].data)
}

fn scale(value: u64, numerator: u32, denominator: u32) -> u64 {
    (u128::from(value) * u128::from(numerator) / u128::from(denominator.max(1))) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn steered(guest_khz: u32, host_khz: u32) -> Clock {
        Clock::new(Rate { guest_khz, host_khz, steered: true })
    }

    #[test]
    fn a_counter_that_cannot_be_steered_is_the_hosts_and_stands_still_only_to_be_saved() {
        let clock = Clock::new(Rate { guest_khz: 1_000_000, host_khz: 1_000_000, steered: false });
        let before = tsc::host();
        assert_eq!(clock.set(5), Some(5));
        assert!(clock.now().ticks >= before);
        clock.stop(0);
        clock.set(77);
        assert_eq!(clock.now().ticks, 77);
        clock.start();
        assert!(clock.now().ticks >= before);
    }

    #[test]
    fn time_stands_still_and_goes_on_without_a_jump() {
        let clock = steered(1_000_000, 1_000_000);
        clock.set(5_000);
        assert!(clock.stop(77) && !clock.stop(99));
        let still = clock.now().ticks;
        assert!(still >= 5_000);
        assert_eq!((clock.now().ticks, clock.still()), (still, Some(still)));
        assert_eq!((clock.start(), clock.start()), (Some(77), None));
        assert!(clock.now().ticks >= still);
        assert_eq!(clock.still(), None);
    }

    #[test]
    fn time_that_is_set_while_it_stands_still_stays_and_takes_kvmclock_along() {
        let clock = steered(2_000_000, 3_000_000);
        assert_eq!(clock.set(2_000_000), Some(1_000_000));
        clock.stop(0);
        assert_eq!(clock.set(8_000), None);
        assert_eq!((clock.now(), clock.start()), (TimeStamp { ticks: 8_000, hz: 2_000_000_000 }, Some(4_000)));
    }

    #[test]
    fn the_largest_counter_does_not_overflow() {
        assert_eq!(scale(u64::MAX, u32::MAX, u32::MAX), u64::MAX);
        let clock = steered(1_000, 4_000_000);
        clock.set(u64::MAX);
        let _ = clock.now();
    }
}
