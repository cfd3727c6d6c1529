//! A process as a stream of events: order, ends, backpressure, cancellation.

#[path = "support/scripted.rs"]
mod scripted;

use std::os::unix::process::ExitStatusExt;
use std::time::Duration;

use futures::FutureExt;
use futures::StreamExt;
use kiln::ExecError;
use kiln::ExecEvent;
use kiln::ExecEvents;
use scripted::EXIT_0;
use scripted::command;
use scripted::frame;
use scripted::hear;
use scripted::hung_up;
use scripted::say;
use tokio::io::AsyncReadExt;
use tokio::io::AsyncWriteExt;

/// Everything up to the end, as text: `o:`, `e:` and `x:` for the three kinds.
async fn told(events: ExecEvents) -> Vec<String> {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    events
        .map(|event| match event {
            Ok(ExecEvent::Stdout(bytes)) => format!("o:{}", text(&bytes)),
            Ok(ExecEvent::Stderr(bytes)) => format!("e:{}", text(&bytes)),
            Ok(ExecEvent::Exit(exit)) => format!("x:{:?}", exit.status.code()),
            other => format!("{other:?}"),
        })
        .collect()
        .await
}

#[tokio::test]
async fn events_come_in_the_order_of_the_wire() {
    let (command, mut agent) = command();
    let child = command.spawn().await.expect("spawns");
    let frames = [frame(1, b"A"), frame(2, b"B"), frame(1, b"C"), frame(1, b"D"), frame(2, b"E")];
    // All of it is here before anybody reads, and more comes after.
    say(&mut agent, &frames.each_ref().map(|frame| &frame[..])).await;
    let events = child.events();
    let telling = tokio::spawn(told(events));
    say(&mut agent, &[&frame(1, b"F"), &frame(2, b"G"), &frame(5, &[0, 0, 0, 7])]).await;
    let told = telling.await.expect("no panic");
    let joined = told.concat();
    let letters: String = joined.chars().filter(|letter| "ABCDEFG".contains(*letter)).collect();
    assert_eq!(letters, "ABCDEFG", "{told:?}");
    assert_eq!(told.last().map(String::as_str), Some("x:Some(7)"));
    let kinds = |letter: char| told.iter().find(|event| event.contains(letter)).map(|event| &event[..1]);
    assert_eq!("ABCDEFG".chars().map(|letter| kinds(letter).expect("told")).collect::<String>(), "oeooeoe");
}

#[tokio::test]
async fn the_stream_is_over_after_the_exit() {
    let (command, mut agent) = command();
    let mut events = command.spawn().await.expect("spawns").events();
    say(&mut agent, &[EXIT_0]).await;
    let Some(Ok(ExecEvent::Exit(exit))) = events.next().await else { panic!("an exit") };
    assert!(exit.success() && !exit.timed_out && exit.peak_rss_kib.is_none());
    assert!(events.next().await.is_none() && events.next().await.is_none());
}

#[tokio::test]
async fn a_session_that_fails_ends_with_its_error_behind_what_was_printed() {
    let (command, mut agent) = command();
    let mut events = command.spawn().await.expect("spawns").events();
    say(&mut agent, &[&frame(2, b"on fire")]).await;
    drop(agent);
    assert!(matches!(events.next().await, Some(Ok(ExecEvent::Stderr(bytes))) if bytes == "on fire"));
    assert!(matches!(events.next().await, Some(Err(ExecError::AgentGone(_)))));
    assert!(events.next().await.is_none());
}

#[tokio::test]
async fn standard_input_ends_unless_it_was_taken() {
    let (command_, mut agent) = command();
    let _events = command_.spawn().await.expect("spawns").events();
    assert_eq!(hear(&mut agent).await.0, 0xff);
    assert_eq!(hear(&mut agent).await, (0, Vec::new()));

    let (command_, mut agent) = command();
    let mut child = command_.spawn().await.expect("spawns");
    let mut stdin = child.stdin.take().expect("piped");
    let events = child.events();
    assert_eq!(hear(&mut agent).await.0, 0xff);
    stdin.write_all(b"typed").await.expect("open");
    assert_eq!(hear(&mut agent).await, (0, b"typed".to_vec()));
    events.signaller().signal(15).await.expect("running");
    assert_eq!(hear(&mut agent).await, (4, vec![15]));
    events.signaller().resize(80, 24).await.expect("running");
    assert_eq!(hear(&mut agent).await, (3, vec![0, 80, 0, 24]));
}

#[tokio::test]
async fn an_output_that_was_taken_has_no_events() {
    let (command, mut agent) = command();
    let mut child = command.spawn().await.expect("spawns");
    let mut stdout = child.stdout.take().expect("piped");
    let events = child.events();
    say(&mut agent, &[&frame(1, b"mine"), &frame(2, b"theirs"), EXIT_0]).await;
    assert_eq!(told(events).await, ["e:theirs", "x:Some(0)"]);
    let mut text = String::new();
    stdout.read_to_string(&mut text).await.expect("kept");
    assert_eq!(text, "mine");
}

#[tokio::test]
async fn an_unread_stream_holds_the_agent_back_and_loses_nothing() {
    let (command, mut agent) = command();
    let events = command.spawn().await.expect("spawns").events();
    // More changes from one output to the other than are noted, and far more bytes than are kept.
    const ROUNDS: usize = 20_000;
    let saying = tokio::spawn(async move {
        for round in 0..ROUNDS {
            let digit = [b'0' + u8::try_from(round % 10).expect("a digit")];
            say(&mut agent, &[&frame(1, &digit), &frame(2, &digit)]).await;
        }
        say(&mut agent, &[EXIT_0]).await;
        agent
    });
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    let told = told(events).await;
    drop(saying.await.expect("no panic"));
    assert_eq!(told.len(), 2 * ROUNDS + 1);
    for (index, pair) in told[..2 * ROUNDS].chunks(2).enumerate() {
        assert_eq!(pair, [format!("o:{}", index % 10), format!("e:{}", index % 10)]);
    }
}

#[tokio::test]
async fn a_dropped_stream_hangs_up() {
    let (command, mut agent) = command();
    let events = command.spawn().await.expect("spawns").events();
    drop(events);
    hung_up(&mut agent).await;
}

#[tokio::test]
async fn a_cancelled_wait_for_the_next_event_loses_nothing() {
    let (command, mut agent) = command();
    let mut events = command.spawn().await.expect("spawns").events();
    for index in 0..50_u8 {
        assert!(events.next().now_or_never().is_none());
        say(&mut agent, &[&frame(1, &[index])]).await;
        assert!(matches!(events.next().await, Some(Ok(ExecEvent::Stdout(bytes))) if bytes == [index][..]));
    }
}

#[tokio::test(start_paused = true)]
async fn a_timeout_is_an_exit_behind_what_was_printed() {
    let (command, mut agent) = command();
    let before = tokio::time::Instant::now();
    let timeout = Duration::from_secs(5);
    let mut events = command.timeout(timeout).spawn().await.expect("spawns").events();
    say(&mut agent, &[&frame(1, b"working")]).await;
    assert!(matches!(events.next().await, Some(Ok(ExecEvent::Stdout(_)))));
    let Some(Ok(ExecEvent::Exit(exit))) = events.next().await else { panic!("an exit") };
    assert!(exit.timed_out && !exit.success());
    assert_eq!(exit.status.signal(), Some(9));
    assert!(before.elapsed() < timeout + Duration::from_millis(250), "{:?}", before.elapsed());
}
