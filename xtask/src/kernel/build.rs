//! Calling the kernel's own build, with progress.

use std::fs;
use std::fs::File;
use std::io::BufRead;
use std::io::BufReader;
use std::path::Path;
use std::process::Command;
use std::process::Stdio;
use std::thread::available_parallelism;
use std::time::Instant;

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use indicatif::ProgressBar;

use crate::process;
use crate::progress;

/// Lines that make prints for our configuration; only the bar depends on it.
const EXPECTED_STEPS: u64 = 1600;

/// How many lines of make's errors a failure shows.
const SHOWN_ERROR_LINES: usize = 30;

/// One out-of-tree build.
pub(crate) struct Build<'a> {
    tree: &'a Path,
    out: &'a Path,
}

impl<'a> Build<'a> {
    pub(crate) fn new(tree: &'a Path, out: &'a Path) -> Self {
        Self { tree, out }
    }

    /// Expands the configuration fragment and returns the full `.config`.
    pub(crate) fn configure(&self, fragment: &Path) -> Result<String> {
        let mut make = self.make();
        // Not tinyconfig: that would force size over speed.
        make.arg("allnoconfig").env("KCONFIG_ALLCONFIG", fragment);
        process::output(&mut make)?;
        fs::read_to_string(self.out.join(".config")).context("the kernel's build wrote no .config")
    }

    /// Builds the kernel and writes the stripped ELF file to `to`.
    pub(crate) fn vmlinux(&self, to: &Path) -> Result<()> {
        let jobs = available_parallelism().map_or(1, usize::from);
        let errors = self.out.join("errors.log");
        let mut make = self.make();
        make.arg(format!("-j{jobs}")).arg("vmlinux").stdin(Stdio::null());
        make.stdout(Stdio::piped()).stderr(File::create(&errors)?);
        let mut child = make.spawn().context("cannot start make")?;
        let stdout = child.stdout.take().expect("standard output was requested as a pipe");
        let progress = Progress::start();
        for line in BufReader::new(stdout).split(b'\n') {
            progress.step(&String::from_utf8_lossy(&line?));
        }
        let status = child.wait()?;
        if !status.success() {
            bail!("building the kernel ended with {status}\n{}", last_lines(&errors));
        }
        progress.finish();
        process::output(Command::new("strip").arg("--strip-all").arg("-o").arg(to).arg(self.out.join("vmlinux")))?;
        Ok(())
    }

    fn make(&self) -> Command {
        let mut make = Command::new("make");
        make.arg("-C").arg(self.tree).arg(format!("O={}", self.out.display())).arg("ARCH=x86_64");
        // A surrounding make's job server is not ours to use.
        make.env_remove("MAKEFLAGS").env_remove("MFLAGS").env_remove("CARGO_MAKEFLAGS").env("LC_ALL", "C");
        // The same source and configuration give the same bytes on every machine with the same compiler.
        make.env("KBUILD_BUILD_USER", "kiln").env("KBUILD_BUILD_HOST", "kiln");
        make.env("KBUILD_BUILD_TIMESTAMP", "Thu Jan  1 00:00:00 UTC 1970");
        make
    }
}

/// A bar on a terminal, a line every quarter elsewhere.
struct Progress {
    bar: ProgressBar,
    started: Instant,
}

impl Progress {
    fn start() -> Self {
        let bar = progress::bar(EXPECTED_STEPS, "building the guest kernel {bar:30} {percent:>3} % {elapsed} {msg}");
        if bar.is_hidden() {
            progress::note("building the guest kernel (some minutes)");
        }
        Self { bar, started: Instant::now() }
    }

    fn step(&self, line: &str) {
        let before = self.quarter();
        // More steps than expected must not show as finished.
        if self.bar.position() + 1 < EXPECTED_STEPS {
            self.bar.inc(1);
        }
        if self.bar.is_hidden() && self.quarter() > before {
            progress::note(&format!("building the guest kernel: {} %", self.quarter() * 25));
        }
        self.bar.set_message(line.split_whitespace().last().unwrap_or_default().to_owned());
    }

    fn quarter(&self) -> u64 {
        self.bar.position() * 4 / EXPECTED_STEPS
    }

    fn finish(self) {
        self.bar.finish_and_clear();
        progress::note(&format!("built the guest kernel in {} s", self.started.elapsed().as_secs()));
    }
}

fn last_lines(log: &Path) -> String {
    let text = fs::read(log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(SHOWN_ERROR_LINES)..].join("\n")
}
