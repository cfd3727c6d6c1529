//! Interrupt lines: this process's IOAPIC, whose messages the kernel's local APICs take.
//!
//! ```text
//!   device thread --raise--> irqfd ------------------(route of the line)--+
//!                   |                                                     +--> local APIC of a vCPU
//!                   +------> IoApic --KVM_SIGNAL_MSI----------------------+         |
//!                              ^                                                    |
//!                              +--------- KVM_EXIT_IOAPIC_EOI, of level lines ------+
//! ```
//!
//! The kernel could have the IOAPIC as well, and would then hand what an irqfd says to a worker of its own: an edge that
//! was raised before a pause could be missing from the state that is saved in it, and would come later. A message for
//! one local APIC by its id is delivered in the write to the irqfd, and these are the ones that take this way; all others
//! are sent by a call. Both are delivered when `raise` returns (`irqfd_wakeup` in `virt/kvm/eventfd.c`, and
//! `kvm_irq_delivery_to_apic_fast` in `arch/x86/kvm/lapic.c` of Linux).

use std::array;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use kvm_bindings::{KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry, kvm_msi};

use super::eventfd;
use super::failed;
use super::machine::Shared;
use super::memory::Guest;
use crate::hv::ioapic::{self, Bus, Redirection};
use crate::hv::state::irqchip::{IOAPIC_PINS as PINS, IoApicState};
use crate::hv::{HvError, IrqLine};
use crate::units::Gsi;

/// The IOAPIC of a machine under this engine.
pub(super) type IoApic = ioapic::IoApic<Wires>;

/// Where a message for local APICs is written (Intel SDM volume 3A, 11.11).
const MESSAGE_ADDRESS: u32 = 0xfee0_0000;
const MESSAGE_LOGICAL: u32 = 1 << 2;
const MESSAGE_LEVEL: u32 = 1 << 15;

const FIXED: u32 = 0;
const LOWEST_PRIORITY: u32 = 1;
const NMI: u32 = 4;
const INIT: u32 = 5;
/// All local APICs, as a destination.
const EVERYBODY: u8 = 0xff;
/// Vectors below are the processor's own.
const FIRST_VECTOR: u8 = 16;

/// What leads from the IOAPIC's pins to the local APICs.
#[derive(Debug)]
pub(super) struct Wires {
    guest: Arc<Guest>,
    /// The messages that the kernel knows as the lines' routes.
    routes: Mutex<[Option<Message>; PINS]>,
    pins: [Pin; PINS],
}

#[derive(Debug, Default)]
struct Pin {
    irqfd: OnceLock<OwnedFd>,
    /// An edge of the line is the message of its route, delivered in the write to the irqfd.
    direct: AtomicBool,
}

/// A message on the kernel's way to say it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Message {
    address: u32,
    data: u32,
}

impl Message {
    /// `None` for a delivery mode that this machine does not have: it has neither a system management mode nor an 8259A.
    fn of(entry: Redirection) -> Option<Self> {
        let delivery = entry.delivery();
        let logical = if entry.is_logical() { MESSAGE_LOGICAL } else { 0 };
        let level = match delivery {
            FIXED | LOWEST_PRIORITY if entry.is_level() => MESSAGE_LEVEL,
            FIXED | LOWEST_PRIORITY | NMI | INIT => 0,
            _ => return None,
        };
        let address = MESSAGE_ADDRESS | u32::from(entry.destination()) << 12 | logical;
        Some(Self { address, data: level | delivery << 8 | u32::from(entry.vector()) })
    }

    fn route(self, pin: usize) -> kvm_irq_routing_entry {
        let mut route = kvm_irq_routing_entry { gsi: pin as u32, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
        route.u.msi.address_lo = self.address;
        route.u.msi.data = self.data;
        route
    }
}

/// Whether the kernel delivers the entry's message in the context of whoever writes to the irqfd.
fn is_direct(entry: Redirection) -> bool {
    let edge = !entry.is_masked() && !entry.is_level() && entry.delivery() == FIXED && entry.vector() >= FIRST_VECTOR;
    edge && !entry.is_logical() && entry.destination() != EVERYBODY
}

/// An entry after reset has no message yet, although its bits are those of one.
fn route_of(entry: Redirection) -> Option<Message> {
    Message::of(entry).filter(|_| entry.vector() >= FIRST_VECTOR)
}

impl Wires {
    pub(super) fn new(guest: Arc<Guest>) -> Self {
        Self { guest, routes: Mutex::new([None; PINS]), pins: array::from_fn(|_| Pin::default()) }
    }

    /// Tells the kernel of the lines' routes: irqfds go by them, and the end of a level interrupt is only told of where
    /// one says so.
    fn set_routes(&self, new: [Option<Message>; PINS]) -> Result<(), HvError> {
        let mut routes = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        if *routes == new {
            return Ok(());
        }
        let entries: Vec<_> =
            (0..).zip(new).filter_map(|(pin, message)| message.map(|message| message.route(pin))).collect();
        let table = KvmIrqRouting::from_entries(&entries).map_err(|_| HvError::Unsupported("so many lines"))?;
        self.guest.vm().set_gsi_routing(&table).map_err(failed("KVM_SET_GSI_ROUTING"))?;
        *routes = new;
        Ok(())
    }

