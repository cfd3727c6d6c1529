//! The machine's devices: each at its place on the buses, with its line and its thread.

use std::fmt::Write;
use std::sync::Arc;

use super::boot::layout;
use super::bus::Bus;
use super::bus::Buses;
use super::console::Console;
use super::devices::serial::PORTS;
use super::devices::serial::Serial;
use super::devices::virtio::Doorbell;
use super::devices::virtio::VirtioDevice;
use super::devices::virtio::Worker;
use super::devices::virtio::mmio::Transport;
use super::machine::MachineError;
use crate::hv::HvVm;
use crate::mem::GuestRam;
use crate::units::Gsi;

/// A device to put into the next free virtio slot.
pub(super) struct VirtioSlot {
    /// Names the device's thread.
    pub(super) name: String,
    pub(super) device: Box<dyn VirtioDevice>,
    pub(super) doorbell: Arc<Doorbell>,
}

/// The devices' side of a machine.
pub(super) struct Board {
    pub(super) buses: Buses,
    pub(super) workers: Vec<Worker>,
}

impl Board {
    /// Builds the serial port and `virtio`, slot by slot.
    pub(super) fn build(
        vm: &dyn HvVm,
        ram: &Arc<GuestRam>,
        console: &Console,
        virtio: Vec<VirtioSlot>,
    ) -> Result<Self, MachineError> {
        let mut ports = Bus::default();
        let serial = Serial::new(vm.irq_line(layout::SERIAL_GSI)?, console.clone());
        ports.insert(u64::from(layout::SERIAL_PORT), PORTS, Box::new(serial))?;

        let mut mmio = Bus::default();
        let mut workers = Vec::with_capacity(virtio.len());
        for (slot, VirtioSlot { name, device, doorbell }) in (0..).zip(virtio) {
            let (start, gsi) = place(slot).ok_or(MachineError::TooManyDevices)?;
            let (transport, worker) = Transport::start(&name, device, Arc::clone(ram), vm.irq_line(gsi)?, doorbell)
                .map_err(|source| MachineError::Host { what: "thread", source })?;
            mmio.insert(start, layout::VIRTIO_MMIO_SIZE, Box::new(transport))?;
            workers.push(worker);
        }
        Ok(Self { buses: Buses { ports: Arc::new(ports), mmio: Arc::new(mmio) }, workers })
    }
}

/// Announces `slots` virtio devices (Linux `virtio_mmio.device=<size>@<address>:<interrupt>`).
pub(super) fn announce(slots: u32, cmdline: &mut String) {
    for (start, gsi) in (0..slots).map_while(place) {
        // Writing to a string cannot fail.
        let _ = write!(cmdline, " virtio_mmio.device=4K@{start:#x}:{}", gsi.0);
    }
}

fn place(slot: u32) -> Option<(u64, Gsi)> {
    let start = layout::VIRTIO_MMIO.0 + u64::from(slot) * layout::VIRTIO_MMIO_SIZE;
    (slot < layout::VIRTIO_SLOTS).then_some((start, Gsi(layout::VIRTIO_FIRST_GSI + slot)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_announced_as_the_kernel_parses_them() {
        let mut line = "quiet".to_owned();
        announce(2, &mut line);
        assert_eq!(line, "quiet virtio_mmio.device=4K@0xd0000000:5 virtio_mmio.device=4K@0xd0001000:6");
    }

    #[test]
    fn there_are_as_many_slots_as_pins() {
        assert_eq!(place(18).map(|(_, gsi)| gsi), Some(Gsi(23)));
        assert_eq!(place(19), None);
    }
}
