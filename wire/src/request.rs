//! The JSON of the REQUEST frame, which starts a process.
//!
//! Unknown fields are ignored and absent ones take their default, so that either end may be newer than the other.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// A process to start.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// The program and its arguments; at least one.
    pub argv: Vec<String>,
    /// Merged over the agent's own environment for the image.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// The working directory; the image's when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    /// `name`, `uid`, `name:group` or `uid:gid`; the image's user when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Whether the process gets a terminal instead of three pipes.
    #[serde(default)]
    pub tty: bool,
    /// The terminal's width, in characters.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cols: Option<u16>,
    /// The terminal's height, in characters.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rows: Option<u16>,
    /// Files written before anything runs.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stage_files: Vec<StageFile>,
    /// Commands run after `argv`, stopping at the first non-zero exit.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub chain: Vec<Vec<String>>,
    /// Whether the agent says with a STARTED frame that `argv` runs. An agent that does not know the field says nothing.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub started: bool,
}

/// A file written, atomically, before the process starts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StageFile {
    /// Where, in the guest.
    pub path: String,
    /// The content, in standard base64.
    pub data_b64: String,
    /// Permission bits; 0o644 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<u32>,
}
