//! The merged file tree of an image, in memory: names, owners, modes, and where content lies.
//!
//! Nodes live in an arena and are named by index, so hard links are two names for one index and
//! dropping a subtree is forgetting one name. Content is not here but in the layers' content files, except for files so
//! small that the filesystem keeps them beside their inode.

use std::cell::Cell;
use std::cmp::Ordering;
use std::collections::BTreeMap;

use kiln_tree::pax::Time;

use crate::rootfs::error::LayerErrorKind;
use crate::rootfs::limits::MAX_LINK_STEPS;
use crate::rootfs::limits::MAX_XATTR_VALUE;

/// Memory a node costs beside its texts, in bytes; only for [`Tree::charge`].
const NODE_COST: u64 = 192;

/// Memory a name costs beside its text, in bytes.
const NAME_COST: u64 = 48;

pub(super) type NodeId = u32;

/// The root folder.
pub(super) const ROOT: NodeId = 0;

/// An extended attribute of a namespace that Linux knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Xattr {
    /// EROFS's number for the name's prefix.
    pub(super) index: u8,
    /// The name after the prefix.
    pub(super) suffix: Box<[u8]>,
    pub(super) value: Box<[u8]>,
}

/// Prefixes and their numbers (erofs_fs.h, `EROFS_XATTR_INDEX_*`). The ACL names are whole.
const XATTR_PREFIXES: [(&[u8], u8); 6] = [
    (b"user.", 1),
    (b"system.posix_acl_access", 2),
    (b"system.posix_acl_default", 3),
    (b"trusted.", 4),
    (b"lustre.", 5),
    (b"security.", 6),
];

impl Xattr {
    /// `None` for a name outside the known namespaces, or that Linux could not hold.
    pub(super) fn new(name: &[u8], value: &[u8]) -> Option<Self> {
        let (index, suffix) =
            XATTR_PREFIXES.iter().find_map(|(prefix, index)| Some((*index, name.strip_prefix(*prefix)?)))?;
        let is_whole_name = matches!(index, 2 | 3);
        if suffix.is_empty() != is_whole_name || suffix.contains(&0) || name.len() > 255 {
            return None;
        }
        Some(Self { index, suffix: suffix.into(), value: value.into() })
    }

    /// An attribute that [`Xattr::new`] made before, from its fields; `None` if it cannot have.
    pub(super) fn from_parts(index: u8, suffix: &[u8], value: &[u8]) -> Option<Self> {
        let (prefix, _) = XATTR_PREFIXES.iter().find(|(_, known)| *known == index)?;
        let is_small = suffix.len() <= 255 && value.len() <= MAX_XATTR_VALUE;
        is_small.then(|| Self::new(&[*prefix, suffix].concat(), value)).flatten()
    }

    /// Orders by name alone.
    pub(super) fn cmp_name(&self, other: &Self) -> Ordering {
        (self.index, &self.suffix).cmp(&(other.index, &other.suffix))
    }

    /// Bytes it takes beside an inode: a 4-byte header, name and value, to a multiple of 4.
    pub(super) fn stored_size(&self) -> usize {
        (4 + self.suffix.len() + self.value.len()).next_multiple_of(4)
    }
}

/// What every node has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Meta {
    /// Permission bits with setuid, setgid and sticky; no file type.
    pub(super) mode: u16,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mtime: Time,
    /// Sorted by name, each name once.
    pub(super) xattrs: Vec<Xattr>,
}

impl Meta {
    /// A folder that an archive implies without listing it, as Docker creates it.
    pub(super) fn implied_folder() -> Self {
        Self { mode: 0o755, ..Self::default() }
    }
}

/// Where a file's bytes are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Content {
    /// Here; kept beside the inode.
    Inline(Box<[u8]>),
    /// In a layer's content file, from a block on; the files are numbered in the order of their first use by a layer.
    Blocks { file: u32, start: u32, size: u64 },
}

#[derive(Debug)]
pub(super) enum NodeKind {
    Folder(BTreeMap<Box<[u8]>, Name>),
    File(Content),
    Symlink(Box<[u8]>),
    Char { major: u32, minor: u32 },
    Block { major: u32, minor: u32 },
    Fifo,
}

/// An entry of a folder.
#[derive(Clone, Copy, Debug)]
pub(super) struct Name {
    pub(super) node: NodeId,
    /// The layer that last set it; whiteouts act on lower layers only.
    pub(super) layer: u32,
}

#[derive(Debug)]
pub(super) struct Node {
    pub(super) meta: Meta,
    pub(super) kind: NodeKind,
    /// The layer whose whiteouts have already removed from this folder what lower layers put there.
    hidden_by: Option<u32>,
}

/// The tree. Its memory is charged against a limit, and never given back: what later layers hide
/// was an expense of reading all the same.
#[derive(Debug)]
pub(super) struct Tree {
    nodes: Vec<Node>,
    budget: u64,
    limit: u64,
    /// What is left of [`MAX_LINK_STEPS`]; looking names up spends it.
    link_steps: Cell<u64>,
}

impl Tree {
    /// A tree of an empty root folder, which may grow by `limit` bytes.
    pub(super) fn new(limit: u64) -> Self {
        let root = Node { meta: Meta::implied_folder(), kind: NodeKind::Folder(BTreeMap::new()), hidden_by: None };
        Self { nodes: vec![root], budget: limit, limit, link_steps: Cell::new(MAX_LINK_STEPS) }
    }

