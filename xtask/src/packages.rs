//! The distribution's packages: which are missing, and installing them where that is allowed.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::process::Command;

use anyhow::Result;
use anyhow::bail;

use crate::process;
use crate::progress;
use crate::progress::Running;

/// Makes sure that `packages` are installed, which `purpose` needs.
///
/// As root on Debian or Ubuntu it installs what is missing; as another user that is an error naming the
/// packages. On other systems it says what is needed and trusts that it is there.
pub(crate) fn ensure(purpose: &str, packages: &[&str]) -> Result<()> {
    if !process::exists("dpkg-query") {
        progress::note(&format!("not a Debian system: {purpose} needs the equivalents of {}", packages.join(" ")));
        return Ok(());
    }
    let installed = installed(packages)?;
    let missing: Vec<_> = packages.iter().copied().filter(|name| !installed.contains(*name)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    if !is_root() || !process::exists("apt-get") {
        bail!("{purpose} needs packages that are missing: run `apt-get install {}` as root", missing.join(" "));
    }
    let _running = Running::start(format!("installing for {purpose}: {}", missing.join(" ")));
    process::output(&mut apt(&["update"]))?;
    process::output(apt(&["install", "--yes", "--no-install-recommends"]).args(missing))?;
    Ok(())
}

/// The installed version of `package`, if it is installed.
pub(crate) fn version(package: &str) -> Option<String> {
    let output = process::output(Command::new("dpkg-query").args(["-W", "-f=${db:Status-Status} ${Version}", package]));
    output.ok()?.strip_prefix("installed ").map(str::to_owned)
}

fn installed(packages: &[&str]) -> Result<BTreeSet<String>> {
    // It fails when any name is unknown to it, and still prints those that are known.
    let output =
        Command::new("dpkg-query").args(["-W", "-f=${db:Status-Status} ${Package}\n"]).args(packages).output()?;
    let lines = String::from_utf8_lossy(&output.stdout);
    Ok(lines.lines().filter_map(|line| line.strip_prefix("installed ")).map(str::to_owned).collect())
}

fn apt(args: &[&str]) -> Command {
    let mut apt = Command::new("apt-get");
    apt.env("DEBIAN_FRONTEND", "noninteractive").arg("--quiet").args(args);
    apt
}

fn is_root() -> bool {
    // The owner of the process's own entry is its effective user.
    fs::metadata("/proc/self").is_ok_and(|entry| entry.uid() == 0)
}
