//! Processes: what goes in, what comes out, how they end, and why they do not start.

mod support;

use std::os::unix::process::ExitStatusExt;

use kiln::exec::ExecBuilder;
use kiln::exec::ExecError;
use support::Agent;
use support::PATIENCE;
use tokio::io::AsyncReadExt;
use tokio::io::AsyncWriteExt;
use tokio::task::JoinSet;
use tokio::time::timeout;

#[tokio::test]
async fn echo_prints_and_succeeds() {
    let agent = Agent::start().await;
    let out = agent.exec(["echo", "hi"]).output().await.expect("runs");
    assert!(out.success());
    assert_eq!(out.stdout, b"hi\n");
    assert_eq!(out.stderr, b"");
    assert!(!out.timed_out);
    assert!(out.peak_rss_kib.expect("the agent measures it") > 0);
}

#[tokio::test]
async fn the_exit_code_and_stderr_are_kept_apart() {
    let agent = Agent::start().await;
    let out = agent.sh("echo out; echo err >&2; exit 7").output().await.expect("runs");
    assert_eq!(out.status.code(), Some(7));
    assert_eq!(out.stdout, b"out\n");
    assert_eq!(out.stderr, b"err\n");
}

#[tokio::test]
async fn cat_returns_what_it_is_fed_until_end_of_file() {
    let agent = Agent::start().await;
    let mut child = agent.exec(["cat"]).spawn().await.expect("spawns");
    let mut stdin = child.stdin.take().expect("piped");
    let mut stdout = child.stdout.take().expect("piped");
    let sent: Vec<u8> = (0..3_000_000_u32).map(|i| (i % 251) as u8).collect();
    let expected = sent.clone();
    let writer = tokio::spawn(async move {
        stdin.write_all(&sent).await.expect("cat reads");
        stdin.shutdown().await.expect("end of file");
    });
    let mut received = Vec::new();
    stdout.read_to_end(&mut received).await.expect("cat writes");
    writer.await.expect("no panic");
    assert!(received == expected, "{} of {} bytes", received.len(), expected.len());
    assert!(child.wait().await.expect("ends").success());
}

#[tokio::test]
async fn one_line_goes_back_and_forth() {
    let agent = Agent::start().await;
    let mut child = agent.exec(["cat"]).spawn().await.expect("spawns");
    let (stdin, stdout) = (child.stdin.as_mut().expect("piped"), child.stdout.as_mut().expect("piped"));
    for line in [b"one\n", b"two\n"] {
        stdin.write_all(line).await.expect("cat reads");
        let mut echoed = [0; 4];
        stdout.read_exact(&mut echoed).await.expect("cat writes");
        assert_eq!(&echoed, line);
    }
    // `wait` closes the input, so cat ends; and its answer is repeatable.
    assert!(child.wait().await.expect("ends").success());
    assert!(child.wait().await.expect("ends").success());
    assert!(child.try_wait().expect("ended").expect("ended").success());
}

#[tokio::test]
async fn a_process_that_closed_its_input_still_ends_normally() {
    let agent = Agent::start().await;
    let mut child = agent.sh("exec <&-; sleep 0.1; echo done").spawn().await.expect("spawns");
    let mut stdin = child.stdin.take().expect("piped");
    let writer = tokio::spawn(async move { while stdin.write_all(&[0; 4096]).await.is_ok() {} });
    let out = timeout(PATIENCE, child.wait_with_output()).await.expect("no hang").expect("runs");
    assert_eq!(out.stdout, b"done\n");
    timeout(PATIENCE, writer).await.expect("the writer notices").expect("no panic");
}

#[tokio::test]
async fn the_environment_is_merged_and_cwd_followed() {
    let agent = Agent::start().await;
    let script = "echo $FROM_AGENT $MINE; pwd";
    let out = agent.sh(script).env("MINE", "too").cwd("/usr").output().await.expect("runs");
    assert_eq!(out.stdout, b"yes too\n/usr\n");
    let out = agent.sh("echo $FROM_AGENT").env("FROM_AGENT", "replaced").output().await.expect("runs");
    assert_eq!(out.stdout, b"replaced\n");
}

