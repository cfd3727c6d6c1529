//! Commands in a real guest on the software engine: streams, exit codes, signals, identity, many at once.

#[path = "support/guest.rs"]
mod guest;
mod image_support;

use std::os::unix::process::ExitStatusExt;
use std::time::Duration;
use std::time::Instant;

use guest::boot;
use guest::boot_with;
use guest::config;
use guest::outcome;
use guest::sh;
use guest::shell;
use guest::show;
use guest::until;
use kiln::ExecError;
use serde_json::json;
use tokio::io::AsyncBufReadExt;
use tokio::io::AsyncReadExt;
use tokio::io::AsyncWriteExt;
use tokio::io::BufReader;
use tokio::task::JoinSet;

const SIGINT: u8 = 2;
const SIGKILL: u8 = 9;
const SIGTERM: u8 = 15;

#[tokio::test]
async fn output_exit_code_and_a_stderr_of_its_own() {
    let vm = boot().await;
    let out = vm.exec_builder().argv(["echo", "hi", "there"]).output().await.unwrap();
    assert!(out.success() && out.stdout == b"hi there\n" && out.stderr.is_empty(), "{}", show(&out));
    let out = outcome(&vm, "echo out; echo err >&2; exit 7").await;
    assert_eq!((out.status.code(), &out.stdout[..], &out.stderr[..]), (Some(7), &b"out\n"[..], &b"err\n"[..]));
    assert_eq!(outcome(&vm, "exit 127").await.status.code(), Some(127));
    assert_eq!(outcome(&vm, "exit 255").await.status.code(), Some(255));
}

#[tokio::test]
async fn cat_gives_back_what_it_is_fed() {
    let vm = boot().await;
    let sent: Vec<u8> = (0..1_000_000_u32).map(|index| (index % 251) as u8).collect();
    let mut child = vm.exec(["cat"]).await.unwrap();
    let (mut stdin, mut stdout) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
    let mut received = Vec::new();
    let feed = async {
        stdin.write_all(&sent).await?;
        stdin.shutdown().await
    };
    let drain = async { stdout.read_to_end(&mut received).await };
    tokio::try_join!(feed, drain).unwrap();
    assert!(child.wait().await.unwrap().success());
    assert_eq!(received.len(), sent.len());
    assert!(received == sent, "the bytes differ");
}

#[tokio::test]
async fn a_conversation_line_by_line() {
    let vm = boot().await;
    let mut child = vm.exec(["sh", "-c", "while read -r line; do echo \"<$line>\"; done; echo over"]).await.unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    for index in 0..50 {
        stdin.write_all(format!("{index}\n").as_bytes()).await.unwrap();
        assert_eq!(lines.next_line().await.unwrap().unwrap(), format!("<{index}>"));
    }
    drop(stdin);
    assert_eq!(lines.next_line().await.unwrap().unwrap(), "over");
    assert!(child.wait().await.unwrap().success());
}

#[tokio::test]
async fn signals_end_a_process_and_are_told_as_signals() {
    let vm = boot().await;
    for signal in [SIGTERM, SIGKILL, SIGINT] {
        // "exec": the signal must meet `sleep`, not a shell that has not replaced itself yet.
        let mut child = vm.exec(["sh", "-c", "echo up; exec sleep 1000"]).await.unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert_eq!(lines.next_line().await.unwrap().as_deref(), Some("up"));
        child.signal(signal).await.unwrap();
        let status = child.wait().await.unwrap();
        assert_eq!((status.code(), status.signal()), (None, Some(i32::from(signal))));
        assert!(matches!(child.signal(signal).await, Err(ExecError::Ended)));
    }
    let mut child = vm.exec(["sleep", "1000"]).await.unwrap();
    child.kill().await.unwrap();
    assert_eq!(child.wait().await.unwrap().signal(), Some(i32::from(SIGKILL)));
}

#[tokio::test]
async fn a_signal_can_be_caught() {
    let vm = boot().await;
    let script = "trap 'echo caught; exit 3' TERM; echo up; while :; do sleep 0.01; done";
    let mut child = vm.exec(["sh", "-c", script]).await.unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert_eq!(lines.next_line().await.unwrap().as_deref(), Some("up"));
    child.signal(SIGTERM).await.unwrap();
    // The group's `sleep` gets the signal too; ash may say so on stderr.
    assert_eq!(lines.next_line().await.unwrap().as_deref(), Some("caught"));
    assert_eq!(child.wait().await.unwrap().code(), Some(3));
}

