//! The JSON of the CONTROL frame: one action, one acknowledgement.

use serde::{Deserialize, Serialize};

/// What the host asks of the agent itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "action", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Control {
    /// Is the agent there, and which protocol does it speak?
    Probe,
    /// Sends a signal to the image's main process.
    Signal {
        /// The signal's number.
        signum: u8,
    },
    /// Writes a file atomically.
    WriteFile {
        /// Where, in the guest.
        path: String,
        /// The content, in standard base64.
        data_b64: String,
        /// Permission bits; 0o644 when absent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        mode: Option<u32>,
    },
    /// Reads a whole file.
    ReadFile {
        /// Where, in the guest.
        path: String,
        /// The largest file to accept, in bytes; 4 MiB when absent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        max_bytes: Option<u64>,
    },
    /// Sets the wall clock.
    SyncTime {
        /// Nanoseconds since the Unix epoch.
        host_unix_ns: u64,
    },
    /// Writes dirty file data back.
    Sync,
    /// Drops the page cache, dentries and inodes that nobody uses.
    DropVfsCaches,
    /// An action that this version does not know.
    #[serde(other)]
    Unknown,
}

/// The answer to a [`Control`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ControlAck {
    /// Whether it was done.
    pub ok: bool,
    /// Why not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Of `probe`: the protocol's version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protocol: Option<u32>,
    /// Of `signal`: the process that it reached.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// Of `read_file`: the content, in standard base64.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data_b64: Option<String>,
}

impl ControlAck {
    /// The answer to an action that was done and has nothing to say.
    #[must_use]
    pub fn done() -> Self {
        Self { ok: true, ..Self::default() }
    }

    /// The answer to an action that was not done.
    #[must_use]
    pub fn refused(error: impl Into<String>) -> Self {
        Self { error: Some(error.into()), ..Self::default() }
    }
}
