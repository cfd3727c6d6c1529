//! The modes that a processor goes through on its way to 64-bit code and back, and what starts and interrupts it: bare
//! guests in real, protected and compatibility mode, INIT, start-up messages and NMIs (Intel SDM volume 3A, 7.7, 9.4,
//! 11.8.5).

#[path = "support/bare.rs"]
mod bare;

use std::thread;
use std::time::Duration;

use bare::{Bare, CODE, EXIT_PORT, STACK};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use kiln::hv::soft::Soft;
use kiln::hv::state::VcpuState;
use kiln::hv::state::x86_64::{Activity, Delivery, DeliverySource, Events, Segment, Table};
use kiln::hv::{Exit, HvError};
use kiln::mem::GuestRam;
use kiln::units::Bytes;

const RAX: usize = 0;
const RCX: usize = 1;
const RDX: usize = 2;
const RBX: usize = 3;
const RSP: usize = 4;
const RBP: usize = 5;
const RSI: usize = 6;

/// Where the interrupt tables of 64-bit and of 32-bit code lie, the GDT, and a TSS.
const IDT: u64 = 0x9000;
const IDT_32: u64 = 0xd000;
const GDT: u64 = 0xa000;
const TSS: u64 = 0xa800;
/// Where a start-up message with vector 8 leads.
const START: u64 = 0x8000;
/// 32-bit code, and data for it.
const CODE_32: u64 = 0xb000;
const WORDS: u64 = 0xc000;

const CR0_PG: u64 = 1 << 31;
const EFER_LMA: u64 = 1 << 10;
/// The boot processor's bit in IA32_APIC_BASE, and x2APIC form.
const BSP: u64 = 1 << 8;
const X2APIC: u64 = 3 << 10;
const SVR_ENABLED: u32 = 0x1ff;

const SELECTOR_CODE_64: u32 = 0x10;
const SELECTOR_DATA: u32 = 0x18;
const SELECTOR_CODE_32: u32 = 0x20;
const SELECTOR_CODE_16: u32 = 0x28;
const SELECTOR_DATA_16: u32 = 0x30;
const SELECTOR_USER_CODE_32: u32 = 0x3b;
const SELECTOR_USER_DATA: u32 = 0x43;
const SELECTOR_TSS: u32 = 0x48;

type Build<'a> = &'a dyn Fn(&mut CodeAssembler) -> Result<(), IcedError>;

fn assemble(bits: u32, at: u64, build: Build<'_>) -> Vec<u8> {
    let mut a = CodeAssembler::new(bits).expect("an assembler");
    build(&mut a).expect("the program assembles");
    a.assemble(at).expect("the program encodes")
}

/// Ends the run; what comes after it stops for good.
fn leave(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.out(u32::from(EXIT_PORT), al)?;
    let mut stop = a.create_label();
    a.set_label(&mut stop)?;
    a.hlt()?;
    a.jmp(stop)
}

/// A machine with the GDT of this file, whose code is put in place by the tests.
struct Guest {
    bare: Bare,
}

impl Guest {
    fn new() -> Self {
        let ram = GuestRam::new(Bytes::mib(64)).expect("guest memory");
        bare::map_first_gib(&ram);
        let descriptors: [(u32, u64); 9] = [
            (SELECTOR_CODE_64, 0x00af_9b00_0000_ffff),
            (SELECTOR_DATA, 0x00cf_9300_0000_ffff),
            (SELECTOR_CODE_32, 0x00cf_9b00_0000_ffff),
            (SELECTOR_CODE_16, 0x0000_9b00_0000_ffff),
            (SELECTOR_DATA_16, 0x0000_9300_0000_ffff),
            (SELECTOR_USER_CODE_32 & !3, 0x00cf_fb00_0000_ffff),
            (SELECTOR_USER_DATA & !3, 0x00cf_f300_0000_ffff),
            (SELECTOR_TSS, 0x0000_8b00_0000_0067 | TSS << 16),
            (SELECTOR_TSS + 8, 0),
        ];
        for (selector, descriptor) in descriptors {
            ram.store(GDT + u64::from(selector), descriptor).expect("in memory");
        }
        Self { bare: Bare::enter(&Soft::new(), ram) }
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        for (at, byte) in (at..).zip(bytes) {
            self.bare.ram.store(at, *byte).expect("in memory");
        }
    }

