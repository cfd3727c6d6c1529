//! The exec layer against agents that lie, stall or vanish: typed errors, never a success, never a panic.

#[path = "support/scripted.rs"]
mod scripted;

use std::io;
use std::os::unix::process::ExitStatusExt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Context;
use std::task::Poll;
use std::time::Duration;

use futures::future::BoxFuture;
use kiln::exec::ExecBuilder;
use kiln::exec::ExecError;
use kiln::exec::probe;
use kiln::exec::wait_ready;
use kiln::transport::Connector;
use kiln::transport::GuestStream;
use scripted::EXIT_0;
use scripted::Streams;
use scripted::command;
use tokio::io::AsyncRead;
use tokio::io::AsyncReadExt;
use tokio::io::AsyncWrite;
use tokio::io::AsyncWriteExt;
use tokio::io::ReadBuf;
use tokio::time::Instant;

/// Runs a command against an agent that says `script` and closes.
async fn against(script: &[u8]) -> Result<kiln::exec::ExecOutcome, ExecError> {
    let (command, mut agent) = command();
    agent.write_all(script).await.expect("the stream has room");
    // Half-closed: what the host sends still finds a reader.
    agent.shutdown().await.expect("open");
    command.output().await
}

#[tokio::test]
async fn the_opening_is_a_request_and_an_end_of_file() {
    let (command, mut agent) = command();
    agent.write_all(EXIT_0).await.expect("room");
    let out = command.env("A", "b").cwd("/c").user("d").output().await.expect("ends");
    assert!(out.success() && out.peak_rss_kib.is_none());
    let mut sent = Vec::new();
    agent.read_to_end(&mut sent).await.expect("closed by the host");
    let json = br#"{"argv":["program"],"env":{"A":"b"},"cwd":"/c","user":"d","tty":false}"#;
    let header = [0xff, 0, 0, 0, u8::try_from(json.len()).expect("short")];
    assert_eq!(sent, [&header[..], json, &[0, 0, 0, 0, 0]].concat(), "{}", String::from_utf8_lossy(&sent));
}

#[tokio::test]
async fn frames_and_fields_of_the_future_are_skipped() {
    let script = [&[0x42, 0, 0, 0, 3, 1, 2, 3, 1, 0, 0, 0, 2, b'h', b'i'][..], EXIT_0].concat();
    assert_eq!(against(&script).await.expect("ends").stdout, b"hi");
}

#[tokio::test]
async fn exit_127_without_a_text_is_an_exit() {
    let out = against(&[5, 0, 0, 0, 4, 0, 0, 0, 127]).await.expect("ends");
    assert_eq!(out.status.code(), Some(127));
}

#[tokio::test]
async fn a_connection_that_closes_without_exit_is_never_a_success() {
    for script in
        [&b""[..], &[1, 0, 0, 0, 2, b'h', b'i'], &[5, 0, 0, 0, 4, 0, 0], &[1, 0, 0, 0, 9, b'h', b'i'], &[5, 0]]
    {
        let error = against(script).await.expect_err("no exit");
        assert!(matches!(&error, ExecError::AgentGone(_)), "{script:?}: {error:?}");
        assert_eq!(io::Error::from(error).kind(), io::ErrorKind::UnexpectedEof);
    }
}

#[tokio::test]
async fn what_the_protocol_forbids_is_a_violation() {
    let oversize = [1, 1, 0, 0, 1];
    let exit_of_five = [5, 0, 0, 0, 5, 0, 0, 0, 0, 0];
    let request = [0xff, 0, 0, 0, 2, b'{', b'}'];
    let stdin = [0, 0, 0, 0, 0];
    for script in [&oversize[..], &exit_of_five, &request, &stdin] {
        let error = against(script).await.expect_err("forbidden");
        assert!(matches!(&error, ExecError::Protocol { .. }), "{script:?}: {error:?}");
        assert_eq!(io::Error::from(error).kind(), io::ErrorKind::InvalidData);
    }
}

#[tokio::test]
async fn an_error_in_other_words_is_kept_as_text() {
    let error = against(&[6, 0, 0, 0, 4, b'o', 0xff, b'p', b's']).await.expect_err("refused");
    assert!(matches!(&error, ExecError::Refused { text } if text == "o\u{fffd}ps"), "{error:?}");
}

#[tokio::test(start_paused = true)]
async fn a_timeout_is_answered_within_its_promise_by_a_silent_agent() {
    let (command, mut agent) = command();
    let before = Instant::now();
    let out = command.timeout(Duration::from_secs(3)).output().await.expect("an outcome");
    assert!(out.timed_out);
    assert_eq!(out.status.signal(), Some(9));
    assert!(before.elapsed() <= Duration::from_millis(3250), "{:?}", before.elapsed());
    // It asked for the kill, and then hung up.
    let mut sent = Vec::new();
    agent.read_to_end(&mut sent).await.expect("closed by the host");
    assert!(sent.ends_with(&[4, 0, 0, 0, 1, 9]), "{sent:?}");
}

