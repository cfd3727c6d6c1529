//! The JSON of the CONTROL frame: one action, one acknowledgement.
//!
//! The actions for which [`Control::opens_stream`] holds are followed, once acknowledged, by a stream of frames.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// What the host asks of the agent itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "action", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Control {
    /// Is the agent there, and which protocol does it speak?
    Probe,
    /// Sends a signal to the process group of the workload, the image's main process.
    Signal {
        /// The signal's number.
        signum: u8,
        /// Only if this is the run that it reaches, see [`ControlAck::run`]; any when absent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        run: Option<u64>,
    },
    /// Starts the workload, which the agent owns: it outlives every connection.
    WorkloadStart {
        /// The program and its arguments; at least one.
        argv: Vec<String>,
        /// Merged over the agent's own environment for the image.
        #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
        env: BTreeMap<String, String>,
        /// The working directory; the image's when absent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        cwd: Option<String>,
        /// `name`, `uid`, `name:group` or `uid:gid`; the image's user when absent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        user: Option<String>,
    },
    /// Streams what the workload has written and goes on to write, and its end.
    WorkloadLogs {
        /// Only of this run; of the last one when absent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        run: Option<u64>,
        /// How many bytes of it, of both outputs together and in their order, to leave out; none when absent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        from: Option<u64>,
    },
    /// Waits for the workload's end.
    WorkloadWait {
        /// Only of this run; of the last one when absent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        run: Option<u64>,
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
    /// Writes a piece of a file that is too long for one frame; nothing appears at `path` before the last piece.
    WriteFileChunk {
        /// Where, in the guest.
        path: String,
        /// Where the piece begins, in bytes; 0 starts afresh.
        offset: u64,
        /// The piece, in standard base64.
        data_b64: String,
        /// Whether the file is complete with it.
        last: bool,
        /// Tells one upload from another; a new one starts afresh.
        token: String,
        /// Permission bits, taken from the last piece; 0o644 when absent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        mode: Option<u32>,
    },
    /// Reads a piece of a file.
    ReadFileChunk {
        /// Where, in the guest.
        path: String,
        /// Where the piece begins, in bytes.
        offset: u64,
        /// The most that the answer may hold, in bytes.
        len: u64,
        /// The largest file to accept, in bytes; any when absent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        max_bytes: Option<u64>,
    },
    /// Opens a regular file and streams its bytes to the host.
    OpenRead {
        /// Where, in the guest.
        path: String,
    },
    /// Streams bytes from the host into a file, which appears whole when the host says end-of-file.
    OpenWrite {
        /// Where, in the guest.
        path: String,
        /// Permission bits; 0o644 when absent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        mode: Option<u32>,
    },
    /// Connects to a TCP port on the guest's loopback interface and streams both ways.
    Connect {
        /// The port.
        port: u16,
    },
    /// Streams a file or a folder with all that is in it to the host, as a tar archive.
    Pack {
        /// The file or folder, in the guest.
        path: String,
    },
    /// Unpacks a tar archive that the host streams.
    Unpack {
        /// The folder to unpack into, in the guest; made if it is missing.
        path: String,
    },
    /// Sets the wall clock.
    SyncTime {
        /// Nanoseconds since the Unix epoch.
        host_unix_ns: u64,
    },
    /// Tells a guest that goes on from a snapshot, or as a clone, what has changed since: the first message to it. All of it is
    /// checked before any of it is done.
    Renew {
        /// Nanoseconds since the Unix epoch.
        host_unix_ns: u64,
        /// What the guest's time stamp counter showed at that moment, so that the message's way does not count.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        tsc: Option<TimeStamp>,
        /// 32 to 512 random bytes that no other guest gets, in standard base64.
        entropy_b64: String,
        /// The host name; as it was when absent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        hostname: Option<String>,
        /// The content of `/etc/machine-id`, 32 lowercase hexadecimal digits; as it was when absent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        machine_id: Option<String>,
    },
    /// Writes dirty file data back.
    Sync,
    /// Drops the page cache, dentries and inodes that nobody uses.
    DropVfsCaches,
    /// An action that this version does not know.
    #[serde(other)]
    Unknown,
}

impl Control {
    /// Whether an acknowledgement of this action is followed by a stream.
    #[must_use]
    pub const fn opens_stream(&self) -> bool {
        matches!(
            self,
            Self::OpenRead { .. }
                | Self::OpenWrite { .. }
                | Self::Connect { .. }
                | Self::Pack { .. }
                | Self::Unpack { .. }
                | Self::WorkloadLogs { .. }
                | Self::WorkloadWait { .. }
        )
    }
}

/// A reading of a time stamp counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimeStamp {
    /// What it showed.
    pub ticks: u64,
    /// Its ticks in a second.
    pub hz: u64,
}

/// What an agent can do beyond the first edition of the protocol, as `probe` reports it.
pub mod feature {
    /// It answers `started` in a REQUEST.
    pub const STARTED: &str = "started";
    /// It serves the actions that open a stream.
    pub const STREAMS: &str = "streams";
    /// It owns a workload: the actions `workload_start`, `workload_logs` and `workload_wait`, and `signal` reaches it.
    pub const WORKLOAD: &str = "workload";
    /// It does `renew`, and answers it as it does `probe`.
    pub const RENEW: &str = "renew";
}

/// The answer to a [`Control`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ControlAck {
    /// Whether it was done.
    pub ok: bool,
    /// Why not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Why not, as Linux numbers its errors, where the system refused it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub errno: Option<i32>,
    /// Of `probe` and `renew`: the protocol's version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protocol: Option<u32>,
    /// Of `probe` and `renew`: what the agent can do beyond it, see [`feature`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub features: Vec<String>,
    /// Of `signal` and the actions of the workload: the main process, which leads its group.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// Of `read_file` and `read_file_chunk`: the content, in standard base64.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data_b64: Option<String>,
    /// Of `read_file_chunk` and `open_read`: the file's size, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total_len: Option<u64>,
    /// Of the actions of the workload: tells one run of it from another.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run: Option<u64>,
    /// Of `workload_logs` and `workload_wait`: how long the main process has run, or had when it ended, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ran_ms: Option<u64>,
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