    fn code(&self, bits: u32, at: u64, build: Build<'_>) {
        self.put(at, &assemble(bits, at, build));
    }

    /// Code of real mode at a paragraph, which begins at offset 0.
    fn real_code(&self, at: u64, build: Build<'_>) {
        self.put(at, &assemble(16, 0, build));
    }

    /// A pointer in the tables that LGDT and LIDT take.
    fn table(&self, at: u64, base: u64, limit: u16) {
        self.bare.ram.store(at, limit).expect("in memory");
        self.bare.ram.store(at + 2, base as u32).expect("in memory");
    }

    /// A 64-bit interrupt gate that level 3 may use.
    fn gate(&self, vector: u64, handler: u64) {
        let low = handler & 0xffff | u64::from(SELECTOR_CODE_64) << 16 | 0xee00 << 32 | (handler >> 16) << 48;
        self.bare.ram.store(IDT + vector * 16, low).expect("in memory");
        self.bare.ram.store(IDT + vector * 16 + 8, 0u64).expect("in memory");
    }

    fn word(&self, n: u64) -> u32 {
        self.bare.ram.load(WORDS + 4 * n).expect("in memory")
    }

    fn run_from(&mut self, state: &VcpuState) -> VcpuState {
        self.bare.vcpu.restore(state).expect("a valid state");
        self.bare.run().expect("the guest leaves")
    }

    /// Lets the guest do what it does for a moment, then ends its run from outside.
    fn run_for_a_moment(&mut self) -> VcpuState {
        let kick = self.bare.kick();
        let other = thread::spawn(move || {
            thread::sleep(Duration::from_millis(50));
            kick.kick();
        });
        assert_eq!(self.bare.vcpu.run().expect("no error"), Exit::Kicked);
        other.join().expect("the kick was given");
        self.bare.vcpu.save().expect("saved")
    }
}

/// 64-bit code with tables, at level 0, with the local APIC in x2APIC form.
fn long_mode() -> VcpuState {
    let mut state = bare::initial_state();
    state.gdtr = Table { base: GDT, limit: 0x5f };
    state.idtr = Table { base: IDT, limit: 0xfff };
    state.tr = Segment { selector: 0x48, base: TSS, limit: 0x67, attributes: 0x8b, unusable: false };
    state.lapic.apic_base |= X2APIC;
    state.lapic.svr = SVR_ENABLED;
    state
}

/// What INIT leaves, of a processor that is not the boot processor and gets a start-up message with vector 8.
fn started_up() -> VcpuState {
    let data = Segment { selector: 0, base: 0, limit: 0xffff, attributes: 0x93, unusable: false };
    let code = Segment { selector: 0xf000, base: 0xffff_0000, attributes: 0x9b, ..data };
    let mut state = bare::initial_state();
    state.gpr = [0; 16];
    state.gpr[RDX] = 0x6f1;
    (state.rip, state.cr0, state.cr3, state.cr4, state.msrs.efer) = (0xfff0, 0x6000_0010, 0, 0, 0);
    state.segments = [data, code, data, data, data, data];
    state.ldtr = Segment { attributes: 0x82, ..data };
    state.tr = Segment { attributes: 0x8b, ..data };
    (state.gdtr, state.idtr) = (Table { base: 0, limit: 0xffff }, Table { base: 0, limit: 0xffff });
    state.lapic.apic_base = state.lapic.apic_base & !BSP | X2APIC;
    state.activity = Activity::WaitsForStartUp;
    state.events.start_up = Some((START >> 12) as u8);
    state
}

/// Sends to the processor itself what the low half of the interrupt command says; uses RAX, RCX and RDX.
fn send_to_self(a: &mut CodeAssembler, command: u32) -> Result<(), IcedError> {
    a.mov(ecx, 0x830)?;
    a.mov(eax, command)?;
    a.xor(edx, edx)?;
    a.wrmsr()
}