    /// Pays for following a link whose target has `components`.
    pub(super) fn charge_link(&self, components: usize) -> Result<(), LayerErrorKind> {
        let left = self.link_steps.get().checked_sub(components as u64);
        let left = left.ok_or(LayerErrorKind::Limit { what: "components of link targets", limit: MAX_LINK_STEPS })?;
        self.link_steps.set(left);
        Ok(())
    }

    pub(super) fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id as usize]
    }

    pub(super) fn node_mut(&mut self, id: NodeId) -> &mut Node {
        &mut self.nodes[id as usize]
    }

    pub(super) const fn len(&self) -> usize {
        self.nodes.len()
    }

    /// The entries of a folder; of anything else, none.
    pub(super) fn names(&self, id: NodeId) -> Option<&BTreeMap<Box<[u8]>, Name>> {
        match &self.node(id).kind {
            NodeKind::Folder(names) => Some(names),
            _ => None,
        }
    }

    fn names_mut(&mut self, id: NodeId) -> Option<&mut BTreeMap<Box<[u8]>, Name>> {
        match &mut self.node_mut(id).kind {
            NodeKind::Folder(names) => Some(names),
            _ => None,
        }
    }

    pub(super) fn lookup(&self, folder: NodeId, name: &[u8]) -> Option<Name> {
        self.names(folder)?.get(name).copied()
    }

    fn charge(&mut self, bytes: u64) -> Result<(), LayerErrorKind> {
        let limit = self.limit;
        let left = self.budget.checked_sub(bytes);
        self.budget = left.ok_or(LayerErrorKind::Limit { what: "bytes of metadata", limit })?;
        Ok(())
    }

    /// Adds a node without a name.
    pub(super) fn add(&mut self, meta: Meta, kind: NodeKind) -> Result<NodeId, LayerErrorKind> {
        let text = match &kind {
            NodeKind::Symlink(target) => target.len(),
            NodeKind::File(Content::Inline(bytes)) => bytes.len(),
            _ => 0,
        };
        self.charge(NODE_COST + text as u64 + xattr_cost(&meta))?;
        let id = NodeId::try_from(self.nodes.len());
        let id = id.map_err(|_| LayerErrorKind::Limit { what: "files", limit: u64::from(NodeId::MAX) })?;
        self.nodes.push(Node { meta, kind, hidden_by: None });
        Ok(id)
    }

    /// Replaces what is known about a node.
    pub(super) fn set_meta(&mut self, id: NodeId, meta: Meta) -> Result<(), LayerErrorKind> {
        self.charge(xattr_cost(&meta))?;
        self.node_mut(id).meta = meta;
        Ok(())
    }

    /// Changes a node to what the header of another name for it says, as Docker does: a link keeps its mode and time, and
    /// attributes stay if there are no others.
    pub(super) fn update_meta(&mut self, id: NodeId, meta: Meta) -> Result<(), LayerErrorKind> {
        self.charge(xattr_cost(&meta))?;
        let node = self.node_mut(id);
        (node.meta.uid, node.meta.gid) = (meta.uid, meta.gid);
        if !matches!(node.kind, NodeKind::Symlink(_)) {
            (node.meta.mode, node.meta.mtime) = (meta.mode, meta.mtime);
        }
        if !meta.xattrs.is_empty() {
            node.meta.xattrs = meta.xattrs;
        }
        Ok(())
    }

    /// Takes names away from `folder`.
    pub(super) fn forget(&mut self, folder: NodeId, is_forgotten: impl Fn(&[u8]) -> bool) {
        if let Some(names) = self.names_mut(folder) {
            names.retain(|name, _| !is_forgotten(name));
        }
    }

    /// Gives `node` a name, replacing what had it.
    pub(super) fn link(&mut self, folder: NodeId, name: &[u8], node: NodeId, layer: u32) -> Result<(), LayerErrorKind> {
        self.charge(NAME_COST + name.len() as u64)?;
        let names = self.names_mut(folder).ok_or(LayerErrorKind::NotAFolder)?;
        names.insert(name.into(), Name { node, layer });
        Ok(())
    }

    /// Removes from `folder` what lower layers put there, as an opaque whiteout does; what `layer`
    /// itself added stays, with the folders on the way to it.
    pub(super) fn hide_lower(&mut self, folder: NodeId, layer: u32) {
        // A second time finds nothing to remove; without the mark, an archive of whiteouts for one full folder
        // would cost the product of both.
        if self.node_mut(folder).hidden_by.replace(layer) == Some(layer) {
            return;
        }
        let Some(names) = self.names_mut(folder) else { return };
        // Taken out and put back: the children are nodes of the same arena.
        let mut names = std::mem::take(names);
        names.retain(|_, name| {
            self.hide_lower(name.node, layer);
            name.layer == layer || self.names(name.node).is_some_and(|left| !left.is_empty())
        });
        *self.names_mut(folder).expect("it was a folder above, and kinds never change") = names;
    }

    /// Removes `name` from `folder` as far as lower layers put it there.
    pub(super) fn white_out(&mut self, folder: NodeId, name: &[u8], layer: u32) {
        let Some(found) = self.lookup(folder, name) else { return };
        self.hide_lower(found.node, layer);
        let is_empty = self.names(found.node).is_none_or(BTreeMap::is_empty);
        if found.layer != layer
            && is_empty
            && let Some(names) = self.names_mut(folder)
        {
            names.remove(name);
        }
    }
}

fn xattr_cost(meta: &Meta) -> u64 {
    meta.xattrs.iter().map(|xattr| NAME_COST + xattr.stored_size() as u64).sum()
}
