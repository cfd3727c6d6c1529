//! Why a command did not run, or its end is not known.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use kiln_wire::failure::Failure;
use kiln_wire::failure::error_kind;
use thiserror::Error;

/// Why a command did not run, or why its end is not known.
///
/// A process that ran and ended is never an error, whatever its exit code. Cloneable, because every handle of a session
/// reports the same one.
#[derive(Clone, Debug, Error)]
#[non_exhaustive]
pub enum ExecError {
    /// The guest has no such program.
    #[error("program not found: {program}")]
    NotFound {
        /// The program as it was asked for.
        program: String,
    },
    /// The program exists and cannot be executed.
    #[error("program not executable: {detail}")]
    NotExecutable {
        /// The program and the reason.
        detail: String,
    },
    /// The working directory cannot be entered.
    #[error("working directory not usable: {detail}")]
    BadCwd {
        /// The directory and the reason.
        detail: String,
    },
    /// The image has no such user or group.
    #[error("unknown user: {user}")]
    UnknownUser {
        /// The user as it was asked for.
        user: String,
    },
    /// The request cannot be expressed or was refused as malformed.
    #[error("invalid request: {detail}")]
    BadRequest {
        /// What is wrong with it.
        detail: String,
    },
    /// The agent could not do it for a reason of the guest's, such as no memory.
    #[error("refused by the guest: {text}")]
    Refused {
        /// The agent's own words.
        text: String,
    },
    /// The guest's system refused it.
    #[error("refused by the guest's system: {detail}")]
    System {
        /// The number that Linux gives the error; [`ExecError::kind`] has its meaning.
        errno: i32,
        /// What it concerned, and the system's words.
        detail: String,
    },
    /// Output was dropped because nobody read it; [`crate::exec`] says when that happens.
    #[error("{bytes} bytes of output were dropped because nobody read them")]
    OutputLost {
        /// How many, at least.
        bytes: u64,
    },
    /// The agent cannot be reached.
    #[error("agent not reachable")]
    Connect(#[source] Arc<io::Error>),
    /// The connection ended before the process did, as far as is known.
    #[error("connection to the agent lost")]
    AgentGone(#[source] Arc<io::Error>),
    /// The agent sent something that the protocol does not allow.
    #[error("protocol violation by the agent: {detail}")]
    Protocol {
        /// What it sent.
        detail: String,
    },
    /// The agent did not answer in time.
    #[error("no answer from the agent within {after:?}")]
    Timeout {
        /// How long it was given.
        after: Duration,
    },
    /// The process has already ended, so it cannot be signalled.
    #[error("process has already ended")]
    Ended,
    /// Another run of the workload has been started since, and how this one ended is no longer known.
    #[error("workload was replaced by another run")]
    Replaced,
    /// The child, or its runtime, was dropped before the process ended.
    #[error("exec session was dropped")]
    Dropped,
}

impl ExecError {
    /// What an I/O error of this cause is called.
    #[must_use]
    pub fn kind(&self) -> io::ErrorKind {
        match self {
            Self::NotFound { .. } => io::ErrorKind::NotFound,
            Self::NotExecutable { .. } => io::ErrorKind::PermissionDenied,
            Self::BadCwd { .. } => io::ErrorKind::NotADirectory,
            Self::UnknownUser { .. } | Self::BadRequest { .. } | Self::Ended => io::ErrorKind::InvalidInput,
            Self::System { errno, .. } => error_kind(*errno),
            Self::Connect(source) | Self::AgentGone(source) => source.kind(),
            Self::Protocol { .. } => io::ErrorKind::InvalidData,
            Self::Timeout { .. } => io::ErrorKind::TimedOut,
            Self::Dropped => io::ErrorKind::BrokenPipe,
            Self::Replaced => io::ErrorKind::NotFound,
            Self::Refused { .. } | Self::OutputLost { .. } => io::ErrorKind::Other,
        }
    }

    /// The error of the session that a handle's I/O error carries, or the loss of the connection.
    pub(crate) fn from_io(error: io::Error) -> Self {
        match error.get_ref().and_then(|source| source.downcast_ref::<Self>()) {
            Some(source) => source.clone(),
            None => Self::gone(error),
        }
    }

    /// The agent went away without an error of the transport.
    pub(crate) fn hung_up() -> Self {
        Self::gone(io::ErrorKind::UnexpectedEof.into())
    }

    /// The transport failed with `error`.
    pub(crate) fn gone(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::InvalidData => Self::Protocol { detail: error.to_string() },
            _ => Self::AgentGone(Arc::new(error)),
        }
    }
}

impl From<Failure> for ExecError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::NotFound(program) => Self::NotFound { program },
            Failure::NotExecutable(detail) => Self::NotExecutable { detail },
            Failure::BadCwd(detail) => Self::BadCwd { detail },
            Failure::UnknownUser(user) => Self::UnknownUser { user },
            Failure::BadRequest(detail) => Self::BadRequest { detail },
            Failure::System { errno, detail } => Self::System { errno, detail },
            other => Self::Refused { text: other.to_string() },
        }
    }
}

impl From<ExecError> for io::Error {
    fn from(error: ExecError) -> Self {
        Self::new(error.kind(), error)
    }
}
