//! The agent under test, and the suite's folder beside it.

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::path::PathBuf;
use std::process::Stdio;
use std::thread;
use std::time::Instant;
use std::time::SystemTime;
use std::time::UNIX_EPOCH;

use anyhow::Context;
use anyhow::Result;
use anyhow::anyhow;
use anyhow::bail;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use kiln_wire::control::Control;
use kiln_wire::control::ControlAck;
use kiln_wire::frame::Frame;
use kiln_wire::frame::Kind;
use kiln_wire::request::Request;
use kiln_wire::request::StageFile;
use tempfile::TempDir;

use crate::case::Finding;
use crate::case::Offers;
use crate::case::ensure;
use crate::program::CommandLine;
use crate::program::GLANCE;
use crate::program::Running;
use crate::session::PATIENCE;
use crate::session::Session;
use crate::session::Transcript;
use crate::session::describe;

/// What a case may require beside the features that the agent announces: the actions `write_file_chunk` and `read_file_chunk`, which no
/// feature announces.
pub(super) const CHUNKS: &str = "chunks";
/// Processes run as root, so that they can change users.
pub(super) const ROOT: &str = "root";
/// The agent shares the suite's machine, so that the suite can listen where `connect` connects to.
pub(super) const HERE: &str = "here";
/// The agent has a machine of its own, whose clock and caches the suite may touch.
pub(super) const ELSEWHERE: &str = "elsewhere";

/// Where the agent is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// Listening already.
    Socket(PathBuf),
    /// To be started, in a temporary folder, and ended afterwards.
    Command(CommandLine),
}

/// An agent that answers, and a folder made by one of its processes.
#[derive(Debug)]
pub struct Subject {
    socket: PathBuf,
    folder: String,
    offers: BTreeSet<String>,
    /// Ends with the subject, before the folder that holds its socket.
    _process: Option<Running>,
    _home: Option<TempDir>,
}

impl Subject {
    pub(super) fn prepare(target: &Target) -> Result<Self> {
        let (socket, process, home) = match target {
            Target::Socket(path) => (path.clone(), None, None),
            Target::Command(line) => {
                let home = tempfile::tempdir().context("cannot make a temporary folder")?;
                let socket = home.path().join("agent.sock");
                let mut command = line.command(&socket);
                let child = command.current_dir(home.path()).stdin(Stdio::null()).spawn();
                let mut process = Running(child.with_context(|| format!("cannot start {command:?}"))?);
                wait_until_it_listens(&socket, &mut process)?;
                (socket, Some(process), Some(home))
            }
        };
        let unique = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
        let folder = format!("/tmp/kiln-conformance-{}-{unique}", std::process::id());
        let mut subject = Self { socket, folder, offers: BTreeSet::new(), _process: process, _home: home };
        subject.explore().map_err(|finding| anyhow!("the agent does not get as far as the first case: {finding}"))?;
        Ok(subject)
    }

    fn explore(&mut self) -> Result<(), Finding> {
        self.offers.extend(self.control(&Control::Probe)?.features);
        self.run(&argv(&["mkdir", &self.folder]))?.exits(0)?;
        if self.sh("id -u")?.stdout() == b"0\n" {
            self.offers.insert(ROOT.to_owned());
        }
        let here = if Path::new(&self.folder).is_dir() { HERE } else { ELSEWHERE };
        self.offers.insert(here.to_owned());
        let chunk = Control::ReadFileChunk { path: self.path("none"), offset: 0, len: 1, max_bytes: None };
        if self.control(&chunk)?.error.as_deref() != Some("unknown CONTROL action") {
            self.offers.insert(CHUNKS.to_owned());
        }
        Ok(())
    }

    pub(super) fn open(&self) -> Result<Session, Finding> {
        let stream = UnixStream::connect(&self.socket);
        let stream = stream.map_err(|error| Finding::new(format!("the agent cannot be reached: {error}")))?;
        Ok(Session::new(stream)?)
    }

    /// A session whose REQUEST is sent.
    pub(super) fn start(&self, request: &Request) -> Result<Session, Finding> {
        let mut session = self.open()?;
        session.send(Kind::Request, serde_json::to_vec(request)?)?;
        Ok(session)
    }

    /// Everything that comes of `request`, without input.
    pub(super) fn run(&self, request: &Request) -> Result<Transcript, Finding> {
        self.run_json(&serde_json::to_string(request)?)
    }

    pub(super) fn run_json(&self, json: &str) -> Result<Transcript, Finding> {
        let mut session = self.open()?;
        let request = Frame::new(Kind::Request, json.as_bytes().to_vec());
        session.send_all(&[request, Frame::new(Kind::Stdin, Vec::new())])?;
        session.rest()
    }

    /// A shell in the suite's folder, which is also `$FOLDER`.
    pub(super) fn shell(&self, script: &str) -> Request {
        let mut request = argv(&["sh", "-c", script]);
        request.env.insert("FOLDER".to_owned(), self.folder.clone());
        request.cwd = Some(self.folder.clone());
        request
    }

    pub(super) fn start_sh(&self, script: &str) -> Result<Session, Finding> {
        self.start(&self.shell(script))
    }

    pub(super) fn sh(&self, script: &str) -> Result<Transcript, Finding> {
        self.run(&self.shell(script))
    }

    /// The path of `name` in the suite's folder.
    pub(super) fn path(&self, name: &str) -> String {
        format!("{}/{name}", self.folder)
    }

    pub(super) fn is_there(&self, name: &str) -> Result<bool, Finding> {
        Ok(self.sh(&format!("test -e {name}"))?.exit()?.code == 0)
    }

