//! Jumps: where one block hands over to the next.

use super::super::cpu::{Cpu, slot};
use super::{Leave, Op, Patch, UNLINKED, address, get, load, writable};
use crate::units::PAGE_SIZE;

/// Remembered by linear address: the address inverted; then the fetch epoch and privilege mode that the entry is good for,
/// and the block decoded there. An entry of zeros is that of the last byte of the address space, where no instruction lies
/// that is worth remembering.
type JumpEntry = [u64; 2];

/// Entries of the jump cache, 16 bytes each: about as many as a fork and exec run through different blocks.
pub(in super::super) const JUMP_ENTRIES: usize = 8192;

/// Blocks by linear address, direct-mapped.
#[derive(Debug)]
pub(in super::super) struct JumpCache(Box<[JumpEntry; JUMP_ENTRIES]>);

impl JumpCache {
    pub(in super::super) fn new() -> Self {
        // Integers of zeros, so that the host gives memory only for what is used. Not by way of an array, which would be
        // made on the stack and keep it large.
        let entries = vec![[0; 2]; JUMP_ENTRIES].into_boxed_slice();
        Self(entries.try_into().expect("as many entries as were asked for"))
    }

    #[inline(always)]
    fn index(va: u64) -> usize {
        (va ^ (va >> 12)) as usize & (JUMP_ENTRIES - 1)
    }

    pub(in super::super) fn insert(&mut self, va: u64, key: u32, block: u32) {
        self.0[Self::index(va)] = [!va, u64::from(key) << 32 | u64::from(block)];
    }

    #[inline(always)]
    fn get(&self, va: u64, key: u32) -> Option<u32> {
        let [at, what] = self.0[Self::index(va)];
        (at == !va && (what >> 32) as u32 == key).then_some(what as u32)
    }

    pub(in super::super) fn clear(&mut self) {
        *self = Self::new();
    }
}

impl Cpu {
    /// What jump-cache entries for `va` must be keyed with now.
    #[inline(always)]
    pub(in super::super) fn fetch_key(&self, va: u64) -> u32 {
        self.fetches.epoch(va) << 1 | self.tlb.mode as u32
    }
}

#[inline(always)]
fn enter(cpu: &mut Cpu, block: u32, target: u64, arena: &[Op]) -> Leave {
    match arena.get(block as usize..).and_then(<[Op]>::split_first) {
        Some((op, rest)) => (op.run)(cpu, op, rest, arena),
        None => {
            cpu.rip = target;
            Leave::Lookup
        }
    }
}

#[inline(always)]
fn spend(cpu: &mut Cpu, instructions: u8) -> bool {
    cpu.budget -= i32::from(instructions);
    cpu.budget < 0
}

/// Goes to any linear address, at the end of a block of `instructions`.
#[inline(always)]
pub(super) fn jump(cpu: &mut Cpu, target: u64, instructions: u8, arena: &[Op]) -> Leave {
    if spend(cpu, instructions) {
        cpu.rip = target;
        return Leave::Budget;
    }
    match cpu.jumps.get(target, cpu.fetch_key(target)) {
        // Who has learnt from another vCPU that there is code, as from a pointer to it, has also been told what it replaces.
        Some(block) if !cpu.sharing.any_written() => {
            cpu.regs[slot::PAGE] = target & !(PAGE_SIZE - 1);
            enter(cpu, block, target, arena)
        }
        _ => {
            cpu.rip = target;
            Leave::Lookup
        }
    }
}

/// Goes to a target within the page: through the link once that is patched.
#[inline(always)]
fn jump_in_page(cpu: &mut Cpu, op: &Op, rest: &[Op], arena: &[Op], target: u64, second: bool) -> Leave {
    let target = cpu.regs[slot::PAGE].wrapping_add(target);
    if spend(cpu, op.block_length()) {
        cpu.rip = target;
        return Leave::Budget;
    }
    let link = if second { op.disp as u32 } else { op.link };
    if link != UNLINKED {
        return enter(cpu, link, target, arena);
    }
    cpu.patch = Some(Patch { op: (arena.len() - rest.len() - 1) as u32, second });
    cpu.rip = target;
    Leave::Lookup
}

/// Goes to `target`, an offset from the page that may lie outside it.
#[inline(always)]
fn jump_relative(cpu: &mut Cpu, op: &Op, rest: &[Op], arena: &[Op], target: u64, second: bool) -> Leave {
    if target < PAGE_SIZE {
        return jump_in_page(cpu, op, rest, arena, target, second);
    }
    let target = cpu.regs[slot::PAGE].wrapping_add(target);
    jump(cpu, target, op.block_length(), arena)
}

/// JMP rel, and the end of a block that runs into the next.
pub(in super::super) fn jmp(cpu: &mut Cpu, op: &Op, rest: &[Op], arena: &[Op]) -> Leave {
    jump_relative(cpu, op, rest, arena, op.imm, false)
}

/// What an invalidated block begins with: leads to what was decoded in its place.
pub(in super::super) fn forward(cpu: &mut Cpu, op: &Op, rest: &[Op], arena: &[Op]) -> Leave {
    jump_in_page(cpu, op, rest, arena, u64::from(op.at), false)
}

