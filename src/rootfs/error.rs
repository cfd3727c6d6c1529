//! What can go wrong between an image's layers and its filesystem.

use std::io;
use std::path::Path;
use std::path::PathBuf;

use crate::image::Digest;
use crate::image::StoreError;

/// Why a layer was refused: which one, where in it, and why.
#[derive(Debug, thiserror::Error)]
#[error("layer {layer} is not acceptable{}", at(.entry.as_deref()))]
pub struct LayerError {
    /// The layer, by the digest of its blob. Of a limit that layers reach together it is the one that took the most of it.
    pub layer: Digest,
    /// The entry of the archive at fault, if it is one; bytes that are not UTF-8 are replaced.
    pub entry: Option<String>,
    /// What is wrong.
    #[source]
    pub kind: LayerErrorKind,
}

fn at(entry: Option<&str>) -> String {
    entry.map(|entry| format!(" at entry {entry:?}")).unwrap_or_default()
}

/// What is wrong with a layer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LayerErrorKind {
    /// The archive or its compression ends early.
    #[error("the archive is truncated")]
    Truncated,
    /// The compression is damaged or the blob cannot be read.
    #[error("the archive cannot be read")]
    Read(#[source] io::Error),
    /// A tar header or extension record does not follow the format.
    #[error("malformed archive: {0}")]
    Malformed(&'static str),
    /// The uncompressed archive is not the one that the image's configuration names.
    #[error("the uncompressed archive has digest {found}, not the layer's diff_id")]
    DiffIdMismatch {
        /// The digest of the archive; the expected one is [`Layer::diff_id`](crate::image::Layer::diff_id).
        found: Digest,
    },
    /// A name starts with `/`.
    #[error("absolute name")]
    AbsoluteName,
    /// A name contains `..`.
    #[error("name with a parent component")]
    ParentComponent,
    /// A folder on the way is a symbolic link that leads out of the image by `..`.
    #[error("name leads through a symbolic link out of the image")]
    SymlinkEscape,
    /// Symbolic links on the way lead in circles, or there are more than Linux follows.
    #[error("name leads through too many symbolic links")]
    SymlinkLoop,
    /// A part of the name that must be a folder is something else.
    #[error("name leads through something that is not a folder")]
    NotAFolder,
    /// A hard link to a name that does not exist, or to a folder.
    #[error("hard link to {0:?}, which is not a file of the image")]
    HardLinkTarget(String),
    /// A name, link target or attribute that Linux could not hold.
    #[error("{what} is longer than {limit} bytes")]
    TooLong {
        /// What is too long.
        what: &'static str,
        /// The limit, in bytes.
        limit: usize,
    },
    /// A whiteout without a name to remove.
    #[error("whiteout of nothing")]
    BadWhiteout,
    /// A kind of entry that is not implemented, rather than applied wrongly.
    #[error("{0} is not supported")]
    Unsupported(&'static str),
    /// More than the [`Limits`](crate::rootfs::Limits) allow.
    #[error("more than {limit} {what}")]
    Limit {
        /// What there is too much of.
        what: &'static str,
        /// The limit.
        limit: u64,
    },
    /// The build was abandoned: its future was dropped. Never returned to a caller.
    #[error("abandoned")]
    Abandoned,
}

/// Why there is no root filesystem. Nothing half-written is left in the store.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RootfsError {
    /// A layer was refused.
    #[error("a layer of the image cannot be applied")]
    Layer(#[from] LayerError),
    /// There is no room, or the quota is used up, where `path` was to be written.
    #[error("no space left for {path}")]
    DiskFull {
        /// What was to be written.
        path: PathBuf,
    },
    /// What is made from layers cannot be read or written.
    #[error("root filesystem i/o at {path}")]
    Io {
        /// Where.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The tree does not fit the filesystem's 32-bit block numbers.
    #[error("the image is larger than the filesystem format can hold")]
    FormatLimit,
    /// The runtime is shutting down.
    #[error("the store cannot be used")]
    Store(#[from] StoreError),
}

impl RootfsError {
    pub(super) fn io(path: &Path) -> impl FnOnce(io::Error) -> Self + '_ {
        move |source| match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::DiskFull { path: path.to_owned() },
            _ => Self::Io { path: path.to_owned(), source },
        }
    }
}
