//! The software x86-64 processor.
#![forbid(unsafe_code)]

mod apic;
mod clock;
mod code;
mod code_image;
mod code_map;
mod cpu;
mod engine;
mod exec;
mod fast;
mod fault;
mod fetches;
mod flags;
mod fpu;
mod mailbox;
mod mmu;
mod operand;
mod run;
mod shared_code;
mod step;
mod tlb;
mod translate;

pub use engine::Soft;
