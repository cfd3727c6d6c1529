//! What a guest goes through and still serves: no memory, no disk, no process ids, many sessions.

#[path = "support/guest.rs"]
mod guest;
mod image_support;

use std::time::Duration;

use guest::boot;
use guest::boot_with;
use guest::config;
use guest::outcome;
use guest::sh;
use guest::shell;
use guest::show;
use guest::until;
use kiln::ExecError;
use kiln::FileError;
use kiln::units::Bytes;
use serde_json::json;
use tokio::io::AsyncWriteExt;
use tokio::task::JoinSet;

/// What the agent holds: open files, and memory in KiB.
async fn agent(vm: &kiln::Vm) -> (u64, u64) {
    let both = sh(vm, "ls /proc/1/fd | wc -l; awk '/^VmRSS/ {print $2}' /proc/1/status").await;
    let mut numbers = both.lines().map(|line| line.trim().parse().expect("a number"));
    (numbers.next().expect("files"), numbers.next().expect("memory"))
}

#[tokio::test]
async fn ten_thousand_sessions_in_a_row_leave_nothing_behind() {
    let vm = boot().await;
    assert!(outcome(&vm, "true").await.success());
    let (files, memory) = agent(&vm).await;
    for index in 0..10_000 {
        let out = vm.exec_builder().argv(["/bin/true"]).timeout(guest::DEADLINE).output().await;
        assert!(out.as_ref().is_ok_and(kiln::ExecOutcome::success), "session {index}: {out:?}");
    }
    let (files_after, memory_after) = agent(&vm).await;
    assert_eq!(files_after, files);
    assert!(memory_after < memory + 512, "the agent grew from {memory} to {memory_after} KiB");
    assert_eq!(sh(&vm, "ls -d /proc/[0-9]* | wc -l; ps -o stat | grep -c Z; true").await.lines().last(), Some("0"));
}

#[tokio::test]
async fn five_hundred_sessions_at_once() {
    let vm = boot_with(json!({}), config().memory(Bytes::mib(768))).await;
    let mut running = JoinSet::new();
    for index in 0..500_u32 {
        let exec = vm.exec_builder().argv(["cat"]).timeout(Duration::from_secs(240));
        running.spawn(async move { (index, exec.spawn().await.expect("starts")) });
    }
    let mut children = running.join_all().await;
    // All of them are alive now.
    assert_eq!(sh(&vm, "pidof cat | wc -w").await, "500\n");
    let mut answering = JoinSet::new();
    while let Some((index, mut child)) = children.pop() {
        answering.spawn(async move {
            let mut stdin = child.stdin.take().expect("piped");
            stdin.write_all(format!("{index}\n").as_bytes()).await.expect("reads");
            drop(stdin);
            let out = child.wait_with_output().await.expect("ends");
            assert_eq!(String::from_utf8_lossy(&out.stdout), format!("{index}\n"));
            assert!(out.success(), "{}", show(&out));
        });
    }
    answering.join_all().await;
    assert_eq!(sh(&vm, "pidof cat || echo none").await, "none\n");
}

#[tokio::test]
async fn a_full_table_of_processes_is_told_and_passes() {
    let vm = boot().await;
    // A small table, in which the kernel's own threads are too. Once it is round it gives out no number under 300.
    sh(&vm, "echo 400 > /proc/sys/kernel/pid_max").await;
    let mut sleepers = Vec::new();
    let refused = loop {
        match vm.exec_builder().argv(["sleep", "1000"]).spawn().await {
            Ok(child) => sleepers.push(child),
            Err(error) => break error,
        }
        assert!(sleepers.len() < 400, "the table never fills");
    };
    assert!(
        matches!(&refused, ExecError::System { errno: 11, detail } if detail.contains("cannot start")),
        "{refused:?}"
    );
    assert!(sleepers.len() > 100, "{}", sleepers.len());
    // The agent itself needs no process for a file.
    vm.write_file("/tmp/note", "full").await.expect("written");
    let mut freed = sleepers.pop().expect("many");
    freed.kill().await.expect("killed");
    let out = vm.exec_builder().argv(["cat", "/tmp/note"]).output().await.expect("there is room for one");
    assert_eq!(out.stdout, b"full");
    drop(sleepers);
    until(&vm, "pidof sleep || echo gone", "gone\n").await;
}

#[tokio::test]
async fn a_full_disk_is_told_and_passes() {
    let vm = boot_with(json!({}), config().overlay_size(Bytes::mib(8))).await;
    // Fills up and fails.
    outcome(&vm, "cat /dev/zero > /filler 2> /dev/null").await;
    for size in [1000, 10 << 20] {
        let error = vm.write_file("/tmp/data", vec![1; size]).await.expect_err("no space");
        assert!(matches!(error, FileError::Guest { .. }), "{error:?}");
        assert_eq!(error.kind(), std::io::ErrorKind::StorageFull, "{error:?}");
    }
    let staged = vm.exec_builder().argv(["true"]).stage_file("/tmp/data", vec![1; 4096]).output().await;
    let error = staged.expect_err("no space");
    assert_eq!(error.kind(), std::io::ErrorKind::StorageFull, "{error:?}");
    assert_eq!(sh(&vm, "ls -A /tmp").await, "", "no debris");
    let host = tempfile::tempdir().expect("a folder");
    std::fs::write(host.path().join("big"), vec![7; 4 << 20]).expect("written");
    let error = vm.copy_in(host.path(), "/tree").await.expect_err("no space");
    assert_eq!(error.kind(), std::io::ErrorKind::StorageFull, "{error:?}");
    sh(&vm, "rm -r /filler /tree").await;
    vm.write_file("/tmp/data", vec![1; 1 << 20]).await.expect("there is space again");
    assert_eq!(sh(&vm, "wc -c < /tmp/data").await, "1048576\n");
}

#[tokio::test]
async fn a_guest_out_of_memory_kills_commands_and_not_the_agent() {
    let vm = boot_with(json!({}), config().memory(Bytes::mib(96)).overlay_size(Bytes::mib(16))).await;
    sh(&vm, "echo 1 > /proc/sys/vm/overcommit_memory").await;
    let mut quiet = vm.exec(["cat"]).await.expect("starts");
    for _ in 0..5 {
        let out = outcome(&vm, "exec dd if=/dev/zero of=/dev/null bs=200M count=1").await;
        assert!(!out.success(), "{}", show(&out));
    }
    // Several at once, each of which alone would fit.
    let mut greedy = JoinSet::new();
    for _ in 0..4 {
        let exec = shell(&vm, "exec dd if=/dev/zero of=/dev/null bs=40M count=3");
        greedy.spawn(async move { exec.output().await });
    }
    for out in greedy.join_all().await {
        // Killed or not: each has an end.
        assert!(!out.expect("an outcome").timed_out);
    }
    assert_eq!(sh(&vm, "echo alive").await, "alive\n");
    quiet.kill().await.expect("an answer, whether the guest killed it already or not");
}