#[test]
fn sdm_9_4_4_a_start_up_message_begins_in_real_mode() {
    let mut guest = Guest::new();
    guest.real_code(START, &|a| {
        a.mov(bx, cs)?;
        a.mov(ds, bx)?;
        a.mov(dword_ptr(0x100), 0x1234_5678)?;
        leave(a)
    });
    let state = guest.run_from(&started_up());
    assert_eq!((state.segments[1].selector, state.segments[1].base), (0x800, START));
    assert_eq!((state.gpr[RBX], state.gpr[RDX], state.cr0), (0x800, 0x6f1, 0x6000_0010));
    assert_eq!(guest.bare.ram.load::<u32>(START + 0x100), Some(0x1234_5678));
    assert_eq!(state.events, Events::default());
}

#[test]
fn a_processor_that_waits_sleeps_and_can_be_kicked() {
    for (activity, start_up) in [(Activity::WaitsForStartUp, None), (Activity::WaitsForInit, None)] {
        let mut guest = Guest::new();
        let mut state = started_up();
        (state.activity, state.events.start_up) = (activity, start_up);
        // An interrupt and an NMI do not start it.
        state.lapic.irr[1] = 1;
        state.lapic.svr = SVR_ENABLED;
        state.events.nmi_pending = true;
        guest.bare.vcpu.restore(&state).expect("a valid state");
        let after = guest.run_for_a_moment();
        assert_eq!((after.activity, after.rip, after.events), (activity, 0xfff0, state.events));
        assert_eq!(after.lapic.irr, state.lapic.irr);
    }
}

/// The way that Linux' trampoline takes (arch/x86/realmode/rm/trampoline_64.S), at its addresses of this file.
fn trampoline(guest: &Guest) {
    guest.table(START + 0x800, GDT, 0x5f);
    guest.table(START + 0x810, 0, 0);
    guest.real_code(START, &|a| {
        let (mut locked, mut free) = (a.create_label(), a.create_label());
        a.cli()?;
        a.wbinvd()?;
        a.mov(ax, cs)?;
        a.mov(ds, ax)?;
        a.mov(es, ax)?;
        a.mov(ss, ax)?;
        a.set_label(&mut locked)?;
        a.lock().bts(dword_ptr(0x820), 0)?;
        a.jae(free)?;
        a.pause()?;
        a.jmp(locked)?;
        a.set_label(&mut free)?;
        a.mov(esp, 0x700)?;
        // Which processor it is: by the identification flag and CPUID.
        a.pushfd()?;
        a.pop(eax)?;
        a.mov(ebx, eax)?;
        a.xor(eax, 0x20_0000)?;
        a.push(eax)?;
        a.popfd()?;
        a.pushfd()?;
        a.pop(eax)?;
        a.xor(eax, ebx)?;
        a.mov(dword_ptr(0x824), eax)?;
        a.xor(eax, eax)?;
        a.cpuid()?;
        a.mov(dword_ptr(0x828), ebx)?;
        // LIDTL and LGDTL.
        a.db(&[0x66, 0x0f, 0x01, 0x1e, 0x10, 0x08, 0x66, 0x0f, 0x01, 0x16, 0x00, 0x08])?;
        a.mov(edx, SELECTOR_DATA)?;
        a.mov(eax, 0x0005_0033)?;
        a.mov(cr0, eax)?;
        // LJMPL to 32-bit code.
        a.db(&[0x66, 0xea])?;
        a.dd(&[CODE_32 as u32])?;
        a.dw(&[SELECTOR_CODE_32 as u16])
    });
    guest.code(32, CODE_32, &|a| {
        a.mov(ss, edx)?;
        a.add(esp, START as i32)?;
        a.mov(ds, edx)?;
        a.mov(es, edx)?;
        a.mov(fs, edx)?;
        a.mov(gs, edx)?;
        a.mov(ecx, 0xc000_0080u32)?;
        a.rdmsr()?;
        a.bts(eax, 8)?;
        a.or(eax, 0x801)?;
        a.wrmsr()?;
        a.mov(eax, 0x1000)?;
        a.mov(cr3, eax)?;
        a.mov(eax, 0x620)?;
        a.mov(cr4, eax)?;
        a.mov(eax, 0x8005_0033u32)?;
        a.mov(cr0, eax)?;
        a.db(&[0xea])?;
        a.dd(&[CODE as u32])?;
        a.dw(&[SELECTOR_CODE_64 as u16])
    });
}

