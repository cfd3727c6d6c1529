//! The soft engine keeps decoded instructions: it must notice every way in which they can change, come out of every
//! loop when asked, and say what it cannot do.

#[path = "support/bare.rs"]
mod bare;

use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use bare::{Bare, CODE, EXIT_PORT};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use kiln::hv::{Exit, HvError};
use vm_memory::{Bytes as _, GuestAddress};

const RAX: usize = 0;
const RBX: usize = 3;

/// Assembles a program at [`CODE`] and ends it at the exit port.
fn program(build: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Vec<u8> {
    let mut a = CodeAssembler::new(64).expect("a 64-bit assembler");
    build(&mut a).expect("the program assembles");
    finish(&mut a).expect("the end assembles");
    a.assemble(CODE).expect("the program encodes")
}

fn finish(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(edx, u32::from(EXIT_PORT))?;
    a.out(dx, al)?;
    let mut wait = a.create_label();
    a.set_label(&mut wait)?;
    a.hlt()?;
    a.jmp(wait)
}

#[test]
fn an_instruction_that_overwrites_the_next_one_is_seen_at_once() {
    // mov al, 1 becomes mov al, 7 by a store of its immediate.
    let code = program(|a| {
        let mut target = a.create_label();
        a.lea(rdi, ptr(target))?;
        a.mov(byte_ptr(rdi + 1), 7)?;
        a.set_label(&mut target)?;
        a.mov(al, 1)
    });
    let state = Bare::new(&code).run().unwrap();
    assert_eq!(state.gpr[RAX] & 0xff, 7);
}

#[test]
fn a_loop_that_patches_itself_each_round_runs_the_patched_code() {
    // Each round adds the immediate that the round before wrote: 1 + 2 + ... + 100.
    let code = program(|a| {
        let (mut top, mut add) = (a.create_label(), a.create_label());
        a.xor(ebx, ebx)?;
        a.mov(ecx, 1)?;
        a.lea(rdi, ptr(add))?;
        a.set_label(&mut top)?;
        // Past the two bytes of opcode and ModRM.
        a.mov(dword_ptr(rdi + 2), ecx)?;
        a.set_label(&mut add)?;
        a.add(ebx, 0x1111_1111)?;
        a.inc(ecx)?;
        a.cmp(ecx, 101)?;
        a.jne(top)
    });
    let state = Bare::new(&code).run().unwrap();
    assert_eq!(state.gpr[RBX], 5050);
}

#[test]
fn an_instruction_across_two_pages_sees_a_change_of_its_second_half() {
    // mov eax, imm32 begins two bytes before the page's end; the loop counts its immediate up.
    let code = program(|a| {
        let (mut top, mut after) = (a.create_label(), a.create_label());
        a.xor(ebx, ebx)?;
        a.mov(ecx, 10)?;
        a.jmp(top)?;
        let pad = 0xffe - 12;
        a.db(&vec![0x90; pad])?;
        a.set_label(&mut top)?;
        a.mov(eax, 1)?;
        a.add(ebx, eax)?;
        a.lea(rdi, ptr(top))?;
        a.inc(byte_ptr(rdi + 2))?;
        a.dec(ecx)?;
        a.jne(top)?;
        a.set_label(&mut after)?;
        a.nop()
    });
    assert_eq!(code[0xffe], 0xb8, "the instruction lies where the test wants it");
    let state = Bare::new(&code).run().unwrap();
    // 1 + (1 + 1 << 8) + ...: the byte after the opcode's low immediate byte counts.
    assert_eq!(state.gpr[RBX], (0..10).map(|n| 1 + (n << 8)).sum::<u64>());
}

#[test]
fn code_that_a_device_writes_is_decoded_anew() {
    let mut a = CodeAssembler::new(64).unwrap();
    let mut top = a.create_label();
    a.set_label(&mut top).unwrap();
    a.mov(eax, 1).unwrap();
    a.mov(edx, u32::from(EXIT_PORT)).unwrap();
    a.out(dx, al).unwrap();
    a.jmp(top).unwrap();
    let mut guest = Bare::new(&a.assemble(CODE).unwrap());
    assert_eq!(guest.run().unwrap().gpr[RAX], 1);
    guest.ram.memory().write_obj(42u32, GuestAddress(CODE + 1)).unwrap();
    guest.run().unwrap();
    assert_eq!(guest.run().unwrap().gpr[RAX], 42);
}

#[test]
fn a_kick_ends_a_loop_and_a_halt_with_interrupts_off() {
    for body in [vec![0xeb, 0xfe], vec![0xf4, 0xeb, 0xfd]] {
        let (send, receive) = mpsc::channel();
        let runner = thread::spawn(move || {
            let mut guest = Bare::new(&body);
            send.send(guest.kick()).expect("the test waits");
            guest.vcpu.run()
        });
        let kick = receive.recv().expect("the guest starts");
        let asked = Instant::now();
        kick.kick();
        assert_eq!(runner.join().unwrap().unwrap(), Exit::Kicked);
        assert!(asked.elapsed() < Duration::from_secs(5), "took {:?}", asked.elapsed());
    }
}

#[test]
fn a_fault_without_handlers_shuts_down() {
    let mut guest = Bare::new(&[0x0f, 0x0b]);
    assert_eq!(guest.vcpu.run().unwrap(), Exit::Shutdown);
}

#[test]
fn what_the_engine_cannot_do_is_an_error_that_names_the_place() {
    // Code that lies in no memory.
    let code = program(|a| {
        a.mov(eax, 0x3fff_0000)?;
        a.jmp(rax)
    });
    match Bare::new(&code).vcpu.run() {
        Err(HvError::Unimplemented { rip, what, .. }) => {
            assert_eq!(rip, 0x3fff_0000);
            assert!(what.contains("fetch"), "{what}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_long_run_needs_little_stack() {
    // A hundred million instructions in blocks of every length; were the chain of operations not bounded, or not
    // turned into jumps, they would not fit.
    let code = program(|a| {
        let mut top = a.create_label();
        a.mov(ecx, 2_000_000)?;
        a.set_label(&mut top)?;
        for _ in 0..40 {
            a.add(ebx, 1)?;
        }
        a.dec(ecx)?;
        a.jne(top)
    });
    let runner = thread::Builder::new().stack_size(1 << 20).spawn(move || Bare::new(&code).run().map(|s| s.gpr[RBX]));
    assert_eq!(runner.unwrap().join().unwrap().unwrap(), 80_000_000);
}
