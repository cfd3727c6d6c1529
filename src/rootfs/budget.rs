//! What is left of an image's limits on archives, for all layers that are converted at the same time.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;

use crate::rootfs::error::LayerErrorKind;
use crate::rootfs::limits::Limits;

/// Counts down from [`Limits`]. Shared by threads.
#[derive(Debug)]
pub(super) struct Budget {
    limits: Limits,
    entries: AtomicU64,
    archive_bytes: AtomicU64,
    content_bytes: AtomicU64,
}

impl Budget {
    pub(super) const fn new(limits: Limits) -> Self {
        Self {
            limits,
            entries: AtomicU64::new(limits.entries),
            archive_bytes: AtomicU64::new(limits.archive_bytes),
            content_bytes: AtomicU64::new(limits.content_bytes),
        }
    }

    pub(super) fn entries(&self, count: u64) -> Result<(), LayerErrorKind> {
        let limit = LayerErrorKind::Limit { what: "entries", limit: self.limits.entries };
        take(&self.entries, count).ok_or(limit)
    }

    pub(super) fn archive_bytes(&self, count: u64) -> Result<(), LayerErrorKind> {
        let limit = self.limits.archive_bytes;
        let limit = LayerErrorKind::Limit { what: "bytes in the layers' archives", limit };
        take(&self.archive_bytes, count).ok_or(limit)
    }

    pub(super) fn content_bytes(&self, count: u64) -> Result<(), LayerErrorKind> {
        let limit = LayerErrorKind::Limit { what: "bytes of files' content", limit: self.limits.content_bytes };
        take(&self.content_bytes, count).ok_or(limit)
    }
}

fn take(left: &AtomicU64, count: u64) -> Option<()> {
    // Nothing else is read by what the count says, so its order with other memory does not matter.
    left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(count)).ok().map(drop)
}
