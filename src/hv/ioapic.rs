//! The IOAPIC: 24 interrupt lines to messages (Intel 82093AA datasheet, section 3).
//!
//! Version 0x11: without an EOI register of its own; the local APICs' EOI broadcast is what ends a
//! level interrupt. A line has one device: sharing would need the lines' levels to be merged first.
//!
//! Every engine has this one, so that guests find the same wherever they go on; what differs is who takes the messages.

use std::fmt::Debug;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::IrqLine;
use super::state::irqchip::{IOAPIC_PINS as PINS, IoApicState};
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

/// An entry of the redirection table: what a line's message says, and when it is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Redirection(pub(crate) u64);

impl Redirection {
    /// The vector.
    pub(crate) fn vector(self) -> u8 {
        self.0 as u8
    }

    /// The delivery mode, three bits.
    pub(crate) fn delivery(self) -> u32 {
        (self.0 >> 8) as u32 & 7
    }

    /// Whether the destination is a logical address, and not an id.
    pub(crate) fn is_logical(self) -> bool {
        self.0 & LOGICAL != 0
    }

    /// The destination.
    pub(crate) fn destination(self) -> u8 {
        (self.0 >> 56) as u8
    }

    /// Whether the line is level-triggered.
    pub(crate) fn is_level(self) -> bool {
        self.0 & LEVEL != 0
    }

    /// Whether nothing is sent.
    pub(crate) fn is_masked(self) -> bool {
        self.0 & MASKED != 0
    }

    /// A message has been sent that is not ended yet, of a level-triggered line.
    pub(crate) fn is_in_service(self) -> bool {
        self.0 & (LEVEL | REMOTE_IRR) == LEVEL | REMOTE_IRR
    }

    /// The message in service is ended.
    pub(crate) fn ended(self) -> Self {
        Self(self.0 & !REMOTE_IRR)
    }
}

/// Who takes an IOAPIC's messages.
pub(crate) trait Bus: Debug + Send + Sync + 'static {
    /// Sends what `entry` says.
    fn deliver(&self, entry: Redirection);

    /// The table is `entries` from now on. Called before any message that follows from them.
    fn redirected(&self, _entries: &[u64; PINS]) {}
}

/// The IOAPIC.
#[derive(Debug)]
pub(crate) struct IoApic<B> {
    bus: B,
    state: Mutex<IoApicState>,
}

impl<B: Bus> IoApic<B> {
    /// An IOAPIC after reset that sends to `bus`.
    pub(crate) fn new(bus: B) -> Self {
        Self { bus, state: Mutex::default() }
    }

    /// The bus it sends to.
    pub(crate) fn bus(&self) -> &B {
        &self.bus
    }

    /// Serves a read of its page; false for any other address.
    pub(crate) fn mmio_read(&self, gpa: u64, into: &mut [u8]) -> bool {
        let Some(offset) = offset(gpa) else { return false };
        let state = self.lock();
        let value = match offset {
            IOREGSEL => state.select,
            IOWIN => state.read(state.select),
            _ => 0,
        };
        show(value, into);
        true
    }

    /// Serves a write to its page; false for any other address.
    pub(crate) fn mmio_write(&self, gpa: u64, data: &[u8]) -> bool {
        let Some(offset) = offset(gpa) else { return false };
        let mut state = self.lock();
        match offset {
            IOREGSEL => state.select = word(data) & 0xff,
            IOWIN => state.write(word(data), &self.bus),
            _ => {}
        }
        true
    }

    /// The line into pin `gsi`, or `None` when there is no such pin.
    pub(crate) fn line(self: &Arc<Self>, gsi: Gsi) -> Option<Arc<dyn IrqLine>> {
        let pin = usize::try_from(gsi.0).ok().filter(|pin| *pin < PINS)?;
        Some(Arc::new(Line { ioapic: Arc::clone(self), pin }))
    }

    /// A local APIC has ended the level-triggered interrupt `vector`.
    pub(crate) fn eoi(&self, vector: u8) {
        self.lock().eoi(vector, &self.bus);
    }

