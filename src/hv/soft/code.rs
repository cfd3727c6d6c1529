//! Decoded code: the arena of operations, and how blocks are found, linked and dropped.
//!
//! Blocks are known by the RAM offset of their first byte, so one decoding serves every mapping of the page and
//! outlives context switches. A block that the guest overwrites is not removed from the arena (others link to it):
//! its first operation becomes [`branch::forward`], which leads to whatever is decoded in its place.

use std::collections::HashMap;
use std::sync::Arc;

use rustc_hash::FxBuildHasher;

use crate::units::PAGE_SIZE;

use super::cpu::Cpu;
use super::fast::branch;
use super::fast::{Op, Patch, UNLINKED};
use super::shared_code::Blocks;
use super::translate::{Block, Translator};

/// Operations kept before everything is dropped and decoded anew: 32 MiB of them.
const MAX_OPS: usize = 1 << 20;

/// A block's place in its page.
#[derive(Clone, Copy, Debug)]
struct Extent {
    /// RAM offset of the first byte, and the number of bytes.
    start: u64,
    bytes: u64,
    op: u32,
}

/// All decoded code of one processor.
#[derive(Debug)]
pub(super) struct CodeCache {
    arena: Vec<Op>,
    blocks: HashMap<u64, u32, FxBuildHasher>,
    pages: HashMap<u64, Vec<Extent>, FxBuildHasher>,
    translator: Translator,
    /// Of machines with the same memory.
    shared: Option<Arc<Blocks>>,
}

impl CodeCache {
    pub(super) fn new(shared: Option<Arc<Blocks>>) -> Self {
        let translator = Translator::new();
        let mut cache = Self {
            arena: Vec::with_capacity(MAX_OPS + 128),
            // A kernel's boot decodes some tens of thousands, a guest that is restored and idle a few thousand.
            blocks: HashMap::with_capacity_and_hasher(1 << 11, FxBuildHasher),
            pages: HashMap::default(),
            translator,
            shared,
        };
        // Reserved whole so that it never moves; the host gives memory only for what is used.
        cache.arena.push(unreachable_op());
        cache
    }

    pub(super) fn arena(&self) -> &[Op] {
        &self.arena
    }

    /// The block at a RAM offset, decoded now if it is not known.
    pub(super) fn block(&mut self, cpu: &mut Cpu, at: u64) -> u32 {
        if let Some(&block) = self.blocks.get(&at) {
            return block;
        }
        if self.arena.len() > MAX_OPS {
            self.clear(cpu);
        }
        let op = self.arena.len() as u32;
        let bytes = self.decode(cpu, at);
        self.blocks.insert(at, op);
        self.pages.entry(at / PAGE_SIZE).or_default().push(Extent { start: at, bytes, op });
        if cpu.code_map.mark(at, bytes) {
            cpu.tlb.guard_writes(at);
            cpu.ram.code_pages().watch(at);
        }
        op
    }

    /// Appends the block at a RAM offset to the arena, as somebody has decoded it before, or decoded here. Returns how many
    /// bytes of the page it came from.
    fn decode(&mut self, cpu: &mut Cpu, at: u64) -> u64 {
        let Self { arena, shared, translator, .. } = self;
        let Cpu { ram, general, .. } = cpu;
        let mut install = |block: Block<'_>| {
            let (start, first) = (arena.len(), general.len() as u64);
            arena.extend_from_slice(block.ops);
            general.extend_from_slice(block.general);
            for &op in block.general_ops {
                if let Some(op) = arena.get_mut(start + usize::from(op)) {
                    op.imm += first;
                }
            }
            block.source.len() as u64
        };
        if let Some(bytes) = shared.as_ref().and_then(|shared| shared.get(ram, at, &mut install)) {
            return bytes;
        }
        let block = translator.block(ram, at);
        if let Some(shared) = shared {
            shared.offer(at, block);
        }
        install(block)
    }

    /// Links the branch that asked to the block that was found for it.
    pub(super) fn patch(&mut self, patch: Patch, block: u32) {
        if let Some(op) = self.arena.get_mut(patch.op as usize) {
            if patch.second {
                op.disp = block as i32;
            } else {
                op.link = block;
            }
        }
    }

    /// Drops what was decoded from bytes that the guest has overwritten.
    pub(super) fn drop_written(&mut self, cpu: &mut Cpu) {
        while let Some((offset, len)) = cpu.code_writes.pop() {
            self.drop_range(cpu, offset, u64::from(len));
        }
    }

    /// Drops what was decoded from pages that devices have written.
    pub(super) fn drop_device_written(&mut self, cpu: &mut Cpu) {
        let mut pages = Vec::new();
        cpu.ram.code_pages().take_written(|page| pages.push(page));
        for page in pages {
            self.drop_range(cpu, page, PAGE_SIZE);
        }
    }

    /// Drops the blocks of one page that overlap a range in it.
    fn drop_range(&mut self, cpu: &mut Cpu, offset: u64, len: u64) {
        let page = offset / PAGE_SIZE;
        let Some(extents) = self.pages.get_mut(&page) else { return };
        let end = offset.saturating_add(len);
        let (arena, blocks) = (&mut self.arena, &mut self.blocks);
        extents.retain(|extent| {
            let overlaps = extent.start < end && offset < extent.start + extent.bytes;
            if overlaps {
                blocks.remove(&extent.start);
                if let Some(op) = arena.get_mut(extent.op as usize) {
                    *op = Op {
                        run: branch::forward,
                        link: UNLINKED,
                        misc: 1 << 2,
                        at: (extent.start % PAGE_SIZE) as u16,
                        ..*op
                    };
                }
            }
            !overlaps
        });
        cpu.code_map.clear_page(offset);
        for extent in extents.iter() {
            cpu.code_map.mark(extent.start, extent.bytes);
        }
        if extents.is_empty() {
            self.pages.remove(&page);
            cpu.ram.code_pages().unwatch(offset);
        }
    }

    /// Drops everything.
    pub(super) fn clear(&mut self, cpu: &mut Cpu) {
        for &page in self.pages.keys() {
            cpu.ram.code_pages().unwatch(page * PAGE_SIZE);
        }
        self.arena.truncate(1);
        self.blocks.clear();
        self.pages.clear();
        cpu.code_map.clear();
        cpu.general.clear();
        cpu.jumps.clear();
        cpu.patch = None;
    }
}

/// Index 0, so that no block has it and a link of 0 means none.
fn unreachable_op() -> Op {
    Op {
        run: |_, _, _, _| super::fast::Leave::Sync,
        imm: 0,
        disp: 0,
        link: UNLINKED,
        dst: 0,
        src: 0,
        base: 0,
        index: 0,
        at: 0,
        len: 0,
        misc: 0,
    }
}
