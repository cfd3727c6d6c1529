//! Applying layers in order (image-spec, layer.md).
//!
//! An entry replaces what lower layers had under its name, except that a folder over a folder
//! changes its owner and mode and keeps its content. `.wh.NAME` removes NAME, `.wh..wh..opq` what
//! the folder had, both as left by *lower* layers, in whatever order the archive lists them.
//! A tar stream goes by once: metadata into the [`Tree`], content into the image under construction.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::io::BufRead;
use std::io::BufReader;
use std::io::Read;
use std::rc::Rc;

use sha2::Digest as _;
use sha2::Sha256;
use tokio_util::sync::CancellationToken;

use crate::image::Digest;
use crate::image::Layer;
use crate::rootfs::erofs::BlockWriter;
use crate::rootfs::erofs::INLINE_MAX;
use crate::rootfs::error::LayerError;
use crate::rootfs::error::LayerErrorKind;
use crate::rootfs::limits::Limits;
use crate::rootfs::limits::MAX_TARGET;
use crate::rootfs::resolve;
use crate::rootfs::tar_reader::Content as EntryContent;
use crate::rootfs::tar_reader::Entry;
use crate::rootfs::tar_reader::EntryKind;
use crate::rootfs::tar_reader::TarReader;
use crate::rootfs::tar_reader::read_error;
use crate::rootfs::tree::Content;
use crate::rootfs::tree::NodeId;
use crate::rootfs::tree::NodeKind;
use crate::rootfs::tree::ROOT;
use crate::rootfs::tree::Tree;

const WHITEOUT: &[u8] = b".wh.";
/// Names that AUFS reserved; of these only the opaque mark means something to an image. Files in `.wh..wh.plnk` are targets
/// of hard links in their layer, as with Docker, and nothing else.
const WHITEOUT_META: &[u8] = b".wh..wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";

/// The blob's read buffer: large, because every refill is a system call.
const READ_BUFFER: usize = 256 << 10;

/// The state of applying layer after layer.
#[derive(Debug)]
pub(super) struct Applier<'a> {
    pub(super) tree: Tree,
    pub(super) blocks: BlockWriter<'a>,
    limits: Limits,
    entries_left: u64,
    content_left: u64,
    /// Shared with the reader that counts.
    bytes_left: Rc<Cell<u64>>,
    layer: u32,
    abandoned: CancellationToken,
}

impl<'a> Applier<'a> {
    pub(super) fn new(limits: Limits, blocks: BlockWriter<'a>, abandoned: CancellationToken) -> Self {
        Self {
            tree: Tree::new(limits.metadata_bytes),
            blocks,
            limits,
            entries_left: limits.entries,
            content_left: limits.content_bytes,
            bytes_left: Rc::new(Cell::new(limits.archive_bytes)),
            layer: 0,
            abandoned,
        }
    }

    /// Applies the next layer, read from `blob`.
    pub(super) fn apply(&mut self, layer: &Layer, blob: File) -> Result<(), LayerError> {
        let fail = |entry, kind| LayerError { layer: *layer.digest(), entry, kind };
        let archive = decompress(blob).map_err(|error| fail(None, read_error(error)))?;
        let archive = Metered {
            input: archive,
            hasher: Sha256::new(),
            left: Rc::clone(&self.bytes_left),
            limit: self.limits.archive_bytes,
            abandoned: self.abandoned.clone(),
        };
        let mut reader = TarReader::new(BufReader::with_capacity(64 << 10, archive));
        while let Some(entry) = reader.next_entry().map_err(|kind| fail(None, kind))? {
            let name = || Some(String::from_utf8_lossy(&entry.path).into_owned());
            self.admit().map_err(|kind| fail(name(), kind))?;
            let path = entry.path.clone();
            let name = || Some(String::from_utf8_lossy(&path).into_owned());
            self.entry(entry, &mut reader).map_err(|kind| fail(name(), kind))?;
        }
        self.tree.forget(ROOT, |name| name.starts_with(WHITEOUT_META));
        let archive = reader.drain().map_err(|kind| fail(None, kind))?.into_inner();
        let found = Digest::from_hasher(archive.hasher);
        if found != *layer.diff_id() {
            return Err(fail(None, LayerErrorKind::DiffIdMismatch { found }));
        }
        self.layer += 1;
        Ok(())
    }

    fn admit(&mut self) -> Result<(), LayerErrorKind> {
        let limit = LayerErrorKind::Limit { what: "entries", limit: self.limits.entries };
        self.entries_left = self.entries_left.checked_sub(1).ok_or(limit)?;
        Ok(())
    }

