//! The task that owns a running machine. Handles send messages; nobody else touches it.
//!
//! ```text
//!   running --Stop, or every handle dropped--> stopping --vCPU thread over--> ended(Stopped)
//!      \------------------ the guest's own end -------------------------------> ended(...)
//! ```

use tokio::sync::mpsc;
use tokio::sync::watch;

use super::CONSOLE_LINES;
use super::error::VmEnd;
use crate::vmm::Machine;
use crate::vmm::MachineEnd;

/// What a handle may ask.
#[derive(Debug)]
pub(super) enum Command {
    /// Stop the machine.
    Stop,
}

/// A handle's end of the driver.
#[derive(Debug)]
pub(super) struct DriverHandle {
    pub(super) commands: mpsc::Sender<Command>,
    pub(super) end: watch::Receiver<Option<VmEnd>>,
}

/// Gives `machine` to a task of its own. The task ends with the machine, and stops the machine when the
/// handle is dropped; so it needs no other owner.
pub(super) fn spawn(machine: Machine) -> DriverHandle {
    // One place: asking to stop twice is asking once.
    let (commands, inbox) = mpsc::channel(1);
    let (ended, end) = watch::channel(None);
    tokio::spawn(drive(machine, inbox, ended));
    DriverHandle { commands, end }
}

async fn drive(machine: Machine, mut inbox: mpsc::Receiver<Command>, ended: watch::Sender<Option<VmEnd>>) {
    let end = machine.ended();
    tokio::pin!(end);
    let end = tokio::select! {
        end = &mut end => end,
        // A message, or no handle left to send one.
        _ = inbox.recv() => {
            machine.stop();
            end.await
        }
    };
    tracing::debug!(?end, "machine ended");
    ended.send_replace(Some(vm_end(end, || machine.console().last_lines(CONSOLE_LINES))));
}

fn vm_end(end: MachineEnd, console: impl FnOnce() -> Vec<String>) -> VmEnd {
    match end {
        MachineEnd::Shutdown => VmEnd::Shutdown,
        MachineEnd::Stopped => VmEnd::Stopped,
        MachineEnd::KernelPanic(message) => VmEnd::KernelPanic { message, console: console() },
        MachineEnd::Failed(error) => VmEnd::Engine(error),
        MachineEnd::EnginePanicked => VmEnd::EnginePanicked,
    }
}