#[inline(always)]
fn following(op: &Op) -> u64 {
    u64::from(op.at) + u64::from(op.len)
}

/// Goes to `target` (an offset from the page) or on: the taken link is in `link`, the other in `disp`.
#[inline(always)]
pub(super) fn conditional(cpu: &mut Cpu, op: &Op, rest: &[Op], arena: &[Op], taken: bool, target: u64) -> Leave {
    if taken {
        jump_relative(cpu, op, rest, arena, target, false)
    } else {
        jump_relative(cpu, op, rest, arena, following(op), true)
    }
}

/// Jcc.
pub(in super::super) fn jcc<const CC: u8>(cpu: &mut Cpu, op: &Op, rest: &[Op], arena: &[Op]) -> Leave {
    let taken = cpu.flags.condition(CC);
    conditional(cpu, op, rest, arena, taken, op.imm)
}

/// CALL rel.
pub(in super::super) fn call(cpu: &mut Cpu, op: &Op, rest: &[Op], arena: &[Op]) -> Leave {
    let sp = cpu.regs[slot::RSP].wrapping_sub(8);
    let to = writable!(u64, sp, cpu, op, rest, arena);
    let back = cpu.regs[slot::PAGE].wrapping_add(following(op));
    if cpu.ram.store(to, back).is_none() {
        return super::redecoded(cpu, op, rest, arena);
    }
    cpu.regs[slot::RSP] = sp;
    jump_relative(cpu, op, rest, arena, op.imm, false)
}

/// RET and RET imm16.
pub(in super::super) fn ret(cpu: &mut Cpu, op: &Op, rest: &[Op], arena: &[Op]) -> Leave {
    let sp = cpu.regs[slot::RSP];
    let target = load!(u64, sp, cpu, op, rest, arena);
    if !super::super::cpu::is_canonical(target) {
        return super::redecoded(cpu, op, rest, arena);
    }
    cpu.regs[slot::RSP] = sp.wrapping_add(8).wrapping_add(op.imm);
    jump(cpu, target, op.block_length(), arena)
}

/// JMP r64.
pub(in super::super) fn jmp_register(cpu: &mut Cpu, op: &Op, rest: &[Op], arena: &[Op]) -> Leave {
    let target = get(cpu, op.dst);
    if !super::super::cpu::is_canonical(target) {
        return super::redecoded(cpu, op, rest, arena);
    }
    jump(cpu, target, op.block_length(), arena)
}

/// CALL r64.
pub(in super::super) fn call_register(cpu: &mut Cpu, op: &Op, rest: &[Op], arena: &[Op]) -> Leave {
    let target = get(cpu, op.dst);
    if !super::super::cpu::is_canonical(target) {
        return super::redecoded(cpu, op, rest, arena);
    }
    let sp = cpu.regs[slot::RSP].wrapping_sub(8);
    let to = writable!(u64, sp, cpu, op, rest, arena);
    let back = cpu.regs[slot::PAGE].wrapping_add(following(op));
    if cpu.ram.store(to, back).is_none() {
        return super::redecoded(cpu, op, rest, arena);
    }
    cpu.regs[slot::RSP] = sp;
    jump(cpu, target, op.block_length(), arena)
}

/// JMP m64: a PLT entry, a jump table.
pub(in super::super) fn jmp_memory<const I: bool>(cpu: &mut Cpu, op: &Op, rest: &[Op], arena: &[Op]) -> Leave {
    let target = load!(u64, address::<I>(cpu, op), cpu, op, rest, arena);
    if !super::super::cpu::is_canonical(target) {
        return super::redecoded(cpu, op, rest, arena);
    }
    jump(cpu, target, op.block_length(), arena)
}

/// CALL m64.
pub(in super::super) fn call_memory<const I: bool>(cpu: &mut Cpu, op: &Op, rest: &[Op], arena: &[Op]) -> Leave {
    let target = load!(u64, address::<I>(cpu, op), cpu, op, rest, arena);
    let sp = cpu.regs[slot::RSP].wrapping_sub(8);
    let back = cpu.regs[slot::PAGE].wrapping_add(following(op));
    // Not by the miss path: two accesses that share a TLB entry would evict each other for ever.
    if !super::super::cpu::is_canonical(target) || cpu.write(sp, back).is_err() {
        return super::redecoded(cpu, op, rest, arena);
    }
    cpu.regs[slot::RSP] = sp;
    if !cpu.code_writes.is_empty() {
        cpu.rip = target;
        return Leave::Sync;
    }
    jump(cpu, target, op.block_length(), arena)
}

/// Jcc handlers by condition code.
pub(in super::super) const JCC: [super::Handler; 16] = [
    jcc::<0>, jcc::<1>, jcc::<2>, jcc::<3>, jcc::<4>, jcc::<5>, jcc::<6>, jcc::<7>, jcc::<8>, jcc::<9>, jcc::<10>,
    jcc::<11>, jcc::<12>, jcc::<13>, jcc::<14>, jcc::<15>,
];
