//! Small guests under the engine, and what they ask of their devices.

use std::io::Write as _;
use std::num::NonZeroU8;
use std::sync::mpsc;
use std::sync::{Arc, Mutex, OnceLock};
use std::thread;
use std::time::Duration;

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use kiln::hv::kvm::Kvm;
use kiln::hv::state::VcpuState;
use kiln::hv::state::x86_64::Table;
use kiln::hv::{Exit, HvError, HvVm, Hypervisor, IoHandler, Kick, Vcpu, VmSpec};
use kiln::mem::GuestRam;
use kiln::units::{Bytes, GuestAddr, VcpuId};

use crate::bare;
use crate::bare::{CODE, EXIT_PORT};

/// The engine; `None`, after saying why, where there is none.
pub(crate) fn engine(test: &str) -> Option<Kvm> {
    match Kvm::new() {
        Ok(kvm) => Some(kvm),
        Err(error @ (HvError::Unavailable(_) | HvError::Missing { .. })) => {
            let why =
                std::error::Error::source(&error).map_or_else(|| error.to_string(), |why| format!("{error}: {why}"));
            // Not by a macro, whose output the harness keeps to itself when a test passes.
            let _ = std::io::stderr().write_all(format!("{test}: not run: {why}\n").as_bytes());
            None
        }
        Err(error) => panic!("{test}: {error}"),
    }
}

/// Whether the host's KVM leaves guests the host's own time stamp counter, which cannot be set and does not stand still.
pub(crate) fn is_fixed(kvm: &Kvm) -> bool {
    kvm.cpu_profile().ends_with("-fixed")
}

/// What a guest asked of its devices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Access {
    In(u16, usize),
    Out(u16, Vec<u8>),
    Read(u64, usize),
    Write(u64, Vec<u8>),
}

/// Notes accesses, answers reads with 0xa1, 0xa2, ..., and kicks at the exit port.
#[derive(Debug, Clone, Default)]
pub(crate) struct Recorder {
    pub(crate) seen: Arc<Mutex<Vec<Access>>>,
    pub(crate) kick: Arc<OnceLock<Arc<dyn Kick>>>,
}

impl Recorder {
    pub(crate) fn note(&self, access: Access) {
        self.seen.lock().unwrap().push(access);
    }

    pub(crate) fn take(&self) -> Vec<Access> {
        std::mem::take(&mut self.seen.lock().unwrap())
    }
}

pub(crate) fn answer(data: &mut [u8]) {
    data.iter_mut().zip(0xa1..).for_each(|(byte, value)| *byte = value);
}

impl IoHandler for Recorder {
    fn mmio_read(&mut self, addr: GuestAddr, data: &mut [u8]) {
        self.note(Access::Read(addr.0, data.len()));
        answer(data);
    }
    fn mmio_write(&mut self, addr: GuestAddr, data: &[u8]) {
        self.note(Access::Write(addr.0, data.to_vec()));
    }
    fn pio_in(&mut self, port: u16, data: &mut [u8]) {
        self.note(Access::In(port, data.len()));
        answer(data);
    }
    fn pio_out(&mut self, port: u16, data: &[u8]) {
        if port == EXIT_PORT {
            self.kick.get().expect("set before the run").kick();
        } else {
            self.note(Access::Out(port, data.to_vec()));
        }
    }
}

pub(crate) struct Guest {
    pub(crate) ram: Arc<GuestRam>,
    pub(crate) vm: Box<dyn HvVm>,
    pub(crate) vcpu: Box<dyn Vcpu>,
    pub(crate) io: Recorder,
    pub(crate) kick: Arc<dyn Kick>,
}

/// A guest with memory of the usual layout, and the GiB of devices mapped to itself; no vCPU has a state yet.
pub(crate) fn memory(code: &[u8]) -> Arc<GuestRam> {
    let ram = GuestRam::new(Bytes::mib(16)).expect("guest memory");
    bare::map_first_gib(&ram);
    ram.store(0x2000 + 3 * 8, 0x4003u64).unwrap();
    for n in 0..512u64 {
        ram.store(0x4000 + n * 8, 0xc000_0000 | n << 21 | 0x83).unwrap();
    }
    for (at, byte) in (CODE..).zip(code) {
        ram.store(at, *byte).unwrap();
    }
    Arc::new(ram)
}

pub(crate) fn attach(vm: &dyn HvVm, id: u8) -> (Box<dyn Vcpu>, Recorder, Arc<dyn Kick>) {
    let seed = vm.create_vcpu(VcpuId(id)).expect("vcpu");
    let (io, kick) = (Recorder::default(), seed.kicker());
    io.kick.set(Arc::clone(&kick)).unwrap();
    (seed.bind(Box::new(io.clone())).expect("bind"), io, kick)
}

