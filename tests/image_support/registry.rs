//! A real registry, Debian's `docker-registry`, on a loopback port of its own.

use std::fs;
use std::io::BufRead;
use std::io::BufReader;
use std::io::Read;
use std::io::Write;
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::Child;
use std::process::Command;
use std::process::Stdio;

use super::certificates::Certificates;

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
        Self::start("", "")
    }

    pub fn with_auth() -> Self {
        Self::start("auth:\n  htpasswd:\n    realm: test\n    path: HTPASSWD\n", "")
    }

    /// Over HTTPS.
    pub fn with_tls(certificates: &Certificates) -> Self {
        let path = |name: &str| certificates.path(name);
        Self::start("", &format!("  tls:\n    certificate: {}\n    key: {}\n", path("cert.pem"), path("key.pem")))
    }

    /// With a token server, whose tokens are signed by the key of `certificates`.
    pub fn with_tokens(certificates: &Certificates, realm: &str) -> Self {
        let bundle = certificates.path("cert.pem");
        let (service, issuer) = (super::tokens::SERVICE, super::tokens::ISSUER);
        Self::start(
            &format!(
                "auth:\n  token:\n    realm: {realm}\n    service: {service}\n    issuer: {issuer}\n    rootcertbundle: {bundle}\n"
            ),
            "",
        )
    }

    fn start(auth: &str, http: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name).display().to_string();
        fs::write(folder.path().join("htpasswd"), HTPASSWD).unwrap();
        let config = format!(
            "version: 0.1\nlog:\n  level: info\nstorage:\n  filesystem:\n    rootdirectory: {}\n  \
             cache:\n    blobdescriptor: ''\nhttp:\n  addr: 127.0.0.1:0\n{http}{}",
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

    /// Puts a manifest or an index into an open registry, as it is.
    pub fn put_manifest(&self, repository: &str, tag: &str, media_type: &str, bytes: &[u8]) {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        let (address, length) = (&self.address, bytes.len());
        let head = format!(
            "PUT /v2/{repository}/manifests/{tag} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\
             content-type: {media_type}\r\ncontent-length: {length}\r\n\r\n"
        );
        stream.write_all(&[head.as_bytes(), bytes].concat()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 201"), "{answer}");
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
