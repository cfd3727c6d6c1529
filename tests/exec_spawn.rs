//! What `spawn` knows when it returns: a process that runs, or why none does.

#[path = "support/scripted.rs"]
mod scripted;

use std::os::unix::process::ExitStatusExt;
use std::time::Duration;

use futures::FutureExt;
use kiln::ExecBuilder;
use kiln::ExecError;
use scripted::EXIT_0;
use scripted::Streams;
use scripted::command;
use scripted::confirmed_command;
use scripted::frame;
use scripted::hear;
use scripted::hung_up;
use scripted::say;
use tokio::io::AsyncReadExt;
use tokio::io::AsyncWriteExt;

const STARTED: [u8; 9] = [7, 0, 0, 0, 4, 0, 0, 0x12, 0x67];

#[tokio::test]
async fn the_start_is_awaited_and_brings_the_id() {
    let (command, mut agent) = confirmed_command();
    let spawning = tokio::spawn(command.spawn());
    let (kind, request) = hear(&mut agent).await;
    assert_eq!((kind, &request[..]), (0xff, &br#"{"argv":["program"],"tty":false,"started":true}"#[..]));
    assert!(!spawning.is_finished());
    say(&mut agent, &[&STARTED]).await;
    let mut child = spawning.await.expect("no panic").expect("started");
    assert_eq!(child.id(), Some(0x1267));
    say(&mut agent, &[EXIT_0]).await;
    assert!(child.wait().await.expect("ends").success());
    assert_eq!(child.id(), None);
}

#[tokio::test]
async fn a_program_that_cannot_start_fails_the_spawn() {
    for (text, expected) in [
        ("not found: nope", ExecError::NotFound { program: "nope".to_owned() }),
        ("not executable: x: no", ExecError::NotExecutable { detail: "x: no".to_owned() }),
        ("bad cwd: /x: no", ExecError::BadCwd { detail: "/x: no".to_owned() }),
        ("unknown user: bob", ExecError::UnknownUser { user: "bob".to_owned() }),
        ("bad request: argv", ExecError::BadRequest { detail: "argv".to_owned() }),
        ("errno 12: no memory", ExecError::System { errno: 12, detail: "no memory".to_owned() }),
        ("something else", ExecError::Refused { text: "something else".to_owned() }),
    ] {
        let (command, mut agent) = confirmed_command();
        say(&mut agent, &[&frame(6, text.as_bytes())]).await;
        let error = command.spawn().await.expect_err(text);
        assert_eq!(error.to_string(), expected.to_string());
        assert_eq!(error.kind(), expected.kind());
    }
}

#[tokio::test]
async fn output_counts_as_a_start() {
    let (command, mut agent) = confirmed_command();
    say(&mut agent, &[&frame(1, b"hi"), EXIT_0]).await;
    let child = command.spawn().await.expect("it runs, whether or not that was said");
    assert_eq!(child.id(), None);
    assert_eq!(child.wait_with_output().await.expect("ends").stdout, b"hi");
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_never_confirms_is_given_up() {
    let (command, mut agent) = confirmed_command();
    let error = command.spawn().await.expect_err("silence");
    assert!(matches!(error, ExecError::Timeout { .. }), "{error:?}");
    hung_up(&mut agent).await;
}

#[tokio::test(start_paused = true)]
async fn a_timeout_holds_while_the_start_is_awaited() {
    let (command, _agent) = confirmed_command();
    let before = tokio::time::Instant::now();
    let mut child = command.timeout(Duration::from_secs(1)).spawn().await.expect("a child that timed out");
    assert_eq!(child.wait().await.expect("an answer").signal(), Some(9));
    assert!(child.timed_out());
    assert!(before.elapsed() < Duration::from_millis(1250), "{:?}", before.elapsed());
}

#[tokio::test]
async fn a_spawn_cancelled_at_any_await_hangs_up() {
    for polls in 0..6 {
        let (command, mut agent) = confirmed_command();
        let mut spawning = command.kill_on_drop(false).spawn().boxed();
        for _ in 0..polls {
            assert!(spawning.as_mut().now_or_never().is_none());
            tokio::task::yield_now().await;
        }
        drop(spawning);
        hung_up(&mut agent).await;
    }
}

#[tokio::test]
async fn a_child_dropped_before_its_driver_ever_ran_ends_its_handles() {
    let (command, mut agent) = command();
    let mut child = command.spawn().await.expect("spawns");
    let (mut stdin, mut stdout) = (child.stdin.take().expect("piped"), child.stdout.take().expect("piped"));
    let signaller = child.signaller();
    drop(child);
    hung_up(&mut agent).await;
    stdout.read_to_end(&mut Vec::new()).await.expect_err("cut off, which is no end of file");
    stdin.write_all(b"x").await.expect_err("nobody reads");
    assert!(matches!(signaller.signal(15).await, Err(ExecError::Ended)));
}

#[tokio::test]
async fn an_unknown_agent_is_asked_once_for_all_clones() {
    let (streams, mut probe) = Streams::one(1 << 16);
    let builder = ExecBuilder::over(streams.clone()).argv(["program"]);
    say(&mut probe, &[&frame(0xfe, br#"{"ok":true,"protocol":5,"features":["started","juggling"]}"#)]).await;
    let mut first = streams.add(1 << 16);
    say(&mut first, &[&STARTED]).await;
    assert_eq!(builder.clone().spawn().await.expect("started").id(), Some(0x1267));
    assert_eq!(hear(&mut probe).await, (0xfe, br#"{"action":"probe"}"#.to_vec()));

    let mut second = streams.add(1 << 16);
    say(&mut second, &[&STARTED]).await;
    builder.spawn().await.expect("started, without a second probe");
    assert_eq!(hear(&mut second).await.0, 0xff);
}

#[tokio::test]
async fn an_agent_of_another_family_is_not_waited_for() {
    let (streams, mut probe) = Streams::one(1 << 16);
    say(&mut probe, &[&frame(0xfe, br#"{"ok":false,"error":"unknown CONTROL action"}"#)]).await;
    let mut session = streams.add(1 << 16);
    let child = ExecBuilder::over(streams).argv(["program"]).spawn().await.expect("nothing to wait for");
    let (_, request) = hear(&mut session).await;
    assert_eq!(request, br#"{"argv":["program"],"tty":false}"#);
    assert_eq!(child.id(), None);
}

#[tokio::test]
async fn a_session_of_the_first_edition_is_unchanged_on_the_wire() {
    let (command, mut agent) = command();
    let child = command
        .stage_file("/a", b"\x00\xff")
        .stage_file_mode("/b", "text", 0o755)
        .chain(["second", "-x"])
        .chain(["third"])
        .tty(true)
        .winsize(80, 25)
        .spawn()
        .await
        .expect("spawns");
    let (_, request) = hear(&mut agent).await;
    let expected = concat!(
        r#"{"argv":["program"],"tty":true,"cols":80,"rows":25,"#,
        r#""stage_files":[{"path":"/a","data_b64":"AP8="},{"path":"/b","data_b64":"dGV4dA==","mode":493}],"#,
        r#""chain":[["second","-x"],["third"]]}"#
    );
    assert_eq!(String::from_utf8(request).expect("JSON"), expected);
    drop(child);
    let mut rest = Vec::new();
    agent.read_to_end(&mut rest).await.expect("closed");
}
