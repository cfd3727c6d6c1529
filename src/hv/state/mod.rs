//! Engine-neutral processor state: plain data, the same under every engine.

pub mod x86_64;

pub use x86_64::VcpuState;