    /// A pulse of a line.
    pub(crate) fn pulse(&self, pin: usize) {
        self.lock().pulse(pin, &self.bus);
    }

    /// The level of a line.
    pub(crate) fn set_level(&self, pin: usize, high: bool) {
        self.lock().set_level(pin, high, &self.bus);
    }

    /// The state to keep.
    pub(crate) fn save(&self) -> IoApicState {
        self.lock().clone()
    }

    /// Continues from a saved state, when the local APICs have theirs: a line that asks is served at once. Bits that the
    /// hardware does not have are dropped.
    pub(crate) fn restore(&self, from: &IoApicState) {
        let pins = (1 << PINS) - 1;
        let mut state = self.lock();
        *state = IoApicState {
            select: from.select & 0xff,
            id: from.id & 0x0f00_0000,
            redirections: from.redirections.map(|entry| entry & (WRITABLE | REMOTE_IRR)),
            requests: from.requests & pins,
            active: from.active & pins,
        };
        self.bus.redirected(&state.redirections);
        for pin in 0..PINS {
            state.serve_level(pin, &self.bus);
        }
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

    fn write(&mut self, value: u32, bus: &impl Bus) {
        match self.select {
            INDEX_ID => self.id = value & 0x0f00_0000,
            index => {
                if let Some((pin, high)) = redirection_half(index) {
                    self.write_redirection(pin, high, value, bus);
                }
            }
        }
    }

    fn write_redirection(&mut self, pin: usize, high: bool, value: u32, bus: &impl Bus) {
        let (shift, keep) = if high { (32, 0xffff_ffffu64) } else { (0, !0xffff_ffff) };
        let old = self.redirections[pin];
        let written = (old & keep | u64::from(value) << shift) & WRITABLE;
        // Software without an EOI register ends a stuck level interrupt by making the entry edge-triggered
        // for a moment: hardware forgets the remote IRR then.
        let remote_irr = if written & LEVEL != 0 { old & REMOTE_IRR } else { 0 };
        self.redirections[pin] = written | remote_irr;
        bus.redirected(&self.redirections);
        self.serve_level(pin, bus);
    }

    /// Sets a line's level. A rising edge of an edge-triggered line sends; a masked one is lost, as
    /// the datasheet says of edges.
    fn set_level(&mut self, pin: usize, high: bool, bus: &impl Bus) {
        let bit = 1 << pin;
        let rises = high && self.active & bit == 0;
        self.active = if high { self.active | bit } else { self.active & !bit };
        let entry = Redirection(self.redirections[pin]);
        if !entry.is_level() {
            if rises && !entry.is_masked() {
                bus.deliver(entry);
            }
            return;
        }
        self.requests = if high { self.requests | bit } else { self.requests & !bit };
        self.serve_level(pin, bus);
    }

    /// A pulse. On a level-triggered line the request stays until it has been sent, so that a pulse
    /// during the service of the one before is not lost.
    fn pulse(&mut self, pin: usize, bus: &impl Bus) {
        let entry = Redirection(self.redirections[pin]);
        if entry.is_level() {
            self.requests |= 1 << pin;
            self.serve_level(pin, bus);
        } else if !entry.is_masked() {
            bus.deliver(entry);
        }
    }

    /// Sends a level-triggered pin's message if it asks, may, and is not being served.
    fn serve_level(&mut self, pin: usize, bus: &impl Bus) {
        let (bit, entry) = (1 << pin, Redirection(self.redirections[pin]));
        if !entry.is_level() || entry.is_masked() || entry.is_in_service() {
            return;
        }
        // The line may have become active while the entry was edge-triggered.
        if (self.requests | self.active) & bit == 0 {
            return;
        }
        self.redirections[pin] |= REMOTE_IRR;
        self.requests = self.requests & !bit | self.active & bit;
        bus.deliver(entry);
    }

    fn eoi(&mut self, vector: u8, bus: &impl Bus) {
        for pin in 0..PINS {
            let entry = Redirection(self.redirections[pin]);
            if entry.is_in_service() && entry.vector() == vector {
                self.redirections[pin] = entry.ended().0;
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

/// The register of its page that an address means; `None` outside the page.
fn offset(gpa: u64) -> Option<u64> {
    (gpa & !0xfff == IOAPIC_BASE).then_some(gpa & 0xfff)
}

/// A register of 32 bits, as an access of any width reads it.
pub(crate) fn show(value: u32, into: &mut [u8]) {
    into.fill(0);
    into.iter_mut().zip(value.to_le_bytes()).for_each(|(into, byte)| *into = byte);
}

/// What an access of any width writes to a register of 32 bits.
pub(crate) fn word(data: &[u8]) -> u32 {
    let mut bytes = [0; 4];
    bytes.iter_mut().zip(data).for_each(|(byte, data)| *byte = *data);
    u32::from_le_bytes(bytes)
}

#[derive(Debug)]
struct Line<B> {
    ioapic: Arc<IoApic<B>>,
    pin: usize,
}

impl<B: Bus> IrqLine for Line<B> {
    fn raise(&self) {
        self.ioapic.pulse(self.pin);
    }

    fn set_level(&self, high: bool) {
        self.ioapic.set_level(self.pin, high);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Event {
        Sent(Redirection),
        Redirected,
    }

    #[derive(Debug, Default)]
    struct Seen(Mutex<Vec<Event>>);

    impl Seen {
        fn take(&self) -> Vec<Event> {
            std::mem::take(&mut *self.0.lock().unwrap())
        }
    }

    impl Bus for Seen {
        fn deliver(&self, entry: Redirection) {
            self.0.lock().unwrap().push(Event::Sent(entry));
        }

        fn redirected(&self, _entries: &[u64; PINS]) {
            self.0.lock().unwrap().push(Event::Redirected);
        }
    }

    fn ioapic() -> Arc<IoApic<Seen>> {
        Arc::new(IoApic::new(Seen::default()))
    }

    fn write(ioapic: &IoApic<Seen>, index: u32, value: u32) {
        assert!(ioapic.mmio_write(IOAPIC_BASE + IOREGSEL, &index.to_le_bytes()));
        assert!(ioapic.mmio_write(IOAPIC_BASE + IOWIN, &value.to_le_bytes()));
    }

    fn register(ioapic: &IoApic<Seen>, offset: u64) -> u32 {
        let mut value = [0xff; 4];
        assert!(ioapic.mmio_read(IOAPIC_BASE + offset, &mut value));
        u32::from_le_bytes(value)
    }

    fn read(ioapic: &IoApic<Seen>, index: u32) -> u32 {
        assert!(ioapic.mmio_write(IOAPIC_BASE + IOREGSEL, &index.to_le_bytes()));
        register(ioapic, IOWIN)
    }

    fn program(ioapic: &IoApic<Seen>, pin: u32, low: u32, destination: u8) {
        write(ioapic, 0x11 + 2 * pin, u32::from(destination) << 24);
        write(ioapic, 0x10 + 2 * pin, low);
    }

    /// The vectors sent since the last call, with whether they are level-triggered.
    fn delivered(ioapic: &IoApic<Seen>) -> Vec<(u8, bool)> {
        let sent = ioapic.bus().take().into_iter().filter_map(|event| match event {
            Event::Sent(entry) => Some((entry.vector(), entry.is_level())),
            Event::Redirected => None,
        });
        sent.collect()
    }

    #[test]
    fn datasheet_3_2_registers_after_reset() {
        let ioapic = ioapic();
        assert_eq!(read(&ioapic, 1), 0x0017_0011);
        assert_eq!(read(&ioapic, 0), 0);
        for pin in 0..24 {
            assert_eq!((read(&ioapic, 0x10 + 2 * pin), read(&ioapic, 0x11 + 2 * pin)), (0x1_0000, 0));
        }
        assert_eq!(read(&ioapic, 0x40), 0);
        assert_eq!(register(&ioapic, 0x20), 0);
        write(&ioapic, 0, 0xffff_ffff);
        assert_eq!((read(&ioapic, 0), read(&ioapic, 2)), (0x0f00_0000, 0x0f00_0000));
        write(&ioapic, 1, 0);
        assert_eq!(read(&ioapic, 1), 0x0017_0011);
    }

    #[test]
    fn datasheet_3_2_4_read_only_bits_of_an_entry_stay() {
        let ioapic = ioapic();
        write(&ioapic, 0x10, 0xffff_ffff);
        write(&ioapic, 0x11, 0xffff_ffff);
        assert_eq!((read(&ioapic, 0x10), read(&ioapic, 0x11)), (0x1_afff, 0xff00_0000));
    }

    #[test]
    fn datasheet_3_2_4_edges_are_sent_and_masked_ones_lost() {
        let ioapic = ioapic();
        let line = ioapic.line(Gsi(5)).unwrap();
        line.raise();
        program(&ioapic, 5, 0x31, 1);
        assert_eq!(delivered(&ioapic), [(0u8, false); 0]);
        line.raise();
        assert_eq!(delivered(&ioapic), [(0x31, false)]);
        line.set_level(true);
        line.set_level(true);
        assert_eq!(delivered(&ioapic), [(0x31, false)]);
        line.set_level(true);
        assert_eq!(delivered(&ioapic), [(0u8, false); 0], "only a rising edge counts");
        line.set_level(false);
        line.set_level(true);
        assert_eq!(delivered(&ioapic), [(0x31, false)]);
        line.raise();
        assert_eq!(delivered(&ioapic), [(0x31, false)], "a pulse is an edge also of a line that is high");
        line.set_level(true);
        assert_eq!(delivered(&ioapic), [(0u8, false); 0]);
    }

    #[test]
    fn datasheet_3_2_4_a_level_is_sent_again_after_eoi_while_it_lasts() {
        let ioapic = ioapic();
        let line = ioapic.line(Gsi(9)).unwrap();
        program(&ioapic, 9, 0x41 | LEVEL as u32, 0);
        line.set_level(true);
        assert_eq!(delivered(&ioapic), [(0x41, true)]);
        assert_eq!(read(&ioapic, 0x22), 0x41 | (LEVEL | REMOTE_IRR) as u32);
        line.set_level(true);
        assert_eq!(delivered(&ioapic), [(0u8, false); 0], "in service");
        ioapic.eoi(0x42);
        assert_eq!(delivered(&ioapic), [(0u8, false); 0], "another vector's EOI");
        ioapic.eoi(0x41);
        assert_eq!(delivered(&ioapic), [(0x41, true)]);
        line.set_level(false);
        ioapic.eoi(0x41);
        assert_eq!(delivered(&ioapic), [(0u8, false); 0]);
        assert_eq!(read(&ioapic, 0x22), 0x41 | LEVEL as u32);
    }

    #[test]
    fn datasheet_3_2_4_a_masked_level_waits() {
        let ioapic = ioapic();
        let line = ioapic.line(Gsi(9)).unwrap();
        program(&ioapic, 9, 0x41 | (LEVEL | MASKED) as u32, 0);
        line.set_level(true);
        assert_eq!(delivered(&ioapic), [(0u8, false); 0]);
        program(&ioapic, 9, 0x41 | LEVEL as u32, 0);
        assert_eq!(delivered(&ioapic), [(0x41, true)]);
    }

    #[test]
    fn a_pulse_on_a_level_line_is_kept_through_service() {
        let ioapic = ioapic();
        let line = ioapic.line(Gsi(9)).unwrap();
        program(&ioapic, 9, 0x41 | LEVEL as u32, 0);
        line.raise();
        line.raise();
        assert_eq!(delivered(&ioapic), [(0x41, true)]);
        ioapic.eoi(0x41);
        assert_eq!(delivered(&ioapic), [(0x41, true)]);
        ioapic.eoi(0x41);
        assert_eq!(delivered(&ioapic), [(0u8, false); 0]);
    }

    #[test]
    fn making_an_entry_edge_triggered_clears_remote_irr() {
        let ioapic = ioapic();
        program(&ioapic, 9, 0x41 | LEVEL as u32, 0);
        ioapic.line(Gsi(9)).unwrap().raise();
        program(&ioapic, 9, 0x41 | MASKED as u32, 0);
        program(&ioapic, 9, 0x41 | LEVEL as u32, 0);
        assert_eq!(read(&ioapic, 0x22), 0x41 | LEVEL as u32);
    }

    #[test]
    fn datasheet_3_2_4_what_a_message_says() {
        let ioapic = ioapic();
        program(&ioapic, 0, 0x450 | LOGICAL as u32, 0b110);
        ioapic.bus().take();
        ioapic.line(Gsi(0)).unwrap().raise();
        let [Event::Sent(entry)] = ioapic.bus().take()[..] else { panic!("one message") };
        assert_eq!((entry.vector(), entry.delivery(), entry.is_logical(), entry.destination()), (0x50, 4, true, 6));
        assert!(!entry.is_level() && !entry.is_masked() && !entry.is_in_service());
    }

    #[test]
    fn the_bus_knows_the_table_before_the_messages() {
        let ioapic = ioapic();
        program(&ioapic, 9, 0x41 | (LEVEL | MASKED) as u32, 0);
        assert_eq!(ioapic.bus().take(), [Event::Redirected; 2], "both halves of an entry");
        ioapic.line(Gsi(9)).unwrap().set_level(true);
        write(&ioapic, 0x22, 0x41 | LEVEL as u32);
        let message = Event::Sent(Redirection(0x41 | LEVEL));
        assert_eq!(ioapic.bus().take(), [Event::Redirected, message]);
        let mut asking = ioapic.save();
        asking.redirections[9] = 0x41 | LEVEL;
        ioapic.restore(&asking);
        assert_eq!(ioapic.bus().take(), [Event::Redirected, message]);
    }

    #[test]
    fn accesses_of_any_width_and_elsewhere() {
        let ioapic = ioapic();
        assert!(ioapic.mmio_write(IOAPIC_BASE, &[1]));
        let mut wide = [0xff; 8];
        assert!(ioapic.mmio_read(IOAPIC_BASE + IOWIN, &mut wide));
        assert_eq!(wide, [0x11, 0, 0x17, 0, 0, 0, 0, 0]);
        let mut narrow = [0xff; 1];
        assert!(ioapic.mmio_read(IOAPIC_BASE + IOWIN, &mut narrow));
        assert_eq!(narrow, [0x11]);
        for elsewhere in [IOAPIC_BASE - 1, IOAPIC_BASE + 0x1000, 0] {
            assert!(!ioapic.mmio_read(elsewhere, &mut wide) && !ioapic.mmio_write(elsewhere, &[0]));
        }
    }

    #[test]
    fn there_are_24_lines() {
        let ioapic = ioapic();
        assert!(ioapic.line(Gsi(23)).is_some());
        assert!(ioapic.line(Gsi(24)).is_none());
    }

    #[test]
    fn a_restored_ioapic_continues_a_level_interrupt() {
        let (from, to) = (ioapic(), ioapic());
        program(&from, 9, 0x41 | LEVEL as u32, 0);
        from.line(Gsi(9)).unwrap().set_level(true);
        to.restore(&from.save());
        assert_eq!(to.save(), from.save());
        assert_eq!(delivered(&to), [(0u8, false); 0], "in service");
        to.eoi(0x41);
        assert_eq!(delivered(&to), [(0x41, true)]);
        // Ended, and nobody has served the line since.
        let mut ended = from.save();
        ended.redirections[9] = Redirection(ended.redirections[9]).ended().0;
        to.restore(&ended);
        assert_eq!(delivered(&to), [(0x41, true)]);
        assert_eq!(to.save(), from.save());
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
