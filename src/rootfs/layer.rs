//! Applying layers in order (image-spec, layer.md).
//!
//! An entry replaces what lower layers had under its name, except that a folder over a folder
//! changes its owner and mode and keeps its content. `.wh.NAME` removes NAME, `.wh..wh..opq` what
//! the folder had, both as left by *lower* layers, in whatever order the archive lists them.
//! What has to be known of other entries is decided here, for each image anew; the archives themselves are not read again.

use std::collections::BTreeMap;

use crate::image::Layer;
use crate::rootfs::budget::Budget;
use crate::rootfs::error::LayerError;
use crate::rootfs::error::LayerErrorKind;
use crate::rootfs::index::Entry;
use crate::rootfs::index::EntryKind;
use crate::rootfs::index::Stored;
use crate::rootfs::limits::Limits;
use crate::rootfs::limits::MAX_TARGET;
use crate::rootfs::resolve;
use crate::rootfs::tree::Content;
use crate::rootfs::tree::Meta;
use crate::rootfs::tree::NodeId;
use crate::rootfs::tree::NodeKind;
use crate::rootfs::tree::ROOT;
use crate::rootfs::tree::Tree;

const WHITEOUT: &[u8] = b".wh.";
/// Names that AUFS reserved; of these only the opaque mark means something to an image. Files in `.wh..wh.plnk` are targets
/// of hard links in their layer, as with Docker, and nothing else.
const WHITEOUT_META: &[u8] = b".wh..wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";

/// The state of applying layer after layer.
#[derive(Debug)]
pub(super) struct Applier {
    pub(super) tree: Tree,
    budget: Budget,
    layer: u32,
    /// The content file of the layer.
    file: u32,
}

impl Applier {
    pub(super) fn new(limits: Limits) -> Self {
        Self { tree: Tree::new(limits.metadata_bytes), budget: Budget::new(limits, 1), layer: 0, file: 0 }
    }

    /// Begins the next layer, whose archive is so long and whose contents are in the content file of this number.
    pub(super) fn begin(&mut self, layer: &Layer, archive_bytes: u64, file: u32) -> Result<(), LayerError> {
        self.layer += 1;
        self.file = file;
        let limited = self.budget.share(0).archive_bytes(archive_bytes);
        limited.map_err(|kind| LayerError { layer: *layer.digest(), entry: None, kind })
    }

    /// Applies the next entry of `layer`.
    pub(super) fn apply(&mut self, layer: &Layer, entry: Entry) -> Result<(), LayerError> {
        let Entry { path, kind, meta } = entry;
        self.entry(&path, kind, meta).map_err(|kind| {
            let entry = Some(String::from_utf8_lossy(&path).into_owned());
            LayerError { layer: *layer.digest(), entry, kind }
        })
    }

    /// Ends the layer.
    pub(super) fn end(&mut self) {
        self.tree.forget(ROOT, |name| name.starts_with(WHITEOUT_META));
    }

    fn entry(&mut self, path: &[u8], kind: EntryKind, meta: Meta) -> Result<(), LayerErrorKind> {
        self.budget.share(0).entries(1)?;
        // `umoci insert` names the root "/"; nothing else may be absolute.
        let is_root = path == b"/" && matches!(kind, EntryKind::Folder);
        let components = if is_root { Vec::new() } else { resolve::components(path)? };
        let Some((&name, parents)) = components.split_last() else { return self.root(&kind, meta) };
        if name.starts_with(WHITEOUT) {
            return self.whiteout(parents, name);
        }
        let folder = resolve::folder_or_create(&mut self.tree, parents, self.layer)?;
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
            EntryKind::File(Stored::Inline(bytes)) => {
                self.budget.share(0).content_bytes(bytes.len() as u64)?;
                NodeKind::File(Content::Inline(bytes))
            }
            EntryKind::File(Stored::Blocks { start, size }) => {
                self.budget.share(0).content_bytes(size)?;
                NodeKind::File(Content::Blocks { file: self.file, start, size })
            }
            EntryKind::Symlink(target) => NodeKind::Symlink(symlink_target(&target)?),
            EntryKind::Char { major, minor } => NodeKind::Char { major, minor },
            EntryKind::Block { major, minor } => NodeKind::Block { major, minor },
            EntryKind::Fifo => NodeKind::Fifo,
        };
        let node = self.tree.add(meta, kind)?;
        self.tree.link(folder, name, node, self.layer)
    }

    fn root(&mut self, kind: &EntryKind, meta: Meta) -> Result<(), LayerErrorKind> {
        match kind {
            EntryKind::Folder => self.tree.set_meta(ROOT, meta),
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
}

fn symlink_target(target: &[u8]) -> Result<Box<[u8]>, LayerErrorKind> {
    match target.len() {
        0 => Err(LayerErrorKind::Malformed("symbolic link without a target")),
        length if length > MAX_TARGET => Err(LayerErrorKind::TooLong { what: "link target", limit: MAX_TARGET }),
        _ if target.contains(&0) => Err(LayerErrorKind::Malformed("nul byte in a link target")),
        _ => Ok(target.into()),
    }
}
