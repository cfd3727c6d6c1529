//! One suite of machine code for every engine present: what passes here under all of them is what makes engines
//! interchangeable.
//!
//! ```text
//! cargo test --test hv_conformance -- [FILTER]... [--engine NAME] [--list]
//! ```
//! A case is a small guest without a kernel, laid out by [`guest`], run by [`machine`] and watched by [`bus`]. An engine
//! that this host does not have, and an instruction that this host's engine cannot execute, are skips that say so; a
//! wrong result is never one. The software engine may skip nothing.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a test program reports on its output")]

mod abilities;
mod bench;
mod bus;
mod cases;
mod engines;
mod guest;
mod layout;
mod machine;
mod options;
mod runner;

use std::process::ExitCode;

fn main() -> ExitCode {
    match options::parse(std::env::args().skip(1)) {
        Ok(options) => runner::run(&options),
        Err(error) => {
            eprintln!("hv_conformance: {error}");
            ExitCode::from(2)
        }
    }
}
