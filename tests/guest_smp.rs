//! Linux guests with several vCPUs: all of them work, and go with the guest into snapshots and clones.

#[path = "support/guest.rs"]
mod guest;
mod image_support;

use std::collections::HashSet;

use guest::boot_with;
use guest::busybox_image;
use guest::config;
use guest::sh;
use kiln::Vm;
use kiln::snapshot::Snapshot;
use serde_json::json;

/// Counts up to `$1` in the shell.
const COUNT: &str = "count() { i=0; while [ $i -lt $1 ]; do i=$((i+1)); done; echo $i; }";

/// All vCPUs are there, do work at once, and each does work alone.
async fn works(vm: &Vm, vcpus: u32) {
    assert_eq!(sh(vm, "nproc").await.trim(), vcpus.to_string());
    assert_eq!(sh(vm, "grep -c ^processor /proc/cpuinfo").await.trim(), vcpus.to_string());
    let jobs = 2 * vcpus;
    let line = format!("{COUNT}; for n in $(seq {jobs}); do count 3000 & done; wait");
    assert_eq!(sh(vm, &line).await, "3000\n".repeat(jobs as usize));
    for cpu in 0..vcpus {
        // Field 39 of a process's stat is the processor that it ran on last (proc_pid_stat(5)).
        let line = format!("taskset -c {cpu} sh -c '{COUNT}; count 1000; cut -d\" \" -f39 /proc/self/stat'");
        assert_eq!(sh(vm, &line).await, format!("1000\n{cpu}\n"));
    }
}

#[tokio::test]
async fn all_vcpus_of_a_guest_work() {
    for vcpus in [2, 4] {
        let vm = boot_with(json!({}), config().vcpus(vcpus)).await;
        works(&vm, vcpus.into()).await;
        vm.shutdown().await.expect("stops");
    }
}

#[tokio::test]
async fn processes_on_different_vcpus_talk_to_each_other() {
    let vm = boot_with(json!({}), config().vcpus(2)).await;
    // Through a pipe, each waking the other; then both at one file, in turns.
    let line = "taskset -c 0 seq 2000 | taskset -c 1 awk '{ s += $1 } END { print s }'";
    assert_eq!(sh(&vm, line).await.trim(), "2001000");
    let add = "for n in $(seq 100); do until mkdir /tmp/turn 2>/dev/null; do :; done; \
        echo $(($(cat /tmp/sum) + 1)) > /tmp/sum; rmdir /tmp/turn; done";
    sh(&vm, &format!("echo 0 > /tmp/sum; ({add}) & ({add}) & wait")).await;
    assert_eq!(sh(&vm, "cat /tmp/sum").await.trim(), "200");
}

#[tokio::test]
async fn each_number_of_vcpus_is_baked_by_itself() {
    let (_place, image) = busybox_image(json!({})).await;
    for vcpus in [2, 1, 4] {
        let vm = image.start(config().vcpus(vcpus)).await.expect("starts");
        assert_eq!(sh(&vm, "nproc").await.trim(), vcpus.to_string());
        vm.shutdown().await.expect("stops");
    }
}

#[tokio::test]
async fn snapshots_and_clones_have_all_vcpus() {
    let (_place, image) = busybox_image(json!({})).await;
    let vm = image.start(config().vcpus(2)).await.expect("starts");
    // Busy on both while it is kept.
    let busy = "(while :; do i=$((i+1)); echo $i > /tmp/new$1; mv /tmp/new$1 /tmp/count$1; done)";
    for n in [0, 1] {
        let line = format!(
            "set {n}; taskset -p {} $$ > /dev/null; {busy} </dev/null >/dev/null 2>&1 & echo $! >> /tmp/busy",
            1 << n
        );
        sh(&vm, &line).await;
    }
    let counts = async |vm: &Vm| sh(vm, "cat /tmp/count0 /tmp/count1").await;
    let goes_on = async |vm: &Vm| {
        let mut seen = HashSet::new();
        // Both numbers move: two different ones of each.
        for n in [0, 1] {
            while seen.iter().filter(|(which, _)| *which == n).count() < 2 {
                seen.insert((n, sh(vm, &format!("cat /tmp/count{n} 2>/dev/null || :")).await));
            }
        }
    };
    goes_on(&vm).await;
    let folder = tempfile::tempdir().expect("a folder");
    let at = folder.path().join("kept");
    vm.snapshot(&at).await.expect("kept");
    let clones = vm.fork(2).await.expect("cloned");
    let snapshot = Snapshot::open(&at).expect("a snapshot");
    // It has two, whatever is asked for.
    let restored = image.restore(&snapshot, config()).await.expect("restored");
    for vm in clones.iter().chain([&vm, &restored]) {
        assert!(!counts(vm).await.is_empty());
        goes_on(vm).await;
        assert_eq!(sh(vm, "nproc").await.trim(), "2");
    }
    sh(&restored, "kill $(cat /tmp/busy)").await;
    works(&restored, 2).await;
}
