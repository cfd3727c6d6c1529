//! Bare-metal guests with several vCPUs under the soft engine, each on its thread, over one memory.
//!
//! As `bare` has it, but each vCPU has its code and its stack. A vCPU ends its run by `out` to the exit port.
#![allow(dead_code, reason = "each test binary includes this file and uses its part")]

use std::num::NonZeroU8;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use kiln::hv::Exit;
use kiln::hv::HvError;
use kiln::hv::HvVm;
use kiln::hv::Hypervisor;
use kiln::hv::IoHandler;
use kiln::hv::Kick;
use kiln::hv::Vcpu;
use kiln::hv::VmSpec;
use kiln::hv::soft::Soft;
use kiln::hv::state::VcpuState;
use kiln::mem::GuestRam;
use kiln::units::Bytes;
use kiln::units::GuestAddr;
use kiln::units::VcpuId;
use vm_memory::{Bytes as _, GuestAddress};

use crate::bare;
use crate::bare::EXIT_PORT;

/// Each vCPU's code begins a page of its own here.
pub(crate) const CODE: u64 = 0x10_0000;
const CODE_SIZE: u64 = 0x1_0000;
/// Each has a stack.
const STACKS: u64 = 0x20_0000;
const STACK_SIZE: u64 = 0x4000;
/// For tables, and data that vCPUs share.
const GDT: u64 = 0xa000;
pub(crate) const IDT: u64 = 0xb000;
pub(crate) const DATA: u64 = 0x30_0000;
/// Counts the vCPUs that have begun.
const BEGUN: u64 = DATA;
/// Tells the test that a guest has come somewhere, and lets it wait.
pub(crate) const WAIT_PORT: u16 = 0xf5;
/// For work of milliseconds, on a host that is busy with something else.
pub(crate) const LONG: Duration = Duration::from_secs(120);

pub(crate) const RAX: usize = 0;
pub(crate) const R12: usize = 12;
pub(crate) const R13: usize = 13;
pub(crate) const RSP: usize = 4;

pub(crate) type Assembled = Result<(), IcedError>;

/// Where the code of vCPU `id` is.
pub(crate) fn code_of(id: usize) -> u64 {
    CODE + id as u64 * CODE_SIZE
}

/// Assembles a program for vCPU `id`, which ends at the exit port.
pub(crate) fn program(id: usize, build: impl FnOnce(&mut CodeAssembler) -> Assembled) -> Vec<u8> {
    let assemble = || {
        let mut a = CodeAssembler::new(64)?;
        build(&mut a)?;
        a.mov(edx, u32::from(EXIT_PORT))?;
        a.out(dx, al)?;
        let mut end = a.create_label();
        a.set_label(&mut end)?;
        a.hlt()?;
        a.jmp(end)?;
        a.assemble(code_of(id))
    };
    assemble().expect("the program assembles")
}

/// Waits until all of `vcpus` have come here, so that what follows overlaps.
pub(crate) fn begin_together(a: &mut CodeAssembler, vcpus: usize) -> Assembled {
    let mut wait = a.create_label();
    a.lock().inc(dword_ptr(BEGUN))?;
    a.set_label(&mut wait)?;
    a.pause()?;
    a.cmp(dword_ptr(BEGUN), vcpus as i32)?;
    a.jb(wait)
}

/// Spins until the quadword at `at` is `value`'s, or past it.
pub(crate) fn await_value(a: &mut CodeAssembler, at: u64, value: AsmRegister64) -> Assembled {
    let mut wait = a.create_label();
    a.set_label(&mut wait)?;
    a.pause()?;
    a.cmp(qword_ptr(at), value)?;
    a.jb(wait)
}

#[derive(Debug)]
struct Ports {
    kick: Arc<dyn Kick>,
    waits: Option<(mpsc::Sender<()>, mpsc::Receiver<()>)>,
}

impl IoHandler for Ports {
    fn mmio_read(&mut self, _: GuestAddr, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&mut self, _: GuestAddr, _: &[u8]) {}
    fn pio_in(&mut self, _: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn pio_out(&mut self, port: u16, _: &[u8]) {
        if port == EXIT_PORT {
            self.kick.kick();
        }
        if port == WAIT_PORT
            && let Some((here, go_on)) = &self.waits
        {
            let _ = here.send(());
            let _ = go_on.recv();
        }
    }
}

/// A machine that has not begun.
pub(crate) struct Smp {
    pub(crate) ram: Arc<GuestRam>,
    pub(crate) vm: Box<dyn HvVm>,
    states: Vec<VcpuState>,
}

impl Smp {
    /// One vCPU for each of `programs`.
    pub(crate) fn new(programs: &[Vec<u8>]) -> Self {
        let ram = GuestRam::new(Bytes::mib(8)).expect("guest memory");
        bare::map_first_gib(&ram);
        for (id, code) in programs.iter().enumerate() {
            assert!(code.len() < CODE_SIZE as usize);
            for (at, byte) in (code_of(id)..).zip(code) {
                ram.store(at, *byte).expect("in memory");
            }
        }
        for (at, descriptor) in [(GDT + 0x10, 0x00af_9b00_0000_ffffu64), (GDT + 0x18, 0x00cf_9300_0000_ffff)] {
            ram.store(at, descriptor).expect("in memory");
        }
        Self::over(ram, (0..programs.len()).map(state).collect())
    }

