//! Checked newtypes: no bare integer crosses a seam between modules.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Size of a guest page, in bytes.
pub const PAGE_SIZE: u64 = 4096;

/// A guest-physical address (GPA).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct GuestAddr(pub u64);

impl fmt::Debug for GuestAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Display for GuestAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// A size in bytes.
///
/// ```
/// use kiln::units::Bytes;
/// assert_eq!(Bytes::mib(2).0, 2 * 1024 * 1024);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct Bytes(pub u64);

impl Bytes {
    /// `n` KiB; saturates at the largest representable size.
    #[must_use]
    pub const fn kib(n: u64) -> Self {
        Self(n.saturating_mul(1 << 10))
    }

    /// `n` MiB; saturates at the largest representable size.
    #[must_use]
    pub const fn mib(n: u64) -> Self {
        Self(n.saturating_mul(1 << 20))
    }

    /// `n` GiB; saturates at the largest representable size.
    #[must_use]
    pub const fn gib(n: u64) -> Self {
        Self(n.saturating_mul(1 << 30))
    }
}

/// A vCPU index, from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct VcpuId(pub u8);

/// A global system interrupt: an input of the interrupt controller.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Gsi(pub u32);

/// A moment, by the host's wall clock and by a guest's time stamp counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestTime {
    /// The host's clock.
    pub at: std::time::SystemTime,
    /// What the guest's counter showed.
    pub ticks: u64,
    /// The counter's ticks in a second.
    pub hz: u64,
}
