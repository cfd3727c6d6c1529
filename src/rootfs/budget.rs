//! What is left of an image's limits on archives, for all layers that are converted at the same time.

use std::sync::OnceLock;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;

use crate::rootfs::error::LayerErrorKind;
use crate::rootfs::limits::Limits;

/// Counts down from [`Limits`]. Shared by threads.
#[derive(Debug)]
pub(super) struct Budget {
    limits: Limits,
    left: Counts,
    /// By each layer, with what it was refused.
    taken: Vec<Counts>,
    at_fault: OnceLock<usize>,
}

#[derive(Debug, Default)]
struct Counts {
    entries: AtomicU64,
    archive_bytes: AtomicU64,
    content_bytes: AtomicU64,
}

impl Budget {
    /// For as many layers.
    pub(super) fn new(limits: Limits, layers: usize) -> Self {
        let left = Counts {
            entries: AtomicU64::new(limits.entries),
            archive_bytes: AtomicU64::new(limits.archive_bytes),
            content_bytes: AtomicU64::new(limits.content_bytes),
        };
        let taken = std::iter::repeat_with(Counts::default).take(layers).collect();
        Self { limits, left, taken, at_fault: OnceLock::new() }
    }

    /// Out of which layer number `layer` takes.
    pub(super) const fn share(&self, layer: usize) -> Share<'_> {
        Share { budget: self, layer }
    }

    /// The layer that had taken the most of a limit when it was first reached, the upper one of two: whichever thread came
    /// to find nothing left.
    pub(super) fn at_fault(&self) -> Option<usize> {
        self.at_fault.get().copied()
    }
}

/// A layer's access to the budget.
#[derive(Clone, Copy, Debug)]
pub(super) struct Share<'a> {
    budget: &'a Budget,
    layer: usize,
}

impl Share<'_> {
    pub(super) fn entries(self, count: u64) -> Result<(), LayerErrorKind> {
        let limit = LayerErrorKind::Limit { what: "entries", limit: self.budget.limits.entries };
        self.take(count, |counts| &counts.entries).ok_or(limit)
    }

    pub(super) fn archive_bytes(self, count: u64) -> Result<(), LayerErrorKind> {
        let limit = self.budget.limits.archive_bytes;
        let limit = LayerErrorKind::Limit { what: "bytes in the layers' archives", limit };
        self.take(count, |counts| &counts.archive_bytes).ok_or(limit)
    }

    pub(super) fn content_bytes(self, count: u64) -> Result<(), LayerErrorKind> {
        let limit = self.budget.limits.content_bytes;
        let limit = LayerErrorKind::Limit { what: "bytes of files' content", limit };
        self.take(count, |counts| &counts.content_bytes).ok_or(limit)
    }

    fn take(self, count: u64, of: fn(&Counts) -> &AtomicU64) -> Option<()> {
        let Budget { left, taken, at_fault, .. } = self.budget;
        // A layer's own count comes first, so that whoever finds nothing left sees where it went.
        update(of(taken.get(self.layer)?), |taken| Some(taken.saturating_add(count)));
        update(of(left), |left| left.checked_sub(count)).or_else(|| {
            at_fault.get_or_init(|| {
                let most = taken.iter().enumerate().max_by_key(|(_, counts)| of(counts).load(Ordering::SeqCst));
                most.map_or(self.layer, |(layer, _)| layer)
            });
            None
        })
    }
}

fn update(count: &AtomicU64, change: impl FnMut(u64) -> Option<u64>) -> Option<()> {
    count.fetch_update(Ordering::SeqCst, Ordering::SeqCst, change).ok().map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_layer_that_took_the_most_is_at_fault_whoever_finds_nothing_left() {
        for last in [0, 1] {
            let budget = Budget::new(Limits { archive_bytes: 100, ..Limits::default() }, 2);
            budget.share(1).archive_bytes(99).unwrap();
            assert_eq!(budget.at_fault(), None);
            assert!(budget.share(last).archive_bytes(2).is_err());
            assert_eq!(budget.at_fault(), Some(1), "{last} was refused");
        }
    }

    #[test]
    fn of_two_that_took_as_much_it_is_the_upper_one() {
        let budget = Budget::new(Limits { entries: 3, ..Limits::default() }, 2);
        for layer in [1, 1, 0] {
            budget.share(layer).entries(1).unwrap();
        }
        assert!(budget.share(0).entries(1).is_err());
        assert_eq!(budget.at_fault(), Some(1));
    }

    #[test]
    fn no_size_overflows_a_count() {
        let budget = Budget::new(Limits { content_bytes: u64::MAX, ..Limits::default() }, 1);
        budget.share(0).content_bytes(u64::MAX - 1).unwrap();
        assert!(budget.share(0).content_bytes(u64::MAX).is_err());
        budget.share(0).content_bytes(1).unwrap();
    }
}
