//! `write_file` and `read_file`.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use kiln_wire::control::Control;
use kiln_wire::control::ControlAck;
use kiln_wire::control::feature;

use super::Subject;
use super::subject::done;
use super::subject::refused;
use crate::case::Case;
use crate::case::Finding;
use crate::case::ensure;
use crate::case::same;

pub(super) const CASES: &[Case<Subject>] = &[
    Case::new("A82", "write_file writes every byte, with mode 0644 or the one asked for", write),
    Case::new("A83", "write_file replaces by renaming, and leaves nothing beside the file", replace),
    Case::new("A84", "write_file that is refused leaves the old file", write_refused),
    Case::new("A85", "read_file gives every byte", read),
    Case::new("A86", "read_file refuses what is larger than max_bytes, 4 MiB by default and 11 MiB at most", limits),
    Case::new("A87", "read_file refuses at once what is no regular file", irregular),
    // No feature announces the field; it came with this one.
    Case::new("A88", "what the system refused has Linux's errno", errno).requires(&[feature::STARTED]),
];

fn write_file(agent: &Subject, name: &str, content: &[u8], mode: Option<u32>) -> Result<ControlAck, Finding> {
    agent.control(&Control::WriteFile { path: agent.path(name), data_b64: STANDARD.encode(content), mode })
}

fn read_file(agent: &Subject, name: &str, max_bytes: Option<u64>) -> Result<ControlAck, Finding> {
    agent.control(&Control::ReadFile { path: agent.path(name), max_bytes })
}

fn write(agent: &Subject) -> Result<(), Finding> {
    let all: Vec<u8> = (0..=u8::MAX).collect();
    for (name, mode, expected) in
        [("plain", None, "-rw-r--r--"), ("strict", Some(0o600), "-rw-------"), ("wide", Some(0o777), "-rwxrwxrwx")]
    {
        done(&write_file(agent, name, &all, mode)?)?;
        same(name, &agent.content(name)?, &all)?;
        let seen = agent.permissions(name)?;
        ensure(seen == expected, || format!("mode {mode:?} is {seen}, expected {expected}"))?;
    }
    Ok(())
}

fn replace(agent: &Subject) -> Result<(), Finding> {
    agent.sh("mkdir replaced && echo old > replaced/file && ln replaced/file replaced/link")?.exits(0)?;
    done(&write_file(agent, "replaced/file", b"new\n", None)?)?;
    agent.sh("cat replaced/file replaced/link; ls -A replaced")?.prints("new\nold\nfile\nlink\n")
}

fn write_refused(agent: &Subject) -> Result<(), Finding> {
    agent.sh("mkdir kept kept/folder && echo old > kept/file")?.exits(0)?;
    let path = agent.path("kept/file");
    let ack = agent.control(&Control::WriteFile { path, data_b64: "not base64!".to_owned(), mode: None })?;
    refused(&ack, "data_b64 that is not base64")?;
    refused(&write_file(agent, "kept/folder", b"new", None)?, "a folder at path")?;
    refused(&write_file(agent, "kept/none/file", b"new", None)?, "no such folder")?;
    agent.sh("cat kept/file; ls -A kept")?.prints("old\nfile\nfolder\n")
}

fn read(agent: &Subject) -> Result<(), Finding> {
    let all: Vec<u8> = (0..=u8::MAX).cycle().take(100_000).collect();
    for content in [&b""[..], b"text\n", &all] {
        done(&write_file(agent, "to-read", content, None)?)?;
        let ack = read_file(agent, "to-read", None)?;
        done(&ack)?;
        same("the file", &STANDARD.decode(ack.data_b64.unwrap_or_default())?, content)?;
    }
    Ok(())
}

fn limits(agent: &Subject) -> Result<(), Finding> {
    for (size, max_bytes, holds) in [
        (5, Some(5), true),
        (5, Some(4), false),
        (4 << 20, None, true),
        ((4 << 20) + 1, None, false),
        (11 << 20, Some(11 << 20), true),
        ((11 << 20) + 1, Some(1 << 40), false),
    ] {
        agent.sh(&format!("head -c {size} /dev/zero > sized"))?.exits(0)?;
        let ack = read_file(agent, "sized", max_bytes)?;
        let what = format!("{size} bytes with max_bytes {max_bytes:?}");
        if !holds {
            refused(&ack, &what)?;
            continue;
        }
        let read = STANDARD.decode(ack.data_b64.as_deref().unwrap_or_default())?.len() as u64;
        ensure(ack.ok && read == size, || format!("{what}: {read} bytes, error {:?}", ack.error))?;
    }
    Ok(())
}

fn irregular(agent: &Subject) -> Result<(), Finding> {
    agent.sh("mkfifo nobody-writes && mkdir a-folder")?.exits(0)?;
    for name in ["nobody-writes", "a-folder", "missing", "../../dev/zero"] {
        refused(&read_file(agent, name, None)?, name)?;
    }
    Ok(())
}

fn errno(agent: &Subject) -> Result<(), Finding> {
    agent.sh("echo > a-file")?.exits(0)?;
    let expect = |ack: ControlAck, what: &str, errno: i32| {
        refused(&ack, what)?;
        ensure(ack.errno == Some(errno), || format!("{what}: errno {:?}, expected {errno}", ack.errno))
    };
    expect(read_file(agent, "missing", None)?, "reading what is missing", 2)?;
    expect(write_file(agent, "missing/file", b"", None)?, "writing into a missing folder", 2)?;
    expect(write_file(agent, "a-file/file", b"", None)?, "writing below a file", 20)
}
