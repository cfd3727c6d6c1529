//! An agent on a Unix socket, spoken to frame by frame.
#![allow(dead_code, reason = "each test file uses its part")]

use std::fs;
use std::io;
use std::io::Read;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;
use std::time::Instant;

use bytes::BytesMut;
use kiln_wire::control::ControlAck;
use kiln_wire::exit::Exit;
use kiln_wire::failure::Failure;
use kiln_wire::frame::Frame;
use kiln_wire::frame::FrameParser;
use kiln_wire::frame::Kind;
use kiln_wire::frame::header;
use rustix::process::Signal;

#[path = "../support/mod.rs"]
pub(crate) mod support;

pub(crate) use support::PATIENCE;

pub(crate) struct Agent(pub(crate) support::Agent);

impl Agent {
    pub(crate) fn start() -> Self {
        let agent = Self(support::Agent::launch());
        until("the agent listens", || UnixStream::connect(agent.0.socket()).is_ok());
        agent
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.folder().join(name)
    }

    /// The same as JSON text.
    pub(crate) fn json(&self, name: &str) -> String {
        serde_json::to_string(&self.path(name)).expect("text")
    }

    pub(crate) fn pid(&self) -> u32 {
        self.0.process.id()
    }

    /// What lies in the agent's folder, beside its socket.
    pub(crate) fn files(&self) -> Vec<String> {
        names(self.0.folder()).into_iter().filter(|name| name != "exec.sock").collect()
    }

    pub(crate) fn dial(&self) -> Connection {
        let stream = UnixStream::connect(self.0.socket()).expect("connects");
        stream.set_read_timeout(Some(PATIENCE)).expect("valid");
        stream.set_write_timeout(Some(PATIENCE)).expect("valid");
        Connection { stream, parser: FrameParser::whole(), received: BytesMut::new() }
    }

    /// A connection with a CONTROL frame sent.
    pub(crate) fn control(&self, json: &str) -> Connection {
        let mut connection = self.dial();
        connection.send(Kind::Control, json.as_bytes());
        connection
    }

    /// An action that has one answer and no stream.
    pub(crate) fn ask(&self, json: &str) -> ControlAck {
        let mut connection = self.control(json);
        let ack = connection.ack();
        assert_eq!(connection.next(), None, "nothing follows an answer");
        ack
    }

    /// A stream that the agent opens.
    pub(crate) fn stream(&self, json: &str) -> Connection {
        let mut connection = self.control(json);
        let ack = connection.ack();
        assert!(ack.ok, "{ack:?}");
        connection
    }

    /// A stream or action that the agent refuses with this number.
    pub(crate) fn refused(&self, json: &str, errno: Option<i32>) -> String {
        let ack = self.ask(json);
        assert!(!ack.ok, "{ack:?}");
        assert_eq!(ack.errno, errno, "{ack:?}");
        ack.error.expect("a text")
    }

    /// For what the tests share that is async.
    pub(crate) fn block_on<T>(&self, work: impl Future<Output = T>) -> T {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(work)
    }

    pub(crate) fn request(&self, json: &str) -> Connection {
        let mut connection = self.dial();
        connection.send(Kind::Request, json.as_bytes());
        connection
    }

    /// Ends the agent as its host does, and waits for that.
    pub(crate) fn stop(mut self) -> tempfile::TempDir {
        self.0.signal(Signal::TERM);
        assert!(self.0.process.wait().expect("our child").success());
        std::mem::replace(&mut self.0.folder, tempfile::tempdir().expect("temporary folder"))
    }
}

pub(crate) struct Connection {
    pub(crate) stream: UnixStream,
    parser: FrameParser,
    received: BytesMut,
}

impl Connection {
    pub(crate) fn send(&mut self, kind: Kind, payload: &[u8]) {
        self.try_send(kind, payload).expect("the agent reads");
    }

    pub(crate) fn try_send(&mut self, kind: Kind, payload: &[u8]) -> io::Result<()> {
        self.stream.write_all(&header(kind, payload.len())?)?;
        self.stream.write_all(payload)
    }

    pub(crate) fn end_of_file(&mut self) {
        self.send(Kind::Stdin, b"");
    }

    /// The next frame, as sent; `None` when the agent has closed.
    pub(crate) fn next(&mut self) -> Option<Frame> {
        let mut piece = vec![0; 64 << 10];
        loop {
            if let Some(frame) = self.parser.parse(&mut self.received).expect("well-formed") {
                return Some(frame);
            }
            match self.stream.read(&mut piece) {
                Ok(0) => {
                    self.parser.finish(&self.received).expect("whole frames");
                    return None;
                }
                Ok(count) => self.received.extend_from_slice(&piece[..count]),
                Err(error) => panic!("no frame: {error}"),
            }
        }
    }

    pub(crate) fn ack(&mut self) -> ControlAck {
        let frame = self.next().expect("an answer");
        assert_eq!(frame.kind, Kind::Control, "{frame:?}");
        serde_json::from_slice(&frame.payload).expect("an answer")
    }

    /// The bytes of all STDOUT frames until the last frame, and that one.
    pub(crate) fn drain(&mut self) -> (Vec<u8>, Frame) {
        let mut output = Vec::new();
        loop {
            let frame = self.next().expect("EXIT or ERROR comes before the end");
            match frame.kind {
                Kind::Stdout => output.extend_from_slice(&frame.payload),
                Kind::Exit | Kind::Error => {
                    assert_eq!(self.next(), None, "nothing follows the last frame");
                    return (output, frame);
                }
                other => panic!("{other:?}"),
            }
        }
    }

    /// The bytes of all STDOUT frames of a stream that ends well.
    pub(crate) fn output(&mut self) -> Vec<u8> {
        let (output, last) = self.drain();
        assert_eq!(last.kind, Kind::Exit, "{:?}", Failure::decode(&last.payload));
        assert_eq!(Exit::decode(&last.payload).expect("valid").code, 0);
        output
    }

    /// Why a stream ended badly.
    pub(crate) fn failure(&mut self) -> Failure {
        let (_, last) = self.drain();
        assert_eq!(last.kind, Kind::Error, "{last:?}");
        Failure::decode(&last.payload)
    }
}

/// Waits for `condition`, for as long as [`PATIENCE`].
pub(crate) fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

pub(crate) fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).expect("readable");
    let mut names: Vec<_> = entries.map(|e| e.expect("entry").file_name().to_string_lossy().into_owned()).collect();
    names.sort_unstable();
    names
}

/// The processes whose parent is `parent`, zombies included.
pub(crate) fn children(parent: u32) -> Vec<u32> {
    let stat = |pid: u32| fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let parent_of = |stat: &str| stat.rsplit(')').next()?.split_whitespace().nth(1)?.parse::<u32>().ok();
    let pids = fs::read_dir("/proc").expect("mounted").flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_string_lossy().parse().ok());
    pids.filter(|pid| parent_of(&stat(*pid)) == Some(parent)).collect()
}

/// A file system of a few megabytes in a folder, as root; gone with this value.
pub(crate) struct SmallDisk {
    path: PathBuf,
}

impl SmallDisk {
    pub(crate) fn new(path: PathBuf, kib: u32) -> Self {
        fs::create_dir(&path).expect("made");
        let options = format!("size={kib}k");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(&path).status();
        assert!(mounted.expect("mount runs").success(), "the tests run as root");
        Self { path }
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.path).status();
    }
}

/// Bytes in which a piece that is lost, doubled or moved shows.
pub(crate) fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at ^ (at >> 8) ^ (at >> 16)) as u8).collect()
}
