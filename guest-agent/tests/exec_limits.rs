//! Time, memory and cancellation: deadlines hold, nothing unread blocks an end, nothing dropped leaks.

mod support;

use std::os::unix::process::ExitStatusExt;
use std::time::Duration;
use std::time::Instant;

use kiln::exec::ExecBuilder;
use kiln::exec::ExecError;
use kiln::exec::probe;
use rustix::process::Signal;
use support::Agent;
use support::PATIENCE;
use support::gone;
use support::started;
use tokio::io::AsyncReadExt;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixListener;
use tokio::time::timeout;

/// A deadline that a test waits for.
const SHORT: Duration = Duration::from_millis(200);
/// What the documentation promises.
const AFTER_DEADLINE: Duration = Duration::from_millis(250);

#[tokio::test]
async fn a_timeout_kills_the_group_and_keeps_what_was_printed() {
    let agent = Agent::start().await;
    let before = Instant::now();
    let out =
        agent.sh("echo early; sleep 1000.501 & sleep 1000.502").timeout(SHORT).output().await.expect("an outcome");
    assert!(before.elapsed() < SHORT + AFTER_DEADLINE, "{:?}", before.elapsed());
    assert!(out.timed_out && !out.success());
    assert_eq!(out.status.signal(), Some(9));
    assert_eq!(out.stdout, b"early\n");
    gone("1000.501").await;
    gone("1000.502").await;
}

#[tokio::test]
async fn a_timeout_holds_when_the_agent_is_dead() {
    let agent = Agent::start().await;
    let mut child = agent.exec(["sleep", "1000.503"]).timeout(SHORT).spawn().await.expect("spawns");
    let before = Instant::now();
    started("1000.503").await;
    agent.signal(Signal::STOP);
    let status = child.wait().await.expect("an answer");
    assert!(before.elapsed() < SHORT + AFTER_DEADLINE + SHORT, "{:?}", before.elapsed());
    assert!(child.timed_out());
    assert_eq!(status.signal(), Some(9));
    agent.signal(Signal::CONT);
    drop(child);
    gone("1000.503").await;
}

#[tokio::test]
async fn a_timeout_holds_when_nobody_ever_answers() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let path = folder.path().join("silent.sock");
    let _listener = UnixListener::bind(&path).expect("binds");
    let before = Instant::now();
    let out = ExecBuilder::new(&path).argv(["true"]).timeout(SHORT).output().await.expect("an outcome");
    assert!(out.timed_out);
    assert!(before.elapsed() < SHORT + AFTER_DEADLINE, "{:?}", before.elapsed());
    let error = probe(&kiln::exec::UnixConnector::new(&path), SHORT).await.expect_err("silence");
    assert!(matches!(error, ExecError::Timeout { .. }), "{error:?}");
}

#[tokio::test]
async fn an_agent_that_dies_is_an_error_and_never_a_success() {
    let mut agent = Agent::start().await;
    let mut child = agent.exec(["sleep", "3.25"]).spawn().await.expect("spawns");
    agent.kill();
    let error = timeout(PATIENCE, child.wait()).await.expect("no hang").expect_err("no exit was seen");
    assert!(matches!(error, ExecError::AgentGone(_)), "{error:?}");
    let mut out = Vec::new();
    child.stdout.take().expect("piped").read_to_end(&mut out).await.expect_err("no end of file either");
    let error = agent.exec(["true"]).output().await.expect_err("nobody there");
    assert!(matches!(error, ExecError::Connect(_)), "{error:?}");
}

