//! The engine behind the hypervisor seam.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::hv::profile::PROFILE;
use crate::hv::state::IrqChipState;
use crate::hv::{HvError, HvVm, Hypervisor, IoHandler, IrqLine, Kick, TimeStamp, Vcpu, VcpuSeed, VmSpec};
use crate::mem::GuestRam;
use crate::units::{Gsi, VcpuId};

use super::apic::{Bus, IoApic, Lapic};
use super::clock::{Clock, TSC_HZ};
use super::cpu::Cpu;
use super::mailbox::Mailbox;
use super::run::SoftVcpu;
use super::shared_code::{Blocks, SharedCode};

/// The software engine: runs x86-64 guests on any host, without virtualization.
///
/// ```
/// use std::{num::NonZeroU8, sync::Arc};
/// use kiln::hv::{Hypervisor, VmSpec, soft::Soft};
/// use kiln::{mem::GuestRam, units::{Bytes, VcpuId}};
///
/// let ram = Arc::new(GuestRam::new(Bytes::mib(16))?);
/// let vm = Soft::new().create_vm(&VmSpec { vcpus: NonZeroU8::MIN }, ram)?;
/// let seed = vm.create_vcpu(VcpuId(0))?;
/// # drop(seed);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Default)]
pub struct Soft {
    retired: Arc<AtomicU64>,
    code: Arc<SharedCode>,
}

impl Soft {
    /// The engine; it has no settings and is always available. Machines of one engine that began with the same memory
    /// spare each other the decoding of code.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Guest instructions that this engine's processors have executed, all machines together. Brought up to date
    /// about every ten microseconds of guest time; blocks that an exception or a system instruction cut short are not
    /// counted, some percent of a kernel's boot.
    #[must_use]
    pub fn retired(&self) -> u64 {
        self.retired.load(Ordering::Relaxed)
    }
}

impl Hypervisor for Soft {
    fn create_vm(&self, spec: &VmSpec, ram: Arc<GuestRam>) -> Result<Box<dyn HvVm>, HvError> {
        if spec.vcpus.get() != 1 {
            return Err(HvError::Unsupported("more than one vCPU"));
        }
        let bus = Bus::new(spec.vcpus.get());
        let ioapic = Arc::new(IoApic::new(bus));
        Ok(Box::new(SoftVm {
            ram,
            ioapic,
            clock: Clock::new(),
            created: AtomicU64::new(0),
            retired: Arc::clone(&self.retired),
            code: Arc::clone(&self.code),
        }))
    }

    fn cpu_profile(&self) -> &str {
        PROFILE
    }
}

#[derive(Debug)]
struct SoftVm {
    ram: Arc<GuestRam>,
    ioapic: Arc<IoApic>,
    clock: Clock,
    /// One bit a vCPU id handed out.
    created: AtomicU64,
    retired: Arc<AtomicU64>,
    code: Arc<SharedCode>,
}

impl HvVm for SoftVm {
    fn create_vcpu(&self, id: VcpuId) -> Result<Box<dyn VcpuSeed>, HvError> {
        let mailbox = self.ioapic.bus().mailbox(id.0.into()).cloned();
        let mailbox = mailbox.ok_or(HvError::Unsupported("a vCPU id outside the machine"))?;
        let bit = 1 << (id.0 % 64);
        if self.created.fetch_or(bit, Ordering::Relaxed) & bit != 0 {
            return Err(HvError::Unsupported("making a vCPU twice"));
        }
        let (ram, ioapic, clock) = (Arc::clone(&self.ram), Arc::clone(&self.ioapic), self.clock.clone());
        let (retired, code) = (Arc::clone(&self.retired), self.code.blocks(&self.ram));
        Ok(Box::new(Seed { id, ram, ioapic, clock, mailbox, retired, code }))
    }

    fn irq_line(&self, gsi: Gsi) -> Result<Arc<dyn IrqLine>, HvError> {
        self.ioapic.line(gsi).ok_or(HvError::Unsupported("an interrupt line that the IOAPIC does not have"))
    }

    fn save_irqchip(&self) -> Result<IrqChipState, HvError> {
        Ok(IrqChipState { ioapic: self.ioapic.save() })
    }

    fn restore_irqchip(&self, state: &IrqChipState) -> Result<(), HvError> {
        self.ioapic.restore(&state.ioapic);
        Ok(())
    }

    fn stop_time(&self) {
        self.clock.stop();
    }

    fn start_time(&self) {
        self.clock.start();
    }

    fn time_stamp(&self) -> Option<TimeStamp> {
        Some(TimeStamp { ticks: self.clock.tsc(), hz: TSC_HZ })
    }
}

#[derive(Debug)]
struct Seed {
    id: VcpuId,
    ram: Arc<GuestRam>,
    ioapic: Arc<IoApic>,
    clock: Clock,
    mailbox: Arc<Mailbox>,
    retired: Arc<AtomicU64>,
    code: Option<Arc<Blocks>>,
}

impl VcpuSeed for Seed {
    fn kicker(&self) -> Arc<dyn Kick> {
        Arc::clone(&self.mailbox) as Arc<dyn Kick>
    }

    fn bind(self: Box<Self>, io: Box<dyn IoHandler>) -> Result<Box<dyn Vcpu>, HvError> {
        let Self { id, ram, ioapic, clock, mailbox, retired, code } = *self;
        let lapic = Lapic::new(id.0.into(), Arc::clone(&mailbox), clock.clone(), Arc::clone(&ioapic));
        Ok(Box::new(SoftVcpu::new(Cpu::new(ram, io, lapic, ioapic, clock), mailbox, retired, code)?))
    }
}
