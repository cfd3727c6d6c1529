//! Engine-neutral state of processors and interrupt controllers: plain data, the same under every engine.

pub(in crate::hv) mod check;
pub mod irqchip;
pub mod x86_64;

pub use irqchip::IrqChipState;
pub use x86_64::VcpuState;
