//! Real guests that are paused, cloned, and kept on disk while they run.

#[path = "support/guest.rs"]
mod guest;
mod image_support;

use std::collections::HashSet;
use std::time::Duration;
use std::time::Instant;

use futures::future::join_all;
use guest::DEADLINE;
use guest::boot;
use guest::busybox_image;
use guest::config;
use guest::outcome;
use guest::sh;
use guest::shell;
use guest::until;
use kiln::Vm;
use kiln::snapshot::Kind;
use kiln::snapshot::Snapshot;
use kiln::units::Bytes;
use kiln::vm::KeepError;
use kiln::vm::VmEnd;
use serde_json::json;

/// Counts, into a file that is never half written, and leaves the processor to others in between.
const COUNTER: &str = "(i=0; while :; do i=$((i+1)); echo $i > /tmp/new; mv /tmp/new /tmp/count; sleep 0.02; done) \
    </dev/null >/dev/null 2>&1 & until [ -s /tmp/count ]; do :; done";

async fn count(vm: &Vm) -> u64 {
    sh(vm, "cat /tmp/count").await.trim().parse().expect("a number")
}

async fn counts_on(vm: &Vm) {
    let before = count(vm).await;
    while count(vm).await <= before {}
}

/// 32 random bytes from the guest's kernel.
async fn random(vm: &Vm) -> String {
    sh(vm, "head -c 32 /dev/urandom | hexdump -e '32/1 \"%02x\"'").await
}

#[tokio::test]
async fn a_paused_guest_stands_still_and_goes_on() {
    let vm = boot().await;
    sh(&vm, COUNTER).await;
    vm.pause().await.expect("pauses");
    vm.pause().await.expect("is paused already");
    let waiting = shell(&vm, "cat /tmp/count").output();
    tokio::pin!(waiting);
    let early = tokio::time::timeout(Duration::from_millis(300), &mut waiting).await;
    assert!(early.is_err(), "a paused guest has answered: {early:?}");
    vm.resume().await.expect("resumes");
    vm.resume().await.expect("runs already");
    assert!(waiting.await.expect("an answer").success());
    counts_on(&vm).await;
    // A paused guest can be stopped, and then neither pauses nor resumes.
    vm.pause().await.expect("pauses");
    vm.shutdown().await.expect("stops");
    assert!(vm.pause().await.is_err());
    assert!(vm.resume().await.is_err());
    assert!(vm.fork(1).await.is_err());
    assert!(matches!(vm.wait().await, VmEnd::Stopped));
}

#[tokio::test]
async fn clones_go_on_from_the_same_instant_each_by_itself() {
    let vm = boot().await;
    sh(&vm, COUNTER).await;
    // A pipe with something in it and both ends open, in a process that waits.
    sh(
        &vm,
        "mkfifo /tmp/go; (echo kept; read x < /tmp/go; echo $x) 2>/dev/null | (read a; read b; echo $a $b > /tmp/out) &
        echo parent > /dev/shm/who",
    )
    .await;
    let before = count(&vm).await;
    let clones = vm.fork(5).await.expect("clones");
    assert_eq!(clones.len(), 5);
    for (n, clone) in clones.iter().enumerate() {
        assert!(count(clone).await >= before);
        counts_on(clone).await;
        assert_eq!(
            sh(clone, &format!("cat /dev/shm/who; echo {n} > /dev/shm/who; echo {n} > /tmp/go")).await,
            "parent\n"
        );
    }
    counts_on(&vm).await;
    for (n, clone) in clones.iter().enumerate() {
        assert_eq!(sh(clone, "cat /dev/shm/who").await, format!("{n}\n"));
        until(clone, "cat /tmp/out", &format!("kept {n}\n")).await;
    }
    assert_eq!(sh(&vm, "cat /dev/shm/who; ls /tmp/out 2>/dev/null || echo none").await, "parent\nnone\n");
}

