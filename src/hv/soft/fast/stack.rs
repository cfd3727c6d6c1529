//! Push, pop and leave, in their 64-bit forms.

use super::super::cpu::{Cpu, slot};
use super::{Leave, Op, get, load, next, writable};

/// PUSH of a register or, where `src` is the zero slot, an immediate.
pub(in super::super) fn push(cpu: &mut Cpu, op: &Op, rest: &[Op], arena: &[Op]) -> Leave {
    let sp = cpu.regs[slot::RSP].wrapping_sub(8);
    let to = writable!(u64, sp, cpu, op, rest, arena);
    // PUSH RSP stores the old value, which this still is.
    let value = get(cpu, op.src).wrapping_add(op.imm);
    if cpu.ram.store(to, value).is_none() {
        return super::redecoded(cpu, op, rest, arena);
    }
    cpu.regs[slot::RSP] = sp;
    next!(cpu, rest, arena)
}

/// POP to a register; POP RSP keeps what it popped.
pub(in super::super) fn pop(cpu: &mut Cpu, op: &Op, rest: &[Op], arena: &[Op]) -> Leave {
    let sp = cpu.regs[slot::RSP];
    let value = load!(u64, sp, cpu, op, rest, arena);
    cpu.regs[slot::RSP] = sp.wrapping_add(8);
    cpu.regs[usize::from(op.dst)] = value;
    next!(cpu, rest, arena)
}

/// LEAVE.
pub(in super::super) fn leave(cpu: &mut Cpu, op: &Op, rest: &[Op], arena: &[Op]) -> Leave {
    let frame = cpu.regs[slot::RBP];
    let value = load!(u64, frame, cpu, op, rest, arena);
    cpu.regs[slot::RSP] = frame.wrapping_add(8);
    cpu.regs[slot::RBP] = value;
    next!(cpu, rest, arena)
}
