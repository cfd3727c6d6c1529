//! Decoded code as many processors begin with it: the blocks that machines with the same memory have decoded, laid out
//! and linked, in memory that they share until they change it.
//!
//! A processor takes a page's blocks all together, the first time that it comes to one of them and if its memory holds the
//! very bytes that each was decoded from. Links lead from a block to others of the same page only, so they hold for
//! whoever has taken the page. See [`CodeCache`](super::code::CodeCache) for what becomes of a page that is written.

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use iced_x86::Instruction;
use rustc_hash::FxBuildHasher;

use crate::mem::{ArrayImage, GuestRam};
use crate::units::PAGE_SIZE;

use super::code::UNREACHABLE;
use super::exec::Executor;
use super::fast::Op;
use super::translate::{Block, Exits};

/// A block of an image.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    /// RAM offset of its first byte, and how many bytes it was decoded from.
    pub(super) at: u64,
    pub(super) bytes: u8,
    /// Index of its first operation.
    pub(super) op: u32,
    /// Where those bytes are kept.
    source: u32,
}

/// The image.
#[derive(Debug)]
pub(super) struct CodeImage {
    ops: ArrayImage<Op>,
    general: Box<[(Executor, Instruction)]>,
    /// All blocks by their offset, and which of them each page has.
    places: Box<[Place]>,
    pages: HashMap<u64, Page, FxBuildHasher>,
    source: Box<[u8]>,
}

/// A page with blocks in an image.
#[derive(Clone, Debug)]
pub(super) struct Page {
    /// Pages are numbered from 0.
    pub(super) number: usize,
    places: Range<usize>,
}

impl CodeImage {
    /// Lays out `blocks`, each with its RAM offset, which ascend.
    ///
    /// # Errors
    /// What the host refuses.
    pub(super) fn new<'a>(blocks: impl Iterator<Item = (u64, Block<'a>)>) -> io::Result<Self> {
        let mut draft = Draft::default();
        blocks.for_each(|(at, block)| draft.add(at, block));
        draft.link();
        let Draft { ops, general, places, pages, source, .. } = draft;
        Ok(Self {
            ops: ArrayImage::new(&ops)?,
            general: general.into(),
            places: places.into(),
            pages,
            source: source.into(),
        })
    }

    /// The operations.
    pub(super) fn ops(&self) -> &ArrayImage<Op> {
        &self.ops
    }

    /// How many pages have blocks.
    pub(super) fn page_count(&self) -> usize {
        self.pages.len()
    }

    /// The page of a RAM offset.
    pub(super) fn page(&self, at: u64) -> Option<&Page> {
        self.pages.get(&(at / PAGE_SIZE))
    }

    /// The blocks of a page.
    pub(super) fn places(&self, page: &Page) -> &[Place] {
        self.places.get(page.places.clone()).unwrap_or_default()
    }

    /// The first operation of the block at a RAM offset of `page`.
    pub(super) fn block(&self, page: &Page, at: u64) -> Option<u32> {
        let places = self.places(page);
        let found = places.binary_search_by_key(&at, |place| place.at).ok()?;
        places.get(found).map(|place| place.op)
    }

    /// Whether `ram` has what all blocks of the page were decoded from.
    pub(super) fn is_of(&self, page: &Page, ram: &GuestRam) -> bool {
        let mut bytes = [0; PAGE_SIZE as usize];
        let places = self.places(page);
        let Some(first) = places.first() else { return true };
        if ram.read_bytes(first.at / PAGE_SIZE * PAGE_SIZE, &mut bytes).is_none() {
            return false;
        }
        places.iter().all(|place| {
            let len = usize::from(place.bytes);
            let there = bytes.get((place.at % PAGE_SIZE) as usize..).and_then(|bytes| bytes.get(..len));
            let kept = self.source.get(place.source as usize..).and_then(|source| source.get(..len));
            there.is_some() && there == kept
        })
    }
}

/// Instructions that the general executor runs, by the immediates of its operations: those of an image, then the
/// processor's own.
#[derive(Debug, Default)]
pub(super) struct GeneralCode {
    image: Option<Arc<CodeImage>>,
    /// How many are the image's.
    begun: usize,
    own: Vec<(Executor, Instruction)>,
}

impl GeneralCode {
    pub(super) fn new(image: Option<Arc<CodeImage>>) -> Self {
        let begun = image.as_ref().map_or(0, |image| image.general.len());
        Self { image, begun, own: Vec::new() }
    }

    #[inline(always)]
    pub(super) fn get(&self, index: u64) -> Option<&(Executor, Instruction)> {
        let index = index as usize;
        match index.checked_sub(self.begun) {
            Some(own) => self.own.get(own),
            None => self.image.as_ref()?.general.get(index),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.begun + self.own.len()
    }

    pub(super) fn extend(&mut self, more: &[(Executor, Instruction)]) {
        self.own.extend_from_slice(more);
    }

    /// Drops the processor's own.
    pub(super) fn clear(&mut self) {
        self.own.clear();
    }
}

/// An image in the making.
#[derive(Default)]
struct Draft {
    ops: Vec<Op>,
    general: Vec<(Executor, Instruction)>,
    places: Vec<Place>,
    pages: HashMap<u64, Page, FxBuildHasher>,
    source: Vec<u8>,
    /// For each block the index of its last operation, and the offsets in the page that this may go to.
    exits: Vec<(usize, Exits)>,
}

impl Draft {
    fn add(&mut self, at: u64, block: Block<'_>) {
        // The first operation is never a target: see `UNLINKED`.
        if self.ops.is_empty() {
            self.ops.push(UNREACHABLE);
        }
        let (op, source, number) = (self.ops.len(), self.source.len(), self.pages.len());
        let Some(place) = place(at, block.source.len(), op, source) else { return };
        let general = self.general.len() as u64;
        self.ops.extend_from_slice(block.ops);
        self.general.extend_from_slice(block.general);
        for index in block.general_from(op) {
            self.ops[index].imm += general;
        }
        self.source.extend_from_slice(block.source);
        self.exits.push((self.ops.len() - 1, block.exits));
        let index = self.places.len();
        self.places.push(place);
        let page = self.pages.entry(at / PAGE_SIZE).or_insert(Page { number, places: index..index });
        page.places.end = index + 1;
    }

