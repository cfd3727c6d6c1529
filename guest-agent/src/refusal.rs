//! Why the agent did not do what it was asked, on its way into a CONTROL answer or an ERROR frame.

use std::io;

use kiln_wire::control::ControlAck;
use kiln_wire::failure::Failure;
use rustix::io::Errno;

use crate::launch::reason;

/// Words, and Linux's number of the error where the system refused it.
#[derive(Debug)]
pub(crate) struct Refusal {
    text: String,
    errno: Option<i32>,
}

impl Refusal {
    pub(crate) fn new(text: impl Into<String>) -> Self {
        Self { text: text.into(), errno: None }
    }

    /// For a host that has to tell it from other refusals.
    pub(crate) fn numbered(text: impl Into<String>, errno: Errno) -> Self {
        Self { text: text.into(), errno: Some(errno.raw_os_error()) }
    }

    /// The system's answer to something done with `what`.
    pub(crate) fn system(what: &str, error: &io::Error) -> Self {
        Self { text: format!("{what}: {}", reason(error)), errno: error.raw_os_error() }
    }

    /// The same, for something that was done on behalf of something else.
    pub(crate) fn while_doing(self, what: &str) -> Self {
        Self { text: format!("{what} {}", self.text), ..self }
    }
}

impl From<Refusal> for ControlAck {
    fn from(Refusal { text, errno }: Refusal) -> Self {
        Self { errno, ..Self::refused(text) }
    }
}

impl From<Refusal> for Failure {
    fn from(Refusal { text, errno }: Refusal) -> Self {
        match errno {
            Some(errno) => Self::System { errno, detail: text },
            None => Self::Other(text),
        }
    }
}

impl From<Failure> for Refusal {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::System { errno, detail } => Self { text: detail, errno: Some(errno) },
            other => Self::new(other.to_string()),
        }
    }
}