#[test]
fn sdm_11_8_5_a_further_processor_comes_to_64_bit_code() {
    let mut guest = Guest::new();
    trampoline(&guest);
    guest.code(64, CODE, &|a| {
        a.mov(rax, 0x1122_3344_5566_7788u64)?;
        leave(a)
    });
    let state = guest.run_from(&started_up());
    assert_eq!((state.gpr[RAX], state.gpr[RSP]), (0x1122_3344_5566_7788, START + 0x700));
    assert_eq!((state.cr0 & CR0_PG, state.msrs.efer & EFER_LMA), (CR0_PG, EFER_LMA));
    assert_eq!(state.segments[1].selector, SELECTOR_CODE_64 as u16);
    let word = |at: u64| guest.bare.ram.load::<u32>(START + at).unwrap();
    assert_eq!((word(0x820), word(0x824)), (1, 0x20_0000));
    assert_eq!(&word(0x828).to_le_bytes(), b"Genu");
}

#[test]
fn a_state_on_the_way_to_64_bit_code_can_be_saved_at_any_instruction() {
    let reference = {
        let mut guest = Guest::new();
        trampoline(&guest);
        guest.code(64, CODE, &leave);
        guest.run_from(&started_up())
    };
    let mut guest = Guest::new();
    trampoline(&guest);
    guest.code(64, CODE, &leave);
    let mut state = started_up();
    let mut modes = Vec::new();
    for _ in 0..200 {
        guest.bare.vcpu.restore(&state).expect("every state on the way is accepted");
        let saved = guest.bare.vcpu.save().expect("saved");
        assert_eq!(saved.activity, Activity::Running);
        let mode = (saved.cr0 & 1, saved.cr0 & CR0_PG, saved.msrs.efer & EFER_LMA);
        if modes.last() != Some(&mode) {
            modes.push(mode);
        }
        match step(&mut guest, &saved) {
            Some(next) => state = next,
            None => break,
        }
    }
    assert_eq!(modes, [(0, 0, 0), (1, 0, 0), (1, CR0_PG, EFER_LMA)]);
    assert_eq!(
        (state.gpr[RBX], state.gpr[RSP], state.cr0, state.cr4),
        (reference.gpr[RBX], reference.gpr[RSP], reference.cr0, reference.cr4)
    );
}

/// Executes one instruction, or two after a load of SS; `None` at the guest's end. It runs in the interrupt shadow of a
/// pending NMI, which then meets no handler: that ends the processor, with the state as it was before the NMI.
fn step(guest: &mut Guest, state: &VcpuState) -> Option<VcpuState> {
    let at = if state.msrs.efer & EFER_LMA != 0 { state.rip } else { state.segments[1].base + state.rip };
    // The last instruction.
    let bytes: [u8; 2] = [guest.bare.ram.load(at).unwrap(), guest.bare.ram.load(at + 1).unwrap()];
    if bytes == [0xe6, EXIT_PORT as u8] {
        return None;
    }
    let mut stepped = state.clone();
    (stepped.events.nmi_pending, stepped.interrupt_shadow) = (true, true);
    stepped.idtr = Table { base: 0, limit: 0 };
    guest.bare.vcpu.restore(&stepped).expect("a valid state");
    assert_eq!(guest.bare.vcpu.run().expect("no error"), Exit::Shutdown);
    let mut after = guest.bare.vcpu.save().expect("saved");
    after.idtr = state.idtr;
    after.events = Events::default();
    Some(after)
}

