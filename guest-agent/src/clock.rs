//! The wall clock, set by the host.

use std::io;

use kiln_wire::control::TimeStamp;
use rustix::time::ClockId;
use rustix::time::Timespec;

use crate::sys::counter;

const SECOND: u64 = 1_000_000_000;

/// An older reading says nothing: no message is on its way for so long (an hour).
const STALE: u64 = 3600 * SECOND;

/// The clock may be this late when it is set, in nanoseconds (0.2 ms)...
const ACCURATE: u64 = 200_000;

/// ...or it is set again, if this process was kept from running in between; so often at most.
const ATTEMPTS: u32 = 8;

/// Sets the wall clock to what the host's was, `unix_ns`, and what has passed since then by the time stamp counter, which
/// showed `tsc` at that moment.
pub(crate) fn set(unix_ns: u64, tsc: Option<TimeStamp>) -> io::Result<()> {
    for _ in 0..ATTEMPTS {
        let before = counter::time_stamp();
        let passed = age(tsc, before);
        write(unix_ns.saturating_add(passed.unwrap_or(0)))?;
        let late = age(tsc, counter::time_stamp()).zip(passed).map(|(after, before)| after.saturating_sub(before));
        if late.is_none_or(|late| late <= ACCURATE) {
            break;
        }
    }
    Ok(())
}

/// Nanoseconds from the reading `then` to the counter's `now`; `None` for one that makes no sense.
fn age(then: Option<TimeStamp>, now: Option<u64>) -> Option<u64> {
    let TimeStamp { ticks, hz } = then?;
    let ticks = now?.checked_sub(ticks)?;
    let passed = (u128::from(ticks) * u128::from(SECOND)).checked_div(u128::from(hz))?;
    u64::try_from(passed).ok().filter(|passed| *passed <= STALE)
}

fn write(unix_ns: u64) -> io::Result<()> {
    let seconds = i64::try_from(unix_ns / SECOND).map_err(|_| io::ErrorKind::InvalidInput)?;
    let nanoseconds = i64::try_from(unix_ns % SECOND).map_err(|_| io::ErrorKind::InvalidInput)?;
    let now = Timespec { tv_sec: seconds, tv_nsec: nanoseconds };
    Ok(rustix::time::clock_settime(ClockId::Realtime, now)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_passed_since_a_reading() {
        let then = |ticks, hz| Some(TimeStamp { ticks, hz });
        assert_eq!(age(then(1_000, SECOND), Some(5_000)), Some(4_000));
        assert_eq!(age(then(0, 3 * SECOND), Some(3 * SECOND)), Some(SECOND));
        assert_eq!(age(then(0, 1), Some(2)), Some(2 * SECOND));
        assert_eq!(age(then(0, SECOND), Some(STALE)), Some(STALE));
    }

    #[test]
    fn a_reading_that_makes_no_sense_counts_for_nothing() {
        let then = |ticks, hz| Some(TimeStamp { ticks, hz });
        assert_eq!(age(None, Some(1)), None);
        assert_eq!(age(then(1, SECOND), None), None);
        assert_eq!(age(then(2, SECOND), Some(1)), None, "from the future");
        assert_eq!(age(then(0, 0), Some(1)), None, "no frequency");
        assert_eq!(age(then(0, SECOND), Some(STALE + 1)), None, "too old");
        assert_eq!(age(then(0, 1), Some(u64::MAX)), None);
    }
}
