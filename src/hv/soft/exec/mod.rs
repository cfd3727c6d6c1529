//! The general executor: every instruction, plainly, from its decoded form.
//!
//! It is the reference that the specialised handlers of the fast path are an optimisation of, and it runs whatever
//! they do not cover. An instruction either completes or leaves the state as it was.

use iced_x86::Instruction;

use super::cpu::Cpu;
use super::fault::{Flow, Stop};

/// Executes one instruction. `Cpu::rip` is already that of the next one; a branch replaces it.
pub(super) type Executor = fn(&mut Cpu, &Instruction) -> Result<Flow, Stop>;

pub(super) fn executor(_insn: &Instruction) -> Option<Executor> {
    None
}