#[test]
fn from_64_bit_code_to_real_mode_with_interrupts_in_each() {
    let mut guest = Guest::new();
    // Handlers: 64-bit, 32-bit at START, and real mode's at START + 0x400.
    let handler_64 = CODE + 0x800;
    guest.gate(0x40, handler_64);
    guest.code(64, handler_64, &|a| {
        a.inc(dword_ptr(WORDS))?;
        a.iretq()
    });
    guest.code(32, START, &|a| {
        a.inc(dword_ptr(WORDS + 4))?;
        a.iretd()
    });
    let gate = START & 0xffff | u64::from(SELECTOR_CODE_32) << 16 | 0x8e00 << 32 | (START >> 16) << 48;
    guest.bare.ram.store(IDT_32 + 0x40 * 8, gate).unwrap();
    guest.table(WORDS + 0x100, IDT_32, 0x7ff);
    guest.table(WORDS + 0x110, 0, 0x3ff);
    guest.bare.ram.store(0x40 * 4, ((START as u32 + 0x400) / 16) << 16).unwrap();
    guest.real_code(START + 0x400, &|a| {
        a.push(ds)?;
        a.xor(bx, bx)?;
        a.mov(ds, bx)?;
        a.inc(dword_ptr(WORDS + 8))?;
        a.pop(ds)?;
        a.iret()
    });
    guest.code(64, CODE, &|a| {
        a.int(0x40)?;
        // By RETFQ to compatibility mode.
        a.push(SELECTOR_CODE_32 as i32)?;
        a.push(CODE_32 as i32)?;
        a.db(&[0x48, 0xcb])
    });
    guest.code(32, CODE_32, &|a| {
        // Compatibility mode; the interrupt still goes to the 64-bit handler.
        a.int(0x40)?;
        // Out of long mode, to 32-bit protected mode.
        a.mov(eax, cr0)?;
        a.btr(eax, 31)?;
        a.mov(cr0, eax)?;
        a.mov(ecx, 0xc000_0080u32)?;
        a.rdmsr()?;
        a.btr(eax, 8)?;
        a.wrmsr()?;
        a.lidt(ptr(WORDS + 0x100))?;
        a.int(0x40)?;
        // To 16-bit protected mode, for segments that suit real mode.
        a.db(&[0xea])?;
        a.dd(&[CODE_32 as u32 + 0x400])?;
        a.dw(&[SELECTOR_CODE_16 as u16])
    });
    guest.code(16, CODE_32 + 0x400, &|a| {
        a.mov(bx, SELECTOR_DATA_16)?;
        a.mov(ss, bx)?;
        a.mov(ds, bx)?;
        a.mov(es, bx)?;
        // LIDT [WORDS + 0x110].
        a.db(&[0x0f, 0x01, 0x1e])?;
        a.dw(&[WORDS as u16 + 0x110])?;
        a.mov(eax, cr0)?;
        a.and(eax, 0x7fff_fffe)?;
        a.mov(cr0, eax)?;
        a.db(&[0xea])?;
        a.dw(&[0x600, CODE_32 as u16 / 16])
    });
    guest.real_code(CODE_32 + 0x600, &|a| {
        a.xor(bx, bx)?;
        a.mov(ss, bx)?;
        a.mov(ds, bx)?;
        a.mov(sp, 0x7000)?;
        a.int(0x40)?;
        leave(a)
    });
    let state = guest.run_from(&long_mode());
    assert_eq!((guest.word(0), guest.word(1), guest.word(2)), (2, 1, 1));
    assert_eq!((state.cr0 & (CR0_PG | 1), state.msrs.efer & (EFER_LMA | 0x100)), (0, 0));
    // The stack of real mode uses the low half of ESP; the rest is as 64-bit code left it.
    assert_eq!((state.segments[1].base, state.gpr[RSP]), (CODE_32, STACK | 0x7000));
}

