//! `cargo xtask test`: everything the tests need, then all of them.

use std::io::BufRead;
use std::io::BufReader;
use std::io::IsTerminal;
use std::process::Stdio;
use std::thread;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;

use crate::agent;
use crate::kernel;
use crate::packages;
use crate::process;
use crate::progress::Running;
use crate::workspace;

/// Programs that the tests run against or check with; nothing is skipped for want of one.
const PACKAGES: &[&str] = &[
    "busybox-static",
    "ca-certificates",
    "debootstrap",
    "docker-registry",
    "erofs-utils",
    "openssl",
    "skopeo",
    "umoci",
];

/// What `tests/support/engine.rs` reads.
const ENGINE_VARIABLE: &str = "KILN_TEST_ENGINE";

/// An engine to run guests on.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub(crate) enum Engine {
    /// The software engine.
    Soft,
    /// The host's KVM. An error where there is none.
    Kvm,
    /// What the library takes when a program names none.
    Auto,
}

impl Engine {
    fn name(self) -> &'static str {
        match self {
            Self::Soft => "soft",
            Self::Kvm => "kvm",
            Self::Auto => "auto",
        }
    }
}

/// Prepares and runs all tests of the workspace, documentation examples included; guests run on `engine`.
pub(crate) fn run(engine: Option<Engine>) -> Result<()> {
    let started = Instant::now();
    packages::ensure("the tests", PACKAGES)?;
    build()?;
    let prepared = started.elapsed();
    let tests = cargo_test(engine)?;
    println!(
        "\nprepared in {}, ran {} tests in {}: {} passed, {} failed, {} ignored",
        seconds(prepared),
        tests.passed + tests.failed,
        seconds(started.elapsed() - prepared),
        tests.passed,
        tests.failed,
        tests.ignored
    );
    if !tests.succeeded {
        bail!("not all tests passed");
    }
    Ok(())
}

/// Builds the kernel beside the agent and the test binaries: the one is make's work, the other cargo's.
fn build() -> Result<()> {
    thread::scope(|scope| {
        let kernel = scope.spawn(|| kernel::ensure(None));
        agent::ensure()?;
        let _running = Running::start("building the tests");
        process::run(workspace::cargo().args(["test", "--workspace", "--locked", "--no-run", "--quiet"]))?;
        kernel.join().expect("building the kernel reports errors, it does not panic")?;
        Ok(())
    })
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Tests {
    succeeded: bool,
    passed: u64,
    failed: u64,
    ignored: u64,
}

fn cargo_test(engine: Option<Engine>) -> Result<Tests> {
    let mut cargo = workspace::cargo();
    // Nothing that a shell happened to have set.
    cargo.env_remove(ENGINE_VARIABLE);
    if let Some(engine) = engine {
        cargo.env(ENGINE_VARIABLE, engine.name());
    }
    cargo.args(["test", "--workspace", "--locked", "--no-fail-fast"]);
    if std::io::stdout().is_terminal() {
        cargo.args(["--color", "always"]);
    }
    let mut child = cargo.stdout(Stdio::piped()).spawn().context("cannot start cargo")?;
    let stdout = child.stdout.take().expect("standard output was requested as a pipe");
    let mut tests = Tests::default();
    for line in BufReader::new(stdout).split(b'\n') {
        let line = line?;
        let line = String::from_utf8_lossy(&line);
        println!("{line}");
        tests.count(&line);
    }
    tests.succeeded = child.wait()?.success();
    Ok(tests)
}

impl Tests {
    /// Adds a summary line of one test binary: `test result: ok. 3 passed; 0 failed; 1 ignored; …`.
    fn count(&mut self, line: &str) {
        let Some((_, counts)) = line.strip_prefix("test result: ").and_then(|rest| rest.split_once(". ")) else {
            return;
        };
        for part in counts.split("; ") {
            let Some((number, what)) = part.split_once(' ') else { continue };
            let Ok(number) = number.parse::<u64>() else { continue };
            match what {
                "passed" => self.passed += number,
                "failed" => self.failed += number,
                "ignored" => self.ignored += number,
                _ => {}
            }
        }
    }
}

fn seconds(time: Duration) -> String {
    format!("{:.1} s", time.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn summary_lines_add_up_and_other_lines_do_not_count() {
        let mut tests = Tests::default();
        for line in [
            "test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.01s",
            "test result: FAILED. 2 passed; 4 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.20s",
            "test result: \u{1b}[32mok\u{1b}[0m. 5 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out",
            "test the_word_passed ... ok",
        ] {
            tests.count(line);
        }
        assert_eq!(tests, Tests { succeeded: false, passed: 10, failed: 4, ignored: 1 });
    }
}
