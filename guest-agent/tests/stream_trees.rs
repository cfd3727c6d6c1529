//! `pack` and `unpack`.

mod wire;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::os::unix::fs::symlink;
use std::path::Path;

use kiln_tree::UnpackError;
use kiln_tree::UnpackOptions;
use kiln_wire::failure::Failure;
use kiln_wire::frame::Kind;
use wire::Agent;
use wire::SmallDisk;
use wire::children;
use wire::pattern;
use wire::until;

fn pack(agent: &Agent, name: &str) -> String {
    format!(r#"{{"action":"pack","path":{}}}"#, agent.json(name))
}

fn unpack(agent: &Agent, name: &str) -> String {
    format!(r#"{{"action":"unpack","path":{}}}"#, agent.json(name))
}

fn tree(root: &Path) {
    fs::create_dir_all(root.join("a/b")).expect("made");
    fs::write(root.join("a/large"), pattern(3 << 20)).expect("written");
    fs::write(root.join("a/b/small"), b"small").expect("written");
    symlink("../nowhere", root.join("a/link")).expect("linked");
    fs::hard_link(root.join("a/b/small"), root.join("z")).expect("linked");
}

fn check(root: &Path) {
    assert!(fs::read(root.join("a/large")).expect("there") == pattern(3 << 20));
    assert_eq!(fs::read_link(root.join("a/link")).expect("there"), Path::new("../nowhere"));
    let inode = |name: &str| fs::metadata(root.join(name)).expect("there").ino();
    assert_eq!(inode("a/b/small"), inode("z"));
}

#[test]
fn a_folder_goes_out_and_comes_in() {
    let agent = Agent::start();
    tree(&agent.path("source"));
    let archive = agent.stream(&pack(&agent, "source")).output();
    let here = tempfile::tempdir().expect("temporary folder");
    kiln_tree::unpack_as(&archive[..], &here.path().join("copy"), &UnpackOptions::host()).expect("unpacked");
    check(&here.path().join("copy"));

    let mut stream = agent.stream(&unpack(&agent, "new/parents/copy"));
    for piece in archive.chunks(50_000) {
        stream.send(Kind::Stdin, piece);
    }
    // Writers fill their last record up.
    stream.send(Kind::Stdin, &[0; 10240]);
    stream.end_of_file();
    assert_eq!(stream.output(), b"");
    check(&agent.path("new/parents/copy"));
    until("the helpers are reaped", || children(agent.pid()).is_empty());
}

#[test]
fn a_lone_file_is_packed_under_its_name() {
    let agent = Agent::start();
    fs::write(agent.path("file"), b"content").expect("written");
    let archive = agent.stream(&pack(&agent, "file")).output();
    let here = tempfile::tempdir().expect("temporary folder");
    kiln_tree::unpack_into(&archive[..], here.path(), &UnpackOptions::host()).expect("unpacked");
    assert_eq!(fs::read(here.path().join("file")).expect("there"), b"content");
}

#[test]
fn simple_mistakes_are_refused_in_the_answer() {
    let agent = Agent::start();
    fs::write(agent.path("file"), b"").expect("written");
    agent.refused(&pack(&agent, "missing"), Some(2));
    agent.refused(&unpack(&agent, "file"), Some(17));
    agent.refused(&unpack(&agent, "file/folder"), Some(20));
    agent.refused(r#"{"action":"pack","path":"a\u0000b"}"#, None);
    assert_eq!(children(agent.pid()), [0; 0]);
}

#[test]
fn a_bad_archive_is_an_error_and_what_came_before_it_stays() {
    let agent = Agent::start();
    let mut stream = agent.stream(&unpack(&agent, "copy"));
    stream.send(Kind::Stdin, &pattern(5000));
    stream.end_of_file();
    let failure = stream.failure();
    assert_eq!(failure, Failure::Other("malformed archive: header checksum".to_owned()));

    tree(&agent.path("source"));
    let archive = agent.stream(&pack(&agent, "source")).output();
    let mut stream = agent.stream(&unpack(&agent, "copy"));
    stream.send(Kind::Stdin, &archive[..archive.len() - 2048]);
    stream.end_of_file();
    assert_eq!(stream.failure(), Failure::Other("the archive is cut short".to_owned()));
    assert_eq!(fs::read(agent.path("copy/a/b/small")).expect("there"), b"small");
}

#[test]
fn a_full_disk_is_told_with_its_number() {
    let agent = Agent::start();
    tree(&agent.path("source"));
    let archive = agent.stream(&pack(&agent, "source")).output();
    let _disk = SmallDisk::new(agent.path("disk"), 1024);
    let mut stream = agent.stream(&unpack(&agent, "disk/copy"));
    for piece in archive.chunks(50_000) {
        // The host may still be sending when the error is there.
        stream.send(Kind::Stdin, piece);
    }
    stream.end_of_file();
    let failure = stream.failure();
    assert!(
        matches!(&failure, Failure::System { errno: 28, detail } if detail.contains("No space left") && detail.contains("a/large")),
        "{failure:?}"
    );
}

#[test]
fn a_tree_that_cannot_be_packed_to_its_end_is_an_error() {
    let agent = Agent::start();
    tree(&agent.path("source"));
    fs::create_dir_all(agent.path("source/z-deep").join("d/".repeat(600))).expect("made");
    let (archive, last) = agent.stream(&pack(&agent, "source")).drain();
    let failure = Failure::decode(&last.payload);
    assert!(matches!(&failure, Failure::Other(text) if text.contains("nested more than 512 folders")), "{failure:?}");
    // Nobody takes what has come for a whole archive.
    let here = tempfile::tempdir().expect("temporary folder");
    let unpacked = kiln_tree::unpack_into(&archive[..], here.path(), &UnpackOptions::host());
    assert!(matches!(unpacked, Err(UnpackError::Truncated)), "{unpacked:?}");
    // The system's number comes along where there is one: what is unpacked may be in the way of itself.
    let whole = agent.stream(&pack(&agent, "source/a")).output();
    fs::create_dir_all(agent.path("copy/large/full")).expect("made");
    let mut stream = agent.stream(&unpack(&agent, "copy"));
    stream.send(Kind::Stdin, &whole);
    stream.end_of_file();
    let failure = stream.failure();
    assert!(matches!(&failure, Failure::System { errno: 39, detail } if detail.contains("large")), "{failure:?}");
}

#[test]
fn the_helper_ends_with_its_host_and_knows_nothing_of_the_agents_surroundings() {
    let agent = Agent::start();
    let mut stream = agent.stream(&unpack(&agent, "copy"));
    stream.send(Kind::Stdin, &pattern(100));
    let helpers = children(agent.pid());
    assert_eq!(helpers.len(), 1);
    let environ = fs::read(format!("/proc/{}/environ", helpers[0])).expect("it runs");
    assert_eq!(environ, b"");
    // Others are served meanwhile.
    assert!(agent.ask(r#"{"action":"probe"}"#).ok);
    drop(stream);
    until("the helper is gone, and reaped", || children(agent.pid()).is_empty());

    fs::write(agent.path("large"), pattern(8 << 20)).expect("written");
    let stream = agent.stream(&pack(&agent, "large"));
    assert_eq!(children(agent.pid()).len(), 1, "nobody reads, so it cannot be done");
    drop(stream);
    until("the helper is gone, and reaped", || children(agent.pid()).is_empty());
}

#[test]
fn a_helper_that_is_killed_is_an_error() {
    let agent = Agent::start();
    let mut stream = agent.stream(&unpack(&agent, "copy"));
    stream.send(Kind::Signal, &[9]);
    assert_eq!(stream.failure(), Failure::Other("the helper process ended with code 137".to_owned()));
}
