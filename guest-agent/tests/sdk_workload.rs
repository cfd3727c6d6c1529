//! The SDK's workload against a real agent, over connections that the tests may break.

#[path = "../../tests/support/logs.rs"]
mod logs;
mod support;

use std::io;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::Mutex;
use std::time::Duration;

use futures::StreamExt;
use futures::future::BoxFuture;
use kiln::ExecError;
use kiln::Workload;
use kiln::WorkloadBuilder;
use kiln::WorkloadError;
use kiln::WorkloadLog;
use kiln::transport::Connector;
use kiln::transport::GuestStream;
use logs::all;
use logs::hear;
use support::Agent;
use support::Gate;
use support::PATIENCE;
use support::started;
use tokio::net::UnixStream;
use tokio::task::JoinSet;

/// Connects through tasks that can be ended, which to the host is a connection that broke.
#[derive(Debug)]
struct Breakable {
    socket: PathBuf,
    connections: Mutex<JoinSet<()>>,
}

impl Breakable {
    fn to(agent: &Agent) -> Arc<Self> {
        Arc::new(Self { socket: agent.socket(), connections: Mutex::default() })
    }

    /// Breaks every connection that there is; further ones are made as before. Returns how many there were.
    async fn break_all(&self) -> usize {
        let mut broken = std::mem::take(&mut *self.connections.lock().expect("no panic"));
        broken.abort_all();
        let mut open = 0;
        while let Some(ended) = broken.join_next().await {
            open += usize::from(ended.is_err());
        }
        open
    }
}

impl Connector for Breakable {
    fn connect(&self, _port: u32) -> BoxFuture<'_, io::Result<Box<dyn GuestStream>>> {
        Box::pin(async {
            let mut agent = UnixStream::connect(&self.socket).await?;
            let (host, mut relayed) = tokio::io::duplex(1 << 10);
            self.connections.lock().expect("no panic").spawn(async move {
                // Whoever ends first ends it.
                let _ = tokio::io::copy_bidirectional(&mut relayed, &mut agent).await;
            });
            Ok(Box::new(host) as Box<dyn GuestStream>)
        })
    }
}

fn shell(builder: WorkloadBuilder, script: &str) -> WorkloadBuilder {
    builder.argv(["sh", "-c", script])
}

async fn start(agent: &Agent, script: &str) -> Workload {
    shell(WorkloadBuilder::new(agent.socket()), script).start().await.expect("starts")
}

#[tokio::test]
async fn it_runs_as_described_and_is_told_about() {
    let agent = Agent::start().await;
    let builder = WorkloadBuilder::new(agent.socket()).env("NAME", "value").cwd("/tmp");
    let workload = shell(builder, "echo $NAME; pwd; echo oops >&2; echo $$; exit 7").start().await.expect("starts");
    let expected = format!("value\n/tmp\n{}\n", workload.id());
    assert_eq!(all(workload.logs()).await, (expected.clone(), "oops\n".to_owned(), 0));
    let exit = workload.wait().await.expect("ends");
    assert_eq!((exit.status.code(), exit.timed_out), (Some(7), false));
    assert!(exit.peak_rss_kib.is_some() && exit.duration < PATIENCE, "{exit:?}");
    assert_eq!(workload.wait().await.expect("the same"), exit);
    assert_eq!(all(workload.clone().logs()).await.0, expected, "again, after the end");
    assert!(matches!(workload.signal(15).await, Err(ExecError::Ended)));
    assert_eq!(workload.stop(PATIENCE).await.expect("has ended"), exit);
}

#[tokio::test]
async fn what_cannot_start_is_a_typed_error() {
    let agent = Agent::start().await;
    let builder = || WorkloadBuilder::new(agent.socket());
    assert!(matches!(builder().start().await, Err(WorkloadError::NoCommand)));
    assert!(matches!(builder().attach().await, Err(WorkloadError::NotStarted)));
    let error = builder().argv(["no-such-program"]).start().await.expect_err("not there");
    assert!(
        matches!(&error, WorkloadError::Exec(ExecError::NotFound { program }) if program == "no-such-program"),
        "{error:?}"
    );
    let error = builder().argv(["true"]).cwd("/no/such/folder").start().await.expect_err("not there");
    assert!(matches!(error, WorkloadError::Exec(ExecError::BadCwd { .. })), "{error:?}");
    let error = builder().argv(["true"]).user("nobody-here").start().await.expect_err("not there");
    assert!(matches!(error, WorkloadError::Exec(ExecError::UnknownUser { .. })), "{error:?}");
    assert!(matches!(builder().attach().await, Err(WorkloadError::NotStarted)), "none of them ran");

    let running = builder().argv(["sleep", "1000"]).start().await.expect("starts");
    assert!(matches!(builder().argv(["true"]).start().await, Err(WorkloadError::AlreadyRunning)));
    assert_eq!(running.kill().await.expect("killed").status.signal(), Some(9));
    let next = builder().argv(["true"]).start().await.expect("starts");
    assert!(next.wait().await.expect("ends").success());
}

#[tokio::test]
async fn handles_come_and_go() {
    let agent = Agent::start().await;
    let mut gate = Gate::new(&agent.folder().join("gate"));
    let workload = start(&agent, "echo up; read x < gate; exit 4").await;
    let id = workload.id();
    let mut logs = workload.logs();
    hear(&mut logs, "up\n").await;
    let waiting = {
        let workload = workload.clone();
        tokio::spawn(async move { workload.wait().await })
    };
    waiting.abort();
    drop((logs, workload));
    agent.idle().await;
    let found = WorkloadBuilder::new(agent.socket()).attach().await.expect("it still runs");
    assert_eq!(found.id(), id);
    gate.open();
    assert_eq!(found.wait().await.expect("ends").status.code(), Some(4));
    let found = WorkloadBuilder::new(agent.socket()).attach().await.expect("it has ended, and is there");
    assert_eq!(found.wait().await.expect("ended").status.code(), Some(4));
}