#[tokio::test]
async fn the_images_environment_folder_and_user_hold_and_can_be_overridden() {
    let settings = json!({
        "Env": ["PATH=/bin", "COLOUR=red", "SHAPE=round=ish"], "WorkingDir": "/srv/app", "User": "guest",
    });
    let vm = boot_with(settings, config()).await;
    let who = "echo $COLOUR $SHAPE $HOME; pwd; id -u; id -g";
    assert_eq!(sh(&vm, who).await, "red round=ish /home/guest\n/srv/app\n1000\n1001\n");

    let out = shell(&vm, who).env("COLOUR", "blue").env("SHAPE", "").cwd("/etc").user("0:7").output().await.unwrap();
    assert_eq!(String::from_utf8_lossy(&out.stdout), "blue /root\n/etc\n0\n7\n", "{}", show(&out));
    let out = shell(&vm, "id -un").user("root").output().await.unwrap();
    assert_eq!(out.stdout, b"root\n");
    let out = shell(&vm, "echo $0 is $PATH; pwd").env("PATH", "/bin:/sbin").cwd("..").output().await.unwrap();
    assert_eq!(String::from_utf8_lossy(&out.stdout), "sh is /bin:/sbin\n/srv\n");
}

#[tokio::test]
async fn what_cannot_be_started_is_a_typed_error() {
    let vm = boot().await;
    let run = |argv: &[&str]| vm.exec_builder().argv(argv.iter().copied());
    let error = run(&["no-such-program"]).output().await.unwrap_err();
    assert!(matches!(&error, ExecError::NotFound { program } if program == "no-such-program"), "{error:?}");
    let error = run(&["/etc/passwd"]).output().await.unwrap_err();
    assert!(matches!(error, ExecError::NotExecutable { .. }), "{error:?}");
    let error = run(&["/etc"]).output().await.unwrap_err();
    assert!(matches!(error, ExecError::NotExecutable { .. }), "{error:?}");
    let error = run(&["true"]).cwd("/no/such/folder").output().await.unwrap_err();
    assert!(matches!(error, ExecError::BadCwd { .. }), "{error:?}");
    let error = run(&["true"]).user("nobody-here").output().await.unwrap_err();
    assert!(matches!(error, ExecError::UnknownUser { .. }), "{error:?}");
    let error = run(&[]).output().await.unwrap_err();
    assert!(matches!(error, ExecError::BadRequest { .. }), "{error:?}");
    // A file that begins like a program and is none.
    sh(&vm, "printf '\\177ELF' > /tmp/broken; chmod +x /tmp/broken").await;
    let error = run(&["/tmp/broken"]).output().await.unwrap_err();
    assert!(matches!(error, ExecError::NotExecutable { .. }), "{error:?}");
    assert_eq!(sh(&vm, "echo still here").await, "still here\n");
}

#[tokio::test]
async fn twenty_at_once() {
    let vm = boot().await;
    let mut running = JoinSet::new();
    for index in 0..20_u32 {
        // Each waits for its own input, so that all are alive at the same time.
        let exec = vm.exec_builder().argv(["sh", "-c", &format!("read word; echo {index} $word; exit {index}")]);
        running.spawn(async move {
            let mut child = exec.spawn().await.unwrap();
            (index, child.stdin.take().unwrap(), child)
        });
    }
    let mut children = Vec::new();
    while let Some(started) = running.join_next().await {
        children.push(started.unwrap());
    }
    for (index, mut stdin, child) in children {
        running.spawn(async move {
            stdin.write_all(format!("go{index}\n").as_bytes()).await.unwrap();
            (index, stdin, child)
        });
    }
    let mut answers = 0;
    while let Some(finished) = running.join_next().await {
        let (index, _stdin, child) = finished.unwrap();
        let out = child.wait_with_output().await.unwrap();
        assert_eq!(String::from_utf8_lossy(&out.stdout), format!("{index} go{index}\n"));
        assert_eq!(out.status.code(), Some(index as i32));
        answers += 1;
    }
    assert_eq!(answers, 20);
}

#[tokio::test]
async fn hundreds_one_after_the_other_leave_nothing_behind() {
    let vm = boot().await;
    let descriptors = "ls /proc/1/fd | wc -l";
    let before = sh(&vm, descriptors).await;
    for index in 0..300 {
        let out = vm.exec_builder().argv(["echo".to_owned(), index.to_string()]).output().await.unwrap();
        assert_eq!(out.stdout, format!("{index}\n").as_bytes());
    }
    assert_eq!(sh(&vm, descriptors).await, before);
}

