//! A virtio device and its transport as plain data.

use serde::{Deserialize, Serialize};

/// A transport's registers, its queues, and the device behind it. The worker was quiet when it was taken: every chain
/// that was taken from a queue has been given back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TransportState {
    /// The device type (section 5).
    pub device_type: u32,
    /// The configuration space, which the device that is restored must have too: the size of a disk is part of it.
    /// Empty when it changes, and is then part of what the device keeps.
    #[serde(with = "hex_bytes")]
    pub config: Vec<u8>,
    /// The status register without NEEDS_RESET.
    pub status: u32,
    /// The driver broke a queue: the device is stopped until it is reset.
    pub needs_reset: bool,
    /// The device has queues and works.
    pub active: bool,
    /// The features that the driver has accepted.
    pub accepted: u64,
    /// `DeviceFeaturesSel`.
    pub offered_word: u32,
    /// `DriverFeaturesSel`.
    pub accepted_word: u32,
    /// `QueueSel`.
    pub selected: u32,
    /// `InterruptStatus`.
    pub interrupt: u32,
    /// The queues, in order.
    pub queues: Vec<QueueState>,
    /// What the device itself keeps.
    pub device: DeviceState,
}

/// A split virtqueue. What lies in guest memory is not part of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueueState {
    /// Entries.
    pub size: u16,
    /// `QueueReady`.
    pub ready: bool,
    /// Guest-physical address of the descriptor table.
    pub descriptors: u64,
    /// Guest-physical address of the available ring.
    pub driver: u64,
    /// Guest-physical address of the used ring.
    pub device: u64,
    /// The next available entry that the device will look at; zero while it has no queues.
    pub next_avail: u16,
    /// The next used entry that the device will write; zero while it has no queues.
    pub next_used: u16,
}

/// What a device keeps between two requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum DeviceState {
    /// Nothing.
    Stateless,
    /// The socket device. Its connections are not kept: their other ends are in another process, or another time.
    Vsock {
        /// The host's port for the next connection. The guest still knows those before.
        next_port: u32,
        /// Index on the event queue's available ring at which the guest has heard of all resets, if it may not have.
        resets_heard_at: Option<u16>,
    },
    /// The balloon. Which pages are in it is known to the guest alone.
    Balloon {
        /// Pages that the host wants in it.
        target: u32,
        /// Pages that the guest says are in it.
        actual: u32,
        /// `ConfigGeneration`.
        generation: u32,
        /// The guest has not been told of the target.
        untold: bool,
    },
}

/// Why a state does not fit the device that it is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::vmm) struct Misfit(pub(in crate::vmm) &'static str);

/// `Ok` when it holds, or what is wrong.
pub(super) fn require(holds: bool, wrong: &'static str) -> Result<(), Misfit> {
    if holds { Ok(()) } else { Err(Misfit(wrong)) }
}

/// Bytes as a string of hexadecimal digits.
mod hex_bytes {
    use serde::de::Error as _;
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(bytes: &[u8], to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&hex::encode(bytes))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<u8>, D::Error> {
        hex::decode(String::deserialize(from)?).map_err(D::Error::custom)
    }
}
