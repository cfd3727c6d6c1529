//! `cargo xtask kernel`: the guest kernel from source, cached by what went into it.
//!
//! The key is a hash of the configuration, the source version and [`RECIPE`]. Looking it up starts one short
//! program (`dpkg-query`) and reads one file, so that everything may ask for the kernel at every start.

mod build;
mod config;
mod source;

use std::fs;
use std::path::Path;
use std::path::PathBuf;

use anyhow::Context;
use anyhow::Result;
use kiln::image::Digest;

use crate::cache::Section;
use crate::cache::Writer;
use crate::kernel::config::Config;
use crate::kernel::source::Source;
use crate::packages;
use crate::workspace;

/// Counts changes of how the kernel is built that its configuration does not show.
const RECIPE: &str = "1";

/// Hexadecimal digits of a key: enough, and a path that can be read.
const KEY_DIGITS: usize = 24;

/// What a build needs beyond the source.
const BUILD_PACKAGES: &[&str] =
    &["bc", "binutils", "bison", "flex", "gcc", "libc6-dev", "libelf-dev", "libssl-dev", "make", "xz-utils"];

/// Finds or builds the kernel and makes it the cache's current one; returns the path of `vmlinux`.
///
/// `tree` is an unpacked Linux source tree to use in place of the distribution's package.
pub(crate) fn ensure(tree: Option<&Path>) -> Result<PathBuf> {
    let path = workspace::root().join("guest-kernel/kernel.config");
    let config = Config::parse(&fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?)?;
    let section = Section::open("kernel")?;
    let source = match tree {
        Some(tree) => Source::tree(tree)?,
        None => match Source::installed_package() {
            Some(source) => source,
            // A cache brought from elsewhere (a CI cache) serves without the 150 MB source package.
            None if is_current(&section, &config) => return Ok(section.current().join("vmlinux")),
            None => Source::install_package()?,
        },
    };
    let key = key(&config, &source);
    if section.find(&key).is_none() {
        let writer = section.writer()?;
        // Another process may have built it while this one waited.
        if section.find(&key).is_none() {
            packages::ensure("building the guest kernel", BUILD_PACKAGES)?;
            build(&writer, &config, &source, &key)?;
        }
    }
    section.select(&key)?;
    Ok(section.current().join("vmlinux"))
}

fn key(config: &Config, source: &Source) -> String {
    let mut parts = Vec::new();
    for part in [RECIPE, source.version(), config.options()] {
        parts.extend((part.len() as u64).to_le_bytes());
        parts.extend(part.as_bytes());
    }
    Digest::of(&parts).hex()[..KEY_DIGITS].to_owned()
}

fn is_current(section: &Section, config: &Config) -> bool {
    fs::read_to_string(section.current().join("requested.config")).is_ok_and(|text| text == config.options())
}

fn build(writer: &Writer<'_>, config: &Config, source: &Source, key: &str) -> Result<()> {
    let tree = source.unpack(&writer.scratch().join("source"))?;
    let entry = writer.scratch().join("entry");
    fs::create_dir(&entry)?;
    let requested = entry.join("requested.config");
    fs::write(&requested, config.options())?;

    let out = writer.scratch().join("out");
    fs::create_dir(&out)?;
    let build = build::Build::new(&tree, &out);
    let full = build.configure(&requested)?;
    config.check_kept(&full)?;
    build.vmlinux(&entry.join("vmlinux"))?;
    fs::write(entry.join("config"), full)?;
    fs::write(entry.join("source-version"), format!("{}\n", source.version()))?;
    writer.publish(&entry, key)?;
    Ok(())
}
