//! Trees to pack, and trees written down entry by entry to compare.
#![allow(dead_code, reason = "each test file uses its part")]

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::fs::Permissions;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::path::PathBuf;

use kiln_tree::PackError;
use kiln_tree::UnpackError;
use kiln_tree::UnpackOptions;
use kiln_tree::Unpacked;
use rustix::fs::AtFlags;
use rustix::fs::CWD;
use rustix::fs::FileType;
use rustix::fs::Mode;
use rustix::fs::Timespec;
use rustix::fs::Timestamps;
use tar::EntryType;
use tar::Header;

/// Everything about a file that an archive keeps.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Listed {
    kind: &'static str,
    mode: u32,
    mtime: (i64, i64),
    content: Vec<u8>,
    device: u64,
    /// The first of the names of the same file.
    same_as: Option<PathBuf>,
}

impl Listed {
    fn summary(&self) -> String {
        let Self { kind, mode, mtime, content, device, same_as } = self;
        format!("{kind} {mode:o} {mtime:?}, {} bytes, device {device}, same as {same_as:?}", content.len())
    }

    pub(crate) fn drop_fraction(&mut self) {
        self.mtime.1 = 0;
    }
}

/// The tree below `root`, which itself is the empty path. Sockets are left out.
pub(crate) fn listing(root: &Path) -> BTreeMap<PathBuf, Listed> {
    let mut tree = BTreeMap::new();
    let mut first_names = BTreeMap::new();
    list(root, root, &mut tree, &mut first_names);
    tree
}

fn list(
    root: &Path,
    path: &Path,
    tree: &mut BTreeMap<PathBuf, Listed>,
    first_names: &mut BTreeMap<(u64, u64), PathBuf>,
) {
    let metadata = fs::symlink_metadata(path).expect("exists");
    let kind = metadata.file_type();
    if kind.is_socket() {
        return;
    }
    let name = path.strip_prefix(root).expect("below the root").to_owned();
    let (kind, content) = match () {
        () if kind.is_dir() => ("folder", Vec::new()),
        () if kind.is_file() => ("file", fs::read(path).expect("readable")),
        () if kind.is_symlink() => ("symlink", fs::read_link(path).expect("a link").as_os_str().as_bytes().to_vec()),
        () if kind.is_fifo() => ("fifo", Vec::new()),
        () if kind.is_char_device() => ("char", Vec::new()),
        () if kind.is_block_device() => ("block", Vec::new()),
        () => panic!("{path:?} is {kind:?}"),
    };
    let mut same_as = None;
    if kind != "folder" && metadata.nlink() > 1 {
        let first = first_names.entry((metadata.dev(), metadata.ino())).or_insert_with(|| name.clone());
        same_as = Some(first.clone());
    }
    let device = if matches!(kind, "char" | "block") { metadata.rdev() } else { 0 };
    let mode = metadata.mode() & 0o7777;
    let mtime = (metadata.mtime(), metadata.mtime_nsec());
    tree.insert(name, Listed { kind, mode, mtime, content, device, same_as });
    if kind == "folder" {
        let mut names: Vec<_> =
            fs::read_dir(path).expect("readable").map(|entry| entry.expect("entry").path()).collect();
        names.sort_unstable();
        for inner in names {
            list(root, &inner, tree, first_names);
        }
    }
}

/// Compares two trees entry by entry, and names only what differs.
pub(crate) fn assert_same(found: &BTreeMap<PathBuf, Listed>, wanted: &BTreeMap<PathBuf, Listed>) {
    let names: Vec<_> = found.keys().collect();
    assert_eq!(names, wanted.keys().collect::<Vec<_>>());
    for (name, found) in found {
        assert!(*found == wanted[name], "{name:?}: {} instead of {}", found.summary(), wanted[name].summary());
    }
}

pub(crate) fn set_time(path: &Path, seconds: i64, nanoseconds: i64) {
    let time = Timespec { tv_sec: seconds, tv_nsec: nanoseconds };
    let times = Timestamps { last_access: time, last_modification: time };
    rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).expect("time set");
}

