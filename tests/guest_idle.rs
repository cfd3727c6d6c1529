//! An idle guest costs nothing. Alone in its binary, because it measures the processor time of the whole process.

#[path = "support/guest.rs"]
mod guest;
mod image_support;

use std::time::Duration;
use std::time::Instant;

use guest::boot;
use guest::sh;

/// Processor time that all threads of this process have used: utime and stime of proc_pid_stat(5).
fn cpu_time() -> Duration {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    // The second field, a name in parentheses, may contain anything.
    let (_, fields) = stat.rsplit_once(')').unwrap();
    let ticks = fields.split_whitespace().skip(11).take(2).map(|ticks| ticks.parse::<u32>().unwrap());
    // A tick is 1/100 s on every x86-64 Linux.
    Duration::from_millis(10) * ticks.sum()
}

#[tokio::test]
async fn an_idle_guest_costs_no_processor_time() {
    let vm = boot().await;
    sh(&vm, "true").await;
    // A command that waits is idle too. What the boot left to be done is over when the first window ends.
    let _waiting = vm.exec(["sleep", "1000"]).await.unwrap();
    tokio::time::sleep(Duration::from_millis(500)).await;

    let (began, before) = (Instant::now(), cpu_time());
    tokio::time::sleep(Duration::from_secs(1)).await;
    let (spent, window) = (cpu_time() - before, began.elapsed());
    // A kernel's housekeeping is some wake-ups a second; one busy thread would be the whole window.
    assert!(spent < window / 10, "{spent:?} of processor time in {window:?}");

    // The measure sees a guest that is busy.
    let (began, before) = (Instant::now(), cpu_time());
    sh(&vm, "i=0; while [ $i -lt 20000 ]; do i=$((i + 1)); done").await;
    let (spent, window) = (cpu_time() - before, began.elapsed());
    assert!(spent > window / 10, "{spent:?} of processor time in {window:?} of work");
}