#[tokio::test]
async fn clones_of_clones_of_clones() {
    let mut line = vec![boot().await];
    sh(&line[0], &format!("{COUNTER}; echo 0 > /tmp/generation")).await;
    for generation in 1..6 {
        let parent = &line[line.len() - 1];
        let mut clones = parent.fork(2).await.expect("clones");
        let (one, other) = (clones.remove(0), clones.remove(0));
        // Some memory of each generation's own.
        let own = format!("head -c 2000000 /dev/urandom > /tmp/g{generation}; sha256sum /tmp/g* > /tmp/sums");
        sh(&one, &format!("echo {generation} >> /tmp/generation; {own}")).await;
        let seen = sh(&other, "cat /tmp/generation").await;
        assert_eq!(seen.lines().count(), generation, "{seen}");
        line.push(one);
    }
    let last = &line[line.len() - 1];
    assert_eq!(sh(last, "cat /tmp/generation").await, "0\n1\n2\n3\n4\n5\n");
    sh(last, "sha256sum -c /tmp/sums").await;
    join_all(line.iter().map(counts_on)).await;
    let all = join_all(line.iter().map(random)).await;
    assert_eq!(all.iter().collect::<HashSet<_>>().len(), line.len(), "{all:?}");
    let ids = join_all(line[1..].iter().map(|vm| sh(vm, "cat /etc/machine-id"))).await;
    assert_eq!(ids.iter().collect::<HashSet<_>>().len(), line.len() - 1, "{ids:?}");
}

#[tokio::test]
async fn a_paused_guest_can_be_cloned_and_stays_paused() {
    let vm = boot().await;
    sh(&vm, COUNTER).await;
    vm.pause().await.expect("pauses");
    let clones = vm.fork(2).await.expect("clones");
    join_all(clones.iter().map(counts_on)).await;
    let early = tokio::time::timeout(Duration::from_millis(200), outcome(&vm, "true")).await;
    assert!(early.is_err(), "the original was paused");
    vm.resume().await.expect("resumes");
    counts_on(&vm).await;
}

#[tokio::test]
async fn a_clone_that_is_not_waited_for_leaves_its_original_alone() {
    let vm = boot().await;
    sh(&vm, COUNTER).await;
    for n in 0..20 {
        // Whatever it is at when it is dropped.
        let _ = tokio::time::timeout(Duration::from_micros(700 * n), vm.fork(3)).await;
    }
    counts_on(&vm).await;
    assert_eq!(vm.fork(1).await.expect("clones").len(), 1);
}

/// All of a snapshot's memory.
fn memory(snapshot: &Snapshot) -> Vec<u8> {
    let ram = snapshot.map_memory().expect("maps");
    let mut bytes = vec![0; ram.size().0 as usize];
    ram.read_bytes(0, &mut bytes).expect("all of it");
    bytes
}

#[tokio::test]
async fn ten_diffs_in_a_row_are_what_a_full_snapshot_is() {
    let folder = tempfile::tempdir().expect("a folder");
    let (_place, image) = busybox_image(json!({})).await;
    let vm = image.boot(config().memory(Bytes::mib(128))).await.expect("boots");
    assert!(matches!(vm.snapshot_diff(folder.path().join("none")).await, Err(KeepError::NoParent)));
    let base = vm.snapshot(folder.path().join("0")).await.expect("kept");
    assert_eq!(base.kind(), Kind::Full);
    // On a machine that was booted the pages are found by comparing, on a restored one by the host's page tables.
    let mut machine = vm;
    for n in 1..=10 {
        if n == 5 {
            let chain = open_chain(folder.path(), n - 1);
            machine = image.restore(&chain, config()).await.expect("restores");
        }
        let old = n.saturating_sub(3);
        let line = "head -c 300000 /dev/urandom > /tmp/NEW; sha256sum /tmp/[0-9]* > /tmp/sums; rm -f /tmp/OLD";
        sh(&machine, &line.replace("NEW", &n.to_string()).replace("OLD", &old.to_string())).await;
        // Paused, so that the two are of the same instant.
        machine.pause().await.expect("pauses");
        let diff = machine.snapshot_diff(folder.path().join(n.to_string())).await.expect("kept");
        assert_eq!(diff.kind(), Kind::Diff);
        diff.verify().expect("undamaged");
        if n == 10 {
            let full = machine.snapshot(folder.path().join("full")).await.expect("kept");
            let chain = open_chain(folder.path(), n);
            assert_eq!(chain.state(), full.state());
            assert!(memory(&chain) == memory(&full), "the chain is not what the guest had");
            assert!(diff.memory_on_disk().expect("a size").0 < full.memory_on_disk().expect("a size").0 / 2);
            let last = image.restore(&chain, config()).await.expect("restores");
            assert_eq!(sh(&last, "cd /tmp; ls [0-9]* | sort -n | tr '\\n' ' '").await, "8 9 10 ");
            sh(&last, "grep -E ' /tmp/(8|9|10)$' /tmp/sums | sha256sum -c").await;
        }
        machine.resume().await.expect("resumes");
    }
}

