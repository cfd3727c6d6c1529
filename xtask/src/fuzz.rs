//! `cargo xtask fuzz`: libFuzzer over the targets in `fuzz/`, for a while, with the stable toolchain.

use std::fs;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;

use crate::packages;
use crate::process;
use crate::progress;
use crate::progress::Running;
use crate::workspace;

/// The targets that run unless some are named; each is a file in `fuzz/fuzz_targets`, a `[[bin]]` there and a folder of seeds.
const TARGETS: &[&str] =
    &["frames", "request_json", "control_json", "unpack", "layer", "docker_archive", "manifest", "snapshot", "virtio"];

/// libFuzzer is C++.
const PACKAGES: &[&str] = &["g++"];

const TRIPLE: &str = "x86_64-unknown-linux-gnu";

/// What cargo-fuzz asks a nightly compiler for, in LLVM's own words: edge coverage with counters, and assertions.
const FLAGS: &str = "--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1 -Cdebug-assertions";

/// Fuzzes `targets`, or all, each for `seconds`.
pub(crate) fn run(targets: &[String], seconds: u32) -> Result<()> {
    packages::ensure("fuzzing", PACKAGES)?;
    build()?;
    if targets.is_empty() {
        return TARGETS.iter().try_for_each(|target| fuzz(target, seconds));
    }
    targets.iter().try_for_each(|target| fuzz(target, seconds))
}

fn target_dir() -> PathBuf {
    workspace::root().join("target/fuzz")
}

fn build() -> Result<()> {
    let _running = Running::start("building the fuzz targets");
    let mut cargo = workspace::cargo();
    // With a named target the flags leave build scripts alone.
    cargo.args(["build", "--quiet", "--locked", "--release", "--target", TRIPLE]);
    cargo.arg("--manifest-path").arg(workspace::root().join("fuzz/Cargo.toml"));
    cargo.arg("--target-dir").arg(target_dir());
    process::run(cargo.env_remove("CARGO_ENCODED_RUSTFLAGS").env("RUSTFLAGS", FLAGS))
}

fn fuzz(target: &str, seconds: u32) -> Result<()> {
    let binary = target_dir().join(TRIPLE).join("release").join(target);
    let seeds = workspace::root().join("fuzz/seeds").join(target);
    if !binary.is_file() || !seeds.is_dir() {
        bail!("no fuzz target {target}; there are {}", TARGETS.join(", "));
    }
    // What a run finds interesting is where the next one begins.
    let corpus = folder("fuzz-corpus", target)?;
    let artifacts = folder("fuzz-artifacts", target)?;
    progress::say(&format!("fuzzing {target} for {seconds} s"));
    let mut fuzzer = Command::new(&binary);
    fuzzer.arg(format!("-max_total_time={seconds}")).args([
        "-rss_limit_mb=1024",
        "-timeout=10",
        "-print_final_stats=1",
    ]);
    fuzzer.arg(format!("-artifact_prefix={}/", artifacts.display())).arg(&corpus).arg(&seeds);
    let log = artifacts.join("log");
    let output = fs::File::create(&log).with_context(|| format!("cannot create {}", log.display()))?;
    let status = fuzzer.stderr(output).status().with_context(|| format!("cannot start {}", binary.display()))?;
    let said = String::from_utf8_lossy(&fs::read(&log)?).into_owned();
    if !status.success() {
        bail!("{target} ended with {status}\n{}\n{}", tail(&said), reproduction(&binary, &said));
    }
    let stats =
        said.lines().filter(|line| line.contains("number_of_executed_units") || line.contains("new_units_added"));
    stats.for_each(progress::say);
    Ok(())
}

fn folder(kind: &str, target: &str) -> Result<PathBuf> {
    let folder = workspace::root().join("target").join(kind).join(target);
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    Ok(folder)
}

/// How to see the crash again, from libFuzzer's own line about the input that it kept.
fn reproduction(binary: &Path, said: &str) -> String {
    match said.lines().find_map(|line| line.split_once("Test unit written to ")) {
        Some((_, input)) => format!("to reproduce: {} {}", binary.display(), input.trim()),
        None => "it kept no input".to_owned(),
    }
}

/// The last lines, which say what went wrong.
fn tail(said: &str) -> String {
    const LINES: usize = 40;
    let lines: Vec<_> = said.lines().collect();
    lines[lines.len().saturating_sub(LINES)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_target_has_its_source_and_seeds() {
        let fuzz = workspace::root().join("fuzz");
        for target in TARGETS {
            assert!(fuzz.join(format!("fuzz_targets/{target}.rs")).is_file(), "{target}");
            let seeds = fs::read_dir(fuzz.join("seeds").join(target)).expect("a folder of seeds");
            assert!(seeds.count() > 0, "{target}");
        }
        let sources = fs::read_dir(fuzz.join("fuzz_targets")).expect("a folder");
        assert_eq!(sources.count(), TARGETS.len(), "a target that no run fuzzes");
    }

    #[test]
    fn a_crash_comes_with_the_way_to_see_it_again() {
        let said = "==1== ERROR\nartifact_prefix='a/'; Test unit written to a/crash-1\nBase64: AA==\n";
        assert_eq!(reproduction(Path::new("bin"), said), "to reproduce: bin a/crash-1");
    }
}
