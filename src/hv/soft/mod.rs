//! The software x86-64 processor.
//!
//! **Several vCPUs.** Each is a thread of the host's; there is no turn-taking between them. So a guest with n vCPUs uses n of
//! the host's processors, the vmm drives this engine as it would drive hardware, and a vCPU that is stuck (in a device, or
//! because the host gives its thread no time) does not stop another: no vCPU ever waits for one (see `peers`).
//!
//! Memory between them is the host's memory:
//!
//! * A plain load or store of the guest's is one MOV of the host's (`mem::cell`). On an x86-64 host that gives the guest its
//!   own memory order, total store order, as well as whole aligned values. What a repeated string instruction copies by
//!   the page may be seen half way and in any order, more freely than on silicon; programs do not pass messages by it.
//!   A host that orders memory less strictly runs one vCPU, and refuses more.
//! * An instruction with LOCK, XCHG with memory, and the page walk's accessed and dirty bits are the host's compare-exchange,
//!   sequentially consistent (`mem::atomic`, which says what holds of operands that cross a border of 8 bytes). MFENCE
//!   and serialising instructions are a fence.
//! * Code that another vCPU writes is decoded anew before it is run after a serialising instruction, an interrupt or
//!   an indirect jump, and otherwise within a slice of some ten microseconds (Intel SDM volume 3A, 9.1.3, asks for the first).
//!
//! There is one clock: all vCPUs read the same time stamp counter.
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
mod legacy_paging;
mod logical;
mod mailbox;
mod mmu;
mod operand;
mod peers;
mod run;
mod shared_code;
mod step;
mod tlb;
mod translate;

pub use engine::Soft;
