//! Streams opened by CONTROL: files and connections.

use std::io::Read;
use std::io::Write;
use std::net::Ipv4Addr;
use std::net::Shutdown;
use std::net::TcpListener;
use std::net::TcpStream;
use std::thread;
use std::time::Instant;

use kiln_wire::control::Control;
use kiln_wire::control::feature::STREAMS;
use kiln_wire::frame::Frame;
use kiln_wire::frame::Kind;

use super::Subject;
use super::subject::HERE;
use super::subject::argv;
use super::subject::refused;
use crate::case::Case;
use crate::case::Finding;
use crate::case::Offers;
use crate::case::ensure;
use crate::case::same;
use crate::program::GLANCE;
use crate::session::PATIENCE;
use crate::session::Session;
use crate::session::describe;

pub(super) const CASES: &[Case<Subject>] = &[
    Case::new("A102", "open_read streams every byte, tells the size and ends with EXIT 0", read).requires(&[STREAMS]),
    Case::new("A103", "open_read refuses at once what is no regular file", read_refused).requires(&[STREAMS]),
    Case::new("A104", "an unread stream slows no session, and its host may leave", read_unread).requires(&[STREAMS]),
    Case::new("A105", "open_write shows the file at its end only, with its mode", write).requires(&[STREAMS]),
    Case::new("A106", "open_write whose host disconnects leaves nothing", write_abandoned).requires(&[STREAMS]),
    Case::new("A107", "open_write into a folder that is not there fails", write_nowhere).requires(&[STREAMS]),
    Case::new("A108", "connect passes bytes both ways, and each end's half-close", connect).requires(&[STREAMS, HERE]),
    Case::new("A109", "connect where nobody listens is refused in the answer", connect_refused).requires(&[STREAMS]),
    Case::new("A110", "connect: a reset is ERROR", connect_reset).requires(&[STREAMS, HERE]),
];

/// The error that an answer or the stream after it brings; `None` after an EXIT.
fn trouble(agent: &Subject, action: &Control) -> Result<Option<String>, Finding> {
    match agent.stream(action) {
        Err(refusal) => Ok(Some(refusal.to_string())),
        Ok((mut session, _)) => {
            session.end_of_input()?;
            Ok(session.rest()?.failure().ok().map(|failure| failure.to_string()))
        }
    }
}

fn read(agent: &Subject) -> Result<(), Finding> {
    agent.sh("head -c 3000000 /dev/zero > to-stream; echo end >> to-stream; : > empty")?.exits(0)?;
    for (name, size) in [("to-stream", 3_000_004), ("empty", 0)] {
        let (mut session, ack) = agent.stream(&Control::OpenRead { path: agent.path(name) })?;
        ensure(ack.total_len == Some(size), || format!("total_len {:?}, expected {size}", ack.total_len))?;
        let seen = session.rest()?;
        seen.exits(0)?;
        let bytes = seen.stdout();
        ensure(bytes.len() as u64 == size, || format!("{} of {size} bytes", bytes.len()))?;
        ensure(size == 0 || bytes.ends_with(b"end\n"), || "other bytes".to_owned())?;
        session.closed()?;
    }
    Ok(())
}

fn read_refused(agent: &Subject) -> Result<(), Finding> {
    agent.sh("mkfifo stream-fifo")?.exits(0)?;
    for name in ["stream-fifo", ".", "missing", "../../dev/zero"] {
        refused(&agent.control(&Control::OpenRead { path: agent.path(name) })?, name)?;
    }
    Ok(())
}

fn read_unread(agent: &Subject) -> Result<(), Finding> {
    agent.sh("head -c 8388608 /dev/zero > unread")?.exits(0)?;
    let stuck = agent.stream(&Control::OpenRead { path: agent.path("unread") })?;
    agent.run(&argv(&["echo", "hi"]))?.prints("hi\n")?;
    drop(stuck);
    agent.run(&argv(&["echo", "hi"]))?.prints("hi\n")
}

