//! What the image and rootfs tests share: archives and layouts made to order, hostile ones
//! included, and reading a filesystem image back with tools nobody here wrote.
#![allow(dead_code, unreachable_pub, reason = "each test binary includes this file and uses its part")]

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::io::Write;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;

use kiln::image::Digest;
use kiln::image::Image;
use kiln::image::ImageStore;
use kiln::rootfs;
use kiln::rootfs::RootfsError;
use serde_json::Value;
use serde_json::json;

pub mod certificates;
pub mod proxy;
pub mod registry;
pub mod source;
pub mod tokens;

/// A tar archive written field by field, so that it can say what no honest tool would.
#[derive(Clone, Default)]
pub struct Tar {
    bytes: Vec<u8>,
}

/// One entry's header fields.
#[derive(Clone)]
pub struct Entry<'a> {
    pub name: &'a [u8],
    pub kind: u8,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub mtime: u64,
    pub link: &'a [u8],
    pub device: (u32, u32),
    pub content: &'a [u8],
}

impl Default for Entry<'_> {
    fn default() -> Self {
        Self {
            name: b"x",
            kind: b'0',
            mode: 0o644,
            uid: 0,
            gid: 0,
            mtime: 1_700_000_000,
            link: b"",
            device: (0, 0),
            content: b"",
        }
    }
}

impl Tar {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn entry(mut self, entry: &Entry<'_>) -> Self {
        let mut name = entry.name;
        if name.len() > 100 {
            self = self.raw(b'L', b"././@LongLink", &[name, b"\0"].concat());
            name = &name[..100];
        }
        let mut link = entry.link;
        if link.len() > 100 {
            self = self.raw(b'K', b"././@LongLink", &[link, b"\0"].concat());
            link = &link[..100];
        }
        let header = header(&Entry { name, link, ..entry.clone() });
        self.append(&header, entry.content);
        self
    }

    pub fn file(self, name: &str, content: &[u8]) -> Self {
        self.entry(&Entry { name: name.as_bytes(), content, ..Entry::default() })
    }

    pub fn folder(self, name: &str) -> Self {
        self.entry(&Entry { name: name.as_bytes(), kind: b'5', mode: 0o755, ..Entry::default() })
    }

    pub fn symlink(self, name: &str, target: &str) -> Self {
        let (name, link) = (name.as_bytes(), target.as_bytes());
        self.entry(&Entry { name, link, kind: b'2', mode: 0o777, ..Entry::default() })
    }

    pub fn hard_link(self, name: &str, target: &str) -> Self {
        self.entry(&Entry { name: name.as_bytes(), link: target.as_bytes(), kind: b'1', ..Entry::default() })
    }

    /// A pax record group for the next entry.
    pub fn pax(self, records: &[(&str, &[u8])]) -> Self {
        let body: Vec<u8> = records.iter().flat_map(|(key, value)| pax_record(key.as_bytes(), value)).collect();
        self.raw(b'x', b"PaxHeaders/x", &body)
    }

    pub fn raw(mut self, kind: u8, name: &[u8], content: &[u8]) -> Self {
        let header = header(&Entry { name, kind, content, ..Entry::default() });
        self.append(&header, content);
        self
    }

    /// An entry whose header then has these bytes at these places, under a checksum that is right.
    pub fn patched(mut self, entry: &Entry<'_>, patches: &[(usize, &[u8])]) -> Self {
        let mut header = header(entry);
        for (at, bytes) in patches {
            header[*at..*at + bytes.len()].copy_from_slice(bytes);
        }
        set_checksum(&mut header);
        self.append(&header, entry.content);
        self
    }

    /// Entries from elsewhere, as they are.
    pub fn append_raw(mut self, bytes: &[u8]) -> Self {
        self.bytes.extend_from_slice(bytes);
        self
    }

    /// The entries so far, without an end mark.
    pub fn into_entries(self) -> Vec<u8> {
        self.bytes
    }

