//! The workload against agents that lie, stall or vanish: typed errors, never a success, never a wait without an end.

#[path = "support/scripted.rs"]
mod scripted;

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use kiln::ExecError;
use kiln::Workload;
use kiln::WorkloadBuilder;
use kiln::WorkloadError;
use kiln::WorkloadLog;
use kiln::transport::Connector;
use scripted::EXIT_0;
use scripted::Streams;
use scripted::frame;
use scripted::hear;
use scripted::say;
use tokio::io::DuplexStream;

const CONTROL: u8 = 0xfe;
const STDOUT: u8 = 1;
const ERROR: u8 = 6;
const LOST: u8 = 8;

const ACK: &[u8] = br#"{"ok":true,"pid":7,"run":1,"ran_ms":1500}"#;
const GONE: &[u8] = br#"{"ok":false,"errno":3,"error":"no such workload is running"}"#;

fn builder(streams: &Arc<Streams>) -> WorkloadBuilder {
    WorkloadBuilder::over(Arc::clone(streams) as Arc<dyn Connector>).argv(["program"])
}

/// What comes of a start that is answered with `json`.
async fn answered(json: &[u8]) -> Result<Workload, WorkloadError> {
    let (streams, mut agent) = Streams::one(1 << 12);
    say(&mut agent, &[&frame(CONTROL, json)]).await;
    builder(&streams).start().await
}

/// A workload that runs, with nobody to connect to yet.
async fn running() -> (Arc<Streams>, Workload) {
    let (streams, mut agent) = Streams::one(1 << 12);
    say(&mut agent, &[&frame(CONTROL, ACK)]).await;
    let workload = builder(&streams).start().await.expect("starts");
    assert_eq!(workload.id(), 7);
    (streams, workload)
}

/// A connection on which an acknowledgement and `frames` wait; kept open by the agent's end of it.
async fn following(streams: &Streams, frames: &[&[u8]]) -> DuplexStream {
    let mut agent = streams.add(1 << 16);
    say(&mut agent, &[&frame(CONTROL, ACK)]).await;
    say(&mut agent, frames).await;
    agent
}

/// The first item of the logs after `frames`.
async fn first_log(frames: &[&[u8]]) -> Option<Result<WorkloadLog, ExecError>> {
    let (streams, workload) = running().await;
    let _agent = following(&streams, frames).await;
    workload.logs().next().await
}

