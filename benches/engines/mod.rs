//! The engines of this host, and bare-metal guests under them.
#![allow(dead_code, reason = "each benchmark uses its part")]

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
pub(crate) mod raw_irq;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
pub(crate) mod raw_kvm;

#[path = "../../tests/support/engine.rs"]
mod engine;

use std::num::NonZeroU8;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread;
use std::thread::JoinHandle;
use std::time::Duration;
use std::time::Instant;

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use kiln::hv::Exit;
use kiln::hv::HvVm;
use kiln::hv::Hypervisor;
use kiln::hv::IoHandler;
use kiln::hv::Kick;
use kiln::hv::VmSpec;
use kiln::hv::soft::Soft;
use kiln::hv::state::VcpuState;
use kiln::mem::GuestRam;
use kiln::units::Bytes;
use kiln::units::GuestAddr;
use kiln::units::VcpuId;

use crate::bare;
use crate::bare::CODE;
use crate::bare::EXIT_PORT;
use crate::support::Sample;

/// The memory of the guests.
pub(crate) const MEMORY: Bytes = Bytes::mib(64);
/// The port at which a guest says that it got somewhere.
pub(crate) const SAY_PORT: u16 = 0xe9;
/// The line and the vector of the interrupt that guests take.
pub(crate) const LINE: u32 = 5;
const VECTOR: u64 = 0x40;
const IDT: u64 = 0x9000;
const GDT: u64 = 0xa000;

/// The engines that run here, by name; says why one does not.
pub(crate) fn engines() -> Vec<(&'static str, Arc<dyn Hypervisor>)> {
    let soft: Arc<dyn Hypervisor> = Arc::new(Soft::new());
    let kvm = engine::kvm().inspect_err(|error| crate::support::note(&format!("kvm: not measured: {error}")));
    std::iter::once(("soft", soft)).chain(kvm.map(|kvm| ("kvm", kvm))).collect()
}