    fn append(&mut self, header: &[u8; 512], content: &[u8]) {
        self.bytes.extend_from_slice(header);
        self.bytes.extend_from_slice(content);
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
    }

    /// The archive with its end mark.
    pub fn finish(mut self) -> Vec<u8> {
        self.bytes.extend_from_slice(&[0; 1024]);
        self.bytes
    }
}

fn header(entry: &Entry<'_>) -> [u8; 512] {
    let mut header = [0; 512];
    let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, entry.name);
    put(100, format!("{:07o}", entry.mode).as_bytes());
    // Owners beyond seven octal digits in the binary form.
    for (at, id) in [(108, entry.uid), (116, entry.gid)] {
        if id < 1 << 21 {
            put(at, format!("{id:07o}").as_bytes());
        } else {
            put(at, &[&[0x80, 0, 0, 0][..], &id.to_be_bytes()].concat());
        }
    }
    put(124, format!("{:011o}", entry.content.len()).as_bytes());
    put(136, format!("{:011o}", entry.mtime).as_bytes());
    put(156, &[entry.kind]);
    put(157, entry.link);
    put(257, b"ustar\x0000");
    put(329, format!("{:07o}", entry.device.0).as_bytes());
    put(337, format!("{:07o}", entry.device.1).as_bytes());
    set_checksum(&mut header);
    header
}

fn set_checksum(header: &mut [u8; 512]) {
    header[148..156].fill(b' ');
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
}

pub fn pax_record(key: &[u8], value: &[u8]) -> Vec<u8> {
    let body = key.len() + value.len() + 3;
    let mut length = body;
    while length != body + length.to_string().len() {
        length = body + length.to_string().len();
    }
    [length.to_string().as_bytes(), b" ", key, b"=", value, b"\n"].concat()
}

pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

pub fn zstd(bytes: &[u8]) -> Vec<u8> {
    zstd::encode_all(bytes, 1).unwrap()
}

/// A layer for [`Layout`]: the blob as stored, and the digest of the archive in it.
pub struct LayerBlob {
    pub blob: Vec<u8>,
    pub media_type: &'static str,
    pub diff_id: Digest,
}

impl LayerBlob {
    pub fn plain(tar: Vec<u8>) -> Self {
        let diff_id = Digest::of(&tar);
        Self { blob: tar, media_type: "application/vnd.oci.image.layer.v1.tar", diff_id }
    }

    pub fn gzip(tar: &[u8]) -> Self {
        let media_type = "application/vnd.oci.image.layer.v1.tar+gzip";
        Self { blob: gzip(tar), media_type, diff_id: Digest::of(tar) }
    }

    pub fn zstd(tar: &[u8]) -> Self {
        let media_type = "application/vnd.oci.image.layer.v1.tar+zstd";
        Self { blob: zstd(tar), media_type, diff_id: Digest::of(tar) }
    }
}

/// An OCI layout folder under construction.
pub struct Layout {
    pub folder: tempfile::TempDir,
    entries: Vec<Value>,
}

impl Layout {
    pub fn new() -> Self {
        let folder = scratch();
        fs::create_dir_all(folder.path().join("blobs/sha256")).unwrap();
        fs::write(folder.path().join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        Self { folder, entries: Vec::new() }
    }

    pub fn blob(&self, media_type: &str, bytes: &[u8]) -> Value {
        let digest = Digest::of(bytes);
        fs::write(self.blob_path(&digest), bytes).unwrap();
        json!({ "mediaType": media_type, "digest": digest.to_string(), "size": bytes.len() })
    }

    pub fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.folder.path().join("blobs/sha256").join(digest.hex())
    }

    /// Writes config and manifest for `layers`; returns the manifest's descriptor.
    pub fn manifest(&self, layers: &[LayerBlob]) -> Value {
        let diff_ids: Vec<_> = layers.iter().map(|layer| layer.diff_id.to_string()).collect();
        let config = json!({
            "architecture": "amd64", "os": "linux", "config": {},
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
        });
        let layers: Vec<_> = layers.iter().map(|layer| self.blob(layer.media_type, &layer.blob)).collect();
        self.manifest_of(&config, &layers)
    }