    fn entry(&mut self, entry: Entry, reader: &mut TarReader<impl Read>) -> Result<(), LayerErrorKind> {
        let path = entry.path.clone();
        // `umoci insert` names the root "/"; nothing else may be absolute.
        let is_root = *path == *b"/" && matches!(entry.kind, EntryKind::Folder);
        let components = if is_root { Vec::new() } else { resolve::components(&path)? };
        let Some((&name, parents)) = components.split_last() else { return self.root(entry) };
        if name.starts_with(WHITEOUT) {
            return self.whiteout(parents, name);
        }
        let folder = resolve::folder_or_create(&mut self.tree, parents, self.layer)?;
        let Entry { meta, kind, .. } = entry;
        let kind = match kind {
            EntryKind::Folder => match self.tree.lookup(folder, name) {
                Some(found) if self.tree.names(found.node).is_some() => {
                    self.tree.set_meta(found.node, meta)?;
                    return self.tree.link(folder, name, found.node, self.layer);
                }
                _ => NodeKind::Folder(BTreeMap::new()),
            },
            EntryKind::HardLink(target) => {
                let node = self.hard_link_target(&target)?;
                self.tree.update_meta(node, meta)?;
                return self.tree.link(folder, name, node, self.layer);
            }
            EntryKind::File { size } => NodeKind::File(self.content(size, &mut reader.content())?),
            EntryKind::Symlink(target) => NodeKind::Symlink(symlink_target(&target)?),
            EntryKind::Char { major, minor } => NodeKind::Char { major, minor },
            EntryKind::Block { major, minor } => NodeKind::Block { major, minor },
            EntryKind::Fifo => NodeKind::Fifo,
        };
        let node = self.tree.add(meta, kind)?;
        self.tree.link(folder, name, node, self.layer)
    }

    fn root(&mut self, entry: Entry) -> Result<(), LayerErrorKind> {
        match entry.kind {
            EntryKind::Folder => self.tree.set_meta(ROOT, entry.meta),
            _ => Err(LayerErrorKind::NotAFolder),
        }
    }

    fn whiteout(&mut self, parents: &[&[u8]], name: &[u8]) -> Result<(), LayerErrorKind> {
        let hidden = &name[WHITEOUT.len()..];
        let is_meta = name.starts_with(WHITEOUT_META);
        if !is_meta && matches!(hidden, b"" | b"." | b"..") {
            return Err(LayerErrorKind::BadWhiteout);
        }
        let Some(folder) = resolve::folder(&self.tree, parents)? else { return Ok(()) };
        if name == OPAQUE {
            self.tree.hide_lower(folder, self.layer);
        } else if !is_meta {
            self.tree.white_out(folder, hidden, self.layer);
        }
        Ok(())
    }

    fn hard_link_target(&self, target: &[u8]) -> Result<NodeId, LayerErrorKind> {
        let missing = || LayerErrorKind::HardLinkTarget(String::from_utf8_lossy(target).into_owned());
        let components = resolve::link_components(target)?;
        let (name, parents) = components.split_last().ok_or_else(missing)?;
        let folder = resolve::folder(&self.tree, parents)?.ok_or_else(missing)?;
        let found = self.tree.lookup(folder, name).ok_or_else(missing)?;
        if self.tree.names(found.node).is_some() { Err(missing()) } else { Ok(found.node) }
    }

    fn content(&mut self, size: u64, content: &mut EntryContent<'_, impl Read>) -> Result<Content, LayerErrorKind> {
        let limit = LayerErrorKind::Limit { what: "bytes of files' content", limit: self.limits.content_bytes };
        self.content_left = self.content_left.checked_sub(size).ok_or(limit)?;
        if size <= INLINE_MAX as u64 {
            let mut bytes = Vec::with_capacity(INLINE_MAX);
            content.read_to_end(&mut bytes).map_err(read_error)?;
            return Ok(Content::Inline(bytes.into()));
        }
        let start = self.blocks.append(content, size)?;
        Ok(Content::Blocks { start, size })
    }
}

fn symlink_target(target: &[u8]) -> Result<Box<[u8]>, LayerErrorKind> {
    match target.len() {
        0 => Err(LayerErrorKind::Malformed("symbolic link without a target")),
        length if length > MAX_TARGET => Err(LayerErrorKind::TooLong { what: "link target", limit: MAX_TARGET }),
        _ if target.contains(&0) => Err(LayerErrorKind::Malformed("nul byte in a link target")),
        _ => Ok(target.into()),
    }
}

/// The archive inside the blob, by the blob's first bytes.
fn decompress(blob: File) -> io::Result<Box<dyn Read>> {
    let mut blob = BufReader::with_capacity(READ_BUFFER, blob);
    let magic = blob.fill_buf()?;
    if magic.starts_with(&[0x1f, 0x8b]) {
        return Ok(Box::new(flate2::bufread::MultiGzDecoder::new(blob)));
    }
    // A frame, or the skippable frame that some writers of seekable zstd put first (RFC 8878, 3.1).
    let is_skippable = matches!(magic, [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..]);
    if magic.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) || is_skippable {
        return Ok(Box::new(zstd::stream::read::Decoder::with_buffer(blob)?));
    }
    Ok(Box::new(blob))
}

/// Hashes what passes, and stops a decompression bomb and a build that nobody waits for.
struct Metered<R> {
    input: R,
    hasher: Sha256,
    left: Rc<Cell<u64>>,
    limit: u64,
    abandoned: CancellationToken,
}

impl<R: Read> Read for Metered<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.abandoned.is_cancelled() {
            return Err(io::Error::other(LayerErrorKind::Abandoned));
        }
        let count = self.input.read(buffer)?;
        let left = self.left.get().checked_sub(count as u64).ok_or_else(|| {
            io::Error::other(LayerErrorKind::Limit { what: "bytes in the layers' archives", limit: self.limit })
        })?;
        self.left.set(left);
        self.hasher.update(&buffer[..count]);
        Ok(count)
    }
}
