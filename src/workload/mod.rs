//! The image's own command: started, read, signalled and waited for.
//!
//! ```text
//!   WorkloadBuilder --start--> Workload --logs--> WorkloadLogs (a Stream)
//!                  \--attach----^  |
//!                                  +--signal, stop, kill, wait
//! ```
//! The guest's agent owns the workload and every handle here only refers to it: dropping them all changes nothing in the guest, and a connection
//! that breaks is made again. The agent keeps the newest 256 KiB of what the workload has written. A reader that comes later or reads more slowly is told how
//! much it missed; the workload itself never waits for a reader.
//!
//! There is one workload at a time. The agent knows each run of it by a number, and so does a [`Workload`], which therefore
//! never speaks of another run than its own.
//!
//! # Deadlines
//! Starting, attaching and signalling take ten seconds at most. [`Workload::wait`] and the next piece of the logs take as long as the workload does, and end with
//! the guest.

mod builder;
mod error;
mod handle;
mod logs;
mod reattach;
mod signal;

pub use builder::WorkloadBuilder;
pub use error::WorkloadError;
pub use handle::Workload;
pub use logs::WorkloadLog;
pub use logs::WorkloadLogs;
pub use signal::signal_number;

use std::time::Duration;

/// How long the agent may take to answer (10 s).
const ANSWER: Duration = Duration::from_secs(10);

/// Linux's number for "no such process": there is no such run, or it has ended.
const ESRCH: i32 = 3;

/// Linux's number for "busy": there is a run.
const EBUSY: i32 = 16;

/// Linux's SIGKILL.
const SIGKILL: u8 = 9;

/// Linux's SIGTERM.
const SIGTERM: u8 = 15;
