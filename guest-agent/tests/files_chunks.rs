//! Files in pieces: `write_file_chunk` and `read_file_chunk`.

mod wire;

use std::fs;
use std::os::unix::fs::MetadataExt;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use kiln_wire::frame::Kind;
use wire::Agent;
use wire::SmallDisk;
use wire::pattern;

struct Piece<'a> {
    path: &'a str,
    token: &'a str,
    offset: usize,
    data: &'a [u8],
    last: bool,
}

impl Piece<'_> {
    fn json(&self, agent: &Agent) -> String {
        let Self { path, token, offset, data, last } = self;
        let (path, data) = (agent.json(path), STANDARD.encode(data));
        format!(
            r#"{{"action":"write_file_chunk","path":{path},"offset":{offset},"data_b64":"{data}","last":{last},"token":"{token}","mode":416}}"#
        )
    }

    fn send(&self, agent: &Agent) {
        let ack = agent.ask(&self.json(agent));
        assert!(ack.ok, "{ack:?}");
    }

    fn refused(&self, agent: &Agent, errno: Option<i32>) -> String {
        agent.refused(&self.json(agent), errno)
    }
}

fn piece<'a>(token: &'a str, offset: usize, data: &'a [u8]) -> Piece<'a> {
    Piece { path: "file", token, offset, data, last: false }
}

#[test]
fn pieces_become_a_file_with_the_last_one() {
    let agent = Agent::start();
    fs::write(agent.path("file"), b"old").expect("written");
    let whole = pattern(20_000);
    for offset in (0..20_000).step_by(5000) {
        let last = offset == 15_000;
        Piece { last, ..piece("t", offset, &whole[offset..offset + 5000]) }.send(&agent);
        assert_eq!(fs::read(agent.path("file")).expect("there") == whole, last, "the old file, or the whole new one");
    }
    assert_eq!(fs::metadata(agent.path("file")).expect("there").mode() & 0o7777, 0o640);
    assert_eq!(agent.files(), ["file"]);
    // One piece can be all of it.
    Piece { last: true, ..piece("t", 0, b"") }.send(&agent);
    assert_eq!(fs::read(agent.path("file")).expect("there"), b"");
}

#[test]
fn nothing_is_there_before_the_last_piece() {
    let agent = Agent::start();
    piece("t", 0, b"abc").send(&agent);
    assert!(!agent.path("file").exists());
    assert_eq!(agent.files().len(), 1, "a temporary file");
    Piece { last: true, ..piece("t", 3, b"def") }.send(&agent);
    assert_eq!(fs::read(agent.path("file")).expect("there"), b"abcdef");
}

#[test]
fn any_other_offset_than_the_next_is_refused() {
    let agent = Agent::start();
    piece("t", 7, b"x").refused(&agent, None);
    assert_eq!(agent.files(), [""; 0]);
    piece("t", 0, b"abc").send(&agent);
    for offset in [1, 2, 4, usize::MAX] {
        assert!(piece("t", offset, b"x").refused(&agent, None).contains("offset"));
    }
    // The refused pieces have changed nothing.
    Piece { last: true, ..piece("t", 3, b"d") }.send(&agent);
    assert_eq!(fs::read(agent.path("file")).expect("there"), b"abcd");
    piece("t", 4, b"too late").refused(&agent, None);
}

#[test]
fn offset_zero_and_a_new_token_start_afresh() {
    let agent = Agent::start();
    piece("t", 0, b"first").send(&agent);
    piece("t", 0, b"again").send(&agent);
    assert_eq!(agent.files().len(), 1, "one temporary file");
    piece("other", 5, b"not the other's next").refused(&agent, None);
    piece("other", 0, b"123").send(&agent);
    assert_eq!(agent.files().len(), 1, "one temporary file");
    piece("t", 5, b"ended by the other").refused(&agent, None);
    Piece { last: true, ..piece("other", 3, b"4") }.send(&agent);
    assert_eq!(fs::read(agent.path("file")).expect("there"), b"1234");
    assert_eq!(agent.files(), ["file"]);
}

#[test]
fn eight_mebibytes_fit_and_no_more() {
    let agent = Agent::start();
    let data = pattern((8 << 20) + 1);
    assert!(piece("t", 0, &data).refused(&agent, None).contains("8388608"));
    assert_eq!(agent.files(), [""; 0]);
    Piece { last: true, ..piece("t", 0, &data[..8 << 20]) }.send(&agent);
    assert_eq!(fs::metadata(agent.path("file")).expect("there").len(), 8 << 20);
    agent.refused(&piece("t", 0, b"").json(&agent).replace("\"data_b64\":\"", "\"data_b64\":\"!"), None);
}

