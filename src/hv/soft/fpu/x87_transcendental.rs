//! transcendental
use crate::hv::soft::exec::Executor;
use iced_x86::Instruction;
pub(super) fn executor(_insn: &Instruction) -> Option<Executor> {
    None
}
