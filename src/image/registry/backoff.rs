//! How often, and after what pause, something that failed is tried again.
//!
//! A registry that asks for a certain pause (`Retry-After`) is not heard: `oci-client` shows no headers. The pauses grow
//! instead until the registry has had time to recover.

use std::time::Duration;

/// Before the first repetition; doubles with each.
const FIRST_PAUSE: Duration = Duration::from_millis(250);

/// The longest single pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(8);

/// All pauses of one request together.
const ALL_PAUSES: Duration = Duration::from_secs(60);

/// What is left of the will to try one request again.
#[derive(Debug)]
pub(super) struct Backoff {
    retries: u32,
    left: u32,
    next: Duration,
    spent: Duration,
}

impl Backoff {
    pub(super) const fn new(retries: u32) -> Self {
        Self { retries, left: retries, next: FIRST_PAUSE, spent: Duration::ZERO }
    }

    /// The pause before the next attempt; `None` if there is to be none.
    pub(super) fn pause(&mut self) -> Option<Duration> {
        self.left = self.left.checked_sub(1)?;
        let pause = jittered(self.next);
        self.spent += pause;
        if self.spent > ALL_PAUSES {
            return None;
        }
        self.next = (self.next * 2).min(LONGEST_PAUSE);
        Some(pause)
    }

    /// The last attempt came some way: what fails next is a new failure. The sum of all pauses stays bounded.
    pub(super) const fn progressed(&mut self) {
        self.left = self.retries;
        self.next = FIRST_PAUSE;
    }

    /// The longest that all pauses may take.
    pub(super) const fn longest() -> Duration {
        ALL_PAUSES
    }
}

/// Between half of `pause` and all of it, so that those whom one outage stopped do not come back at one instant.
fn jittered(pause: Duration) -> Duration {
    let half = pause / 2;
    // Without randomness there is no jitter, and that is all.
    let random = getrandom::u32().unwrap_or(u32::MAX);
    half + half.mul_f64(f64::from(random) / f64::from(u32::MAX))
}

#[cfg(test)]
mod tests {
    use tokio::time::Instant;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn pauses_double_up_to_a_bound_and_end() {
        let mut backoff = Backoff::new(8);
        let mut expected = FIRST_PAUSE;
        for _ in 0..8 {
            let before = Instant::now();
            tokio::time::sleep(backoff.pause().unwrap()).await;
            let waited = before.elapsed();
            // The clock counts in milliseconds.
            assert!(waited + Duration::from_millis(1) >= expected / 2, "{waited:?} is short for {expected:?}");
            assert!(waited <= expected + Duration::from_millis(1), "{waited:?} is long for {expected:?}");
            expected = (expected * 2).min(LONGEST_PAUSE);
        }
        assert_eq!(backoff.pause(), None);
    }

    #[test]
    fn pauses_together_are_bounded_whatever_the_progress() {
        let mut backoff = Backoff::new(u32::MAX);
        let mut total = Duration::ZERO;
        while let Some(pause) = backoff.pause() {
            total += pause;
            backoff.progressed();
        }
        assert!(total <= Backoff::longest());
    }

    #[test]
    fn none_at_all() {
        assert_eq!(Backoff::new(0).pause(), None);
    }
}
