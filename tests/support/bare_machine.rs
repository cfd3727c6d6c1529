//! Bare-metal guests in a whole machine: its devices and interrupt controllers, and machine code instead of a kernel.
//!
//! A guest speaks by writing bytes to the serial port, and waits for a word in memory at [`FLAG`]. Everything else is
//! as `bare` has it.
#![allow(dead_code, reason = "each test binary includes this file and uses its part")]

#[path = "engine.rs"]
pub(crate) mod engine;

use std::io::Write;
use std::time::Duration;

use futures::future::Either;
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use kiln::hv::Hypervisor;
use kiln::hv::state::IrqChipState;
use kiln::mem::GuestRam;
use kiln::units::Bytes;
use kiln::vmm::MACHINE_STATE_VERSION;
use kiln::vmm::Machine;
use kiln::vmm::MachineState;
use kiln::vmm::devices::serial::SerialState;
use kiln::vmm::devices::virtio::DeviceState;
use kiln::vmm::devices::virtio::QueueState;
use kiln::vmm::devices::virtio::TransportState;

pub(crate) use engine::engine;

use crate::bare;
use crate::bare::CODE;

/// Far beyond what a guest takes to say something; only one that hangs lets it pass.
const LONG: Duration = Duration::from_secs(30);
/// The size of the guests' memory.
pub(crate) const MEMORY: Bytes = Bytes::mib(4);
/// Where a guest finds what the test tells it.
pub(crate) const FLAG: u64 = 0x8000;
/// Where a guest's interrupt descriptor table lies, and its GDT.
pub(crate) const IDT: u64 = 0x9000;
pub(crate) const GDT: u64 = 0xa000;
/// The data register of the serial port.
pub(crate) const SERIAL: u32 = 0x3f8;

/// Where the code of vCPU number `id` lies.
pub(crate) fn code_of(id: usize) -> u64 {
    CODE + 0x4_0000 * id as u64
}

