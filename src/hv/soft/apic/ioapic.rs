//! The IOAPIC: 24 interrupt lines to messages (Intel 82093AA datasheet, section 3).
//!
//! Version 0x11: without an EOI register of its own; the local APICs' EOI broadcast is what ends a
//! level interrupt. A line has one device: sharing would need the lines' levels to be merged first.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Bus, Delivery, Destination, Message};
use crate::hv::IrqLine;
use crate::hv::state::irqchip::{IOAPIC_PINS as PINS, IoApicState};
use crate::units::Gsi;

/// Where the IOAPIC's page lies in guest-physical memory.
pub(crate) const IOAPIC_BASE: u64 = 0xfec0_0000;

const IOREGSEL: u64 = 0x00;
const IOWIN: u64 = 0x10;

const INDEX_ID: u32 = 0x00;
const INDEX_VERSION: u32 = 0x01;
const INDEX_ARBITRATION: u32 = 0x02;
const INDEX_REDIRECTIONS: u32 = 0x10;

/// Version 0x11, and the number of the last entry.
const VERSION: u32 = 0x11 | (PINS as u32 - 1) << 16;

const LOGICAL: u64 = 1 << 11;
const REMOTE_IRR: u64 = 1 << 14;
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;
/// What software may write: vector, delivery mode, destination mode, polarity, trigger, mask, destination.
const WRITABLE: u64 = 0xff00_0000_0001_afff & !(1 << 12);

/// The IOAPIC.
#[derive(Debug)]
pub(crate) struct IoApic {
    bus: Bus,
    state: Mutex<IoApicState>,
}

impl IoApic {
    /// An IOAPIC after reset that sends to `bus`.
    pub(crate) fn new(bus: Bus) -> Self {
        Self { bus, state: Mutex::default() }
    }

    /// The bus it sends to.
    pub(crate) fn bus(&self) -> &Bus {
        &self.bus
    }

    /// Reads the register at `offset` of the page.
    pub(crate) fn mmio_read(&self, offset: u64) -> u32 {
        let state = self.lock();
        match offset {
            IOREGSEL => state.select,
            IOWIN => state.read(state.select),
            _ => 0,
        }
    }

    /// Writes the register at `offset` of the page.
    pub(crate) fn mmio_write(&self, offset: u64, value: u32) {
        let mut state = self.lock();
        match offset {
            IOREGSEL => state.select = value & 0xff,
            IOWIN => state.write(value, &self.bus),
            _ => {}
        }
    }

    /// The line into pin `gsi`, or `None` when there is no such pin.
    pub(crate) fn line(self: &Arc<Self>, gsi: Gsi) -> Option<Arc<dyn IrqLine>> {
        let pin = usize::try_from(gsi.0).ok().filter(|pin| *pin < PINS)?;
        Some(Arc::new(Line { ioapic: Arc::clone(self), pin }))
    }

    /// A local APIC has ended the level-triggered interrupt `vector`.
    pub(super) fn eoi(&self, vector: u8) {
        self.lock().eoi(vector, &self.bus);
    }

    /// The state to keep.
    pub(crate) fn save(&self) -> IoApicState {
        self.lock().clone()
    }

    /// Continues from a saved state. Bits that the hardware does not have are dropped.
    pub(crate) fn restore(&self, from: &IoApicState) {
        let pins = (1 << PINS) - 1;
        *self.lock() = IoApicState {
            select: from.select & 0xff,
            id: from.id & 0x0f00_0000,
            redirections: from.redirections.map(|entry| entry & (WRITABLE | REMOTE_IRR)),
            requests: from.requests & pins,
            active: from.active & pins,
        };
    }

    fn lock(&self) -> MutexGuard<'_, IoApicState> {
        // Every change is complete before anything that could panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl IoApicState {
    fn read(&self, index: u32) -> u32 {
        match index {
            INDEX_ID | INDEX_ARBITRATION => self.id,
            INDEX_VERSION => VERSION,
            _ => match redirection_half(index) {
                Some((pin, false)) => self.redirections[pin] as u32,
                Some((pin, true)) => (self.redirections[pin] >> 32) as u32,
                None => 0,
            },
        }
    }

    fn write(&mut self, value: u32, bus: &Bus) {
        match self.select {
            INDEX_ID => self.id = value & 0x0f00_0000,
            index => {
                if let Some((pin, high)) = redirection_half(index) {
                    self.write_redirection(pin, high, value, bus);
                }
            }
        }
    }

