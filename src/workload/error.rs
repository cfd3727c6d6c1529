//! Why there is no workload.

use std::io;

use thiserror::Error;

use crate::exec::ExecError;

/// Why a workload was not started, or none was found.
#[derive(Clone, Debug, Error)]
#[non_exhaustive]
pub enum WorkloadError {
    /// The image has neither ENTRYPOINT nor CMD, and no other command was given.
    #[error("the image has no command")]
    NoCommand,
    /// There is one already; [`attach`](crate::workload::WorkloadBuilder::attach) finds it.
    #[error("a workload is already running")]
    AlreadyRunning,
    /// None has been started.
    #[error("no workload has been started")]
    NotStarted,
    /// The guest's agent is of a kind that cannot own a workload.
    #[error("the guest's agent cannot run a workload")]
    Unsupported,
    /// The command cannot be run, or the agent cannot be reached.
    #[error(transparent)]
    Exec(#[from] ExecError),
}

impl WorkloadError {
    /// What an I/O error of this cause is called.
    #[must_use]
    pub fn kind(&self) -> io::ErrorKind {
        match self {
            Self::NoCommand => io::ErrorKind::InvalidInput,
            Self::AlreadyRunning => io::ErrorKind::AlreadyExists,
            Self::NotStarted => io::ErrorKind::NotFound,
            Self::Unsupported => io::ErrorKind::Unsupported,
            Self::Exec(error) => error.kind(),
        }
    }
}

impl From<WorkloadError> for io::Error {
    fn from(error: WorkloadError) -> Self {
        Self::new(error.kind(), error)
    }
}
