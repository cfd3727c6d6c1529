//! The yardstick of the KVM engine: the same calls to the kernel by hand, and nothing around them.
#![allow(unsafe_code, reason = "KVM is given the address of guest memory")]

use std::time::Duration;
use std::time::Instant;

use kiln::mem::GuestRam;
use kvm_bindings::KVM_IRQ_ROUTING_IRQCHIP;
use kvm_bindings::KVM_IRQCHIP_IOAPIC;
use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_bindings::KvmIrqRouting;
use kvm_bindings::Msrs;
use kvm_bindings::kvm_irq_routing_entry;
use kvm_bindings::kvm_msr_entry;
use kvm_bindings::kvm_regs;
use kvm_bindings::kvm_segment;
use kvm_bindings::kvm_sregs;
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::Kvm;
use kvm_ioctls::VcpuExit;
use kvm_ioctls::VcpuFd;
use kvm_ioctls::VmFd;
use vm_memory::GuestAddress;
use vm_memory::GuestMemoryBackend as _;

use crate::bare::CODE;
use crate::bare::EXIT_PORT;
use crate::bare::STACK;

/// A machine with one vCPU.
#[derive(Debug)]
pub(crate) struct RawKvm {
    // Dropped in this order: the machine before the memory it maps.
    vcpu: VcpuFd,
    _vm: VmFd,
    _ram: GuestRam,
}

impl RawKvm {
    /// Makes a machine over `ram`, ready to run; `step` hears of each call to the kernel.
    pub(crate) fn new(ram: GuestRam, step: &mut dyn FnMut(&'static str, Duration)) -> Result<Self, kvm_ioctls::Error> {
        let mut began = Instant::now();
        let mut took = |call| {
            step(call, began.elapsed());
            began = Instant::now();
        };
        let kvm = Kvm::new()?;
        took("open /dev/kvm");
        let vm = kvm.create_vm()?;
        took("KVM_CREATE_VM");
        let host = ram.memory().get_host_address(GuestAddress(0)).expect("memory begins at zero");
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: ram.size().0,
            userspace_addr: host as u64,
        };
        // SAFETY: the mapping of `ram` is as long as it says from `host` on, and outlives the machine: `RawKvm` drops
        // `_vm` and `vcpu` first.
        unsafe { vm.set_user_memory_region(region) }?;
        took("KVM_SET_USER_MEMORY_REGION");
        vm.set_tss_address(0xfffb_d000)?;
        took("KVM_SET_TSS_ADDR");
        vm.create_irq_chip()?;
        took("KVM_CREATE_IRQCHIP");
        vm.set_gsi_routing(&routing())?;
        took("KVM_SET_GSI_ROUTING");
        let vcpu = vm.create_vcpu(0)?;
        took("KVM_CREATE_VCPU");
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
        took("KVM_GET_SUPPORTED_CPUID");
        vcpu.set_cpuid2(&cpuid)?;
        took("KVM_SET_CPUID2");
        let reset = vcpu.get_sregs()?;
        took("KVM_GET_SREGS");
        vcpu.set_sregs(&long_mode(reset))?;
        took("KVM_SET_SREGS");
        vcpu.set_regs(&kvm_regs { rip: CODE, rsp: STACK, rflags: 2, ..Default::default() })?;
        took("KVM_SET_REGS");
        let pat = kvm_msr_entry { index: 0x277, data: 0x0007_0406_0007_0406, ..Default::default() };
        vcpu.set_msrs(&Msrs::from_entries(&[pat]).expect("one entry fits"))?;
        took("KVM_SET_MSRS");
        let lapic = vcpu.get_lapic()?;
        took("KVM_GET_LAPIC");
        vcpu.set_lapic(&lapic)?;
        took("KVM_SET_LAPIC");
        Ok(Self { vcpu, _vm: vm, _ram: ram })
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

fn routing() -> KvmIrqRouting {
    let entries: Vec<_> = (0..24)
        .map(|pin| {
            let mut entry = kvm_irq_routing_entry { gsi: pin, type_: KVM_IRQ_ROUTING_IRQCHIP, ..Default::default() };
            entry.u.irqchip.irqchip = KVM_IRQCHIP_IOAPIC;
            entry.u.irqchip.pin = pin;
            entry
        })
        .collect();
    KvmIrqRouting::from_entries(&entries).expect("24 entries fit")
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
