//! What this host can do for guests, what is in the way, and what helps.
//!
//! ```text
//!   files under a root, a trial machine --> Facts --judge--> Report: engines, problems, notes
//! ```
//! Looking and judging are apart: a report follows from its [`Facts`] alone.

mod cgroup;
mod facts;
mod finding;
mod report;

pub use cgroup::CgroupLimits;
pub use facts::Facts;
pub use finding::Finding;
pub use report::{EngineReport, Report};

use std::path::Path;

use crate::blocking::ShuttingDown;
use crate::blocking::blocking;
use crate::engine::EngineFacts;
use crate::vm::assets::Assets;

/// Looks at this host: which engines can run Linux guests and why not, whether guest kernel and agent are there, and what
/// costs time or sets limits.
///
/// Takes some milliseconds; engines are tried once in a process.
///
/// # Cancel safety
/// Cancel safe.
///
/// # Examples
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() {
/// let report = kiln::doctor().await;
/// if !report.is_ready() {
///     println!("{report}");
/// }
/// # }
/// ```
///
/// # Panics
/// When the runtime is shutting down.
pub async fn doctor() -> Report {
    let found = blocking(|| {
        let assets = Assets::user();
        Report::of(Facts::read(Path::new("/"), EngineFacts::of_this_process().clone(), assets.as_ref()))
    });
    match found.await {
        Ok(report) => report,
        Err(ShuttingDown) => panic!("the runtime is shutting down"),
    }
}
