//! A writer of uncompressed EROFS images (Linux: Documentation/filesystems/erofs.rst,
//! fs/erofs/erofs_fs.h).
//!
//! ```text
//! block 0      1,024 bytes of zeros, then the superblock
//! block 1...   content of files, each from a block boundary on, in the order of the archives
//!              folders and long link targets that are not kept beside their inode
//! meta_blkaddr inodes (always the 64-byte form: it has its own mtime), each followed by its
//!              attributes and, if short, the end of its content ("flat inline")
//! ```
//!
//! Content is written while the archives stream by, before anything is known about the tree;
//! inodes come last. So a layer is decompressed once and its bytes are copied once, memory is
//! bounded by metadata, and what a later layer hides leaves a hole that is punched at the end.
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

use std::fs::File;
use std::io;
use std::io::BufWriter;
use std::io::Read;
use std::io::Seek;
use std::io::SeekFrom;
use std::io::Write;
use std::os::unix::fs::FileExt;

use rustix::fs::FallocateFlags;

use crate::rootfs::error::LayerErrorKind;
use crate::rootfs::tar_reader::Content as EntryContent;
use crate::rootfs::tar_reader::Piece;
use crate::rootfs::tree::Content;
use crate::rootfs::tree::NodeKind;
use crate::rootfs::tree::Tree;

pub(super) use format::superblock_blocks;

/// The filesystem's block size: the guest's page size, so that a block is a page.
pub(super) const BLOCK: usize = 4096;

/// Largest content of a file kept beside its inode, in bytes. It has to stay in memory until the
/// inodes are written, and must share one block with them.
pub(super) const INLINE_MAX: usize = 1024;

/// Size of the write buffer, in bytes.
const WRITE_BUFFER: usize = 1 << 20;

/// Content is moved from the archive in pieces of this size, in bytes.
const COPY_BUFFER: usize = 128 << 10;

/// Why an image could not be completed.
#[derive(Debug, thiserror::Error)]
pub(super) enum WriteError {
    #[error("i/o")]
    Io(#[from] io::Error),
    #[error("the image needs more than 2^32 blocks, inodes or attribute words")]
    FormatLimit,
}

/// Appends content to an image under construction, block by block.
#[derive(Debug)]
pub(super) struct BlockWriter<'a> {
    out: BufWriter<&'a File>,
    next: u32,
    buffer: Vec<u8>,
}

impl<'a> BlockWriter<'a> {
    /// Starts an image in the empty `file`.
    pub(super) fn new(file: &'a File) -> io::Result<Self> {
        let mut out = BufWriter::with_capacity(WRITE_BUFFER, file);
        out.write_all(&[0; BLOCK])?;
        Ok(Self { out, next: 1, buffer: vec![0; COPY_BUFFER] })
    }

    /// Writes `content`, which is of `size` bytes; returns the block it starts at.
    pub(super) fn append(
        &mut self,
        content: &mut EntryContent<'_, impl Read>,
        size: u64,
    ) -> Result<u32, LayerErrorKind> {
        let (start, end) = self
            .reserve(size)
            .ok_or_else(|| LayerErrorKind::Limit { what: "blocks of content", limit: u64::from(u32::MAX) })?;
        loop {
            match content.piece(&mut self.buffer)? {
                Piece::Data(count) => self.out.write_all(&self.buffer[..count]),
                Piece::Hole(length) => self.skip(length),
                Piece::End => break,
            }
            .map_err(LayerErrorKind::Write)?;
        }
        self.pad(size).map_err(LayerErrorKind::Write)?;
        self.next = end;
        Ok(start)
    }

    /// Leaves `length` bytes of zeros. Something is always written after content, so that the file is long enough.
    fn skip(&mut self, length: u64) -> io::Result<()> {
        match i64::try_from(length) {
            // Costs less to write than to flush the buffer for.
            _ if length < WRITE_BUFFER as u64 / 8 => zeros(&mut self.out, length),
            Ok(length) => self.out.seek(SeekFrom::Current(length)).map(drop),
            Err(_) => Err(io::ErrorKind::FileTooLarge.into()),
        }
    }