    /// Raises an edge without the IOAPIC's doing; false if that is not the way.
    fn raise(&self, pin: usize) -> bool {
        let Some(pin) = self.pins.get(pin).filter(|pin| pin.direct.load(Ordering::Acquire)) else { return false };
        // The kernel takes what is written at once, so that the count has always room.
        pin.irqfd.get().is_some_and(|irqfd| rustix::io::write(irqfd, &1u64.to_ne_bytes()).is_ok())
    }
}

impl Bus for Wires {
    fn deliver(&self, entry: Redirection) {
        let Some(Message { address, data }) = Message::of(entry) else { return };
        let message = kvm_msi { address_lo: address, data, ..Default::default() };
        // An error also says that no local APIC is meant, or that the one that is does not listen.
        if let Err(error) = self.guest.vm().signal_msi(message) {
            tracing::trace!(%error, ?entry, "a message was not taken");
        }
    }

    fn redirected(&self, entries: &[u64; PINS]) {
        let entries = entries.map(Redirection);
        // What is not direct any more goes by the IOAPIC before the route changes, what becomes direct after it.
        let direct = entries.map(is_direct);
        let all = || self.pins.iter().zip(direct);
        all().filter(|(_, direct)| !direct).for_each(|(pin, _)| pin.direct.store(false, Ordering::Release));
        match self.set_routes(entries.map(route_of)) {
            Ok(()) => all().for_each(|(pin, direct)| pin.direct.store(direct, Ordering::Release)),
            Err(error) => {
                self.pins.iter().for_each(|pin| pin.direct.store(false, Ordering::Release));
                tracing::warn!(%error, "the routes of interrupt lines could not be set");
            }
        }
    }
}

/// The line with number `gsi`.
///
/// # Errors
/// [`HvError::Unsupported`] if there is none; [`HvError::Call`] when the host refuses the irqfd.
pub(super) fn line(shared: &Arc<Shared>, gsi: Gsi) -> Result<Arc<dyn IrqLine>, HvError> {
    let no_line = HvError::Unsupported("an interrupt line that the IOAPIC does not have");
    let Some(number) = usize::try_from(gsi.0).ok().filter(|pin| *pin < PINS) else { return Err(no_line) };
    let pin = &shared.ioapic().bus().pins[number];
    if pin.irqfd.get().is_none() {
        // Of two threads one has the line's eventfd; the other's is closed, and the kernel lets go of it.
        let _ = pin.irqfd.set(eventfd::raising(shared.vm(), gsi.0)?);
    }
    Ok(Arc::new(Line { shared: Arc::clone(shared), pin: number }))
}

#[derive(Debug)]
struct Line {
    shared: Arc<Shared>,
    pin: usize,
}

impl IrqLine for Line {
    fn raise(&self) {
        let ioapic = self.shared.ioapic();
        if !ioapic.bus().raise(self.pin) {
            ioapic.pulse(self.pin);
        }
    }

    fn set_level(&self, high: bool) {
        self.shared.ioapic().set_level(self.pin, high);
    }
}

impl Shared {
    /// The IOAPIC's state. A vCPU that left the guest right after it ended a level interrupt tells of it only when it
    /// runs again: what no local APIC has any more is over.
    pub(super) fn save_ioapic(&self) -> Result<IoApicState, HvError> {
        let mut state = self.ioapic().save();
        for entry in &mut state.redirections {
            let redirection = Redirection(*entry);
            if redirection.is_in_service() && !self.is_pending(redirection.vector())? {
                *entry = redirection.ended().0;
            }
        }
        Ok(state)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(entry: u64) -> Option<(u32, u32)> {
        Message::of(Redirection(entry)).map(|message| (message.address, message.data))
    }

    #[test]
    fn sdm_11_11_messages() {
        assert_eq!(message(0x0300_0000_0000_0031), Some((0xfee0_3000, 0x31)));
        assert_eq!(message(0xff00_0000_0001_0931), Some((0xfeef_f004, 0x131)), "logical, lowest priority");
        assert_eq!(message(0x0100_0000_0000_8041), Some((0xfee0_1000, 0x8041)), "level");
        assert_eq!(message(0x0100_0000_0000_e041), Some((0xfee0_1000, 0x8041)), "neither polarity nor remote IRR");
        assert_eq!(message(0x0200_0000_0000_8400), Some((0xfee0_2000, 0x400)), "an NMI is always an edge");
        assert_eq!(message(0x0200_0000_0000_0500), Some((0xfee0_2000, 0x500)));
        for reserved in [0x200, 0x300, 0x600, 0x700] {
            assert_eq!(message(0x31 | reserved), None);
        }
    }

    #[test]
    fn only_edges_for_one_local_apic_by_its_id_take_the_direct_way() {
        assert!(is_direct(Redirection(0x0300_0000_0000_0031)));
        for other in [
            0x0300_0000_0001_0031,
            0x0300_0000_0000_8031,
            0x0300_0000_0000_0831,
            0x0300_0000_0000_0131,
            0x0300_0000_0000_0431,
            0x0300_0000_0000_000f,
            0xff00_0000_0000_0031,
        ] {
            assert!(!is_direct(Redirection(other)), "{other:#x}");
        }
    }

    #[test]
    fn an_entry_after_reset_has_no_route() {
        assert_eq!(route_of(Redirection(1 << 16)), None);
        assert!(route_of(Redirection(0x1_0031)).is_some(), "a mask changes no route");
    }
}
