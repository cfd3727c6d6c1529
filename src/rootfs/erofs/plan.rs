//! Where every inode goes, decided before the first one is written.
//!
//! Folders hold the positions of the inodes in them, so positions come first; they depend on sizes
//! only. Breadth first from the root: the inodes of one folder lie together, which is what listing
//! it reads.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::collections::BTreeSet;

use crate::rootfs::erofs::BLOCK;
use crate::rootfs::erofs::WriteError;
use crate::rootfs::erofs::folder;
use crate::rootfs::erofs::folder::Dirent;
use crate::rootfs::erofs::format;
use crate::rootfs::erofs::format::INODE_SIZE;
use crate::rootfs::erofs::format::SLOT;
use crate::rootfs::tree::Content;
use crate::rootfs::tree::NodeId;
use crate::rootfs::tree::NodeKind;
use crate::rootfs::tree::ROOT;
use crate::rootfs::tree::Tree;

const UNSEEN: u32 = u32::MAX;

/// An inode's place.
#[derive(Debug)]
pub(super) struct PlannedInode {
    pub(super) node: NodeId,
    /// Index of the folder it was first found in; the root is in itself.
    parent: u32,
    nlink: u32,
    /// In bytes from the start of the inodes.
    pub(super) position: u64,
    size: u64,
    /// First block of what is outside the inode and not in a content file.
    pub(super) start: u32,
    /// How much of the end of the content lies beside the inode, in bytes.
    pub(super) inline: u16,
}

/// The inodes in the order of their positions.
#[derive(Debug)]
pub(in crate::rootfs) struct Plan {
    pub(super) inodes: Vec<PlannedInode>,
    /// From node to index in `inodes`.
    index: Vec<u32>,
    /// The content files that inodes refer to.
    contents: BTreeSet<u32>,
    /// First block of the inodes, after folders and link targets.
    pub(super) meta_start: u32,
    /// First block after the inodes.
    pub(super) end: u32,
}

impl Plan {
    /// Plans for folders and link targets to be written after the superblock, and inodes after those.
    pub(in crate::rootfs) fn new(tree: &Tree) -> Result<Self, WriteError> {
        let index = vec![UNSEEN; tree.len()];
        let mut plan = Self { inodes: Vec::new(), index, contents: BTreeSet::new(), meta_start: 1, end: 1 };
        plan.collect(tree);
        plan.place(tree)?;
        Ok(plan)
    }

    /// The numbers of the content files that the filesystem refers to, ascending.
    pub(in crate::rootfs) fn contents(&self) -> impl Iterator<Item = u32> {
        self.contents.iter().copied()
    }

    /// How many blocks superblock, folders and inodes take.
    pub(in crate::rootfs) const fn blocks(&self) -> u32 {
        self.end
    }

    /// Numbers what can be reached, and counts names.
    fn collect(&mut self, tree: &Tree) {
        self.find(ROOT, 0);
        let mut at = 0;
        while at < self.inodes.len() {
            let node = self.inodes[at].node;
            for name in tree.names(node).into_iter().flatten().map(|(_, name)| name) {
                let is_folder = tree.names(name.node).is_some();
                let found = self.find(name.node, at as u32);
                self.inodes[found].nlink += 1;
                if is_folder {
                    // The child's `..`.
                    self.inodes[at].nlink += 1;
                }
            }
            if tree.names(node).is_some() {
                // Its own `.`.
                self.inodes[at].nlink += 1;
            }
            at += 1;
        }
        // The root's name, which is in no folder.
        self.inodes[0].nlink += 1;
    }

    fn find(&mut self, node: NodeId, parent: u32) -> usize {
        let known = self.index[node as usize];
        if known != UNSEEN {
            return known as usize;
        }
        let index = self.inodes.len();
        self.index[node as usize] = index as u32;
        self.inodes.push(PlannedInode { node, parent, nlink: 0, position: 0, size: 0, start: 0, inline: 0 });
        index
    }

