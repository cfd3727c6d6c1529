//! Why a file of the guest's could not be read or written.

use std::io;
use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;

use kiln_tree::PackError;
use kiln_tree::UnpackError;
use thiserror::Error;

use crate::exec::ExecError;

/// Why a file of the guest's could not be read or written.
#[derive(Clone, Debug, Error)]
#[non_exhaustive]
pub enum FileError {
    /// The guest refused it, or cannot be reached; [`FileError::kind`] tells which in the terms of `std::io`.
    #[error("guest file {path}")]
    Guest {
        /// The file, as it was asked for.
        path: String,
        /// Why.
        #[source]
        source: ExecError,
    },
    /// The file has more bytes than were asked to be kept in memory.
    #[error("guest file {path} is larger than {limit} bytes")]
    TooLarge {
        /// The file, as it was asked for.
        path: String,
        /// The limit, in bytes.
        limit: u64,
    },
    /// A file or folder of the host's cannot be read.
    #[error("copying {path} into the guest", path = path.display())]
    Pack {
        /// What was to be copied.
        path: PathBuf,
        /// Why not.
        #[source]
        source: Arc<PackError>,
    },
    /// A copy cannot be written on the host.
    #[error("copying out of the guest to {path}", path = path.display())]
    Unpack {
        /// Where the copy was to be.
        path: PathBuf,
        /// Why not.
        #[source]
        source: Arc<UnpackError>,
    },
}

impl FileError {
    /// What an I/O error of this cause is called: `NotFound`, `StorageFull`, `IsADirectory` and so on.
    #[must_use]
    pub fn kind(&self) -> io::ErrorKind {
        match self {
            Self::Guest { source, .. } => source.kind(),
            Self::TooLarge { .. } => io::ErrorKind::FileTooLarge,
            Self::Pack { source, .. } => match &**source {
                PackError::Read { source, .. } | PackError::Write(source) => source.kind(),
                _ => io::ErrorKind::Other,
            },
            Self::Unpack { source, .. } => match &**source {
                UnpackError::Io { source, .. } | UnpackError::Read(source) => source.kind(),
                UnpackError::Truncated => io::ErrorKind::UnexpectedEof,
                UnpackError::Limit { .. } => io::ErrorKind::QuotaExceeded,
                _ => io::ErrorKind::InvalidData,
            },
        }
    }

    pub(super) fn pack(path: &Path, source: PackError) -> Self {
        Self::Pack { path: path.to_owned(), source: Arc::new(source) }
    }

    pub(super) fn unpack(path: &Path, source: UnpackError) -> Self {
        Self::Unpack { path: path.to_owned(), source: Arc::new(source) }
    }
}

impl From<FileError> for io::Error {
    fn from(error: FileError) -> Self {
        Self::new(error.kind(), error)
    }
}