#[tokio::test]
async fn a_large_output_arrives_whole_at_a_slow_reader() {
    const SIZE: usize = 24 << 20;
    let vm = boot().await;
    let line = "yes 0123456789abcdef0123456789abcde | head -c 25165824";
    let mut child = vm.exec(["sh", "-c", line]).await.unwrap();
    let mut stdout = child.stdout.take().unwrap();
    let (mut total, mut reads) = (0, 0_u32);
    let mut piece = vec![0; 64 << 10];
    loop {
        let read = stdout.read(&mut piece).await.unwrap();
        if read == 0 {
            break;
        }
        for (at, byte) in piece[..read].iter().enumerate() {
            assert_eq!(*byte, b"0123456789abcdef0123456789abcde\n"[(total + at) % 32], "byte {}", total + at);
        }
        total += read;
        reads += 1;
        if reads % 32 == 0 {
            // Slower than the guest writes: credit runs out, and the guest has to wait. Others do not.
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        if total > SIZE / 2 && total - read <= SIZE / 2 {
            assert_eq!(sh(&vm, "echo between").await, "between\n");
        }
    }
    assert_eq!(total, SIZE);
    assert!(child.wait().await.unwrap().success());
}

#[tokio::test]
async fn a_terminal_is_one_where_it_is_asked_for() {
    let vm = boot().await;
    let script = "test -t 0 && test -t 1 && test -t 2 && stty size";
    assert!(!outcome(&vm, script).await.success(), "three pipes");
    let out = vm.exec_builder().argv(["sh", "-c", script]).tty(true).winsize(91, 33).output().await.unwrap();
    assert!(out.success() && out.stdout == b"33 91\r\n", "{}", show(&out));
}

#[tokio::test]
async fn a_reader_that_leaves_stops_the_writer() {
    let vm = boot().await;
    let mut child = vm.exec(["yes"]).await.unwrap();
    let mut stdout = child.stdout.take().unwrap();
    stdout.read_exact(&mut [0; 100_000]).await.unwrap();
    drop(stdout);
    drop(child);
    until(&vm, "pidof yes || echo gone", "gone\n").await;
}

#[tokio::test]
async fn a_stuck_command_ends_with_its_timeout() {
    let vm = boot().await;
    for script in ["echo begun; sleep 1000", "echo begun; trap '' TERM INT HUP; while :; do :; done"] {
        let exec = vm.exec_builder().argv(["sh", "-c", script]).timeout(Duration::from_millis(300));
        let began = Instant::now();
        let out = exec.output().await.unwrap();
        assert!(out.timed_out && !out.success(), "{}", show(&out));
        assert_eq!((&out.stdout[..], out.status.signal()), (&b"begun\n"[..], Some(i32::from(SIGKILL))));
        assert!(began.elapsed() >= Duration::from_millis(300) && began.elapsed() < Duration::from_secs(10));
    }
    until(&vm, "pidof sleep || echo gone", "gone\n").await;
}

#[tokio::test]
async fn the_peak_of_memory_is_reported() {
    let vm = boot().await;
    let small = outcome(&vm, "true").await.peak_rss_kib.expect("the guest tells");
    let large = outcome(&vm, "exec dd if=/dev/zero of=/dev/null bs=16M count=1 2>/dev/null").await;
    let large = large.peak_rss_kib.expect("the guest tells");
    assert!(small > 0 && small < 8 << 10, "{small} KiB for a shell");
    assert!(large > 16 << 10 && large < 32 << 10, "{large} KiB for a buffer of 16 MiB");
}

#[tokio::test]
async fn a_background_process_does_not_hold_its_session() {
    let vm = boot().await;
    let began = Instant::now();
    let out = outcome(&vm, "(sleep 1000 > /dev/null 2>&1 < /dev/null & echo $! > /tmp/pid); echo done").await;
    assert!(out.success() && out.stdout == b"done\n", "{}", show(&out));
    assert!(began.elapsed() < Duration::from_secs(30));
    // It kept nothing of the session, so the session's end is not its own.
    assert_eq!(sh(&vm, "cat /proc/$(cat /tmp/pid)/comm").await, "sleep\n");
}

#[tokio::test]
async fn dropping_a_child_ends_the_process_and_nobody_elses() {
    let vm = boot().await;
    let mut other = vm.exec(["sh", "-c", "read word; echo $word"]).await.unwrap();
    let child = vm.exec(["sleep", "1000"]).await.unwrap();
    until(&vm, "pidof sleep > /dev/null && echo runs", "runs\n").await;
    drop(child);
    until(&vm, "pidof sleep || echo gone", "gone\n").await;
    other.stdin.take().unwrap().write_all(b"alive\n").await.unwrap();
    let out = other.wait_with_output().await.unwrap();
    assert_eq!(out.stdout, b"alive\n");
}
