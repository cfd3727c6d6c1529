//! How fast the soft engine executes guest code, in millions of guest instructions a second.
//!
//! `cargo bench --bench soft_cpu`: four loops with a known number of instructions, and a boot of the guest kernel from
//! its entry until it finds no program to run, whose instructions the engine counts. Medians of five rounds.

#![allow(clippy::print_stdout, reason = "a benchmark reports to its terminal")]

#[path = "../tests/support/bare.rs"]
mod bare;

use std::fs::File;
use std::path::Path;
use std::time::Instant;

use bare::{Bare, EXIT_PORT};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use kiln::hv::soft::Soft;
use kiln::units::Bytes;
use kiln::vm::Assets;
use kiln::vmm::{Machine, MachineConfig, MachineEnd};

const ROUNDS: usize = 5;

struct Program {
    name: &'static str,
    code: Vec<u8>,
    instructions: u64,
}

fn finish(a: &mut CodeAssembler) -> Result<Vec<u8>, IcedError> {
    a.mov(dx, u32::from(EXIT_PORT))?;
    a.out(dx, al)?;
    a.hlt()?;
    a.assemble(bare::CODE)
}

/// Dependent integer arithmetic: xorshift.
fn integer() -> Result<Program, IcedError> {
    let mut a = CodeAssembler::new(64)?;
    let rounds = 10_000_000u64;
    a.mov(rcx, rounds)?;
    a.mov(rax, 0x9e37_79b9_7f4a_7c15u64)?;
    let mut top = a.create_label();
    a.set_label(&mut top)?;
    a.mov(rdx, rax)?;
    a.shl(rdx, 13)?;
    a.xor(rax, rdx)?;
    a.mov(rdx, rax)?;
    a.shr(rdx, 7)?;
    a.xor(rax, rdx)?;
    a.lea(rbx, ptr(rbx + rax * 2 + 3))?;
    a.add(rsi, rax)?;
    a.dec(rcx)?;
    a.jne(top)?;
    Ok(Program { name: "integer", code: finish(&mut a)?, instructions: rounds * 10 })
}

/// A copy through registers and a byte sum over 1 MiB.
fn memory() -> Result<Program, IcedError> {
    let mut a = CodeAssembler::new(64)?;
    let (passes, words) = (40u64, 131_072u64);
    a.mov(r8, passes)?;
    let (mut pass, mut copy, mut sum) = (a.create_label(), a.create_label(), a.create_label());
    a.set_label(&mut pass)?;
    a.mov(rsi, 0x40_0000u64)?;
    a.mov(rdi, 0x80_0000u64)?;
    a.mov(rcx, words)?;
    a.set_label(&mut copy)?;
    a.mov(rax, qword_ptr(rsi))?;
    a.mov(qword_ptr(rdi), rax)?;
    a.add(rsi, 8)?;
    a.add(rdi, 8)?;
    a.sub(rcx, 1)?;
    a.jne(copy)?;
    a.mov(rsi, 0x40_0000u64)?;
    a.mov(rcx, words)?;
    a.set_label(&mut sum)?;
    a.movzx(eax, byte_ptr(rsi + rcx))?;
    a.add(rbx, rax)?;
    a.sub(rcx, 1)?;
    a.jne(sum)?;
    a.dec(r8)?;
    a.jne(pass)?;
    Ok(Program { name: "memory", code: finish(&mut a)?, instructions: passes * words * 10 })
}

