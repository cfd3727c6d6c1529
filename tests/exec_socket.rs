//! A guest's agent behind a Unix socket: who may open it, what is in its place, and when it goes.

#[path = "support/scripted.rs"]
mod scripted;

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener as BlockingListener;
use std::path::PathBuf;
use std::sync::Arc;

use kiln::ExecBuilder;
use kiln::ExecError;
use kiln::ExecSocket;
use kiln::exec::AgentInfo;
use scripted::EXIT_0;
use scripted::Streams;
use scripted::frame;
use scripted::hear;
use scripted::hung_up;
use scripted::say;

fn place() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("exec.sock");
    (folder, path)
}

fn command(path: &PathBuf) -> ExecBuilder {
    ExecBuilder::new(path).agent(AgentInfo::new(5)).argv(["program"])
}

#[tokio::test]
async fn sessions_pass_through_unchanged() {
    let (_folder, path) = place();
    let (streams, mut agent) = Streams::one(1 << 16);
    let socket = ExecSocket::bind(&path, streams.clone()).await.expect("bound");
    assert_eq!(socket.path(), path);
    assert_eq!(fs::metadata(&path).expect("there").mode() & 0o7777, 0o600);
    let running = tokio::spawn(command(&path).output());
    assert_eq!(hear(&mut agent).await, (0xff, br#"{"argv":["program"],"tty":false}"#.to_vec()));
    say(&mut agent, &[&frame(1, b"hello"), EXIT_0]).await;
    assert_eq!(running.await.expect("no panic").expect("ends").stdout, b"hello");
    // Another connection is another session; one that the guest refuses closes.
    let refused = command(&path).output().await.expect_err("there is no second stream");
    assert!(matches!(refused, ExecError::AgentGone(_)), "{refused:?}");
}

#[tokio::test]
async fn a_host_that_leaves_is_a_guests_connection_that_closes() {
    let (_folder, path) = place();
    let (streams, mut agent) = Streams::one(1 << 16);
    let _socket = ExecSocket::bind(&path, streams).await.expect("bound");
    let child = command(&path).spawn().await.expect("spawns");
    assert_eq!(hear(&mut agent).await.0, 0xff);
    drop(child);
    hung_up(&mut agent).await;
}

#[tokio::test]
async fn dropping_it_removes_the_socket_and_ends_its_sessions() {
    let (folder, path) = place();
    let (streams, mut agent) = Streams::one(1 << 16);
    let socket = ExecSocket::bind(&path, streams).await.expect("bound");
    let mut child = command(&path).spawn().await.expect("spawns");
    assert_eq!(hear(&mut agent).await.0, 0xff);
    drop(socket);
    assert_eq!(fs::read_dir(folder.path()).expect("there").count(), 0);
    let error = child.wait().await.expect_err("cut off");
    assert!(matches!(error, ExecError::AgentGone(_)), "{error:?}");
    hung_up(&mut agent).await;
}

#[tokio::test]
async fn what_is_in_its_place_stays_unless_it_is_a_dead_socket() {
    let (folder, path) = place();
    let bind = || ExecSocket::bind(&path, Arc::new(Streams::default()));
    fs::write(&path, "precious").expect("written");
    assert_eq!(bind().await.expect_err("a file").kind(), io::ErrorKind::AddrInUse);
    assert_eq!(fs::read(&path).expect("there"), b"precious");
    fs::remove_file(&path).expect("removed");

    let listener = BlockingListener::bind(&path).expect("binds");
    assert_eq!(bind().await.expect_err("somebody listens").kind(), io::ErrorKind::AddrInUse);
    drop(listener);
    let socket = bind().await.expect("nobody listens any more");
    assert_eq!(bind().await.expect_err("we listen").kind(), io::ErrorKind::AddrInUse);
    assert!(path.exists());
    drop(socket);
    assert_eq!(fs::read_dir(folder.path()).expect("there").count(), 0, "no debris");
    let missing = ExecSocket::bind(folder.path().join("none/sock"), Arc::new(Streams::default())).await;
    assert_eq!(missing.expect_err("no folder").kind(), io::ErrorKind::NotFound);
}
