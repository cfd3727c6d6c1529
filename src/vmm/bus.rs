//! The port and MMIO buses: which device answers an access.
//!
//! A device sees offsets, never where it is mapped. An access that no device covers whole reads as
//! ones and writes nowhere, as on a PC without a device there; that is all the kernel's probes of
//! interrupt controller, timer and clock ports need.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::{Arc, Mutex, PoisonError};

use crate::hv::IoHandler;
use crate::units::GuestAddr;

/// Registers behind an address range.
pub trait BusDevice: Debug + Send {
    /// Reads at `offset` from the device's start; `offset + data.len()` lies in its range.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// Writes at `offset` from the device's start; `offset + data.len()` lies in its range.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// Two devices claim the same address: a mistake in the machine's layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a device at {0:#x} overlaps another or the end of the address space")]
pub struct Overlap(pub u64);

#[derive(Debug)]
struct Slot {
    size: u64,
    // One lock a device: accesses to different devices never wait for each other.
    device: Arc<Mutex<dyn BusDevice>>,
}

/// Devices by address.
#[derive(Debug, Default)]
pub struct Bus {
    slots: BTreeMap<u64, Slot>,
}

impl Bus {
    /// Maps `device` at `start..start + size`. Whoever keeps a copy can look at it while no vCPU runs.
    ///
    /// # Errors
    /// [`Overlap`] when another device is in the range, or it is empty or wraps.
    pub fn insert(&mut self, start: u64, size: u64, device: Arc<Mutex<dyn BusDevice>>) -> Result<(), Overlap> {
        let end = start.checked_add(size).filter(|_| size > 0).ok_or(Overlap(start))?;
        let below = self.slots.range(..end).next_back();
        if below.is_some_and(|(other, slot)| other + slot.size > start) {
            return Err(Overlap(start));
        }
        self.slots.insert(start, Slot { size, device });
        Ok(())
    }

    fn read(&self, addr: u64, data: &mut [u8]) {
        match self.find(addr, data.len()) {
            Some((offset, slot)) => slot.device.lock().unwrap_or_else(PoisonError::into_inner).read(offset, data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, addr: u64, data: &[u8]) {
        if let Some((offset, slot)) = self.find(addr, data.len()) {
            slot.device.lock().unwrap_or_else(PoisonError::into_inner).write(offset, data);
        }
    }

    fn find(&self, addr: u64, len: usize) -> Option<(u64, &Slot)> {
        let (start, slot) = self.slots.range(..=addr).next_back()?;
        let offset = addr - start;
        let end = offset.checked_add(len as u64)?;
        (end <= slot.size).then_some((offset, slot))
    }
}

/// Both buses, as a vCPU reaches them; clones share the devices.
#[derive(Clone, Debug)]
pub struct Buses {
    /// The I/O ports.
    pub ports: Arc<Bus>,
    /// Guest-physical memory that is not RAM.
    pub mmio: Arc<Bus>,
}

impl IoHandler for Buses {
    fn mmio_read(&mut self, addr: GuestAddr, data: &mut [u8]) {
        self.mmio.read(addr.0, data);
    }

    fn mmio_write(&mut self, addr: GuestAddr, data: &[u8]) {
        self.mmio.write(addr.0, data);
    }

    fn pio_in(&mut self, port: u16, data: &mut [u8]) {
        self.ports.read(u64::from(port), data);
    }

    fn pio_out(&mut self, port: u16, data: &[u8]) {
        self.ports.write(u64::from(port), data);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Remembers what was written where.
    #[derive(Debug)]
    struct Memory([u8; 8]);

    impl BusDevice for Memory {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.copy_from_slice(&self.0[offset as usize..offset as usize + data.len()]);
        }
        fn write(&mut self, offset: u64, data: &[u8]) {
            self.0[offset as usize..offset as usize + data.len()].copy_from_slice(data);
        }
    }

    fn memory() -> Arc<Mutex<Memory>> {
        Arc::new(Mutex::new(Memory([0; 8])))
    }

    fn bus() -> Bus {
        let mut bus = Bus::default();
        bus.insert(0x100, 8, memory()).unwrap();
        bus
    }

    fn read(bus: &Bus, addr: u64) -> u16 {
        let mut data = [0; 2];
        bus.read(addr, &mut data);
        u16::from_le_bytes(data)
    }

    #[test]
    fn a_device_sees_offsets_and_no_access_that_leaves_it() {
        let bus = bus();
        bus.write(0x106, &[1, 2]);
        assert_eq!(read(&bus, 0x106), 0x0201);
        bus.write(0x107, &[3, 4]);
        assert_eq!(read(&bus, 0x106), 0x0201);
        for outside in [0, 0xff, 0x107, 0x108, u64::MAX] {
            assert_eq!(read(&bus, outside), 0xffff, "{outside:#x}");
        }
    }

    #[test]
    fn overlapping_devices_are_refused() {
        let mut bus = bus();
        for (start, size) in [(0x100, 8), (0xff, 2), (0x107, 1), (0x102, 2), (0, 0x200), (0x200, 0), (u64::MAX, 2)] {
            assert_eq!(bus.insert(start, size, memory()), Err(Overlap(start)));
        }
        bus.insert(0x108, 8, memory()).unwrap();
        bus.insert(0xf8, 8, memory()).unwrap();
    }
}
