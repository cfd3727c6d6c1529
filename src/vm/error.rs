//! Why a VM did not start or stop, and how one ended.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::assets;
use crate::engine::EngineError;
use crate::exec::ExecError;
use crate::hv::HvError;
use crate::image::{Digest, Platform, StoreError};
use crate::rootfs::RootfsError;
use crate::snapshot::SnapshotError;
use crate::vmm::boot::ElfError;
use crate::vmm::{FreezeError, MachineError, RestoreError};

/// Why a VM did not start. Nothing of it is left running then.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// There is no guest kernel.
    #[error("no guest kernel at {}; `{command}` builds one", searched.display())]
    KernelMissing {
        /// Where it was looked for.
        searched: PathBuf,
        /// The command that builds it.
        command: &'static str,
    },
    /// The kernel is not an x86-64 ELF file that can be booted.
    #[error("{} is not a guest kernel", path.display())]
    KernelNotElf {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: ElfError,
    },
    /// There is no agent to put into the guest.
    #[error("no guest agent at {}; `{command}` builds one", searched.display())]
    AgentMissing {
        /// Where it was looked for.
        searched: PathBuf,
        /// The command that builds it.
        command: &'static str,
    },
    /// A file that the VM needs cannot be read.
    #[error("{} cannot be read", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The host's error.
        #[source]
        source: io::Error,
    },
    /// The image's layers do not make a root filesystem.
    #[error("building the root filesystem")]
    Rootfs(#[from] RootfsError),
    /// The image is made for a processor or system that no guest has.
    #[error("the image is for {image}, guests are {guest}")]
    Platform {
        /// What the image is made for.
        image: Box<Platform>,
        /// What guests are.
        guest: Box<Platform>,
    },
    /// The engine that was named cannot run guests on this host.
    #[error(transparent)]
    NoEngine(#[from] EngineError),
    /// A setting that cannot be.
    #[error("invalid configuration: {0}")]
    Config(&'static str),
    /// The machine could not be built.
    #[error("the machine could not be built")]
    Machine(#[source] MachineError),
    /// The host refused a thread or entropy.
    #[error("the host has no {what}")]
    Host {
        /// What was asked for.
        what: &'static str,
        /// The host's error.
        #[source]
        source: io::Error,
    },
    /// The image's store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The image is not baked, and was not to be ([`PullPolicy::Never`](crate::PullPolicy::Never)).
    #[error("no snapshot of image {image} is baked for this configuration")]
    NotBaked {
        /// The image.
        image: Digest,
    },
    /// The caller's warm-up failed, or did not end in time.
    #[error("the warm-up {tag:?} failed")]
    Warmup {
        /// Its tag.
        tag: String,
        /// Its error.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The booted guest could not be kept.
    #[error("keeping the guest as it is")]
    Freeze(#[source] FreezeError),
    /// The snapshot could not be written, or cannot be used.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// The machine could not be restored.
    #[error("restoring the machine")]
    Restore(#[source] RestoreError),
    /// The guest kernel panicked before its agent answered.
    #[error("the guest kernel panicked: {message}")]
    KernelPanic {
        /// The kernel's message.
        message: String,
        /// The console's last lines.
        console: Vec<String>,
    },
    /// The guest shut down, by a triple fault or a reboot, before its agent answered.
    #[error("the guest shut down during boot")]
    TripleFault {
        /// The console's last lines.
        console: Vec<String>,
    },
    /// The agent did not answer in time.
    #[error("the guest's agent did not answer within {after:?}")]
    AgentTimeout {
        /// How long it was given.
        after: Duration,
        /// The console's last lines.
        console: Vec<String>,
    },
    /// What answered in the guest is not an agent that we understand.
    #[error("the guest's agent is not usable")]
    Agent {
        /// What it did.
        #[source]
        source: ExecError,
        /// The console's last lines.
        console: Vec<String>,
    },
    /// The engine met something in the guest that it cannot do.
    #[error("the engine cannot run the guest")]
    Engine {
        /// What it was.
        #[source]
        source: Arc<HvError>,
        /// The console's last lines.
        console: Vec<String>,
    },
    /// The engine panicked: a defect in it.
    #[error("the engine panicked")]
    EnginePanicked {
        /// The console's last lines.
        console: Vec<String>,
    },
}

impl StartError {
    /// The guest console's last lines, where there was a guest.
    #[must_use]
    pub fn console(&self) -> &[String] {
        match self {
            Self::KernelPanic { console, .. }
            | Self::TripleFault { console }
            | Self::AgentTimeout { console, .. }
            | Self::Agent { console, .. }
            | Self::Engine { console, .. }
            | Self::EnginePanicked { console } => console,
            _ => &[],
        }
    }

    pub(super) fn kernel_missing(searched: PathBuf) -> Self {
        Self::KernelMissing { searched, command: assets::KERNEL_COMMAND }
    }

    pub(super) fn agent_missing(searched: PathBuf) -> Self {
        Self::AgentMissing { searched, command: assets::AGENT_COMMAND }
    }
}

/// How a VM that ran has ended.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum VmEnd {
    /// It was stopped from here.
    Stopped,
    /// The guest shut down or rebooted, or crashed beyond recovery.
    Shutdown,
    /// The guest kernel panicked.
    KernelPanic {
        /// The kernel's message.
        message: String,
        /// The console's last lines.
        console: Vec<String>,
    },
    /// The engine met something in the guest that it cannot do.
    Engine(Arc<HvError>),
    /// The engine panicked: a defect in it.
    EnginePanicked,
}

/// The VM did not stop within the time that stopping takes at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the guest's processor did not stop within {after:?}")]
pub struct ShutdownError {
    /// How long it was given.
    pub after: Duration,
}
