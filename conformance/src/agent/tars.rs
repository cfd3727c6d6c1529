//! Streams opened by CONTROL: tar archives.

use std::collections::BTreeMap;
use std::io::Read;

use kiln_wire::control::Control;
use kiln_wire::control::feature::STREAMS;
use kiln_wire::frame::Kind;

use super::Subject;
use super::subject::refused;
use crate::case::Case;
use crate::case::Finding;
use crate::case::ensure;

pub(super) const CASES: &[Case<Subject>] = &[
    Case::new("A111", "pack of a folder has the entry `.` and all that is in it", pack).requires(&[STREAMS]),
    Case::new("A112", "pack of a file has one entry, its file name", pack_file).requires(&[STREAMS]),
    Case::new("A113", "pack of what is not there is refused", pack_missing).requires(&[STREAMS]),
    Case::new("A114", "what was packed is unpacked the same, in place before EXIT", round_trip).requires(&[STREAMS]),
    Case::new("A115", "unpack of no archive is ERROR, what came before stays", unpack_broken).requires(&[STREAMS]),
    Case::new("A116", "unpack whose host disconnects keeps what has come", unpack_abandoned).requires(&[STREAMS]),
];

/// The names in the archive, as sent but for slashes behind folders, with the contents of files.
fn entries(archive: &[u8]) -> Result<BTreeMap<String, Vec<u8>>, Finding> {
    let mut found = BTreeMap::new();
    for entry in tar::Archive::new(archive).entries()? {
        let mut entry = entry?;
        let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        let mut content = Vec::new();
        entry.read_to_end(&mut content)?;
        let name = if name == "./" { "." } else { name.trim_start_matches("./").trim_end_matches('/') };
        found.insert(name.to_owned(), content);
    }
    Ok(found)
}

fn packed(agent: &Subject, name: &str) -> Result<Vec<u8>, Finding> {
    let (mut session, _) = agent.stream(&Control::Pack { path: agent.path(name) })?;
    let seen = session.rest()?;
    seen.exits(0)?;
    Ok(seen.stdout())
}

/// Names that are too long for a plain header, or odd.
fn odd_tree(agent: &Subject, name: &str) -> Result<(), Finding> {
    let long = "long".repeat(40);
    let script = format!(
        "mkdir -p {name}/sub/{long} && cd {name} && echo one > one && head -c 100000 /dev/zero > 'sub/a b' \
         && echo deep > sub/{long}/deep && ln -s one link && chmod 640 one && : > empty"
    );
    agent.sh(&script)?.exits(0)
}

fn pack(agent: &Subject) -> Result<(), Finding> {
    odd_tree(agent, "to-pack")?;
    let found = entries(&packed(agent, "to-pack")?)?;
    let long = "long".repeat(40);
    let deep = format!("sub/{long}/deep");
    for (name, content) in
        [(".", &b""[..]), ("one", b"one\n"), ("sub/a b", &vec![0; 100_000]), (&deep, b"deep\n"), ("empty", b"")]
    {
        let seen = found.get(name).ok_or_else(|| Finding::new(format!("no entry {name:?}: {:?}", found.keys())))?;
        crate::case::same(name, seen, content)?;
    }
    ensure(found.contains_key("link"), || "no symbolic link".to_owned())
}

fn pack_file(agent: &Subject) -> Result<(), Finding> {
    agent.sh("mkdir pack-file && echo content > pack-file/name")?.exits(0)?;
    let found = entries(&packed(agent, "pack-file/name")?)?;
    let expected = BTreeMap::from([("name".to_owned(), b"content\n".to_vec())]);
    ensure(found == expected, || format!("entries {:?}", found.keys()))
}

fn pack_missing(agent: &Subject) -> Result<(), Finding> {
    refused(&agent.control(&Control::Pack { path: agent.path("missing") })?, "pack")
}

fn round_trip(agent: &Subject) -> Result<(), Finding> {
    odd_tree(agent, "original")?;
    let archive = packed(agent, "original")?;
    // A folder that is missing is made.
    let (mut session, _) = agent.stream(&Control::Unpack { path: agent.path("copy") })?;
    for piece in archive.chunks(10_007) {
        session.send(Kind::Stdin, piece.to_vec())?;
    }
    session.end_of_input()?;
    session.rest()?.exits(0)?;
    let listing = |name: &str| {
        agent.sh(&format!("cd {name} && find . -exec ls -ld '{{}}' ';' | cut -c 1-10 && find . -type f -exec md5sum '{{}}' ';' && ls -l link | sed 's/.* link/link/'"))
    };
    let (original, copy) = (listing("original")?, listing("copy")?);
    original.exits(0)?;
    copy.exits(0)?;
    let sorted = |listing: Vec<u8>| {
        let mut lines: Vec<_> = String::from_utf8_lossy(&listing).lines().map(str::to_owned).collect();
        lines.sort();
        lines
    };
    let (original, copy) = (sorted(original.stdout()), sorted(copy.stdout()));
    ensure(original == copy, || format!("{copy:?}, expected {original:?}"))
}

/// An archive of the file `first`, without its end.
fn one_entry() -> Result<Vec<u8>, Finding> {
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_ustar();
    header.set_size(6);
    header.set_mode(0o644);
    builder.append_data(&mut header, "first", &b"first\n"[..])?;
    Ok(builder.get_ref().clone())
}

fn unpack_broken(agent: &Subject) -> Result<(), Finding> {
    let (mut session, _) = agent.stream(&Control::Unpack { path: agent.path("broken") })?;
    session.send(Kind::Stdin, [one_entry()?, vec![b'?'; 1024]].concat())?;
    session.end_of_input()?;
    session.rest()?.failure()?;
    crate::case::same("the entry before", &agent.content("broken/first")?, "first\n")
}

fn unpack_abandoned(agent: &Subject) -> Result<(), Finding> {
    let (mut session, _) = agent.stream(&Control::Unpack { path: agent.path("left") })?;
    session.send(Kind::Stdin, one_entry()?)?;
    agent.appears("left/first")?;
    drop(session);
    // Another session is served after the end of the first was.
    crate::case::same("what had come", &agent.content("left/first")?, "first\n")
}
