//! Interrupt lines by hand: every way that KVM has.
#![allow(unsafe_code, reason = "unions that the kernel's interface has")]

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::thread;
use std::thread::JoinHandle;
use std::time::Instant;

use kvm_bindings::KVM_IRQ_ROUTING_IRQCHIP;
use kvm_bindings::KVM_IRQ_ROUTING_MSI;
use kvm_bindings::KVM_IRQCHIP_IOAPIC;
use kvm_bindings::KvmIrqRouting;
use kvm_bindings::kvm_irq_routing_entry;
use kvm_bindings::kvm_irqchip;
use kvm_bindings::kvm_msi;
use kvm_ioctls::VcpuExit;
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::EFD_NONBLOCK;
use vmm_sys_util::eventfd::EventFd;

use super::GDT;
use super::IDT;
use super::LINE;
use super::SAY_PORT;
use super::VECTOR;
use super::interruptible;
use super::raw_kvm::Controllers;
use super::raw_kvm::RawEngine;
use super::raw_kvm::RawKvm;

/// The spurious-interrupt vector register's place in the local APIC's page.
const SVR: usize = 0xf0;

/// Where a message for the local APIC with id 0 is written.
const MESSAGE_ADDRESS: u32 = 0xfee0_0000;

/// A guest as `engines::interrupted` has it, on a thread of its own.
#[derive(Debug)]
pub(crate) struct Interruptible {
    vm: Arc<VmFd>,
    irqfd: EventFd,
    /// When the guest said something.
    pub(crate) said: mpsc::Receiver<Instant>,
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Interruptible {
    /// Starts `code`; `None` where there is no KVM.
    pub(crate) fn start(code: &[u8], controllers: Controllers) -> Option<Self> {
        let engine = RawEngine::new(&mut |_, _| {}).ok()?;
        let machine = RawKvm::new(&engine, interruptible(code), controllers, &mut |_, _| {}).ok()?;
        prepare(&machine).expect("descriptor tables and a local APIC are taken");
        match controllers {
            Controllers::Local => machine.vm.set_gsi_routing(&to_local_apic()).expect("a route is taken"),
            Controllers::All => lead_to_pin(&machine).expect("an IOAPIC is taken"),
        }
        let vm = Arc::clone(&machine.vm);
        let irqfd = EventFd::new(EFD_NONBLOCK).expect("an eventfd");
        vm.register_irqfd(&irqfd, LINE).expect("KVM_IRQFD");
        let (say, said) = mpsc::channel();
        let over = Arc::new(AtomicBool::new(false));
        let stop = Arc::clone(&over);
        let thread = thread::spawn(move || {
            // All of it: the vCPU runs in its memory.
            let mut machine = machine;
            loop {
                match machine.vcpu.run() {
                    Ok(VcpuExit::IoOut(SAY_PORT, _)) if stop.load(Ordering::Acquire) => return,
                    Ok(VcpuExit::IoOut(SAY_PORT, _)) => drop(say.send(Instant::now())),
                    other => panic!("unexpected exit {other:?}"),
                }
            }
        });
        Some(Self { vm, irqfd, said, over, thread: Some(thread) })
    }

    /// Up and down, of a pin of the kernel's IOAPIC.
    pub(crate) fn by_line(&self) {
        self.vm.set_irq_line(LINE, true).expect("KVM_IRQ_LINE");
        self.vm.set_irq_line(LINE, false).expect("KVM_IRQ_LINE");
    }

    /// A message to the local APIC.
    pub(crate) fn by_message(&self) {
        let message = kvm_msi { address_lo: MESSAGE_ADDRESS, data: VECTOR as u32, ..Default::default() };
        self.vm.signal_msi(message).expect("KVM_SIGNAL_MSI");
    }

    /// An eventfd, wherever it leads: the local APIC, or the pin, by way of the kernel's worker.
    pub(crate) fn by_irqfd(&self) {
        self.irqfd.write(1).expect("an eventfd counts");
    }
}

impl Drop for Interruptible {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Release);
        self.by_irqfd();
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the guest's thread ends well");
        }
    }
}

/// Descriptor tables, and a local APIC in x2APIC form that is on.
fn prepare(machine: &RawKvm) -> Result<(), kvm_ioctls::Error> {
    let mut sregs = machine.vcpu.get_sregs()?;
    (sregs.gdt.base, sregs.gdt.limit) = (GDT, 0x1f);
    (sregs.idt.base, sregs.idt.limit) = (IDT, 0xfff);
    sregs.apic_base = 0xfee0_0d00;
    machine.vcpu.set_sregs(&sregs)?;
    let mut lapic = machine.vcpu.get_lapic()?;
    for (n, byte) in 0x1ffu32.to_le_bytes().into_iter().enumerate() {
        lapic.regs[SVR + n] = byte as _;
    }
    machine.vcpu.set_lapic(&lapic)
}

/// The line's route: a message for the local APIC.
pub(super) fn to_local_apic() -> KvmIrqRouting {
    let mut route = kvm_irq_routing_entry { gsi: LINE, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
    route.u.msi.address_lo = MESSAGE_ADDRESS;
    route.u.msi.data = VECTOR as u32;
    KvmIrqRouting::from_entries(&[route]).expect("one entry fits")
}

/// To the pin only: the kernel's own routes also lead to its 8259A pair.
fn lead_to_pin(machine: &RawKvm) -> Result<(), kvm_ioctls::Error> {
    let mut route = kvm_irq_routing_entry { gsi: LINE, type_: KVM_IRQ_ROUTING_IRQCHIP, ..Default::default() };
    route.u.irqchip.irqchip = KVM_IRQCHIP_IOAPIC;
    route.u.irqchip.pin = LINE;
    machine.vm.set_gsi_routing(&KvmIrqRouting::from_entries(&[route]).expect("one entry fits"))?;
    let mut chip = kvm_irqchip { chip_id: KVM_IRQCHIP_IOAPIC, ..Default::default() };
    machine.vm.get_irqchip(&mut chip)?;
    // SAFETY: all members are plain integers of which any bits are a value, and the kernel has written this one.
    unsafe { chip.chip.ioapic.redirtbl[LINE as usize].bits = VECTOR };
    machine.vm.set_irqchip(&chip)
}
