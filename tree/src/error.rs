//! What goes wrong, by operation.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use thiserror::Error;

/// Why a tree was not packed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PackError {
    /// A file or folder cannot be read.
    #[error("cannot read {path:?}")]
    Read {
        /// Which one.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The archive cannot be written.
    #[error("cannot write the archive")]
    Write(#[source] io::Error),
    /// A file became shorter, or something else, while it was packed. The archive is whole and has zeros in place of the missing bytes.
    #[error("{path:?} changed while it was packed")]
    Changed {
        /// The first such file.
        path: PathBuf,
    },
    /// Folders are nested too deeply.
    #[error("{path:?} is nested more than {limit} folders deep", limit = crate::MAX_DEPTH)]
    TooDeep {
        /// The first folder beyond the limit.
        path: PathBuf,
    },
}

impl PackError {
    /// The system's number of the error, where the system refused something.
    #[must_use]
    pub fn raw_os_error(&self) -> Option<i32> {
        match self {
            Self::Read { source, .. } | Self::Write(source) => source.raw_os_error(),
            Self::Changed { .. } | Self::TooDeep { .. } => None,
        }
    }
}

/// Why an archive cannot be read on: see [`crate::reader`].
///
/// Not `non_exhaustive`: those who read archives translate every kind into an error of their own, and a new kind should
/// not compile before they do.
#[derive(Debug, Error)]
pub enum ArchiveError {
    /// The input failed.
    #[error("cannot read the archive")]
    Read(#[source] io::Error),
    /// The input ends inside an entry, or without the end mark where one is asked for.
    #[error("the archive is cut short")]
    Truncated,
    /// The archive breaks the rules of its format, in the part named.
    #[error("malformed archive: {0}")]
    Malformed(&'static str),
    /// A sparse file in a format that this reader does not know; reading it as if it were whole would give wrong content.
    #[error("entry {:?} is a sparse file of an unknown format, which is not supported", shown(.0))]
    Sparse(Vec<u8>),
    /// An entry of a type that this reader does not know.
    #[error("entry {:?} is of an unknown type, which is not supported", shown(.0))]
    UnknownType(Vec<u8>),
    /// More than the [`Rules`](crate::reader::Rules) allow.
    #[error("more than {limit} {what}")]
    Limit {
        /// Of what.
        what: &'static str,
        /// How much there may be.
        limit: u64,
    },
}

/// A name of an archive as a path, for errors.
pub(crate) fn shown(name: &[u8]) -> PathBuf {
    PathBuf::from(OsStr::from_bytes(name))
}

/// Why an archive was not unpacked, or not to its end.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum UnpackError {
    /// An entry would leave the destination: `..`, an absolute or empty name, a NUL byte, or a way through a symbolic link.
    #[error("entry {name:?} leads out of the destination")]
    Escape {
        /// The entry's name or link target, as the archive has it.
        name: PathBuf,
    },
    /// The system refused what an entry needs.
    #[error("cannot unpack {name:?}")]
    Io {
        /// The entry's name; that of the destination when it is about the destination itself.
        name: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The archive cannot be read.
    #[error("cannot read the archive")]
    Read(#[source] io::Error),
    /// The archive ends before its end mark.
    #[error("the archive is cut short")]
    Truncated,
    /// The archive breaks the rules of its format.
    #[error("malformed archive: {what}")]
    Malformed {
        /// Where.
        what: &'static str,
    },
    /// The archive has something that this crate does not unpack.
    #[error("entry {name:?} is {what}, which is not supported")]
    Unsupported {
        /// The entry's name.
        name: PathBuf,
        /// What it is.
        what: &'static str,
    },
    /// The archive holds more than it may.
    #[error("more than {limit} {what}")]
    Limit {
        /// Of what.
        what: &'static str,
        /// How much there may be.
        limit: u64,
    },
}

impl UnpackError {
    /// The system's number of the error, where the system refused something.
    #[must_use]
    pub fn raw_os_error(&self) -> Option<i32> {
        match self {
            Self::Io { source, .. } | Self::Read(source) => source.raw_os_error(),
            _ => None,
        }
    }

    pub(crate) const fn malformed(what: &'static str) -> Self {
        Self::Malformed { what }
    }
}

impl From<ArchiveError> for UnpackError {
    fn from(error: ArchiveError) -> Self {
        match error {
            ArchiveError::Read(source) => Self::Read(source),
            ArchiveError::Truncated => Self::Truncated,
            ArchiveError::Malformed(what) => Self::Malformed { what },
            ArchiveError::Sparse(name) => {
                Self::Unsupported { name: shown(&name), what: "a sparse file of an unknown format" }
            }
            ArchiveError::UnknownType(name) => Self::Unsupported { name: shown(&name), what: "of an unknown type" },
            ArchiveError::Limit { what, limit } => Self::Limit { what, limit },
        }
    }
}