    pub fn manifest_of(&self, config: &Value, layers: &[Value]) -> Value {
        let config = self.blob("application/vnd.oci.image.config.v1+json", config.to_string().as_bytes());
        let media_type = "application/vnd.oci.image.manifest.v1+json";
        let manifest = json!({ "schemaVersion": 2, "mediaType": media_type, "config": config, "layers": layers });
        self.blob(media_type, manifest.to_string().as_bytes())
    }

    pub fn tag(mut self, tag: &str, mut descriptor: Value) -> Self {
        descriptor["annotations"] = json!({ "org.opencontainers.image.ref.name": tag });
        self.entries.push(descriptor);
        let index = json!({ "schemaVersion": 2, "manifests": self.entries });
        fs::write(self.folder.path().join("index.json"), index.to_string()).unwrap();
        self
    }

    /// A layout of one image, tagged "latest".
    pub fn of(layers: &[LayerBlob]) -> Self {
        let layout = Self::new();
        let manifest = layout.manifest(layers);
        layout.tag("latest", manifest)
    }
}

/// A folder in memory where there is one: these tests are about content, and syncing hundreds of
/// small files to a busy disk takes most of a minute.
pub fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

/// An image's root filesystem as one flat EROFS file, which tools and the kernel can read.
pub struct Flat {
    pub root: rootfs::RootImage,
    /// Goes with this value.
    pub path: std::path::PathBuf,
    _folder: tempfile::TempDir,
}

/// From an image to one EROFS file: what every test does that reads a root filesystem back.
pub async fn flat(image: &Image) -> Result<Flat, RootfsError> {
    let root = rootfs::build(image).await?;
    let folder = scratch();
    let path = folder.path().join("root.erofs");
    root.write_to(&path).await?;
    Ok(Flat { root, path, _folder: folder })
}

/// A store of its own.
pub struct Place {
    pub folder: tempfile::TempDir,
    pub store: ImageStore,
}

impl Place {
    pub async fn new() -> Self {
        let folder = scratch();
        let store = ImageStore::open(folder.path().join("images")).await.unwrap();
        Self { folder, store }
    }

    pub async fn import(&self, layers: &[LayerBlob]) -> Image {
        let layout = Layout::of(layers);
        self.store.import_oci_layout(layout.folder.path(), None).await.unwrap()
    }

    /// The root filesystem of an image of these layers.
    pub async fn build(&self, layers: &[LayerBlob]) -> Result<Flat, RootfsError> {
        flat(&self.import(layers).await).await
    }

    /// Where what is made from layers is.
    pub fn derived(&self) -> std::path::PathBuf {
        self.folder.path().join("images/derived")
    }

    /// Files in the store that are temporary or not named by a digest.
    pub fn debris(&self) -> Vec<String> {
        let mut found = Vec::new();
        for folder in ["images/blobs/sha256", "images/references", "images/derived"] {
            for entry in fs::read_dir(self.folder.path().join(folder)).unwrap() {
                let name = entry.unwrap().file_name().into_string().unwrap();
                let hex = name.split('-').next().unwrap();
                if hex.len() != 64 || !hex.bytes().all(|byte| byte.is_ascii_hexdigit()) {
                    found.push(name);
                }
            }
        }
        found
    }
}

/// Runs a tool that the tests need, and says which one is missing.
pub fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output();
    let output = output.unwrap_or_else(|error| panic!("{program} is needed by this test and cannot be run: {error}"));
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// What a name in a tree is, in a form that compares and prints well.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    pub kind: String,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub mtime: (i64, i64),
    pub nlink: u64,
    /// Content or link target.
    pub bytes: Vec<u8>,
    /// The first of the names, if it has several.
    pub same_as: Option<OsString>,
    pub xattrs: BTreeMap<OsString, Vec<u8>>,
}

pub type Listing = BTreeMap<OsString, Seen>;