    fn write_redirection(&mut self, pin: usize, high: bool, value: u32, bus: &Bus) {
        let (shift, keep) = if high { (32, 0xffff_ffffu64) } else { (0, !0xffff_ffff) };
        let old = self.redirections[pin];
        let written = (old & keep | u64::from(value) << shift) & WRITABLE;
        // Software without an EOI register ends a stuck level interrupt by making the entry edge-triggered
        // for a moment: hardware forgets the remote IRR then.
        let remote_irr = if written & LEVEL != 0 { old & REMOTE_IRR } else { 0 };
        self.redirections[pin] = written | remote_irr;
        self.serve_level(pin, bus);
    }

    /// Sets a line's level. A rising edge of an edge-triggered line sends; a masked one is lost, as
    /// the datasheet says of edges.
    fn set_level(&mut self, pin: usize, high: bool, bus: &Bus) {
        let bit = 1 << pin;
        let rises = high && self.active & bit == 0;
        self.active = if high { self.active | bit } else { self.active & !bit };
        let entry = self.redirections[pin];
        if entry & LEVEL == 0 {
            if rises && entry & MASKED == 0 {
                send(entry, bus);
            }
            return;
        }
        self.requests = if high { self.requests | bit } else { self.requests & !bit };
        self.serve_level(pin, bus);
    }

    /// A pulse. On a level-triggered line the request stays until it has been sent, so that a pulse
    /// during the service of the one before is not lost.
    fn pulse(&mut self, pin: usize, bus: &Bus) {
        if self.redirections[pin] & LEVEL == 0 {
            self.active &= !(1 << pin);
            self.set_level(pin, true, bus);
            self.active &= !(1 << pin);
        } else {
            self.requests |= 1 << pin;
            self.serve_level(pin, bus);
        }
    }

    /// Sends a level-triggered pin's message if it asks, may, and is not being served.
    fn serve_level(&mut self, pin: usize, bus: &Bus) {
        let (bit, entry) = (1 << pin, self.redirections[pin]);
        if entry & LEVEL == 0 || entry & (MASKED | REMOTE_IRR) != 0 {
            return;
        }
        // The line may have become active while the entry was edge-triggered.
        if (self.requests | self.active) & bit == 0 {
            return;
        }
        self.redirections[pin] |= REMOTE_IRR;
        self.requests = self.requests & !bit | self.active & bit;
        send(entry, bus);
    }

    fn eoi(&mut self, vector: u8, bus: &Bus) {
        for pin in 0..PINS {
            let entry = self.redirections[pin];
            if entry & (LEVEL | REMOTE_IRR) == LEVEL | REMOTE_IRR && entry as u8 == vector {
                self.redirections[pin] &= !REMOTE_IRR;
                self.serve_level(pin, bus);
            }
        }
    }
}

/// Which entry a register index names, and whether its high half.
fn redirection_half(index: u32) -> Option<(usize, bool)> {
    let at = index.checked_sub(INDEX_REDIRECTIONS)?;
    let pin = (at / 2) as usize;
    (pin < PINS).then_some((pin, at % 2 == 1))
}

fn send(entry: u64, bus: &Bus) {
    let Some(delivery) = Delivery::from_bits((entry >> 8) as u32) else { return };
    if delivery == Delivery::StartUp {
        // Reserved here, unlike in an ICR.
        return;
    }
    let level = entry & LEVEL != 0 && matches!(delivery, Delivery::Fixed | Delivery::LowestPriority);
    let to = Destination::narrow((entry >> 56) as u8, entry & LOGICAL != 0);
    bus.send(to, Message { delivery, vector: entry as u8, level });
}

#[derive(Debug)]
struct Line {
    ioapic: Arc<IoApic>,
    pin: usize,
}

impl IrqLine for Line {
    fn raise(&self) {
        self.ioapic.lock().pulse(self.pin, &self.ioapic.bus);
    }

    fn set_level(&self, high: bool) {
        self.ioapic.lock().set_level(self.pin, high, &self.ioapic.bus);
    }
}

#[cfg(test)]
mod tests {
    use super::super::LogicalAddress;
    use super::*;
    use crate::hv::soft::mailbox::Mail;

    fn ioapic(vcpus: u8) -> Arc<IoApic> {
        Arc::new(IoApic::new(Bus::new(vcpus)))
    }