#[test]
fn a_32_bit_program_calls_a_64_bit_kernel() {
    let mut guest = Guest::new();
    guest.bare.ram.store(TSS + 4, STACK - 0x1000).unwrap();
    // The program's pages, and all the others, are the user's.
    guest.bare.ram.store(0x1000, 0x2007u64).unwrap();
    guest.bare.ram.store(0x2000, 0x3007u64).unwrap();
    for n in 0..512 {
        guest.bare.ram.store(0x3000 + n * 8, n << 21 | 0x87).unwrap();
    }
    let (system_call, fault) = (CODE + 0x800, CODE + 0x900);
    guest.gate(0x80, system_call);
    guest.gate(13, fault);
    guest.code(64, CODE, &|a| {
        a.push(SELECTOR_USER_DATA as i32)?;
        a.push(WORDS as i32 + 0x800)?;
        a.push(0x202)?;
        a.push(SELECTOR_USER_CODE_32 as i32)?;
        a.push(CODE_32 as i32)?;
        a.iretq()
    });
    guest.code(64, system_call, &|a| {
        // Its registers are 32 bits wide and its stack is elsewhere.
        a.add(eax, ebx)?;
        a.iretq()
    });
    guest.code(64, fault, &|a| {
        a.mov(rsi, qword_ptr(rsp))?;
        a.mov(rbp, qword_ptr(rsp + 8))?;
        leave(a)
    });
    guest.code(32, CODE_32, &|a| {
        let (mut sum, mut add) = (a.create_label(), a.create_label());
        a.mov(ax, SELECTOR_USER_DATA)?;
        a.mov(ds, eax)?;
        a.mov(es, eax)?;
        a.xor(eax, eax)?;
        a.mov(ecx, 1000)?;
        a.set_label(&mut sum)?;
        a.call(add)?;
        a.loop_(sum)?;
        a.mov(ebx, 7)?;
        a.int(0x80)?;
        a.mov(dword_ptr(WORDS), eax)?;
        a.pushad()?;
        a.popad()?;
        // A copy of what was stored, then privileged: the end.
        a.mov(esi, WORDS as u32)?;
        a.mov(edi, WORDS as u32 + 4)?;
        a.mov(ecx, 4)?;
        a.rep().movsb()?;
        a.hlt()?;
        a.set_label(&mut add)?;
        a.add(eax, ecx)?;
        a.ret()
    });
    let state = guest.run_from(&long_mode());
    assert_eq!((guest.word(0), guest.word(1)), (500_507, 500_507));
    assert_eq!((state.gpr[RSI], state.gpr[RCX]), (0, 0));
    assert_eq!(guest.bare.ram.load::<u8>(state.gpr[RBP]), Some(0xf4), "at the HLT");
}

#[test]
fn sdm_7_7_nmis_are_masked_until_iret_and_one_more_is_kept() {
    let mut guest = Guest::new();
    let handler = CODE + 0x800;
    guest.gate(2, handler);
    guest.code(64, handler, &|a| {
        let mut second = a.create_label();
        a.inc(dword_ptr(WORDS))?;
        a.cmp(dword_ptr(WORDS), 1)?;
        a.jne(second)?;
        a.push(rcx)?;
        // Three more while it is handled make one; they wait.
        for _ in 0..3 {
            send_to_self(a, 0x4400)?;
        }
        wait_a_slice(a)?;
        a.mov(ebx, dword_ptr(WORDS))?;
        a.pop(rcx)?;
        a.set_label(&mut second)?;
        a.iretq()
    });
    guest.code(64, CODE, &|a| {
        send_to_self(a, 0x4400)?;
        wait_a_slice(a)?;
        leave(a)
    });
    let state = guest.run_from(&long_mode());
    assert_eq!((state.gpr[RBX], guest.word(0)), (1, 2));
    assert_eq!((state.rflags & 0x200, state.events), (0, Events::default()), "interrupts were off all the time");
}

/// Takes long enough for what was sent to be noticed.
fn wait_a_slice(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut wait = a.create_label();
    a.mov(ecx, 10_000)?;
    a.set_label(&mut wait)?;
    a.dec(ecx)?;
    a.jne(wait)
}

