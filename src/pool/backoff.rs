//! How long a pool rests after VMs failed that nobody had asked for.

use std::time::Duration;

use tokio::time::Instant;

/// The rest after the first failure (100 ms); each one after that doubles it.
const FIRST: Duration = Duration::from_millis(100);
/// The longest rest (10 s).
const LONGEST: Duration = Duration::from_secs(10);
/// After this long without a failure the next one is the first again (60 s).
const FORGET: Duration = Duration::from_secs(60);

/// Counts failures that follow each other. A success in between does not reset it: VMs that start and then crash would
/// be made in a hot loop.
#[derive(Debug, Default)]
pub(super) struct Backoff {
    failures: u32,
    until: Option<Instant>,
}

impl Backoff {
    /// Something failed.
    pub(super) fn failed(&mut self, now: Instant) {
        if self.until.is_some_and(|until| now.saturating_duration_since(until) > FORGET) {
            self.failures = 0;
        }
        let rest = FIRST.saturating_mul(1 << self.failures.min(16)).min(LONGEST);
        self.failures = self.failures.saturating_add(1);
        self.until = Some(now + rest);
    }

    /// The end of the rest, if it is not over.
    pub(super) fn rests_until(&self, now: Instant) -> Option<Instant> {
        self.until.filter(|until| *until > now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rests_double_up_to_a_bound_and_are_forgotten() {
        let mut now = Instant::now();
        let mut backoff = Backoff::default();
        assert_eq!(backoff.rests_until(now), None);
        let mut rest = |now: &mut Instant, pause: Duration| {
            *now += pause;
            backoff.failed(*now);
            let until = backoff.rests_until(*now).expect("it rests");
            let rest = until - *now;
            *now = until;
            assert_eq!(backoff.rests_until(until), None);
            rest.as_millis()
        };
        let rests: Vec<_> = (0..9).map(|_| rest(&mut now, Duration::ZERO)).collect();
        assert_eq!(rests, [100, 200, 400, 800, 1600, 3200, 6400, 10_000, 10_000]);
        for _ in 0..100 {
            assert_eq!(rest(&mut now, FORGET), 10_000);
        }
        assert_eq!(rest(&mut now, FORGET + FIRST), 100);
    }
}
