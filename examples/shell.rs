//! An interactive shell in a guest, on the terminal that this program runs on.
//!
//! ```sh
//! cargo run --example shell -- IMAGE [COMMAND...]
//! cargo run --example shell -- --socket PATH [COMMAND...]
//! ```
//! COMMAND is `sh` by default; its exit code becomes ours. Without a terminal as standard input the command gets three
//! pipes instead of one. An image that starts with `/` is an OCI layout folder or an archive, anything else is pulled from its registry.
#![allow(clippy::print_stderr, reason = "an example talks to its terminal")]

use std::error::Error;
use std::io;
use std::io::IsTerminal;
use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitCode;
use std::process::ExitStatus;
use std::thread;

use futures::StreamExt;
use kiln::ExecBuilder;
use kiln::ExecEvent;
use kiln::ExecEvents;
use kiln::ExecStdin;
use kiln::Image;
use kiln::VmConfig;
use rustix::termios::OptionalActions;
use rustix::termios::Termios;
use rustix::termios::tcgetattr;
use rustix::termios::tcgetwinsize;
use rustix::termios::tcsetattr;
use tokio::io::AsyncWrite;
use tokio::io::AsyncWriteExt;
use tokio::runtime::Handle;
use tokio::runtime::Runtime;
use tokio::signal::unix::Signal;
use tokio::signal::unix::SignalKind;
use tokio::signal::unix::signal;

const USAGE: &str = "usage: shell (IMAGE | --socket PATH) [COMMAND...]";

fn main() -> ExitCode {
    let result = Runtime::new().map_err(Into::into).and_then(|runtime| {
        let result = runtime.block_on(run(std::env::args().skip(1)));
        // Dropping the runtime would wait for a write to a terminal that the user has stopped with ^S.
        runtime.shutdown_background();
        result
    });
    // Here the terminal is as it was, so that the message is readable.
    result.unwrap_or_else(|error: Box<dyn Error>| {
        eprintln!("{error}");
        ExitCode::FAILURE
    })
}

async fn run(mut args: impl Iterator<Item = String>) -> Result<ExitCode, Box<dyn Error>> {
    let target = args.next().ok_or(USAGE)?;
    if target == "--socket" {
        let exec = ExecBuilder::new(args.next().ok_or(USAGE)?);
        return shell(exec, args.collect()).await;
    }
    let image = if target.starts_with('/') { Image::from_path(&target).await? } else { Image::pull(&target).await? };
    let vm = image.start(VmConfig::new()).await?;
    let code = shell(vm.exec_builder(), args.collect()).await;
    vm.shutdown().await?;
    code
}

/// Runs the command to its end, or to ours.
async fn shell(exec: ExecBuilder, mut command: Vec<String>) -> Result<ExitCode, Box<dyn Error>> {
    if command.is_empty() {
        command.push("sh".to_owned());
    }
    let mut ending = Ending::listen()?;
    // Before the size is read: a change in between is then a signal that waits for us.
    let resized = signal(SignalKind::window_change())?;
    let mut exec = exec.argv(command);
    let on_terminal = io::stdin().is_terminal();
    if on_terminal {
        let (cols, rows) = window_size()?;
        exec = exec.tty(true).winsize(cols, rows).env("TERM", std::env::var("TERM").unwrap_or("dumb".to_owned()));
    }
    let mut child = exec.spawn().await?;
    let stdin = child.stdin.take().ok_or("no standard input")?;
    // Held until this function returns, with a value or an error, unwinds, or is dropped.
    let _raw = on_terminal.then(RawMode::enter).transpose()?;
    feed(stdin);
    tokio::select! {
        code = converse(child.events(), resized) => code,
        // Also while the terminal takes no output. Drops the events, which ends the command.
        number = ending.wait() => Ok(code_of(ExitStatus::from_raw(number.as_raw_value()))),
    }
}

/// Hands our standard input on, on a thread of its own.
///
/// Reading a terminal blocks and cannot be cancelled. tokio's own standard input does it on a thread that the runtime
/// waits for when it is dropped: the program would end with the next key and not with the shell. Nobody waits for this
/// thread; it ends with the program.
fn feed(mut stdin: ExecStdin) {
    let runtime = Handle::current();
    thread::spawn(move || {
        let mut buffer = [0; 4096];
        // The end of our input drops the handle, which is the end of the command's.
        while let Ok(length @ 1..) = io::stdin().read(&mut buffer) {
            if runtime.block_on(stdin.write_all(&buffer[..length])).is_err() {
                return;
            }
        }
    });
}

/// Shows what the command prints until it ends, and tells it the size of our terminal when that changes.
async fn converse(mut events: ExecEvents, mut resized: Signal) -> Result<ExitCode, Box<dyn Error>> {
    let signaller = events.signaller();
    let (mut stdout, mut stderr) = (tokio::io::stdout(), tokio::io::stderr());
    loop {
        tokio::select! {
            event = events.next() => match event.ok_or("the session ended without an exit")?? {
                ExecEvent::Stdout(bytes) => show(&mut stdout, &bytes).await?,
                ExecEvent::Stderr(bytes) => show(&mut stderr, &bytes).await?,
                ExecEvent::Exit(exit) => return Ok(code_of(exit.status)),
                _ => {}
            },
            _ = resized.recv() => {
                if let Ok((cols, rows)) = window_size() {
                    // Fails when the command has just ended, which the next event says.
                    let _ = signaller.resize(cols, rows).await;
                }
            }
        }
    }
}

async fn show(output: &mut (impl AsyncWrite + Unpin), bytes: &[u8]) -> io::Result<()> {
    output.write_all(bytes).await?;
    output.flush().await
}

/// The command's code; as in a shell, 128 and the number of the signal that ended it.
fn code_of(status: ExitStatus) -> ExitCode {
    let code = status.code().or_else(|| status.signal().map(|number| 128 + number));
    code.and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, ExitCode::from)
}

/// Columns and rows of our terminal.
fn window_size() -> io::Result<(u16, u16)> {
    let size = tcgetwinsize(rustix::stdio::stdin())?;
    Ok((size.ws_col, size.ws_row))
}

/// The signals that ask this program to end, which must not end it before the terminal is restored.
struct Ending {
    hangup: Signal,
    interrupt: Signal,
    terminate: Signal,
}

impl Ending {
    fn listen() -> io::Result<Self> {
        Ok(Self {
            hangup: signal(SignalKind::hangup())?,
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
        })
    }

    /// Waits for one of them. ^C is none while the terminal is raw: the command gets it as a byte.
    async fn wait(&mut self) -> SignalKind {
        tokio::select! {
            _ = self.hangup.recv() => SignalKind::hangup(),
            _ = self.interrupt.recv() => SignalKind::interrupt(),
            _ = self.terminate.recv() => SignalKind::terminate(),
        }
    }
}

/// Our terminal in raw mode: every key goes to the guest, whose own terminal echoes it and makes signals of it.
///
/// Dropping it restores the terminal; a panic unwinds through it as well.
struct RawMode {
    saved: Termios,
}

impl RawMode {
    fn enter() -> io::Result<Self> {
        let saved = tcgetattr(rustix::stdio::stdin())?;
        let mut raw = saved.clone();
        raw.make_raw();
        tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, &raw)?;
        Ok(Self { saved })
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // `Now`: to drain it first would wait for ever on a terminal that is stopped. It fails when the terminal is gone.
        let _ = tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, &self.saved);
    }
}
