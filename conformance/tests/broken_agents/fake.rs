//! A small agent of threads, sound or with one fault: no terminal, no user, no files, and the workload only where it is asked for.

#[path = "workload.rs"]
mod workload;

use std::collections::BTreeMap;
use std::io;
use std::io::Read;
use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixListener;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::os::unix::process::ExitStatusExt;
use std::process::Child;
use std::process::ChildStdin;
use std::process::Command;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::Mutex;
use std::thread;

use bytes::Bytes;
use bytes::BytesMut;
use kiln_conformance::agent::Target;
use kiln_wire::control::Control;
use kiln_wire::control::ControlAck;
use kiln_wire::exit::Exit;
use kiln_wire::failure::Failure;
use kiln_wire::frame::Frame;
use kiln_wire::frame::FrameParser;
use kiln_wire::frame::Kind;
use kiln_wire::request::Request;
use tempfile::TempDir;
use workload::Following;
use workload::Workload;

/// What is wrong with a fake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    None,
    ExitBeforeOutput,
    ForgetsStderr,
    MergesStderr,
    IgnoresOversize,
    NeverKills,
    SignalsLeaderOnly,
    EndsAtUnknown,
    IgnoresEndOfFile,
    BareSignal,
    LongExit,
    NeverCloses,
    OtherProtocol,
    PromisesStreams,
    PromisesWorkload,
    /// None: no `renew` of the case for it makes sense, and it does none.
    RefusesRenewal,
    /// Does what it is told by `renew`, whatever that is.
    RenewsAnything,
    /// None: it serves the workload as it should.
    Workload,
    StartsTwice,
    MixesRunsUp,
    ForgetsLost,
    HoldsWorkloadUp,
    WorkloadDiesWithHost,
    WorkloadSignalsLeaderOnly,
}

impl Fault {
    /// Whether the workload is served, soundly or not.
    fn has_workload(self) -> bool {
        matches!(
            self,
            Self::Workload
                | Self::StartsTwice
                | Self::MixesRunsUp
                | Self::ForgetsLost
                | Self::HoldsWorkloadUp
                | Self::WorkloadDiesWithHost
                | Self::WorkloadSignalsLeaderOnly
        )
    }
}

/// A listening fake. Its thread ends with the test program, which the suite never outlives.
pub(crate) struct Fake(TempDir);

impl Fake {
    pub(crate) fn start(fault: Fault) -> Self {
        let folder = tempfile::tempdir().expect("temporary folder");
        let listener = UnixListener::bind(folder.path().join("fake.sock")).expect("binds");
        let workload = Workload::default();
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                // A session that breaks down is what the suite provokes; it sees the closed connection.
                let workload = workload.clone();
                thread::spawn(move || drop(Connection { stream, fault, workload }.serve()));
            }
        });
        Self(folder)
    }

    pub(crate) fn target(&self) -> Target {
        Target::Socket(self.0.path().join("fake.sock"))
    }
}

struct Connection {
    stream: UnixStream,
    fault: Fault,
    workload: Workload,
}

/// The agent's end of the stream, shared by the threads of the outputs.
type Sender = Arc<Mutex<UnixStream>>;

fn send(sender: &Sender, kind: Kind, payload: impl Into<Bytes>) -> io::Result<()> {
    let mut bytes = BytesMut::new();
    Frame::new(kind, payload).encode(&mut bytes)?;
    sender.lock().expect("no thread panics").write_all(&bytes)
}

impl Connection {
    fn serve(self) -> io::Result<()> {
        let sender: Sender = Arc::new(Mutex::new(self.stream.try_clone()?));
        let mut frames = Frames::new(self.stream.try_clone()?);
        match frames.next()? {
            Some(Frame { kind: Kind::Control, payload }) => {
                let (ack, following) = self.control(&payload);
                send(&sender, Kind::Control, serde_json::to_vec(&ack)?)?;
                if let Some(following) = following {
                    if self.fault == Fault::WorkloadDiesWithHost {
                        let group = following.group();
                        thread::spawn(move || {
                            while let Ok(Some(_)) = frames.next() {}
                            kill("KILL", &format!("-{group}"));
                        });
                    }
                    following.send(&sender)?;
                }
            }
            Some(Frame { kind: Kind::Request, payload }) => match start(&serde_json::from_slice(&payload)?) {
                Ok(child) => self.run(child, &sender, frames)?,
                Err(error) => {
                    let failure = Failure::NotFound(error.to_string());
                    send(&sender, Kind::Error, failure.to_string().into_bytes())?;
                }
            },
            _ => {}
        }
        if self.fault == Fault::NeverCloses {
            loop {
                thread::park();
            }
        }
        self.stream.shutdown(Shutdown::Both)
    }

    fn control(&self, payload: &[u8]) -> (ControlAck, Option<Following>) {
        let promised = match self.fault {
            Fault::PromisesStreams => vec!["streams".to_owned()],
            Fault::PromisesWorkload => vec!["workload".to_owned()],
            Fault::RefusesRenewal | Fault::RenewsAnything => vec!["renew".to_owned()],
            fault if fault.has_workload() => vec!["workload".to_owned()],
            _ => Vec::new(),
        };
        let protocol = if self.fault == Fault::OtherProtocol { 4 } else { 5 };
        let ack = match serde_json::from_slice(payload) {
            Ok(Control::Probe) => ControlAck { protocol: Some(protocol), features: promised, ..ControlAck::done() },
            Ok(Control::Renew { .. }) if self.fault == Fault::RenewsAnything => ControlAck::done(),
            Ok(Control::Renew { .. }) if self.fault == Fault::RefusesRenewal => {
                ControlAck { errno: Some(22), ..ControlAck::refused("no sense") }
            }
            Ok(action) => match self.fault.has_workload().then(|| self.workload.act(&action, self.fault)).flatten() {
                Some(done) => return done,
                None => ControlAck::refused("unknown CONTROL action"),
            },
            Err(error) => ControlAck::refused(error.to_string()),
        };
        (ack, None)
    }

