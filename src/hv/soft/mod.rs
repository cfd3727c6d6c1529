//! The software x86-64 processor.
#![forbid(unsafe_code)]
#![allow(dead_code, reason = "in construction")]

mod apic;
mod clock;
mod cpuid;
mod mailbox;
