//! The engine behind the hypervisor seam: opening `/dev/kvm`, and what must be there.

use std::io;
use std::sync::Arc;

use kvm_bindings::{
    KVM_CAP_ADJUST_CLOCK, KVM_CAP_DEBUGREGS, KVM_CAP_ENFORCE_PV_FEATURE_CPUID, KVM_CAP_EXIT_ON_EMULATION_FAILURE,
    KVM_CAP_GET_TSC_KHZ, KVM_CAP_IMMEDIATE_EXIT, KVM_CAP_IOEVENTFD_ANY_LENGTH, KVM_CAP_IRQ_ROUTING, KVM_CAP_IRQFD,
    KVM_CAP_MP_STATE, KVM_CAP_SET_TSS_ADDR, KVM_CAP_SIGNAL_MSI, KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_TSC_CONTROL,
    KVM_CAP_TSC_DEADLINE_TIMER, KVM_CAP_USER_MEMORY, KVM_CAP_VCPU_ATTRIBUTES, KVM_CAP_VCPU_EVENTS, KVM_CAP_X2APIC_API,
    KVM_CAP_X86_MSR_FILTER, KVM_CAP_XSAVE,
};
use kvm_ioctls::Cap;

use super::clock::Rate;
use super::failed;
use super::machine::{KvmVm, Shared};
use super::profile::Shown;
use super::signal::Signal;
use super::tsc;
use crate::hv::profile::TSC_KHZ;
use crate::hv::{HvError, HvVm, Hypervisor, VmSpec};
use crate::mem::GuestRam;

const API_VERSION: i32 = 12;

/// Capabilities without which there is no engine, with the kernel's names.
const NEEDED: [(u32, &str); 20] = [
    (KVM_CAP_USER_MEMORY, "KVM_CAP_USER_MEMORY"),
    (KVM_CAP_SPLIT_IRQCHIP, "KVM_CAP_SPLIT_IRQCHIP (Linux 4.4)"),
    (KVM_CAP_IRQ_ROUTING, "KVM_CAP_IRQ_ROUTING"),
    (KVM_CAP_IRQFD, "KVM_CAP_IRQFD"),
    (KVM_CAP_SIGNAL_MSI, "KVM_CAP_SIGNAL_MSI"),
    (KVM_CAP_SET_TSS_ADDR, "KVM_CAP_SET_TSS_ADDR"),
    (KVM_CAP_MP_STATE, "KVM_CAP_MP_STATE"),
    (KVM_CAP_VCPU_EVENTS, "KVM_CAP_VCPU_EVENTS"),
    (KVM_CAP_DEBUGREGS, "KVM_CAP_DEBUGREGS"),
    (KVM_CAP_XSAVE, "KVM_CAP_XSAVE"),
    (KVM_CAP_GET_TSC_KHZ, "KVM_CAP_GET_TSC_KHZ (a host with a stable time stamp counter)"),
    (KVM_CAP_TSC_DEADLINE_TIMER, "KVM_CAP_TSC_DEADLINE_TIMER"),
    (KVM_CAP_ADJUST_CLOCK, "KVM_CAP_ADJUST_CLOCK"),
    (KVM_CAP_IOEVENTFD_ANY_LENGTH, "KVM_CAP_IOEVENTFD_ANY_LENGTH (Linux 4.4)"),
    (KVM_CAP_IMMEDIATE_EXIT, "KVM_CAP_IMMEDIATE_EXIT (Linux 4.12)"),
    (KVM_CAP_X2APIC_API, "KVM_CAP_X2APIC_API (Linux 4.8)"),
    (KVM_CAP_X86_MSR_FILTER, "KVM_CAP_X86_MSR_FILTER (Linux 5.10)"),
    (KVM_CAP_ENFORCE_PV_FEATURE_CPUID, "KVM_CAP_ENFORCE_PV_FEATURE_CPUID (Linux 5.10)"),
    (KVM_CAP_EXIT_ON_EMULATION_FAILURE, "KVM_CAP_EXIT_ON_EMULATION_FAILURE (Linux 5.14)"),
    (KVM_CAP_VCPU_ATTRIBUTES, "KVM_CAP_VCPU_ATTRIBUTES (Linux 5.16)"),
];

/// Which processor guests see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Profile {
    /// The one that [`Soft`](crate::hv::soft::Soft) implements, to the bit, on any host that has all of it: guests go
    /// from engine to engine and from host to host. Its time stamp counter runs at 1 GHz if the host's processor can
    /// scale it; if not, it runs as the host's does, and the profile's name says how fast. (On a host that does not heed
    /// an offset either, as those without the processor's help do, guests see the host's own counter, and the name ends
    /// in `-fixed`: such a guest finds its counter elsewhere after a pause or a restore.)
    Baseline,
    /// The host's own vendor, model and features, as far as a saved state can hold what comes with them: no AVX and
    /// nothing else that is XSAVE's, no performance counters, no nested virtualization. Its name is made of what it
    /// shows, so that guests go on only on a host that shows the same.
    Host,
}

