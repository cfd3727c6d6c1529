//! A hundred commands at once in one VM, and what became of each.
//!
//! ```sh
//! cargo run --example parallel -- IMAGE [LIMIT]
//! cargo run --example parallel -- --socket PATH [LIMIT]
//! ```
//! LIMIT is how many run at the same time; all of them without it. An image that starts with `/` is an OCI layout folder or an archive,
//! anything else is pulled from its registry.
#![allow(clippy::print_stdout, reason = "an example talks to its terminal")]

use std::error::Error;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;
use std::time::Instant;

use kiln::ExecBuilder;
use kiln::ExecError;
use kiln::ExecOutcome;
use kiln::Image;
use kiln::VmConfig;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

const USAGE: &str = "usage: parallel (IMAGE | --socket PATH) [LIMIT]";

const COMMANDS: usize = 100;

/// One command must not hold up the summary for ever.
const TIMEOUT: Duration = Duration::from_secs(60);

/// What the commands came to.
#[derive(Debug, Default)]
pub(crate) struct Summary {
    /// What the successful ones printed, by their index.
    pub(crate) answers: Vec<(usize, String)>,
    /// Why the others are not there, by their index.
    pub(crate) failures: Vec<(usize, String)>,
    /// From the first start to the last end.
    pub(crate) wall: Duration,
}

/// Runs every shell line in `lines`, at most `limit` at the same time.
///
/// Dropping the future drops the `JoinSet`, which aborts its tasks, which drop their commands, which kills them: no
/// process outlives an interest in it.
pub(crate) async fn run_all(exec: &ExecBuilder, lines: Vec<String>, limit: Option<usize>) -> Summary {
    let started = Instant::now();
    let permits = Arc::new(Semaphore::new(limit.unwrap_or(Semaphore::MAX_PERMITS)));
    let mut running = JoinSet::new();
    for (index, line) in lines.into_iter().enumerate() {
        let exec = exec.clone().argv(["sh", "-c", &line]).timeout(TIMEOUT);
        let permits = Arc::clone(&permits);
        running.spawn(async move {
            // Held until the command has ended. Nobody closes the semaphore.
            let _permit = permits.acquire_owned().await;
            (index, exec.output().await)
        });
    }
    let mut summary = Summary::default();
    while let Some(joined) = running.join_next().await {
        match joined {
            Ok((index, result)) => summary.add(index, result),
            // Nobody aborts these tasks, so it is a panic, and a panic is a bug to be seen.
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        }
    }
    summary.answers.sort_unstable();
    summary.failures.sort_unstable();
    summary.wall = started.elapsed();
    summary
}

impl Summary {
    fn add(&mut self, index: usize, result: Result<ExecOutcome, ExecError>) {
        match result {
            Ok(outcome) if outcome.success() => {
                self.answers.push((index, String::from_utf8_lossy(&outcome.stdout).into_owned()));
            }
            // The process ran and failed.
            Ok(outcome) if outcome.timed_out => self.failures.push((index, format!("not done after {TIMEOUT:?}"))),
            Ok(outcome) => {
                let stderr = String::from_utf8_lossy(&outcome.stderr);
                self.failures.push((index, format!("{}: {}", outcome.status, stderr.trim_end())));
            }
            // There was no process, or nobody knows what became of it.
            Err(error) => self.failures.push((index, error.to_string())),
        }
    }

    fn print(&self) {
        for (index, why) in &self.failures {
            println!("command {index} failed: {why}");
        }
        let (good, bad) = (self.answers.len(), self.failures.len());
        println!("{good} succeeded, {bad} failed, in {:.3} s", self.wall.as_secs_f64());
    }
}

#[tokio::main]
async fn main() -> Result<ExitCode, Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let target = args.next().ok_or(USAGE)?;
    if target == "--socket" {
        let exec = ExecBuilder::new(args.next().ok_or(USAGE)?);
        return squares(&exec, args.next()).await;
    }
    let image = if target.starts_with('/') { Image::from_path(&target).await? } else { Image::pull(&target).await? };
    let vm = image.start(VmConfig::new()).await?;
    let code = squares(&vm.exec_builder(), args.next()).await;
    vm.shutdown().await?;
    code
}

/// A hundred squares, computed by a hundred shells.
async fn squares(exec: &ExecBuilder, limit: Option<String>) -> Result<ExitCode, Box<dyn Error>> {
    let limit = limit.map(|text| text.parse()).transpose()?;
    let lines = (0..COMMANDS).map(|number| format!("echo $(({number} * {number}))")).collect();
    tokio::select! {
        summary = run_all(exec, lines, limit) => {
            summary.print();
            Ok(if summary.failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
        interrupted = tokio::signal::ctrl_c() => Err(interrupted.map_or_else(Into::into, |()| "interrupted".into())),
    }
}
