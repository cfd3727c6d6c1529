//! Blocks that machines with the same memory have decoded, for each other: a guest that is restored runs the code that
//! guests from the same snapshot have run before it, and decoding is most of what it does at first.
//!
//! A block is taken only by a machine whose memory holds the very bytes that it was decoded from. So nothing needs to be
//! told when a guest changes its code, and a wrong byte can never be run. What machines share here is time, not state.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use iced_x86::Instruction;
use rustc_hash::FxBuildHasher;

use crate::mem::{GuestRam, MemoryId};

use super::code_image::CodeImage;
use super::exec::Executor;
use super::fast::Op;
use super::translate::{Block, Exits};

/// Operations kept for all machines of one memory image: 16 MiB of them.
const MAX_OPS: usize = 1 << 19;
/// An image of the code is made anew when this much more is known than it has: a quarter, and so many operations.
const IMAGE_GROWTH: usize = 4;
const IMAGE_LEAST: usize = 1 << 12;
/// Memory images whose blocks are kept; of more the one that was used least recently is forgotten.
const MAX_IMAGES: usize = 4;

/// What an engine's machines share, by the memory image that they began with.
#[derive(Debug, Default)]
pub(super) struct SharedCode {
    images: Mutex<Vec<(MemoryId, Arc<Blocks>)>>,
}

impl SharedCode {
    /// The blocks of machines that began with the same memory as `ram`; `None` for one that began empty.
    pub(super) fn blocks(&self, ram: &GuestRam) -> Option<Arc<Blocks>> {
        let id = ram.source()?.root();
        // What is found in it is whole whatever a panicking holder did.
        let mut images = self.images.lock().unwrap_or_else(PoisonError::into_inner);
        let known = images.iter().position(|(known, _)| *known == id);
        let image = known.map_or_else(|| (id, Arc::default()), |at| images.remove(at));
        let blocks = Arc::clone(&image.1);
        images.truncate(MAX_IMAGES - 1);
        images.insert(0, image);
        Some(blocks)
    }
}

/// Blocks by the RAM offset of their first byte.
#[derive(Debug, Default)]
pub(super) struct Blocks {
    known: RwLock<Known>,
    image: Mutex<Option<Arc<CodeImage>>>,
}

/// All blocks' parts one after another, so that a block is not four pieces of memory of its own.
#[derive(Debug, Default)]
struct Known {
    places: HashMap<u64, Place, FxBuildHasher>,
    source: Vec<u8>,
    ops: Vec<Op>,
    general: Vec<(Executor, Instruction)>,
    general_ops: Vec<u8>,
}

/// Where a block's parts are: each a beginning and a length.
#[derive(Clone, Copy, Debug)]
struct Place {
    source: (u32, u8),
    ops: (u32, u8),
    general: (u32, u8),
    general_ops: (u32, u8),
    exits: Exits,
}

impl Known {
    fn block(&self, at: u64) -> Option<Block<'_>> {
        fn part<T>(all: &[T], (start, len): (u32, u8)) -> Option<&[T]> {
            all.get(start as usize..)?.get(..usize::from(len))
        }
        let place = self.places.get(&at)?;
        Some(Block {
            source: part(&self.source, place.source)?,
            ops: part(&self.ops, place.ops)?,
            general: part(&self.general, place.general)?,
            general_ops: part(&self.general_ops, place.general_ops)?,
            exits: place.exits,
        })
    }

    /// All blocks, by ascending offset.
    fn blocks(&self) -> impl Iterator<Item = (u64, Block<'_>)> {
        let mut all: Vec<u64> = self.places.keys().copied().collect();
        all.sort_unstable();
        all.into_iter().filter_map(|at| Some((at, self.block(at)?)))
    }

    fn keep(&mut self, at: u64, block: Block<'_>) {
        fn append<T: Clone>(all: &mut Vec<T>, part: &[T]) -> Option<(u32, u8)> {
            let place = (u32::try_from(all.len()).ok()?, u8::try_from(part.len()).ok()?);
            all.extend_from_slice(part);
            Some(place)
        }
        let place = (|| {
            Some(Place {
                source: append(&mut self.source, block.source)?,
                ops: append(&mut self.ops, block.ops)?,
                general: append(&mut self.general, block.general)?,
                general_ops: append(&mut self.general_ops, block.general_ops)?,
                exits: block.exits,
            })
        })();
        self.places.extend(place.map(|place| (at, place)));
    }
}