/// The KVM engine: runs x86-64 guests on the host's processor.
///
/// # Examples
/// ```
/// use std::{num::NonZeroU8, sync::Arc};
/// use kiln::hv::{HvError, Hypervisor, VmSpec, kvm::Kvm};
/// use kiln::{mem::GuestRam, units::{Bytes, VcpuId}};
///
/// let kvm = match Kvm::new() {
///     Ok(kvm) => kvm,
///     // No such device, or no right to it; or one that is too old.
///     Err(HvError::Unavailable(_) | HvError::Missing { .. }) => return Ok(()),
///     Err(error) => return Err(error.into()),
/// };
/// let ram = Arc::new(GuestRam::new(Bytes::mib(16))?);
/// let vm = kvm.create_vm(&VmSpec { vcpus: NonZeroU8::MIN }, ram)?;
/// let seed = vm.create_vcpu(VcpuId(0))?;
/// # drop(seed);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Kvm {
    kvm: kvm_ioctls::Kvm,
    signal: Signal,
    shown: Arc<Shown>,
    rate: Rate,
    run_size: usize,
}

impl Kvm {
    /// The engine with [`Profile::Baseline`], or with [`Profile::Host`] on a host that lacks a part of the baseline;
    /// [`cpu_profile`](Hypervisor::cpu_profile) says which it is.
    ///
    /// # Errors
    /// As [`with_profile`](Self::with_profile).
    pub fn new() -> Result<Self, HvError> {
        let kvm = open()?;
        match Self::over(kvm, Profile::Baseline) {
            Err(HvError::Missing { what }) => {
                tracing::info!(?what, "this host cannot show guests the baseline profile");
                Self::over(open()?, Profile::Host)
            }
            result => result,
        }
    }

    /// The engine with this profile.
    ///
    /// # Errors
    /// [`HvError::Unavailable`] when `/dev/kvm` cannot be opened or speaks another version of the interface, or when the
    /// program leaves no real-time signal; [`HvError::Missing`] with all that the kernel or the processor lacks;
    /// [`HvError::Call`] when the host refuses something.
    pub fn with_profile(profile: Profile) -> Result<Self, HvError> {
        Self::over(open()?, profile)
    }

    fn over(kvm: kvm_ioctls::Kvm, profile: Profile) -> Result<Self, HvError> {
        let signal = Signal::get().map_err(HvError::Unavailable)?;
        // Only a vCPU knows how fast the host's counter runs.
        let vm = kvm.create_vm().map_err(failed("KVM_CREATE_VM"))?;
        let vcpu = vm.create_vcpu(0).map_err(failed("KVM_CREATE_VCPU"))?;
        let host_tsc_khz = vcpu.get_tsc_khz().map_err(failed("KVM_GET_TSC_KHZ"))?;
        let no_offset = |_| HvError::Missing { what: vec!["KVM_VCPU_TSC_OFFSET (Linux 5.16)"] };
        let steered = tsc::heeds_offset(&vcpu).map_err(no_offset)?;
        let scales = kvm.check_extension_raw(KVM_CAP_TSC_CONTROL.into()) > 0;
        let guest_khz = if scales && profile == Profile::Baseline { TSC_KHZ } else { host_tsc_khz };
        let rate = Rate { guest_khz, host_khz: host_tsc_khz, steered };
        let shown = Arc::new(Shown::new(&kvm, profile, rate)?);
        let run_size = kvm.get_vcpu_mmap_size().map_err(failed("KVM_GET_VCPU_MMAP_SIZE"))?;
        Ok(Self { kvm, signal, shown, rate, run_size })
    }
}

/// `/dev/kvm`, which has all that is needed.
fn open() -> Result<kvm_ioctls::Kvm, HvError> {
    let unavailable = |error: kvm_ioctls::Error| HvError::Unavailable(io::Error::from_raw_os_error(error.errno()));
    let kvm = kvm_ioctls::Kvm::new().map_err(unavailable)?;
    if kvm.get_api_version() != API_VERSION {
        return Err(HvError::Unavailable(io::ErrorKind::Unsupported.into()));
    }
    let lacks = |(capability, _): &&(u32, &str)| kvm.check_extension_raw((*capability).into()) <= 0;
    let what: Vec<_> = NEEDED.iter().filter(lacks).map(|(_, name)| *name).collect();
    if what.is_empty() { Ok(kvm) } else { Err(HvError::Missing { what }) }
}

impl Hypervisor for Kvm {
    fn create_vm(&self, spec: &VmSpec, ram: Arc<GuestRam>) -> Result<Box<dyn HvVm>, HvError> {
        if usize::from(spec.vcpus.get()) > self.kvm.check_extension_int(Cap::MaxVcpus).max(1) as usize {
            return Err(HvError::Unsupported("so many vCPUs"));
        }
        let vm = self.kvm.create_vm().map_err(failed("KVM_CREATE_VM"))?;
        let shared = Shared::new(vm, ram, Arc::clone(&self.shown), spec.vcpus, self.rate)?;
        Ok(Box::new(KvmVm::new(Arc::new(shared), self.signal, self.run_size)))
    }

    fn cpu_profile(&self) -> &str {
        self.shown.name()
    }
}