    /// Lets each block lead to those of its page that it may go on with.
    fn link(&mut self) {
        for (place, (last, exits)) in self.places.iter().zip(&self.exits) {
            let Some(page) = self.pages.get(&(place.at / PAGE_SIZE)) else { continue };
            let places = self.places.get(page.places.clone()).unwrap_or_default();
            let target = |exit: Option<u16>| {
                let at = place.at / PAGE_SIZE * PAGE_SIZE + u64::from(exit?);
                let found = places.binary_search_by_key(&at, |place| place.at).ok()?;
                places.get(found).map(|place| place.op)
            };
            let Some(op) = self.ops.get_mut(*last) else { continue };
            if let Some(link) = target(exits[0]) {
                op.link = link;
            }
            if let Some(link) = target(exits[1]) {
                op.disp = link as i32;
            }
        }
    }
}

fn place(at: u64, bytes: usize, op: usize, source: usize) -> Option<Place> {
    Some(Place {
        at,
        bytes: bytes.try_into().ok()?,
        // A link may be kept as a positive number of 32 bits.
        op: i32::try_from(op).ok()? as u32,
        source: source.try_into().ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hv::soft::fast::UNLINKED;
    use crate::hv::soft::translate::Translator;
    use crate::mem::CowArray;
    use crate::units::Bytes;

    /// A loop of two blocks (`dec ecx; jne .; cpuid; jmp -9`) at the end of one page, and a call of it from the next.
    const LOOP: u64 = 0xff0;
    const CALL: u64 = 0x1000;

    fn ram() -> GuestRam {
        let ram = GuestRam::new(Bytes(4 * PAGE_SIZE)).unwrap();
        let code = [0xffu8, 0xc9, 0x75, 0xfc, 0x0f, 0xa2, 0xeb, 0xf8];
        code.iter().zip(LOOP..).for_each(|(byte, at)| ram.store(at, *byte).unwrap());
        let code = [0xe8u8, 0xeb, 0xff, 0xff, 0xff];
        code.iter().zip(CALL..).for_each(|(byte, at)| ram.store(at, *byte).unwrap());
        ram
    }

    fn image(ram: &GuestRam) -> CodeImage {
        let mut translators = [(); 3].map(|()| Translator::new());
        let offsets = [LOOP, LOOP + 4, CALL];
        let blocks = translators.iter_mut().zip(offsets).map(|(translator, at)| (at, translator.block(ram, at)));
        CodeImage::new(blocks).unwrap()
    }

    #[test]
    fn blocks_lead_to_those_of_their_page() {
        let ram = ram();
        let image = image(&ram);
        let ops = CowArray::new(Some(image.ops()), 0).unwrap();
        let block = |at| image.block(image.page(at).unwrap(), at);
        let [first, second, call] = [LOOP, LOOP + 4, CALL].map(|at| block(at).unwrap());
        assert!(first != UNLINKED && first < second && second < call);
        let last = |after: u32| ops.as_slice()[after as usize - 1];
        assert_eq!((last(second).link, last(second).disp as u32), (first, second), "taken, and not");
        assert_eq!(last(call).link, first);
        assert_eq!(ops.as_slice().last().unwrap().link, UNLINKED, "another page's");
        assert_eq!((block(LOOP + 2), image.page_count()), (None, 2));
        assert!(image.page(2 * PAGE_SIZE).is_none());
    }

    #[test]
    fn general_instructions_are_found_behind_one_another() {
        let ram = ram();
        let image = Arc::new(image(&ram));
        let mut general = GeneralCode::new(Some(Arc::clone(&image)));
        assert_eq!(general.len(), 1);
        let cpuid = *general.get(0).unwrap();
        assert_eq!(cpuid.1.mnemonic(), iced_x86::Mnemonic::Cpuid);
        general.extend(&[cpuid]);
        assert!(general.get(1).is_some() && general.get(2).is_none());
        general.clear();
        assert_eq!(general.len(), 1);
        assert!(GeneralCode::default().get(0).is_none());
    }

    #[test]
    fn a_page_is_for_those_who_have_all_its_bytes() {
        let ram = ram();
        let image = image(&ram);
        let pages = [LOOP, CALL].map(|at| image.page(at).unwrap());
        assert!(pages.iter().all(|page| image.is_of(page, &ram)));
        // Between the blocks and after them, nothing counts.
        ram.store(LOOP - 1, 1u8).unwrap();
        ram.store(CALL + 5, 1u8).unwrap();
        assert!(pages.iter().all(|page| image.is_of(page, &ram)));
        ram.store(LOOP + 7, 0xf7u8).unwrap();
        assert_eq!(pages.map(|page| image.is_of(page, &ram)), [false, true]);
        assert!(!image.is_of(pages[1], &GuestRam::new(Bytes(PAGE_SIZE)).unwrap()), "it has no such page");
    }
}
