//! Real guests that are restored from one snapshot, a thousand times.

#[path = "support/guest.rs"]
mod guest;
mod image_support;

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;
use std::time::SystemTime;
use std::time::UNIX_EPOCH;

use futures::StreamExt;
use futures::future::join_all;
use guest::busybox_image;
use guest::config;
use guest::sh;
use guest::shell;
use kiln::StartError;
use kiln::Vm;
use kiln::VmConfig;
use kiln::exec;
use kiln::units::Bytes;
use kiln::vm::Baked;
use serde_json::json;

/// Restores of the one snapshot, and how many at a time.
const RESTORES: usize = 1000;
const PARALLEL: usize = 8;

/// How far a restored guest's clock may be off.
const CLOCK_ERROR: Duration = Duration::from_millis(10);

/// What a guest that was just restored says of itself.
#[derive(Debug)]
struct Answer {
    random: String,
    machine_id: String,
    count: u64,
}

/// A counter and its state in a warm-up, so that every guest goes on with it.
fn warm(config: VmConfig) -> VmConfig {
    config.memory(Bytes::mib(128)).warmup("counter", |vm| async move {
        let counter = "(i=0; while :; do i=$((i+1)); echo $i > /tmp/new; mv /tmp/new /tmp/count; sleep 0.1; done) \
            </dev/null >/dev/null 2>&1 & until [ -s /tmp/count ]; do :; done; echo kept > /dev/shm/kept";
        let out = vm.exec_builder().argv(["sh", "-c", counter]).output().await?;
        if out.success() { Ok(()) } else { Err(format!("{out:?}").into()) }
    })
}

/// Restores a guest and has it answer one command; its clock, which that command prints, must be right.
async fn restore_and_ask(baked: &Baked) -> Answer {
    let vm = baked.start().await.unwrap_or_else(|error| panic!("{error:?}"));
    let line =
        "head -c 32 /dev/urandom | hexdump -e '32/1 \"%02x\"'; echo; cat /etc/machine-id /tmp/count /dev/shm/kept;
        adjtimex | sed -n 's/.*time.tv_u*sec: *//p' | tr '\\n' ' '";
    let before = unix_now();
    let said = sh(&vm, line).await;
    let after = unix_now();
    let lines: Vec<&str> = said.lines().collect();
    let &[random, machine_id, count, "kept", clock] = lines.as_slice() else { panic!("{said}") };
    let mut clock = clock.split_whitespace().map(|number| number.parse::<u64>().expect("a number"));
    let (seconds, microseconds) = (clock.next().expect("seconds"), clock.next().expect("microseconds"));
    let clock = Duration::from_micros(seconds * 1_000_000 + microseconds);
    let bracket = before - CLOCK_ERROR..=after + CLOCK_ERROR;
    assert!(bracket.contains(&clock), "the guest says {clock:?}, between {before:?} and {after:?}");
    vm.shutdown().await.expect("stops");
    Answer { random: random.to_owned(), machine_id: machine_id.to_owned(), count: count.parse().expect("a number") }
}

fn unix_now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_restores_each_with_its_own_randomness_and_the_right_time() {
    let (_place, image) = busybox_image(json!({})).await;
    let baked = image.bake(warm(config())).await.expect("bakes");
    let open_before = open_files();
    let answers: Vec<Answer> =
        futures::stream::iter(0..RESTORES).map(|_| restore_and_ask(&baked)).buffer_unordered(PARALLEL).collect().await;
    assert_eq!(answers.len(), RESTORES);
    let distinct = |of: fn(&Answer) -> &String| answers.iter().map(of).collect::<HashSet<_>>().len();
    assert_eq!(distinct(|answer| &answer.random), RESTORES);
    assert_eq!(distinct(|answer| &answer.machine_id), RESTORES);
    // All go on from the same number, and none gets far in the time of one command.
    let first = answers.iter().map(|answer| answer.count).min().expect("there are some");
    let last = answers.iter().map(|answer| answer.count).max().expect("there are some");
    assert!(last - first < 600, "{first} to {last}");
    until(|| open_files() <= open_before + 8, "files stay open").await;
    baked.snapshot().verify().expect("no guest has written to the snapshot");
}

fn open_files() -> usize {
    std::fs::read_dir("/proc/self/fd").map(Iterator::count).unwrap_or_default()
}

async fn until(holds: impl Fn() -> bool, what: &str) {
    let settled = async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), settled).await.unwrap_or_else(|_| panic!("{what}"));
}

