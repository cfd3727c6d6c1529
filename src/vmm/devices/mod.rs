//! Devices. They see RAM, an interrupt line and their backend; never an engine or an address.

pub mod serial;
pub mod virtio;
