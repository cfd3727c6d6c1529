//! Run any OCI image as a microVM, from async Rust.

pub mod block;
pub mod exec;
pub mod hv;
pub mod image;
pub mod mem;
pub mod rootfs;
pub mod transport;
pub mod units;
pub mod vmm;
