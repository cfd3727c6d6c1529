//! A Linux guest that is paused, saved to a folder and restored from it.

#[path = "support/guest.rs"]
mod guest;
mod image_support;
#[path = "support/linux.rs"]
mod linux;

use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use guest::DEADLINE;
use kiln::exec;
use kiln::snapshot::{Contents, Kind, Origin, Snapshot};
use kiln::transport::Connector;
use kiln::units::Bytes;
use kiln::vmm::Machine;
use linux::Root;
use linux::boot;
use linux::sh;
use tempfile::TempDir;
use tokio::io::AsyncReadExt;

const MEMORY: Bytes = Bytes::mib(128);
const AGENT_PORT: u32 = 1028;

/// Counts as fast as it can, into a file.
const COUNTER: &str = "(i=0; while :; do i=$((i+1)); echo $i > /tmp/new; mv /tmp/new /tmp/count; done) \
    </dev/null >/dev/null 2>&1 & until [ -s /tmp/count ]; do :; done";

fn origin() -> Origin {
    Origin { root: "root".to_owned(), kernel: "kernel".to_owned(), agent: "agent".to_owned() }
}

/// Saves a paused machine.
async fn save(machine: &Machine, folder: &TempDir, name: &str, since: Option<&Snapshot>) -> Snapshot {
    let (state, memory) = (machine.save().await.expect("saves"), Arc::clone(machine.memory()));
    let (target, since) = (folder.path().join(name), since.cloned());
    let write = move || {
        let contents = Contents { state: &state, memory: &memory, origin: &origin(), since: since.as_ref() };
        Snapshot::write(&target, &contents)
    };
    tokio::task::spawn_blocking(write).await.expect("no panic").expect("writes")
}

async fn restore(snapshot: &Snapshot, root: &Root) -> Machine {
    let mut machine = snapshot.restore(guest::engine().as_ref(), &root.disks()).await.expect("restores");
    machine.resume();
    machine
}

async fn count(machine: &Machine) -> u64 {
    sh(machine, "cat /tmp/count").await.trim().parse().expect("a number")
}

#[tokio::test]
async fn a_restored_guest_goes_on_and_its_agent_answers_at_once() {
    let (root, folder) = (Root::new().await, tempfile::tempdir().expect("a folder"));
    let mut machine = boot(&root, MEMORY).await;
    sh(&machine, COUNTER).await;
    let uptime = |text: String| text.split(' ').next().and_then(|s| s.parse::<f64>().ok()).expect("a number");
    let up = uptime(sh(&machine, "cat /proc/uptime").await);
    let counted = count(&machine).await;
    machine.pause().await.expect("pauses");
    let snapshot = save(&machine, &folder, "one", None).await;
    snapshot.verify().expect("undamaged");
    // Time does not pass in a snapshot.
    tokio::time::sleep(Duration::from_secs(3)).await;
    machine.resume();
    assert!(count(&machine).await >= counted, "the saved machine runs on");
    let old_after = uptime(sh(&machine, "cat /proc/uptime").await);
    assert!((up..up + 2.5).contains(&old_after), "{up} {old_after}: the pause was time to the guest");
    drop(machine);

    let again = restore(&Snapshot::open(&folder.path().join("one")).expect("opens"), &root).await;
    let info = exec::probe(again.connector(), DEADLINE).await.expect("the agent answers");
    assert!(info.tells_starts);
    let first = count(&again).await;
    assert!(first >= counted, "{first} after {counted}");
    guest_counts_on(&again, first).await;
    let up_after = uptime(sh(&again, "cat /proc/uptime").await);
    assert!((up..up + 2.5).contains(&up_after), "{up} {up_after}");
    // Disk, entropy and the file system are as they were.
    sh(&again, "cat /bin/busybox > /dev/null; head -c 1000 /dev/hwrng > /dev/null || true; echo x > /tmp/x").await;
}

async fn guest_counts_on(machine: &Machine, from: u64) {
    while count(machine).await <= from {}
}

#[tokio::test]
async fn connections_are_reset_on_both_sides_and_new_ones_are_not() {
    let (root, folder) = (Root::new().await, tempfile::tempdir().expect("a folder"));
    let mut machine = boot(&root, MEMORY).await;
    // Sessions that the guest knows, in the middle of something.
    let exec = exec::ExecBuilder::over(Arc::new(machine.connector().clone()));
    let mut sessions = Vec::new();
    for _ in 0..8 {
        sessions.push(exec.clone().argv(["cat"]).spawn().await.expect("starts"));
    }
    machine.pause().await.expect("pauses");
    let snapshot = save(&machine, &folder, "one", None).await;
    drop((sessions, machine));
    for _ in 0..3 {
        let again = restore(&snapshot, &root).await;
        // The same number of new ones, at once: none of them may be taken for an old one or be reset with them.
        let new = (0..16).map(|n| {
            let again = &again;
            async move { assert_eq!(sh(again, &format!("echo {n}")).await, format!("{n}\n")) }
        });
        join_all(new).await;
        // The agent has let go of the old sessions, and their processes with them.
        let cats =
            "for n in $(seq 100); do [ $(pgrep -x cat | wc -l) = 0 ] && break; sleep 0.1; done; pgrep -x cat | wc -l";
        assert_eq!(sh(&again, cats).await, "0\n");
    }
}

