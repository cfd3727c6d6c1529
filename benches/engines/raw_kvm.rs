//! The yardstick of the KVM engine: the same calls to the kernel by hand, and nothing around them.
#![allow(unsafe_code, reason = "KVM is given the address of guest memory")]

use std::sync::Arc;
use std::time::Duration;
use std::time::Instant;

use kiln::mem::GuestRam;
use kvm_bindings::CpuId;
use kvm_bindings::KVM_CAP_EXIT_ON_EMULATION_FAILURE;
use kvm_bindings::KVM_CAP_SPLIT_IRQCHIP;
use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_bindings::Msrs;
use kvm_bindings::kvm_enable_cap;
use kvm_bindings::kvm_msr_entry;
use kvm_bindings::kvm_regs;
use kvm_bindings::kvm_segment;
use kvm_bindings::kvm_sregs;
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::IoEventAddress;
use kvm_ioctls::Kvm;
use kvm_ioctls::MsrFilterDefaultAction;
use kvm_ioctls::MsrFilterRange;
use kvm_ioctls::MsrFilterRangeFlags;
use kvm_ioctls::NoDatamatch;
use kvm_ioctls::VcpuExit;
use kvm_ioctls::VcpuFd;
use kvm_ioctls::VmFd;
use vm_memory::GuestAddress;
use vm_memory::GuestMemoryBackend as _;
use vmm_sys_util::eventfd::EFD_NONBLOCK;
use vmm_sys_util::eventfd::EventFd;

use super::LINE;
use crate::bare::CODE;
use crate::bare::EXIT_PORT;
use crate::bare::STACK;

/// What is asked of the kernel once, however many machines are made.
#[derive(Debug)]
pub(crate) struct RawEngine {
    kvm: Kvm,
    cpuid: CpuId,
}

impl RawEngine {
    /// Opens the device; `step` hears of each call to the kernel.
    pub(crate) fn new(step: &mut dyn FnMut(&'static str, Duration)) -> Result<Self, kvm_ioctls::Error> {
        let mut took = Laps::new(step);
        let kvm = Kvm::new()?;
        took.lap("open /dev/kvm");
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
        took.lap("KVM_GET_SUPPORTED_CPUID");
        Ok(Self { kvm, cpuid })
    }
}

/// Times from call to call.
struct Laps<'a> {
    step: &'a mut dyn FnMut(&'static str, Duration),
    began: Instant,
}

impl<'a> Laps<'a> {
    fn new(step: &'a mut dyn FnMut(&'static str, Duration)) -> Self {
        Self { step, began: Instant::now() }
    }

    fn lap(&mut self, call: &'static str) {
        (self.step)(call, self.began.elapsed());
        self.began = Instant::now();
    }
}

/// Which interrupt controllers the kernel has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Controllers {
    /// The local APICs only, as in kiln's engine.
    Local,
    /// All that it can have.
    All,
}

/// A machine with one vCPU.
#[derive(Debug)]
pub(crate) struct RawKvm {
    // Dropped in this order: the machine before the memory it maps.
    pub(super) vcpu: VcpuFd,
    pub(super) vm: Arc<VmFd>,
    _ram: GuestRam,
}

