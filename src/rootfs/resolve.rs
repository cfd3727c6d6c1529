//! Names of archive entries to folders of the tree.
//!
//! Nothing here touches the host's file system: a name is walked inside the tree, whose root is the
//! image's. Names themselves must be plain: absolute ones and those with `..` are refused, whatever
//! they would lead to. A symbolic link *on the way* is followed as the guest would follow it, an
//! absolute target from the image's root, because real images need that (`/bin` is a link to
//! `usr/bin` in one layer, the next adds `bin/x`; `/var/run` is a link to `/run`); but one that
//! climbs out of the root by `..` serves no image and is refused. The last component is never
//! followed: an entry replaces a link, it does not write through it.

use std::collections::BTreeMap;
use std::collections::VecDeque;

use crate::rootfs::error::LayerErrorKind;
use crate::rootfs::limits::MAX_DEPTH;
use crate::rootfs::limits::MAX_NAME;
use crate::rootfs::limits::MAX_PATH;
use crate::rootfs::limits::MAX_SYMLINKS;
use crate::rootfs::tree::Meta;
use crate::rootfs::tree::NodeId;
use crate::rootfs::tree::NodeKind;
use crate::rootfs::tree::ROOT;
use crate::rootfs::tree::Tree;

/// Splits an entry's name into its components; none for the root.
pub(super) fn components(path: &[u8]) -> Result<Vec<&[u8]>, LayerErrorKind> {
    if path.starts_with(b"/") {
        return Err(LayerErrorKind::AbsoluteName);
    }
    plain_components(path)
}

/// Splits the target of a hard link. Some builders write it with a leading `/`, meaning the
/// image's root; that is where every target starts.
pub(super) fn link_components(path: &[u8]) -> Result<Vec<&[u8]>, LayerErrorKind> {
    plain_components(path)
}

fn plain_components(path: &[u8]) -> Result<Vec<&[u8]>, LayerErrorKind> {
    if path.len() > MAX_PATH {
        return Err(LayerErrorKind::TooLong { what: "path", limit: MAX_PATH });
    }
    let mut components = Vec::new();
    for component in path.split(|byte| *byte == b'/') {
        match component {
            b"" | b"." => {}
            b".." => return Err(LayerErrorKind::ParentComponent),
            _ if component.contains(&0) => return Err(LayerErrorKind::Malformed("nul byte in a name")),
            _ if component.len() > MAX_NAME => {
                return Err(LayerErrorKind::TooLong { what: "name", limit: MAX_NAME });
            }
            _ => components.push(component),
        }
    }
    Ok(components)
}

/// The folder `components` lead to, with missing folders created as part of `layer`.
pub(super) fn folder_or_create(tree: &mut Tree, components: &[&[u8]], layer: u32) -> Result<NodeId, LayerErrorKind> {
    let mut walk = Walk::new(components);
    while let Some(name) = walk.next_name()? {
        let folder = walk.folder();
        match tree.lookup(folder, &name) {
            Some(found) => walk.enter(tree, found.node)?.ok_or(LayerErrorKind::NotAFolder)?,
            None => {
                if walk.stack.len() > MAX_DEPTH {
                    return Err(LayerErrorKind::TooLong { what: "nesting of folders", limit: MAX_DEPTH });
                }
                if name.len() > MAX_NAME {
                    return Err(LayerErrorKind::TooLong { what: "name", limit: MAX_NAME });
                }
                let created = tree.add(Meta::implied_folder(), NodeKind::Folder(BTreeMap::new()))?;
                tree.link(folder, &name, created, layer)?;
                walk.stack.push(created);
            }
        }
    }
    Ok(walk.folder())
}

/// The folder `components` lead to, `None` if there is none.
pub(super) fn folder(tree: &Tree, components: &[&[u8]]) -> Result<Option<NodeId>, LayerErrorKind> {
    let mut walk = Walk::new(components);
    while let Some(name) = walk.next_name()? {
        let Some(found) = tree.lookup(walk.folder(), &name) else { return Ok(None) };
        if walk.enter(tree, found.node)?.is_none() {
            return Ok(None);
        }
    }
    Ok(Some(walk.folder()))
}

/// A walk in progress.
struct Walk {
    /// The folders from the root to the current one.
    stack: Vec<NodeId>,
    /// What is still to be walked.
    ahead: VecDeque<Box<[u8]>>,
    links: usize,
}

impl Walk {
    fn new(components: &[&[u8]]) -> Self {
        Self { stack: vec![ROOT], ahead: components.iter().map(|&name| name.into()).collect(), links: 0 }
    }

    fn folder(&self) -> NodeId {
        *self.stack.last().unwrap_or(&ROOT)
    }

    /// The next name to look up, after the `.` and `..` that link targets bring.
    fn next_name(&mut self) -> Result<Option<Box<[u8]>>, LayerErrorKind> {
        while let Some(name) = self.ahead.pop_front() {
            match &*name {
                b"" | b"." => {}
                b".." => {
                    if self.stack.len() <= 1 {
                        return Err(LayerErrorKind::SymlinkEscape);
                    }
                    self.stack.pop();
                }
                _ => return Ok(Some(name)),
            }
        }
        Ok(None)
    }

    /// Goes on through `node`, a folder or a link; `None` if it is neither.
    fn enter(&mut self, tree: &Tree, node: NodeId) -> Result<Option<()>, LayerErrorKind> {
        match &tree.node(node).kind {
            NodeKind::Folder(_) => self.stack.push(node),
            NodeKind::Symlink(target) => {
                self.links += 1;
                if self.links > MAX_SYMLINKS {
                    return Err(LayerErrorKind::SymlinkLoop);
                }
                if target.starts_with(b"/") {
                    self.stack.truncate(1);
                }
                tree.charge_link(target.split(|byte| *byte == b'/').count())?;
                for component in target.rsplit(|byte| *byte == b'/') {
                    self.ahead.push_front(component.into());
                }
            }
            _ => return Ok(None),
        }
        Ok(Some(()))
    }
}
