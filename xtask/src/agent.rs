//! The guest agent: a static binary in the cache, where the library finds it.

use std::fs;
use std::path::PathBuf;

use crate::cache::Section;
use crate::process;
use crate::progress::Running;
use crate::workspace;
use anyhow::Context;
use anyhow::Result;
use kiln::image::Digest;

const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Builds the agent and makes it the cache's current one; returns its path.
pub(crate) fn ensure() -> Result<PathBuf> {
    let binary = build()?;
    let bytes = fs::read(&binary).with_context(|| format!("cannot read {}", binary.display()))?;
    let key = Digest::of(&bytes).hex();
    let section = Section::open("agent")?;
    if section.find(&key).is_none() {
        let writer = section.writer()?;
        // Another process may have published the same key while this one waited.
        if section.find(&key).is_none() {
            let entry = writer.scratch().join("entry");
            fs::create_dir(&entry)?;
            fs::copy(&binary, entry.join("kiln-agent"))?;
            writer.publish(&entry, &key)?;
        }
    }
    section.select(&key)?;
    Ok(section.current().join("kiln-agent"))
}

fn build() -> Result<PathBuf> {
    // Flags given for the whole build would apply to build scripts too, which cannot be static; naming the
    // target keeps them apart, and a target folder of its own keeps the flags from rebuilding the rest.
    let target_dir = workspace::root().join("target/agent");
    let _running = Running::start("building the guest agent");
    process::run(
        workspace::cargo()
            .args(["build", "--quiet", "--locked", "--profile", "agent", "--package", "kiln-agent", "--target", TARGET])
            .arg("--target-dir")
            .arg(&target_dir)
            .env_remove("CARGO_ENCODED_RUSTFLAGS")
            .env("RUSTFLAGS", "-C target-feature=+crt-static"),
    )?;
    Ok(target_dir.join(TARGET).join("agent/kiln-agent"))
}
