//! One run of the host program, with the suite at the other end of its socket.

use std::cell::Cell;
use std::io;
use std::io::ErrorKind;
use std::io::Read;
use std::io::Write;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::ChildStdin;
use std::process::ExitStatus;
use std::process::Stdio;
use std::sync::mpsc;
use std::sync::mpsc::Receiver;
use std::thread;
use std::time::Instant;

use anyhow::Context;
use anyhow::Result;
use bytes::Bytes;
use kiln_wire::PROTOCOL;
use kiln_wire::control::Control;
use kiln_wire::control::ControlAck;
use kiln_wire::exit::Exit;
use kiln_wire::frame::Frame;
use kiln_wire::frame::Kind;
use kiln_wire::request::Request;
use tempfile::TempDir;

use crate::case::Finding;
use crate::case::Offers;
use crate::case::ensure;
use crate::case::quoted;
use crate::case::same;
use crate::program::CommandLine;
use crate::program::GLANCE;
use crate::program::Running;
use crate::session::PATIENCE;
use crate::session::Session;
use crate::session::describe;

/// What a host program ends with when the session failed.
pub(super) const SESSION_FAILED: i32 = 125;

/// Bytes read from an output at once, and how many such pieces may wait.
const PIECE: usize = 64 << 10;
const PIECES: usize = 4;

/// A host program.
#[derive(Debug)]
pub struct Subject {
    command: CommandLine,
    home: TempDir,
    /// Counts the sockets, one a run.
    runs: Cell<u32>,
}

impl Subject {
    pub(super) fn new(command: CommandLine) -> Result<Self> {
        let home = tempfile::tempdir().context("cannot make a temporary folder")?;
        Ok(Self { command, home, runs: Cell::new(0) })
    }

    /// A path for a socket that nobody listens on yet.
    pub(super) fn socket(&self) -> PathBuf {
        self.runs.set(self.runs.get() + 1);
        self.home.path().join(format!("{}.sock", self.runs.get()))
    }

    /// Runs the program on `argv`, with a socket that nobody listens on.
    pub(super) fn alone(&self, argv: &[&str]) -> Result<Host, Finding> {
        Host::start(&self.command, self.socket(), argv)
    }

    /// Runs the program up to its REQUEST, with an agent that announces no features.
    pub(super) fn requested(&self, argv: &[&str]) -> Result<(Host, Session, Request), Finding> {
        self.requested_of(&[], argv)
    }

    /// Runs the program up to its REQUEST, with an agent that announces `features`. A host may ask for them first, on connections of their
    /// own.
    pub(super) fn requested_of(&self, features: &[&str], argv: &[&str]) -> Result<(Host, Session, Request), Finding> {
        let socket = self.socket();
        let listener = UnixListener::bind(&socket)?;
        listener.set_nonblocking(true)?;
        let mut host = Host::start(&self.command, socket, argv)?;
        loop {
            let mut session = host.connection(&listener)?;
            match session.next()? {
                Some(Frame { kind: Kind::Request, payload }) => {
                    return Ok((host, session, serde_json::from_slice(&payload)?));
                }
                Some(Frame { kind: Kind::Control, payload }) => {
                    let asked: Control = serde_json::from_slice(&payload)?;
                    ensure(asked == Control::Probe, || format!("{asked:?} in place of REQUEST or a probe"))?;
                    let features = features.iter().map(|feature| (*feature).to_owned()).collect();
                    let ack = ControlAck { protocol: Some(PROTOCOL), features, ..ControlAck::done() };
                    session.send(Kind::Control, serde_json::to_vec(&ack)?)?;
                }
                other => return Err(Finding::new(format!("{} in place of REQUEST", describe(other.as_ref())))),
            }
        }
    }

    /// Runs the program against an agent that says `frames` after the REQUEST.
    pub(super) fn told(&self, frames: &[Frame]) -> Result<Outcome, Finding> {
        self.told_bytes(&crate::session::encoded(frames)?)
    }

    pub(super) fn told_bytes(&self, bytes: &[u8]) -> Result<Outcome, Finding> {
        let (host, session, _) = self.requested(&["program"])?;
        host.outcome_of(session, bytes.to_vec())
    }
}

impl Offers for Subject {
    fn lacks(&self, _: &str) -> Option<String> {
        None
    }
}

pub(super) fn frame(kind: Kind, payload: impl Into<Bytes>) -> Frame {
    Frame::new(kind, payload)
}

pub(super) fn exit(code: u32) -> Frame {
    Frame::new(Kind::Exit, Exit { code, peak_rss_kib: None }.encode())
}

/// What one of the program's outputs gives, read by a thread so that there is a deadline. Nobody reads far ahead of the case:
/// an output that it leaves alone fills up.
#[derive(Debug)]
pub(super) struct Output {
    pieces: Receiver<io::Result<Vec<u8>>>,
    heard: Vec<u8>,
}

impl Output {
    fn of(mut pipe: impl Read + Send + 'static) -> Self {
        let (sender, pieces) = mpsc::sync_channel(PIECES);
        thread::spawn(move || {
            let mut buffer = vec![0; PIECE];
            loop {
                let read = pipe.read(&mut buffer).map(|read| buffer.get(..read).unwrap_or_default().to_vec());
                let last = !matches!(&read, Ok(bytes) if !bytes.is_empty());
                // It is not received when the case has its finding already.
                if sender.send(read).is_err() || last {
                    return;
                }
            }
        });
        Self { pieces, heard: Vec::new() }
    }

