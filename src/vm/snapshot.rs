//! Keeping a running VM on disk.

use std::io;
use std::path::PathBuf;
use std::sync::PoisonError;

use super::Vm;
use crate::blocking::ShuttingDown;
use crate::blocking::blocking;
use crate::snapshot::Contents;
use crate::snapshot::Snapshot;
use crate::snapshot::SnapshotError;
use crate::vmm::FreezeError;

/// Why a VM could not be kept on disk. It runs on, if it has not ended, and what was in the folder is still there.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeepError {
    /// The VM could not be kept as it is.
    #[error(transparent)]
    Freeze(#[from] FreezeError),
    /// The snapshot could not be written.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// What the VM was made from cannot be read.
    #[error("reading what the guest was made from")]
    Origin(#[source] io::Error),
    /// There is no earlier snapshot that a difference could be taken to.
    #[error("the VM was not restored from a snapshot, and none was taken of it")]
    NoParent,
}

impl Vm {
    /// Writes the VM, as it is at one instant, to the folder `target`, in the stead of a snapshot that is there. It stands
    /// still while its state and the memory that it has written lately are taken, and runs on while they are written to disk.
    ///
    /// Connections to the guest are no part of it: a guest that is restored sees them reset.
    ///
    /// # Errors
    /// [`KeepError`]; the VM runs on, if it has not ended.
    ///
    /// # Cancel safety
    /// Dropping the future does not stop a writing that has begun: the folder has the old snapshot or the new one.
    ///
    /// # Examples
    /// ```no_run
    /// # async fn f(vm: kiln::Vm) -> Result<(), Box<dyn std::error::Error>> {
    /// let snapshot = vm.snapshot("snapshots/base").await?;
    /// println!("{} holds {} bytes", snapshot.digest(), snapshot.memory_on_disk()?.0);
    /// # Ok(()) }
    /// ```
    pub async fn snapshot(&self, target: impl Into<PathBuf>) -> Result<Snapshot, KeepError> {
        self.keep(target.into(), None).await
    }

    /// As [`snapshot`](Self::snapshot), but writes only what differs from the VM's last snapshot: the last one that was
    /// taken of it, or the one that it was restored from. [`Snapshot::open_on`] opens the result over that one.
    ///
    /// # Errors
    /// [`KeepError`]; [`KeepError::NoParent`] when there is no last snapshot.
    ///
    /// # Cancel safety
    /// As [`snapshot`](Self::snapshot).
    ///
    /// # Examples
    /// ```no_run
    /// # async fn f(vm: kiln::Vm) -> Result<(), Box<dyn std::error::Error>> {
    /// let base = vm.snapshot("snapshots/base").await?;
    /// vm.exec_builder().argv(["touch", "/srv/more"]).output().await?;
    /// vm.snapshot_diff("snapshots/more").await?;
    /// let more = kiln::snapshot::Snapshot::open_on("snapshots/more".as_ref(), &base)?;
    /// # Ok(()) }
    /// ```
    pub async fn snapshot_diff(&self, target: impl Into<PathBuf>) -> Result<Snapshot, KeepError> {
        let parent = self.parent().ok_or(KeepError::NoParent)?;
        self.keep(target.into(), Some(parent)).await
    }

    async fn keep(&self, target: PathBuf, since: Option<Snapshot>) -> Result<Snapshot, KeepError> {
        let frozen = self.driver.freeze().await?;
        let origin = self.template.provenance.origin().await.map_err(KeepError::Origin)?.clone();
        let write = move || {
            let memory = frozen.map_memory().map_err(SnapshotError::from)?;
            let contents = Contents { state: frozen.state(), memory: &memory, origin: &origin, since: since.as_ref() };
            Snapshot::write(&target, &contents)
        };
        let snapshot = blocking(write).await.map_err(|ShuttingDown| FreezeError::Shutdown)??;
        self.set_parent(Some(snapshot.clone()));
        Ok(snapshot)
    }

    /// The snapshot that the next difference is taken to.
    pub(super) fn parent(&self) -> Option<Snapshot> {
        self.parent.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn set_parent(&self, snapshot: Option<Snapshot>) {
        *self.parent.lock().unwrap_or_else(PoisonError::into_inner) = snapshot;
    }
}
