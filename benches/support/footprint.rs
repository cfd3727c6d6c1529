//! What of this process's memory is its own, by `/proc/self/smaps`.
//!
//! Counted are anonymous pages (`Anonymous`): the heap, thread stacks, and of a guest's memory the pages that it has
//! written since it was mapped. `Private_Dirty` would also count pages of a frozen guest's memory that one clone alone has
//! looked at, which belong to the file and are there once for all.

use std::fs;

/// Bytes of this process.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Footprint {
    /// Pages that guests have written.
    pub(crate) guest: u64,
    /// Everything else.
    pub(crate) own: u64,
}

impl Footprint {
    /// As it is now.
    pub(crate) fn now() -> Self {
        let smaps = fs::read_to_string("/proc/self/smaps").expect("Linux tells");
        let mut now = Self { guest: 0, own: 0 };
        let mut of_guest = false;
        for line in smaps.lines() {
            let mut words = line.split_ascii_whitespace();
            match (words.next(), words.next()) {
                (Some("Anonymous:"), Some(kib)) => {
                    let bytes = kib.parse::<u64>().expect("a number") << 10;
                    if of_guest {
                        now.guest += bytes;
                    } else {
                        now.own += bytes;
                    }
                }
                // The others begin with their name and a colon; a mapping with its addresses.
                (Some(first), _) if !first.ends_with(':') => {
                    // Address, permissions, offset, device, inode; then the file, if there is one.
                    let file = words.nth(3).unwrap_or_default();
                    of_guest = file.ends_with("/memory") || file.starts_with("/memfd:kiln-memory");
                }
                _ => {}
            }
        }
        now
    }

    /// What each of `count` has that came since `before`, in KiB: of the guest, and of ours.
    pub(crate) fn each_since(&self, before: &Self, count: usize) -> (u64, u64) {
        let each = |now: u64, before: u64| (now.saturating_sub(before) >> 10) / count as u64;
        (each(self.guest, before.guest), each(self.own, before.own))
    }
}