impl RawKvm {
    /// Makes a machine over `ram`, ready to run, by the calls that kiln's engine makes and in their order; `step` hears of
    /// each.
    pub(crate) fn new(
        engine: &RawEngine,
        ram: GuestRam,
        controllers: Controllers,
        step: &mut dyn FnMut(&'static str, Duration),
    ) -> Result<Self, kvm_ioctls::Error> {
        let mut took = Laps::new(step);
        let vm = engine.kvm.create_vm()?;
        took.lap("KVM_CREATE_VM");
        let all = [0xff; 32];
        let range = MsrFilterRange {
            flags: MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE,
            base: 0xc000_0000,
            msr_count: 256,
            bitmap: &all,
        };
        vm.set_msr_filter(MsrFilterDefaultAction::ALLOW, &[range])?;
        took.lap("KVM_X86_SET_MSR_FILTER");
        let host = ram.memory().get_host_address(GuestAddress(0)).expect("memory begins at zero");
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: ram.size().0,
            userspace_addr: host as u64,
        };
        // SAFETY: the mapping of `ram` is as long as it says from `host` on, and outlives the machine: `RawKvm` drops
        // `vcpu` first, and whoever else has `vm` runs nothing.
        unsafe { vm.set_user_memory_region(region) }?;
        took.lap("KVM_SET_USER_MEMORY_REGION");
        vm.set_tss_address(0xfffb_d000)?;
        took.lap("KVM_SET_TSS_ADDR");
        vm.enable_cap(&kvm_enable_cap {
            cap: KVM_CAP_EXIT_ON_EMULATION_FAILURE,
            args: [1, 0, 0, 0],
            ..Default::default()
        })?;
        took.lap("KVM_ENABLE_CAP");
        match controllers {
            Controllers::Local => {
                let lines = [24, 0, 0, 0];
                vm.enable_cap(&kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, args: lines, ..Default::default() })?;
                took.lap("KVM_ENABLE_CAP, split interrupt controllers");
            }
            Controllers::All => {
                vm.create_irq_chip()?;
                took.lap("KVM_CREATE_IRQCHIP");
            }
        }
        let vcpu = vm.create_vcpu(0)?;
        took.lap("KVM_CREATE_VCPU");
        vcpu.set_cpuid2(&engine.cpuid)?;
        took.lap("KVM_SET_CPUID2");
        registers(&vcpu, &mut took)?;
        Ok(Self { vcpu, vm: Arc::new(vm), _ram: ram })
    }

    /// Wires a device: what wakes it, what it raises, and where that leads.
    pub(crate) fn add_device(
        &self,
        step: &mut dyn FnMut(&'static str, Duration),
    ) -> Result<(), Box<dyn std::error::Error>> {
        let (bell, line) = (EventFd::new(EFD_NONBLOCK)?, EventFd::new(EFD_NONBLOCK)?);
        let mut took = Laps::new(step);
        self.vm.register_ioevent(&bell, &IoEventAddress::Mmio(0xd000_0050), NoDatamatch)?;
        took.lap("KVM_IOEVENTFD");
        self.vm.register_irqfd(&line, LINE)?;
        took.lap("KVM_IRQFD");
        self.vm.set_gsi_routing(&super::raw_irq::to_local_apic())?;
        took.lap("KVM_SET_GSI_ROUTING, one message");
        Ok(())
    }

    /// Runs until the guest leaves.
    pub(crate) fn run(&mut self) -> Result<(), kvm_ioctls::Error> {
        loop {
            match self.vcpu.run()? {
                VcpuExit::IoOut(EXIT_PORT, _) => return Ok(()),
                VcpuExit::IoOut(..) | VcpuExit::MmioWrite(..) => {}
                VcpuExit::IoIn(_, data) | VcpuExit::MmioRead(_, data) => data.fill(0xff),
                other => panic!("unexpected exit {other:?}"),
            }
        }
    }
}

/// Reads all that the kernel keeps of a vCPU, and writes it with the state to begin in.
fn registers(vcpu: &VcpuFd, took: &mut Laps<'_>) -> Result<(), kvm_ioctls::Error> {
    let mp = vcpu.get_mp_state()?;
    took.lap("KVM_GET_MP_STATE");
    vcpu.get_regs()?;
    took.lap("KVM_GET_REGS");
    let sregs = vcpu.get_sregs()?;
    took.lap("KVM_GET_SREGS");
    let xsave = vcpu.get_xsave()?;
    took.lap("KVM_GET_XSAVE");
    let debug = vcpu.get_debug_regs()?;
    took.lap("KVM_GET_DEBUGREGS");
    let lapic = vcpu.get_lapic()?;
    took.lap("KVM_GET_LAPIC");
    let pat = kvm_msr_entry { index: 0x277, data: 0x0007_0406_0007_0406, ..Default::default() };
    let mut msrs = Msrs::from_entries(&[pat; 12]).expect("twelve entries fit");
    vcpu.get_msrs(&mut msrs)?;
    took.lap("KVM_GET_MSRS, 12 of them");
    let events = vcpu.get_vcpu_events()?;
    took.lap("KVM_GET_VCPU_EVENTS");
    vcpu.set_mp_state(mp)?;
    took.lap("KVM_SET_MP_STATE");
    vcpu.set_regs(&kvm_regs { rip: CODE, rsp: STACK, rflags: 2, ..Default::default() })?;
    took.lap("KVM_SET_REGS");
    vcpu.set_sregs(&long_mode(sregs))?;
    took.lap("KVM_SET_SREGS");
    // SAFETY: no state component was enabled since the image was read, so it is as large as it was then.
    unsafe { vcpu.set_xsave(&xsave) }?;
    took.lap("KVM_SET_XSAVE");
    vcpu.set_debug_regs(&debug)?;
    took.lap("KVM_SET_DEBUGREGS");
    vcpu.set_lapic(&lapic)?;
    took.lap("KVM_SET_LAPIC");
    vcpu.set_msrs(&msrs)?;
    took.lap("KVM_SET_MSRS, 12 of them");
    vcpu.set_vcpu_events(&events)?;
    took.lap("KVM_SET_VCPU_EVENTS");
    Ok(())
}

/// As `bare::initial_state` has it.
fn long_mode(reset: kvm_sregs) -> kvm_sregs {
    let code = kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector: 0x10,
        type_: 11,
        present: 1,
        s: 1,
        l: 1,
        g: 1,
        ..Default::default()
    };
    let data = kvm_segment { selector: 0x18, type_: 3, l: 0, db: 1, ..code };
    kvm_sregs {
        cs: code,
        ss: data,
        ds: data,
        es: data,
        fs: data,
        gs: data,
        cr0: 0x8001_0033,
        cr3: 0x1000,
        cr4: 0x620,
        efer: 0xd01,
        ..reset
    }
}
