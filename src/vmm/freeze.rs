//! A machine at one instant, kept while the machine goes on: what clones and snapshots are made from.
//!
//! ```text
//!   machine  runs -------------------- | pause: state | ------------- runs
//!   memory       copied, most of it    | the rest     |  made an image
//! ```

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use super::Machine;
use super::MachineError;
use super::state::FreezeError;
use super::state::MachineState;
use super::state::RestoreError;
use crate::block::BlockBackend;
use crate::blocking::ShuttingDown;
use crate::blocking::blocking;
use crate::hv::Hypervisor;
use crate::mem::GuestRam;
use crate::mem::MemoryCopy;
use crate::mem::MemoryImage;
use crate::mem::RamError;

/// A machine's state with its memory, at one instant. Cheap to clone; machines made from it share the memory that they
/// do not write.
#[derive(Clone, Debug)]
pub struct Frozen {
    state: Arc<MachineState>,
    memory: MemoryImage,
    paused: Duration,
}

impl Frozen {
    /// For how long the machine stood still for this, counted from when it was asked to; zero for one that was paused.
    #[must_use]
    pub fn paused(&self) -> Duration {
        self.paused
    }

    /// The machine's state.
    #[must_use]
    pub fn state(&self) -> &MachineState {
        &self.state
    }

    /// The memory, mapped copy-on-write.
    ///
    /// # Errors
    /// [`RamError`] when the host refuses.
    pub fn map_memory(&self) -> Result<GuestRam, RamError> {
        self.memory.map()
    }

    /// A machine that goes on from here, paused; `disks` are those that the frozen one had.
    ///
    /// # Errors
    /// [`RestoreError`]; nothing is left running then.
    ///
    /// # Cancel safety
    /// Cancelled, nothing is left running.
    pub async fn restore(
        &self,
        engine: &dyn Hypervisor,
        disks: &[Arc<dyn BlockBackend>],
    ) -> Result<Machine, RestoreError> {
        let memory = self.map_memory().map_err(MachineError::from)?;
        Machine::restore(engine, &self.state, memory, disks).await
    }
}

impl Machine {
    /// Keeps the machine as it is now, or in a moment: most of the memory that it has written is copied while it runs. Then
    /// it is paused for as long as it takes to save its state and to copy what it has written meanwhile, and goes on. On a
    /// host that does not tell what is written (before Linux 6.7) all is copied in the pause. One that is paused stays so.
    ///
    /// # Errors
    /// [`FreezeError`]; the machine goes on as it was, if it has not ended.
    ///
    /// # Cancel safety
    /// Cancelled, the machine goes on as it was.
    ///
    /// # Examples
    /// ```no_run
    /// # async fn f(mut machine: kiln::vmm::Machine, disk: std::sync::Arc<dyn kiln::block::BlockBackend>)
    /// # -> Result<(), Box<dyn std::error::Error>> {
    /// use kiln::hv::soft::Soft;
    /// let frozen = machine.freeze().await?;
    /// let mut twin = frozen.restore(&Soft::new(), &[disk]).await?;
    /// twin.resume();
    /// # Ok(()) }
    /// ```
    pub async fn freeze(&mut self) -> Result<Frozen, FreezeError> {
        let memory = Arc::clone(self.memory());
        let copy = if self.is_paused() { MemoryCopy::of_still(memory)? } else { copy_ahead(memory).await? };
        let began = Instant::now();
        let stopped = Stopped { goes_on: !self.is_paused(), machine: self };
        stopped.machine.pause().await?;
        let state = Arc::new(stopped.machine.save().await?);
        let copied = off_executor(move || copy.finish()).await?;
        let goes_on = stopped.goes_on;
        drop(stopped);
        let paused = if goes_on { began.elapsed() } else { Duration::ZERO };
        tracing::debug!(?paused, "the machine is kept as it was");
        let memory = off_executor(move || copied.into_image()).await?;
        Ok(Frozen { state, memory, paused })
    }
}

/// Copies memory that is being written. Cancelled, it comes to an end soon, by itself.
async fn copy_ahead(memory: Arc<GuestRam>) -> Result<MemoryCopy, FreezeError> {
    let unwanted = CancellationToken::new();
    let _guard = unwanted.clone().drop_guard();
    off_executor(move || MemoryCopy::begin(memory, &|| !unwanted.is_cancelled())).await
}

async fn off_executor<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, RamError> + Send + 'static,
) -> Result<T, FreezeError> {
    Ok(blocking(work).await.map_err(|ShuttingDown| FreezeError::Shutdown)??)
}

/// Lets the machine go on when it is dropped, if it ran.
struct Stopped<'a> {
    machine: &'a mut Machine,
    goes_on: bool,
}

impl Drop for Stopped<'_> {
    fn drop(&mut self) {
        if self.goes_on {
            self.machine.resume();
        }
    }
}
