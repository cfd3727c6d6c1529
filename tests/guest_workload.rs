//! The image's own command in a real guest.

#[path = "support/guest.rs"]
mod guest;
mod image_support;
#[path = "support/logs.rs"]
mod logs;

use std::os::unix::process::ExitStatusExt;
use std::time::Duration;

use futures::StreamExt;
use guest::DEADLINE;
use guest::boot;
use guest::boot_with;
use guest::config;
use guest::sh;
use kiln::ExecError;
use kiln::Vm;
use kiln::Workload;
use kiln::WorkloadError;
use logs::all;
use logs::hear;
use serde_json::json;

/// Starts a shell line in place of the image's command.
async fn start(vm: &Vm, line: &str) -> Workload {
    vm.workload().argv(["sh", "-c", line]).start().await.unwrap_or_else(|error| panic!("{line}: {error:?}"))
}

#[tokio::test]
async fn the_images_command_runs_as_the_image_says() {
    let script = "echo $0 $1 $COLOUR $HOME; pwd; id -u; id -g; id -G; stat -c '%a %u %g' . ..; cat; echo $$; echo done >&2; exit 7";
    let settings = json!({
        "Entrypoint": ["sh", "-c", script], "Cmd": ["zero", "one"], "Env": ["PATH=/bin", "COLOUR=red"],
        "WorkingDir": "/srv/made/here", "User": "guest", "StopSignal": "SIGUSR1",
    });
    let vm = boot_with(settings, config()).await;
    let workload = vm.workload().start().await.unwrap();
    let expected = |colour, user: &str, pid| {
        let owner = "755 0 0\n755 0 0\n";
        format!("zero one {colour} {user}{owner}{pid}\n")
    };
    let guest = "/home/guest\n/srv/made/here\n1000\n1001\n1001 2002\n";
    let logs = (expected("red", guest, workload.id()), "done\n".to_owned(), 0);
    assert_eq!(all(workload.logs()).await, logs);
    let exit = workload.wait().await.unwrap();
    assert_eq!((exit.status.code(), exit.timed_out), (Some(7), false));
    assert!(exit.peak_rss_kib.is_some_and(|kib| kib > 0) && exit.duration < DEADLINE, "{exit:?}");
    assert_eq!(all(workload.logs()).await, logs, "after its end");

    // What was described in its place counts for one run only.
    let other = vm.workload().env("COLOUR", "blue").user("0:7").cwd("/srv/made").start().await.unwrap();
    let (stdout, ..) = all(other.logs()).await;
    assert_eq!(stdout, expected("blue", "/root\n/srv/made\n0\n7\n7\n", other.id()));
    let (again, ..) = all(vm.workload().start().await.unwrap().logs()).await;
    assert!(again.starts_with("zero one red "), "{again}");
    assert!(matches!(workload.wait().await, Ok(same) if same == exit));
    assert!(matches!(workload.logs().next().await, Some(Err(ExecError::Replaced))));
}

#[tokio::test]
async fn an_image_without_a_command_has_no_workload_of_its_own() {
    let vm = boot().await;
    assert!(matches!(vm.workload().start().await, Err(WorkloadError::NoCommand)));
    assert!(matches!(vm.workload().attach().await, Err(WorkloadError::NotStarted)));
    let error = vm.workload().argv(["no-such-program"]).start().await.unwrap_err();
    assert!(matches!(&error, WorkloadError::Exec(ExecError::NotFound { .. })), "{error:?}");
    let error = vm.workload().argv(["/etc/passwd"]).start().await.unwrap_err();
    assert!(matches!(&error, WorkloadError::Exec(ExecError::NotExecutable { .. })), "{error:?}");
    let error = vm.workload().argv(["true"]).user("nobody-here").start().await.unwrap_err();
    assert!(matches!(&error, WorkloadError::Exec(ExecError::UnknownUser { .. })), "{error:?}");

    let first = vm.workload().argv(["sleep", "1000"]).start().await.unwrap();
    assert!(matches!(vm.workload().argv(["true"]).start().await, Err(WorkloadError::AlreadyRunning)));
    assert_eq!(sh(&vm, &format!("cat /proc/{}/comm", first.id())).await, "sleep\n");
    first.signal(9).await.unwrap();
    let exit = first.wait().await.unwrap();
    assert_eq!((exit.status.code(), exit.status.signal()), (None, Some(9)));
    assert!(matches!(first.signal(9).await, Err(ExecError::Ended)));
    let second = start(&vm, "echo second").await;
    assert_eq!(all(second.logs()).await.0, "second\n");
    assert!(second.wait().await.unwrap().success());
}