#[tokio::test]
async fn a_snapshot_taken_before_the_guest_has_heard_of_its_restore_is_good_too() {
    let (root, folder) = (Root::new().await, tempfile::tempdir().expect("a folder"));
    let mut machine = boot(&root, MEMORY).await;
    let held = machine.connector().connect(AGENT_PORT).await.expect("connects");
    machine.pause().await.expect("pauses");
    let mut snapshot = save(&machine, &folder, "0", None).await;
    drop((held, machine));
    for n in 1..6 {
        let mut again = restore(&snapshot, &root).await;
        // At whatever point of its hearing it is caught.
        tokio::time::sleep(Duration::from_micros(200 * (n - 1))).await;
        again.pause().await.expect("pauses");
        snapshot = save(&again, &folder, &n.to_string(), None).await;
        again.resume();
        assert_eq!(sh(&again, "echo old").await, "old\n");
    }
    let last = restore(&snapshot, &root).await;
    let probes = (0..16).map(|_| exec::probe(last.connector(), DEADLINE));
    for answer in join_all(probes).await {
        answer.expect("answers");
    }
}

#[tokio::test]
async fn twenty_restores_of_one_snapshot_are_independent() {
    let (root, folder) = (Root::new().await, tempfile::tempdir().expect("a folder"));
    let mut machine = boot(&root, MEMORY).await;
    sh(&machine, "echo parent > /tmp/who").await;
    machine.pause().await.expect("pauses");
    let snapshot = save(&machine, &folder, "one", None).await;
    drop(machine);
    let guests = (0..20).map(|n| {
        let (snapshot, root) = (&snapshot, &root);
        async move {
            let machine = restore(snapshot, root).await;
            assert_eq!(sh(&machine, &format!("cat /tmp/who; echo {n} > /tmp/who")).await, "parent\n");
            machine
        }
    });
    let machines = join_all(guests).await;
    for (n, machine) in machines.iter().enumerate() {
        assert_eq!(sh(machine, "cat /tmp/who").await, format!("{n}\n"));
    }
    drop(machines);
    snapshot.verify().expect("no guest has written to the file");
}

#[tokio::test]
async fn a_diff_holds_what_changed_and_restores_the_same() {
    let (root, folder) = (Root::new().await, tempfile::tempdir().expect("a folder"));
    let mut machine = boot(&root, MEMORY).await;
    machine.pause().await.expect("pauses");
    let base = save(&machine, &folder, "base", None).await;
    // On the machine that runs on, and on one that was restored: found by comparing, and by the host's page tables.
    machine.resume();
    sh(&machine, "head -c 3000000 /dev/urandom > /tmp/data; sha256sum /tmp/data > /tmp/sum").await;
    machine.pause().await.expect("pauses");
    let compared = save(&machine, &folder, "compared", Some(&base)).await;
    drop(machine);
    let mut restored = restore(&base, &root).await;
    sh(&restored, "head -c 3000000 /dev/urandom > /tmp/data; sha256sum /tmp/data > /tmp/sum").await;
    restored.pause().await.expect("pauses");
    let told = save(&restored, &folder, "told", Some(&base)).await;
    // A diff upon a diff.
    restored.resume();
    sh(&restored, "echo second > /tmp/second").await;
    restored.pause().await.expect("pauses");
    let second = save(&restored, &folder, "second", Some(&told)).await;
    drop(restored);
    let whole = base.memory_on_disk().expect("its size");
    for diff in [&compared, &told, &second] {
        assert_eq!(diff.kind(), Kind::Diff);
        let size = diff.memory_on_disk().expect("its size");
        assert!(size.0 > 0 && size.0 < whole.0 / 2, "{size:?} of {whole:?}");
    }
    let open = |name: &str, on: &Snapshot| Snapshot::open_on(&folder.path().join(name), on).expect("opens");
    let told = open("told", &base);
    for diff in [open("compared", &base), told.clone(), open("second", &told)] {
        diff.verify().expect("undamaged");
        let machine = restore(&diff, &root).await;
        sh(&machine, "sha256sum -c /tmp/sum").await;
    }
    let second = restore(&open("second", &told), &root).await;
    assert_eq!(sh(&second, "cat /tmp/second").await, "second\n");
}

#[tokio::test]
async fn a_stream_stands_still_while_its_guest_is_paused() {
    let root = Root::new().await;
    let mut machine = boot(&root, MEMORY).await;
    let exec = exec::ExecBuilder::over(Arc::new(machine.connector().clone()));
    let mut child = exec.argv(["sh", "-c", "read x; echo $x"]).spawn().await.expect("starts");
    machine.pause().await.expect("pauses");
    let mut stdin = child.stdin.take().expect("piped");
    tokio::io::AsyncWriteExt::write_all(&mut stdin, b"word\n").await.expect("is taken");
    let mut stdout = child.stdout.take().expect("piped");
    let mut line = [0; 5];
    let early = tokio::time::timeout(Duration::from_millis(300), stdout.read(&mut line)).await;
    assert!(early.is_err(), "a paused guest has answered: {early:?}");
    machine.resume();
    stdout.read_exact(&mut line).await.expect("the answer");
    assert_eq!(&line, b"word\n");
}
