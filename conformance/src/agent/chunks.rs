//! `write_file_chunk` and `read_file_chunk`.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use kiln_wire::control::Control;
use kiln_wire::control::ControlAck;

use super::Subject;
use super::subject::CHUNKS;
use super::subject::done;
use super::subject::refused;
use crate::case::Case;
use crate::case::Finding;
use crate::case::ensure;
use crate::case::same;

/// The largest piece (8 MiB).
const PIECE: u64 = 8 << 20;

pub(super) const CASES: &[Case<Subject>] = &[
    Case::new("A89", "write_file_chunk puts pieces together, and nothing is at path before the last", pieces)
        .requires(&[CHUNKS]),
    Case::new("A90", "the last piece's mode counts, 0644 by default", mode).requires(&[CHUNKS]),
    Case::new("A91", "offset 0 and a new token start afresh, any other offset than the next is refused", offsets)
        .requires(&[CHUNKS]),
    Case::new("A92", "a piece has 8 MiB at most", largest).requires(&[CHUNKS]),
    Case::new("A93", "of 65 unfinished uploads the oldest is ended, and its bytes are removed", unfinished)
        .requires(&[CHUNKS]),
    Case::new("A94", "read_file_chunk gives len bytes from offset, and the size", read).requires(&[CHUNKS]),
    Case::new("A95", "read_file_chunk gives 8 MiB at most", read_largest).requires(&[CHUNKS]),
    Case::new("A96", "read_file_chunk refuses what is larger than max_bytes or no regular file", read_refused)
        .requires(&[CHUNKS]),
];

/// A piece of an upload; `mode` goes with the last one.
struct Piece<'a> {
    name: &'a str,
    token: &'a str,
    offset: u64,
    data: &'a [u8],
    last: bool,
}

impl Piece<'_> {
    fn send(&self, agent: &Subject, mode: Option<u32>) -> Result<ControlAck, Finding> {
        agent.control(&Control::WriteFileChunk {
            path: agent.path(self.name),
            offset: self.offset,
            data_b64: STANDARD.encode(self.data),
            last: self.last,
            token: self.token.to_owned(),
            mode,
        })
    }
}

fn pieces(agent: &Subject) -> Result<(), Finding> {
    agent.sh("mkdir chunked")?.exits(0)?;
    let name = "chunked/file";
    for (offset, data) in [(0, &b"one "[..]), (4, b"two ")] {
        done(&Piece { name, token: "t", offset, data, last: false }.send(agent, None)?)?;
        ensure(!agent.is_there(name)?, || "it is there before the last piece".to_owned())?;
    }
    done(&Piece { name, token: "t", offset: 8, data: b"three", last: true }.send(agent, None)?)?;
    same("the file", &agent.content(name)?, "one two three")?;
    let entries = agent.entries("chunked")?;
    ensure(entries == "file\n", || format!("beside the file: {entries:?}"))
}

fn mode(agent: &Subject) -> Result<(), Finding> {
    for (mode, expected) in [(None, "-rw-r--r--"), (Some(0o751), "-rwxr-x--x")] {
        let name = "chunk-mode";
        done(&Piece { name, token: expected, offset: 0, data: b"a", last: false }.send(agent, Some(0o600))?)?;
        done(&Piece { name, token: expected, offset: 1, data: b"b", last: true }.send(agent, mode)?)?;
        let seen = agent.permissions(name)?;
        ensure(seen == expected, || format!("mode {mode:?} is {seen}"))?;
    }
    Ok(())
}

fn offsets(agent: &Subject) -> Result<(), Finding> {
    let piece = |token, offset, data, last| Piece { name: "offsets", token, offset, data, last }.send(agent, None);
    refused(&piece("never-begun", 4, b"x", false)?, "an upload that begins in the middle")?;
    done(&piece("a", 0, b"given up", false)?)?;
    refused(&piece("a", 3, b"x", false)?, "an offset before the next one")?;
    done(&piece("b", 0, b"given up too", false)?)?;
    done(&piece("b", 0, b"afresh ", false)?)?;
    refused(&piece("b", 99, b"x", true)?, "an offset beyond the next one")?;
    done(&piece("c", 0, b"at last ", false)?)?;
    done(&piece("c", 8, b"whole", true)?)?;
    same("the file", &agent.content("offsets")?, "at last whole")
}

fn largest(agent: &Subject) -> Result<(), Finding> {
    let data = vec![b'x'; usize::try_from(PIECE)? + 1];
    let piece = |data| Piece { name: "largest", token: "l", offset: 0, data, last: true }.send(agent, None);
    refused(&piece(&data)?, "a piece of 8 MiB and a byte")?;
    done(&piece(data.get(1..).unwrap_or_default())?)?;
    agent.sh("test $(wc -c < largest) -eq 8388608")?.exits(0)
}

fn unfinished(agent: &Subject) -> Result<(), Finding> {
    agent.sh("mkdir uploads")?.exits(0)?;
    let piece = |number: u32, offset, last| {
        let (name, token) = (format!("uploads/{number}"), format!("upload-{number}"));
        Piece { name: &name, token: &token, offset, data: b"x", last }.send(agent, None)
    };
    for number in 0..65 {
        done(&piece(number, 0, false)?)?;
    }
    refused(&piece(0, 1, true)?, "the oldest upload going on")?;
    for number in 1..65 {
        done(&piece(number, 1, true)?)?;
    }
    let entries = agent.entries("uploads")?;
    ensure(entries.lines().count() == 64, || format!("{} entries in place of 64", entries.lines().count()))
}

fn read_chunk(agent: &Subject, name: &str, offset: u64, len: u64, max: Option<u64>) -> Result<ControlAck, Finding> {
    agent.control(&Control::ReadFileChunk { path: agent.path(name), offset, len, max_bytes: max })
}

fn read(agent: &Subject) -> Result<(), Finding> {
    agent.sh("printf 0123456789 > digits")?.exits(0)?;
    for (offset, len, expected) in [(0, 4, "0123"), (4, 4, "4567"), (8, 4, "89"), (10, 4, ""), (99, 4, "")] {
        let ack = read_chunk(agent, "digits", offset, len, None)?;
        done(&ack)?;
        same(&format!("from {offset}"), &STANDARD.decode(ack.data_b64.unwrap_or_default())?, expected)?;
        ensure(ack.total_len == Some(10), || format!("total_len {:?}, expected 10", ack.total_len))?;
    }
    Ok(())
}

fn read_largest(agent: &Subject) -> Result<(), Finding> {
    agent.sh("head -c 9000000 /dev/zero > long")?.exits(0)?;
    let ack = read_chunk(agent, "long", 0, 9_000_000, None)?;
    done(&ack)?;
    let read = STANDARD.decode(ack.data_b64.unwrap_or_default())?.len() as u64;
    ensure(read > 0 && read <= PIECE, || format!("{read} bytes in one answer"))
}

fn read_refused(agent: &Subject) -> Result<(), Finding> {
    agent.sh("printf 12345 > five && mkfifo chunk-fifo")?.exits(0)?;
    done(&read_chunk(agent, "five", 0, 1, Some(5))?)?;
    refused(&read_chunk(agent, "five", 0, 1, Some(4))?, "five bytes with max_bytes 4")?;
    for name in ["chunk-fifo", ".", "missing", "../../dev/zero"] {
        refused(&read_chunk(agent, name, 0, 1, None)?, name)?;
    }
    Ok(())
}