#[tokio::test]
async fn a_user_is_looked_up_and_assumed() {
    assert!(rustix::process::getuid().is_root(), "changing users needs root");
    let agent = Agent::start().await;
    let id = |user: &'static str| agent.sh("id -u; id -g; id -G").cwd("/").user(user).output();
    assert_eq!(id("nobody").await.expect("runs").stdout, b"65534\n65534\n65534\n");
    assert_eq!(id("4242:4343").await.expect("runs").stdout, b"4242\n4343\n4343\n");
    assert_eq!(id("daemon:sys").await.expect("runs").stdout, b"1\n3\n3\n");
}

#[tokio::test]
async fn what_cannot_start_says_why() {
    let agent = Agent::start().await;
    std::fs::write(agent.folder().join("plain"), "no program").expect("temporary file");
    let script = agent.folder().join("orphan");
    std::fs::write(&script, "#!/no/such/interpreter\n").expect("temporary file");
    std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("own file");
    let failure = |builder: ExecBuilder| async { builder.output().await.expect_err("must not start") };

    let error = failure(agent.exec(["no-such-program"])).await;
    assert!(matches!(&error, ExecError::NotFound { program } if program == "no-such-program"), "{error:?}");
    let error = failure(agent.exec(["/no/such/program"])).await;
    assert!(matches!(&error, ExecError::NotFound { program } if program == "/no/such/program"), "{error:?}");
    let error = failure(agent.exec(["./plain"])).await;
    assert!(matches!(&error, ExecError::NotExecutable { detail } if detail.contains("ermission denied")), "{error:?}");
    let error = failure(agent.exec(["./orphan"])).await;
    assert!(matches!(&error, ExecError::NotExecutable { detail } if detail.contains("interpreter")), "{error:?}");
    let error = failure(agent.exec(["true"]).cwd("/no/such/folder")).await;
    assert!(matches!(&error, ExecError::BadCwd { detail } if detail.contains("/no/such/folder")), "{error:?}");
    let error = failure(agent.exec(["true"]).user("no-such-user")).await;
    assert!(matches!(&error, ExecError::UnknownUser { user } if user == "no-such-user"), "{error:?}");
    let error = failure(agent.exec(["true", "nul\0inside"])).await;
    assert!(matches!(&error, ExecError::BadRequest { .. }), "{error:?}");
    let error = failure(agent.exec([])).await;
    assert!(matches!(&error, ExecError::BadRequest { .. }), "{error:?}");
    // The agent is none the worse.
    assert!(agent.exec(["true"]).status().await.expect("runs").success());
}

#[tokio::test]
async fn a_signal_reaches_the_whole_group_and_shows_in_the_status() {
    let agent = Agent::start().await;
    let mut child = agent.sh("sleep 1000 & echo up; wait").spawn().await.expect("spawns");
    let mut up = [0; 3];
    child.stdout.as_mut().expect("piped").read_exact(&mut up).await.expect("prints");
    child.signal(15).await.expect("running");
    let status = timeout(PATIENCE, child.wait()).await.expect("no hang").expect("ends");
    assert_eq!(status.signal(), Some(15));
    assert!(matches!(child.start_kill(), Err(ExecError::Ended)));
}

#[tokio::test]
async fn kill_ends_what_ignores_everything_else() {
    let agent = Agent::start().await;
    let mut child = agent.sh("trap '' TERM HUP INT; echo up; while :; do sleep 1; done").spawn().await.expect("spawns");
    let mut up = [0; 3];
    child.stdout.as_mut().expect("piped").read_exact(&mut up).await.expect("prints");
    child.signal(15).await.expect("running");
    assert!(child.try_wait().expect("session lives").is_none());
    timeout(PATIENCE, child.kill()).await.expect("no hang").expect("killed");
    assert_eq!(child.wait().await.expect("ended").signal(), Some(9));
}

