//! The texts of the ERROR frame: written by the agent, turned back into a type by the host.
//!
//! The text is for people and for hosts that only show it; its head, up to the first colon, is fixed so that a host can
//! also act on it. A text with an unknown head is an ordinary message, never an error of the protocol.

use std::fmt;

/// Why a process was not started.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Failure {
    /// No such program, in the image or in PATH.
    NotFound(String),
    /// The program exists and cannot be executed.
    NotExecutable(String),
    /// The working directory cannot be entered.
    BadCwd(String),
    /// The image has no such user or group.
    UnknownUser(String),
    /// The request itself is malformed.
    BadRequest(String),
    /// Anything else.
    Other(String),
}

const NOT_FOUND: &str = "not found";
const NOT_EXECUTABLE: &str = "not executable";
const BAD_CWD: &str = "bad cwd";
const UNKNOWN_USER: &str = "unknown user";
const BAD_REQUEST: &str = "bad request";

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotFound(detail) => write!(f, "{NOT_FOUND}: {detail}"),
            Self::NotExecutable(detail) => write!(f, "{NOT_EXECUTABLE}: {detail}"),
            Self::BadCwd(detail) => write!(f, "{BAD_CWD}: {detail}"),
            Self::UnknownUser(detail) => write!(f, "{UNKNOWN_USER}: {detail}"),
            Self::BadRequest(detail) => write!(f, "{BAD_REQUEST}: {detail}"),
            Self::Other(text) => f.write_str(text),
        }
    }
}

impl Failure {
    /// Reads an ERROR payload; bytes that are not UTF-8 are replaced.
    #[must_use]
    pub fn decode(payload: &[u8]) -> Self {
        let text = String::from_utf8_lossy(payload);
        let Some((head, detail)) = text.split_once(": ") else {
            return Self::Other(text.into_owned());
        };
        let detail = detail.to_owned();
        match head {
            NOT_FOUND => Self::NotFound(detail),
            NOT_EXECUTABLE => Self::NotExecutable(detail),
            BAD_CWD => Self::BadCwd(detail),
            UNKNOWN_USER => Self::UnknownUser(detail),
            BAD_REQUEST => Self::BadRequest(detail),
            _ => Self::Other(text.into_owned()),
        }
    }
}
