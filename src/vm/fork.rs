//! Clones of a running VM.

use std::sync::Arc;

use futures::StreamExt;
use futures::TryStreamExt;

use super::Vm;
use super::error::StartError;
use super::restore;
use super::restore::Identity;
use crate::vmm::FreezeError;

/// Clones that are started at the same time: each needs a processor to get going.
const PARALLEL: usize = 8;

/// Why a VM could not be cloned. No clone is left, and the VM runs on, if it has not ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ForkError {
    /// The VM could not be kept as it is.
    #[error(transparent)]
    Freeze(#[from] FreezeError),
    /// A clone did not start.
    #[error("starting a clone")]
    Start(#[from] StartError),
}

impl Vm {
    /// Makes `count` VMs that go on from where this one is at one instant, each by itself: processes, memory and what was
    /// written to files are as here. They share the memory that they do not write, among them and with this one's snapshot.
    ///
    /// Each has the host's time, entropy of its own and a machine id of its own; the host name is this one's. Connections to
    /// this VM stay here; a clone sees them reset. A clone is a VM like any other, and can be cloned too.
    ///
    /// The memory that this VM has written is copied while it runs, once for all clones; it stands still for the end of that,
    /// and for all of it on a host that does not tell what is written meanwhile (before Linux 6.7).
    ///
    /// # Errors
    /// [`ForkError`]; no clone is left then.
    ///
    /// # Cancel safety
    /// Dropping the future stops the clones that have been started; this VM goes on.
    ///
    /// # Examples
    /// ```no_run
    /// # async fn f(vm: kiln::Vm) -> Result<(), Box<dyn std::error::Error>> {
    /// for (n, clone) in vm.fork(3).await?.iter().enumerate() {
    ///     clone.exec_builder().argv(["/srv/try", &n.to_string()]).output().await?;
    /// }
    /// # Ok(()) }
    /// ```
    pub async fn fork(&self, count: usize) -> Result<Vec<Self>, ForkError> {
        if count == 0 {
            return Ok(Vec::new());
        }
        let frozen = self.driver.freeze().await?;
        let parent = self.parent();
        let clones = (0..count).map(|_| async {
            let identity = Identity::of_clone(&self.template)?;
            let clone = restore::frozen(&frozen, Arc::clone(&self.template), &identity).await?;
            clone.set_parent(parent.clone());
            Ok(clone)
        });
        futures::stream::iter(clones).buffer_unordered(PARALLEL).try_collect().await
    }
}