/// Assembles a program at [`CODE`].
pub(crate) fn program(build: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Vec<u8> {
    let assemble = || {
        let mut a = CodeAssembler::new(64)?;
        build(&mut a)?;
        a.assemble(CODE)
    };
    assemble().expect("the program assembles")
}

/// Ends the guest's run.
pub(crate) fn leave(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(dx, u32::from(EXIT_PORT))?;
    a.out(dx, al)?;
    a.hlt()
}

/// Memory with page tables and `code`.
pub(crate) fn memory(code: &[u8]) -> GuestRam {
    let ram = GuestRam::new(MEMORY).expect("guest memory");
    bare::map_first_gib(&ram);
    for (at, byte) in (CODE..).zip(code) {
        ram.store(at, *byte).expect("code in memory");
    }
    ram
}

/// Memory with page tables, segments and `code`.
fn interruptible(code: &[u8]) -> GuestRam {
    let ram = memory(code);
    for (at, descriptor) in [(GDT + 0x10, 0x00af_9b00_0000_ffffu64), (GDT + 0x18, 0x00cf_9300_0000_ffff)] {
        ram.store(at, descriptor).expect("in memory");
    }
    ram
}

/// Waits for an interrupt in HLT or, `spinning`, in a loop; its handler says so each time.
pub(crate) fn interrupted(spinning: bool) -> Vec<u8> {
    program(|a| {
        let (mut handler, mut wait) = (a.create_label(), a.create_label());
        a.lea(rax, ptr(handler))?;
        a.mov(word_ptr(IDT + VECTOR * 16), ax)?;
        // Selector 0x10; an interrupt gate, present. The rest of the table is zero.
        a.mov(word_ptr(IDT + VECTOR * 16 + 2), 0x10u32)?;
        a.mov(word_ptr(IDT + VECTOR * 16 + 4), 0x8e00u32)?;
        a.shr(rax, 16)?;
        a.mov(word_ptr(IDT + VECTOR * 16 + 6), ax)?;
        a.out(u32::from(SAY_PORT), al)?;
        a.sti()?;
        a.set_label(&mut wait)?;
        if spinning {
            a.nop()?;
        } else {
            a.hlt()?;
        }
        a.jmp(wait)?;
        a.set_label(&mut handler)?;
        a.out(u32::from(SAY_PORT), al)?;
        // x2APIC's end of interrupt.
        a.mov(ecx, 0x80bu32)?;
        a.xor(eax, eax)?;
        a.xor(edx, edx)?;
        a.wrmsr()?;
        a.iretq()
    })
}

/// Says when the guest said something.
#[derive(Debug)]
struct Listener(mpsc::Sender<Instant>);

impl IoHandler for Listener {
    fn mmio_read(&mut self, _addr: GuestAddr, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn mmio_write(&mut self, _addr: GuestAddr, _data: &[u8]) {}

    fn pio_in(&mut self, _port: u16, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn pio_out(&mut self, port: u16, _data: &[u8]) {
        if port == SAY_PORT {
            // The benchmark may be over.
            let _ = self.0.send(Instant::now());
        }
    }
}

/// A guest that runs on a thread of its own. Each kick ends a run, and [`again`](Self::again) begins the next.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) vm: Box<dyn HvVm>,
    pub(crate) kick: Arc<dyn Kick>,
    /// When the guest said something.
    pub(crate) said: mpsc::Receiver<Instant>,
    /// When a run ended.
    pub(crate) stopped: mpsc::Receiver<Instant>,
    again: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Running {
    /// Starts `code`, whose interrupt line leads to the handler of [`interrupted`].
    pub(crate) fn start(engine: &dyn Hypervisor, code: &[u8]) -> Self {
        let ram = Arc::new(interruptible(code));
        let vm = engine.create_vm(&VmSpec { vcpus: NonZeroU8::MIN }, ram).expect("machine");
        let seed = vm.create_vcpu(VcpuId(0)).expect("vCPU");
        let kick = seed.kicker();
        let mut irqchip = vm.save_irqchip().expect("controllers");
        irqchip.ioapic.redirections[LINE as usize] = VECTOR;
        vm.restore_irqchip(&irqchip).expect("controllers");
        let (say, said) = mpsc::channel();
        let (stop, stopped) = mpsc::channel();
        let (again, runs) = mpsc::channel();
        let thread = thread::spawn(move || {
            let mut vcpu = seed.bind(Box::new(Listener(say))).expect("bound");
            vcpu.restore(&listening_state()).expect("a valid state");
            while runs.recv().is_ok() {
                let exit = vcpu.run().expect("the guest runs");
                let now = Instant::now();
                assert_eq!(exit, Exit::Kicked);
                let _ = stop.send(now);
            }
        });
        let running = Self { vm, kick, said, stopped, again: Some(again), thread: Some(thread) };
        running.again();
        running
    }

    /// Begins the next run.
    pub(crate) fn again(&self) {
        self.again.as_ref().expect("until dropped").send(()).expect("the thread waits");
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.again = None;
        self.kick.kick();
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the guest's thread ends well");
        }
    }
}

/// The initial state with descriptor tables and an enabled local APIC in x2APIC form.
fn listening_state() -> VcpuState {
    let mut state = bare::initial_state();
    (state.gdtr.base, state.gdtr.limit) = (GDT, 0x1f);
    (state.idtr.base, state.idtr.limit) = (IDT, 0xfff);
    state.lapic.apic_base = 0xfee0_0d00;
    state.lapic.svr = 0x1ff;
    state
}

/// The yardstick of what wakes a vCPU: a parked thread of the host, from the call to its first instruction.
pub(crate) fn unpark(rounds: usize) -> Sample {
    let mut sample = Sample::new("a parked thread");
    let (say, said) = mpsc::channel();
    let thread = thread::spawn(move || {
        for _ in 0..rounds {
            thread::park();
            let _ = say.send(Instant::now());
        }
    });
    for _ in 0..rounds {
        thread::sleep(PAUSE);
        let began = Instant::now();
        thread.thread().unpark();
        let woken = said.recv().expect("the thread wakes");
        sample.add(woken.saturating_duration_since(began));
    }
    thread.join().expect("it ends");
    sample
}

/// Between two rounds, so that a guest or a thread is where it waits.
pub(crate) const PAUSE: Duration = Duration::from_millis(2);
