//! What the SDK's builder and child offer beyond one process: staged files, chains, ids, events.

mod support;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;

use futures::TryStreamExt;
use kiln::exec::ExecError;
use kiln::exec::ExecEvent;
use support::Agent;
use support::gone;
use support::running;
use tokio::io::AsyncReadExt;
use tokio::io::AsyncWriteExt;

#[tokio::test]
async fn staged_files_are_there_before_the_command() {
    let agent = Agent::start().await;
    let [data, tool] = ["data", "tool"].map(|name| agent.folder().join(name).display().to_string());
    let out = agent
        .sh("cat data; ./tool")
        .stage_file(&data, "staged, ")
        .stage_file_mode(&tool, "#!/bin/sh\necho and run", 0o700)
        .output()
        .await
        .expect("runs");
    assert_eq!(out.stdout, b"staged, and run\n");
    let mode = |path: &str| fs::metadata(path).expect("there").permissions().mode() & 0o7777;
    assert_eq!((mode(&data), mode(&tool)), (0o644, 0o700));
    let refused = agent.exec(["true"]).stage_file("/no/such/folder/file", "x").output().await;
    let error = refused.expect_err("cannot be staged");
    assert_eq!(error.kind(), std::io::ErrorKind::NotFound, "{error:?}");
}

#[tokio::test]
async fn a_chain_runs_up_to_the_first_failure() {
    let agent = Agent::start().await;
    let out = agent.exec(["echo", "one"]).chain(["echo", "two"]).chain(["sh", "-c", "exit 3"]).chain(["echo", "never"]);
    let out = out.output().await.expect("runs");
    assert_eq!((&out.stdout[..], out.status.code()), (&b"one\ntwo\n"[..], Some(3)));
    let out = agent.exec(["cat"]).chain(["cat"]).output().await.expect("runs");
    assert!(out.success());
    let error = agent.exec(["true"]).chain(["no-such-program"]).output().await.expect_err("the second is missing");
    assert!(matches!(&error, ExecError::NotFound { program } if program == "no-such-program"), "{error:?}");
}

#[tokio::test]
async fn the_id_is_the_process_and_its_group() {
    let agent = Agent::start().await;
    let mut child = agent.sh("echo $$; exec sleep 1000.601").spawn().await.expect("starts");
    let id = child.id().expect("the agent tells");
    let mut line = String::new();
    let mut stdout = tokio::io::BufReader::new(child.stdout.take().expect("piped"));
    tokio::io::AsyncBufReadExt::read_line(&mut stdout, &mut line).await.expect("prints");
    assert_eq!(line.trim(), id.to_string());
    child.kill().await.expect("killed");
    assert_eq!(child.id(), None);
    // A new process may have the number, but not as what it was.
    gone("1000.601").await;
}

#[tokio::test]
async fn what_cannot_start_fails_the_spawn() {
    let agent = Agent::start().await;
    let error = agent.exec(["no-such-program"]).spawn().await.expect_err("not there");
    assert!(matches!(error, ExecError::NotFound { .. }), "{error:?}");
    let error = agent.exec(["/etc/passwd"]).spawn().await.expect_err("not executable");
    assert!(matches!(error, ExecError::NotExecutable { .. }), "{error:?}");
    let error = agent.exec(["true"]).cwd("/no/such/folder").spawn().await.expect_err("nowhere");
    assert!(matches!(error, ExecError::BadCwd { .. }), "{error:?}");
    let error = agent.exec(["true"]).user("nobody-here").spawn().await.expect_err("nobody");
    assert!(matches!(error, ExecError::UnknownUser { .. }), "{error:?}");
    let error = agent.exec(["a\0b"]).spawn().await.expect_err("a NUL byte");
    assert!(matches!(error, ExecError::BadRequest { .. }), "{error:?}");
}

#[tokio::test]
async fn events_tell_the_whole_story_in_order() {
    let agent = Agent::start().await;
    // It goes on when its last line has arrived: two pipes alone have no order.
    let script = "for i in 1 2 3; do echo out$i; read go; echo err$i >&2; read go; done; exit 4";
    let mut child = agent.sh(script).spawn().await.expect("starts");
    let mut stdin = child.stdin.take().expect("piped");
    let mut stream = child.events();
    let mut events = Vec::new();
    while let Some(event) = stream.try_next().await.expect("no failure") {
        if !matches!(event, ExecEvent::Exit(_)) {
            stdin.write_all(b"go\n").await.expect("it reads");
        }
        events.push(event);
    }
    let (last, printed) = events.split_last().expect("an exit at least");
    let printed: Vec<_> = printed
        .iter()
        .map(|event| match event {
            ExecEvent::Stdout(bytes) | ExecEvent::Stderr(bytes) => String::from_utf8_lossy(bytes).into_owned(),
            other => panic!("{other:?} before the end"),
        })
        .collect();
    assert_eq!(printed.concat(), "out1\nerr1\nout2\nerr2\nout3\nerr3\n");
    assert!(matches!(last, ExecEvent::Exit(exit) if exit.status.code() == Some(4) && exit.peak_rss_kib.is_some()));
}

#[tokio::test]
async fn dropped_events_end_the_process_and_a_kill_shows_in_them() {
    let agent = Agent::start().await;
    let mut events = agent.sh("yes & exec sleep 1000.602").spawn().await.expect("starts").events();
    assert!(matches!(events.try_next().await, Ok(Some(ExecEvent::Stdout(_)))));
    assert!(running("1000.602") || events.id().is_some());
    drop(events);
    gone("1000.602").await;

    let events = agent.sh("echo up; exec sleep 1000.603").spawn().await.expect("starts").events();
    let signaller = events.signaller();
    signaller.kill();
    let events: Vec<_> = events.try_collect().await.expect("an exit");
    assert!(matches!(events.last(), Some(ExecEvent::Exit(exit)) if exit.status.signal() == Some(9)));
}

#[tokio::test]
async fn a_handle_taken_before_the_events_is_the_callers() {
    let agent = Agent::start().await;
    let mut child = agent.sh("echo out; echo err >&2").spawn().await.expect("starts");
    let mut stderr = child.stderr.take().expect("piped");
    let events: Vec<_> = child.events().try_collect().await.expect("ends");
    assert!(matches!(&events[..], [ExecEvent::Stdout(out), ExecEvent::Exit(_)] if out == "out\n"), "{events:?}");
    let mut text = String::new();
    stderr.read_to_string(&mut text).await.expect("kept");
    assert_eq!(text, "err\n");
}
