//! What can go wrong while an image is imported from an archive.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use kiln_tree::ArchiveError;

use crate::image::config::ConfigError;
use crate::image::digest::Digest;
use crate::image::error::LayoutError;
use crate::image::error::ManifestError;
use crate::image::reference::ReferenceError;
use crate::image::store::StoreError;

/// How many names a message lists.
const MAX_LISTED: usize = 16;

/// Why an image could not be imported. Nothing half-written is left in the store.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImportError {
    /// There is no such file or folder, or it is neither.
    #[error("cannot open {path}")]
    Open {
        /// Where it should be.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The source failed, or its compression is damaged.
    #[error("the archive cannot be read")]
    Read(#[source] io::Error),
    /// The source gave no byte for too long.
    #[error("the archive's source gave nothing for {limit:?}")]
    Timeout {
        /// How long was waited: [`ImportOptions::step_timeout`](crate::image::ImportOptions::step_timeout).
        limit: Duration,
    },
    /// The archive or its compression ends early.
    #[error("the archive is cut short{}", at(.entry.as_deref()))]
    Truncated {
        /// The entry in which it ends, if it is in one.
        entry: Option<String>,
    },
    /// Not a tar archive, or one that breaks the rules of the format.
    #[error("not a valid tar archive{}: {what}", after(.entry.as_deref()))]
    Malformed {
        /// The last entry before the fault.
        entry: Option<String>,
        /// What is wrong.
        what: &'static str,
    },
    /// An entry that this crate does not read, rather than read wrongly.
    #[error("entry {entry:?} is {what}, which is not supported")]
    Unsupported {
        /// The entry's name; bytes that are not UTF-8 are replaced.
        entry: String,
        /// What it is.
        what: &'static str,
    },
    /// More than an archive may have.
    #[error("more than {limit} {what}")]
    Limit {
        /// What there is too much of.
        what: &'static str,
        /// How much there may be.
        limit: u64,
    },
    /// An archive, but not of an image.
    #[error("the archive holds no image: {reason}")]
    NotAnImage {
        /// What is missing or wrong.
        reason: &'static str,
    },
    /// A name that leads out of the archive.
    #[error("{name:?} leads out of the archive")]
    Escape {
        /// The name.
        name: String,
    },
    /// A link leads to a link leads to a link...
    #[error("{name:?} leads through more than {limit} links")]
    LinkLoop {
        /// The name at which it starts.
        name: String,
        /// How many are followed.
        limit: usize,
    },
    /// The archive refers to a file that it does not have.
    #[error("the archive lacks {what}, {name}")]
    Missing {
        /// What it would be: "layer 2", "configuration"...
        what: String,
        /// Its name or digest.
        name: String,
    },
    /// A document of the archive is not the JSON that it should be.
    #[error("{name} is not valid")]
    Json {
        /// Which document.
        name: &'static str,
        /// What is wrong.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A document is longer than is accepted.
    #[error("{what} is longer than {limit} bytes")]
    TooLarge {
        /// Which document.
        what: String,
        /// What is accepted, in bytes.
        limit: u64,
    },
    /// Content has another digest than promised.
    #[error("{what} has digest {found}, expected {expected}")]
    DigestMismatch {
        /// Which file.
        what: String,
        /// The promised digest.
        expected: Digest,
        /// The digest of the content.
        found: Digest,
    },
    /// Content has another length than promised.
    #[error("{what} has {found} bytes, expected {expected}")]
    SizeMismatch {
        /// Which file.
        what: String,
        /// The promised length, in bytes.
        expected: u64,
        /// The length of the content, in bytes.
        found: u64,
    },
    /// No image has the tag that was asked for.
    #[error("no image is tagged {tag:?}; there are {}", listed(.names))]
    UnknownImage {
        /// The tag asked for.
        tag: String,
        /// The names there are; the digest of an image that has none.
        names: Vec<String>,
    },
    /// Several images are meant; [`ImportOptions::tag`](crate::image::ImportOptions::tag) chooses.
    #[error("there are several images, name one by its tag: {}", listed(.names))]
    Ambiguous {
        /// The names of all that are meant; the digest of an image that has none.
        names: Vec<String>,
    },
    /// The name that the image shall have is not a reference.
    #[error("the name for the image is not valid")]
    Name(#[from] ReferenceError),
    /// The manifest or configuration cannot be used.
    #[error("the image cannot be used")]
    Manifest(#[source] ManifestError),
    /// The folder, which must be an OCI layout, cannot be used.
    #[error("the folder cannot be imported")]
    Layout(#[source] LayoutError),
    /// The store failed.
    #[error("the image store failed")]
    Store(#[from] StoreError),
}

fn at(entry: Option<&str>) -> String {
    entry.map(|entry| format!(" at entry {entry:?}")).unwrap_or_default()
}

fn after(entry: Option<&str>) -> String {
    entry.map(|entry| format!(" after entry {entry:?}")).unwrap_or_default()
}

fn listed(names: &[String]) -> String {
    let mut text = names.iter().take(MAX_LISTED).map(|name| format!("{name:?}")).collect::<Vec<_>>().join(", ");
    match names.len() {
        0 => "none".clone_into(&mut text),
        count if count > MAX_LISTED => text.push_str(", ..."),
        _ => {}
    }
    text
}

impl ImportError {
    /// What the reader of archives said, at the entry that it was at.
    pub(super) fn of_archive(error: ArchiveError, entry: Option<&str>) -> Self {
        let name = |name: Vec<u8>| String::from_utf8_lossy(&name).into_owned();
        let entry = entry.map(str::to_owned);
        match error {
            ArchiveError::Read(error) => Self::of_read(error, entry),
            ArchiveError::Truncated => Self::Truncated { entry },
            ArchiveError::Malformed(what) => Self::Malformed { entry, what },
            ArchiveError::Sparse(entry) => {
                Self::Unsupported { entry: name(entry), what: "a sparse file of an unknown format" }
            }
            ArchiveError::UnknownType(entry) => Self::Unsupported { entry: name(entry), what: "of an unknown type" },
            ArchiveError::Limit { what, limit } => Self::Limit { what, limit },
        }
    }

    /// An error of reading, sorted into early end and the rest. Limits and deadlines travel through the decoders as i/o
    /// errors.
    pub(super) fn of_read(error: io::Error, entry: Option<String>) -> Self {
        match error.downcast::<Self>() {
            Ok(error) => error,
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Self::Truncated { entry },
            Err(error) => Self::Read(error),
        }
    }
}

impl From<ManifestError> for ImportError {
    fn from(error: ManifestError) -> Self {
        match error {
            ManifestError::Store(error) => Self::Store(error),
            error => Self::Manifest(error),
        }
    }
}

impl From<ConfigError> for ImportError {
    fn from(error: ConfigError) -> Self {
        Self::Manifest(error.into())
    }
}

impl From<LayoutError> for ImportError {
    fn from(error: LayoutError) -> Self {
        match error {
            LayoutError::Store(error) => Self::Store(error),
            error => Self::Layout(error),
        }
    }
}