#[tokio::test]
async fn a_broken_connection_loses_nothing() {
    let agent = Agent::start().await;
    let mut gate = Gate::new(&agent.folder().join("gate"));
    let connector = Breakable::to(&agent);
    let builder = WorkloadBuilder::over(Arc::clone(&connector) as Arc<dyn Connector>);
    let script = "for i in 1 2 3 4; do echo round $i; read x < gate; done; echo over; exit 3";
    let workload = shell(builder, script).start().await.expect("starts");
    let waiting = {
        let workload = workload.clone();
        tokio::spawn(async move { workload.wait().await })
    };
    let mut logs = workload.logs();
    for round in 1..=4 {
        hear(&mut logs, &format!("round {round}\n")).await;
        assert!(connector.break_all().await > 0);
        gate.open();
    }
    assert_eq!(all(logs).await, ("over\n".to_owned(), String::new(), 0));
    assert_eq!(waiting.await.expect("no panic").expect("ends").status.code(), Some(3));
    assert_eq!(all(workload.logs()).await.0, "round 1\nround 2\nround 3\nround 4\nover\n");
}

#[tokio::test]
async fn an_agent_that_is_gone_is_an_error() {
    let mut agent = Agent::start().await;
    let workload = start(&agent, "echo up; exec sleep 1000.911").await;
    let mut logs = workload.logs();
    hear(&mut logs, "up\n").await;
    started("1000.911").await;
    let waiting = {
        let workload = workload.clone();
        tokio::spawn(async move { workload.wait().await })
    };
    agent.kill();
    let error = logs.next().await.expect("one more item").expect_err("the agent is gone");
    assert!(matches!(error, ExecError::Connect(_)), "{error:?}");
    assert!(logs.next().await.is_none());
    let error = waiting.await.expect("no panic").expect_err("the agent is gone");
    assert!(matches!(error, ExecError::Connect(_)), "{error:?}");
    assert!(matches!(workload.signal(9).await, Err(ExecError::Connect(_))));
    // Nobody else ends it.
    let pid = rustix::process::Pid::from_raw(i32::try_from(workload.id()).expect("a pid")).expect("a pid");
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("it runs");
}

#[tokio::test]
async fn a_run_that_was_replaced_is_not_mistaken_for_the_next() {
    let agent = Agent::start().await;
    let (seen, unseen) = (start(&agent, "exit 1").await, WorkloadBuilder::new(agent.socket()));
    let unseen = unseen.attach().await.expect("there");
    assert_eq!(seen.wait().await.expect("ends").status.code(), Some(1));
    let next = start(&agent, "exec sleep 1000").await;
    assert_eq!(seen.wait().await.expect("seen").status.code(), Some(1));
    assert!(matches!(unseen.wait().await, Err(ExecError::Replaced)));
    let mut logs = unseen.logs();
    assert!(matches!(logs.next().await, Some(Err(ExecError::Replaced))));
    assert!(logs.next().await.is_none());
    assert!(matches!(unseen.signal(9).await, Err(ExecError::Ended)));
    assert!(matches!(unseen.stop(Duration::ZERO).await, Err(ExecError::Replaced)));
    // None of it reached the one that runs.
    assert_eq!(next.kill().await.expect("killed").status.signal(), Some(9));
}

#[tokio::test]
async fn what_a_late_reader_missed_is_told_first() {
    let agent = Agent::start().await;
    let workload = start(&agent, "head -c 1000000 /dev/zero; echo end").await;
    assert!(workload.wait().await.expect("ends").success());
    let mut logs = workload.logs();
    let lost = 1_000_004 - (256 << 10);
    assert_eq!(logs.next().await.expect("an item").expect("no error"), WorkloadLog::Lost { bytes: lost });
    let (stdout, _, more) = all(logs).await;
    assert_eq!((stdout.len() as u64, more), (256 << 10, 0));
    assert!(stdout.ends_with("\0end\n"));
}

#[tokio::test]
async fn stopping_asks_first_and_kills_after_the_grace() {
    let agent = Agent::start().await;
    let builder = || WorkloadBuilder::new(agent.socket());
    // Its child ends of the signal too: it is for the whole group.
    let polite = shell(builder(), "trap 'echo bye; exit 5' USR1; echo up; while :; do sleep 0.01; done");
    let polite = polite.stop_signal(10).start().await.expect("starts");
    let mut logs = polite.logs();
    hear(&mut logs, "up\n").await;
    assert_eq!(polite.stop(PATIENCE).await.expect("stops").status.code(), Some(5));
    assert_eq!(all(logs).await.0, "bye\n");

    let deaf = start(&agent, "trap 'echo no' TERM; echo up; while :; do sleep 0.01; done").await;
    let mut logs = deaf.logs();
    hear(&mut logs, "up\n").await;
    let exit = deaf.stop(Duration::from_millis(300)).await.expect("stops");
    assert_eq!(exit.status.signal(), Some(9));
    assert!(exit.duration >= Duration::from_millis(300), "{exit:?}");
    hear(&mut logs, "no\n").await;

    let exit = start(&agent, "exec sleep 1000").await.stop(PATIENCE).await.expect("stops");
    assert_eq!(exit.status.signal(), Some(15));
}
