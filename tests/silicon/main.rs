//! The soft processor against silicon: the same random programs on both, and no difference in registers, flags, memory
//! or faults.
//!
//! The reference is guest user mode under `/dev/kvm`, which runs natively on every KVM there is. Where there
//! is none the test says so and passes.
//!
//! ```text
//! cargo test --test silicon -- [FILTER]... [--count INSTRUCTIONS] [--seed SEED] [--each TIMES] [--failures N] [--long]
//! ```
//! A filter is a class (`integer`, `x87`, `mmx`, `sse`) or part of the name of an iced `Code`. The pass over single forms comes
//! first, with faulting addresses too; then long sequences, and system instructions in kernel mode (filter `kernel`, or a
//! kind of program by name). The first differences found are shrunk to one
//! instruction each, and the form is left out of what follows.
#![cfg_attr(not(all(target_os = "linux", target_arch = "x86_64")), allow(unused))]
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a test program reports on its output")]

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod compare;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod forms;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod kernel;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod machine;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod native;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod operands;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod outcome;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod rng;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod sequence;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod soft;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod system;

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
fn main() -> std::process::ExitCode {
    compare::main()
}

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
fn main() {
    println!("silicon: not run: the reference processor needs KVM on x86-64");
}
