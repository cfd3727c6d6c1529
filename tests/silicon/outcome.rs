//! What a sequence did, as far as it is compared.

use std::fmt::Write;

use kiln::hv::state::x86_64::Fpu;
use kiln::mem::GuestRam;

use crate::machine;
use crate::rng::Rng;
use crate::sequence::{Sequence, Start};

/// RF: set in the frame of a fault, by some processors in that of a trap.
pub(crate) const RF: u64 = 1 << 16;

/// The state in which a sequence ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub(crate) vector: u8,
    pub(crate) error: u64,
    /// The faulting address, for page faults.
    pub(crate) cr2: u64,
    pub(crate) gpr: [u64; 16],
    pub(crate) rip: u64,
    pub(crate) rflags: u64,
    pub(crate) fpu: Fpu,
}

/// A processor to compare.
pub(crate) trait Processor {
    fn ram(&self) -> &GuestRam;

    /// Runs user code from [`machine::CODE`] until it raises an exception; what is wrong with the processor is an error.
    fn run(&mut self, start: &Start) -> Result<Stopped, String>;
}

/// A processor's registers in the handler.
#[derive(Clone, Debug)]
pub(crate) struct Stopped {
    pub(crate) vector: u8,
    pub(crate) gpr: [u64; 16],
    pub(crate) cr2: u64,
    pub(crate) fpu: Fpu,
}

/// Runs `sequence` from `start` on `processor`.
pub(crate) fn run(processor: &mut dyn Processor, sequence: &Sequence, start: &Start) -> Result<Outcome, String> {
    prepare(processor.ram(), sequence, start);
    let stopped = processor.run(start)?;
    let ram = processor.ram();
    let words = 5 + u64::from(machine::has_error_code(stopped.vector));
    let frame = machine::KERNEL_STACK_TOP - words * 8;
    let word = |index: u64| ram.load::<u64>(frame + index * 8).expect("the frame lies in RAM");
    let skip = words - 5;
    let mut gpr = stopped.gpr;
    gpr[4] = word(skip + 3);
    let mut fpu = stopped.fpu;
    // Saved under different conditions by different vendors.
    (fpu.fop, fpu.fip, fpu.fdp) = (0, 0, 0);
    Ok(Outcome {
        vector: stopped.vector,
        error: if skip == 1 { word(0) } else { 0 },
        cr2: if stopped.vector == 14 { stopped.cr2 } else { 0 },
        gpr,
        rip: word(skip),
        rflags: word(skip + 2) & !RF,
        fpu,
    })
}

/// Writes the code, and memory's content.
pub(crate) fn prepare(ram: &GuestRam, sequence: &Sequence, start: &Start) {
    let code = sequence.bytes.iter().copied().chain(std::iter::repeat_n(0xcc, 80));
    for (offset, byte) in (machine::CODE..).zip(code) {
        ram.store(offset, byte).expect("code lies in RAM");
    }
    let mut rng = Rng::new(start.memory);
    for (base, bytes) in
        [(machine::WINDOW, machine::WINDOW_BYTES), (machine::READ_ONLY, 0x1000), (machine::STACK, machine::STACK_BYTES)]
    {
        for at in (base..base + bytes).step_by(8) {
            let value = if at % 64 == 0 { rng.quad() } else { rng.next() };
            ram.store(at, value).expect("the window lies in RAM");
        }
    }
}

/// Where the user-visible memory of two runs differs: addresses of 8 bytes, and both contents.
pub(crate) fn memory_differences(a: &GuestRam, b: &GuestRam) -> Vec<(u64, u64, u64)> {
    let mut differences = Vec::new();
    for (base, bytes) in
        [(machine::WINDOW, machine::WINDOW_BYTES), (machine::READ_ONLY, 0x1000), (machine::STACK, machine::STACK_BYTES)]
    {
        for at in (base..base + bytes).step_by(8) {
            let (left, right) = (ram_word(a, at), ram_word(b, at));
            if left != right {
                differences.push((at, left, right));
            }
        }
    }
    differences
}