    /// Waits for the next piece: false at the end.
    fn piece(&mut self) -> Result<bool, Finding> {
        let piece = self.pieces.recv_timeout(PATIENCE);
        let piece = piece.map_err(|_| Finding::new(format!("neither output nor its end within {PATIENCE:?}")))??;
        self.heard.extend_from_slice(&piece);
        Ok(!piece.is_empty())
    }

    /// A finding unless `expected` is the first that comes.
    pub(super) fn hear(&mut self, expected: &[u8]) -> Result<(), Finding> {
        while self.heard.len() < expected.len() && self.piece()? {}
        same("the output so far", &self.heard, expected)
    }

    fn all(mut self) -> Result<Vec<u8>, Finding> {
        while self.piece()? {}
        Ok(self.heard)
    }
}

/// A running host program.
#[derive(Debug)]
pub(super) struct Host {
    pub(super) process: Running,
    /// Open until it is taken, so that the program sees no end-of-file before.
    pub(super) stdin: Option<ChildStdin>,
    pub(super) stdout: Output,
    stderr: Output,
}

impl Host {
    fn start(command: &CommandLine, socket: PathBuf, argv: &[&str]) -> Result<Self, Finding> {
        let mut command = command.command(&socket);
        command.arg("--").args(argv).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let spawned = command.spawn();
        let mut child = spawned.map_err(|error| Finding::new(format!("cannot start {command:?}: {error}")))?;
        let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let process = Running(child);
        let none = || Finding::new("no pipe");
        let (stdout, stderr) = (Output::of(stdout.ok_or_else(none)?), Output::of(stderr.ok_or_else(none)?));
        Ok(Self { process, stdin, stdout, stderr })
    }

    /// Waits for the program's next connection.
    fn connection(&mut self, listener: &UnixListener) -> Result<Session, Finding> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match listener.accept() {
                Ok((stream, _)) => return Ok(Session::new(stream)?),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.into()),
            }
            ensure(Instant::now() < deadline, || format!("no connection within {PATIENCE:?}"))?;
            if let Some(status) = self.process.wait_until(Instant::now() + GLANCE)? {
                while self.stderr.piece()? {}
                let stderr = quoted(&self.stderr.heard);
                return Err(Finding::new(format!("{status} without a connection, stderr {stderr}")));
            }
        }
    }

    /// Feeds the program `bytes` and end-of-file, beside whatever else happens.
    pub(super) fn feed(&mut self, bytes: Vec<u8>) {
        if let Some(mut stdin) = self.stdin.take() {
            // A program that ends early closes the pipe, which is its right.
            thread::spawn(move || drop(stdin.write_all(&bytes)));
        }
    }

    /// Waits for the program to end by itself, while an agent says `bytes`: neither waits for the other.
    pub(super) fn outcome_of(self, session: Session, bytes: Vec<u8>) -> Result<Outcome, Finding> {
        let speaker = thread::spawn(move || say(session, &bytes));
        let outcome = self.outcome();
        // Its writes have deadlines, so it comes to an end. A host that ended before it had heard everything shows in the outcome.
        let _session = speaker.join().map_err(|_| Finding::new("the suite's own thread failed"))?;
        outcome
    }

    /// Waits for the program to end by itself.
    pub(super) fn outcome(mut self) -> Result<Outcome, Finding> {
        let (stdout, stderr) = (self.stdout.all()?, self.stderr.all()?);
        let ended = self.process.wait_until(Instant::now() + PATIENCE)?;
        let status = ended.ok_or_else(|| Finding::new(format!("the program still runs after {PATIENCE:?}")))?;
        Ok(Outcome { status, stdout, stderr })
    }
}

/// Says `bytes` and closes the agent's direction only, so that what the host still sends finds a reader.
fn say(mut session: Session, bytes: &[u8]) -> Result<Session, Finding> {
    session.send_bytes(bytes)?;
    session.half_close()?;
    Ok(session)
}

/// How a run of the program ended.
#[derive(Debug)]
pub(super) struct Outcome {
    status: ExitStatus,
    pub(super) stdout: Vec<u8>,
    pub(super) stderr: Vec<u8>,
}

impl Outcome {
    /// A finding unless the program ended with `code`.
    pub(super) fn ends(&self, code: i32) -> Result<(), Finding> {
        ensure(self.status.code() == Some(code), || {
            format!("{}, expected {code} (stderr {})", self.status, quoted(&self.stderr))
        })
    }

    /// A finding unless the program ended with 0 after printing `stdout`.
    pub(super) fn prints(&self, stdout: impl AsRef<[u8]>) -> Result<(), Finding> {
        self.ends(0)?;
        same("stdout", &self.stdout, stdout)
    }

    /// A finding unless the program says that the session failed, and something about it.
    pub(super) fn fails(&self) -> Result<(), Finding> {
        self.ends(SESSION_FAILED)?;
        ensure(!self.stderr.is_empty(), || "failed without a word".to_owned())
    }

    pub(super) fn fails_saying(&self, words: &str) -> Result<(), Finding> {
        self.fails()?;
        let said = String::from_utf8_lossy(&self.stderr);
        ensure(said.contains(words), || format!("said {said:?}, which lacks {words:?}"))
    }
}