fn write(agent: &Subject) -> Result<(), Finding> {
    agent.sh("mkdir written && echo old > written/file && ln written/file written/link")?.exits(0)?;
    for (mode, expected) in [(None, "-rw-r--r--"), (Some(0o750), "-rwxr-x---")] {
        let action = Control::OpenWrite { path: agent.path("written/file"), mode };
        let before = agent.content("written/file")?;
        let (mut session, _) = agent.stream(&action)?;
        session.send(Kind::Stdin, vec![b'x'; 3_000_000])?;
        session.send(Kind::Stdin, &b"end"[..])?;
        same("the file before end-of-file", &agent.content("written/file")?, before)?;
        session.end_of_input()?;
        session.rest()?.exits(0)?;
        let content = agent.content("written/file")?;
        ensure(content.len() == 3_000_003 && content.ends_with(b"xend"), || format!("{} bytes", content.len()))?;
        let seen = agent.permissions("written/file")?;
        ensure(seen == expected, || format!("mode {mode:?} is {seen}"))?;
    }
    same("another link to the old file", &agent.content("written/link")?, "old\n")?;
    let entries = agent.entries("written")?;
    ensure(entries == "file\nlink\n", || format!("left: {entries:?}"))
}

fn write_abandoned(agent: &Subject) -> Result<(), Finding> {
    agent.sh("mkdir abandoned")?.exits(0)?;
    let (mut session, _) = agent.stream(&Control::OpenWrite { path: agent.path("abandoned/file"), mode: None })?;
    session.send(Kind::Stdin, vec![0; 1 << 20])?;
    drop(session);
    let deadline = Instant::now() + PATIENCE;
    loop {
        let entries = agent.entries("abandoned")?;
        if entries.is_empty() {
            return Ok(());
        }
        ensure(Instant::now() < deadline, || format!("still there: {entries:?}"))?;
        thread::sleep(GLANCE);
    }
}

fn write_nowhere(agent: &Subject) -> Result<(), Finding> {
    let action = Control::OpenWrite { path: agent.path("no/such/folder/file"), mode: None };
    ensure(trouble(agent, &action)?.is_some(), || "EXIT, as if it were written".to_owned())
}

/// A listener where the agent connects to, and the session that connected to it.
fn connected(agent: &Subject) -> Result<(TcpStream, Session), Finding> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let (session, _) = agent.stream(&Control::Connect { port: listener.local_addr()?.port() })?;
    // The answer came, so the connection is in the queue.
    listener.set_nonblocking(true)?;
    let (peer, _) = listener.accept()?;
    peer.set_nonblocking(false)?;
    peer.set_read_timeout(Some(PATIENCE))?;
    peer.set_write_timeout(Some(PATIENCE))?;
    Ok((peer, session))
}

fn connect(agent: &Subject) -> Result<(), Finding> {
    let (mut peer, mut session) = connected(agent)?;
    session.send(Kind::Stdin, &b"ping"[..])?;
    let mut ping = [0; 4];
    peer.read_exact(&mut ping)?;
    same("at the guest's end", &ping, "ping")?;
    peer.write_all(b"pong")?;
    session.hear("pong")?;
    session.end_of_input()?;
    ensure(peer.read(&mut ping)? == 0, || "bytes after the host's half-close".to_owned())?;
    // The other way is still open.
    peer.write_all(b"more")?;
    session.hear("more")?;
    peer.shutdown(Shutdown::Write)?;
    match session.next()? {
        Some(Frame { kind: Kind::Stdout, payload }) if payload.is_empty() => session.rest()?.exits(0),
        other => Err(Finding::new(format!("{} in place of an empty STDOUT frame", describe(other.as_ref())))),
    }
}

fn connect_refused(agent: &Subject) -> Result<(), Finding> {
    // A port that was just free; port 1 for an agent elsewhere, where nobody serves tcpmux any more.
    let port = match agent.lacks(HERE) {
        None => TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port(),
        Some(_) => 1,
    };
    refused(&agent.control(&Control::Connect { port })?, "nobody listens")
}

fn connect_reset(agent: &Subject) -> Result<(), Finding> {
    let (mut peer, mut session) = connected(agent)?;
    session.send(Kind::Stdin, &b"never read"[..])?;
    // Once bytes are there, closing without reading them is a reset.
    let mut first = [0; 1];
    ensure(peer.read(&mut first)? == 1, || "the bytes did not arrive".to_owned())?;
    drop(peer);
    session.rest()?.failure().map(|_| ())
}
