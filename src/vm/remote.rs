//! What the owner of many VMs keeps of one that somebody else holds: it can see its end and cause it.

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::STOP_TIMEOUT;
use super::driver::DriverHandle;
use super::error::VmEnd;

/// Sees and causes the end of a VM, and does not keep it alive: the VM still stops when its handle is dropped.
#[derive(Debug)]
pub(crate) struct Remote {
    stop: CancellationToken,
    end: watch::Receiver<Option<VmEnd>>,
}

impl Remote {
    pub(super) fn new(driver: &DriverHandle) -> Self {
        Self { stop: driver.stop_token(), end: driver.end.clone() }
    }

    /// Whether the guest has ended.
    pub(crate) fn has_ended(&self) -> bool {
        // Without its sender the driver's runtime was shut down around it, and the machine with it.
        self.end.borrow().is_some() || self.end.has_changed().is_err()
    }

    /// Waits for the guest's end.
    pub(crate) async fn ended(mut self) {
        // An error is an end too, see above.
        let _ = self.end.wait_for(Option::is_some).await;
    }

    /// Stops the guest and waits until it has stopped, or is so defective that it never will.
    pub(crate) async fn stop(self) {
        self.stop.cancel();
        if tokio::time::timeout(STOP_TIMEOUT, self.ended()).await.is_err() {
            tracing::error!(after = ?STOP_TIMEOUT, "a guest's processor did not stop");
        }
    }
}
