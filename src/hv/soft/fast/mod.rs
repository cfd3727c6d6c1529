//! The fast path: decoded instructions as pre-resolved operations that tail-call one another.
//!
//! An [`Op`] is an instruction with its operands resolved to register slots and a handler specialised for its form and
//! size. A handler does its work and calls the next one as its last act; the optimiser turns that into a jump, so that
//! each handler ends in its own indirect jump with its own branch prediction. A sibling call is an optimisation and no
//! guarantee, so the chain is bounded: every block takes its length off [`Cpu::budget`] and the chain returns to the
//! run loop when that is spent (which the timer and interrupts need anyway), so an unoptimised build needs a few
//! hundred KiB of stack and no more.
//!
//! ```text
//!   block (one page, ends at a branch)            links: same page, patched by the run loop
//!   [op][op][op][branch]  --link-->  [op][op][branch] ...
//!          |                 \--other page, RET, indirect--> jump cache, by linear address
//!          +--TLB miss--> fill and retry, or the general executor
//! ```
//!
//! What has no handler here, and every access that is not plain RAM behind a TLB hit, goes to the general executor,
//! one instruction at a time, which also raises all faults. So a handler changes nothing before its accesses have
//! succeeded.

pub(super) mod alu;
pub(super) mod branch;
pub(super) mod data;
pub(super) mod fused;
pub(super) mod sse;
pub(super) mod stack;

use crate::mem::Scalar;

use super::cpu::{Cpu, slot};
use super::fault::Flow;
use super::mmu::Access;

/// Why a chain of operations returned to the run loop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Leave {
    /// Nothing decoded is known for `Cpu::rip`; `Cpu::patch` may name the operation that wants to know.
    Lookup,
    /// The budget is spent; `Cpu::rip` is current.
    Budget,
    /// The run loop must look before going on at `Cpu::rip` (see [`Flow::Sync`]).
    Sync,
    /// HLT.
    Halt,
    /// `Cpu::stop` says what stopped the instruction at `Cpu::rip`.
    Stopped,
}

impl From<Flow> for Leave {
    /// Where the run loop has to look after each instruction.
    fn from(flow: Flow) -> Self {
        match flow {
            Flow::Next | Flow::Jump | Flow::Sync => Self::Sync,
            Flow::Again => Self::Budget,
            Flow::Halt => Self::Halt,
        }
    }
}

/// A handler: the processor, its own operation, those after it, and all decoded code.
pub(super) type Handler = fn(&mut Cpu, &Op, &[Op], &[Op]) -> Leave;

/// One operation: 32 bytes, so that two share a cache line.
#[derive(Clone, Copy, Debug)]
pub(super) struct Op {
    pub(super) run: Handler,
    /// Immediate, sign-extended; a branch's target relative to the page; the general executor's index.
    pub(super) imm: u64,
    /// Address displacement; a conditional branch's second link.
    pub(super) disp: i32,
    /// Decoded target of a branch within the page; 0 while unknown.
    pub(super) link: u32,
    pub(super) dst: u8,
    pub(super) src: u8,
    pub(super) base: u8,
    pub(super) index: u8,
    /// Offset of the instruction in its page.
    pub(super) at: u16,
    /// Length of the instruction.
    pub(super) len: u8,
    /// Low two bits: address scale. Upper six, in an operation that ends a block: the block's length.
    pub(super) misc: u8,
}

impl Op {
    /// How many instructions the block has that this operation ends; 0 in its midst.
    #[inline(always)]
    pub(super) fn block_length(&self) -> u8 {
        self.misc >> 2
    }

    /// Notes the length of the block that this operation ends, at most 63.
    pub(super) fn set_block_length(&mut self, instructions: u8) {
        self.misc = self.misc & 3 | instructions << 2;
    }
}

const _: () = assert!(size_of::<Op>() == 32);

/// No link yet; the arena's first operation is never a target.
pub(super) const UNLINKED: u32 = 0;

/// The run loop's request to fill a branch's link in once its target is decoded.
#[derive(Clone, Copy, Debug)]
pub(super) struct Patch {
    /// Index of the branch in the arena.
    pub(super) op: u32,
    /// The link in `disp` instead of the one in `link`.
    pub(super) second: bool,
}

/// An access that missed the TLB.
#[derive(Clone, Copy, Debug)]
pub(super) struct Miss {
    pub(super) va: u64,
    pub(super) size: u64,
}

/// Ends a handler by running the next operation.
macro_rules! next {
    ($cpu:expr, $rest:expr, $arena:expr) => {
        match $rest.split_first() {
            Some((op, rest)) => (op.run)($cpu, op, rest, $arena),
            // A block ends in a branch, which does not come here.
            None => crate::hv::soft::fast::Leave::Sync,
        }
    };
}
pub(super) use next;

/// Reads memory or leaves the handler for the miss path.
macro_rules! load {
    ($t:ty, $va:expr, $cpu:expr, $op:expr, $rest:expr, $arena:expr) => {{
        let va = $va;
        let hit = $cpu.tlb.read(va, <$t as crate::mem::Scalar>::SIZE);
        match hit.and_then(|offset| $cpu.ram.load::<$t>(offset)) {
            Some(value) => value,
            None => {
                $cpu.miss = crate::hv::soft::fast::Miss { va, size: <$t as crate::mem::Scalar>::SIZE };
                return crate::hv::soft::fast::read_miss($cpu, $op, $rest, $arena);
            }
        }
    }};
}
pub(super) use load;

