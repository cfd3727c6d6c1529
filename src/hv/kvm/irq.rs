//! The lines into the kernel's IOAPIC, and its state.
//!
//! A line is driven by KVM_IRQ_LINE and not through an eventfd: for a pin of the IOAPIC the kernel would hand the eventfd's
//! signal to a worker of its own, and an interrupt raised before a pause could be missing from the state that is saved in
//! it. It also comes sooner (`benches/irq_inject.rs`), and takes no lock that is held for long.
//!
//! The kernel notices an edge by comparing with what it has seen, so a pulse is up and down under the line's lock: of two
//! pulses at once the second would be lost while the first is up.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{KVM_IRQCHIP_IOAPIC, kvm_ioapic_state, kvm_irqchip};

use super::failed;
use super::machine::Shared;
use crate::hv::state::irqchip::{IOAPIC_PINS as PINS, IoApicState};
use crate::hv::{HvError, IrqLine};
use crate::units::Gsi;

const REMOTE_IRR: u64 = 1 << 14;
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;
/// What software may write in a redirection entry, and remote IRR.
const KEPT: u64 = 0xff00_0000_0001_afff & !(1 << 12) | REMOTE_IRR;
const IOAPIC_BASE: u64 = 0xfec0_0000;

/// Which lines are high.
#[derive(Debug, Default)]
pub(super) struct Lines {
    high: [Mutex<bool>; PINS],
}

impl Lines {
    fn lock(&self, pin: usize) -> Option<MutexGuard<'_, bool>> {
        Some(self.high.get(pin)?.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The line with number `gsi`, if there is one.
pub(super) fn line(shared: &Arc<Shared>, gsi: Gsi) -> Option<Arc<dyn IrqLine>> {
    let pin = usize::try_from(gsi.0).ok().filter(|pin| *pin < PINS)?;
    Some(Arc::new(Line { shared: Arc::clone(shared), pin }))
}

#[derive(Debug)]
struct Line {
    shared: Arc<Shared>,
    pin: usize,
}

impl IrqLine for Line {
    fn raise(&self) {
        let Some(high) = self.shared.lines().lock(self.pin) else { return };
        if *high {
            // Also a line that is high can send one edge more.
            self.shared.drive(self.pin, false);
            self.shared.drive(self.pin, true);
        } else {
            self.shared.drive(self.pin, true);
            self.shared.drive(self.pin, false);
        }
    }

    fn set_level(&self, level: bool) {
        let Some(mut high) = self.shared.lines().lock(self.pin) else { return };
        if std::mem::replace(&mut *high, level) != level {
            self.shared.drive(self.pin, level);
        }
    }
}

impl Shared {
    fn drive(&self, pin: usize, high: bool) {
        // The pin is one that the controller has, so that the kernel has nothing to refuse.
        if let Err(error) = self.vm().set_irq_line(pin as u32, high) {
            tracing::warn!(%error, pin, "an interrupt line could not be driven");
        }
    }

    pub(super) fn save_ioapic(&self) -> Result<IoApicState, HvError> {
        let mut chip = kvm_irqchip { chip_id: KVM_IRQCHIP_IOAPIC, ..Default::default() };
        self.vm().get_irqchip(&mut chip).map_err(failed("KVM_GET_IRQCHIP"))?;
        let from = ioapic::get(&chip);
        let redirections = ioapic::entries(&from).map(|entry| entry & KEPT);
        let active = (0..PINS).filter(|pin| self.lines().lock(*pin).is_some_and(|high| *high));
        let level = (0..PINS).filter(|pin| redirections[*pin] & LEVEL != 0);
        Ok(IoApicState {
            select: from.ioregsel & 0xff,
            id: (from.id & 0xf) << 24,
            requests: from.irr & mask(level),
            active: mask(active),
            redirections,
        })
    }

    /// In three steps, because the levels of the lines are no part of the kernel's state and can only be driven: all
    /// entries masked, then the lines, then the entries as they were.
    pub(super) fn restore_ioapic(&self, state: &IoApicState) -> Result<(), HvError> {
        self.set_ioapic(&kvm_ioapic_state { base_address: IOAPIC_BASE, ..Default::default() }, [MASKED; PINS])?;
        for pin in 0..PINS {
            let Some(mut high) = self.lines().lock(pin) else { continue };
            let active = state.active >> pin & 1 != 0;
            if std::mem::replace(&mut *high, active) != active {
                self.drive(pin, active);
            }
        }
        let redirections = state.redirections.map(|entry| entry & KEPT);
        // A level that the line holds asks again; an edge that was sent does not. What else asked was a pulse, which the
        // kernel does not keep.
        let asking = mask((0..PINS).filter(|pin| redirections[*pin] & LEVEL != 0)) & state.active;
        let to = kvm_ioapic_state {
            base_address: IOAPIC_BASE,
            ioregsel: state.select & 0xff,
            id: state.id >> 24 & 0xf,
            irr: asking,
            ..Default::default()
        };
        self.set_ioapic(&to, redirections)
    }

    fn set_ioapic(&self, to: &kvm_ioapic_state, redirections: [u64; PINS]) -> Result<(), HvError> {
        let chip = ioapic::chip(to, redirections);
        self.vm().set_irqchip(&chip).map_err(failed("KVM_SET_IRQCHIP"))
    }
}

fn mask(pins: impl Iterator<Item = usize>) -> u32 {
    pins.fold(0, |all, pin| all | 1 << pin)
}

/// The kernel's form of the state, which is a union in a union.
mod ioapic {
    #![allow(unsafe_code, reason = "unsafe fence: unions that the kernel's interface has")]

    use kvm_bindings::{KVM_IRQCHIP_IOAPIC, kvm_ioapic_state, kvm_irqchip};

    use super::PINS;

    /// What KVM_GET_IRQCHIP has put into `chip`.
    pub(super) fn get(chip: &kvm_irqchip) -> kvm_ioapic_state {
        // SAFETY: any bytes are a value of the member, and all of the union's are initialised: `Default` zeroes them.
        unsafe { chip.chip.ioapic }
    }

    pub(super) fn entries(state: &kvm_ioapic_state) -> [u64; PINS] {
        // SAFETY: both members of the union are eight bytes of which any are a value.
        state.redirtbl.map(|entry| unsafe { entry.bits })
    }

    pub(super) fn chip(state: &kvm_ioapic_state, entries: [u64; PINS]) -> kvm_irqchip {
        let mut chip = kvm_irqchip { chip_id: KVM_IRQCHIP_IOAPIC, ..Default::default() };
        chip.chip.ioapic = *state;
        for (pin, bits) in entries.into_iter().enumerate() {
            // SAFETY: the member was just written.
            unsafe { chip.chip.ioapic.redirtbl[pin].bits = bits };
        }
        chip
    }
}
