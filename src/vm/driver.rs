//! The task that owns a running machine. Handles send messages; nobody else touches it.
//!
//! ```text
//!   running <--Pause, Resume, Freeze...--> paused
//!      \                                     /
//!       +--stop, or every handle dropped----+--> stopping --vCPU thread over--> ended(Stopped)
//!       \------------------ the guest's own end ------------------------------> ended(...)
//! ```
//! Commands are done one after the other. Stopping overtakes them: the one in work is given up.

use std::time::Duration;

use tokio::sync::mpsc;
use tokio::sync::oneshot;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::CONSOLE_LINES;
use super::error::VmEnd;
use crate::units::Bytes;
use crate::vmm::FreezeError;
use crate::vmm::Frozen;
use crate::vmm::GiveBackError;
use crate::vmm::Machine;
use crate::vmm::MachineEnd;
use crate::vmm::PauseError;

/// Commands that wait for their turn; whoever sends one more waits too.
const WAITING: usize = 16;

/// What a handle may ask. Who has gone away since is not answered; what was asked is done all the same.
#[derive(Debug)]
enum Command {
    Pause(oneshot::Sender<Result<(), PauseError>>),
    Resume(oneshot::Sender<()>),
    Freeze(oneshot::Sender<Result<Frozen, FreezeError>>),
    GiveBack { free: Bytes, deadline: Duration, reply: oneshot::Sender<Result<Bytes, GiveBackError>> },
}

/// The machine has ended, and its driver with it.
#[derive(Clone, Copy, Debug)]
struct Gone;

/// A handle's end of the driver.
#[derive(Debug)]
pub(super) struct DriverHandle {
    commands: mpsc::Sender<Command>,
    stop: CancellationToken,
    pub(super) end: watch::Receiver<Option<VmEnd>>,
}

impl DriverHandle {
    /// Asks the machine to stop.
    pub(super) fn stop(&self) {
        self.stop.cancel();
    }

    /// Stops the machine when it is cancelled; keeps nothing alive.
    pub(super) fn stop_token(&self) -> CancellationToken {
        self.stop.clone()
    }

    /// # Cancel safety
    /// Cancelled, it was done, or will be, or not.
    pub(super) async fn pause(&self) -> Result<(), PauseError> {
        self.ask(Command::Pause).await.unwrap_or(Err(PauseError::Ended))
    }

    /// # Cancel safety
    /// Cancelled, it was done, or will be, or not.
    pub(super) async fn resume(&self) -> Result<(), PauseError> {
        self.ask(Command::Resume).await.map_err(|Gone| PauseError::Ended)
    }

    /// # Cancel safety
    /// Cancel safe: the machine goes on.
    pub(super) async fn freeze(&self) -> Result<Frozen, FreezeError> {
        self.ask(Command::Freeze).await.unwrap_or(Err(FreezeError::Pause(PauseError::Ended)))
    }

    /// # Cancel safety
    /// Cancel safe: the guest gives back what it was asked for, and takes it back.
    pub(super) async fn give_memory_back(&self, free: Bytes, deadline: Duration) -> Result<Bytes, GiveBackError> {
        let asked = self.ask(|reply| Command::GiveBack { free, deadline, reply }).await;
        asked.unwrap_or(Err(GiveBackError::Ended))
    }

    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T, Gone> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(command(reply)).await.map_err(|_| Gone)?;
        answer.await.map_err(|_| Gone)
    }
}

/// Gives `machine` to a task of its own. The task ends with the machine, and stops the machine when the
/// handle is dropped; so it needs no other owner.
pub(super) fn spawn(machine: Machine) -> DriverHandle {
    let (commands, inbox) = mpsc::channel(WAITING);
    let (ended, end) = watch::channel(None);
    let stop = CancellationToken::new();
    tokio::spawn(drive(machine, inbox, stop.clone(), ended));
    DriverHandle { commands, stop, end }
}

async fn drive(
    mut machine: Machine,
    mut inbox: mpsc::Receiver<Command>,
    stop: CancellationToken,
    ended: watch::Sender<Option<VmEnd>>,
) {
    let end = machine.ended();
    tokio::pin!(end);
    let end = tokio::select! {
        end = &mut end => end,
        () = async {
            tokio::select! {
                () = stop.cancelled() => {}
                () = serve(&mut machine, &mut inbox) => {}
            }
        } => {
            machine.stop();
            end.await
        }
    };
    tracing::debug!(?end, "machine ended");
    ended.send_replace(Some(vm_end(end, || machine.console().last_lines(CONSOLE_LINES))));
}

/// Does what is asked, until no handle is left to ask.
async fn serve(machine: &mut Machine, inbox: &mut mpsc::Receiver<Command>) {
    while let Some(command) = inbox.recv().await {
        match command {
            Command::Pause(reply) => drop(reply.send(machine.pause().await)),
            Command::Resume(reply) => {
                machine.resume();
                let _ = reply.send(());
            }
            Command::Freeze(reply) if reply.is_closed() => {}
            Command::Freeze(reply) => drop(reply.send(machine.freeze().await)),
            Command::GiveBack { free, deadline, reply } => {
                let _ = reply.send(machine.give_memory_back(free, deadline).await);
            }
        }
    }
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
