//! The cases, a file a group. Sections are those of the Intel SDM, volume 3A unless another is named.

pub(crate) mod apic;
mod code;
mod cpuid;
mod dirty_log;
mod entry;
mod exceptions;
mod fpu;
mod ioapic;
mod ipi;
pub(crate) mod lapic;
mod locked;
mod mmio;
mod msrs;
mod paging;
mod ports;
mod privilege;
mod save_everywhere;
mod shadow;
mod strings;
mod timers;

use iced_x86::code_asm::*;

use crate::bench::Bench;
use crate::bench::Case;
use crate::bench::Outcome;
use crate::bench::Skip;
use crate::bench::cases;
use crate::guest::*;
use crate::layout::*;
use crate::machine::*;

/// Every case.
pub(crate) fn all() -> impl Iterator<Item = Case> {
    let groups = [
        entry::CASES,
        paging::CASES,
        exceptions::CASES,
        ioapic::CASES,
        lapic::CASES,
        timers::CASES,
        ports::CASES,
        mmio::CASES,
        strings::CASES,
        privilege::CASES,
        msrs::CASES,
        cpuid::CASES,
        code::CASES,
        fpu::CASES,
        shadow::CASES,
        dirty_log::CASES,
        ipi::CASES,
        locked::CASES,
        save_everywhere::CASES,
    ];
    groups.into_iter().flatten().copied()
}

/// The software engine, for a comparison with one that shows guests the same processor.
fn soft_of_same_profile(bench: &Bench) -> Result<Bench, Skip> {
    let soft = bench.beside();
    match (bench.hypervisor().cpu_profile(), soft.hypervisor().cpu_profile()) {
        (ours, theirs) if ours == theirs => Ok(soft),
        (ours, theirs) => Err(Skip(format!("its profile is {ours}, and the software engine's {theirs}"))),
    }
}
