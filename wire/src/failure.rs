//! The texts of the ERROR frame: written by the agent, turned back into a type by the host.
//!
//! The text is for people and for hosts that only show it; its head, up to the first colon, is fixed so that a host can
//! also act on it. A text with an unknown head is an ordinary message, never an error of the protocol.

use std::fmt;
use std::io;

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
    /// The guest's system refused it, with the number that Linux gives the error.
    System {
        /// Linux's number.
        errno: i32,
        /// What it concerned, and the system's words.
        detail: String,
    },
    /// Anything else.
    Other(String),
}

const NOT_FOUND: &str = "not found";
const NOT_EXECUTABLE: &str = "not executable";
const BAD_CWD: &str = "bad cwd";
const UNKNOWN_USER: &str = "unknown user";
const BAD_REQUEST: &str = "bad request";
const ERRNO: &str = "errno ";

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotFound(detail) => write!(f, "{NOT_FOUND}: {detail}"),
            Self::NotExecutable(detail) => write!(f, "{NOT_EXECUTABLE}: {detail}"),
            Self::BadCwd(detail) => write!(f, "{BAD_CWD}: {detail}"),
            Self::UnknownUser(detail) => write!(f, "{UNKNOWN_USER}: {detail}"),
            Self::BadRequest(detail) => write!(f, "{BAD_REQUEST}: {detail}"),
            Self::System { errno, detail } => write!(f, "{ERRNO}{errno}: {detail}"),
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
        if let Some(errno) = head.strip_prefix(ERRNO).and_then(|number| number.parse().ok()) {
            return Self::System { errno, detail };
        }
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

/// The kind of the error that Linux numbers `errno`; `Other` for one that has no kind of its own.
///
/// Written out, since the host may be another system that counts differently.
#[must_use]
pub const fn error_kind(errno: i32) -> io::ErrorKind {
    match errno {
        1 | 13 => io::ErrorKind::PermissionDenied,
        2 => io::ErrorKind::NotFound,
        11 => io::ErrorKind::WouldBlock,
        12 => io::ErrorKind::OutOfMemory,
        17 => io::ErrorKind::AlreadyExists,
        20 => io::ErrorKind::NotADirectory,
        21 => io::ErrorKind::IsADirectory,
        22 => io::ErrorKind::InvalidInput,
        27 => io::ErrorKind::FileTooLarge,
        28 => io::ErrorKind::StorageFull,
        30 => io::ErrorKind::ReadOnlyFilesystem,
        32 => io::ErrorKind::BrokenPipe,
        36 => io::ErrorKind::InvalidFilename,
        39 => io::ErrorKind::DirectoryNotEmpty,
        101 => io::ErrorKind::NetworkUnreachable,
        104 => io::ErrorKind::ConnectionReset,
        110 => io::ErrorKind::TimedOut,
        111 => io::ErrorKind::ConnectionRefused,
        113 => io::ErrorKind::HostUnreachable,
        _ => io::ErrorKind::Other,
    }
}