    /// Waits until `name` is in the suite's folder.
    pub(super) fn appears(&self, name: &str) -> Result<(), Finding> {
        let deadline = Instant::now() + PATIENCE;
        while !self.is_there(name)? {
            ensure(Instant::now() < deadline, || format!("{name} was not made within {PATIENCE:?}"))?;
            thread::sleep(GLANCE);
        }
        Ok(())
    }

    /// The entries of the folder `name`, hidden ones too.
    pub(super) fn entries(&self, name: &str) -> Result<String, Finding> {
        Ok(String::from_utf8_lossy(&self.sh(&format!("ls -A {name}"))?.stdout()).into_owned())
    }

    /// The permissions of `name` as `ls -l` prints them.
    pub(super) fn permissions(&self, name: &str) -> Result<String, Finding> {
        let line = self.sh(&format!("ls -ld {name}"))?.stdout();
        Ok(String::from_utf8_lossy(&line).chars().take(10).collect())
    }

    pub(super) fn content(&self, name: &str) -> Result<Vec<u8>, Finding> {
        let shown = self.sh(&format!("cat {name}"))?;
        shown.exits(0)?;
        Ok(shown.stdout())
    }

    /// The answer to `action`.
    pub(super) fn control(&self, action: &Control) -> Result<ControlAck, Finding> {
        self.control_json(&serde_json::to_string(action)?)
    }

    pub(super) fn control_json(&self, json: &str) -> Result<ControlAck, Finding> {
        let mut session = self.open()?;
        session.send(Kind::Control, json.as_bytes().to_vec())?;
        answer(&mut session)
    }

    /// The stream that follows `action`, with its answer.
    pub(super) fn stream(&self, action: &Control) -> Result<(Session, ControlAck), Finding> {
        let mut session = self.open()?;
        session.send(Kind::Control, serde_json::to_vec(action)?)?;
        let ack = answer(&mut session)?;
        ensure(ack.ok, || format!("refused: {}", ack.error.clone().unwrap_or_default()))?;
        Ok((session, ack))
    }

    /// A pipe that ends when the last process dies that holds it; a zombie holds nothing.
    pub(super) fn life(&self, name: &str) -> Result<Life, Finding> {
        self.sh(&format!("mkfifo {name}"))?.exits(0)?;
        Ok(Life { watcher: self.start_sh(&format!("cat {name}"))?, name: name.to_owned() })
    }
}

impl Drop for Subject {
    fn drop(&mut self) {
        // An agent that no longer answers keeps the folder; its cases have said so.
        let _ = self.run(&argv(&["rm", "-rf", &self.folder]));
    }
}

impl Offers for Subject {
    fn lacks(&self, what: &str) -> Option<String> {
        let why = match what {
            CHUNKS => "agent does not serve files in chunks".to_owned(),
            ROOT => "processes do not run as root".to_owned(),
            HERE => "agent has a machine of its own".to_owned(),
            ELSEWHERE => "agent shares this machine, whose clock and caches are left alone".to_owned(),
            feature => format!("agent does not announce feature {feature}"),
        };
        (!self.offers.contains(what)).then_some(why)
    }
}

/// Watches for the death of processes.
#[derive(Debug)]
pub(super) struct Life {
    watcher: Session,
    name: String,
}

impl Life {
    /// What the first line of a script says for the shell and all its children to hold the pipe.
    pub(super) fn held(&self) -> String {
        format!("exec 9>{};", self.name)
    }

    /// A finding unless all that held it die.
    pub(super) fn ends(mut self) -> Result<(), Finding> {
        let ended = self.watcher.rest().map_err(|_| Finding::new(format!("still running after {PATIENCE:?}")))?;
        ended.exits(0)
    }
}

/// The one CONTROL frame that comes next.
pub(super) fn answer(session: &mut Session) -> Result<ControlAck, Finding> {
    match session.next()? {
        Some(Frame { kind: Kind::Control, payload }) => Ok(serde_json::from_slice(&payload)?),
        other => Err(Finding::new(format!("{} in place of a CONTROL frame", describe(other.as_ref())))),
    }
}

/// A finding unless the action was done.
pub(super) fn done(ack: &ControlAck) -> Result<(), Finding> {
    ensure(ack.ok, || format!("refused: {}", ack.error.as_deref().unwrap_or("without a word")))
}

/// A finding unless the action was refused, in words.
pub(super) fn refused(ack: &ControlAck, why: &str) -> Result<(), Finding> {
    ensure(!ack.ok, || format!("not refused: {why}"))?;
    ensure(ack.error.as_ref().is_some_and(|text| !text.is_empty()), || "refused without a word".to_owned())
}

pub(super) fn argv(words: &[&str]) -> Request {
    Request { argv: words.iter().map(|&word| word.to_owned()).collect(), ..Request::default() }
}

pub(super) fn staged(path: String, content: &[u8], mode: Option<u32>) -> StageFile {
    StageFile { path, data_b64: STANDARD.encode(content), mode }
}

/// What a script says to wait for the file `name`; no longer than the suite lasts, whose folder goes away at its end.
pub(super) fn until(name: &str) -> String {
    format!("while test -d \"$FOLDER\" && ! test -e {name}; do sleep 1; done")
}

fn wait_until_it_listens(socket: &Path, process: &mut Running) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let error = match UnixStream::connect(socket) {
            Ok(_) => return Ok(()),
            Err(error) => error,
        };
        if !matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) || Instant::now() > deadline {
            return Err(error).with_context(|| format!("nobody listens at {}", socket.display()));
        }
        if let Some(status) = process.wait_until(Instant::now() + GLANCE)? {
            bail!("the agent ended with {status} before it listened");
        }
    }
}
