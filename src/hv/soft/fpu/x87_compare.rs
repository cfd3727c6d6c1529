//! x87 comparison and classification (Intel SDM volume 1, sections 8.3.6 and 8.1.4).

use std::cmp::Ordering;

use iced_x86::Instruction;
use iced_x86::Mnemonic;
use iced_x86::OpKind;

use crate::hv::soft::cpu::Cpu;
use crate::hv::soft::exec::Executor;
use crate::hv::soft::fault::Flow;
use crate::hv::soft::fault::Stop;
use crate::hv::soft::flags;

use super::extended::Class;
use super::extended::Extended;
use super::x87::C0;
use super::x87::C1;
use super::x87::C2;
use super::x87::C3;
use super::x87::INVALID;
use super::x87::X87;
use super::x87::st_index;
use super::x87_move::read_operand;

pub(super) fn executor(insn: &Instruction) -> Option<Executor> {
    Some(match insn.mnemonic() {
        Mnemonic::Fcom | Mnemonic::Ficom => |cpu, insn| compare_codes(cpu, insn, 0, true),
        Mnemonic::Fcomp | Mnemonic::Ficomp => |cpu, insn| compare_codes(cpu, insn, 1, true),
        Mnemonic::Fcompp => |cpu, insn| compare_codes(cpu, insn, 2, true),
        Mnemonic::Fucom => |cpu, insn| compare_codes(cpu, insn, 0, false),
        Mnemonic::Fucomp => |cpu, insn| compare_codes(cpu, insn, 1, false),
        Mnemonic::Fucompp => |cpu, insn| compare_codes(cpu, insn, 2, false),
        Mnemonic::Fcomi => |cpu, insn| compare_flags(cpu, insn, false, true),
        Mnemonic::Fcomip => |cpu, insn| compare_flags(cpu, insn, true, true),
        Mnemonic::Fucomi => |cpu, insn| compare_flags(cpu, insn, false, false),
        Mnemonic::Fucomip => |cpu, insn| compare_flags(cpu, insn, true, false),
        Mnemonic::Ftst => test,
        Mnemonic::Fxam => examine,
        _ => return None,
    })
}

/// Compares with the exceptions of it: the order (`None` when unordered), and whether the instruction completes.
fn compare(x87: &mut X87, a: Extended, b: Extended, denormal: bool, signal: bool) -> (Option<Ordering>, bool) {
    let (Some(x), Some(y)) = (a.number(), b.number()) else {
        let quiet = [a, b].iter().all(|v| !matches!(v.class(), Class::Signaling | Class::Unsupported));
        return (None, quiet && !signal || x87.raise(INVALID));
    };
    let completes = x87.note_denormals(a, b, denormal);
    (Some(x.compare(y)), completes)
}

fn codes(order: Option<Ordering>) -> u16 {
    match order {
        None => C3 | C2 | C0,
        Some(Ordering::Less) => C0,
        Some(Ordering::Equal) => C3,
        Some(Ordering::Greater) => 0,
    }
}

fn compare_codes(cpu: &mut Cpu, insn: &Instruction, pops: u32, signal: bool) -> Result<Flow, Stop> {
    cpu.begin_x87()?;
    let memory = if insn.op0_kind() == OpKind::Memory { Some(read_operand(cpu, insn)?) } else { None };
    cpu.note_x87(insn)?;
    let x87 = &mut cpu.fpu.x87;
    let i = match (memory, insn.op_count()) {
        (Some(_), _) => 0,
        (None, 0) => 1,
        (None, n) => st_index(insn.op_register(n - 1)),
    };
    let (order, completes) = if x87.is_empty(0) || x87.is_empty(i) {
        (None, x87.underflow_stack().is_some())
    } else {
        let (value, denormal) = memory.unwrap_or_else(|| (x87.raw(i), false));
        compare(x87, x87.raw(0), value, denormal, signal)
    };
    x87.set_condition(C0 | C1 | C2 | C3, codes(order));
    if completes {
        (0..pops).for_each(|_| x87.pop());
    }
    Ok(Flow::Next)
}

/// The forms that set RFLAGS leave C1 alone but for a stack fault.
fn compare_flags(cpu: &mut Cpu, insn: &Instruction, pop: bool, signal: bool) -> Result<Flow, Stop> {
    cpu.begin_x87()?;
    cpu.note_x87(insn)?;
    let (x87, i) = (&mut cpu.fpu.x87, st_index(insn.op1_register()));
    let (order, completes) = if x87.is_empty(0) || x87.is_empty(i) {
        (None, x87.underflow_stack().is_some())
    } else {
        compare(x87, x87.raw(0), x87.raw(i), false, signal)
    };
    cpu.flags.set_rflags(match order {
        None => flags::ZF | flags::PF | flags::CF,
        Some(Ordering::Less) => flags::CF,
        Some(Ordering::Equal) => flags::ZF,
        Some(Ordering::Greater) => 0,
    });
    if completes && pop {
        cpu.fpu.x87.pop();
    }
    Ok(Flow::Next)
}

fn test(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    cpu.begin_x87()?;
    cpu.note_x87(insn)?;
    let x87 = &mut cpu.fpu.x87;
    let order = if x87.is_empty(0) {
        x87.underflow_stack();
        None
    } else {
        compare(x87, x87.raw(0), Extended::zero(false), false, true).0
    };
    x87.set_condition(C0 | C1 | C2 | C3, codes(order));
    Ok(Flow::Next)
}

/// FXAM: C1 is the sign, also of an empty register's contents.
fn examine(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    cpu.begin_x87()?;
    cpu.note_x87(insn)?;
    let x87 = &mut cpu.fpu.x87;
    let value = x87.raw(0);
    let class = if x87.is_empty(0) {
        C3 | C0
    } else {
        match value.class() {
            Class::Unsupported => 0,
            Class::Quiet | Class::Signaling => C0,
            Class::Normal => C2,
            Class::Infinity => C2 | C0,
            Class::Zero => C3,
            Class::Denormal => C3 | C2,
        }
    };
    let sign = if value.sign() { C1 } else { 0 };
    x87.set_condition(C0 | C1 | C2 | C3, class | sign);
    Ok(Flow::Next)
}
