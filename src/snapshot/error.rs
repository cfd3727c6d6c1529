//! Why a snapshot could not be written, opened or used.

use std::io;
use std::path::PathBuf;

use super::manifest::FORMAT;
use crate::mem::RamError;
use crate::units::Bytes;
use crate::vmm::RestoreError;

/// Why a snapshot could not be written, opened or used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SnapshotError {
    /// The host could not read or write a file of the snapshot.
    #[error("snapshot file {}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The host's error.
        #[source]
        source: io::Error,
    },
    /// There is no snapshot in the folder.
    #[error("no snapshot at {}", .0.display())]
    Missing(PathBuf),
    /// The manifest is of another version of the format.
    #[error("a snapshot of format {found}, where {FORMAT} is supported")]
    Format {
        /// The manifest's version.
        found: u64,
    },
    /// The manifest is not one, or not whole.
    #[error("the manifest cannot be read")]
    Manifest(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The snapshot contradicts itself: it was damaged, or is no work of this library.
    #[error("the snapshot is damaged: {0}")]
    Damaged(&'static str),
    /// A file has another size than the manifest says.
    #[error("{name} has {} bytes, the manifest says {}", found.0, wanted.0)]
    FileSize {
        /// The file's name.
        name: &'static str,
        /// Its size.
        found: Bytes,
        /// What the manifest says.
        wanted: Bytes,
    },
    /// The memory does not hold what was written.
    #[error("the memory from byte {offset} on is not what was saved")]
    Memory {
        /// Where the damaged part begins.
        offset: u64,
    },
    /// The snapshot holds only what changed since another one, which must be given.
    #[error("the snapshot builds on {parent}, which was not given")]
    NeedsParent {
        /// The digest of the snapshot that it builds on.
        parent: String,
    },
    /// The snapshot builds on another one than what was given.
    #[error("the snapshot builds on {}, not on {given}", wanted.as_deref().unwrap_or("nothing"))]
    WrongParent {
        /// The digest of the snapshot that it builds on, if it does.
        wanted: Option<String>,
        /// The digest of what was given.
        given: String,
    },
    /// The snapshot was made from something else than what it is to be used with.
    #[error("the snapshot's {what} is {found:?}, not {wanted:?}")]
    Origin {
        /// What differs.
        what: &'static str,
        /// What the snapshot was made from.
        found: String,
        /// What was asked for.
        wanted: String,
    },
    /// Memory and machine state to be written do not belong together.
    #[error("{} bytes of memory for a machine that has {}", given.0, wanted.0)]
    MachineMemory {
        /// What the state says.
        wanted: Bytes,
        /// What there was.
        given: Bytes,
    },
    /// What is to be written does not fit the format: an origin's digest is too long, say.
    #[error("the snapshot cannot be written: {0}")]
    Unwritable(&'static str),
    /// The memory could not be mapped.
    #[error("mapping the memory")]
    Map(#[from] RamError),
    /// The machine could not be restored.
    #[error("restoring the machine")]
    Restore(#[from] RestoreError),
}