#[tokio::test]
async fn it_outlives_its_handles_and_serves_many_readers() {
    let vm = boot().await;
    sh(&vm, "mkfifo /gate").await;
    let script = "exec 3<>/gate; echo one; echo two >&2; read x <&3; echo three; read x <&3; seq 1 20000; exit 3";
    let workload = start(&vm, script).await;
    let id = workload.id();
    let mut early = workload.logs();
    hear(&mut early, "one\n").await;
    drop(workload);
    let mut left = vm.workload().attach().await.unwrap().logs();
    hear(&mut left, "one\n").await;
    drop(left);
    sh(&vm, "echo go > /gate").await;
    hear(&mut early, "three\n").await;

    let workload = vm.workload().attach().await.unwrap();
    assert_eq!(workload.id(), id);
    let readers: Vec<_> = (0..5).map(|_| tokio::spawn(all(workload.logs()))).collect();
    let waiters: Vec<_> = (0..5).map(|_| workload.clone()).collect();
    let waiters: Vec<_> = waiters.into_iter().map(|own| tokio::spawn(async move { own.wait().await })).collect();
    sh(&vm, "echo go > /gate").await;
    let numbers: String = (1..=20_000).map(|number| format!("{number}\n")).collect();
    // What comes after what this one has heard; all of it is within what the agent keeps.
    assert_eq!(all(early).await, (numbers.clone(), String::new(), 0));
    for reader in readers {
        assert_eq!(reader.await.unwrap(), (format!("one\nthree\n{numbers}"), "two\n".to_owned(), 0));
    }
    for waiter in waiters {
        assert_eq!(waiter.await.unwrap().unwrap().status.code(), Some(3));
    }
}

#[tokio::test]
async fn it_waits_for_no_reader_and_tells_what_a_reader_missed() {
    let vm = boot().await;
    sh(&vm, "mkfifo /gate").await;
    let size = 3_000_000;
    let workload = start(&vm, &format!("exec 3<>/gate; echo up; read x <&3; head -c {size} /dev/zero; echo end")).await;
    let mut stuck = workload.logs();
    hear(&mut stuck, "up\n").await;
    sh(&vm, "echo go > /gate").await;
    // Nobody reads, and it ends all the same.
    let exit = tokio::time::timeout(DEADLINE, workload.wait()).await.expect("in time").unwrap();
    assert!(exit.success(), "{exit:?}");
    let (late, _, lost) = all(workload.logs()).await;
    assert_eq!((late.len() as u64 + lost, late.len()), (size + 7, 256 << 10));
    assert!(late.ends_with("\0end\n"));
    let (rest, _, lost) = all(stuck).await;
    assert!(lost > 0 && rest.ends_with("\0end\n"), "{lost}");
    assert_eq!(rest.len() as u64 + lost, size + 4);
}

#[tokio::test]
async fn stopping_sends_the_images_signal_and_kills_after_the_grace() {
    let script = "trap 'echo usr1; exit 5' USR1; trap 'echo term' TERM; echo up; while :; do sleep 0.01; done";
    let command = json!(["sh", "-c", script]);
    let vm = boot_with(json!({ "Cmd": command, "StopSignal": "SIGUSR1" }), config()).await;
    let workload = vm.workload().start().await.unwrap();
    let mut logs = workload.logs();
    hear(&mut logs, "up\n").await;
    assert_eq!(workload.stop(DEADLINE).await.unwrap().status.code(), Some(5));
    assert_eq!(all(logs).await.0, "usr1\n");

    // Another signal than it ends of.
    let workload = vm.workload().stop_signal(15).start().await.unwrap();
    let mut logs = workload.logs();
    hear(&mut logs, "up\n").await;
    let exit = workload.stop(Duration::from_millis(500)).await.unwrap();
    assert_eq!(exit.status.signal(), Some(9));
    assert_eq!(workload.stop(DEADLINE).await.unwrap(), exit, "it has ended");
    hear(&mut logs, "term\n").await;
    vm.shutdown().await.unwrap();

    // What is no signal counts as none.
    let vm = boot_with(json!({ "Cmd": ["sleep", "1000"], "StopSignal": "SIGNONSENSE" }), config()).await;
    let workload = vm.workload().start().await.unwrap();
    assert_eq!(workload.stop(DEADLINE).await.unwrap().status.signal(), Some(15));
}

#[tokio::test]
async fn a_workdir_that_cannot_be_is_an_error_of_commands_and_not_of_the_boot() {
    let vm = boot_with(json!({ "Cmd": ["pwd"], "WorkingDir": "/etc/passwd/below" }), config()).await;
    let error = vm.workload().start().await.unwrap_err();
    assert!(matches!(&error, WorkloadError::Exec(ExecError::BadCwd { .. })), "{error:?}");
    let error = vm.exec_builder().argv(["pwd"]).output().await.unwrap_err();
    assert!(matches!(&error, ExecError::BadCwd { .. }), "{error:?}");
    let workload = vm.workload().cwd("/etc").start().await.unwrap();
    assert_eq!(all(workload.logs()).await.0, "/etc\n");
}

#[tokio::test]
async fn a_guest_that_ends_is_an_error_and_not_an_end() {
    let vm = boot().await;
    let workload = start(&vm, "echo up; exec sleep 1000").await;
    let mut logs = workload.logs();
    hear(&mut logs, "up\n").await;
    let waiting = {
        let workload = workload.clone();
        tokio::spawn(async move { workload.wait().await })
    };
    vm.shutdown().await.unwrap();
    let item = tokio::time::timeout(DEADLINE, logs.next()).await.expect("in time");
    assert!(matches!(&item, Some(Err(ExecError::Connect(_) | ExecError::AgentGone(_)))), "{item:?}");
    assert!(logs.next().await.is_none());
    let ended = tokio::time::timeout(DEADLINE, waiting).await.expect("in time").unwrap();
    assert!(matches!(&ended, Err(ExecError::Connect(_) | ExecError::AgentGone(_))), "{ended:?}");
}
