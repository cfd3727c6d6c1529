//! `open_read` and `open_write`.

mod wire;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use kiln_wire::failure::Failure;
use kiln_wire::frame::Kind;
use wire::Agent;
use wire::Connection;
use wire::SmallDisk;
use wire::pattern;
use wire::until;

fn open_read(agent: &Agent, name: &str) -> String {
    format!(r#"{{"action":"open_read","path":{}}}"#, agent.json(name))
}

fn open_write(agent: &Agent, name: &str) -> String {
    format!(r#"{{"action":"open_write","path":{}}}"#, agent.json(name))
}

/// Whether the agent has `path` open.
fn is_open(agent: &Agent, path: &Path) -> bool {
    let links = fs::read_dir(format!("/proc/{}/fd", agent.pid())).expect("it runs").flatten();
    links.filter_map(|link| fs::read_link(link.path()).ok()).any(|target| target.starts_with(path))
}

#[test]
fn a_file_is_read_to_its_end() {
    let agent = Agent::start();
    for length in [0, 1, 32 << 10, (32 << 10) + 1, 1_000_000] {
        let whole = pattern(length);
        fs::write(agent.path("file"), &whole).expect("written");
        let mut stream = agent.control(&open_read(&agent, "file"));
        let ack = stream.ack();
        assert_eq!((ack.ok, ack.total_len), (true, Some(length as u64)));
        assert!(stream.output() == whole, "{length}");
    }
}

#[test]
fn what_is_no_regular_file_is_refused() {
    let agent = Agent::start();
    agent.refused(&open_read(&agent, "missing"), Some(2));
    agent.refused(&open_read(&agent, "."), None);
    agent.refused(r#"{"action":"open_read","path":"/dev/zero"}"#, None);
    let fifo = agent.path("fifo");
    assert!(std::process::Command::new("mkfifo").arg(&fifo).status().expect("runs").success());
    agent.refused(&open_read(&agent, "fifo"), None);
}

#[test]
fn a_large_file_that_is_read_slowly_leaves_others_their_turn() {
    const LENGTH: usize = 64 << 20;
    let agent = Agent::start();
    let whole = pattern(LENGTH);
    fs::write(agent.path("file"), &whole).expect("written");
    let mut streams: Vec<Connection> = (0..3).map(|_| agent.stream(&open_read(&agent, "file"))).collect();
    // Nobody reads: the agent must not spin on it or hold the file, and answers others.
    assert!(agent.ask(r#"{"action":"probe"}"#).ok);
    let mut at = 0;
    while at < LENGTH {
        let frame = streams[0].next().expect("more");
        assert_eq!(frame.kind, Kind::Stdout);
        assert!(frame.payload == whole[at..at + frame.payload.len()]);
        if at >> 23 != (at + frame.payload.len()) >> 23 {
            assert!(agent.ask(r#"{"action":"probe"}"#).ok);
        }
        at += frame.payload.len();
    }
    assert_eq!(streams[0].output(), b"");
    let rss = fs::read_to_string(format!("/proc/{}/status", agent.pid())).expect("it runs");
    let rss = rss.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a field").trim().to_owned();
    let kib: u64 = rss.split(' ').next().expect("a number").parse().expect("a number");
    assert!(kib < 32 << 10, "{kib} KiB for a file of 64 MiB");
    // Two at once, each in its own time.
    let (left, right) = streams.split_at_mut(2);
    std::thread::scope(|scope| {
        scope.spawn(|| assert!(left[1].output() == whole));
        assert!(right[0].output() == whole);
    });
}

#[test]
fn a_reader_that_disconnects_lets_the_file_go() {
    let agent = Agent::start();
    fs::write(agent.path("file"), pattern(4 << 20)).expect("written");
    let stream = agent.stream(&open_read(&agent, "file"));
    assert!(is_open(&agent, &agent.path("file")));
    drop(stream);
    until("the file is closed", || !is_open(&agent, &agent.path("file")));
}

#[test]
fn a_file_appears_whole_at_the_end_of_file() {
    let agent = Agent::start();
    for (length, mode, wanted) in [(3 << 20, ",\"mode\":2472", 0o4650), (0, "", 0o644)] {
        let whole = pattern(length);
        fs::write(agent.path("file"), b"old").expect("written");
        let open = open_write(&agent, "file").replace('}', &format!("{mode}}}"));
        let mut stream = agent.stream(&open);
        for piece in whole.chunks(100_000) {
            stream.send(Kind::Stdin, piece);
        }
        assert_eq!(fs::read(agent.path("file")).expect("there"), b"old");
        stream.end_of_file();
        assert_eq!(stream.output(), b"");
        assert!(fs::read(agent.path("file")).expect("there") == whole);
        assert_eq!(fs::metadata(agent.path("file")).expect("there").mode() & 0o7777, wanted);
        assert_eq!(agent.files(), ["file"]);
    }
}

#[test]
fn a_writer_that_disconnects_leaves_nothing() {
    let agent = Agent::start();
    let mut stream = agent.stream(&open_write(&agent, "file"));
    stream.send(Kind::Stdin, &pattern(100_000));
    assert_eq!(agent.files().len(), 1, "a temporary file");
    assert!(!agent.path("file").exists());
    drop(stream);
    until("the temporary file is gone", || agent.files().is_empty());
    // So does one that breaks the protocol.
    let mut stream = agent.stream(&open_write(&agent, "file"));
    std::io::Write::write_all(&mut stream.stream, &[0xff; 5]).expect("the agent reads");
    assert_eq!(stream.next(), None);
    until("the temporary file is gone", || agent.files().is_empty());
}

#[test]
fn what_cannot_be_written_is_refused() {
    let agent = Agent::start();
    fs::create_dir(agent.path("folder")).expect("made");
    agent.refused(&open_write(&agent, "missing/file"), Some(2));
    agent.refused(&open_write(&agent, "folder"), Some(21));
    agent.refused(r#"{"action":"open_write","path":"/"}"#, Some(21));
    agent.refused(r#"{"action":"open_write","path":""}"#, Some(21));
    assert_eq!(agent.files(), ["folder"]);
}

#[test]
fn a_full_disk_is_told_with_its_number_and_leaves_nothing() {
    let agent = Agent::start();
    let _disk = SmallDisk::new(agent.path("disk"), 1024);
    let mut stream = agent.stream(&open_write(&agent, "disk/file"));
    // More than fits, and on after the error: what the agent discards, it discards without closing.
    for _ in 0..64 {
        stream.send(Kind::Stdin, &pattern(64 << 10));
    }
    stream.end_of_file();
    let detail = format!("{}: No space left on device", agent.path("disk/file").display());
    assert_eq!(stream.failure(), Failure::System { errno: 28, detail });
    assert_eq!(wire::names(&agent.path("disk")), [""; 0]);
}

#[test]
fn two_writers_of_one_file_do_not_mix() {
    let agent = Agent::start();
    let mut streams = [agent.stream(&open_write(&agent, "file")), agent.stream(&open_write(&agent, "file"))];
    for (stream, byte) in streams.iter_mut().zip(*b"ab") {
        stream.send(Kind::Stdin, &[byte; 1000]);
    }
    for (stream, byte) in streams.iter_mut().zip(*b"ab") {
        stream.send(Kind::Stdin, &[byte; 1000]);
        stream.end_of_file();
        assert_eq!(stream.output(), b"");
        assert_eq!(fs::read(agent.path("file")).expect("there"), [byte; 2000]);
    }
    assert_eq!(agent.files(), ["file"]);
}

#[test]
fn a_name_of_any_length_has_a_temporary_one() {
    let agent = Agent::start();
    let name = "n".repeat(255);
    let mut stream = agent.stream(&open_write(&agent, &name));
    stream.end_of_file();
    stream.output();
    assert_eq!(agent.files(), [name]);
}