#[tokio::test]
async fn a_background_process_that_holds_the_output_does_not_hold_the_exit() {
    let agent = Agent::start().await;
    let started = std::time::Instant::now();
    let out = timeout(PATIENCE, agent.sh("setsid sleep 61.0451 & echo $!").output()).await.expect("no hang");
    let pid = String::from_utf8(out.expect("runs").stdout).expect("a number");
    assert!(started.elapsed().as_secs() < 30);
    assert!(support::running("61.0451"), "an exec that ended by itself leaves its background processes");
    assert!(agent.exec(["kill", pid.trim()]).status().await.expect("runs").success());
    support::gone("61.0451").await;
}

#[tokio::test]
async fn hundred_sessions_at_once_do_not_mix() {
    let agent = Agent::start().await;
    let mut sessions = JoinSet::new();
    for number in 0..100 {
        let builder = agent.sh(&format!("read line; echo $line {number}; exit {}", number % 100));
        sessions.spawn(async move {
            let mut child = builder.spawn().await.expect("spawns");
            let mut stdin = child.stdin.take().expect("piped");
            stdin.write_all(format!("line-{number}\n").as_bytes()).await.expect("reads");
            drop(stdin);
            (number, child.wait_with_output().await.expect("runs"))
        });
    }
    while let Some(session) = timeout(PATIENCE, sessions.join_next()).await.expect("no hang") {
        let (number, out) = session.expect("no panic");
        assert_eq!(out.stdout, format!("line-{number} {number}\n").as_bytes());
        assert_eq!(out.status.code(), Some(number % 100));
    }
}

#[tokio::test]
async fn five_hundred_live_sessions_and_a_thousand_in_a_row_leave_nothing_behind() {
    let agent = Agent::start().await;
    agent.idle().await;
    let idle = agent.descriptors().len();
    let mut children = Vec::new();
    for _ in 0..500 {
        children.push(agent.exec(["cat"]).spawn().await.expect("spawns"));
    }
    for child in &mut children {
        child.stdin.as_mut().expect("piped").write_all(b"x").await.expect("cat reads");
    }
    for child in &mut children {
        let stdout = child.stdout.as_mut().expect("piped");
        assert_eq!(timeout(PATIENCE, stdout.read_u8()).await.expect("no hang").expect("all are alive"), b'x');
    }
    for mut child in children {
        assert!(timeout(PATIENCE, child.wait()).await.expect("no hang").expect("ends").success());
    }
    for _ in 0..1000 {
        assert!(agent.exec(["true"]).status().await.expect("runs").success());
    }
    agent.idle().await;
    assert_eq!(agent.descriptors().len(), idle, "every descriptor is closed again");
}

#[tokio::test]
async fn signals_that_the_agent_was_started_to_ignore_are_not_ignored_by_processes() {
    let script = "trap '' HUP INT QUIT TERM USR1; exec \"$0\" \"$@\"";
    let program = env!("CARGO_BIN_EXE_kiln-agent");
    let agent = Agent::launch_by(std::process::Command::new("sh").args(["-c", script, program])).ready().await;
    for (name, number) in [("HUP", 1), ("INT", 2), ("QUIT", 3), ("TERM", 15), ("USR1", 10), ("PIPE", 13)] {
        let out = agent.sh(&format!("kill -{name} $$; echo survived")).output().await.expect("runs");
        assert_eq!((out.status.signal(), &out.stdout[..]), (Some(number), &b""[..]), "{name}");
    }
}

#[tokio::test]
async fn the_limit_of_open_files_is_not_the_agents() {
    let agent = Agent::start().await;
    let limit = std::process::Command::new("sh").args(["-c", "ulimit -n; ulimit -Hn"]).output().expect("runs").stdout;
    assert_eq!(agent.sh("ulimit -n; ulimit -Hn").output().await.expect("runs").stdout, limit);
}

#[tokio::test]
async fn a_terminal_is_a_terminal() {
    let agent = Agent::start().await;
    let out = agent.sh("tty; stty size; test -t 0 && test -t 1 && test -t 2").tty(true).winsize(91, 33).output();
    let out = timeout(PATIENCE, out).await.expect("no hang").expect("runs");
    assert!(out.success());
    let text = String::from_utf8(out.stdout).expect("text");
    assert!(text.starts_with("/dev/pts/") && text.contains("33 91"), "{text:?}");
    assert_eq!(out.stderr, b"");
}
