//! A real registry, Debian's `docker-registry`, on a loopback port of its own.

use std::fs;
use std::io::BufRead;
use std::io::BufReader;
use std::path::PathBuf;
use std::process::Child;
use std::process::Command;
use std::process::Stdio;

/// User and password of [`Registry::with_auth`].
pub const USER: (&str, &str) = ("kiln", "correct horse");

/// `htpasswd -nbB kiln 'correct horse'`.
const HTPASSWD: &str = include_str!("htpasswd");

/// A running registry; dropping it ends it.
pub struct Registry {
    folder: tempfile::TempDir,
    process: Child,
    pub address: String,
}

impl Registry {
    pub fn open() -> Self {
        Self::start("")
    }

    pub fn with_auth() -> Self {
        Self::start("auth:\n  htpasswd:\n    realm: test\n    path: HTPASSWD\n")
    }

    fn start(auth: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name).display().to_string();
        fs::write(folder.path().join("htpasswd"), HTPASSWD).unwrap();
        let config = format!(
            "version: 0.1\nlog:\n  level: info\nstorage:\n  filesystem:\n    rootdirectory: {}\n  \
             cache:\n    blobdescriptor: ''\nhttp:\n  addr: 127.0.0.1:0\n{}",
            path("data"),
            auth.replace("HTPASSWD", &path("htpasswd")),
        );
        fs::write(folder.path().join("config.yml"), config).unwrap();
        let process = Command::new("docker-registry")
            .args(["serve", &path("config.yml")])
            .env("OTEL_TRACES_EXPORTER", "none")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn();
        let mut process = process.unwrap_or_else(|error| panic!("docker-registry is needed by this test: {error}"));
        let mut log = BufReader::new(process.stderr.take().unwrap());
        let address = read_address(&mut log);
        // The registry stops when nobody takes its log.
        std::thread::spawn(move || std::io::copy(&mut log, &mut std::io::sink()));
        Self { folder, process, address }
    }

    /// Where the registry keeps a blob's bytes.
    pub fn blob_path(&self, digest: &kiln::image::Digest) -> PathBuf {
        let hex = digest.hex();
        self.folder.path().join(format!("data/docker/registry/v2/blobs/sha256/{}/{hex}/data", &hex[..2]))
    }

    /// Copies `layout`'s image into the registry with `skopeo`.
    pub fn push(&self, layout: &std::path::Path, tag: &str, name: &str, arguments: &[&str]) {
        let source = format!("oci:{}:{tag}", layout.display());
        let target = format!("docker://{}/{name}", self.address);
        let copy = ["copy", "--insecure-policy", "--dest-tls-verify=false"];
        super::run("skopeo", &[&copy, arguments, &[&source, &target]].concat());
    }
}

/// The port is in the line that says the registry listens.
fn read_address(log: &mut impl BufRead) -> String {
    let mut seen = String::new();
    loop {
        let mut line = String::new();
        assert!(log.read_line(&mut line).unwrap() > 0, "docker-registry ended at once:\n{seen}");
        if let Some((_, rest)) = line.split_once("listening on ") {
            let end = rest.find(|c: char| c != '.' && c != ':' && !c.is_ascii_digit()).unwrap_or(rest.len());
            return rest[..end].to_owned();
        }
        seen.push_str(&line);
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