#[test]
fn what_a_processor_sends_itself_right_before_a_halt_is_not_missed() {
    let mut guest = Guest::new();
    guest.gate(2, CODE + 0x800);
    guest.code(64, CODE + 0x800, &|a| {
        let mut after = a.create_label();
        a.inc(dword_ptr(WORDS))?;
        // It may come before the halt, which then would last: so that is skipped.
        a.mov(rax, qword_ptr(rsp))?;
        a.cmp(byte_ptr(rax), 0xf4)?;
        a.jne(after)?;
        a.inc(qword_ptr(rsp))?;
        a.set_label(&mut after)?;
        a.iretq()
    });
    guest.code(64, CODE, &|a| {
        for _ in 0..10 {
            send_to_self(a, 0x4400)?;
            a.hlt()?;
        }
        a.cli()?;
        a.hlt()
    });
    guest.bare.vcpu.restore(&long_mode()).expect("a valid state");
    guest.run_for_a_moment();
    assert_eq!(guest.word(0), 10);
}

#[test]
fn sdm_7_7_1_an_nmi_ends_a_halt_unless_masked_and_survives_saving() {
    let mut guest = Guest::new();
    guest.gate(2, CODE + 0x800);
    guest.code(64, CODE + 0x800, &|a| {
        a.inc(dword_ptr(WORDS))?;
        a.iretq()
    });
    guest.code(64, CODE, &leave);
    let mut state = long_mode();
    state.activity = Activity::Halted;
    state.events = Events { nmi_pending: true, nmi_masked: true, ..Events::default() };
    guest.bare.vcpu.restore(&state).expect("a valid state");
    let halted = guest.run_for_a_moment();
    assert_eq!((halted.activity, halted.events, halted.rip), (Activity::Halted, state.events, CODE));
    assert_eq!(guest.word(0), 0);
    state.events.nmi_masked = false;
    let after = guest.run_from(&state);
    assert_eq!((guest.word(0), after.events), (1, Events::default()));
    // In real mode too, through the vector table.
    guest.bare.ram.store(2 * 4, ((START as u32 + 0x400) / 16) << 16).unwrap();
    guest.real_code(START + 0x400, &|a| {
        a.mov(ax, 0x77)?;
        a.iret()
    });
    guest.real_code(START, &leave);
    let mut state = started_up();
    state.events.nmi_pending = true;
    state.gpr[RSP] = 0x7000;
    assert_eq!(guest.run_from(&state).gpr[RAX], 0x77);
}

#[test]
fn sdm_11_6_1_init_and_start_up_messages() {
    // INIT to a processor that is not the boot processor; before it a start-up message and an INIT de-assert, which do
    // nothing to one that runs.
    let mut guest = Guest::new();
    guest.code(64, CODE, &|a| {
        send_to_self(a, 0x4600 | 0x99)?;
        send_to_self(a, 0x8500)?;
        wait_a_slice(a)?;
        a.inc(dword_ptr(WORDS))?;
        send_to_self(a, 0x4500)?;
        wait_a_slice(a)?;
        a.inc(dword_ptr(WORDS))?;
        leave(a)
    });
    let mut state = long_mode();
    state.lapic.apic_base &= !BSP;
    state.lapic.irr[2] = 1;
    (state.msrs.lstar, state.fpu.xmm[3], state.dr[0]) = (0x1234_5678, [7, 8], 99);
    guest.bare.vcpu.restore(&state).expect("a valid state");
    let mut after = guest.run_for_a_moment();
    assert_eq!(guest.word(0), 1);
    let mut expected = started_up();
    expected.events.start_up = None;
    // What INIT does not touch (table 10-1): most MSRs, SSE and x87 registers, the caches' bits, time.
    (expected.msrs, expected.fpu) = (state.msrs, state.fpu);
    (expected.cr0, expected.msrs.efer) = (0x10, 0);
    after.msrs.tsc = expected.msrs.tsc;
    assert_eq!(after, expected);
    // Then a start-up message.
    guest.real_code(START, &leave);
    after.events.start_up = Some(8);
    let last = guest.run_from(&after);
    assert_eq!((last.segments[1].base, last.fpu.xmm[3]), (START, [7, 8]));
}

