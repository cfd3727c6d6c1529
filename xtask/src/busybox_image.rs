//! An OCI layout made of the distribution's `busybox-static` package: the demo's image, made without a network.

use std::fs;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;

use anyhow::Context;
use anyhow::Result;
use kiln::image::Digest;
use kiln::image::ImageConfig;

use crate::cache::Section;
use crate::packages;
use crate::process;

const BUSYBOX: &str = "/bin/busybox";

/// The image's name in its layout.
const TAG: &str = "latest";

const FOLDERS: &[(&str, u32)] = &[
    ("bin", 0o755),
    ("dev", 0o755),
    ("etc", 0o755),
    ("home", 0o755),
    ("proc", 0o555),
    ("root", 0o700),
    ("run", 0o755),
    ("sbin", 0o755),
    ("sys", 0o555),
    ("tmp", 0o1777),
    ("usr", 0o755),
    ("usr/bin", 0o755),
    ("usr/sbin", 0o755),
    ("var", 0o755),
    ("var/tmp", 0o1777),
];

const FILES: &[(&str, &str)] = &[
    ("etc/group", "root:x:0:\nnogroup:x:65534:\n"),
    ("etc/passwd", "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/bin/false\n"),
];

/// Installs the package if need be and returns the folder of the layout, made once per busybox.
pub(crate) fn ensure() -> Result<PathBuf> {
    packages::ensure("the demo's image", &["busybox-static"])?;
    let busybox = fs::read(BUSYBOX).with_context(|| format!("cannot read {BUSYBOX}"))?;
    let applets = process::output(Command::new(BUSYBOX).arg("--list-full"))?;
    let layer = layer(&busybox, applets.lines())?;

    let section = Section::open("demo")?;
    let key = Digest::of(&layer).hex();
    if let Some(layout) = section.find(&key) {
        return Ok(layout);
    }
    let writer = section.writer()?;
    let entry = writer.scratch().join("layout");
    write_layout(&entry, layer)?;
    match section.find(&key) {
        Some(layout) => Ok(layout),
        None => writer.publish(&entry, &key),
    }
}

/// The one layer: an uncompressed tar, the same bytes for the same busybox.
fn layer<'a>(busybox: &[u8], applets: impl Iterator<Item = &'a str>) -> Result<Vec<u8>> {
    let mut tar = tar::Builder::new(Vec::new());
    for (path, mode) in FOLDERS {
        tar.append_data(&mut header(tar::EntryType::Directory, *mode, 0), path, std::io::empty())?;
    }
    for (path, text) in FILES {
        tar.append_data(&mut header(tar::EntryType::Regular, 0o644, text.len()), path, text.as_bytes())?;
    }
    tar.append_data(&mut header(tar::EntryType::Regular, 0o755, busybox.len()), "bin/busybox", busybox)?;
    for applet in applets.filter(|applet| FOLDERS.iter().any(|(dir, _)| is_in(applet, dir)) && *applet != "bin/busybox")
    {
        tar.append_link(&mut header(tar::EntryType::Symlink, 0o777, 0), applet, BUSYBOX)?;
    }
    Ok(tar.into_inner()?)
}

fn is_in(path: &str, dir: &str) -> bool {
    path.rsplit_once('/').is_some_and(|(parent, _)| parent == dir)
}

fn header(kind: tar::EntryType, mode: u32, size: usize) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(size as u64);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header
}

/// Writes the layout of the image with this one layer.
fn write_layout(dir: &Path, layer: Vec<u8>) -> Result<()> {
    let mut config = ImageConfig::default();
    config.env = vec!["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".to_owned()];
    config.cmd = vec!["sh".to_owned()];
    config.working_dir = Some("/".to_owned());
    let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    runtime.block_on(kiln::image::write_single_layer(dir, TAG, layer, &config))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// umoci is an independent implementation of the specification: what it unpacks is what we meant.
    #[test]
    fn umoci_unpacks_the_layout() {
        let dir = tempfile::tempdir().unwrap();
        let layer = layer(b"#!busybox", ["bin/sh", "bin/busybox", "usr/bin/id", "linuxrc"].into_iter()).unwrap();
        let layout = dir.path().join("layout");
        write_layout(&layout, layer).unwrap();
        let image = format!("{}:{TAG}", layout.display());
        let bundle = dir.path().join("bundle");
        process::output(Command::new("umoci").args(["unpack", "--rootless", "--image", &image]).arg(&bundle)).unwrap();
        let root = bundle.join("rootfs");
        assert_eq!(fs::read(root.join("bin/busybox")).unwrap(), b"#!busybox");
        assert_eq!(fs::read_link(root.join("bin/sh")).unwrap(), Path::new(BUSYBOX));
        assert_eq!(fs::read_link(root.join("usr/bin/id")).unwrap(), Path::new(BUSYBOX));
        assert!(root.join("etc/passwd").is_file());
        assert!(!root.join("linuxrc").exists());
    }
}
