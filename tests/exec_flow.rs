//! What is kept for a reader that does not read is bounded, and who waits for what.

#[path = "support/scripted.rs"]
mod scripted;

use std::os::unix::process::ExitStatusExt;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use kiln::ExecBuilder;
use kiln::exec::AgentInfo;
use kiln::transport::Connector;
use kiln::transport::GuestStream;
use scripted::EXIT_0;
use scripted::Streams;
use scripted::hung_up;
use scripted::say;
use tokio::io::AsyncReadExt;
use tokio::io::AsyncWriteExt;
use tokio::io::DuplexStream;

/// What lies between the agent and the session in these tests.
const STREAM: usize = 64 << 10;
/// What the documentation says is kept of each output.
const KEPT: usize = 256 << 10;
/// A read of the session's that was under way when it filled up.
const IN_FLIGHT: usize = 64 << 10;

fn command() -> (ExecBuilder, DuplexStream) {
    let (streams, agent) = Streams::one(STREAM);
    (ExecBuilder::over(streams).agent(AgentInfo::new(5)).argv(["program"]), agent)
}

/// Sends frames of `kind` until the host takes no more, and returns how many bytes they held.
async fn flood(agent: &mut DuplexStream, kind: u8, most: usize) -> usize {
    let frame = [&[kind, 0, 0, 16, 0][..], &[b'x'; 4096]].concat();
    let mut sent = 0;
    while sent < most {
        let mut writing = agent.write_all(&frame).boxed();
        // Everything that can run has run after that many turns.
        let mut turns = 0;
        while futures::poll!(&mut writing).is_pending() {
            turns += 1;
            if turns > 1000 {
                return sent;
            }
            tokio::task::yield_now().await;
        }
        sent += 4096;
    }
    sent
}

#[tokio::test]
async fn an_output_that_nobody_reads_is_not_taken_without_bound() {
    for kind in [1, 2] {
        let (command, mut agent) = command();
        let _child = command.spawn().await.expect("spawns");
        let sent = flood(&mut agent, kind, 64 << 20).await;
        assert!((KEPT..KEPT + STREAM + 2 * IN_FLIGHT).contains(&sent), "{sent} bytes were taken");
    }
}

#[tokio::test]
async fn events_that_nobody_polls_are_not_taken_without_bound() {
    let (command, mut agent) = command();
    let _events = command.spawn().await.expect("spawns").events();
    let sent = flood(&mut agent, 1, 64 << 20).await;
    assert!((KEPT..KEPT + STREAM + 2 * IN_FLIGHT).contains(&sent), "{sent} bytes were taken");
}

#[tokio::test]
async fn waiting_takes_everything_and_keeps_a_bounded_part() {
    let (command, mut agent) = command();
    let mut child = command.spawn().await.expect("spawns");
    let flooding = tokio::spawn(async move {
        let sent = flood(&mut agent, 1, 16 << 20).await + flood(&mut agent, 2, 16 << 20).await;
        say(&mut agent, &[EXIT_0]).await;
        sent
    });
    assert!(child.wait().await.expect("ends").success());
    assert_eq!(flooding.await.expect("no panic"), 32 << 20);
    for output in [
        &mut child.stdout.take().expect("piped") as &mut (dyn tokio::io::AsyncRead + Unpin),
        &mut child.stderr.take().expect("piped"),
    ] {
        let mut kept = Vec::new();
        output.read_to_end(&mut kept).await.expect_err("the rest was dropped, and that is said");
        assert!((KEPT..KEPT + IN_FLIGHT).contains(&kept.len()), "{}", kept.len());
    }
}

#[tokio::test]
async fn a_wait_that_is_given_up_loses_nothing_from_then_on() {
    let (command, mut agent) = command();
    let mut child = command.spawn().await.expect("spawns");
    assert!(child.wait().now_or_never().is_none());
    const SENT: usize = 4 << 20;
    let sending = tokio::spawn(async move {
        agent.write_all(&[1, 0, 0x40, 0, 0]).await.expect("the host listens");
        agent.write_all(&vec![b'x'; SENT]).await.expect("the host listens");
        say(&mut agent, &[EXIT_0]).await;
        agent
    });
    for _ in 0..1000 {
        tokio::task::yield_now().await;
    }
    assert!(!sending.is_finished(), "nobody waits, so nothing may be dropped");
    let mut all = Vec::new();
    child.stdout.take().expect("piped").read_to_end(&mut all).await.expect("without a gap");
    assert_eq!(all.len(), SENT);
    drop(sending.await.expect("no panic"));
}

/// A connector that never answers.
#[derive(Debug)]
struct Never;

impl Connector for Never {
    fn connect(&self, _port: u32) -> BoxFuture<'_, std::io::Result<Box<dyn GuestStream>>> {
        Box::pin(std::future::pending())
    }
}

#[tokio::test(start_paused = true)]
async fn a_timeout_holds_on_every_path_when_the_agent_cannot_be_reached() {
    let timeout = Duration::from_secs(3);
    let within = timeout..timeout + Duration::from_millis(250);
    let command = |info: bool| {
        let builder = ExecBuilder::over(Arc::new(Never)).argv(["program"]).timeout(timeout);
        if info { builder.agent(AgentInfo::new(5)) } else { builder }
    };
    for known in [true, false] {
        let before = tokio::time::Instant::now();
        let out = command(known).output().await.expect("an outcome");
        assert!(out.timed_out && within.contains(&before.elapsed()), "{:?}", before.elapsed());

        let before = tokio::time::Instant::now();
        let mut child = command(known).spawn().await.expect("a child that timed out");
        assert_eq!(child.wait().await.expect("an answer").signal(), Some(9));
        assert!(child.timed_out() && within.contains(&before.elapsed()), "{:?}", before.elapsed());
        let mut stdout = child.stdout.take().expect("piped");
        assert_eq!(stdout.read(&mut [0; 1]).await.expect("an end of file"), 0);

        let before = tokio::time::Instant::now();
        assert_eq!(command(known).status().await.expect("a status").signal(), Some(9));
        assert!(within.contains(&before.elapsed()), "{:?}", before.elapsed());
    }
}

#[tokio::test(start_paused = true)]
async fn a_timeout_holds_while_input_is_stuck_and_output_unread() {
    let (command, mut agent) = command();
    let timeout = Duration::from_secs(3);
    let before = tokio::time::Instant::now();
    let mut child = command.timeout(timeout).spawn().await.expect("spawns");
    let mut stdin = child.stdin.take().expect("piped");
    let _stdout = child.stdout.take().expect("piped");
    let writing = tokio::spawn(async move { stdin.write_all(&vec![0; 1 << 20]).await });
    flood(&mut agent, 1, 1 << 20).await;
    assert_eq!(child.wait().await.expect("an answer").signal(), Some(9));
    assert!(child.timed_out() && before.elapsed() < timeout + Duration::from_millis(250), "{:?}", before.elapsed());
    writing.await.expect("no panic").expect_err("the writer notices");
    hung_up(&mut agent).await;
}
