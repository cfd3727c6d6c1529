//! Decoded code: the arena of operations, and how blocks are found, linked and dropped.
//!
//! Blocks are known by the RAM offset of their first byte, so one decoding serves every mapping of the page and
//! outlives context switches. A block that the guest overwrites is not removed from the arena (others link to it):
//! its first operation becomes [`branch::forward`], which leads to whatever is decoded in its place.
//!
//! ```text
//!   arena  [ of the image, shared until it is changed ][ decoded or copied by this processor ... ]
//! ```
//!
//! The arena of a machine whose memory others have had begins with their code, a [`CodeImage`]. A page of the image is
//! taken whole, or not; and given up whole when one of its blocks is overwritten.

use std::collections::HashMap;
use std::sync::Arc;

use rustc_hash::FxBuildHasher;

use crate::hv::HvError;
use crate::mem::CowArray;
use crate::units::PAGE_SIZE;

use super::code_image::{CodeImage, GeneralCode, Page};
use super::cpu::Cpu;
use super::fast::branch;
use super::fast::{Leave, Op, Patch, UNLINKED};
use super::shared_code::Blocks;
use super::translate::{Block, Translator};

/// Operations of its own that a processor keeps before everything is dropped and decoded anew: 32 MiB of them.
const MAX_OPS: usize = 1 << 20;
/// More than a block has.
const SPARE_OPS: usize = 128;

/// A block's place in its page.
#[derive(Clone, Copy, Debug)]
struct Extent {
    /// RAM offset of the first byte, and the number of bytes.
    start: u64,
    bytes: u64,
    op: u32,
}

impl Extent {
    fn overlaps(&self, offset: u64, len: u64) -> bool {
        self.start < offset.saturating_add(len) && offset < self.start + self.bytes
    }
}

/// All decoded code of one processor.
#[derive(Debug)]
pub(super) struct CodeCache {
    arena: CowArray<Op>,
    begun: Option<Begun>,
    /// The processor's own blocks.
    blocks: HashMap<u64, u32, FxBuildHasher>,
    pages: HashMap<u64, Vec<Extent>, FxBuildHasher>,
    translator: Translator,
    /// Of machines with the same memory.
    shared: Option<Arc<Blocks>>,
}

/// The code that a processor began with.
#[derive(Debug)]
struct Begun {
    image: Arc<CodeImage>,
    /// By the pages' numbers.
    taken: Box<[Taken]>,
}

/// What a processor has of a page of the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Taken {
    /// It has not come there.
    Untried,
    /// All of it.
    Whole,
    /// Nothing: its memory has other bytes there, or had for a while.
    Not,
}

impl Begun {
    fn new(image: Arc<CodeImage>) -> Self {
        let taken = vec![Taken::Untried; image.page_count()].into();
        Self { image, taken }
    }

    /// The block at a RAM offset, if the image has one and the processor may use it.
    fn block(&mut self, cpu: &mut Cpu, at: u64) -> Option<u32> {
        let page = self.image.page(at)?;
        let taken = self.taken.get_mut(page.number)?;
        if *taken == Taken::Untried {
            *taken = if self.image.is_of(page, &cpu.ram) { Taken::Whole } else { Taken::Not };
            if *taken == Taken::Whole {
                mark(cpu, &self.image, page);
            }
        }
        if *taken == Taken::Whole { self.image.block(page, at) } else { None }
    }

    /// The page of a RAM offset, if it is taken.
    fn whole(&self, at: u64) -> Option<&Page> {
        let page = self.image.page(at)?;
        (self.taken.get(page.number) == Some(&Taken::Whole)).then_some(page)
    }

    /// Whether a range of one page has bytes of blocks that are taken.
    fn overlaps(&self, offset: u64, len: u64) -> bool {
        let places = self.whole(offset).map(|page| self.image.places(page)).unwrap_or_default();
        places
            .iter()
            .any(|place| Extent { start: place.at, bytes: place.bytes.into(), op: place.op }.overlaps(offset, len))
    }
}

/// Notes a page's blocks as decoded.
fn mark(cpu: &mut Cpu, image: &CodeImage, page: &Page) {
    for place in image.places(page) {
        cpu.code_map.mark(place.at, place.bytes.into());
    }
}

impl CodeCache {
    /// No code, or that of `shared`, whose other instructions `cpu` gets.
    ///
    /// # Errors
    /// [`HvError::Call`] when the host has no memory.
    pub(super) fn new(shared: Option<Arc<Blocks>>, cpu: &mut Cpu) -> Result<Self, HvError> {
        let image = shared.as_ref().and_then(|shared| shared.image());
        let arena = CowArray::new(image.as_ref().map(|image| image.ops()), MAX_OPS + SPARE_OPS);
        cpu.general = GeneralCode::new(image.clone());
        let mut cache = Self {
            arena: arena.map_err(|source| HvError::Call { call: "mmap", source })?,
            begun: image.map(Begun::new),
            blocks: HashMap::default(),
            pages: HashMap::default(),
            translator: Translator::new(),
            shared,
        };
        cache.begin();
        Ok(cache)
    }

