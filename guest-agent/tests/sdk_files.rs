//! The SDK's files and TCP connections over the agent's socket, dropped at every await: nothing half-written, nothing left.

mod support;

use std::fs;
use std::path::Path;
use std::time::Duration;

use kiln::files::FileError;
use kiln::files::GuestFiles;
use kiln::tcp::GuestTcpStream;
use kiln::tcp::TcpForwarder;
use support::Agent;
use support::PATIENCE;
use tokio::io::AsyncReadExt;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpListener;
use tokio::net::TcpStream;
use tokio::time::timeout;

/// Bytes in which a piece that is lost, doubled or moved shows.
fn pattern(len: usize) -> Vec<u8> {
    (0..len / 4 + 1).flat_map(|index| (index as u32).to_le_bytes()).take(len).collect()
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

/// The names in a folder, sorted.
fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).expect("there").map(|entry| entry.expect("readable").file_name());
    let mut names: Vec<_> = entries.map(|name| name.to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

async fn names_become(folder: &Path, expected: &[&str]) {
    let settled = timeout(PATIENCE, async {
        while names(folder) != expected {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    settled.await.unwrap_or_else(|_| panic!("{:?} are left", names(folder)));
}

/// Polls `future` `polls` times, giving everything else a turn in between, then drops it; true once it finished earlier.
async fn poll_and_drop<F: Future>(future: F, polls: usize) -> bool {
    let mut future = Box::pin(future);
    for _ in 0..polls {
        if futures::poll!(&mut future).is_ready() {
            return true;
        }
        tokio::time::sleep(Duration::from_micros(100)).await;
    }
    false
}

#[tokio::test]
async fn whole_files_of_every_size_go_in_and_come_back() {
    let agent = Agent::start().await;
    let files = GuestFiles::new(agent.socket());
    let path = text(&agent.folder().join("file"));
    for size in [0, 1, 65_535, 256 << 10, (256 << 10) + 1, 9 << 20] {
        let content = pattern(size);
        files.write(&path, &content).await.expect("written");
        assert!(fs::read(&path).expect("there") == content, "{size} bytes differ on disk");
        assert!(files.read(&path).await.expect("read") == content, "{size} bytes differ");
    }
    assert_eq!(names(agent.folder()), ["exec.sock", "file"]);
}

#[tokio::test]
async fn writing_dropped_at_any_await_leaves_the_old_file_or_the_new() {
    let agent = Agent::start().await;
    let files = GuestFiles::new(agent.socket());
    let path = agent.folder().join("file");
    let mut finished = 0;
    for size in [1000, 2 << 20] {
        for polls in 0..60 {
            fs::write(&path, "old").expect("written");
            finished += usize::from(poll_and_drop(files.write(text(&path), pattern(size)), polls).await);
            names_become(agent.folder(), &["exec.sock", "file"]).await;
            let found = fs::read(&path).expect("there");
            assert!(found == b"old" || found == pattern(size), "{} bytes after {polls} polls", found.len());
        }
    }
    assert!(finished > 0, "no write was ever polled to its end");
}

#[tokio::test]
async fn copies_dropped_at_any_await_can_be_repeated() {
    let agent = Agent::start().await;
    let files = GuestFiles::new(agent.socket());
    let host = tempfile::tempdir().expect("a folder");
    let (tree, there, back) = (host.path().join("tree"), agent.folder().join("there"), host.path().join("back"));
    fs::create_dir_all(tree.join("sub")).expect("made");
    fs::write(tree.join("sub/file"), pattern(1 << 20)).expect("written");
    for polls in 0..40 {
        poll_and_drop(files.copy_in(&tree, text(&there)), polls).await;
        poll_and_drop(files.copy_out(text(&tree), &back), polls).await;
    }
    files.copy_in(&tree, text(&there)).await.expect("copied in");
    files.copy_out(text(&there), &back).await.expect("copied out");
    for copy in [there, back] {
        assert!(fs::read(copy.join("sub/file")).expect("there") == pattern(1 << 20));
    }
}

#[tokio::test]
async fn reading_and_opening_dropped_at_any_await_leave_nothing() {
    let agent = Agent::start().await;
    let files = GuestFiles::new(agent.socket());
    let path = agent.folder().join("file");
    fs::write(&path, pattern(1 << 20)).expect("written");
    for polls in 0..40 {
        poll_and_drop(files.read(text(&path)), polls).await;
        poll_and_drop(files.open_read(text(&path)), polls).await;
        poll_and_drop(files.open_write(text(&path)), polls).await;
        names_become(agent.folder(), &["exec.sock", "file"]).await;
    }
    // A reader whose reads are dropped goes on where it was.
    let mut reader = files.open_read(text(&path)).await.expect("opened");
    let mut content = Vec::new();
    while content.len() < 1 << 20 {
        poll_and_drop(reader.read_buf(&mut content), 1).await;
    }
    assert!(content == pattern(1 << 20));
}

#[tokio::test]
async fn a_writer_tells_why_the_agent_stopped_taking() {
    let mut agent = Agent::start().await;
    let files = GuestFiles::new(agent.socket());
    let mut writer = files.open_write(text(&agent.folder().join("file"))).await.expect("opened");
    writer.write_all(b"some").await.expect("taken");
    agent.kill();
    let failed = timeout(PATIENCE, async {
        while writer.write_all(&[0; 65536]).await.is_ok() {}
        writer.shutdown().await
    });
    failed.await.expect("no hang").expect_err("the file is not there");
    let error = files.read("/etc/hostname").await.expect_err("nobody there");
    assert!(matches!(error, FileError::Guest { .. }), "{error:?}");
}

#[tokio::test]
async fn connections_dropped_at_any_await_reach_the_server_as_closed() {
    let agent = Agent::start().await;
    let server = TcpListener::bind("127.0.0.1:0").await.expect("binds");
    let port = server.local_addr().expect("bound").port();
    let connector = agent.connector();
    for polls in 0..20 {
        poll_and_drop(GuestTcpStream::connect(&*connector, port), polls).await;
    }
    drop(GuestTcpStream::connect(&*connector, port).await.expect("connects"));
    // Whatever was accepted is over.
    loop {
        let Ok(accepted) = timeout(Duration::from_millis(500), server.accept()).await else { break };
        let (mut stream, _) = accepted.expect("accepts");
        let end = timeout(PATIENCE, stream.read(&mut [0; 1])).await.expect("no hang");
        assert!(!matches!(end, Ok(1..)), "{end:?}");
    }
}

#[tokio::test]
async fn a_forwarded_connection_half_closes_both_ways_and_passes_resets_on() {
    let agent = Agent::start().await;
    let server = TcpListener::bind("127.0.0.1:0").await.expect("binds");
    let port = server.local_addr().expect("bound").port();
    let forwarder =
        TcpForwarder::bind("127.0.0.1:0".parse().expect("an address"), port, agent.connector()).await.expect("binds");
    let connect = || TcpStream::connect(forwarder.local_addr());

    // The client first.
    let mut client = connect().await.expect("connects");
    let (mut served, _) = server.accept().await.expect("accepts");
    client.write_all(b"question").await.expect("sent");
    client.shutdown().await.expect("half-closed");
    let mut heard = String::new();
    served.read_to_string(&mut heard).await.expect("an end of file");
    served.write_all(b"answer").await.expect("the other half is open");
    drop(served);
    let mut answer = String::new();
    client.read_to_string(&mut answer).await.expect("an end of file");
    assert_eq!((heard.as_str(), answer.as_str()), ("question", "answer"));

    // The server first.
    let mut client = connect().await.expect("connects");
    let (mut served, _) = server.accept().await.expect("accepts");
    served.shutdown().await.expect("half-closed");
    assert_eq!(client.read(&mut [0; 1]).await.expect("an end of file"), 0);
    client.write_all(b"still").await.expect("the other half is open");
    client.shutdown().await.expect("half-closed");
    let mut heard = String::new();
    served.read_to_string(&mut heard).await.expect("an end of file");
    assert_eq!(heard, "still");

    // A reset.
    let mut client = connect().await.expect("connects");
    let (served, _) = server.accept().await.expect("accepts");
    served.set_zero_linger().expect("set");
    drop(served);
    let reset = timeout(PATIENCE, client.read(&mut [0; 1])).await.expect("no hang").expect_err("no end of file");
    assert_eq!(reset.kind(), std::io::ErrorKind::ConnectionReset);
}
