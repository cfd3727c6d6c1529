//! Why a file of the guest's could not be read or written.

use std::io;

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
}

impl FileError {
    /// What an I/O error of this cause is called: `NotFound`, `StorageFull`, `IsADirectory` and so on.
    #[must_use]
    pub fn kind(&self) -> io::ErrorKind {
        match self {
            Self::Guest { source, .. } => source.kind(),
            Self::TooLarge { .. } => io::ErrorKind::FileTooLarge,
        }
    }
}

impl From<FileError> for io::Error {
    fn from(error: FileError) -> Self {
        Self::new(error.kind(), error)
    }
}