    /// An arena is never empty: index 0 is no block's, so that a link of 0 means none.
    fn begin(&mut self) {
        if self.arena.as_slice().is_empty() {
            let _room = self.arena.extend(&[UNREACHABLE]);
        }
    }

    pub(super) fn arena(&self) -> &[Op] {
        self.arena.as_slice()
    }

    /// The block at a RAM offset, decoded now if it is not known; `None` while another vCPU may write there unnoticed.
    pub(super) fn block(&mut self, cpu: &mut Cpu, at: u64) -> Option<u32> {
        if let Some(&block) = self.blocks.get(&at) {
            return Some(block);
        }
        let image = self.begun.as_ref().map_or(0, |begun| begun.image.ops().len());
        if self.arena().len() > image + MAX_OPS {
            self.clear(cpu);
        }
        if !cpu.sharing.guard(&mut cpu.tlb, at) {
            return None;
        }
        if let Some(block) = self.begun.as_mut().and_then(|begun| begun.block(cpu, at)) {
            return Some(block);
        }
        let op = self.arena().len() as u32;
        let bytes = self.decode(cpu, at);
        self.blocks.insert(at, op);
        self.pages.entry(at / PAGE_SIZE).or_default().push(Extent { start: at, bytes, op });
        cpu.code_map.mark(at, bytes);
        Some(op)
    }

    /// Appends the block at a RAM offset to the arena, as somebody has decoded it before, or decoded here. Returns how many
    /// bytes of the page it came from.
    fn decode(&mut self, cpu: &mut Cpu, at: u64) -> u64 {
        let Self { arena, shared, translator, .. } = self;
        let Cpu { ram, general, .. } = cpu;
        let mut install = |block: Block<'_>| {
            let (start, first) = (arena.as_slice().len(), general.len() as u64);
            // There is room: see `block`. A block that is not there ends the guest with an error.
            if arena.extend(block.ops) {
                general.extend(block.general);
                for index in block.general_from(start) {
                    if let Some(op) = arena.get_mut(index) {
                        op.imm += first;
                    }
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

    /// Drops what was decoded from pages that devices or other vCPUs have written.
    pub(super) fn drop_others_written(&mut self, cpu: &mut Cpu) {
        for page in cpu.sharing.take_written() {
            self.drop_range(cpu, page, PAGE_SIZE);
        }
    }

    /// Drops the blocks of one page that overlap a range in it; all that are of the image, if one does.
    fn drop_range(&mut self, cpu: &mut Cpu, offset: u64, len: u64) {
        let Self { arena, begun, blocks, pages, .. } = self;
        if let Some(begun) = begun
            && begun.overlaps(offset, len)
            && let Some(page) = begun.image.page(offset)
        {
            begun.image.places(page).iter().for_each(|place| lead_on(arena, place.op, place.at));
            begun.taken[page.number] = Taken::Not;
        }
        let page = offset / PAGE_SIZE;
        if let Some(extents) = pages.get_mut(&page) {
            extents.retain(|extent| {
                let overlaps = extent.overlaps(offset, len);
                if overlaps {
                    blocks.remove(&extent.start);
                    lead_on(arena, extent.op, extent.start);
                }
                !overlaps
            });
            if extents.is_empty() {
                pages.remove(&page);
            }
        }
        self.mark_anew(cpu, offset);
    }

    /// Brings what is known of a page's decoded bytes up to date after some were dropped.
    fn mark_anew(&self, cpu: &mut Cpu, offset: u64) {
        cpu.code_map.clear_page(offset);
        for extent in self.pages.get(&(offset / PAGE_SIZE)).into_iter().flatten() {
            cpu.code_map.mark(extent.start, extent.bytes);
        }
        if let Some(begun) = &self.begun
            && let Some(page) = begun.whole(offset)
        {
            mark(cpu, &begun.image, page);
        }
        if !cpu.code_map.page_has_code(offset) {
            cpu.sharing.unguard(offset);
        }
    }

    /// Drops everything: what is left is what the processor began with.
    pub(super) fn clear(&mut self, cpu: &mut Cpu) {
        cpu.sharing.unguard_all();
        if let Err(error) = self.arena.reset() {
            // What it began with may be in any state.
            self.begun = None;
            tracing::debug!(%error, "shared code is given up");
        }
        self.begin();
        if let Some(begun) = &mut self.begun {
            begun.taken.fill(Taken::Untried);
        }
        self.blocks.clear();
        self.pages.clear();
        cpu.code_map.clear();
        cpu.general.clear();
        cpu.jumps.clear();
        cpu.patch = None;
    }
}

/// Makes the block at index `op`, decoded from RAM offset `at`, lead to what is decoded in its place.
fn lead_on(arena: &mut CowArray<Op>, op: u32, at: u64) {
    if let Some(op) = arena.get_mut(op as usize) {
        *op = Op { run: branch::forward, link: UNLINKED, misc: 1 << 2, at: (at % PAGE_SIZE) as u16, ..*op };
    }
}

/// At index 0.
pub(super) const UNREACHABLE: Op = Op {
    run: |_, _, _, _| Leave::Sync,
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
};
