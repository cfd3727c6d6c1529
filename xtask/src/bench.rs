//! `cargo xtask bench`: everything that the benchmarks measure and compare with, then all of them.

use anyhow::Result;

use crate::agent;
use crate::busybox_image;
use crate::kernel;
use crate::packages;
use crate::process;
use crate::workspace;

/// The yardsticks, and what packs an initramfs.
const PACKAGES: &[&str] = &["cpio", "erofs-utils", "qemu-system-x86", "umoci"];

/// Runs the benchmarks whose names are given, or all.
pub(crate) fn run(names: &[String]) -> Result<()> {
    packages::ensure("the benchmarks", PACKAGES)?;
    kernel::ensure(None)?;
    agent::ensure()?;
    busybox_image::ensure()?;
    let names = names.iter().flat_map(|name| ["--bench", name]);
    process::run(workspace::cargo().args(["bench", "--locked", "--package", "kiln"]).args(names))
}