    fn append_bytes(&mut self, bytes: &[u8]) -> Result<u32, WriteError> {
        let (start, end) = self.reserve(bytes.len() as u64).ok_or(WriteError::FormatLimit)?;
        self.out.write_all(bytes)?;
        self.pad(bytes.len() as u64)?;
        self.next = end;
        Ok(start)
    }

    fn reserve(&self, size: u64) -> Option<(u32, u32)> {
        let blocks = u32::try_from(size.div_ceil(BLOCK as u64)).ok()?;
        Some((self.next, self.next.checked_add(blocks)?))
    }

    fn pad(&mut self, written: u64) -> io::Result<()> {
        let over = (written % BLOCK as u64) as usize;
        if over > 0 { self.out.write_all(&[0; BLOCK][over..]) } else { Ok(()) }
    }
}

/// Writes folders, inodes and the superblock after the content; `uuid` names the volume.
pub(super) fn finish(tree: &Tree, mut blocks: BlockWriter<'_>, uuid: [u8; 16]) -> Result<(), WriteError> {
    let content_end = blocks.next;
    let plan = plan::Plan::new(tree, content_end)?;
    for inode in &plan.inodes {
        let payload = plan.payload(tree, inode);
        let full = payload.len() - usize::from(inode.inline);
        if full > 0 {
            let start = blocks.append_bytes(&payload[..full])?;
            debug_assert_eq!(start, inode.start, "blocks are written in the order they were planned");
        }
    }
    let meta_start = blocks.next;
    let mut position = 0;
    for inode in &plan.inodes {
        let bytes = plan.encode(tree, inode)?;
        zeros(&mut blocks.out, inode.position - position)?;
        blocks.out.write_all(&bytes)?;
        position = inode.position + bytes.len() as u64;
    }
    // `fsck.erofs` reads an attribute header behind every inode, also where there is none: the last one must not end with the image.
    zeros(&mut blocks.out, format::XATTR_HEADER as u64)?;
    position += format::XATTR_HEADER as u64;
    blocks.pad(position)?;
    let (_, end) = blocks.reserve(position).ok_or(WriteError::FormatLimit)?;
    let superblock =
        format::Superblock { blocks: end, inodes: plan.inodes.len() as u64, meta_start, root_nid: 0, uuid };
    blocks.out.flush()?;
    let file = *blocks.out.get_ref();
    file.write_all_at(&superblock.encode(), 1024)?;
    punch_unreferenced(tree, &plan, file, content_end)
}

fn zeros(out: &mut impl Write, count: u64) -> io::Result<()> {
    io::copy(&mut io::repeat(0).take(count), out).map(drop)
}

/// Frees the blocks of content that no name leads to any more.
fn punch_unreferenced(tree: &Tree, plan: &plan::Plan, file: &File, content_end: u32) -> Result<(), WriteError> {
    let mut live: Vec<(u32, u64)> = Vec::new();
    for inode in &plan.inodes {
        if let NodeKind::File(Content::Blocks { start, size }) = &tree.node(inode.node).kind {
            live.push((*start, u64::from(*start) + size.div_ceil(BLOCK as u64)));
        }
    }
    live.sort_unstable();
    let mut free_from = 1;
    for (start, end) in live.into_iter().chain([(content_end, 0)]) {
        let length = u64::from(start).saturating_sub(free_from);
        if length > 0 {
            punch(file, free_from * BLOCK as u64, length * BLOCK as u64)?;
        }
        free_from = end;
    }
    Ok(())
}

/// Makes a range read as zeros, without occupying the disk where the file system can do that.
fn punch(file: &File, offset: u64, length: u64) -> io::Result<()> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    match rustix::fs::fallocate(file, flags, offset, length) {
        Err(rustix::io::Errno::OPNOTSUPP) => {
            let mut out = file;
            out.seek(SeekFrom::Start(offset))?;
            zeros(&mut out, length)
        }
        result => Ok(result?),
    }
}
