//! The C entry point.
//!
//! Rust's own start-up aborts when descriptors 0 to 2 are closed and `/dev/null` does not exist, which is how the kernel
//! starts PID 1 of an initramfs without device nodes. `main` therefore is ours, and the crate `no_main`.

#![cfg(not(test))]

use std::ffi::c_char;
use std::ffi::c_int;

/// Called by the C library with the process's arguments, which std has already recorded through `.init_array`.
// SAFETY: no other item of the program is called `main`, and the signature is the one the C library calls.
#[unsafe(no_mangle)]
extern "C" fn main(_argc: c_int, _argv: *const *const c_char) -> c_int {
    crate::run()
}