/// Assembles a program at [`CODE`], with a halt for ever at its end.
pub(crate) fn program(build: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Vec<u8> {
    program_of(0, build)
}

/// As [`program`], for vCPU number `id`.
pub(crate) fn program_of(id: usize, build: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Vec<u8> {
    let assemble = || {
        let mut a = CodeAssembler::new(64)?;
        build(&mut a)?;
        let mut end = a.create_label();
        a.set_label(&mut end)?;
        a.cli()?;
        a.hlt()?;
        a.jmp(end)?;
        a.assemble(code_of(id))
    };
    assemble().expect("the program assembles")
}

/// Writes `byte` to the console; uses RAX and RDX.
pub(crate) fn say(a: &mut CodeAssembler, byte: u8) -> Result<(), IcedError> {
    a.mov(edx, SERIAL)?;
    a.mov(eax, u32::from(byte))?;
    a.out(dx, al)
}

/// Waits until the test has set [`FLAG`].
pub(crate) fn await_flag(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut wait = a.create_label();
    a.set_label(&mut wait)?;
    a.cmp(qword_ptr(FLAG), 0)?;
    a.je(wait)
}

/// Writes an MSR whose value fits 32 bits; uses RAX, RCX and RDX.
pub(crate) fn write_msr(a: &mut CodeAssembler, msr: u32, value: u32) -> Result<(), IcedError> {
    a.mov(ecx, msr)?;
    a.mov(eax, value)?;
    a.xor(edx, edx)?;
    a.wrmsr()
}

/// Switches the local APIC to x2APIC form and enables it.
pub(crate) fn enable_x2apic(a: &mut CodeAssembler) -> Result<(), IcedError> {
    write_msr(a, 0x1b, 0xfee0_0d00)?;
    write_msr(a, 0x80f, 0x1ff)
}

/// Makes `vector` lead to `handler`; uses RAX and RDI.
pub(crate) fn set_gate(a: &mut CodeAssembler, vector: u64, handler: CodeLabel) -> Result<(), IcedError> {
    a.lea(rax, ptr(handler))?;
    a.mov(rdi, IDT + vector * 16)?;
    a.mov(word_ptr(rdi), ax)?;
    // Selector 0x10; an interrupt gate, present.
    a.mov(word_ptr(rdi + 2), 0x10)?;
    a.mov(word_ptr(rdi + 4), 0x8e00u32)?;
    a.shr(rax, 16)?;
    a.mov(word_ptr(rdi + 6), ax)?;
    a.mov(qword_ptr(rdi + 8), 0)
}

/// A device that no driver has met.
pub(crate) fn transport(device_type: u32, config: Vec<u8>, sizes: &[u16], device: DeviceState) -> TransportState {
    let queue = |size: &u16| QueueState {
        size: *size,
        ready: false,
        descriptors: 0,
        driver: 0,
        device: 0,
        next_avail: 0,
        next_used: 0,
    };
    TransportState {
        device_type,
        config,
        status: 0,
        needs_reset: false,
        active: false,
        accepted: 0,
        offered_word: 0,
        accepted_word: 0,
        selected: 0,
        interrupt: 0,
        queues: sizes.iter().map(queue).collect(),
        device,
    }
}

/// A machine without disks that is about to execute `code`.
pub(crate) fn fresh(code: &[u8]) -> (MachineState, GuestRam) {
    fresh_with(&[code.to_vec()])
}

/// A machine without disks, with a vCPU for each of `programs`, each about to execute it.
pub(crate) fn fresh_with(programs: &[Vec<u8>]) -> (MachineState, GuestRam) {
    let ram = GuestRam::new(MEMORY).expect("guest memory");
    bare::map_first_gib(&ram);
    // The gigabyte of the interrupt controllers, one to one: in pages of 2 MiB, which every processor has.
    ram.store(0x2000 + 3 * 8, 0x4003u64).expect("in memory");
    for page in 0..512 {
        ram.store(0x4000 + page * 8, 0xc000_0083 | page << 21).expect("in memory");
    }
    for (id, code) in programs.iter().enumerate() {
        for (at, byte) in (code_of(id)..).zip(code) {
            ram.store(at, *byte).expect("code in memory");
        }
    }
    // A code and a data segment, as the initial state's hidden parts have them.
    for (at, descriptor) in [(GDT + 0x10, 0x00af_9b00_0000_ffffu64), (GDT + 0x18, 0x00cf_9300_0000_ffff)] {
        ram.store(at, descriptor).expect("in memory");
    }
    let vcpu = |id: usize| {
        let mut vcpu = bare::initial_state();
        vcpu.rip = code_of(id);
        vcpu.gpr[4] -= 0x2000 * id as u64;
        vcpu.lapic.id = id as u32;
        if id > 0 {
            vcpu.lapic.apic_base &= !(1 << 8);
        }
        (vcpu.gdtr.base, vcpu.gdtr.limit) = (GDT, 0x1f);
        (vcpu.idtr.base, vcpu.idtr.limit) = (IDT, 0xfff);
        vcpu
    };
    let vsock = DeviceState::Vsock { next_port: 1024, resets_heard_at: None };
    let balloon = DeviceState::Balloon { target: 0, actual: 0, generation: 0, untold: false };
    let state = MachineState {
        version: MACHINE_STATE_VERSION,
        cpu_profile: engine().cpu_profile().to_owned(),
        memory: MEMORY,
        vcpus: (0..programs.len()).map(vcpu).collect(),
        irqchip: IrqChipState::default(),
        serial: SerialState::default(),
        virtio: vec![
            transport(19, 3u64.to_le_bytes().to_vec(), &[256, 256, 16], vsock),
            transport(4, Vec::new(), &[64], DeviceState::Stateless),
            transport(5, Vec::new(), &[64, 64], balloon),
        ],
    };
    (state, ram)
}

/// A machine that executes `code`.
pub(crate) async fn start(code: &[u8]) -> Machine {
    let (state, ram) = fresh(code);
    resumed(&state, ram).await
}

/// A machine with a vCPU for each of `programs`.
pub(crate) async fn start_with(programs: &[Vec<u8>]) -> Machine {
    let (state, ram) = fresh_with(programs);
    resumed(&state, ram).await
}

/// A machine that goes on from `state`.
pub(crate) async fn resumed(state: &MachineState, ram: GuestRam) -> Machine {
    resumed_on(engine().as_ref(), state, ram).await
}

/// A machine that goes on from `state` under `engine`.
pub(crate) async fn resumed_on(engine: &dyn Hypervisor, state: &MachineState, ram: GuestRam) -> Machine {
    let mut machine = Machine::restore(engine, state, ram, &[]).await.expect("a valid state");
    machine.resume();
    machine
}

/// A copy of a paused machine's memory, by way of a file.
pub(crate) fn copy(machine: &Machine) -> GuestRam {
    let mut bytes = vec![0; MEMORY.0 as usize];
    machine.memory().read_bytes(0, &mut bytes).expect("all of it");
    let mut file = tempfile::tempfile().expect("a file");
    file.write_all(&bytes).expect("written");
    GuestRam::from_file(&file, 0, MEMORY).expect("mapped")
}

/// Waits until the guest has said `text`, from its first byte on.
pub(crate) async fn heard(machine: &Machine, text: &str) {
    let mut console = machine.console().follow();
    let first = futures::future::select(Box::pin(console.find(text)), Box::pin(machine.ended()));
    match tokio::time::timeout(LONG, first).await {
        Ok(Either::Left(_)) => {}
        Ok(Either::Right((end, _))) => panic!("{end:?} before {text:?}, after {:?}", machine.console().text()),
        Err(_) => panic!("no {text:?} in {LONG:?}, after {:?}", machine.console().text()),
    }
}

/// Tells a guest that waits at [`FLAG`] to go on.
pub(crate) fn set_flag(machine: &Machine) {
    machine.memory().store(FLAG, 1u64).expect("in memory");
}
