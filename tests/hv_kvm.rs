//! The KVM engine, through the seam. On a host without a usable `/dev/kvm` each test says that it was not run, and why.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

use std::num::NonZeroU8;
use std::sync::mpsc;
use std::sync::{Arc, Mutex, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use kiln::hv::kvm::{Kvm, Profile};
use kiln::hv::soft::Soft;
use kiln::hv::state::irqchip::IoApicState;
use kiln::hv::state::x86_64::{Activity, Delivery, DeliverySource, Events, Fpu, Lapic, Msrs, Segment, Table};
use kiln::hv::state::{IrqChipState, VcpuState};
use kiln::hv::{Exit, HvError, HvVm, Hypervisor, IoHandler, Kick, Vcpu, VmSpec};
use kiln::mem::GuestRam;
use kiln::units::{Bytes, Gsi, GuestAddr, VcpuId};
use kiln::vmm::{Machine, MachineState};

#[path = "support/bare.rs"]
mod bare;
#[path = "support/bare_machine.rs"]
mod bare_machine;

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

/// Whether the host's KVM leaves guests the host's own time stamp counter, which cannot be set and does not stand still.
fn is_fixed(kvm: &Kvm) -> bool {
    kvm.cpu_profile().ends_with("-fixed")
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
        Self::on(engine, memory(code), 1, &bare::initial_state())
    }

    fn on(engine: &dyn Hypervisor, ram: Arc<GuestRam>, vcpus: u8, state: &VcpuState) -> Self {
        let vcpus = NonZeroU8::new(vcpus).expect("one at least");
        let vm = engine.create_vm(&VmSpec { vcpus }, Arc::clone(&ram)).expect("machine");
        let (mut vcpu, io, kick) = attach(&*vm, 0);
        vcpu.restore(state).expect("a valid state");
        Self { ram, vm, vcpu, io, kick }
    }

    /// Runs, and is kicked from another thread after `after`.
    fn run_for(&mut self, after: Duration) -> Exit {
        let kick = Arc::clone(&self.kick);
        thread::scope(|scope| {
            scope.spawn(move || {
                thread::sleep(after);
                kick.kick();
            });
            self.vcpu.run().expect("a run")
        })
    }
}

/// Where handlers count.
const COUNTER: u64 = 0x8000;
const IDT: u64 = 0x9000;
const GDT: u64 = 0xa000;
/// Where the handler of all vectors lies.
const HANDLER: u64 = CODE + 0x1000;
const LAPIC: u64 = 0xfee0_0000;
/// What no guest of these takes that is not lost.
const LONG: Duration = Duration::from_secs(20);

