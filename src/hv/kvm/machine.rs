//! One virtual machine.

use std::num::NonZeroU8;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use kvm_bindings::{
    KVM_CAP_EXIT_ON_EMULATION_FAILURE, KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_X2APIC_API,
    KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK, KVM_X2APIC_API_USE_32BIT_IDS, kvm_clock_data, kvm_enable_cap,
};
use kvm_ioctls::VmFd;

use super::clock::{Clock, Rate};
use super::eventfd;
use super::failed;
use super::irq::{self, IoApic, Wires};
use super::memory::{Guest, Logging};
use super::profile::Shown;
use super::registers;
use super::signal::Signal;
use super::vcpu::{Seed, Slot};
use crate::hv::state::IrqChipState;
use crate::hv::state::irqchip::IOAPIC_PINS;
use crate::hv::{HvError, HvVm, IrqLine, TimeStamp, VcpuSeed};
use crate::mem::GuestRam;
use crate::mem::PageSet;
use crate::units::{Gsi, GuestAddr, VcpuId};

/// Three pages that Intel processors without "unrestricted guest" need for real mode, in which every processor but the
/// first one starts; in the hole below 4 GiB. The identity map that they also need is by default the page before.
const TSS_ADDRESS: usize = 0xfffb_d000;

/// What a machine's vCPUs and lines share.
#[derive(Debug)]
pub(super) struct Shared {
    slots: Box<[OnceLock<Arc<Slot>>]>,
    guest: Arc<Guest>,
    clock: Clock,
    shown: Arc<Shown>,
    ioapic: IoApic,
    logging: Mutex<Logging>,
}

impl Shared {
    pub(super) fn new(
        vm: VmFd,
        ram: Arc<GuestRam>,
        shown: Arc<Shown>,
        vcpus: NonZeroU8,
        rate: Rate,
    ) -> Result<Self, HvError> {
        let clock = Clock::new(rate);
        let slots = (0..vcpus.get()).map(|_| OnceLock::new()).collect();
        // In this order: the filter waits patiently for readers of what was there before (sixteen milliseconds after
        // memory was registered, none if it is the first).
        shown.filter_msrs(&vm)?;
        let guest = Arc::new(Guest::new(vm, ram)?);
        add_controllers(guest.vm())?;
        let ioapic = IoApic::new(Wires::new(Arc::clone(&guest)));
        let logging = Mutex::new(Logging::Off);
        Ok(Self { slots, guest, clock, shown, ioapic, logging })
    }

    pub(super) fn guest(&self) -> &Arc<Guest> {
        &self.guest
    }

    pub(super) fn vm(&self) -> &VmFd {
        self.guest.vm()
    }

    pub(super) fn ram(&self) -> &GuestRam {
        self.guest.ram()
    }

    pub(super) fn clock(&self) -> &Clock {
        &self.clock
    }

    pub(super) fn shown(&self) -> &Shown {
        &self.shown
    }

    pub(super) fn ioapic(&self) -> &IoApic {
        &self.ioapic
    }

    pub(super) fn vcpus(&self) -> u8 {
        // There are as many slots as a `NonZeroU8` said.
        self.slots.len() as u8
    }

    pub(super) fn logging(&self) -> MutexGuard<'_, Logging> {
        self.logging.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The vCPUs that have been made.
    fn made(&self) -> impl Iterator<Item = &Arc<Slot>> {
        self.slots.iter().filter_map(OnceLock::get)
    }