#[test]
fn sdm_9_4_3_the_boot_processor_begins_at_the_reset_vector() {
    let mut guest = Guest::new();
    guest.code(64, CODE, &|a| {
        send_to_self(a, 0x4500)?;
        wait_a_slice(a)?;
        leave(a)
    });
    guest.bare.vcpu.restore(&long_mode()).expect("a valid state");
    // This machine has no firmware there.
    match guest.bare.vcpu.run() {
        Err(HvError::Unimplemented { rip, what, .. }) => assert_eq!((rip, what.contains("fetch")), (0xfff0, true)),
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_event_that_was_under_way_comes_first() {
    for (vector, error, source) in [
        (0x40, None, DeliverySource::External),
        (14, Some(2), DeliverySource::Exception),
        (2, None, DeliverySource::Nmi),
        (0x80, None, DeliverySource::Software),
    ] {
        let mut guest = Guest::new();
        let handler = CODE + 0x800;
        guest.gate(vector.into(), handler);
        guest.code(64, handler, &|a| {
            a.mov(rbx, qword_ptr(rsp))?;
            a.mov(rsi, qword_ptr(rsp + 8))?;
            leave(a)
        });
        let mut state = long_mode();
        // Behind an interrupt shadow, with interrupts off, in front of an undefined instruction.
        guest.put(CODE, &[0x0f, 0x0b]);
        (state.interrupt_shadow, state.cr2) = (true, 0xabc);
        state.events.delivering = Some(Delivery { vector, error, source });
        guest.bare.vcpu.restore(&state).expect("a valid state");
        // A kick comes before it, and it is still there.
        guest.bare.kick().kick();
        assert_eq!(guest.bare.vcpu.run().unwrap(), Exit::Kicked);
        let kept = guest.bare.vcpu.save().unwrap();
        assert_eq!(kept.events, state.events);
        let after = guest.run_from(&kept);
        let frame = (after.gpr[RBX], after.gpr[RSI]);
        let expected = if let Some(error) = error { (error.into(), CODE) } else { (CODE, SELECTOR_CODE_64.into()) };
        assert_eq!((frame, after.cr2), (expected, 0xabc), "{source:?}");
        assert_eq!(after.events.nmi_masked, source == DeliverySource::Nmi);
    }
}

#[test]
fn what_is_missing_outside_64_bit_mode_is_an_error_that_says_so() {
    let mut state = started_up();
    state.events.start_up = None;
    state.activity = Activity::Running;
    let flat = Segment { selector: 0x20, base: 0, limit: u32::MAX, attributes: 0xc09b, unusable: false };
    let data = Segment { selector: 0x18, attributes: 0xc093, ..flat };
    (state.cr0, state.rip) = (0x11, CODE_32);
    state.segments = [data, flat, data, data, data, data];
    state.gdtr = Table { base: GDT, limit: 0x5f };
    state.tr = Segment { selector: 0x48, base: TSS, limit: 0x67, attributes: 0x8b, unusable: false };
    for (bytes, missing) in [
        // A far jump to a TSS, and IRET to virtual-8086 mode.
        (&[0xea, 0, 0, 0, 0, 0x50, 0][..], "task switch"),
        (&[0xcf], "virtual-8086 mode"),
    ] {
        let mut guest = Guest::new();
        guest.bare.ram.store(GDT + 0x50, 0x0000_8900_0000_0067 | TSS << 16).unwrap();
        guest.put(CODE_32, bytes);
        state.gpr[RSP] = WORDS;
        guest.bare.ram.store(WORDS + 8, 0x2_0002u32).unwrap();
        guest.bare.vcpu.restore(&state).expect("a valid state");
        match guest.bare.vcpu.run() {
            Err(HvError::Unimplemented { rip, bytes: found, what }) => {
                assert_eq!((rip, what), (CODE_32, missing));
                assert!(found.starts_with(bytes));
            }
            other => panic!("{other:?}"),
        }
        // The state is that before the instruction.
        assert_eq!(guest.bare.vcpu.save().unwrap().rip, CODE_32);
    }
}
