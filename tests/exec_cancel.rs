//! Futures of the exec layer that are dropped at each of their awaits: what was to happen happens or does not, and nothing stays behind.

#[path = "support/scripted.rs"]
mod scripted;

use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use kiln::ExecSocket;
use kiln::TcpForwarder;
use kiln::exec::Control;
use kiln::exec::control;
use kiln::exec::probe;
use scripted::EXIT_0;
use scripted::Streams;
use scripted::command;
use scripted::hear;
use scripted::hung_up;
use scripted::say;
use tokio::io::DuplexStream;

const DEADLINE: Duration = Duration::from_secs(60);

/// Polls `future` `polls` times, with turns for everybody else in between, then drops it; true once it finished earlier.
async fn poll_and_drop<F: Future>(future: F, polls: usize) -> bool {
    let mut future = Box::pin(future);
    for _ in 0..polls {
        if futures::poll!(&mut future).is_ready() {
            return true;
        }
        tokio::task::yield_now().await;
    }
    false
}

/// The frames up to the host's hang-up or the `last` one.
async fn frames(agent: &mut DuplexStream, last: (u8, &[u8])) -> Vec<(u8, Vec<u8>)> {
    let mut heard = Vec::new();
    loop {
        let frame = hear(agent).await;
        let done = (frame.0, &frame.1[..]) == last;
        heard.push(frame);
        if done {
            return heard;
        }
    }
}

#[tokio::test]
async fn a_signal_or_size_that_is_given_up_was_sent_whole_or_not_at_all() {
    let (command, mut agent) = command();
    let child = command.spawn().await.expect("spawns");
    for polls in 0..4 {
        // More than may wait, so that some of them have to.
        for number in 1..=40 {
            poll_and_drop(child.signal(number), polls).await;
            poll_and_drop(child.resize(u16::from(number), 1), polls).await;
        }
    }
    child.signal(63).await.expect("running");
    for (kind, payload) in frames(&mut agent, (4, &[63])).await {
        assert!(matches!((kind, payload.len()), (0xff, _) | (4, 1) | (3, 4)), "{kind} {payload:?}");
    }
}

#[tokio::test]
async fn a_kill_that_is_given_up_still_kills() {
    for polls in 1..4 {
        let (command, mut agent) = command();
        let mut child = command.spawn().await.expect("spawns");
        assert!(!poll_and_drop(child.kill(), polls).await);
        frames(&mut agent, (4, &[9])).await;
        say(&mut agent, &[EXIT_0]).await;
        // The session goes on, and so does the child.
        child.wait().await.expect("ends");
    }
}

#[tokio::test]
async fn a_wait_with_output_that_is_given_up_ends_the_session() {
    for polls in 0..4 {
        let (command, mut agent) = command();
        let child = command.spawn().await.expect("spawns");
        assert!(!poll_and_drop(child.wait_with_output(), polls).await);
        hung_up(&mut agent).await;
    }
}

#[tokio::test]
async fn an_action_that_is_given_up_hangs_up() {
    for polls in 1..5 {
        let (streams, mut agent) = Streams::one(1 << 16);
        assert!(!poll_and_drop(probe(&*streams, DEADLINE), polls).await);
        hung_up(&mut agent).await;
        let mut agent = streams.add(1 << 16);
        assert!(!poll_and_drop(control(&*streams, &Control::Sync, DEADLINE), polls).await);
        hung_up(&mut agent).await;
    }
    let (streams, _agent) = Streams::one(1 << 16);
    assert!(!poll_and_drop(probe(&*streams, DEADLINE), 0).await);
    assert_eq!(streams.0.lock().expect("no panic").len(), 1, "a future that was never polled connects to nothing");
}

#[tokio::test]
async fn a_socket_whose_making_is_given_up_can_be_made() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("exec.sock");
    let bind = || ExecSocket::bind(&path, Arc::new(Streams::default()));
    for polls in 0..200 {
        if poll_and_drop(bind(), polls).await {
            break;
        }
        // What is left, if anything, is what the next attempt replaces.
        let names = std::fs::read_dir(folder.path()).expect("there").map(|entry| entry.expect("readable").path());
        assert!(names.into_iter().all(|name| name == path), "after {polls} polls");
    }
    drop(bind().await.expect("made"));
    assert_eq!(std::fs::read_dir(folder.path()).expect("there").count(), 0);
}

#[tokio::test]
async fn a_forwarder_whose_making_is_given_up_leaves_its_port() {
    let address = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port").local_addr().expect("bound");
    let bind = || TcpForwarder::bind(address, 80, Arc::new(Streams::default()));
    assert!(!poll_and_drop(bind(), 0).await);
    let made = bind().now_or_never();
    drop(made);
    let again = async {
        while bind().await.is_err() {
            // The first one's listener goes with its task.
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(DEADLINE, again).await.expect("the port is free");
}