    pub(crate) fn over(ram: GuestRam, states: Vec<VcpuState>) -> Self {
        let ram = Arc::new(ram);
        let vcpus = NonZeroU8::new(states.len() as u8).expect("a vCPU");
        let vm = Soft::new().create_vm(&VmSpec { vcpus }, Arc::clone(&ram)).expect("a machine");
        Self { ram, vm, states }
    }

    pub(crate) fn number(&self, at: u64) -> u64 {
        self.ram.load(at).expect("in memory")
    }

    pub(crate) fn vcpu(&self, id: usize) -> Box<dyn Vcpu> {
        let seed = self.vm.create_vcpu(VcpuId(id as u8)).expect("a vCPU");
        let kick = seed.kicker();
        let mut vcpu = seed.bind(Box::new(Ports { kick, waits: None })).expect("bound");
        vcpu.restore(&self.states[id]).expect("a valid state");
        vcpu
    }

    /// Starts all vCPUs, each on its thread.
    pub(crate) fn start(&self) -> Running {
        let (send, ended) = mpsc::channel();
        let (mut kicks, mut waits) = (Vec::new(), Vec::new());
        for (id, state) in self.states.iter().cloned().enumerate() {
            let seed = self.vm.create_vcpu(VcpuId(id as u8)).expect("a vCPU");
            let (kick, send) = (seed.kicker(), send.clone());
            let (here, is_here) = mpsc::channel();
            let (go_on, goes_on) = mpsc::channel();
            let ports = Ports { kick: Arc::clone(&kick), waits: Some((here, goes_on)) };
            kicks.push(kick);
            waits.push((is_here, go_on));
            thread::spawn(move || {
                let run = || {
                    let mut vcpu = seed.bind(Box::new(ports))?;
                    vcpu.restore(&state)?;
                    let exit = vcpu.run()?;
                    Ok::<_, HvError>((exit, vcpu.save()?))
                };
                // Nobody listens after a failure.
                let _ = send.send((id, run()));
            });
        }
        Running { ended, kicks, waits, left: self.states.len() }
    }

    /// Runs all vCPUs to their ends, and gives their states.
    pub(crate) fn run(&self) -> Vec<VcpuState> {
        self.start().finish()
    }

    /// Writes as a device does, which processors hear of.
    pub(crate) fn device_writes(&self, at: u64, bytes: &[u8]) {
        self.ram.memory().write_slice(bytes, GuestAddress(at)).expect("in memory");
    }
}

type End = (usize, Result<(Exit, VcpuState), HvError>);

pub(crate) struct Running {
    ended: mpsc::Receiver<End>,
    pub(crate) kicks: Vec<Arc<dyn Kick>>,
    /// Says that a guest waits, and lets it go on.
    pub(crate) waits: Vec<(mpsc::Receiver<()>, mpsc::Sender<()>)>,
    left: usize,
}

impl Running {
    /// Waits until all have ended; their states.
    pub(crate) fn finish(self) -> Vec<VcpuState> {
        let mut states: Vec<_> = self.collect();
        states.sort_by_key(|(id, _)| *id);
        states.into_iter().map(|(_, state)| state).collect()
    }
}

impl Iterator for Running {
    type Item = (usize, VcpuState);

    /// The next vCPU that ends.
    fn next(&mut self) -> Option<Self::Item> {
        self.left = self.left.checked_sub(1)?;
        let Ok((id, end)) = self.ended.recv_timeout(LONG) else {
            self.kicks.iter().for_each(|kick| kick.kick());
            let stuck: Vec<_> = self.ended.iter().take(self.left + 1).collect();
            panic!("did not come to an end: {stuck:x?}");
        };
        let (exit, state) = end.expect("the engine can do it");
        assert_eq!(exit, Exit::Kicked, "vCPU {id}");
        Some((id, state))
    }
}

/// The state in which vCPU `id` begins.
pub(crate) fn state(id: usize) -> VcpuState {
    let mut state = bare::initial_state();
    state.rip = code_of(id);
    state.gpr[RSP] = STACKS + (id as u64 + 1) * STACK_SIZE;
    state.lapic.id = id as u32;
    if id > 0 {
        state.lapic.apic_base &= !(1 << 8);
    }
    (state.gdtr.base, state.gdtr.limit) = (GDT, 0x1f);
    (state.idtr.base, state.idtr.limit) = (IDT, 0xfff);
    state
}

/// Repeats `body`, which keeps R15, `times`.
pub(crate) fn repeat(
    a: &mut CodeAssembler,
    times: u32,
    body: impl FnOnce(&mut CodeAssembler) -> Assembled,
) -> Assembled {
    let mut top = a.create_label();
    a.mov(r15d, times)?;
    a.set_label(&mut top)?;
    // An instruction has one label, and the body may begin with one.
    a.nop()?;
    body(a)?;
    a.dec(r15d)?;
    a.jne(top)
}
