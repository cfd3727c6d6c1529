//! An OCI layout made of the distribution's `busybox-static` package: the demo's image, made without a network.

use std::fs;
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;

use anyhow::Context;
use anyhow::Result;
use serde_json::json;
use sha2::Digest;
use sha2::Sha256;

use crate::agent::hex;
use crate::cache::Section;
use crate::packages;
use crate::process;

const BUSYBOX: &str = "/bin/busybox";

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
    let key = hex(&Sha256::digest(&layer));
    if let Some(layout) = section.find(&key) {
        return Ok(layout);
    }
    let writer = section.writer()?;
    let entry = writer.scratch().join("layout");
    write_layout(&entry, &layer)?;
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

/// Writes the layout of an image of one layer, per the OCI image specification 1.1.
fn write_layout(dir: &Path, layer: &[u8]) -> Result<()> {
    let blobs = dir.join("blobs/sha256");
    fs::create_dir_all(&blobs)?;
    let layer = write_blob(&blobs, layer, "application/vnd.oci.image.layer.v1.tar")?;
    let config = json!({
        "architecture": "amd64",
        "os": "linux",
        "config": {
            "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
            "Cmd": ["sh"],
            "WorkingDir": "/",
        },
        // An uncompressed layer is its own diff.
        "rootfs": { "type": "layers", "diff_ids": [layer["digest"]] },
    });
    let config = write_blob(&blobs, &serde_json::to_vec(&config)?, "application/vnd.oci.image.config.v1+json")?;
    let kind = "application/vnd.oci.image.manifest.v1+json";
    let manifest = json!({ "schemaVersion": 2, "mediaType": kind, "config": config, "layers": [layer] });
    let manifest = write_blob(&blobs, &serde_json::to_vec(&manifest)?, kind)?;
    let index = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [manifest],
    });
    fs::write(dir.join("index.json"), serde_json::to_vec(&index)?)?;
    fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)?;
    Ok(())
}

/// Writes one blob under its digest and returns its descriptor.
fn write_blob(blobs: &Path, bytes: &[u8], media_type: &str) -> Result<serde_json::Value> {
    let digest = hex(&Sha256::digest(bytes));
    File::create(blobs.join(&digest)).and_then(|mut file| file.write_all(bytes))?;
    Ok(json!({ "mediaType": media_type, "digest": format!("sha256:{digest}"), "size": bytes.len() }))
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
        write_layout(&layout, &layer).unwrap();
        let copy = format!("oci:{}:latest", dir.path().join("copy").display());
        // skopeo gives the manifest the tag that umoci asks for, and checks every digest on the way.
        process::output(Command::new("skopeo").arg("copy").arg(format!("oci:{}", layout.display())).arg(&copy))
            .unwrap();
        let image = copy.strip_prefix("oci:").unwrap();
        let bundle = dir.path().join("bundle");
        process::output(Command::new("umoci").args(["unpack", "--rootless", "--image", image]).arg(&bundle)).unwrap();
        let root = bundle.join("rootfs");
        assert_eq!(fs::read(root.join("bin/busybox")).unwrap(), b"#!busybox");
        assert_eq!(fs::read_link(root.join("bin/sh")).unwrap(), Path::new(BUSYBOX));
        assert_eq!(fs::read_link(root.join("usr/bin/id")).unwrap(), Path::new(BUSYBOX));
        assert!(root.join("etc/passwd").is_file());
        assert!(!root.join("linuxrc").exists());
    }
}