/// A state in which interrupts find a handler, and the local APIC is enabled.
fn with_interrupts(ram: &GuestRam) -> VcpuState {
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
fn add_handler(ram: &GuestRam) {
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
fn halting(engine: &dyn Hypervisor) -> Guest {
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

fn raw(build: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Vec<u8> {
    let assemble = || {
        let mut a = CodeAssembler::new(64)?;
        build(&mut a)?;
        a.assemble(CODE)
    };
    assemble().expect("the program assembles")
}

/// `jmp $`.
const SPIN: [u8; 2] = [0xeb, 0xfe];

fn assemble(build: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Vec<u8> {
    raw(|a| {
        build(a)?;
        a.mov(dx, u32::from(EXIT_PORT))?;
        a.out(dx, al)?;
        a.hlt()
    })
}

#[test]
fn profiles_say_what_they_show_or_what_is_missing() {
    let Some(kvm) = engine("profiles_say_what_they_show_or_what_is_missing") else { return };
    let host = Kvm::with_profile(Profile::Host).unwrap();
    assert!(host.cpu_profile().starts_with("host-"), "{}", host.cpu_profile());
    assert_eq!(host.cpu_profile(), Kvm::with_profile(Profile::Host).unwrap().cpu_profile());
    match Kvm::with_profile(Profile::Baseline) {
        Ok(baseline) => {
            assert!(baseline.cpu_profile().starts_with(Soft::new().cpu_profile()));
            assert_eq!(kvm.cpu_profile(), baseline.cpu_profile());
        }
        Err(HvError::Missing { what }) => {
            assert!(!what.is_empty());
            assert_eq!(kvm.cpu_profile(), host.cpu_profile());
        }
        Err(error) => panic!("{error}"),
    }
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

#[test]
fn ports_are_served_at_each_width() {
    let Some(kvm) = engine("ports_are_served_at_each_width") else { return };
    let code = assemble(|a| {
        a.mov(dx, 0x300)?;
        a.mov(eax, 0x1122_3344)?;
        a.out(dx, al)?;
        a.out(dx, ax)?;
        a.out(dx, eax)?;
        a.mov(rax, u64::MAX)?;
        a.in_(al, dx)?;
        a.mov(rbx, rax)?;
        a.in_(ax, dx)?;
        a.mov(rcx, rax)?;
        a.in_(eax, dx)?;
        a.mov(rsi, rax)
    });
    let mut guest = Guest::new(&kvm, &code);
    assert_eq!(guest.vcpu.run().unwrap(), Exit::Kicked);
    let out = |bytes: &[u8]| Access::Out(0x300, bytes.to_vec());
    let expected = [
        out(&[0x44]),
        out(&[0x44, 0x33]),
        out(&[0x44, 0x33, 0x22, 0x11]),
        Access::In(0x300, 1),
        Access::In(0x300, 2),
        Access::In(0x300, 4),
    ];
    assert_eq!(guest.io.take(), expected);
    let state = guest.vcpu.save().unwrap();
    assert_eq!(
        [3, 1, 6].map(|register| state.gpr[register]),
        [0xffff_ffff_ffff_ffa1, 0xffff_ffff_ffff_a2a1, 0xa4a3_a2a1]
    );
}

#[test]
fn string_ports_move_one_element_at_a_time() {
    let Some(kvm) = engine("string_ports_move_one_element_at_a_time") else { return };
    let code = assemble(|a| {
        a.cld()?;
        a.mov(dx, 0x300)?;
        a.mov(rsi, COUNTER)?;
        a.mov(ecx, 3)?;
        a.rep().outsw()?;
        a.mov(rdi, COUNTER + 0x100)?;
        a.mov(ecx, 2)?;
        a.rep().insd()
    });
    let mut guest = Guest::new(&kvm, &code);
    guest.ram.store(COUNTER, 0x6655_4433_2211u64).unwrap();
    assert_eq!(guest.vcpu.run().unwrap(), Exit::Kicked);
    let out = |bytes: &[u8]| Access::Out(0x300, bytes.to_vec());
    let expected =
        [out(&[0x11, 0x22]), out(&[0x33, 0x44]), out(&[0x55, 0x66]), Access::In(0x300, 4), Access::In(0x300, 4)];
    assert_eq!(guest.io.take(), expected);
    assert_eq!(guest.ram.load::<u64>(COUNTER + 0x100), Some(0xa4a3_a2a1_a4a3_a2a1));
    let state = guest.vcpu.save().unwrap();
    assert_eq!((state.gpr[1], state.gpr[6], state.gpr[7]), (0, COUNTER + 6, COUNTER + 0x108));
}

#[test]
fn memory_that_is_not_ram_is_served_at_each_width() {
    let Some(kvm) = engine("memory_that_is_not_ram_is_served_at_each_width") else { return };
    let code = assemble(|a| {
        a.mov(rbx, 0xd000_0000u64)?;
        a.mov(rax, 0x1122_3344_5566_7788u64)?;
        a.mov(byte_ptr(rbx), al)?;
        a.mov(word_ptr(rbx + 2), ax)?;
        a.mov(dword_ptr(rbx + 4), eax)?;
        a.mov(qword_ptr(rbx + 8), rax)?;
        a.xor(ecx, ecx)?;
        a.mov(cl, byte_ptr(rbx))?;
        a.mov(esi, dword_ptr(rbx + 4))?;
        a.mov(rdi, qword_ptr(rbx + 8))?;
        a.movzx(ebp, word_ptr(rbx + 2))
    });
    let mut guest = Guest::new(&kvm, &code);
    assert_eq!(guest.vcpu.run().unwrap(), Exit::Kicked);
    let wrote = |at: u64, bytes: &[u8]| Access::Write(0xd000_0000 + at, bytes.to_vec());
    let read = |at: u64, len| Access::Read(0xd000_0000 + at, len);
    let expected = [
        wrote(0, &[0x88]),
        wrote(2, &[0x88, 0x77]),
        wrote(4, &[0x88, 0x77, 0x66, 0x55]),
        wrote(8, &[0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11]),
        read(0, 1),
        read(4, 4),
        read(8, 8),
        read(2, 2),
    ];
    assert_eq!(guest.io.take(), expected);
    let state = guest.vcpu.save().unwrap();
    let read = [1, 5, 6, 7].map(|register| state.gpr[register]);
    assert_eq!(read, [0xa1, 0xa2a1, 0xa4a3_a2a1, 0xa8a7_a6a5_a4a3_a2a1]);
}

#[test]
fn an_access_is_complete_before_the_state_is_saved() {
    let Some(kvm) = engine("an_access_is_complete_before_the_state_is_saved") else { return };
    // The handler kicks in the middle of an IN, so that the run ends before the guest has the answer.
    #[derive(Debug)]
    struct KickOnIn(Arc<OnceLock<Arc<dyn Kick>>>);
    impl IoHandler for KickOnIn {
        fn mmio_read(&mut self, _: GuestAddr, _: &mut [u8]) {}
        fn mmio_write(&mut self, _: GuestAddr, _: &[u8]) {}
        fn pio_in(&mut self, _: u16, data: &mut [u8]) {
            data.fill(0x5a);
            self.0.get().unwrap().kick();
        }
        fn pio_out(&mut self, _: u16, _: &[u8]) {}
    }
    let code = raw(|a| {
        a.in_(al, 0x77)?;
        a.hlt()
    });
    let ram = memory(&code);
    let vm = kvm.create_vm(&VmSpec { vcpus: NonZeroU8::MIN }, ram).unwrap();
    let seed = vm.create_vcpu(VcpuId(0)).unwrap();
    let kick = Arc::new(OnceLock::from(seed.kicker()));
    let mut vcpu = seed.bind(Box::new(KickOnIn(kick))).unwrap();
    vcpu.restore(&bare::initial_state()).unwrap();
    assert_eq!(vcpu.run().unwrap(), Exit::Kicked);
    let state = vcpu.save().unwrap();
    assert_eq!((state.gpr[0], state.rip), (0x5a, CODE + 2));
    // And a state that is put in its stead is not written to by the old one's access.
    vcpu.restore(&bare::initial_state()).unwrap();
    assert_eq!(vcpu.run().unwrap(), Exit::Kicked);
    vcpu.restore(&VcpuState { rip: CODE + 0x100, ..bare::initial_state() }).unwrap();
    let state = vcpu.save().unwrap();
    assert_eq!((state.gpr[0], state.rip), (0, CODE + 0x100));
}

#[test]
fn early_kicks_are_remembered_once() {
    let Some(kvm) = engine("early_kicks_are_remembered_once") else { return };
    let ram = memory(&SPIN);
    let vm = kvm.create_vm(&VmSpec { vcpus: NonZeroU8::MIN }, ram).unwrap();
    let seed = vm.create_vcpu(VcpuId(0)).unwrap();
    let kick = seed.kicker();
    kick.kick();
    kick.kick();
    let mut vcpu = seed.bind(Box::new(Recorder::default())).unwrap();
    vcpu.restore(&bare::initial_state()).unwrap();
    assert_eq!(vcpu.run().unwrap(), Exit::Kicked);
    kick.kick();
    assert_eq!(vcpu.run().unwrap(), Exit::Kicked, "between two runs");
    let began = Instant::now();
    let late = Arc::clone(&kick);
    thread::spawn(move || {
        thread::sleep(Duration::from_millis(20));
        late.kick();
    });
    assert_eq!(vcpu.run().unwrap(), Exit::Kicked);
    assert!(began.elapsed() >= Duration::from_millis(20), "a kick that was served came again");
    drop(vcpu);
    kick.kick();
}

#[test]
fn no_kick_is_lost_whenever_it_comes() {
    let Some(kvm) = engine("no_kick_is_lost_whenever_it_comes") else { return };
    for (code, rounds) in [(&SPIN[..], 2_000), (&[0xf4, 0xeb, 0xfd][..], 2_000)] {
        let mut guest = Guest::new(&kvm, code);
        let kick = Arc::clone(&guest.kick);
        let (asked, ask) = mpsc::channel();
        let kicker = thread::spawn(move || {
            // Each round asks for one kick; a lost one would leave the vCPU in the guest for ever.
            for (round, ()) in ask.iter().enumerate() {
                (0..round % 97 * 20).for_each(|_| std::hint::spin_loop());
                kick.kick();
            }
        });
        for _ in 0..rounds {
            asked.send(()).unwrap();
            assert_eq!(guest.vcpu.run().unwrap(), Exit::Kicked);
        }
        drop(asked);
        kicker.join().unwrap();
        let at = guest.vcpu.save().unwrap().rip;
        assert!((CODE..CODE + 3).contains(&at), "{at:#x}");
    }
}

#[test]
fn a_triple_fault_is_a_shutdown() {
    let Some(kvm) = engine("a_triple_fault_is_a_shutdown") else { return };
    // No interrupt table, and an undefined instruction.
    let mut guest = Guest::new(&kvm, &[0x0f, 0x0b]);
    match guest.vcpu.run() {
        Ok(exit) => assert_eq!(exit, Exit::Shutdown),
        // A kernel that emulates the guest's kernel mode may know no such instruction.
        Err(HvError::Unimplemented { rip, bytes, .. }) => {
            assert_eq!((rip, bytes.get(..2)), (CODE, Some(&[0x0f, 0x0b][..])));
        }
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn what_the_host_cannot_execute_is_named_and_nothing_has_happened() {
    let Some(kvm) = engine("what_the_host_cannot_execute_is_named_and_nothing_has_happened") else { return };
    // A vector load from a device, which KVM's emulator lacks on every host (VMOVDQU ymm0, [rbx]).
    let code = raw(|a| {
        a.mov(rbx, 0xd000_0000u64)?;
        a.db(&[0xc5, 0xfe, 0x6f, 0x03])
    });
    let mut guest = Guest::new(&kvm, &code);
    let at = CODE + code.len() as u64 - 4;
    match guest.vcpu.run() {
        Err(HvError::Unimplemented { rip, bytes, .. }) => {
            assert_eq!((rip, bytes.get(..4)), (at, Some(&[0xc5, 0xfe, 0x6f, 0x03][..])));
            let state = guest.vcpu.save().unwrap();
            assert_eq!((state.rip, state.events), (at, Events::default()));
        }
        // Without AVX it is an undefined instruction, of which there is no handler here.
        Ok(exit) => assert_eq!(exit, Exit::Shutdown),
        Err(error) => panic!("{error}"),
    }
}

/// A state in which no register of any class is as after reset.
fn rich_state() -> VcpuState {
    let data = Segment { selector: 0x18, base: 0, limit: u32::MAX, attributes: 0xc093, unusable: false };
    let mut state = bare::initial_state();
    state.gpr = std::array::from_fn(|n| 0x0101_0101_0101_0101 * (n as u64 + 1));
    state.rflags = 0x8d7;
    (state.cr2, state.cr8) = (0xdead_b000, 5);
    state.dr = [0x1000, 0x2000, 0x3000, 0x4000, 0xffff_0ff1, 0x400];
    state.segments[4] = Segment { base: 0x7fff_0000_1000, ..data };
    state.segments[5] = Segment { base: 0xffff_8000_0000_2000, ..data };
    state.gdtr = Table { base: GDT, limit: 0x1f };
    state.idtr = Table { base: IDT, limit: 0xfff };
    state.msrs = Msrs {
        star: 0x0023_0010_0000_0000,
        lstar: 0xffff_8000_0000_3000,
        cstar: 0xffff_8000_0000_4000,
        sfmask: 0x4_7700,
        kernel_gs_base: 0xffff_8000_0000_5000,
        sysenter_cs: 0x10,
        sysenter_esp: 0xffff_8000_0000_6000,
        sysenter_eip: 0xffff_8000_0000_7000,
        pat: 0x0007_0406_0007_0106,
        tsc_aux: 3,
        tsc: 1_000_000_000_000,
        kvm_system_time: 0x7001,
        kvm_wall_clock: 0x7100,
        ..state.msrs
    };
    state.fpu = Fpu {
        fcw: 0x27f,
        fsw: 0x3800,
        ftw: 0x80,
        st: std::array::from_fn(|n| (0x8000_0000_0000_0000 | n as u64, 0x3fff)),
        mxcsr: 0x1fa0,
        xmm: std::array::from_fn(|n| [n as u64 + 1, !(n as u64)]),
        ..Fpu::default()
    };
    state.lapic = Lapic {
        tpr: 0x53,
        ldr: 0x0100_0000,
        svr: 0x1ff,
        isr: [0, 0, 1, 0, 0, 0, 0, 0],
        irr: [0, 2, 0, 0, 0, 0, 0, 0],
        icr: 0x0200_0000_0000_00fd,
        lvt: [0x2_00ef, 0x1_0000, 0x1_0000, 0x1_0700, 0x400, 0xfe],
        timer_initial: 4_000_000_000,
        timer_divide: 0b1011,
        timer_left_ns: Some(3_000_000_000),
        ..state.lapic
    };
    state
}

/// The state without what time changes.
fn timeless(state: &VcpuState) -> VcpuState {
    let mut state = state.clone();
    (state.msrs.tsc, state.lapic.timer_left_ns) = (0, None);
    state
}

#[test]
fn every_class_of_registers_comes_back_as_it_was_given() {
    let Some(kvm) = engine("every_class_of_registers_comes_back_as_it_was_given") else { return };
    let mut guest = Guest::new(&kvm, &SPIN);
    guest.ram.fill(0x7100, 0x77, 16).unwrap();
    let given = rich_state();
    guest.vcpu.restore(&given).unwrap();
    let got = guest.vcpu.save().unwrap();
    assert_eq!(timeless(&got), timeless(&given));
    let passed = got.msrs.tsc.wrapping_sub(given.msrs.tsc);
    let hz = guest.vm.time_stamp().unwrap().hz;
    assert!(passed < hz * 2 || is_fixed(&kvm), "{passed} ticks since the state was given");
    let left = got.lapic.timer_left_ns.expect("the timer counts");
    assert!((1_000_000_000..=3_000_000_000).contains(&left), "{left}");
    assert_eq!(guest.ram.load::<u64>(0x7100), Some(0x7777_7777_7777_7777), "the wall clock is not written again");

    // Under stopped time nothing moves at all, whatever was there before: a timer of another mode, or the other form of
    // the local APIC.
    guest.vm.stop_time();
    let mut other = bare::initial_state();
    other.lapic = Lapic {
        apic_base: 0xfee0_0d00,
        svr: 0x1ff,
        icr: 0x0000_0001_0000_00fd,
        lvt: [2 << 17 | 0x60, 1 << 16, 1 << 16, 1 << 16, 1 << 16, 1 << 16],
        tsc_deadline: 5_000_000,
        ..other.lapic
    };
    guest.vcpu.restore(&other).unwrap();
    let got = guest.vcpu.save().unwrap();
    assert_eq!((timeless(&got), got.msrs.tsc), (timeless(&other), 0));
    guest.vcpu.restore(&given).unwrap();
    thread::sleep(Duration::from_millis(5));
    assert_eq!(guest.vcpu.save().unwrap(), given);
    guest.vm.start_time();
}

#[test]
fn what_a_processor_waits_for_and_what_is_under_way_come_back() {
    let Some(kvm) = engine("what_a_processor_waits_for_and_what_is_under_way_come_back") else { return };
    let mut guest = Guest::new(&kvm, &SPIN);
    let base = bare::initial_state();
    let events = |events| VcpuState { events, ..base.clone() };
    let delivering = |vector, error, source| {
        events(Events { delivering: Some(Delivery { vector, error, source }), ..Events::default() })
    };
    let waits = Activity::WaitsForStartUp;
    let states = [
        VcpuState { activity: Activity::Halted, ..base.clone() },
        VcpuState { activity: Activity::WaitsForInit, ..base.clone() },
        VcpuState { activity: waits, ..base.clone() },
        VcpuState { activity: waits, events: Events { start_up: Some(0x9a), ..Events::default() }, ..base.clone() },
        VcpuState { interrupt_shadow: true, rflags: 0x202, ..base.clone() },
        events(Events { nmi_pending: true, nmi_masked: true, ..Events::default() }),
        delivering(14, Some(2), DeliverySource::Exception),
        delivering(0x31, None, DeliverySource::External),
        delivering(2, None, DeliverySource::Nmi),
    ];
    guest.vm.stop_time();
    for state in states {
        guest.vcpu.restore(&state).unwrap_or_else(|error| panic!("{:?} {:?}: {error}", state.activity, state.events));
        let got = guest.vcpu.save().unwrap();
        if state.events.start_up.is_some() {
            // The kernel acts on it when it is asked: real mode, at the page that the message names.
            assert_eq!((got.activity, got.segments[1].base, got.rip), (Activity::Running, 0x9_a000, 0));
            continue;
        }
        assert_eq!(timeless(&got), timeless(&state));
    }
    let before = guest.vcpu.save().unwrap();
    let software = delivering(3, None, DeliverySource::Software);
    assert!(matches!(guest.vcpu.restore(&software), Err(HvError::Unsupported(_))));
    assert_eq!(guest.vcpu.save().unwrap(), before);
}

/// What makes a state impossible.
type Change = fn(&mut VcpuState);

#[test]
fn a_state_that_cannot_be_is_refused_and_the_old_one_stands() {
    let Some(kvm) = engine("a_state_that_cannot_be_is_refused_and_the_old_one_stands") else { return };
    let mut guest = Guest::new(&kvm, &SPIN);
    guest.vm.stop_time();
    let given = rich_state();
    guest.vcpu.restore(&given).unwrap();
    let wrong: [(&str, Change); 17] = [
        ("RFLAGS", |s| s.rflags = 0),
        ("RFLAGS", |s| s.rflags |= 1 << 40),
        ("RFLAGS.VM", |s| s.rflags |= 1 << 17),
        ("CR0", |s| s.cr0 = 1 << 31),
        ("CR4", |s| s.cr4 |= 1 << 40),
        ("CR8", |s| s.cr8 = 16),
        ("CR3", |s| s.cr3 = u64::MAX),
        ("EFER", |s| s.msrs.efer = u64::MAX),
        ("PAT", |s| s.msrs.pat = 2),
        ("LSTAR", |s| s.msrs.lstar = 1 << 63),
        ("RIP", |s| s.rip = 1 << 60),
        ("FS", |s| s.segments[4].base = 1 << 50),
        ("MXCSR", |s| s.fpu.mxcsr = u32::MAX),
        ("DR7", |s| s.dr[5] = u64::MAX),
        ("APIC id", |s| s.lapic.id = 7),
        ("APIC base", |s| s.lapic.apic_base = u64::MAX),
        ("start-up", |s| s.events.start_up = Some(1)),
    ];
    for (what, change) in wrong {
        let mut state = bare::initial_state();
        state.gpr[0] = 0xbad;
        change(&mut state);
        let refused = guest.vcpu.restore(&state);
        assert!(matches!(refused, Err(HvError::State(_))), "{what}: {refused:?}");
        assert_eq!(guest.vcpu.save().unwrap(), given, "{what}");
    }
}

fn ioapic(pin: usize, entry: u64) -> IrqChipState {
    let mut ioapic = IoApicState::default();
    ioapic.redirections[pin] = entry;
    IrqChipState { ioapic }
}

const LEVEL: u64 = 1 << 15;
const REMOTE_IRR: u64 = 1 << 14;

#[test]
fn an_edge_reaches_its_handler_and_wakes_a_halted_guest() {
    let Some(kvm) = engine("an_edge_reaches_its_handler_and_wakes_a_halted_guest") else { return };
    let mut guest = halting(&kvm);
    guest.vm.restore_irqchip(&ioapic(5, 0x31)).unwrap();
    let line = guest.vm.irq_line(Gsi(5)).unwrap();
    assert!(matches!(guest.vm.irq_line(Gsi(24)), Err(HvError::Unsupported(_))));
    line.raise();
    assert_eq!(guest.vcpu.run().unwrap(), Exit::Kicked, "before the run");
    assert_eq!(guest.ram.load::<u64>(COUNTER), Some(1));
    for round in 2..20 {
        let line = Arc::clone(&line);
        let raiser = thread::spawn(move || {
            thread::sleep(Duration::from_millis(round % 3));
            line.raise();
        });
        assert_eq!(guest.vcpu.run().unwrap(), Exit::Kicked);
        raiser.join().unwrap();
        assert_eq!(guest.ram.load::<u64>(COUNTER), Some(round));
    }
    guest.run_for(Duration::from_millis(10));
    assert_eq!(guest.vcpu.save().unwrap().activity, Activity::Halted);
}

#[test]
fn a_level_asks_again_until_it_is_taken_away() {
    let Some(kvm) = engine("a_level_asks_again_until_it_is_taken_away") else { return };
    let mut guest = halting(&kvm);
    guest.vm.restore_irqchip(&ioapic(9, 0x41 | LEVEL)).unwrap();
    let line = guest.vm.irq_line(Gsi(9)).unwrap();
    line.set_level(true);
    line.set_level(true);
    assert_eq!(guest.vm.save_irqchip().unwrap().ioapic.active, 1 << 9);
    for served in 1..4 {
        assert_eq!(guest.vcpu.run().unwrap(), Exit::Kicked);
        assert_eq!(guest.ram.load::<u64>(COUNTER), Some(served));
    }
    line.set_level(false);
    // What was sent before the line fell is still served.
    guest.run_for(Duration::from_millis(10));
    let served = guest.ram.load::<u64>(COUNTER);
    guest.run_for(Duration::from_millis(10));
    guest.run_for(Duration::from_millis(10));
    assert!(guest.ram.load::<u64>(COUNTER) <= served.map(|served| served + 1));
    let ioapic = guest.vm.save_irqchip().unwrap().ioapic;
    assert_eq!((ioapic.active, ioapic.requests, ioapic.redirections[9]), (0, 0, 0x41 | LEVEL));
}

#[test]
fn the_ioapics_state_comes_back() {
    let Some(kvm) = engine("the_ioapics_state_comes_back") else { return };
    let guest = halting(&kvm);
    let mut state = IoApicState { select: 0x22, id: 0x0300_0000, ..IoApicState::default() };
    state.redirections[3] = 0x0100_0000_0000_0833;
    state.redirections[9] = 0x41 | LEVEL | REMOTE_IRR;
    state.redirections[10] = 0x42 | LEVEL | 1 << 16;
    (state.active, state.requests) = (1 << 9 | 1 << 10, 1 << 9 | 1 << 10);
    let state = IrqChipState { ioapic: state };
    guest.vm.restore_irqchip(&state).unwrap();
    assert_eq!(guest.vm.save_irqchip().unwrap(), state);
    let hostile = IoApicState {
        select: u32::MAX,
        id: u32::MAX,
        redirections: [u64::MAX; 24],
        requests: u32::MAX,
        active: u32::MAX,
    };
    guest.vm.restore_irqchip(&IrqChipState { ioapic: hostile }).unwrap();
    let kept = guest.vm.save_irqchip().unwrap().ioapic;
    assert_eq!((kept.select, kept.id, kept.redirections[0]), (0xff, 0x0f00_0000, 0xff00_0000_0001_efff));
    guest.vm.restore_irqchip(&IrqChipState::default()).unwrap();
    assert_eq!(guest.vm.save_irqchip().unwrap(), IrqChipState::default());
}

#[test]
fn a_second_vcpu_starts_by_init_and_a_start_up_message() {
    let Some(kvm) = engine("a_second_vcpu_starts_by_init_and_a_start_up_message") else { return };
    let code = raw(|a| {
        a.mov(rbx, LAPIC)?;
        for message in [0x4500, 0x460c] {
            a.mov(dword_ptr(rbx + 0x310), 1 << 24)?;
            a.mov(dword_ptr(rbx + 0x300), message)?;
        }
        let mut wait = a.create_label();
        a.mov(rbx, COUNTER)?;
        a.set_label(&mut wait)?;
        a.cmp(byte_ptr(rbx), 0x55)?;
        a.jne(wait)?;
        a.mov(dx, u32::from(EXIT_PORT))?;
        a.out(dx, al)
    });
    let ram = memory(&code);
    // In real mode: mov al, 0x55; mov [0x8000], al; hlt; jmp $-1
    for (at, byte) in (0xc000..).zip([0xb0u8, 0x55, 0xa2, 0x00, 0x80, 0xf4, 0xeb, 0xfd]) {
        ram.store(at, byte).unwrap();
    }
    let mut first = bare::initial_state();
    first.lapic.svr = 0x1ff;
    let mut guest = Guest::on(&kvm, ram, 2, &first);
    let vm = &guest.vm;
    let (ready, started) = mpsc::channel();
    thread::scope(|scope| {
        let second = scope.spawn(move || {
            let (mut vcpu, _, kick) = attach(&**vm, 1);
            let mut state = bare::initial_state();
            state.activity = Activity::WaitsForInit;
            (state.lapic.id, state.lapic.apic_base) = (1, 0xfee0_0800);
            vcpu.restore(&state).unwrap();
            ready.send(kick).unwrap();
            assert_eq!(vcpu.run().unwrap(), Exit::Kicked);
            vcpu.save().unwrap()
        });
        let kick = started.recv_timeout(LONG).unwrap();
        let late = Arc::clone(&guest.kick);
        let (done, over) = mpsc::channel::<()>();
        let watchdog = scope.spawn(move || over.recv_timeout(LONG).is_err_and(|_| true).then(|| late.kick()));
        assert_eq!(guest.vcpu.run().unwrap(), Exit::Kicked);
        let _ = done.send(());
        watchdog.join().unwrap();
        assert_eq!(guest.ram.load::<u8>(COUNTER), Some(0x55), "the second one has not started");
        thread::sleep(Duration::from_millis(20));
        kick.kick();
        let state = second.join().unwrap();
        assert_eq!((state.activity, state.rip, state.segments[1].base), (Activity::Halted, 6, 0xc000));
        assert_eq!(state.lapic.id, 1);
    });
    // Both show the same time.
    guest.vm.stop_time();
    assert_eq!(guest.vcpu.save().unwrap().msrs.tsc, guest.vm.time_stamp().unwrap().ticks);
}

#[test]
fn the_dirty_log_names_what_vcpus_wrote() {
    let Some(kvm) = engine("the_dirty_log_names_what_vcpus_wrote") else { return };
    let code = raw(|a| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        for page in [0x30_0000u64, 0x30_1000, 0x90_0000] {
            a.mov(rbx, page)?;
            a.mov(qword_ptr(rbx), rbx)?;
        }
        a.mov(dx, u32::from(EXIT_PORT))?;
        a.out(dx, al)?;
        a.jmp(again)
    });
    let mut guest = Guest::new(&kvm, &code);
    let run = |guest: &mut Guest| assert_eq!(guest.vcpu.run().unwrap(), Exit::Kicked);
    assert!(matches!(guest.vm.take_dirty_log(), Err(HvError::Unsupported(_))));
    run(&mut guest);
    guest.vm.start_dirty_log().unwrap();
    let written = |guest: &Guest| {
        let pages = guest.vm.take_dirty_log().unwrap();
        // Page tables are written by the processor itself.
        pages.iter().filter(|page| *page >= 0x10_0000).collect::<Vec<_>>()
    };
    assert_eq!(written(&guest), [0u64; 0]);
    for _ in 0..3 {
        run(&mut guest);
        assert_eq!(written(&guest), [0x30_0000, 0x30_1000, 0x90_0000]);
        assert_eq!(written(&guest), [0u64; 0]);
    }
    run(&mut guest);
    guest.vm.start_dirty_log().unwrap();
    assert_eq!(written(&guest), [0u64; 0], "what was noted before is forgotten");
    guest.vm.stop_dirty_log().unwrap();
    guest.vm.stop_dirty_log().unwrap();
    run(&mut guest);
    assert!(guest.vm.take_dirty_log().is_err());
}

#[test]
fn time_stands_still_and_goes_on_without_a_jump() {
    let Some(kvm) = engine("time_stands_still_and_goes_on_without_a_jump") else { return };
    let mut guest = Guest::new(&kvm, &SPIN);
    guest.run_for(Duration::from_millis(2));
    guest.vm.stop_time();
    let still = guest.vm.time_stamp().unwrap();
    assert_eq!(guest.vcpu.save().unwrap().msrs.tsc, still.ticks);
    thread::sleep(Duration::from_millis(300));
    guest.vm.stop_time();
    assert_eq!(guest.vm.time_stamp(), Some(still));
    assert_eq!(guest.vcpu.save().unwrap().msrs.tsc, still.ticks);
    let began = Instant::now();
    guest.vm.start_time();
    guest.vm.start_time();
    let first = guest.vcpu.save().unwrap().msrs.tsc;
    let second = guest.vm.time_stamp().unwrap().ticks;
    let passed = began.elapsed().as_nanos() as u64 * still.hz / 1_000_000_000 + 1_000;
    assert!(still.ticks <= first && first <= second, "{still:?} {first} {second}");
    assert!(second <= still.ticks + passed || is_fixed(&kvm), "{still:?} {second} {passed}");
}

#[test]
fn an_armed_timer_keeps_what_it_had_left_over_a_pause() {
    let Some(kvm) = engine("an_armed_timer_keeps_what_it_had_left_over_a_pause") else { return };
    let period = 400_000_000;
    for deadline in [false, true] {
        let mut guest = halting(&kvm);
        let mut state = guest.vcpu.save().unwrap();
        let hz = guest.vm.time_stamp().unwrap().hz;
        if deadline {
            state.lapic.lvt[0] = 2 << 17 | 0x60;
            state.msrs.tsc = hz;
            state.lapic.tsc_deadline = hz + period * (hz / 1_000) / 1_000_000;
        } else {
            state.lapic.lvt[0] = 0x60;
            (state.lapic.timer_initial, state.lapic.timer_divide) = (period as u32, 0b1011);
        }
        state.lapic.timer_left_ns = Some(period);
        guest.vm.stop_time();
        guest.vcpu.restore(&state).unwrap();
        guest.vm.start_time();
        assert_eq!(guest.run_for(Duration::from_millis(50)), Exit::Kicked);
        assert_eq!(guest.ram.load::<u64>(COUNTER), Some(0));
        guest.vm.stop_time();
        let left = guest.vcpu.save().unwrap().lapic.timer_left_ns.expect("armed");
        assert!((1..=period - 50_000_000).contains(&left), "{left}");
        thread::sleep(Duration::from_millis(500));
        assert_eq!(guest.vcpu.save().unwrap().lapic.timer_left_ns, Some(left));
        let began = Instant::now();
        guest.vm.start_time();
        assert_eq!(guest.vcpu.run().unwrap(), Exit::Kicked);
        assert_eq!(guest.ram.load::<u64>(COUNTER), Some(1), "the timer's handler");
        assert!(began.elapsed().as_nanos() as u64 + 1_000_000 >= left, "{:?} for {left} ns", began.elapsed());
        let lapic = guest.vcpu.save().unwrap().lapic;
        assert_eq!((lapic.timer_left_ns, lapic.tsc_deadline), (None, 0));
    }
}

#[test]
fn a_guest_goes_from_soft_to_kvm_and_back() {
    let Some(kvm) = engine("a_guest_goes_from_soft_to_kvm_and_back") else { return };
    // Three parts of a sum, each ended by the exit port.
    let code = raw(|a| {
        for part in 1..=3u32 {
            a.mov(ecx, 1_000 * part)?;
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            a.add(rbx, rcx)?;
            a.dec(ecx)?;
            a.jne(again)?;
            a.mov(dx, u32::from(EXIT_PORT))?;
            a.out(dx, al)?;
        }
        a.hlt()
    });
    let soft = Soft::new();
    let mut state = bare::initial_state();
    state.gpr[3] = 0;
    state.fpu.xmm[2] = [3, 5];
    let ram = memory(&code);
    let engines: [&dyn Hypervisor; 3] = [&soft, &kvm, &soft];
    for engine in engines {
        let mut guest = Guest::on(engine, Arc::clone(&ram), 1, &state);
        assert_eq!(guest.vcpu.run().unwrap(), Exit::Kicked);
        guest.vm.stop_time();
        let next = guest.vcpu.save().unwrap();
        assert!(next.msrs.tsc > state.msrs.tsc || is_fixed(&kvm));
        state = next;
    }
    let sum = |n: u64| n * (n + 1) / 2;
    assert_eq!(state.gpr[3], sum(1_000) + sum(2_000) + sum(3_000));
    assert_eq!(state.fpu.xmm[2], [3, 5]);
}

#[test]
fn a_doorbell_rings_without_the_handler() {
    let Some(kvm) = engine("a_doorbell_rings_without_the_handler") else { return };
    let code = assemble(|a| {
        a.mov(rbx, 0xd000_0050u64)?;
        a.mov(dword_ptr(rbx), 7)?;
        a.mov(dword_ptr(rbx), 8)?;
        a.mov(dword_ptr(rbx + 4), 9)
    });
    let mut guest = Guest::new(&kvm, &code);
    let bell = guest.vm.doorbell(GuestAddr(0xd000_0050)).unwrap().expect("KVM has doorbells");
    assert!(guest.vm.doorbell(GuestAddr(0xd000_0050)).is_err(), "once an address");
    let mut count = [0; 8];
    assert!(rustix::io::read(&bell, &mut count).is_err(), "nobody has rung");
    assert_eq!(guest.vcpu.run().unwrap(), Exit::Kicked);
    assert_eq!(guest.io.take(), [Access::Write(0xd000_0054, vec![9, 0, 0, 0])]);
    assert_eq!(rustix::io::read(&bell, &mut count), Ok(8));
    assert_eq!(u64::from_ne_bytes(count), 2);
}

#[test]
fn a_vcpu_is_made_once_and_only_inside_the_machine() {
    let Some(kvm) = engine("a_vcpu_is_made_once_and_only_inside_the_machine") else { return };
    let vm = kvm.create_vm(&VmSpec { vcpus: NonZeroU8::MIN }, memory(&SPIN)).unwrap();
    let seed = vm.create_vcpu(VcpuId(0)).unwrap();
    for id in [0, 1, 255] {
        assert!(matches!(vm.create_vcpu(VcpuId(id)), Err(HvError::Unsupported(_))), "{id}");
    }
    // A vCPU may outlive its machine.
    drop(vm);
    let mut vcpu = seed.bind(Box::new(Recorder::default())).unwrap();
    vcpu.restore(&bare::initial_state()).unwrap();
    assert_eq!(vcpu.save().unwrap().rip, CODE);
}

async fn machine(kvm: &Kvm, state: &MachineState, ram: GuestRam) -> Machine {
    let mut machine = Machine::restore(kvm, state, ram, &[]).await.expect("a valid state");
    machine.resume();
    machine
}

#[tokio::test]
async fn a_whole_machine_pauses_and_goes_on_in_another() {
    let Some(kvm) = engine("a_whole_machine_pauses_and_goes_on_in_another") else { return };
    let code = bare_machine::program(|a| {
        bare_machine::say(a, b'a')?;
        // A ring for a device that no driver has started: of no consequence.
        a.mov(rbx, 0xd000_0050u64)?;
        a.mov(dword_ptr(rbx), 0)?;
        bare_machine::await_flag(a)?;
        bare_machine::say(a, b'b')
    });
    let (mut state, ram) = bare_machine::fresh(&code);
    let refused = Machine::restore(&kvm, &state, bare_machine::fresh(&code).1, &[]).await;
    assert_eq!(refused.is_ok(), state.cpu_profile == kvm.cpu_profile());
    drop(refused);
    state.cpu_profile = kvm.cpu_profile().to_owned();
    // The devices are behind the GiB of interrupt controllers.
    ram.store(0x2000 + 3 * 8, 0x6003u64).unwrap();
    for n in 0..512u64 {
        ram.store(0x6000 + n * 8, 0xc000_0000 | n << 21 | 0x83).unwrap();
    }
    let mut first = machine(&kvm, &state, ram).await;
    bare_machine::heard(&first, "a").await;
    for _ in 0..20 {
        first.pause().await.unwrap();
        first.resume();
    }
    first.pause().await.unwrap();
    let saved = first.save().await.unwrap();
    assert_eq!(first.save().await.unwrap(), saved);
    let second = machine(&kvm, &saved, bare_machine::copy(&first)).await;
    bare_machine::set_flag(&second);
    bare_machine::heard(&second, "b").await;
    first.resume();
    bare_machine::set_flag(&first);
    bare_machine::heard(&first, "b").await;
    first.stop();
    first.ended().await;
}