#[tokio::test]
async fn a_slow_reader_loses_nothing() {
    let agent = Agent::start().await;
    let mut child = agent.sh("head -c 67108864 /dev/zero | tr '\\0' x").spawn().await.expect("spawns");
    let mut stdout = child.stdout.take().expect("piped");
    let mut chunk = vec![0; 300_000];
    let mut total = 0;
    let mut reads = 0;
    loop {
        let read = stdout.read(&mut chunk).await.expect("prints");
        if read == 0 {
            break;
        }
        assert!(chunk[..read].iter().all(|&byte| byte == b'x'));
        total += read;
        reads += 1;
        if reads % 64 == 0 {
            // Slower than the guest: everything between fills up.
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
    assert_eq!(total, 64 << 20);
    assert!(child.wait().await.expect("ends").success());
}

#[tokio::test]
async fn a_slow_reader_slows_nobody_else_and_the_agent_stays_small() {
    let agent = Agent::start().await;
    let stuck = agent.sh("yes").spawn().await.expect("spawns");
    for _ in 0..20 {
        let out = timeout(PATIENCE, agent.exec(["echo", "hi"]).output()).await.expect("not held up").expect("runs");
        assert_eq!(out.stdout, b"hi\n");
    }
    let status = std::fs::read_to_string(format!("/proc/{}/status", agent.pid())).expect("running");
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a memory figure");
    let kib: u64 = peak.trim().trim_end_matches(" kB").parse().expect("a number");
    assert!(kib < 16 << 10, "{kib} KiB");
    drop(stuck);
}

#[tokio::test]
async fn waiting_does_not_need_a_reader() {
    let agent = Agent::start().await;
    let script = "head -c 5000000 /dev/zero; head -c 5000000 /dev/zero >&2; exit 3";
    let mut child = agent.sh(script).spawn().await.expect("spawns");
    let status = timeout(PATIENCE, child.wait()).await.expect("no deadlock").expect("ends");
    assert_eq!(status.code(), Some(3));
    // What was kept can be read, and the gap is an error, not an end of file.
    let mut kept = Vec::new();
    let error = child.stdout.take().expect("there").read_to_end(&mut kept).await.expect_err("bytes were dropped");
    assert!(error.to_string().contains("dropped"), "{error}");
    assert!(kept.len() >= 256 << 10 && kept.len() < 1 << 20, "{}", kept.len());
}

#[tokio::test]
async fn reading_one_output_does_not_need_the_other() {
    let agent = Agent::start().await;
    let script = "head -c 5000000 /dev/zero; echo told >&2";
    let mut child = agent.sh(script).spawn().await.expect("spawns");
    let mut stderr = String::new();
    let read = child.stderr.take().expect("piped");
    timeout(PATIENCE, { read }.read_to_string(&mut stderr)).await.expect("no deadlock").expect("text");
    assert_eq!(stderr, "told\n");
    assert!(child.wait().await.expect("ends").success());
}

#[tokio::test]
async fn killing_needs_no_reader_even_of_a_taken_handle() {
    let agent = Agent::start().await;
    let mut child = agent.sh("exec yes").spawn().await.expect("spawns");
    let mut stdout = child.stdout.take().expect("piped");
    let mut first = [0; 2];
    stdout.read_exact(&mut first).await.expect("prints");
    timeout(PATIENCE, child.kill()).await.expect("no deadlock").expect("killed");
    assert_eq!(child.wait().await.expect("ended").signal(), Some(9));
    let mut rest = Vec::new();
    stdout.read_to_end(&mut rest).await.expect("what was written before the kill, and then end of file");
}

#[tokio::test]
async fn killing_works_while_input_is_stuck() {
    let agent = Agent::start().await;
    let mut child = agent.exec(["sleep", "1000.504"]).spawn().await.expect("spawns");
    let mut stdin = child.stdin.take().expect("piped");
    let writer = tokio::spawn(async move { stdin.write_all(&vec![0; 64 << 20]).await });
    started("1000.504").await;
    child.start_kill().expect("running");
    drop(child);
    gone("1000.504").await;
    timeout(PATIENCE, writer).await.expect("the writer notices").expect("no panic").expect_err("nobody reads");
}

#[tokio::test]
async fn dropping_the_child_ends_the_group_without_blocking() {
    let agent = Agent::start().await;
    let child = agent.sh("trap '' HUP; sleep 1000.505 & sleep 1000.506").spawn().await.expect("spawns");
    started("1000.505").await;
    let before = Instant::now();
    drop(child);
    assert!(before.elapsed() < Duration::from_millis(50));
    gone("1000.505").await;
    gone("1000.506").await;
}

#[tokio::test]
async fn a_child_may_be_left_running() {
    let agent = Agent::start().await;
    let done = agent.folder().join("done");
    let script = format!("read line; sleep 0.2; echo $line > {}", done.display());
    let mut child = agent.sh(&script).kill_on_drop(false).spawn().await.expect("spawns");
    child.stdin.as_mut().expect("piped").write_all(b"finished\n").await.expect("reads");
    drop(child);
    timeout(PATIENCE, async {
        while std::fs::read_to_string(&done).unwrap_or_default() != "finished\n" {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .expect("it went on");
}

#[tokio::test]
async fn a_dropped_runtime_takes_its_sessions_along() {
    let agent = Agent::start().await;
    let builder = agent.exec(["sleep", "1000.507"]);
    let child = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(builder.spawn()).expect("spawns")
    });
    let mut child = child.join().expect("no panic");
    let error = timeout(PATIENCE, child.wait()).await.expect("no hang").expect_err("its driver is gone");
    assert!(matches!(error, ExecError::Dropped), "{error:?}");
    gone("1000.507").await;
}

/// Polls `future` `polls` times, giving the rest of the program a turn in between, then drops it; true once it finished earlier.
async fn poll_and_drop<F: Future>(future: F, polls: usize) -> bool {
    let mut future = Box::pin(future);
    for _ in 0..polls {
        let polled = std::future::poll_fn(|cx| std::task::Poll::Ready(future.as_mut().poll(cx).is_ready())).await;
        if polled {
            return true;
        }
        tokio::time::sleep(Duration::from_micros(200)).await;
    }
    false
}

#[tokio::test]
async fn cancelling_at_any_await_leaves_no_process_behind() {
    let agent = Agent::start().await;
    for polls in 0..40 {
        poll_and_drop(agent.exec(["sleep", "1000.508"]).output(), polls).await;
        poll_and_drop(agent.exec(["sleep", "1000.508"]).status(), polls).await;
        poll_and_drop(agent.exec(["sleep", "1000.508"]).spawn(), polls).await;
    }
    gone("1000.508").await;
    assert!(agent.exec(["true"]).status().await.expect("the agent is none the worse").success());
}

#[tokio::test]
async fn a_cancelled_wait_can_be_repeated() {
    let agent = Agent::start().await;
    let mut child = agent.sh("sleep 0.3; exit 4").spawn().await.expect("spawns");
    for polls in 0..5 {
        assert!(!poll_and_drop(child.wait(), polls).await);
    }
    assert_eq!(child.wait().await.expect("ends").code(), Some(4));
}

#[tokio::test]
async fn the_agent_stops_cleanly_and_takes_its_processes_along() {
    let agent = Agent::start().await;
    let _child = agent.exec(["sleep", "1000.509"]).spawn().await.expect("spawns");
    started("1000.509").await;
    let socket = agent.socket();
    agent.signal(Signal::TERM);
    // The folder must outlive the agent for the socket's absence to mean something.
    gone("1000.509").await;
    timeout(PATIENCE, async {
        while socket.exists() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .expect("its socket is gone");
    assert_eq!(timeout(PATIENCE, agent.ended()).await.expect("ends"), Some(0));
}