fn open_chain(folder: &std::path::Path, last: usize) -> Snapshot {
    let base = Snapshot::open(&folder.join("0")).expect("opens");
    (1..=last).fold(base, |below, n| Snapshot::open_on(&folder.join(n.to_string()), &below).expect("opens"))
}

#[tokio::test]
async fn a_snapshot_of_a_running_guest_is_of_one_instant() {
    let folder = tempfile::tempdir().expect("a folder");
    let (_place, image) = busybox_image(json!({})).await;
    let vm = image.start(config()).await.expect("starts");
    // The second file never says more than the first, and at most one less.
    let pair = "(i=0; while :; do i=$((i+1)); echo $i > /tmp/a; echo $i > /tmp/b; done) </dev/null >/dev/null 2>&1 &
        echo $! > /tmp/pid; until [ -s /tmp/b ]; do :; done";
    sh(&vm, pair).await;
    let mut last = 0;
    for _ in 0..10 {
        let snapshot = vm.snapshot(folder.path().join("live")).await.expect("kept");
        snapshot.verify().expect("undamaged");
        let restored = image.restore(&snapshot, config()).await.expect("restores");
        let seen =
            sh(&restored, "kill -STOP $(cat /tmp/pid); cat /tmp/a; echo; cat /tmp/b; kill -CONT $(cat /tmp/pid)").await;
        let numbers: Vec<u64> = seen.split_whitespace().map(|word| word.parse().expect("a number")).collect();
        // A file that is being written anew is empty.
        if let [a, b] = numbers[..] {
            assert!(a == b || a == b + 1, "{seen}");
            assert!(b >= last, "{b} after {last}");
            last = b;
        }
    }
    assert!(last > 0, "no file was ever whole");
    let before = sh(&vm, "cat /tmp/pid; cat /tmp/a").await;
    let began = Instant::now();
    while sh(&vm, "cat /tmp/pid; cat /tmp/a").await == before {
        assert!(began.elapsed() < DEADLINE, "the guest has stopped");
    }
}

#[tokio::test]
async fn a_snapshot_belongs_to_its_image() {
    let folder = tempfile::tempdir().expect("a folder");
    let (_place, image) = busybox_image(json!({})).await;
    let (_elsewhere, other) = guest::image_of(
        &image_support::LayerBlob::plain(image_support::Tar::new().file("other", b"file").finish()),
        json!({}),
    )
    .await;
    let vm = image.start(config()).await.expect("starts");
    let snapshot = vm.snapshot(folder.path().join("one")).await.expect("kept");
    let error = other.restore(&snapshot, config()).await.expect_err("is of another image");
    let kiln::StartError::Snapshot(kiln::snapshot::SnapshotError::Origin { what, .. }) = &error else {
        panic!("{error:?}")
    };
    assert_eq!(*what, "root image");
    assert!(image.restore(&snapshot, config()).await.is_ok());
}
