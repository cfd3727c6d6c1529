//! What a case is: layers, and the tree that they mean.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use crate::image_support::LayerBlob;
use crate::image_support::Listing;
use crate::image_support::Seen;
use crate::image_support::Tar;

/// The time of entries that do not say otherwise, as in [`Tar`].
pub(crate) const TIME: i64 = 1_700_000_000;

/// Whether umoci extracts the same tree, and if not, why. A reason is about umoci 0.4.7 where it names no other program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Second {
    Same,
    /// Of the same archives, in a compression and under a media type that it knows.
    SameRepacked(&'static str),
    /// It gives another tree, against what Docker or the specification says.
    Differs(&'static str),
    /// It stops with an error.
    Cannot(&'static str),
}

/// An image and its tree.
pub(crate) struct Case {
    /// The topic and the number in it, which the registry gives.
    pub(crate) number: String,
    name: &'static str,
    pub(crate) layers: Vec<LayerBlob>,
    /// The uncompressed archives.
    tars: Vec<Vec<u8>>,
    nodes: Vec<Node>,
    pub(crate) second: Second,
}

/// A case without layers: an empty root.
pub(crate) fn case(name: &'static str) -> Case {
    let (layers, tars, nodes) = (Vec::new(), Vec::new(), Vec::new());
    Case { number: String::new(), name, layers, tars, nodes, second: Second::Same }
}

impl Case {
    /// Adds a layer, uncompressed.
    pub(crate) fn layer(self, tar: Tar) -> Self {
        self.archive(tar.finish())
    }

    pub(crate) fn archive(self, tar: Vec<u8>) -> Self {
        let blob = LayerBlob::plain(tar.clone());
        self.blob(tar, blob)
    }

    /// Adds a layer that is stored as `blob`.
    pub(crate) fn blob(mut self, tar: Vec<u8>, blob: LayerBlob) -> Self {
        self.tars.push(tar);
        self.layers.push(blob);
        self
    }

    /// The tree; a node named "" says what the root is.
    pub(crate) fn tree(mut self, nodes: impl IntoIterator<Item = Node>) -> Self {
        self.nodes.extend(nodes);
        self
    }

    pub(crate) fn second(mut self, second: Second) -> Self {
        self.second = second;
        self
    }

    pub(crate) fn title(&self) -> String {
        format!("{} ({})", self.number, self.name)
    }

    /// The layers as every tool knows them.
    pub(crate) fn repacked(&self) -> Vec<LayerBlob> {
        self.tars.iter().map(|tar| LayerBlob::gzip(tar)).collect()
    }

    /// Paths of folders that have no entry in any layer.
    pub(crate) fn implied(&self) -> impl Iterator<Item = &[u8]> {
        let root_is_implied = self.nodes.iter().all(|node| !node.path.is_empty());
        let implied = self.nodes.iter().filter(|node| node.is_implied).map(|node| &node.path[..]);
        root_is_implied.then_some(&b""[..]).into_iter().chain(implied)
    }

    /// What a reader has to find.
    pub(crate) fn expected(&self) -> Listing {
        let name = |path: &[u8]| OsString::from_vec(path.to_vec());
        let mut listing: Listing = self.nodes.iter().map(|node| (name(&node.path), node.seen.clone())).collect();
        assert_eq!(listing.len(), self.nodes.len(), "{}: a node twice", self.title());
        listing.entry(OsString::new()).or_insert_with(|| folder("").implied().seen);
        for node in &self.nodes {
            if let Some(first) = &node.same_as {
                let names =
                    self.nodes.iter().filter(|other| &other.path == first || other.same_as.as_ref() == Some(first));
                let names: Vec<_> = names.map(|node| name(&node.path)).collect();
                for name in &names {
                    let seen = listing.get_mut(name).expect("it is in the tree");
                    seen.nlink = names.len() as u64;
                    seen.same_as = names.iter().min().cloned();
                }
            }
            if node.seen.kind == "folder" && !node.path.is_empty() {
                let end = node.path.iter().rposition(|byte| *byte == b'/').unwrap_or(0);
                listing.get_mut(&name(&node.path[..end])).expect("its parent is in the tree").nlink += 1;
            }
        }
        listing
    }
}

/// One name of the expected tree.
#[derive(Clone)]
pub(crate) struct Node {
    path: Vec<u8>,
    seen: Seen,
    same_as: Option<Vec<u8>>,
    is_implied: bool,
}

fn node(path: &[u8], kind: impl Into<String>, mode: u32, bytes: &[u8]) -> Node {
    let kind = kind.into();
    let seen = Seen {
        nlink: if kind == "folder" { 2 } else { 1 },
        kind,
        mode,
        uid: 0,
        gid: 0,
        mtime: (TIME, 0),
        bytes: bytes.to_vec(),
        same_as: None,
        xattrs: BTreeMap::new(),
    };
    Node { path: path.to_vec(), seen, same_as: None, is_implied: false }
}

pub(crate) fn file(path: impl AsRef<[u8]>, content: impl AsRef<[u8]>) -> Node {
    node(path.as_ref(), "file", 0o644, content.as_ref())
}

pub(crate) fn folder(path: impl AsRef<[u8]>) -> Node {
    node(path.as_ref(), "folder", 0o755, b"")
}

pub(crate) fn symlink(path: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Node {
    node(path.as_ref(), "symlink", 0o777, target.as_ref())
}

/// A fifo or a device, in the words of [`Seen`].
pub(crate) fn special(path: &str, kind: impl Into<String>) -> Node {
    node(path.as_bytes(), kind, 0o644, b"")
}

impl Node {
    pub(crate) fn mode(mut self, mode: u32) -> Self {
        self.seen.mode = mode;
        self
    }

    pub(crate) fn owner(mut self, uid: u32, gid: u32) -> Self {
        (self.seen.uid, self.seen.gid) = (uid, gid);
        self
    }

    pub(crate) fn mtime(mut self, seconds: i64, nanoseconds: i64) -> Self {
        self.seen.mtime = (seconds, nanoseconds);
        self
    }

    pub(crate) fn xattr(mut self, name: &str, value: impl Into<Cow<'static, [u8]>>) -> Self {
        self.seen.xattrs.insert(name.into(), value.into().into_owned());
        self
    }

    /// Another name of the file `first`, which is in the tree without this.
    pub(crate) fn same_as(mut self, first: impl AsRef<[u8]>) -> Self {
        self.same_as = Some(first.as_ref().to_vec());
        self
    }

    /// No layer has an entry for it: kiln gives such a folder the time 0, as the time of extraction would make no sense.
    pub(crate) fn implied(mut self) -> Self {
        self.is_implied = true;
        self.mtime(0, 0)
    }
}
