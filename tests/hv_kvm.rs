//! The KVM engine, through the seam. On a host without a usable `/dev/kvm` each test says that it was not run, and why.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

use std::num::NonZeroU8;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::OnceLock;

use iced_x86::code_asm::*;
use kiln::hv::kvm::Kvm;
use kiln::hv::{Exit, HvError, HvVm, Hypervisor, IoHandler, Kick, Vcpu, VmSpec};
use kiln::mem::GuestRam;
use kiln::units::{Bytes, GuestAddr, VcpuId};

#[path = "support/bare.rs"]
mod bare;

use bare::{CODE, EXIT_PORT};

/// The engine; `None`, after saying why, where there is none.
#[allow(clippy::print_stderr, reason = "a test that was not run is to be seen")]
fn engine(test: &str) -> Option<Kvm> {
    match Kvm::new() {
        Ok(kvm) => Some(kvm),
        Err(error @ (HvError::Unavailable(_) | HvError::Missing { .. })) => {
            eprintln!("{test}: not run: {error}");
            None
        }
        Err(error) => panic!("{test}: {error}"),
    }
}

/// What a guest asked of its devices.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Access {
    In(u16, usize),
    Out(u16, Vec<u8>),
    Read(u64, usize),
    Write(u64, Vec<u8>),
}

/// Notes accesses, answers reads with 0xa1, 0xa2, ..., and kicks at the exit port.
#[derive(Debug, Clone, Default)]
struct Recorder {
    seen: Arc<Mutex<Vec<Access>>>,
    kick: Arc<OnceLock<Arc<dyn Kick>>>,
}

impl Recorder {
    fn note(&self, access: Access) {
        self.seen.lock().unwrap().push(access);
    }

    fn take(&self) -> Vec<Access> {
        std::mem::take(&mut self.seen.lock().unwrap())
    }
}

fn answer(data: &mut [u8]) {
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

struct Guest {
    ram: Arc<GuestRam>,
    vm: Box<dyn HvVm>,
    vcpu: Box<dyn Vcpu>,
    io: Recorder,
    kick: Arc<dyn Kick>,
}

/// A guest with memory of the usual layout, and the GiB of devices mapped to itself; no vCPU has a state yet.
fn memory(code: &[u8]) -> Arc<GuestRam> {
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

fn attach(vm: &dyn HvVm, id: u8) -> (Box<dyn Vcpu>, Recorder, Arc<dyn Kick>) {
    let seed = vm.create_vcpu(VcpuId(id)).expect("vcpu");
    let (io, kick) = (Recorder::default(), seed.kicker());
    io.kick.set(Arc::clone(&kick)).unwrap();
    (seed.bind(Box::new(io.clone())).expect("bind"), io, kick)
}

impl Guest {
    fn new(engine: &dyn Hypervisor, code: &[u8]) -> Self {
        let ram = memory(code);
        let vm = engine.create_vm(&VmSpec { vcpus: NonZeroU8::MIN }, Arc::clone(&ram)).expect("machine");
        let (mut vcpu, io, kick) = attach(&*vm, 0);
        vcpu.restore(&bare::initial_state()).expect("a valid state");
        Self { ram, vm, vcpu, io, kick }
    }
}

fn assemble(build: impl FnOnce(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>) -> Vec<u8> {
    let assemble = || {
        let mut a = CodeAssembler::new(64)?;
        build(&mut a)?;
        a.mov(dx, u32::from(EXIT_PORT))?;
        a.out(dx, al)?;
        a.hlt()?;
        a.assemble(CODE)
    };
    assemble().expect("the program assembles")
}

#[test]
fn a_guest_runs_and_leaves() {
    let Some(kvm) = engine("a_guest_runs_and_leaves") else { return };
    let code = assemble(|a| {
        a.mov(rax, 6u64)?;
        a.mov(rbx, 7u64)?;
        a.imul_2(rbx, rax)
    });
    let mut guest = Guest::new(&kvm, &code);
    assert_eq!(guest.vcpu.run().unwrap(), Exit::Kicked);
    let state = guest.vcpu.save().unwrap();
    assert_eq!(state.gpr[3], 42);
    assert_eq!(state.rip, CODE + code.len() as u64 - 1, "past the port, before the halt");
}
