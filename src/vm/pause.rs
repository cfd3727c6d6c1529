//! Pausing a VM and letting it go on.

use super::Vm;
use crate::vmm::PauseError;

impl Vm {
    /// Brings the guest to rest: its processor between two instructions, its devices between two requests, its clocks
    /// standing still. It takes its memory and no processor time. Of no effect when it is paused already.
    ///
    /// Streams into the guest stay open and move nothing; deadlines of this side, as an exec's timeout, go on. The guest's
    /// time of day is late by as much when it goes on.
    ///
    /// # Errors
    /// [`PauseError`]; the guest runs on then, if it has not ended.
    ///
    /// # Cancel safety
    /// Cancelled, the guest is paused, or will be in a moment, or runs on: ask again, or [`resume`](Self::resume).
    ///
    /// # Examples
    /// ```no_run
    /// # async fn f(vm: kiln::Vm) -> Result<(), Box<dyn std::error::Error>> {
    /// vm.pause().await?;
    /// tokio::time::sleep(std::time::Duration::from_secs(3600)).await;
    /// vm.resume().await?;
    /// # Ok(()) }
    /// ```
    pub async fn pause(&self) -> Result<(), PauseError> {
        self.driver.pause().await
    }

    /// Lets a paused guest go on from where it is. Of no effect on one that runs.
    ///
    /// # Errors
    /// [`PauseError::Ended`].
    ///
    /// # Cancel safety
    /// Cancelled, the guest goes on, or will in a moment, or is paused still.
    pub async fn resume(&self) -> Result<(), PauseError> {
        self.driver.resume().await
    }
}
