//! What the benchmarks share: the inputs, the yardsticks and the statistics.
//!
//! The yardstick of what runs without a guest is `tokio`, doing the same without kiln. That of guests is QEMU with its own software processor (`-accel tcg`), the thing to reach for today on a
//! machine without virtualization. It boots the same kernel file, in the same run, in turns with kiln.
#![allow(dead_code, reason = "each benchmark uses its part")]
#![allow(clippy::print_stdout, reason = "a benchmark reports to its terminal")]

pub(crate) mod agent;
pub(crate) mod cache;
pub(crate) mod footprint;
pub(crate) mod image;
pub(crate) mod qemu;
pub(crate) mod qemu_restore;

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use kiln::ExecBuilder;
use tokio::io::AsyncReadExt;

/// The guest kernel, built or found by the repository's own task.
pub(crate) fn kernel() -> PathBuf {
    xtask("kernel")
}

/// The static agent, built or found by the repository's own task.
pub(crate) fn agent() -> PathBuf {
    xtask("agent")
}

/// An OCI layout of the distribution's busybox; builds the agent too, which a guest cannot start without.
pub(crate) fn busybox_layout() -> PathBuf {
    agent();
    xtask("busybox-image")
}

fn xtask(task: &str) -> PathBuf {
    let mut cargo = Command::new(env!("CARGO"));
    let output = cargo.current_dir(env!("CARGO_MANIFEST_DIR")).args(["xtask", task]).output().expect("cargo starts");
    assert!(output.status.success(), "cargo xtask {task}:\n{}", String::from_utf8_lossy(&output.stderr));
    PathBuf::from(String::from_utf8(output.stdout).expect("paths here are UTF-8").trim_end())
}

/// Runs `/bin/echo x`, up to the first byte of what it prints.
pub(crate) async fn first_byte(exec: ExecBuilder) {
    let mut child = exec.argv(["/bin/echo", "x"]).spawn().await.expect("the agent answers");
    let byte = child.stdout.take().expect("piped").read_u8().await.expect("a byte");
    assert_eq!(byte, b'x');
}

/// Times of one subject.
#[derive(Debug)]
pub(crate) struct Sample {
    name: String,
    times: Vec<Duration>,
}

impl Sample {
    pub(crate) fn new(name: impl Into<String>) -> Self {
        Self { name: name.into(), times: Vec::new() }
    }

    pub(crate) fn add(&mut self, time: Duration) {
        self.times.push(time);
        self.times.sort_unstable();
    }

    pub(crate) fn median(&self) -> Duration {
        self.times[self.times.len() / 2]
    }

    /// The time that 99 of 100 rounds stay within; the slowest where there are fewer.
    pub(crate) fn p99(&self) -> Duration {
        self.times[(self.times.len() * 99).div_ceil(100) - 1]
    }
}

/// Prints a line per subject: median, fastest, slowest, and the median against that of the fastest yardstick.
pub(crate) fn report(title: &str, subject: &Sample, yardsticks: &[Sample]) {
    let best = yardsticks.iter().map(Sample::median).min().expect("there is a yardstick");
    println!("{title}");
    println!("{:<24}{:>12}{:>12}{:>12}{:>12}", "", "median", "fastest", "slowest", "ratio");
    for sample in std::iter::once(subject).chain(yardsticks) {
        let ratio = sample.median().as_secs_f64() / best.as_secs_f64();
        let [median, fastest, slowest] =
            [sample.median(), sample.times[0], sample.times[sample.times.len() - 1]].map(readable);
        println!("{:<24}{median:>12}{fastest:>12}{slowest:>12}{ratio:>12.2}", sample.name);
    }
}

/// As [`report`], also where the yardstick could not be measured.
pub(crate) fn report_or_alone(title: &str, subject: &Sample, yardstick: Sample) {
    if yardstick.times.is_empty() {
        report_tail(&format!("{title} (no yardstick here: {})", yardstick.name), &[subject]);
    } else {
        report(title, subject, &[yardstick]);
    }
}

/// Prints a line per subject: median, 99th percentile, fastest, slowest and the number of rounds.
pub(crate) fn report_tail(title: &str, samples: &[&Sample]) {
    println!("{title}");
    println!("{:<24}{:>12}{:>12}{:>12}{:>12}{:>8}", "", "p50", "p99", "fastest", "slowest", "rounds");
    for sample in samples {
        let rounds = sample.times.len();
        let [p50, p99, fastest, slowest] =
            [sample.median(), sample.p99(), sample.times[0], sample.times[rounds - 1]].map(readable);
        println!("{:<24}{p50:>12}{p99:>12}{fastest:>12}{slowest:>12}{rounds:>8}", sample.name);
    }
}

/// Prints a line per subject: median, fastest and slowest rate of `amount` per round in `unit` a second, and the median
/// rate against that of the yardstick.
pub(crate) fn report_rates(title: &str, amount: f64, unit: &str, subject: &Sample, yardstick: &Sample) {
    println!("{title}");
    println!("{:<24}{:>18}{:>18}{:>18}{:>8}", "", "median", "fastest", "slowest", "ratio");
    for sample in [subject, yardstick] {
        let ratio = yardstick.median().as_secs_f64() / sample.median().as_secs_f64();
        let [median, fastest, slowest] = [sample.median(), sample.times[0], sample.times[sample.times.len() - 1]]
            .map(|time| format!("{:.0} {unit}/s", amount / time.as_secs_f64()));
        println!("{:<24}{median:>18}{fastest:>18}{slowest:>18}{ratio:>8.2}", sample.name);
    }
}

/// The load of the machine in the last minute, which every figure depends on.
pub(crate) fn note_load() {
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let processors = std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get);
    note(&format!(
        "load of the machine: {}, with {processors} processors",
        load.split(' ').next().unwrap_or("unknown")
    ));
}

/// Prints what fits no table.
pub(crate) fn note(text: &str) {
    println!("{text}");
}

fn readable(time: Duration) -> String {
    if time < Duration::from_micros(100) {
        return format!("{:.2} us", time.as_secs_f64() * 1e6);
    }
    format!("{:.2} ms", time.as_secs_f64() * 1e3)
}
