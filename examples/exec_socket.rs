//! Runs one command through an agent on a Unix socket, like a process of this machine:
//! `cargo run --example exec_socket -- SOCKET [-t] [-u USER] [-w CWD] [-e K=V]... [--timeout SECS] -- ARGV...`
//!
//! Passes standard input on, prints standard output and standard error apart, forwards SIGINT and SIGTERM, and ends with the command's
//! code: 128+n for signal n, 125 when the session failed. `kiln-conformance host` checks that it does.
#![allow(clippy::print_stderr, reason = "an example talks to its terminal")]

use std::error::Error;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::time::Duration;

use kiln::exec::ExecBuilder;
use tokio::io::AsyncRead;
use tokio::io::AsyncWrite;
use tokio::io::AsyncWriteExt;
use tokio::signal::unix::SignalKind;
use tokio::signal::unix::signal;

const USAGE: &str = "usage: exec_socket SOCKET [-t] [-u USER] [-w CWD] [-e K=V]... [--timeout SECS] -- ARGV...";

/// What the program ends with when the session failed, which no code of the command can say.
const SESSION_FAILED: i32 = 125;

#[tokio::main]
async fn main() {
    let code = match run().await {
        Ok(status) => status.signal().map_or(status.code(), |signal| Some(128 + signal)).unwrap_or(SESSION_FAILED),
        Err(error) => {
            eprintln!("exec_socket: {}", with_sources(&*error));
            SESSION_FAILED
        }
    };
    // Returning would wait for a read of standard input, which nothing can cancel.
    std::process::exit(code)
}

async fn run() -> Result<ExitStatus, Box<dyn Error>> {
    let mut child = command(std::env::args().skip(1))?.spawn().await?;
    let mut stdin = child.stdin.take().ok_or("no standard input")?;
    let stdout = child.stdout.take().ok_or("no standard output")?;
    let stderr = child.stderr.take().ok_or("no standard error")?;
    tokio::spawn(async move {
        tokio::io::copy(&mut tokio::io::stdin(), &mut stdin).await?;
        // The end of our input is the end of the command's.
        stdin.shutdown().await
    });
    let signaller = child.signaller();
    let (interrupts, terminations) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    for (mut signals, number) in [(interrupts, 2), (terminations, 15)] {
        let signaller = signaller.clone();
        tokio::spawn(async move {
            // Until the command has ended.
            while signals.recv().await.is_some() && signaller.signal(number).await.is_ok() {}
        });
    }
    // All at once: a command that fills one output while nobody reads it would wait for ever. An output that fails has lost
    // its session, and `wait` says why.
    let (out, err, status) =
        tokio::join!(print(stdout, tokio::io::stdout()), print(stderr, tokio::io::stderr()), child.wait());
    let status = status?;
    out?;
    err?;
    Ok(status)
}

async fn print(mut output: impl AsyncRead + Unpin, mut ours: impl AsyncWrite + Unpin) -> std::io::Result<()> {
    let copied = tokio::io::copy(&mut output, &mut ours).await;
    ours.flush().await?;
    copied.map(|_| ())
}

fn command(mut args: impl Iterator<Item = String>) -> Result<ExecBuilder, Box<dyn Error>> {
    let mut command = ExecBuilder::new(args.next().ok_or(USAGE)?);
    while let Some(option) = args.next() {
        let mut value = || args.next().ok_or(USAGE);
        command = match option.as_str() {
            "-t" => command.tty(true),
            "-u" => command.user(value()?),
            "-w" => command.cwd(value()?),
            "-e" => {
                let variable = value()?;
                let (name, value) = variable.split_once('=').ok_or(USAGE)?;
                command.env(name, value)
            }
            "--timeout" => command.timeout(Duration::from_secs(value()?.parse()?)),
            "--" => return Ok(command.argv(args)),
            _ => return Err(USAGE.into()),
        };
    }
    Err(USAGE.into())
}

/// The error and what led to it, on one line.
fn with_sources(error: &dyn Error) -> String {
    let mut line = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        line += &format!(": {error}");
        source = error.source();
    }
    line
}
