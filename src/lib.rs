//! Run any OCI image as a microVM, from async Rust.

pub mod exec;
pub mod hv;
pub mod mem;
pub mod transport;
pub mod units;
