//! Runs shell snippets, each in a VM of its own from a pool, and prints each result as it comes.
//!
//! ```sh
//! cargo run --example pool -- [--max VMS] [--timeout SECONDS] IMAGE [SNIPPET...]
//! printf 'uname -a\nexit 3\n' | cargo run --example pool -- IMAGE
//! ```
//! Without a SNIPPET the lines of the standard input are run. Ctrl-C ends what runs, and the VMs. An IMAGE that starts
//! with `/` is an OCI layout folder or an archive, anything else is pulled from its registry.
#![allow(clippy::print_stderr, reason = "an example talks to its terminal")]

use std::error::Error;
use std::io;
use std::io::BufRead;
use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;
use std::time::Instant;

use futures::Stream;
use futures::StreamExt;
use kiln::AcquireError;
use kiln::ExecError;
use kiln::ExecOutcome;
use kiln::Image;
use kiln::Pool;
use tokio::io::AsyncWrite;
use tokio::io::AsyncWriteExt;
use tokio::sync::mpsc;

const USAGE: &str = "usage: pool [--max VMS] [--timeout SECONDS] IMAGE [SNIPPET...]";

/// Snippets that were read and wait for a VM.
const READ_AHEAD: usize = 16;

/// What the arguments say.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Options {
    /// VMs at the same time.
    pub(crate) max: usize,
    /// What a snippet may take once it has a VM.
    pub(crate) timeout: Duration,
    pub(crate) image: String,
    pub(crate) snippets: Vec<String>,
}

/// How many snippets came to which end.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Summary {
    pub(crate) succeeded: usize,
    pub(crate) failed: usize,
    /// Not all were run.
    pub(crate) interrupted: bool,
}

/// Why a snippet did not run, or nobody knows what became of it.
#[derive(Debug)]
enum Failure {
    NoVm(AcquireError),
    Exec(ExecError),
}

impl Options {
    /// None when they are not as [`USAGE`] says.
    pub(crate) fn parse(mut args: impl Iterator<Item = String>) -> Option<Self> {
        let (mut max, mut timeout) = (4, Duration::from_secs(10));
        loop {
            match args.next()?.as_str() {
                "--max" => max = args.next()?.parse().ok().filter(|max| *max > 0)?,
                "--timeout" => timeout = Duration::try_from_secs_f64(args.next()?.parse().ok()?).ok()?,
                option if option.starts_with("--") => return None,
                image => return Some(Self { max, timeout, image: image.to_owned(), snippets: args.collect() }),
            }
        }
    }
}

#[tokio::main]
async fn main() -> Result<ExitCode, Box<dyn Error>> {
    let Some(Options { max, timeout, image, snippets }) = Options::parse(std::env::args().skip(1)) else {
        eprintln!("{USAGE}");
        return Ok(ExitCode::from(2));
    };
    let image = if image.starts_with('/') { Image::from_path(&image).await? } else { Image::pull(&image).await? };
    // One is ready when the first snippet comes; the others are started as they are needed.
    let pool = image.pool().min(1).max(max).build().await?;
    let snippets =
        if snippets.is_empty() { read_lines().left_stream() } else { futures::stream::iter(snippets).right_stream() };
    let interrupted = async {
        // Without the handler there is nothing to wait for, and Ctrl-C ends this program and its VMs.
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
    };
    let summary = run(&pool, snippets, max, timeout, interrupted, tokio::io::stdout()).await;
    let stats = pool.stats();
    // Nobody has a VM any more, so there is no grace to be waited for.
    pool.shutdown().await;
    let Summary { succeeded, failed, interrupted } = summary?;
    eprintln!("{succeeded} succeeded, {failed} failed{}", if interrupted { ", interrupted" } else { "" });
    eprintln!("VMs: {} started, {} handed out, {} crashed", stats.started, stats.handed_out, stats.crashed);
    Ok(match (interrupted, failed) {
        (true, _) => ExitCode::from(130),
        (false, 0) => ExitCode::SUCCESS,
        (false, _) => ExitCode::FAILURE,
    })
}

/// Runs `snippets`, at most `max` at the same time, and writes what each came to. Once `interrupted` is over, those that
/// run are dropped, which kills their commands and gives their VMs back.
pub(crate) async fn run(
    pool: &Pool,
    snippets: impl Stream<Item = String>,
    max: usize,
    timeout: Duration,
    interrupted: impl Future<Output = ()>,
    mut out: impl AsyncWrite + Unpin,
) -> io::Result<Summary> {
    // More than there are VMs for would only wait, so the input is read no faster than it is run.
    let running = snippets
        .enumerate()
        .map(|(index, snippet)| async move {
            let began = Instant::now();
            let result = run_one(pool, &snippet, timeout).await;
            (index, snippet, result, began.elapsed())
        })
        .buffer_unordered(max);
    tokio::pin!(running, interrupted);
    let mut summary = Summary::default();
    loop {
        let (index, snippet, result, took) = tokio::select! {
            next = running.next() => match next {
                Some(done) => done,
                None => return Ok(summary),
            },
            () = &mut interrupted => {
                summary.interrupted = true;
                return Ok(summary);
            }
        };
        match &result {
            Ok(outcome) if outcome.success() => summary.succeeded += 1,
            _ => summary.failed += 1,
        }
        out.write_all(&report(index, &snippet, &result, took)?).await?;
        out.flush().await?;
    }
}

/// The VM goes back to the pool, which makes a fresh one in its place: nothing of a snippet reaches another.
async fn run_one(pool: &Pool, snippet: &str, timeout: Duration) -> Result<ExecOutcome, Failure> {
    let vm = pool.acquire().await.map_err(Failure::NoVm)?;
    vm.exec_builder().argv(["sh", "-c", snippet]).timeout(timeout).output().await.map_err(Failure::Exec)
}

/// A line that says how it ended, and what it printed.
fn report(index: usize, snippet: &str, result: &Result<ExecOutcome, Failure>, took: Duration) -> io::Result<Vec<u8>> {
    let end = match result {
        Ok(outcome) if outcome.timed_out => "not done in time".to_owned(),
        Ok(outcome) => outcome.status.to_string(),
        Err(Failure::NoVm(error)) => format!("no VM: {error}"),
        Err(Failure::Exec(error)) => error.to_string(),
    };
    let mut text = Vec::new();
    writeln!(text, "[{index}] {snippet}: {end} ({} ms)", took.as_millis())?;
    if let Ok(ExecOutcome { stdout, stderr, .. }) = result {
        for output in [stdout, stderr] {
            text.extend_from_slice(output);
            if output.last().is_some_and(|byte| *byte != b'\n') {
                text.push(b'\n');
            }
        }
    }
    Ok(text)
}

/// The lines of the standard input but empty ones. Read by a thread of its own, since `tokio::io::stdin` would keep the
/// program from ending while nothing comes.
fn read_lines() -> impl Stream<Item = String> {
    let (sender, mut lines) = mpsc::channel(READ_AHEAD);
    std::thread::spawn(move || {
        for line in io::stdin().lock().lines() {
            match line {
                Ok(line) if line.trim().is_empty() => {}
                Ok(line) => {
                    if sender.blocking_send(line).is_err() {
                        // Nobody wants more.
                        return;
                    }
                }
                Err(error) => return eprintln!("the standard input: {error}"),
            }
        }
    });
    futures::stream::poll_fn(move |context| lines.poll_recv(context))
}