#[test]
fn the_oldest_of_too_many_uploads_ends() {
    let agent = Agent::start();
    let paths: Vec<_> = (0..65).map(|number| format!("file-{number}")).collect();
    for (number, path) in paths.iter().enumerate() {
        Piece { path, ..piece("t", 0, b"abc") }.send(&agent);
        assert_eq!(agent.files().len(), (number + 1).min(64));
    }
    Piece { path: &paths[0], ..piece("t", 3, b"d") }.refused(&agent, None);
    Piece { path: &paths[1], last: true, ..piece("t", 3, b"d") }.send(&agent);
    assert_eq!(fs::read(agent.path("file-1")).expect("there"), b"abcd");
}

#[test]
fn what_fails_leaves_nothing_behind() {
    let agent = Agent::start();
    fs::create_dir(agent.path("folder")).expect("made");
    Piece { path: "folder", ..piece("t", 0, b"x") }.refused(&agent, Some(21));
    Piece { path: "missing/file", ..piece("t", 0, b"x") }.refused(&agent, Some(2));
    Piece { path: "later", ..piece("t", 0, b"x") }.send(&agent);
    fs::create_dir(agent.path("later")).expect("made");
    Piece { path: "later", last: true, ..piece("t", 1, b"y") }.refused(&agent, Some(21));
    assert_eq!(agent.files(), ["folder", "later"]);

    let _disk = SmallDisk::new(agent.path("disk"), 256);
    let data = pattern(200 << 10);
    Piece { path: "disk/file", ..piece("t", 0, &data) }.send(&agent);
    let text = Piece { path: "disk/file", ..piece("t", data.len(), &data) }.refused(&agent, Some(28));
    assert!(text.contains("disk/file: No space left on device"), "{text}");
    assert_eq!(wire::names(&agent.path("disk")), [""; 0]);
    Piece { path: "disk/file", last: true, ..piece("t", data.len(), b"x") }.refused(&agent, None);
}

#[test]
fn an_agent_that_stops_takes_its_temporary_files_along() {
    let agent = Agent::start();
    piece("t", 0, b"abc").send(&agent);
    let mut stream = agent.stream(&format!(r#"{{"action":"open_write","path":{}}}"#, agent.json("streamed")));
    stream.send(Kind::Stdin, b"abc");
    wire::until("two temporary files", || agent.files().len() == 2);
    let folder = agent.stop();
    assert_eq!(wire::names(folder.path()), [""; 0]);
}

#[test]
fn a_file_is_read_in_pieces() {
    let agent = Agent::start();
    let whole = pattern(9 << 20);
    fs::write(agent.path("file"), &whole).expect("written");
    let path = agent.json("file");
    let read = |offset: usize, len: u64, rest: &str| {
        agent.ask(&format!(r#"{{"action":"read_file_chunk","path":{path},"offset":{offset},"len":{len}{rest}}}"#))
    };
    let mut offset = 0;
    while offset < whole.len() {
        let ack = read(offset, 3_000_000, "");
        assert_eq!(ack.total_len, Some(9 << 20));
        let data = STANDARD.decode(ack.data_b64.expect("data")).expect("base64");
        assert!(!data.is_empty() && data == whole[offset..offset + data.len()]);
        offset += data.len();
    }
    let largest = read(0, u64::MAX, "").data_b64.expect("data");
    assert_eq!(STANDARD.decode(largest).expect("base64").len(), 8 << 20);
    assert_eq!(read(whole.len(), 10, "").data_b64.as_deref(), Some(""), "nothing is after the end");
    assert!(read(0, 1, r#","max_bytes":9437184"#).ok);
    assert!(!read(0, 1, r#","max_bytes":9437183"#).ok);
    agent.refused(r#"{"action":"read_file_chunk","path":"missing","offset":0,"len":1}"#, Some(2));
    agent.refused(r#"{"action":"read_file_chunk","path":"/dev/zero","offset":0,"len":1}"#, None);
}

#[test]
fn the_other_actions_tell_the_systems_number_too() {
    let agent = Agent::start();
    let text = agent.refused(r#"{"action":"read_file","path":"missing"}"#, Some(2));
    assert_eq!(text, "missing: No such file or directory");
    agent.refused(r#"{"action":"write_file","path":"missing/x","data_b64":""}"#, Some(2));
    agent.refused(r#"{"action":"write_file","path":"/","data_b64":""}"#, Some(21));
    agent.refused(r#"{"action":"signal","signum":15}"#, Some(3));
}
