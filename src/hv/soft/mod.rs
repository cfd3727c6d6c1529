//! The software x86-64 processor.
#![forbid(unsafe_code)]
#![allow(dead_code, reason = "in construction")]

mod apic;
mod clock;
mod code_map;
mod cpu;
mod exec;
mod fault;
mod flags;
mod fpu;
mod mmu;
mod operand;
mod tlb;
