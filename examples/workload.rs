//! Runs an image's own command: `cargo run --example workload -- IMAGE [COMMAND ARGUMENT...]`.
//!
//! What it prints is printed here as it comes. Ctrl-C stops it with the image's stop signal, and its exit code becomes this program's. A COMMAND takes
//! the place of the image's own. An image that starts with `/` is an OCI layout folder or an archive, anything else is pulled from its registry.
#![allow(clippy::print_stderr, reason = "an example talks to its terminal")]

use std::error::Error;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitCode;
use std::time::Duration;

use futures::TryStreamExt;
use kiln::ExecExit;
use kiln::Image;
use kiln::VmConfig;
use kiln::Workload;
use kiln::WorkloadLog;
use kiln::WorkloadLogs;
use tokio::io::AsyncWrite;
use tokio::io::AsyncWriteExt;

/// How long the workload may take to stop before it is killed.
const GRACE: Duration = Duration::from_secs(10);

#[tokio::main]
async fn main() -> Result<ExitCode, Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(reference), command) = (args.next(), args.collect::<Vec<_>>()) else {
        eprintln!("usage: workload IMAGE [COMMAND ARGUMENT...]");
        return Ok(ExitCode::from(2));
    };
    let image =
        if reference.starts_with('/') { Image::from_path(&reference).await? } else { Image::pull(&reference).await? };
    let vm = image.start(VmConfig::new()).await?;
    let workload = if command.is_empty() { vm.workload() } else { vm.workload().argv(command) };
    let workload = workload.start().await?;
    let interrupted = async {
        // Without the handler there is nothing to wait for, and Ctrl-C ends this program and its VM.
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
    };
    let exit = run(&workload, interrupted, tokio::io::stdout(), tokio::io::stderr()).await?;
    vm.shutdown().await?;
    Ok(ExitCode::from(code(&exit)))
}

/// Prints what the workload writes until it ends, and stops it once `interrupted` is over.
pub(crate) async fn run(
    workload: &Workload,
    interrupted: impl Future<Output = ()>,
    out: impl AsyncWrite + Unpin,
    err: impl AsyncWrite + Unpin,
) -> Result<ExecExit, Box<dyn Error>> {
    let printing = print(workload.logs(), out, err);
    let stopping = async {
        interrupted.await;
        workload.stop(GRACE).await
    };
    tokio::pin!(printing);
    tokio::select! {
        printed = &mut printing => printed?,
        stopped = stopping => {
            stopped?;
            // Its last words.
            printing.await?;
        }
    }
    Ok(workload.wait().await?)
}

async fn print(
    mut logs: WorkloadLogs,
    mut out: impl AsyncWrite + Unpin,
    mut err: impl AsyncWrite + Unpin,
) -> Result<(), Box<dyn Error>> {
    while let Some(piece) = logs.try_next().await? {
        match piece {
            WorkloadLog::Stdout(bytes) => write(&mut out, &bytes).await?,
            WorkloadLog::Stderr(bytes) => write(&mut err, &bytes).await?,
            WorkloadLog::Lost { bytes } => write(&mut err, format!("[{bytes} bytes lost]\n").as_bytes()).await?,
            _ => {}
        }
    }
    Ok(())
}

async fn write(to: &mut (impl AsyncWrite + Unpin), bytes: &[u8]) -> io::Result<()> {
    to.write_all(bytes).await?;
    // As it comes, also where it is no whole line.
    to.flush().await
}

/// The exit code that a shell would give.
pub(crate) fn code(exit: &ExecExit) -> u8 {
    let signal = exit.status.signal().map(|signal| 128 + signal);
    exit.status.code().or(signal).and_then(|code| u8::try_from(code).ok()).unwrap_or(u8::MAX)
}