/// A tree with one of everything, made by a process that is root.
pub(crate) fn rich_tree(root: &Path) {
    let file = |name: &[u8], content: &[u8], mode: u32| {
        let path = root.join(OsStr::from_bytes(name));
        fs::create_dir_all(path.parent().expect("in the root")).expect("folder made");
        fs::write(&path, content).expect("written");
        fs::set_permissions(&path, Permissions::from_mode(mode)).expect("mode set");
        path
    };
    file(b"plain", b"hello", 0o644);
    file(b"empty", b"", 0o600);
    file(b"block", &[7; 512], 0o640);
    file(b"large", &[1, 2, 3, 4, 5].repeat(60_000), 0o755);
    file(b"setuid", b"#!", 0o4755);
    file(b"setgid", b"#!", 0o2711);
    file(b"unreadable", b"secret", 0o000);
    file(b"bytes-\xff\xfe\x80", b"name is no text", 0o644);
    file("umlaut-\u{e4}\n\\ \"".as_bytes(), b"odd", 0o644);
    file(b"-dash", b"", 0o644);
    file(&[b'n'; 100], b"100", 0o644);
    file(&[b'n'; 101], b"101", 0o644);
    file(&[b'm'; 255], b"255", 0o644);
    file(&[&[0xff; 200][..], b"/", &[0xfe; 200]].concat(), b"long bytes", 0o644);
    let deep = ["d"; 60].join("/directory-");
    file([deep.as_bytes(), b"/file"].concat().as_slice(), b"deep", 0o644);
    fs::create_dir_all(root.join("empty-folder/inner")).expect("folder made");
    fs::set_permissions(root.join("empty-folder/inner"), Permissions::from_mode(0o1777)).expect("mode set");
    file(b"read-only/inner/file", b"kept", 0o444);
    // Within the tree, to another name of a long one, and a link with two names.
    fs::hard_link(root.join("plain"), root.join("read-only/again")).expect("linked");
    fs::hard_link(root.join(OsStr::from_bytes(&[b'm'; 255])), root.join("z-short")).expect("linked");
    symlink("plain", root.join("link")).expect("linked");
    fs::hard_link(root.join("link"), root.join("link-again")).expect("linked");
    symlink("/nowhere/at all", root.join("dangling")).expect("linked");
    symlink("t/".repeat(150), root.join("long-target")).expect("linked");
    symlink("..", root.join("read-only/up")).expect("linked");
    symlink("read-only", root.join("to-folder")).expect("linked");
    rustix::fs::mknodat(CWD, root.join("fifo"), FileType::Fifo, Mode::from(0o644), 0).expect("fifo made");
    let null = rustix::fs::makedev(1, 3);
    rustix::fs::mknodat(CWD, root.join("null"), FileType::CharacterDevice, Mode::from(0o644), null).expect("as root");
    let disk = rustix::fs::makedev(259, 70_000);
    rustix::fs::mknodat(CWD, root.join("disk"), FileType::BlockDevice, Mode::from(0o600), disk).expect("as root");
    drop(std::os::unix::net::UnixListener::bind(root.join("socket")).expect("bound"));
    set_time(&root.join("plain"), 1_000_000_000, 123_456_789);
    set_time(&root.join("empty"), -2, 250_000_000);
    set_time(&root.join("block"), 0, 0);
    set_time(&root.join("large"), 5_000_000_000, 1);
    set_time(&root.join("link"), 77, 7);
    set_time(&root.join("fifo"), 78, 8);
    set_time(&root.join("null"), 79, 0);
    set_time(&root.join("read-only/inner"), 80, 900_000_000);
    set_time(&root.join("read-only"), 81, 0);
    set_time(&root.join("empty-folder"), 82, 5);
    fs::set_permissions(root.join("read-only/inner"), Permissions::from_mode(0o500)).expect("mode set");
    fs::set_permissions(root.join("read-only"), Permissions::from_mode(0o555)).expect("mode set");
    fs::set_permissions(root, Permissions::from_mode(0o751)).expect("mode set");
    set_time(root, 83, 42);
}

pub(crate) fn pack(path: &Path) -> Result<Vec<u8>, PackError> {
    let mut archive = Vec::new();
    kiln_tree::pack(path, None, &mut archive)?;
    Ok(archive)
}

pub(crate) fn unpack_into(archive: &[u8], folder: &Path) -> Result<Unpacked, UnpackError> {
    kiln_tree::unpack_into(archive, folder, &UnpackOptions::guest())
}

/// One entry with its content, as an archive without an end mark.
pub(crate) fn entry(kind: EntryType, name: &[u8], link: &[u8], content: &[u8]) -> Vec<u8> {
    let mut header = Header::new_ustar();
    header.as_old_mut().name[..name.len()].copy_from_slice(name);
    header.as_old_mut().linkname[..link.len()].copy_from_slice(link);
    header.set_entry_type(kind);
    header.set_mode(0o644);
    header.set_size(content.len() as u64);
    header.set_mtime(1);
    if matches!(kind, EntryType::Char | EntryType::Block) {
        header.set_device_major(1).expect("fits");
        header.set_device_minor(3).expect("fits");
    }
    header.set_cksum();
    let mut bytes = header.as_bytes().to_vec();
    bytes.extend_from_slice(content);
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

pub(crate) fn file(name: &str, content: &[u8]) -> Vec<u8> {
    entry(EntryType::Regular, name.as_bytes(), b"", content)
}

pub(crate) fn folder(name: &str) -> Vec<u8> {
    entry(EntryType::Directory, name.as_bytes(), b"", b"")
}

pub(crate) fn link(kind: EntryType, name: &str, target: &str) -> Vec<u8> {
    entry(kind, name.as_bytes(), target.as_bytes(), b"")
}

/// An archive of `entries`, with its end mark.
pub(crate) fn archive(entries: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = entries.concat();
    bytes.resize(bytes.len() + 1024, 0);
    bytes
}