    fn write(ioapic: &IoApic, index: u32, value: u32) {
        ioapic.mmio_write(IOREGSEL, index);
        ioapic.mmio_write(IOWIN, value);
    }

    fn read(ioapic: &IoApic, index: u32) -> u32 {
        ioapic.mmio_write(IOREGSEL, index);
        ioapic.mmio_read(IOWIN)
    }

    fn program(ioapic: &IoApic, pin: u32, low: u32, destination: u8) {
        write(ioapic, 0x11 + 2 * pin, u32::from(destination) << 24);
        write(ioapic, 0x10 + 2 * pin, low);
    }

    /// The vectors collected from a vCPU's mailbox, with whether they are level-triggered.
    fn delivered(ioapic: &IoApic, id: u32) -> Vec<(u8, bool)> {
        let mail = ioapic.bus().mailbox(id).unwrap().collect();
        let bit = |words: [u32; 8], vector: u8| words[usize::from(vector / 32)] >> (vector % 32) & 1 != 0;
        (0..=255).filter(|vector| bit(mail.vectors, *vector)).map(|vector| (vector, bit(mail.level, vector))).collect()
    }

    #[test]
    fn datasheet_3_2_registers_after_reset() {
        let ioapic = ioapic(1);
        assert_eq!(read(&ioapic, 1), 0x0017_0011);
        assert_eq!(read(&ioapic, 0), 0);
        for pin in 0..24 {
            assert_eq!((read(&ioapic, 0x10 + 2 * pin), read(&ioapic, 0x11 + 2 * pin)), (0x1_0000, 0));
        }
        assert_eq!(read(&ioapic, 0x40), 0);
        assert_eq!(ioapic.mmio_read(0x20), 0);
        write(&ioapic, 0, 0xffff_ffff);
        assert_eq!((read(&ioapic, 0), read(&ioapic, 2)), (0x0f00_0000, 0x0f00_0000));
        write(&ioapic, 1, 0);
        assert_eq!(read(&ioapic, 1), 0x0017_0011);
    }

    #[test]
    fn datasheet_3_2_4_read_only_bits_of_an_entry_stay() {
        let ioapic = ioapic(1);
        write(&ioapic, 0x10, 0xffff_ffff);
        write(&ioapic, 0x11, 0xffff_ffff);
        assert_eq!((read(&ioapic, 0x10), read(&ioapic, 0x11)), (0x1_afff, 0xff00_0000));
    }

    #[test]
    fn datasheet_3_2_4_edges_are_sent_and_masked_ones_lost() {
        let ioapic = ioapic(2);
        let line = ioapic.line(Gsi(5)).unwrap();
        line.raise();
        program(&ioapic, 5, 0x31, 1);
        assert_eq!(delivered(&ioapic, 1), [(0u8, false); 0]);
        line.raise();
        assert_eq!(delivered(&ioapic, 1), [(0x31, false)]);
        line.set_level(true);
        line.set_level(true);
        assert_eq!(delivered(&ioapic, 1), [(0x31, false)]);
        line.set_level(true);
        assert_eq!(delivered(&ioapic, 1), [(0u8, false); 0], "only a rising edge counts");
        line.set_level(false);
        line.set_level(true);
        assert_eq!(delivered(&ioapic, 1), [(0x31, false)]);
        assert_eq!(delivered(&ioapic, 0), [(0u8, false); 0]);
    }

    #[test]
    fn datasheet_3_2_4_a_level_is_sent_again_after_eoi_while_it_lasts() {
        let ioapic = ioapic(1);
        let line = ioapic.line(Gsi(9)).unwrap();
        program(&ioapic, 9, 0x41 | LEVEL as u32, 0);
        line.set_level(true);
        assert_eq!(delivered(&ioapic, 0), [(0x41, true)]);
        assert_eq!(read(&ioapic, 0x22), 0x41 | (LEVEL | REMOTE_IRR) as u32);
        line.set_level(true);
        assert_eq!(delivered(&ioapic, 0), [(0u8, false); 0], "in service");
        ioapic.eoi(0x42);
        assert_eq!(delivered(&ioapic, 0), [(0u8, false); 0], "another vector's EOI");
        ioapic.eoi(0x41);
        assert_eq!(delivered(&ioapic, 0), [(0x41, true)]);
        line.set_level(false);
        ioapic.eoi(0x41);
        assert_eq!(delivered(&ioapic, 0), [(0u8, false); 0]);
        assert_eq!(read(&ioapic, 0x22), 0x41 | LEVEL as u32);
    }