impl Blocks {
    /// What a new processor begins with; none while little is known, or on a host that has no memory to share.
    pub(super) fn image(&self) -> Option<Arc<CodeImage>> {
        let mut image = self.image.lock().unwrap_or_else(PoisonError::into_inner);
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        let has = image.as_ref().map_or(0, |image| image.ops().len());
        if known.ops.len() >= has + has / IMAGE_GROWTH + IMAGE_LEAST {
            match CodeImage::new(known.blocks()) {
                Ok(new) => *image = Some(Arc::new(new)),
                Err(error) => tracing::debug!(%error, "decoded code is not shared"),
            }
        }
        image.clone()
    }

    /// Hands the block at `at` to `install`, if it was decoded from what `ram` has there now.
    pub(super) fn get<R>(&self, ram: &GuestRam, at: u64, install: impl FnOnce(Block<'_>) -> R) -> Option<R> {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        known.block(at).filter(|block| block.is_of(ram, at)).map(install)
    }

    /// Keeps a block for others, if there is room. Of different ones at one place the first stays.
    pub(super) fn offer(&self, at: u64, block: Block<'_>) {
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        if known.ops.len() + block.ops.len() <= MAX_OPS && !known.places.contains_key(&at) {
            known.keep(at, block);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::hv::soft::translate::Translator;
    use crate::mem::MemoryImage;
    use crate::units::{Bytes, PAGE_SIZE};

    const AT: u64 = 0x100;

    /// Memory with `mov eax, 1; ret` at [`AT`].
    fn image(id: u8) -> MemoryImage {
        let file: File = tempfile::tempfile().unwrap();
        file.set_len(4 * PAGE_SIZE).unwrap();
        file.write_all_at(&[0xb8, 1, 0, 0, 0, 0xc3], AT).unwrap();
        MemoryImage::new(file, Bytes(4 * PAGE_SIZE), [id; 32])
    }

    #[test]
    fn a_block_is_for_those_who_have_its_bytes() {
        let (code, image) = (SharedCode::default(), image(1));
        let [one, other] = [(); 2].map(|()| image.map().unwrap());
        let mut translator = Translator::new();
        let decoded = translator.block(&one, AT);
        code.blocks(&one).unwrap().offer(AT, decoded);
        let blocks = code.blocks(&other).unwrap();
        let length = |ram: &GuestRam, at| blocks.get(ram, at, |block| block.ops.len());
        assert_eq!(length(&other, AT), Some(decoded.ops.len()));
        assert_eq!(length(&other, AT + 1), None);
        other.store(AT + 1, 2u8).unwrap();
        assert_eq!(length(&other, AT), None, "other code is there now");
        assert!(length(&one, AT).is_some());
        // What follows the block is not part of it.
        one.store(AT + 6, 0x90u8).unwrap();
        assert!(length(&one, AT).is_some());
    }

    #[test]
    fn clones_share_with_their_origin_and_strangers_do_not() {
        let code = SharedCode::default();
        let one = Arc::new(image(1).map().unwrap());
        let clone = one.freeze().unwrap().map().unwrap();
        let blocks = |ram: &GuestRam| code.blocks(ram).unwrap();
        assert!(Arc::ptr_eq(&blocks(&one), &blocks(&clone)));
        let stranger = image(2).map().unwrap();
        assert!(!Arc::ptr_eq(&blocks(&one), &blocks(&stranger)));
        assert!(code.blocks(&GuestRam::new(Bytes(PAGE_SIZE)).unwrap()).is_none());
    }

    #[test]
    fn only_so_much_is_kept() {
        let code = SharedCode::default();
        let rams: Vec<_> = (0..20).map(|id| image(id).map().unwrap()).collect();
        let first = code.blocks(&rams[0]).unwrap();
        rams.iter().for_each(|ram| drop(code.blocks(ram)));
        assert_eq!(code.images.lock().unwrap().len(), MAX_IMAGES);
        assert!(!Arc::ptr_eq(&first, &code.blocks(&rams[0]).unwrap()), "the oldest is forgotten");
        let mut translator = Translator::new();
        let decoded = translator.block(&rams[0], AT);
        (0..2 * MAX_OPS as u64).for_each(|at| first.offer(at, decoded));
        let known = first.known.read().unwrap();
        assert!(known.ops.len() <= MAX_OPS && known.places.len() == MAX_OPS / decoded.ops.len());
    }
}