#[tokio::test]
async fn without_the_renewal_restored_guests_would_draw_the_same_random_numbers() {
    let folder = tempfile::tempdir().expect("a folder");
    let (_place, image) = busybox_image(json!({})).await;
    let vm = image.boot(config().memory(Bytes::mib(128))).await.expect("boots");
    let snapshot = vm.snapshot(folder.path().join("one")).await.expect("kept");
    drop(vm);
    let files = kiln::rootfs::build(&image).await.expect("builds").files().to_vec();
    let mut drawn = Vec::new();
    for _ in 0..2 {
        // As `Vm` restores, without what it tells the guest.
        let disk = Arc::new(kiln::block::ConcatBackend::open(&files).expect("the root image"));
        let mut machine = snapshot.restore(guest::engine().as_ref(), &[disk]).await.expect("restores");
        machine.resume();
        let exec = exec::ExecBuilder::over(Arc::new(machine.connector().clone()));
        // The kernel makes a new key by itself once in a while; at once it has none.
        let out = exec.argv(["head", "-c", "32", "/dev/urandom"]).output().await.expect("an answer");
        drawn.push(out.stdout);
    }
    assert_eq!(drawn[0].len(), 32);
    assert_eq!(drawn[0], drawn[1]);
}

#[tokio::test]
async fn a_restored_guest_has_the_names_that_it_was_given() {
    let (_place, image) = busybox_image(json!({})).await;
    let ids = ["00112233445566778899aabbccddeeff", "ffeeddccbbaa99887766554433221100"];
    for (name, id) in ["one", "other"].into_iter().zip(ids) {
        let vm = image.start(config().hostname(name).machine_id(id)).await.expect("starts");
        let said = sh(&vm, "hostname; cat /etc/machine-id; cat /etc/hosts; stat -c %a /etc/machine-id").await;
        assert_eq!(said, format!("{name}\n{id}\n127.0.0.1\tlocalhost {name}\n::1\tlocalhost ip6-localhost\n444\n"));
    }
    // Baked once: name and id are not part of what is baked.
    let baked = std::fs::read_dir(image.store().root().join("baked")).expect("is there").count();
    assert_eq!(baked, 1);
    for bad in ["", "0123", "00112233445566778899AABBCCDDEEFF"] {
        let started = [image.start(config().machine_id(bad)).await, image.boot(config().machine_id(bad)).await];
        for error in started.map(|start| start.expect_err("no machine id")) {
            assert!(matches!(error, StartError::Config(_)), "{error:?}");
        }
    }
}

#[tokio::test]
async fn a_hundred_guests_of_one_snapshot_at_the_same_time() {
    let (_place, image) = busybox_image(json!({})).await;
    let baked = image.bake(config().memory(Bytes::mib(128))).await.expect("bakes");
    let start = |n: usize| {
        let baked = &baked;
        async move {
            let vm = baked.start().await.unwrap_or_else(|error| panic!("{error:?}"));
            sh(&vm, &format!("echo {n} > /tmp/n")).await;
            vm
        }
    };
    let guests: Vec<Vm> = futures::stream::iter(0..100).map(start).buffered(PARALLEL).collect().await;
    let said = join_all(guests.iter().map(|vm| shell(vm, "cat /tmp/n").output())).await;
    for (n, out) in said.into_iter().enumerate() {
        assert_eq!(String::from_utf8_lossy(&out.expect("an answer").stdout), format!("{n}\n"));
    }
}

#[tokio::test]
async fn a_renewal_waits_for_nothing_that_a_workload_has_laid_in_its_way() {
    let folder = tempfile::tempdir().expect("a folder");
    let (_place, image) = busybox_image(json!({})).await;
    let vm = image.start(config()).await.expect("starts");
    sh(&vm, "rm /etc/hosts; mkfifo /etc/hosts").await;
    let snapshot = vm.snapshot(folder.path().join("fifo")).await.expect("kept");
    let restored = image.restore(&snapshot, config().hostname("other")).await.expect("restores");
    assert_eq!(sh(&restored, "hostname").await, "other\n");
    // Without the generator's device there is no fresh randomness, and so no guest.
    sh(&vm, "rm /etc/hosts; mv /dev/urandom /tmp/urandom; mkfifo /dev/urandom").await;
    let snapshot = vm.snapshot(folder.path().join("device")).await.expect("kept");
    let error = image.restore(&snapshot, config()).await.expect_err("no randomness");
    let StartError::Agent { source: kiln::ExecError::System { .. }, .. } = &error else { panic!("{error:?}") };
}