    #[test]
    fn datasheet_3_2_4_a_masked_level_waits() {
        let ioapic = ioapic(1);
        let line = ioapic.line(Gsi(9)).unwrap();
        program(&ioapic, 9, 0x41 | (LEVEL | MASKED) as u32, 0);
        line.set_level(true);
        assert_eq!(delivered(&ioapic, 0), [(0u8, false); 0]);
        program(&ioapic, 9, 0x41 | LEVEL as u32, 0);
        assert_eq!(delivered(&ioapic, 0), [(0x41, true)]);
    }

    #[test]
    fn a_pulse_on_a_level_line_is_kept_through_service() {
        let ioapic = ioapic(1);
        let line = ioapic.line(Gsi(9)).unwrap();
        program(&ioapic, 9, 0x41 | LEVEL as u32, 0);
        line.raise();
        line.raise();
        assert_eq!(delivered(&ioapic, 0), [(0x41, true)]);
        ioapic.eoi(0x41);
        assert_eq!(delivered(&ioapic, 0), [(0x41, true)]);
        ioapic.eoi(0x41);
        assert_eq!(delivered(&ioapic, 0), [(0u8, false); 0]);
    }

    #[test]
    fn making_an_entry_edge_triggered_clears_remote_irr() {
        let ioapic = ioapic(1);
        program(&ioapic, 9, 0x41 | LEVEL as u32, 0);
        ioapic.line(Gsi(9)).unwrap().raise();
        program(&ioapic, 9, 0x41 | MASKED as u32, 0);
        program(&ioapic, 9, 0x41 | LEVEL as u32, 0);
        assert_eq!(read(&ioapic, 0x22), 0x41 | LEVEL as u32);
    }

    #[test]
    fn datasheet_3_2_4_delivery_and_destination_modes() {
        let ioapic = ioapic(3);
        for id in 0..3 {
            ioapic.bus().mailbox(id).unwrap().set_address(LogicalAddress::X2Apic(1 << id).to_bits());
        }
        let line = ioapic.line(Gsi(0)).unwrap();
        program(&ioapic, 0, 0x50 | LOGICAL as u32, 0b110);
        line.raise();
        assert_eq!([0, 1, 2].map(|id| delivered(&ioapic, id).len()), [0, 1, 1]);
        program(&ioapic, 0, 0x150 | LOGICAL as u32, 0b110);
        line.raise();
        assert_eq!([0, 1, 2].map(|id| delivered(&ioapic, id).len()), [0, 1, 0]);
        program(&ioapic, 0, 0x50, 0xff);
        line.raise();
        assert_eq!([0, 1, 2].map(|id| delivered(&ioapic, id).len()), [1, 1, 1]);
        program(&ioapic, 0, 0x400, 2);
        line.raise();
        assert!(ioapic.bus().mailbox(2).unwrap().collect().signals.nmi);
        for reserved in [0x200, 0x300, 0x600, 0x700] {
            program(&ioapic, 0, reserved | 0x50, 2);
            line.raise();
            assert_eq!(ioapic.bus().mailbox(2).unwrap().collect(), Mail::default());
        }
    }

    #[test]
    fn there_are_24_lines() {
        let ioapic = ioapic(1);
        assert!(ioapic.line(Gsi(23)).is_some());
        assert!(ioapic.line(Gsi(24)).is_none());
    }

    #[test]
    fn a_restored_ioapic_continues_a_level_interrupt() {
        let (from, to) = (ioapic(1), ioapic(1));
        program(&from, 9, 0x41 | LEVEL as u32, 0);
        from.line(Gsi(9)).unwrap().set_level(true);
        to.restore(&from.save());
        assert_eq!(to.save(), from.save());
        to.eoi(0x41);
        assert_eq!(delivered(&to, 0), [(0x41, true)]);
        let hostile = IoApicState {
            select: u32::MAX,
            id: u32::MAX,
            redirections: [u64::MAX; 24],
            requests: u32::MAX,
            active: u32::MAX,
        };
        to.restore(&hostile);
        assert_eq!(read(&to, 0x10), 0x1_efff);
        to.eoi(0xff);
    }
}