    fn place(&mut self, tree: &Tree) -> Result<(), WriteError> {
        let (mut next, mut end) = (1_u32, 0_u64);
        for inode in &mut self.inodes {
            let node = tree.node(inode.node);
            let header = (INODE_SIZE + format::xattr_size(&node.meta)) as u64;
            inode.size = match &node.kind {
                NodeKind::Folder(names) => {
                    let lengths = names.keys().map(|name| (&**name, name.len()));
                    folder::size(folder::with_dots(lengths, 1, 2).map(|(_, length)| length))
                }
                NodeKind::File(Content::Inline(bytes)) | NodeKind::Symlink(bytes) => bytes.len() as u64,
                NodeKind::File(Content::Blocks { file, size, .. }) => {
                    self.contents.insert(*file);
                    *size
                }
                _ => 0,
            };
            let in_blocks = matches!(node.kind, NodeKind::File(Content::Blocks { .. }));
            let tail = inode.size % BLOCK as u64;
            let fits = !in_blocks && header % BLOCK as u64 + tail <= BLOCK as u64 && tail <= MAX_TAIL;
            inode.inline = if fits { tail as u16 } else { 0 };
            if !in_blocks {
                inode.start = next;
                let blocks = (inode.size - u64::from(inode.inline)).div_ceil(BLOCK as u64);
                let blocks = u32::try_from(blocks).map_err(|_| WriteError::FormatLimit)?;
                next = next.checked_add(blocks).ok_or(WriteError::FormatLimit)?;
            }
            inode.position = position_from(end, header, u64::from(inode.inline));
            end = inode.position + header + u64::from(inode.inline);
        }
        self.meta_start = next;
        // `fsck.erofs` reads an attribute header behind every inode, also where there is none: the last one must not end
        // with the image.
        let blocks = u32::try_from((end + format::XATTR_HEADER as u64).div_ceil(BLOCK as u64));
        let blocks = blocks.map_err(|_| WriteError::FormatLimit)?;
        self.end = next.checked_add(blocks).ok_or(WriteError::FormatLimit)?;
        Ok(())
    }

    fn nid(&self, node: NodeId) -> u64 {
        self.inodes[self.index[node as usize] as usize].position / SLOT
    }

    /// What this planner puts into the image as the inode's content: all of a folder, a link or a
    /// small file; nothing of a file whose content is already there.
    pub(super) fn payload<'t>(&self, tree: &'t Tree, inode: &PlannedInode) -> Cow<'t, [u8]> {
        match &tree.node(inode.node).kind {
            NodeKind::Folder(names) => {
                let parent = self.inodes[inode.parent as usize].node;
                let names = names.iter().map(|(name, entry)| (&**name, entry.node));
                let entries = folder::with_dots(names, inode.node, parent).map(|(name, node)| Dirent {
                    name,
                    nid: self.nid(node),
                    file_type: file_types(&tree.node(node).kind).1,
                });
                Cow::Owned(folder::encode(&entries.collect::<Vec<_>>()))
            }
            NodeKind::File(Content::Inline(bytes)) | NodeKind::Symlink(bytes) => Cow::Borrowed(bytes),
            _ => Cow::Borrowed(&[]),
        }
    }

    /// The inode, its attributes and what lies beside it; `contents` has the first block of each content file.
    pub(super) fn encode(
        &self,
        tree: &Tree,
        inode: &PlannedInode,
        contents: &BTreeMap<u32, u32>,
    ) -> Result<Vec<u8>, WriteError> {
        let node = tree.node(inode.node);
        let index = self.index[inode.node as usize];
        let fields = format::InodeFields {
            file_type: file_types(&node.kind).0,
            size: inode.size,
            union: match node.kind {
                NodeKind::Char { major, minor } | NodeKind::Block { major, minor } => format::device(major, minor),
                NodeKind::Fifo => 0,
                NodeKind::File(Content::Blocks { file, start, .. }) => {
                    contents.get(&file).and_then(|base| base.checked_add(start)).ok_or(WriteError::FormatLimit)?
                }
                _ => inode.start,
            },
            has_inline: inode.inline > 0,
            // Only for 32-bit callers of stat, who take 0 for no file.
            ino: index.checked_add(1).ok_or(WriteError::FormatLimit)?,
            nlink: inode.nlink,
        };
        let mut bytes = format::encode_inode(&node.meta, fields);
        if inode.inline > 0 {
            let payload = self.payload(tree, inode);
            bytes.extend_from_slice(&payload[payload.len() - usize::from(inode.inline)..]);
        }
        Ok(bytes)
    }
}

/// Longest end of a folder or link kept beside its inode, in bytes: a longer one has a block to
/// itself rather than leaving most of one empty.
const MAX_TAIL: u64 = 2048;

/// The first place from `end` on where an inode's fixed part is within one block, and so is its
/// inline part, which follows the attributes: the kernel reads the latter in one piece.
fn position_from(end: u64, header: u64, inline: u64) -> u64 {
    let block = BLOCK as u64;
    let mut position = end.next_multiple_of(SLOT);
    loop {
        let fixed_fits = position % block + INODE_SIZE as u64 <= block;
        let inline_fits = inline == 0 || (position + header) % block + inline <= block;
        if fixed_fits && inline_fits {
            return position;
        }
        position += SLOT;
    }
}

/// `S_IF*` and `EROFS_FT_*`.
const fn file_types(kind: &NodeKind) -> (u16, u8) {
    match kind {
        NodeKind::File(_) => (format::S_IFREG, 1),
        NodeKind::Folder(_) => (format::S_IFDIR, 2),
        NodeKind::Char { .. } => (format::S_IFCHR, 3),
        NodeKind::Block { .. } => (format::S_IFBLK, 4),
        NodeKind::Fifo => (format::S_IFIFO, 5),
        NodeKind::Symlink(_) => (format::S_IFLNK, 7),
    }
}
