//! The interrupt controllers that belong to a machine and not to one of its vCPUs (Intel 82093AA datasheet, section 3).

use serde::{Deserialize, Serialize};

/// Lines of the IOAPIC, and redirection entries.
pub const IOAPIC_PINS: usize = 24;

/// A redirection entry's mask bit.
const MASKED: u64 = 1 << 16;

/// The interrupt controllers that all vCPUs share. A vCPU's local APIC is part of its own state.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IrqChipState {
    /// The IOAPIC.
    pub ioapic: IoApicState,
}

/// The IOAPIC.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IoApicState {
    /// IOREGSEL.
    pub select: u32,
    /// The identification register.
    pub id: u32,
    /// The redirection entries, with delivery status zero.
    pub redirections: [u64; IOAPIC_PINS],
    /// Level-triggered lines that ask for service, one bit a pin.
    pub requests: u32,
    /// Lines that are active, one bit a pin.
    pub active: u32,
}

impl Default for IoApicState {
    /// The state after reset: all lines masked.
    fn default() -> Self {
        Self { select: 0, id: 0, redirections: [MASKED; IOAPIC_PINS], requests: 0, active: 0 }
    }
}
