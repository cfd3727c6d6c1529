//! A writer of uncompressed EROFS images (Linux: Documentation/filesystems/erofs.rst,
//! fs/erofs/erofs_fs.h).
//!
//! ```text
//! joined file  block 0      1,024 bytes of zeros, then the superblock
//!              block 1...   folders and long link targets that are not kept beside their inode
//!              meta_blkaddr inodes (always the 64-byte form: it has its own mtime), each followed by its
//!                           attributes and, if short, its content or the end of it ("flat inline")
//!              last blocks  the record of the contents that follow, which no inode refers to (see `record`)
//! contents     blocks       files of a layer, each from a block boundary on, in the order of its archive
//!              blocks       files of the next layer
//!              ...
//! ```
//!
//! To a kernel it is one image of that many blocks, without EROFS's feature for several devices: the disk that a guest
//! sees is the files one after another. So a layer's contents are decompressed once and shared by all images that have
//! the layer; an image of its own is only what is in the joined file, and that depends on metadata alone. The price: of a
//! layer that is used at all, the guest's disk has what later layers hide, as a registry has it; no name leads there.
//! The bytes depend on the layers alone: the image names no time, no host and no random number.
//!
//! Own code, because nothing published writes EROFS with content. Squashfs, for which there is a
//! library (`backhand`), was the alternative: it compresses or at best stores in fragments and
//! tables that the guest's processor, in software on many hosts, would have to walk, and the kernel
//! copies every page out of them; a plain EROFS file is a run of blocks that goes to the page cache
//! as it is. ext4 would carry a journal and bitmaps that a read-only image has no use for.

mod folder;
mod format;
mod plan;

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::io::BufWriter;
use std::io::Read;
use std::io::Write;

use crate::rootfs::tree::Tree;

pub(super) use format::superblock_blocks;
pub(super) use plan::Plan;

/// The filesystem's block size: the guest's page size, so that a block is a page.
pub(super) const BLOCK: usize = 4096;

/// Largest content of a file kept beside its inode, in bytes. It is in memory while layers are joined, and must share one
/// block with the inode's end.
pub(super) const INLINE_MAX: usize = 1024;

/// Size of the write buffer, in bytes.
const WRITE_BUFFER: usize = 1 << 20;

/// Why an image could not be completed.
#[derive(Debug, thiserror::Error)]
pub(super) enum WriteError {
    #[error("i/o")]
    Io(#[from] io::Error),
    #[error("the image needs more than 2^32 blocks, inodes or attribute words")]
    FormatLimit,
}

/// What surrounds the metadata in an image.
#[derive(Debug)]
pub(super) struct Surroundings<'a> {
    /// Names the volume.
    pub(super) uuid: [u8; 16],
    /// Comes after the inodes; whole blocks.
    pub(super) record: &'a [u8],
    /// The content files that the plan names, in order, each with its length in blocks.
    pub(super) contents: &'a [(u32, u32)],
}

/// Writes the joined file of the image that was planned for `tree`.
pub(super) fn write(tree: &Tree, plan: &Plan, file: &File, around: &Surroundings<'_>) -> Result<(), WriteError> {
    let (contents, blocks) = place_contents(plan, around)?;
    let mut out = Blocks { out: BufWriter::with_capacity(WRITE_BUFFER, file), position: 0 };
    let superblock = format::Superblock {
        blocks,
        inodes: plan.inodes.len() as u64,
        meta_start: plan.meta_start,
        root_nid: 0,
        uuid: around.uuid,
    };
    out.zeros(1024)?;
    out.write(&superblock.encode())?;
    write_folders(tree, plan, &mut out)?;
    debug_assert_eq!(out.position, u64::from(plan.meta_start) * BLOCK as u64, "written as planned");
    for inode in &plan.inodes {
        out.zeros_to(u64::from(plan.meta_start) * BLOCK as u64 + inode.position)?;
        out.write(&plan.encode(tree, inode, &contents)?)?;
    }
    out.zeros_to(u64::from(plan.end) * BLOCK as u64)?;
    out.write(around.record)?;
    out.out.flush()?;
    Ok(())
}

/// The first block of each content file, and the number of blocks of the whole image.
fn place_contents(plan: &Plan, around: &Surroundings<'_>) -> Result<(BTreeMap<u32, u32>, u32), WriteError> {
    debug_assert_eq!(around.record.len() % BLOCK, 0, "the record is whole blocks");
    let record = u32::try_from(around.record.len() / BLOCK).map_err(|_| WriteError::FormatLimit)?;
    let mut next = plan.end.checked_add(record).ok_or(WriteError::FormatLimit)?;
    let mut contents = BTreeMap::new();
    for (number, blocks) in around.contents {
        contents.insert(*number, next);
        next = next.checked_add(*blocks).ok_or(WriteError::FormatLimit)?;
    }
    Ok((contents, next))
}

fn write_folders(tree: &Tree, plan: &Plan, out: &mut Blocks<'_>) -> Result<(), WriteError> {
    for inode in &plan.inodes {
        let payload = plan.payload(tree, inode);
        let full = payload.len() - usize::from(inode.inline);
        if full > 0 {
            debug_assert_eq!(out.position, u64::from(inode.start) * BLOCK as u64, "written in the order planned");
            out.write(&payload[..full])?;
            out.zeros_to(out.position.next_multiple_of(BLOCK as u64))?;
        }
    }
    Ok(())
}

/// The joined file from its start on.
struct Blocks<'a> {
    out: BufWriter<&'a File>,
    /// In bytes.
    position: u64,
}

impl Blocks<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.position += bytes.len() as u64;
        self.out.write_all(bytes)
    }

    fn zeros_to(&mut self, position: u64) -> io::Result<()> {
        self.zeros(position - self.position)
    }

    fn zeros(&mut self, count: u64) -> io::Result<()> {
        self.position += count;
        io::copy(&mut io::repeat(0).take(count), &mut self.out).map(drop)
    }
}