#[tokio::test]
async fn every_refusal_of_a_start_is_typed() {
    assert!(matches!(answered(br#"{"ok":false,"errno":16,"error":"x"}"#).await, Err(WorkloadError::AlreadyRunning)));
    let unknown = answered(br#"{"ok":false,"error":"unknown CONTROL action"}"#).await;
    assert!(matches!(unknown, Err(WorkloadError::Unsupported)));
    let error = answered(br#"{"ok":false,"errno":12,"error":"no memory"}"#).await.expect_err("refused");
    assert!(matches!(error, WorkloadError::Exec(ExecError::System { errno: 12, .. })), "{error:?}");
    let error = answered(br#"{"ok":false,"error":"not executable: x"}"#).await.expect_err("refused");
    assert!(matches!(error, WorkloadError::Exec(ExecError::NotExecutable { .. })), "{error:?}");
    let error = answered(br#"{"ok":false}"#).await.expect_err("refused");
    assert!(matches!(error, WorkloadError::Exec(ExecError::Refused { .. })), "{error:?}");
    for (json, why) in
        [(&br#"{"ok":true}"#[..], "no process"), (br#"{"ok":true,"pid":7}"#, "no run"), (b"[]", "no answer")]
    {
        let error = answered(json).await.expect_err(why);
        assert!(matches!(error, WorkloadError::Exec(ExecError::Protocol { .. })), "{why}: {error:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_does_not_answer_is_not_waited_for() {
    let (streams, _agent) = Streams::one(1 << 12);
    let error = builder(&streams).start().await.expect_err("no answer");
    assert!(matches!(error, WorkloadError::Exec(ExecError::Timeout { .. })), "{error:?}");
    let (streams, workload) = running().await;
    let _silent = [streams.add(1 << 12), streams.add(1 << 12), streams.add(1 << 12), streams.add(1 << 12)];
    assert!(matches!(workload.signal(15).await, Err(ExecError::Timeout { .. })));
    assert!(matches!(workload.stop(Duration::ZERO).await, Err(ExecError::Timeout { .. })));
    assert!(matches!(workload.wait().await, Err(ExecError::Timeout { .. })));
    assert!(matches!(workload.logs().next().await, Some(Err(ExecError::Timeout { .. }))));
}

#[tokio::test(start_paused = true)]
async fn a_kill_that_nobody_confirms_has_a_deadline() {
    let (streams, workload) = running().await;
    let _signalled = following(&streams, &[]).await;
    let _waited = following(&streams, &[]).await;
    assert!(matches!(workload.kill().await, Err(ExecError::Timeout { .. })));
}

#[tokio::test]
async fn the_logs_skip_what_they_do_not_know_and_what_is_empty() {
    let (streams, workload) = running().await;
    let frames =
        [&frame(0x42, b"future")[..], &frame(STDOUT, b""), &frame(LOST, &[0; 8]), &frame(STDOUT, b"hi"), EXIT_0];
    let _agent = following(&streams, &frames).await;
    let logs: Vec<_> = workload.logs().map(|item| item.expect("no error")).collect().await;
    assert_eq!(logs, [WorkloadLog::Stdout("hi".into())]);
}

#[tokio::test]
async fn what_the_protocol_forbids_is_a_violation() {
    let too_many = frame(LOST, &[0xff; 8]);
    for frames in [
        &[&frame(LOST, &[0; 7])[..]][..],
        &[&frame(0, b"stdin")],
        &[&frame(CONTROL, ACK)],
        &[&frame(5, &[0; 5])],
        &[&[STDOUT, 1, 0, 0, 1]],
    ] {
        let item = first_log(frames).await;
        assert!(matches!(item, Some(Err(ExecError::Protocol { .. }))), "{frames:?}: {item:?}");
    }
    let (streams, workload) = running().await;
    let _agent = following(&streams, &[&too_many, &frame(STDOUT, b"x")]).await;
    let mut logs = workload.logs();
    assert!(matches!(logs.next().await, Some(Ok(WorkloadLog::Lost { bytes: u64::MAX }))));
    assert!(matches!(logs.next().await, Some(Err(ExecError::Protocol { .. }))));
    assert!(logs.next().await.is_none());

    let (streams, workload) = running().await;
    let _agent = following(&streams, &[&frame(STDOUT, b"output while waiting")]).await;
    assert!(matches!(workload.wait().await, Err(ExecError::Protocol { .. })));
    let _agent = following(&streams, &[&frame(ERROR, b"errno 5: broken")]).await;
    assert!(matches!(workload.wait().await, Err(ExecError::System { errno: 5, .. })));
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_only_hangs_up_is_given_up() {
    let (streams, workload) = running().await;
    for _ in 0..100 {
        drop(following(&streams, &[]).await);
    }
    assert!(matches!(workload.wait().await, Err(ExecError::AgentGone(_))));
    assert!(matches!(workload.logs().next().await, Some(Err(ExecError::AgentGone(_)))));
    let left = streams.0.lock().expect("no panic").len();
    assert!((80..100).contains(&left), "{left}");
}

#[tokio::test(start_paused = true)]
async fn the_logs_go_on_where_they_were() {
    let (streams, workload) = running().await;
    let mut logs = workload.logs();
    let mut first = following(&streams, &[&frame(STDOUT, b"one"), &frame(LOST, &[0, 0, 0, 0, 0, 0, 1, 0])]).await;
    assert!(matches!(logs.next().await, Some(Ok(WorkloadLog::Stdout(_)))));
    assert!(matches!(logs.next().await, Some(Ok(WorkloadLog::Lost { bytes: 256 }))));
    let (kind, json) = hear(&mut first).await;
    assert_eq!((kind, &json[..]), (CONTROL, &br#"{"action":"workload_logs","run":1,"from":0}"#[..]));
    drop(first);
    let mut second = following(&streams, &[&frame(STDOUT, b"two"), EXIT_0]).await;
    assert!(matches!(logs.next().await, Some(Ok(WorkloadLog::Stdout(bytes))) if bytes == "two"));
    let (_, json) = hear(&mut second).await;
    assert_eq!(&json[..], br#"{"action":"workload_logs","run":1,"from":259}"#);
    assert!(logs.next().await.is_none());
}

#[tokio::test]
async fn a_run_that_is_gone_is_said_to_be() {
    let (streams, workload) = running().await;
    let mut agents = [streams.add(1 << 12), streams.add(1 << 12), streams.add(1 << 12)];
    for agent in &mut agents {
        say(agent, &[&frame(CONTROL, GONE)]).await;
    }
    assert!(matches!(workload.signal(15).await, Err(ExecError::Ended)));
    assert!(matches!(workload.wait().await, Err(ExecError::Replaced)));
    assert!(matches!(workload.logs().next().await, Some(Err(ExecError::Replaced))));
}

#[tokio::test(start_paused = true)]
async fn the_exit_is_kept_and_has_the_guests_time() {
    let (streams, workload) = running().await;
    let _agent = following(&streams, &[EXIT_0]).await;
    let exit = workload.wait().await.expect("ended");
    assert_eq!((exit.status.code(), exit.duration), (Some(0), Duration::from_millis(1500)));
    // Nobody could be asked any more.
    assert_eq!(workload.clone().wait().await.expect("known"), exit);
    assert!(matches!(workload.signal(15).await, Err(ExecError::Ended)));
}