    fn run(&self, mut child: Child, sender: &Sender, frames: Frames) -> io::Result<()> {
        let fault = self.fault;
        let group = child.id();
        let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let stream = self.stream.try_clone()?;
        thread::spawn(move || {
            listen(frames, stdin, group, fault);
            // Gone or a rule breaker: it is told nothing more. Fails when it is gone altogether.
            let _ = stream.shutdown(Shutdown::Both);
            if fault != Fault::NeverKills {
                kill("KILL", &format!("-{group}"));
            }
        });
        let stderr_kind = if fault == Fault::MergesStderr { Kind::Stdout } else { Kind::Stderr };
        let forward = |pipe: Box<dyn Read + Send>, kind, keep| {
            let sender = Arc::clone(sender);
            thread::spawn(move || forward(pipe, &sender, kind, keep))
        };
        let outputs = [
            stdout.map(|pipe| forward(Box::new(pipe), Kind::Stdout, fault == Fault::ExitBeforeOutput)),
            stderr.map(|pipe| forward(Box::new(pipe), stderr_kind, fault == Fault::ForgetsStderr)),
        ];
        // Outputs that daemons hold are waited for; the fake does not care.
        let held: Vec<_> = outputs.into_iter().flatten().filter_map(|output| output.join().ok()).collect();
        let status = child.wait()?;
        let signal = status.signal().map(|signal| if fault == Fault::BareSignal { signal } else { 128 + signal });
        let code = u32::try_from(status.code().or(signal).unwrap_or_default()).unwrap_or_default();
        let exit = Exit { code, peak_rss_kib: None }.encode();
        let exit = if fault == Fault::LongExit && code != 0 { [&exit[..], b"long"].concat().into() } else { exit };
        send(sender, Kind::Exit, exit)?;
        for late in held {
            let late = late?;
            if !late.is_empty() {
                send(sender, Kind::Stdout, late)?;
            }
        }
        Ok(())
    }
}

fn start(request: &Request) -> io::Result<Child> {
    let env: &BTreeMap<_, _> = &request.env;
    let (program, arguments) = request.argv.split_first().ok_or(io::ErrorKind::InvalidInput)?;
    let mut command = Command::new(program);
    command.args(arguments).envs(env).process_group(0);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    if let Some(cwd) = &request.cwd {
        command.current_dir(cwd);
    }
    command.spawn()
}

/// Sends what comes out of `pipe`, or keeps it.
fn forward(mut pipe: Box<dyn Read + Send>, sender: &Sender, kind: Kind, keep: bool) -> io::Result<Vec<u8>> {
    let (mut buffer, mut kept) = (vec![0; 16 << 10], Vec::new());
    loop {
        let read = pipe.read(&mut buffer)?;
        match &buffer[..read] {
            [] => return Ok(kept),
            bytes if keep => kept.extend_from_slice(bytes),
            bytes => send(sender, kind, bytes.to_vec())?,
        }
    }
}

/// Serves the host's frames until it goes away or breaks the rules.
fn listen(mut frames: Frames, mut stdin: Option<ChildStdin>, group: u32, fault: Fault) {
    loop {
        match frames.next() {
            Ok(Some(Frame { kind: Kind::Stdin, payload })) if payload.is_empty() => {
                if fault != Fault::IgnoresEndOfFile {
                    stdin = None;
                }
            }
            Ok(Some(Frame { kind: Kind::Stdin, payload })) => {
                if stdin.as_mut().is_some_and(|stdin| stdin.write_all(&payload).is_err()) {
                    stdin = None;
                }
            }
            Ok(Some(Frame { kind: Kind::Signal, payload })) => {
                let whom = if fault == Fault::SignalsLeaderOnly { group.to_string() } else { format!("-{group}") };
                kill(&payload.first().copied().unwrap_or_default().to_string(), &whom);
            }
            Ok(Some(Frame { kind: Kind::Unknown(_), .. })) if fault == Fault::EndsAtUnknown => return,
            Ok(Some(_)) => {}
            Err(error) if error.kind() == io::ErrorKind::InvalidData && fault == Fault::IgnoresOversize => {
                // As an agent would that goes on to wait for the payload.
                let _ = io::copy(&mut frames.stream, &mut io::sink());
                return;
            }
            Ok(None) | Err(_) => return,
        }
    }
}

/// With the shell's own `kill`, since the crate has no system calls; whoever is gone already is no matter.
fn kill(signal: &str, whom: &str) {
    let script = format!("kill -s {signal} -- {whom}");
    let _ = Command::new("sh").args(["-c", &script]).stderr(Stdio::null()).status();
}

struct Frames {
    stream: UnixStream,
    parser: FrameParser,
    inbox: BytesMut,
}

impl Frames {
    fn new(stream: UnixStream) -> Self {
        Self { stream, parser: FrameParser::whole(), inbox: BytesMut::new() }
    }

    fn next(&mut self) -> io::Result<Option<Frame>> {
        let mut buffer = [0; 4096];
        loop {
            if let Some(frame) = self.parser.parse(&mut self.inbox)? {
                return Ok(Some(frame));
            }
            match self.stream.read(&mut buffer)? {
                0 => return Ok(None),
                read => self.inbox.extend_from_slice(&buffer[..read]),
            }
        }
    }
}