// In real time: a paused clock stands still while anybody has work, and here somebody always has.
#[tokio::test]
async fn a_timeout_holds_against_an_agent_that_never_stops_talking() {
    let (command, agent) = command();
    let (mut hear, mut say) = tokio::io::split(agent);
    let flood = tokio::spawn(async move { while say.write_all(&[1, 0, 0, 0, 2, b'y', b'\n']).await.is_ok() {} });
    let deaf = tokio::spawn(async move { tokio::io::copy(&mut hear, &mut tokio::io::sink()).await });
    let before = std::time::Instant::now();
    let mut child = command.timeout(Duration::from_millis(50)).spawn().await.expect("spawns");
    let stdout = child.stdout.take();
    assert_eq!(child.wait().await.expect("an answer").signal(), Some(9));
    assert!(before.elapsed() < Duration::from_millis(300), "{:?}", before.elapsed());
    assert!(child.timed_out());
    drop((child, stdout));
    flood.await.expect("the host hung up");
    deaf.await.expect("no panic").expect("the host hung up");
}

#[tokio::test(start_paused = true)]
async fn a_kill_that_nobody_confirms_ends_the_session() {
    let (command, _agent) = command();
    let mut child = command.spawn().await.expect("spawns");
    let error = child.kill().await.expect_err("no exit was seen");
    assert!(matches!(error, ExecError::AgentGone(_)), "{error:?}");
}

#[tokio::test(start_paused = true)]
async fn connecting_has_a_deadline_of_its_own() {
    #[derive(Debug)]
    struct Never;
    impl Connector for Never {
        fn connect(&self, _port: u32) -> BoxFuture<'_, io::Result<Box<dyn GuestStream>>> {
            Box::pin(std::future::pending())
        }
    }
    let error = ExecBuilder::over(Arc::new(Never)).argv(["program"]).spawn().await.expect_err("never");
    assert!(matches!(error, ExecError::Timeout { .. }), "{error:?}");
    let before = Instant::now();
    let error = wait_ready(&Never, Duration::from_secs(5)).await.expect_err("never");
    assert!(matches!(error, ExecError::Timeout { .. }), "{error:?}");
    assert!(before.elapsed() <= Duration::from_secs(5));
    let out = ExecBuilder::over(Arc::new(Never)).argv(["program"]).timeout(Duration::from_secs(1)).output().await;
    assert!(out.expect("an outcome").timed_out);
}

#[tokio::test]
async fn a_probe_believes_only_an_agent() {
    for (script, why) in [(&b"{\"ok\":true}"[..], "no version"), (b"[]", "no object"), (b"{\"ok\":", "half an answer")]
    {
        let (streams, mut agent) = Streams::one(1 << 10);
        agent.write_all(&[0xfe, 0, 0, 0, u8::try_from(script.len()).expect("short")]).await.expect("room");
        agent.write_all(script).await.expect("room");
        let error = probe(&*streams, Duration::from_secs(60)).await.expect_err(why);
        assert!(matches!(error, ExecError::Protocol { .. }), "{why}: {error:?}");
    }
}

#[tokio::test]
async fn waiting_for_an_agent_outlasts_refusals() {
    let connector = Arc::new(Streams::default());
    let waiting = tokio::spawn({
        let connector = Arc::clone(&connector);
        async move { wait_ready(&*connector, Duration::from_secs(60)).await }
    });
    tokio::task::yield_now().await;
    let mut agent = connector.add(1 << 10);
    let mut probe = vec![0; 5 + br#"{"action":"probe"}"#.len()];
    agent.read_exact(&mut probe).await.expect("it tried again");
    agent.write_all(&[0xfe, 0, 0, 0, 24]).await.expect("room");
    agent.write_all(br#"{"ok":true,"protocol":5}"#).await.expect("room");
    assert_eq!(waiting.await.expect("no panic").expect("answers").protocol, 5);
}

#[tokio::test]
async fn a_deadline_beyond_the_clock_is_none() {
    let (streams, mut agent) = Streams::one(1 << 10);
    agent.write_all(&[0xfe, 0, 0, 0, 24]).await.expect("room");
    agent.write_all(br#"{"ok":true,"protocol":5}"#).await.expect("room");
    assert_eq!(wait_ready(&*streams, Duration::MAX).await.expect("answers").protocol, 5);
}

/// A stream that always has one more empty STDOUT frame, and takes whatever is written.
#[derive(Debug)]
struct Flood {
    /// Where in a frame the next byte is.
    at: usize,
}

impl AsyncRead for Flood {
    fn poll_read(mut self: Pin<&mut Self>, _: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        while into.remaining() > 0 {
            into.put_slice(&[[1, 0, 0, 0, 0][self.at]]);
            self.at = (self.at + 1) % 5;
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Flood {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

impl Connector for Flood {
    fn connect(&self, _port: u32) -> BoxFuture<'_, io::Result<Box<dyn GuestStream>>> {
        Box::pin(async { Ok(Box::new(Self { at: 0 }) as Box<dyn GuestStream>) })
    }
}

/// On a thread of its own: an exec that a flood keeps busy would take the test's runtime with it.
#[test]
fn a_flood_does_not_outrun_the_timeout() {
    let (sender, outcome) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let command = ExecBuilder::over(Arc::new(Flood { at: 0 })).argv(["program"]).timeout(Duration::from_millis(50));
        sender.send(runtime.block_on(command.output()))
    });
    let outcome = outcome.recv_timeout(Duration::from_secs(20)).expect("the timeout comes").expect("an outcome");
    assert!(outcome.timed_out);
}