/// Finds where a write goes, or leaves the handler for the miss path.
macro_rules! writable {
    ($t:ty, $va:expr, $cpu:expr, $op:expr, $rest:expr, $arena:expr) => {{
        let va = $va;
        match $cpu.tlb.write(va, <$t as crate::mem::Scalar>::SIZE) {
            Some(offset) => offset,
            None => {
                $cpu.miss = crate::hv::soft::fast::Miss { va, size: <$t as crate::mem::Scalar>::SIZE };
                return crate::hv::soft::fast::write_miss($cpu, $op, $rest, $arena);
            }
        }
    }};
}
pub(super) use writable;

/// An operand size.
pub(super) trait Word: Scalar {
    const BITS: u32;
    fn cut(value: u64) -> Self;
    fn widen64(self) -> u64;
    fn sign_extend(self) -> u64;
    /// Writes a register as this operand size does.
    fn set(cpu: &mut Cpu, register: u8, value: u64);
}

macro_rules! word {
    ($t:ty, $signed:ty, |$old:ident, $new:ident| $merge:expr) => {
        impl Word for $t {
            const BITS: u32 = <$t>::BITS;
            #[inline(always)]
            fn cut(value: u64) -> Self {
                value as Self
            }
            #[inline(always)]
            fn widen64(self) -> u64 {
                self.into()
            }
            #[inline(always)]
            fn sign_extend(self) -> u64 {
                self as $signed as i64 as u64
            }
            #[inline(always)]
            fn set(cpu: &mut Cpu, register: u8, $new: u64) {
                let $old = cpu.regs[usize::from(register)];
                cpu.regs[usize::from(register)] = $merge;
            }
        }
    };
}
word!(u8, i8, |old, new| old & !0xff | new & 0xff);
word!(u16, i16, |old, new| old & !0xffff | new & 0xffff);
word!(u32, i32, |_old, new| new & 0xffff_ffff);
word!(u64, i64, |_old, new| new);

/// A register slot; bits above the operand size are whatever they are.
#[inline(always)]
pub(super) fn get(cpu: &Cpu, register: u8) -> u64 {
    cpu.regs[usize::from(register)]
}

/// The linear address of an operation's memory operand. Segment bases are components like any other.
#[inline(always)]
pub(super) fn address<const INDEXED: bool>(cpu: &Cpu, op: &Op) -> u64 {
    let address = get(cpu, op.base).wrapping_add(op.disp as i64 as u64);
    if INDEXED { address.wrapping_add(get(cpu, op.index) << (op.misc & 3)) } else { address }
}

/// Goes on after a read that missed the TLB: again if the translation is now cached, else by the general executor.
#[cold]
#[inline(never)]
pub(super) fn read_miss(cpu: &mut Cpu, op: &Op, rest: &[Op], arena: &[Op]) -> Leave {
    let Miss { va, size } = cpu.miss;
    if cpu.ram_offset(va, Access::Read).is_ok() && cpu.tlb.read(va, size).is_some() {
        return (op.run)(cpu, op, rest, arena);
    }
    redecoded(cpu, op, rest, arena)
}

/// As [`read_miss`], for writes.
#[cold]
#[inline(never)]
pub(super) fn write_miss(cpu: &mut Cpu, op: &Op, rest: &[Op], arena: &[Op]) -> Leave {
    let Miss { va, size } = cpu.miss;
    if cpu.ram_offset(va, Access::Write).is_ok() && cpu.tlb.write(va, size).is_some() {
        return (op.run)(cpu, op, rest, arena);
    }
    redecoded(cpu, op, rest, arena)
}

/// Runs an operation's instruction by the general executor, from its bytes.
#[inline(never)]
fn redecoded(cpu: &mut Cpu, op: &Op, rest: &[Op], arena: &[Op]) -> Leave {
    cpu.rip = cpu.regs[slot::PAGE].wrapping_add(u64::from(op.at));
    match cpu.step() {
        Ok(flow) => after(cpu, op, flow, rest, arena),
        Err(stop) => {
            cpu.stop = stop;
            Leave::Stopped
        }
    }
}

/// Runs an instruction that has no handler of its own.
pub(super) fn general(cpu: &mut Cpu, op: &Op, rest: &[Op], arena: &[Op]) -> Leave {
    let Some(&(execute, ref insn)) = cpu.general.get(op.imm) else { return Leave::Sync };
    let insn = *insn;
    let at = cpu.regs[slot::PAGE].wrapping_add(u64::from(op.at));
    cpu.rip = at.wrapping_add(u64::from(op.len));
    match execute(cpu, &insn) {
        Ok(flow) => after(cpu, op, flow, rest, arena),
        Err(stop) => {
            cpu.rip = at;
            cpu.stop = stop;
            Leave::Stopped
        }
    }
}

#[inline(always)]
fn after(cpu: &mut Cpu, op: &Op, flow: Flow, rest: &[Op], arena: &[Op]) -> Leave {
    match flow {
        // The instruction may have written over what comes next.
        Flow::Next | Flow::Jump if !cpu.code_writes.is_empty() => Leave::Sync,
        Flow::Next => next!(cpu, rest, arena),
        Flow::Jump => {
            let target = cpu.rip;
            branch::jump(cpu, target, op.block_length().max(1), arena)
        }
        flow => flow.into(),
    }
}

/// Stands in for an instruction that crosses into the next page: decoded anew each time, since the second page may be
/// another one by then.
pub(super) fn crossing(cpu: &mut Cpu, op: &Op, _rest: &[Op], arena: &[Op]) -> Leave {
    cpu.rip = cpu.regs[slot::PAGE].wrapping_add(u64::from(op.at));
    match cpu.step() {
        Ok(Flow::Next | Flow::Jump) if cpu.code_writes.is_empty() => {
            let target = cpu.rip;
            branch::jump(cpu, target, 1, arena)
        }
        Ok(flow) => flow.into(),
        Err(stop) => {
            cpu.stop = stop;
            Leave::Stopped
        }
    }
}
