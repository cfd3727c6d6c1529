//! The machine's devices: each at its place on the buses, with its line and its thread.

use std::fmt::Write;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::boot::layout;
use super::bus::Bus;
use super::bus::BusDevice;
use super::bus::Buses;
use super::console::Console;
use super::devices::serial::PORTS;
use super::devices::serial::Serial;
use super::devices::serial::SerialState;
use super::devices::virtio::Doorbell;
use super::devices::virtio::Misfit;
use super::devices::virtio::TransportState;
use super::devices::virtio::VirtioDevice;
use super::devices::virtio::Worker;
use super::devices::virtio::mmio::QUEUE_NOTIFY;
use super::devices::virtio::mmio::Transport;
use super::machine::MachineError;
use super::state::MachineState;
use super::state::RestoreError;
use crate::hv::HvVm;
use crate::mem::GuestRam;
use crate::units::{Gsi, GuestAddr};

/// A device to put into the next free virtio slot.
pub(super) struct VirtioSlot {
    /// Names the device's thread.
    pub(super) name: String,
    pub(super) device: Box<dyn VirtioDevice>,
    pub(super) doorbell: Arc<Doorbell>,
}

/// The devices' side of a machine.
#[derive(Debug)]
pub(super) struct Board {
    pub(super) buses: Buses,
    serial: Arc<Mutex<Serial>>,
    /// Slot by slot.
    transports: Vec<Arc<Mutex<Transport>>>,
    workers: Vec<Worker>,
}

impl Board {
    /// Builds the serial port and `virtio`, slot by slot; held back until released if `held`.
    pub(super) fn build(
        vm: &dyn HvVm,
        ram: &Arc<GuestRam>,
        console: &Console,
        virtio: Vec<VirtioSlot>,
        held: bool,
    ) -> Result<Self, MachineError> {
        let mut ports = Bus::default();
        let serial = Arc::new(Mutex::new(Serial::new(vm.irq_line(layout::SERIAL_GSI)?, console.clone())));
        ports.insert(u64::from(layout::SERIAL_PORT), PORTS, Arc::clone(&serial) as Arc<Mutex<dyn BusDevice>>)?;

        let mut mmio = Bus::default();
        let (mut transports, mut workers) = (Vec::new(), Vec::new());
        for (slot, VirtioSlot { name, device, doorbell }) in (0..).zip(virtio) {
            let (start, gsi) = place(slot).ok_or(MachineError::TooManyDevices)?;
            if let Some(bell) = vm.doorbell(GuestAddr(start + QUEUE_NOTIFY))? {
                doorbell.listen(bell);
            }
            if held {
                doorbell.hold();
            }
            let (transport, worker) = Transport::start(&name, device, Arc::clone(ram), vm.irq_line(gsi)?, doorbell)
                .map_err(|source| MachineError::Host { what: "thread", source })?;
            let transport = Arc::new(Mutex::new(transport));
            mmio.insert(start, layout::VIRTIO_MMIO_SIZE, Arc::clone(&transport) as Arc<Mutex<dyn BusDevice>>)?;
            transports.push(transport);
            workers.push(worker);
        }
        Ok(Self { buses: Buses { ports: Arc::new(ports), mmio: Arc::new(mmio) }, serial, transports, workers })
    }

    /// Tells all devices to finish what they are at and to take up nothing more.
    pub(super) fn hold(&self) {
        self.workers.iter().for_each(Worker::hold);
    }

    /// Waits until held devices do nothing any more.
    pub(super) async fn quiet(&self) {
        for worker in &self.workers {
            worker.quiet().await;
        }
    }

    /// Lets the devices go on.
    pub(super) fn release(&self) {
        self.workers.iter().for_each(Worker::release);
    }

    /// The devices' states, while they are quiet and no vCPU runs: no lock is contended then.
    pub(super) fn save(&self) -> (SerialState, Vec<TransportState>) {
        let virtio = self.transports.iter().map(|transport| lock(transport).save()).collect();
        (lock(&self.serial).save(), virtio)
    }

    /// Puts saved states into devices that are held and have not met a guest. There are as many as slots.
    pub(super) fn restore(&mut self, state: &MachineState) -> Result<(), RestoreError> {
        lock(&self.serial).restore(&state.serial).ok_or(RestoreError::Serial)?;
        for (slot, (transport, saved)) in self.transports.iter().zip(&state.virtio).enumerate() {
            let restored = lock(transport).restore(saved);
            restored.map_err(|Misfit(what)| RestoreError::Device { slot, what })?;
        }
        Ok(())
    }
}

fn lock<T>(device: &Mutex<T>) -> MutexGuard<'_, T> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
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