    /// Whether a local APIC has an interrupt with this vector, waiting or in service. One that runs may.
    pub(super) fn is_pending(&self, vector: u8) -> Result<bool, HvError> {
        for slot in self.made() {
            let Some(cell) = slot.try_lock() else { return Ok(true) };
            if registers::lapic(cell.fd())?.has(vector) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Sets the machine's time, by way of its first vCPU: the others' counters follow.
    pub(super) fn set_time(&self, tsc: u64) {
        if let Some(kvmclock_ns) = self.clock.set(tsc) {
            self.set_kvmclock(kvmclock_ns);
        }
        for slot in self.made() {
            // The caller's own is locked, and follows by itself; so does one that runs, when it next begins a run.
            if let Some(mut cell) = slot.try_lock()
                && let Err(error) = cell.follow(&self.clock)
            {
                tracing::warn!(%error, "a vCPU's time could not be set");
            }
        }
    }

    fn set_kvmclock(&self, ns: u64) {
        let clock = kvm_clock_data { clock: ns, ..Default::default() };
        if let Err(error) = self.vm().set_clock(&clock) {
            tracing::warn!(%error, "the paravirtual clock could not be set");
        }
    }

    fn stop_time(&self) {
        let kvmclock_ns = self.vm().get_clock().map_or_else(|_| self.clock.ns(self.clock.now().ticks), |now| now.clock);
        if !self.clock.stop(kvmclock_ns) {
            return;
        }
        for slot in self.made() {
            match slot.try_lock().map(|mut cell| cell.time_stops()) {
                Some(Ok(())) => {}
                Some(Err(error)) => tracing::warn!(%error, "a vCPU's timer could not be stopped"),
                None => tracing::warn!(vcpu = slot.id(), "time was stopped while a vCPU ran"),
            }
        }
    }

    fn start_time(&self) {
        let Some(kvmclock_ns) = self.clock.start() else { return };
        for slot in self.made() {
            match slot.try_lock().map(|mut cell| cell.time_starts(&self.clock)) {
                Some(Ok(())) => {}
                Some(Err(error)) => tracing::warn!(%error, "a vCPU's time could not be started"),
                None => tracing::warn!(vcpu = slot.id(), "time was started while a vCPU ran"),
            }
        }
        self.set_kvmclock(kvmclock_ns);
    }
}

fn add_controllers(vm: &VmFd) -> Result<(), HvError> {
    vm.set_tss_address(TSS_ADDRESS).map_err(failed("KVM_SET_TSS_ADDR"))?;
    // 32 bits of an x2APIC id are the whole id, and 0xff is one and not all of them.
    let x2apic = KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK;
    enable(vm, KVM_CAP_X2APIC_API, x2apic.into())?;
    enable(vm, KVM_CAP_EXIT_ON_EMULATION_FAILURE, 1)?;
    // The kernel's local APICs, and none of its other controllers; of as many lines it tells the end.
    enable(vm, KVM_CAP_SPLIT_IRQCHIP, IOAPIC_PINS as u64)
}

fn enable(vm: &VmFd, cap: u32, argument: u64) -> Result<(), HvError> {
    let cap = kvm_enable_cap { cap, args: [argument, 0, 0, 0], ..Default::default() };
    vm.enable_cap(&cap).map_err(failed("KVM_ENABLE_CAP"))
}

/// A machine, as the seam has it.
#[derive(Debug)]
pub(super) struct KvmVm {
    shared: Arc<Shared>,
    signal: Signal,
    run_size: usize,
}

impl KvmVm {
    pub(super) fn new(shared: Arc<Shared>, signal: Signal, run_size: usize) -> Self {
        Self { shared, signal, run_size }
    }
}

impl HvVm for KvmVm {
    fn create_vcpu(&self, id: VcpuId) -> Result<Box<dyn VcpuSeed>, HvError> {
        let place = self.shared.slots.get(usize::from(id.0));
        let place = place.ok_or(HvError::Unsupported("a vCPU id outside the machine"))?;
        if place.get().is_some() {
            return Err(HvError::Unsupported("making a vCPU twice"));
        }
        let slot = Arc::new(Slot::new(&self.shared, id.0, self.signal, self.run_size)?);
        // KVM refuses an id that another thread was first to make a vCPU of.
        place.set(Arc::clone(&slot)).map_err(|_| HvError::Unsupported("making a vCPU twice"))?;
        Ok(Box::new(Seed::new(slot, Arc::clone(&self.shared))))
    }

    fn irq_line(&self, gsi: Gsi) -> Result<Arc<dyn IrqLine>, HvError> {
        irq::line(&self.shared, gsi)
    }

    fn doorbell(&self, addr: GuestAddr) -> Result<Option<OwnedFd>, HvError> {
        eventfd::on_write(self.shared.vm(), addr).map(Some)
    }

    fn save_irqchip(&self) -> Result<IrqChipState, HvError> {
        self.shared.save_ioapic().map(|ioapic| IrqChipState { ioapic })
    }

    fn restore_irqchip(&self, state: &IrqChipState) -> Result<(), HvError> {
        self.shared.ioapic().restore(&state.ioapic);
        Ok(())
    }

    fn stop_time(&self) {
        self.shared.stop_time();
    }

    fn start_time(&self) {
        self.shared.start_time();
    }

    fn time_stamp(&self) -> Option<TimeStamp> {
        Some(self.shared.clock.now())
    }

    fn start_dirty_log(&self) -> Result<(), HvError> {
        let mut logging = self.shared.logging();
        if *logging == Logging::On {
            drop(logging);
            // What was noted before is forgotten.
            return self.shared.take_dirty_pages().map(drop);
        }
        self.shared.guest.map(Logging::On)?;
        *logging = Logging::On;
        Ok(())
    }

    fn take_dirty_log(&self) -> Result<PageSet, HvError> {
        self.shared.take_dirty_pages()
    }

    fn stop_dirty_log(&self) -> Result<(), HvError> {
        let mut logging = self.shared.logging();
        if *logging == Logging::On {
            self.shared.guest.map(Logging::Off)?;
            *logging = Logging::Off;
        }
        Ok(())
    }
}
