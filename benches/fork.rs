//! Clones of a running guest: how long `Vm::fork` takes for each, against restoring as many from a baked snapshot, and what
//! memory of its own an idle one has.
//!
//! `cargo bench --bench fork`. A guest of 128 MiB with busybox, restored from its baked snapshot. The times of several are
//! those from the call until all have answered, divided by their number. Memory is what a hundred add to this process, once
//! nobody has touched them for a second: pages that the guests have written, and everything else (processor, devices,
//! threads, tasks), which is to stay below 1 MiB.

mod support;

use std::process::Command;
use std::time::Duration;
use std::time::Instant;

use futures::StreamExt;
use futures::TryStreamExt;
use futures::future::join_all;
use kiln::Image;
use kiln::StartError;
use kiln::Vm;
use kiln::VmConfig;
use kiln::units::Bytes;
use kiln::vm::Baked;

use crate::support::Sample;
use crate::support::footprint::Footprint;

const MEMORY: Bytes = Bytes::mib(128);
/// Clones, and rounds of as many.
const SIZES: [(usize, usize); 3] = [(1, 100), (10, 10), (100, 2)];
/// As many restores at the same time as `Vm::fork` has.
const PARALLEL: usize = 8;
const MANY: usize = 100;
/// What the benchmark asks of itself: the memory of guests of a kind.
const MEMORY_OF: &str = "--memory-of";
const CLONE: &str = "clone";
const RESTORED: &str = "restored guest";
/// Longer than a guest takes to become idle.
const SETTLE: Duration = Duration::from_secs(1);

#[tokio::main]
async fn main() {
    support::kernel();
    let image = Image::from_oci_layout(support::busybox_layout()).await.expect("the layout is ours");
    let baked = image.bake(VmConfig::new().memory(MEMORY)).await.expect("bakes");
    let vm = baked.start().await.expect("restores");
    let kind = std::env::args().skip_while(|argument| argument != MEMORY_OF).nth(1);
    match kind.as_deref() {
        Some(kind) => memory(kind, &vm, &baked).await,
        None => {
            support::note_load();
            for (count, rounds) in SIZES {
                times(&vm, &baked, count, rounds).await;
            }
            // Each in a process of its own, where no memory is left over from other guests.
            for kind in [CLONE, RESTORED] {
                let this = std::env::current_exe().expect("a benchmark has a file");
                let status = Command::new(this).args([MEMORY_OF, kind]).status().expect("runs");
                assert!(status.success(), "{status}");
            }
        }
    }
}

async fn times(vm: &Vm, baked: &Baked, count: usize, rounds: usize) {
    let mut clones = Sample::new("kiln, fork");
    let mut restores = Sample::new("kiln, restore");
    // The first round is not counted.
    for round in 0..=rounds {
        let began = Instant::now();
        let forked = vm.fork(count).await.expect("clones");
        let fork = began.elapsed();
        end(forked).await;
        let began = Instant::now();
        let restored = restore(baked, count).await.expect("restores");
        let restore = began.elapsed();
        end(restored).await;
        if round > 0 {
            clones.add(fork / count as u32);
            restores.add(restore / count as u32);
        }
    }
    let yardstick = [restores];
    support::report(&format!("a guest, of {count} at once"), &clones, &yardstick);
    support::report_tail(&format!("a guest, of {count} at once"), &[&clones, &yardstick[0]]);
}

async fn restore(baked: &Baked, count: usize) -> Result<Vec<Vm>, StartError> {
    futures::stream::iter((0..count).map(|_| baked.start())).buffer_unordered(PARALLEL).try_collect().await
}

/// What each of many guests of a kind has; then that each of them runs, and what each has after that.
async fn memory(kind: &str, vm: &Vm, baked: &Baked) {
    let before = Footprint::now();
    let guests = match kind {
        CLONE => vm.fork(MANY).await.expect("clones"),
        RESTORED => restore(baked, MANY).await.expect("restores"),
        other => panic!("{other} is no kind of guest"),
    };
    let count = guests.len();
    let note = |when: &str| {
        let (guest, own) = Footprint::now().each_since(&before, count);
        support::note(&format!(
            "each {kind} of {count}, {when}: {own} KiB of ours, and {guest} KiB that the guest wrote"
        ));
    };
    tokio::time::sleep(SETTLE).await;
    note("idle");
    let began = Instant::now();
    join_all(guests.iter().map(|vm| support::first_byte(vm.exec_builder()))).await;
    let answered = began.elapsed();
    support::note(&format!("all {count} have run a command at the same time after {} ms", answered.as_millis()));
    tokio::time::sleep(SETTLE).await;
    note("idle after a command");
    end(guests).await;
}

/// Waits until all is gone.
async fn end(guests: Vec<Vm>) {
    for stopped in join_all(guests.iter().map(Vm::shutdown)).await {
        stopped.expect("stops");
    }
}
