//! transcendental
use iced_x86::Instruction;
use crate::hv::soft::exec::Executor;
pub(super) fn executor(_insn: &Instruction) -> Option<Executor> {
    None
}