/// Unpredictable branches and calls.
fn branchy() -> Result<Program, IcedError> {
    let mut a = CodeAssembler::new(64)?;
    let rounds = 4_000_000u64;
    a.mov(rcx, rounds)?;
    a.mov(rax, 88_172_645_463_325_252u64)?;
    let (mut top, mut odd, mut join, mut leaf, mut end) =
        (a.create_label(), a.create_label(), a.create_label(), a.create_label(), a.create_label());
    a.set_label(&mut top)?;
    a.mov(rdx, rax)?;
    a.shl(rdx, 13)?;
    a.xor(rax, rdx)?;
    a.mov(rdx, rax)?;
    a.shr(rdx, 7)?;
    a.xor(rax, rdx)?;
    a.test(al, 1)?;
    a.jne(odd)?;
    a.add(rbx, 1)?;
    a.jmp(join)?;
    a.set_label(&mut odd)?;
    a.sub(rbx, 2)?;
    a.nop()?;
    a.set_label(&mut join)?;
    a.call(leaf)?;
    a.dec(rcx)?;
    a.jne(top)?;
    a.jmp(end)?;
    a.set_label(&mut leaf)?;
    a.push(rbp)?;
    a.mov(rbp, rsp)?;
    a.cmp(rbx, rax)?;
    a.cmovl(rsi, rax)?;
    a.pop(rbp)?;
    a.ret()?;
    a.set_label(&mut end)?;
    Ok(Program { name: "branchy", code: finish(&mut a)?, instructions: rounds * 19 })
}

/// Scalar double and packed integer arithmetic.
fn sse() -> Result<Program, IcedError> {
    let mut a = CodeAssembler::new(64)?;
    let rounds = 2_000_000u64;
    a.mov(rcx, rounds)?;
    a.mov(eax, 3)?;
    a.cvtsi2sd(xmm0, eax)?;
    a.mov(eax, 7)?;
    a.cvtsi2sd(xmm1, eax)?;
    a.divsd(xmm0, xmm1)?;
    a.movapd(xmm2, xmm0)?;
    let mut top = a.create_label();
    a.set_label(&mut top)?;
    a.movapd(xmm3, xmm2)?;
    a.mulsd(xmm3, xmm0)?;
    a.addsd(xmm3, xmm1)?;
    a.movsd_2(qword_ptr(0x40_0000), xmm3)?;
    a.movdqu(xmm4, xmmword_ptr(0x40_0010))?;
    a.paddd(xmm4, xmm5)?;
    a.pxor(xmm5, xmm4)?;
    a.movdqu(xmmword_ptr(0x40_0010), xmm4)?;
    a.dec(rcx)?;
    a.jne(top)?;
    Ok(Program { name: "sse", code: finish(&mut a)?, instructions: rounds * 10 })
}

/// Seconds that one run of a loop takes.
fn run(program: &Program) -> f64 {
    let mut guest = Bare::new(&program.code);
    let start = Instant::now();
    guest.run().expect("the guest runs");
    start.elapsed().as_secs_f64()
}

/// Seconds and instructions of a kernel's boot without an init.
fn boot(kernel: &Path) -> (f64, u64) {
    let engine = Soft::new();
    let config = MachineConfig {
        memory: Bytes::mib(128),
        vcpus: std::num::NonZeroU8::MIN,
        kernel: File::open(kernel).expect("the kernel, from `cargo xtask kernel`"),
        initramfs: Vec::new(),
        disks: Vec::new(),
        verbose_boot: false,
        extra_cmdline: String::new(),
    };
    let machine = Machine::start(&engine, config).expect("the machine starts");
    let start = Instant::now();
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    let end = runtime.block_on(machine.ended());
    assert!(matches!(end, MachineEnd::KernelPanic(_)), "the kernel wants an init: {end:?}");
    (start.elapsed().as_secs_f64(), engine.retired())
}

fn report(name: &str, mut rounds: Vec<(f64, u64)>) {
    rounds.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (seconds, instructions) = rounds[rounds.len() / 2];
    println!("{name:<10} {:>10.0} {:>12.1}", instructions as f64 / seconds / 1e6, seconds * 1e3);
}

fn main() {
    println!("{:<10} {:>10} {:>12}", "program", "MIPS", "ms (median)");
    for program in [integer(), memory(), branchy(), sse()] {
        let program = program.expect("a program that assembles");
        report(program.name, (0..ROUNDS).map(|_| (run(&program), program.instructions)).collect());
    }
    let kernel = Assets::user().expect("a home folder").kernel();
    report("kernel", (0..ROUNDS).map(|_| boot(&kernel)).collect());
}
