//! The sum of the errors of all operations.

use crate::exec::ExecError;
use crate::files::FileError;
use crate::image::{CustomizeError, ImportError, LayoutError, PullError, StoreError};
use crate::pool::{AcquireError, PoolError};
use crate::rootfs::RootfsError;
use crate::snapshot::SnapshotError;
use crate::vm::{ForkError, KeepError, ReclaimError, ShutdownError, StartError};
use crate::vmm::PauseError;
use crate::workload::WorkloadError;

/// Any error of this crate, for callers that only pass it on.
///
/// Each operation returns an error of its own, whose variants a caller can act on; all of them convert into this one.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An image could not be pulled.
    #[error(transparent)]
    Pull(#[from] PullError),
    /// An OCI layout could not be imported.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// An image could not be imported.
    #[error(transparent)]
    Import(#[from] ImportError),
    /// An image could not be changed as asked.
    #[error(transparent)]
    Customize(#[from] CustomizeError),
    /// The image store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A root filesystem could not be built.
    #[error(transparent)]
    Rootfs(#[from] RootfsError),
    /// A VM did not start.
    #[error(transparent)]
    Start(#[from] StartError),
    /// A VM could not be paused or go on.
    #[error(transparent)]
    Pause(#[from] PauseError),
    /// A VM could not be kept on disk.
    #[error(transparent)]
    Keep(#[from] KeepError),
    /// A snapshot could not be opened.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// A VM could not be cloned.
    #[error(transparent)]
    Fork(#[from] ForkError),
    /// A guest gave no memory back.
    #[error(transparent)]
    Reclaim(#[from] ReclaimError),
    /// A command could not be run.
    #[error(transparent)]
    Exec(#[from] ExecError),
    /// A workload could not be started or found.
    #[error(transparent)]
    Workload(#[from] WorkloadError),
    /// A file of the guest's could not be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// A VM did not stop.
    #[error(transparent)]
    Shutdown(#[from] ShutdownError),
    /// A pool could not be made.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// A pool had no VM to give.
    #[error(transparent)]
    Acquire(#[from] AcquireError),
    /// Bytes could not be moved to or from a command.
    #[error(transparent)]
    Io(#[from] std::io::Error),
}