/// Everything under `root`, by path; the root itself as "".
pub fn list(root: &Path) -> Listing {
    let mut listing = Listing::new();
    let mut names: BTreeMap<u64, Vec<OsString>> = BTreeMap::new();
    let mut folders = vec![root.to_owned()];
    listing.insert(OsString::new(), see(root));
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let seen = see(&path);
            let name = path.strip_prefix(root).unwrap().as_os_str().to_owned();
            if seen.kind == "folder" {
                folders.push(path);
            } else if seen.nlink > 1 {
                names.entry(fs::symlink_metadata(&path).unwrap().ino()).or_default().push(name.clone());
            }
            listing.insert(name, seen);
        }
    }
    for names in names.values() {
        for name in names {
            listing.get_mut(name).unwrap().same_as = names.iter().min().cloned();
        }
    }
    listing
}

fn see(path: &Path) -> Seen {
    let meta = fs::symlink_metadata(path).unwrap();
    let file_type = meta.file_type();
    let (kind, bytes) = if file_type.is_dir() {
        ("folder".to_owned(), Vec::new())
    } else if file_type.is_symlink() {
        ("symlink".to_owned(), fs::read_link(path).unwrap().into_os_string().into_vec())
    } else if file_type.is_file() {
        ("file".to_owned(), fs::read(path).unwrap())
    } else if file_type.is_fifo() {
        ("fifo".to_owned(), Vec::new())
    } else {
        let kind = if file_type.is_char_device() { "char" } else { "block" };
        (format!("{kind} {}:{}", rustix::fs::major(meta.rdev()), rustix::fs::minor(meta.rdev())), Vec::new())
    };
    Seen {
        kind,
        mode: meta.mode() & 0o7777,
        uid: meta.uid(),
        gid: meta.gid(),
        mtime: (meta.mtime(), meta.mtime_nsec()),
        nlink: meta.nlink(),
        bytes,
        same_as: None,
        xattrs: xattrs(path),
    }
}

fn xattrs(path: &Path) -> BTreeMap<OsString, Vec<u8>> {
    let mut buffer = vec![0; 1 << 16];
    let length = rustix::fs::llistxattr(path, &mut buffer[..]).unwrap();
    let names: Vec<_> = buffer[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty()).collect();
    let value = |name: &[u8]| {
        let mut value = vec![0; 1 << 16];
        let length = rustix::fs::lgetxattr(path, name, &mut value[..]).unwrap();
        value.truncate(length);
        (OsString::from_vec(name.to_vec()), value)
    };
    names.into_iter().map(value).collect()
}

/// Checks an image with `fsck.erofs` and extracts it.
pub fn extract(image: &Path) -> (tempfile::TempDir, Listing) {
    let folder = scratch();
    let root = folder.path().join("root");
    let extract = format!("--extract={}", root.display());
    run("fsck.erofs", &[&extract, "--preserve", image.to_str().unwrap()]);
    let listing = list(&root);
    (folder, listing)
}

/// The kernel's own driver on a loop device, where this machine lets us.
pub struct Mounted {
    folder: tempfile::TempDir,
}

impl Mounted {
    /// `None`, with a notice, where loop mounts of EROFS are not possible.
    pub fn new(image: &Path) -> Option<Self> {
        let folder = scratch();
        let mount = Command::new("mount").args(["-t", "erofs", "-o", "loop,ro"]).arg(image).arg(folder.path()).output();
        let mount = mount.expect("mount is part of every Linux system");
        if mount.status.success() {
            return Some(Self { folder });
        }
        #[allow(clippy::print_stderr, reason = "a check that was not made must be seen, not passed over")]
        {
            eprintln!("NOT RUN with the kernel's driver: {}", String::from_utf8_lossy(&mount.stderr).trim());
        }
        None
    }

    pub fn path(&self) -> &Path {
        self.folder.path()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Detached: a process that another test is just starting may still hold a descriptor of ours.
        let _ = Command::new("umount").arg("--lazy").arg(self.folder.path()).status();
    }
}