fn ram_word(ram: &GuestRam, at: u64) -> u64 {
    ram.load(at).expect("compared memory lies in RAM")
}

/// C1 tells which way the last bit of an x87 result was rounded.
const C1: u16 = 1 << 9;
/// How far apart approximations of an x87 function may lie, in units of the last place.
const X87_ULPS: u64 = 4;
/// The relative error of RCPPS and RSQRTPS is below 1.5 * 2^-12: two of them may be twice that apart.
const SSE_ERROR: f32 = 3.0 / 4096.0;

/// Takes over from `native` what `soft` has nearly the same.
pub(crate) fn forgive_rounding(native: &Outcome, soft: &mut Outcome) {
    let (a, b) = (&native.fpu, &mut soft.fpu);
    for (a, b) in a.st.iter().zip(&mut b.st) {
        if a.1 == b.1 && a.0.abs_diff(b.0) <= X87_ULPS {
            *b = *a;
        }
    }
    b.fsw = b.fsw & !C1 | a.fsw & C1;
    for (a, b) in a.xmm.iter().zip(&mut b.xmm) {
        for (a, b) in a.iter().zip(b) {
            let near = |shift: u32| {
                let (a, b) = (f32::from_bits((*a >> shift) as u32), f32::from_bits((*b >> shift) as u32));
                a.to_bits() == b.to_bits() || ((a - b) / a).abs() <= SSE_ERROR
            };
            if near(0) && near(32) {
                *b = *a;
            }
        }
    }
}

const NAMES: [&str; 16] =
    ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"];

/// A line for each thing that differs.
pub(crate) fn differences(native: &Outcome, soft: &Outcome) -> String {
    let mut text = String::new();
    let mut line = |name: &str, a: u128, b: u128| {
        if a != b {
            let _ = writeln!(text, "    {name:<8} native {a:#x}  soft {b:#x}");
        }
    };
    line("vector", native.vector.into(), soft.vector.into());
    line("error", native.error.into(), soft.error.into());
    line("cr2", native.cr2.into(), soft.cr2.into());
    line("rip", native.rip.into(), soft.rip.into());
    line("rflags", native.rflags.into(), soft.rflags.into());
    for (index, name) in NAMES.iter().enumerate() {
        line(name, native.gpr[index].into(), soft.gpr[index].into());
    }
    let (a, b) = (&native.fpu, &soft.fpu);
    line("fcw", a.fcw.into(), b.fcw.into());
    line("fsw", a.fsw.into(), b.fsw.into());
    line("ftw", a.ftw.into(), b.ftw.into());
    line("mxcsr", a.mxcsr.into(), b.mxcsr.into());
    let extended = |(low, high): (u64, u16)| u128::from(low) | u128::from(high) << 64;
    let wide = |[low, high]: [u64; 2]| u128::from(low) | u128::from(high) << 64;
    for index in 0..8 {
        line(&format!("st{index}"), extended(a.st[index]), extended(b.st[index]));
    }
    for index in 0..16 {
        line(&format!("xmm{index}"), wide(a.xmm[index]), wide(b.xmm[index]));
    }
    text
}

/// The registers an instruction began with, for a report.
pub(crate) fn describe(outcome: &Outcome) -> String {
    let mut text = String::new();
    for (index, name) in NAMES.iter().enumerate() {
        let _ = write!(text, "{name}={:#x} ", outcome.gpr[index]);
    }
    let fpu = &outcome.fpu;
    let _ = write!(
        text,
        "\n    rflags={:#x} fcw={:#x} fsw={:#x} ftw={:#x} mxcsr={:#x}",
        outcome.rflags, fpu.fcw, fpu.fsw, fpu.ftw, fpu.mxcsr
    );
    for (index, (low, high)) in fpu.st.iter().enumerate() {
        let _ = write!(text, "{}st{index}={high:04x}:{low:016x}", if index % 4 == 0 { "\n    " } else { " " });
    }
    for (index, [low, high]) in fpu.xmm.iter().enumerate() {
        let _ = write!(text, "{}xmm{index}={high:016x}:{low:016x}", if index % 4 == 0 { "\n    " } else { " " });
    }
    text
}