impl Guest {
    pub(crate) fn new(engine: &dyn Hypervisor, code: &[u8]) -> Self {
        Self::on(engine, memory(code), 1, &bare::initial_state())
    }

    pub(crate) fn on(engine: &dyn Hypervisor, ram: Arc<GuestRam>, vcpus: u8, state: &VcpuState) -> Self {
        let vcpus = NonZeroU8::new(vcpus).expect("one at least");
        let vm = engine.create_vm(&VmSpec { vcpus }, Arc::clone(&ram)).expect("machine");
        let (mut vcpu, io, kick) = attach(&*vm, 0);
        vcpu.restore(state).expect("a valid state");
        Self { ram, vm, vcpu, io, kick }
    }

    /// Runs, and is kicked from another thread after `after` if it has not left by then.
    pub(crate) fn run_for(&mut self, after: Duration) -> Exit {
        let kick = Arc::clone(&self.kick);
        let (left, leaves) = mpsc::channel::<()>();
        thread::scope(|scope| {
            scope.spawn(move || {
                if leaves.recv_timeout(after) == Err(mpsc::RecvTimeoutError::Timeout) {
                    kick.kick();
                }
            });
            let exit = self.vcpu.run().expect("a run");
            drop(left);
            exit
        })
    }
}

/// Where handlers count.
pub(crate) const COUNTER: u64 = 0x8000;

pub(crate) const IDT: u64 = 0x9000;

pub(crate) const GDT: u64 = 0xa000;

/// Where the handler of all vectors lies.
pub(crate) const HANDLER: u64 = CODE + 0x1000;

pub(crate) const LAPIC: u64 = 0xfee0_0000;

/// What no guest of these takes that is not lost.
pub(crate) const LONG: Duration = Duration::from_secs(20);

/// A state in which interrupts find a handler, and the local APIC is enabled.
pub(crate) fn with_interrupts(ram: &GuestRam) -> VcpuState {
    for (at, descriptor) in [(GDT + 0x10, 0x00af_9b00_0000_ffffu64), (GDT + 0x18, 0x00cf_9300_0000_ffff)] {
        ram.store(at, descriptor).unwrap();
    }
    for vector in 0..256 {
        ram.store(IDT + vector * 16, HANDLER & 0xffff | 0x10 << 16 | 0x8e << 40 | (HANDLER >> 16) << 48).unwrap();
        ram.store(IDT + vector * 16 + 8, 0u64).unwrap();
    }
    let mut state = bare::initial_state();
    state.gdtr = Table { base: GDT, limit: 0x1f };
    state.idtr = Table { base: IDT, limit: 0xfff };
    state.lapic.svr = 0x1ff;
    state
}

/// Puts a handler for all vectors into memory: counts, ends the interrupt, leaves by the exit port and returns.
pub(crate) fn add_handler(ram: &GuestRam) {
    let build = || {
        let mut a = CodeAssembler::new(64)?;
        a.mov(rbx, COUNTER)?;
        a.inc(qword_ptr(rbx))?;
        a.mov(rbx, LAPIC + 0xb0)?;
        a.mov(dword_ptr(rbx), 0)?;
        a.mov(dx, u32::from(EXIT_PORT))?;
        a.out(dx, al)?;
        a.iretq()?;
        a.assemble(HANDLER)
    };
    for (at, byte) in (HANDLER..).zip(build().expect("the handler assembles")) {
        ram.store(at, byte).unwrap();
    }
}

/// A guest that waits in HLT, with interrupts on.
pub(crate) fn halting(engine: &dyn Hypervisor) -> Guest {
    let code = raw(|a| {
        let mut again = a.create_label();
        a.sti()?;
        a.set_label(&mut again)?;
        a.hlt()?;
        a.jmp(again)
    });
    let ram = memory(&code);
    add_handler(&ram);
    let state = with_interrupts(&ram);
    Guest::on(engine, ram, 1, &state)
}

pub(crate) fn raw(build: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Vec<u8> {
    let assemble = || {
        let mut a = CodeAssembler::new(64)?;
        build(&mut a)?;
        a.assemble(CODE)
    };
    assemble().expect("the program assembles")
}

/// `jmp $`.
pub(crate) const SPIN: [u8; 2] = [0xeb, 0xfe];

pub(crate) const LEVEL: u64 = 1 << 15;
