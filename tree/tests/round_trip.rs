//! What is packed comes out the same.

mod support;

use std::ffi::OsStr;
use std::fs;
use std::fs::File;
use std::io;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::os::unix::fs::symlink;
use std::path::Path;

use kiln_tree::PackError;
use kiln_tree::UnpackError;
use kiln_tree::UnpackOptions;
use kiln_tree::pack;
use kiln_tree::unpack_as;
use support::assert_same;
use support::listing;
use support::rich_tree;
use support::unpack_into;
use tempfile::tempdir;

#[test]
fn a_tree_with_one_of_everything_survives() {
    let folder = tempdir().expect("temporary folder");
    let source = folder.path().join("source");
    fs::create_dir(&source).expect("made");
    rich_tree(&source);
    let archive = support::pack(&source).expect("packed");
    let wanted = listing(&source);
    assert!(wanted.len() > 30, "{}", wanted.len());

    let copy = folder.path().join("missing/parents/copy");
    let unpacked = unpack_into(&archive, &copy).expect("unpacked");
    assert_same(&listing(&copy), &wanted);
    // Sixty folders and their parents, and all that has a name.
    assert_eq!(unpacked.entries, wanted.len() as u64);
    assert_eq!(unpacked.skipped, 0);

    // Over what is there already, read-only folders and all.
    unpack_into(&archive, &copy).expect("unpacked again");
    assert_same(&listing(&copy), &wanted);

    let as_path = folder.path().join("as");
    unpack_as(&archive[..], &as_path, &UnpackOptions::guest()).expect("unpacked");
    assert_same(&listing(&as_path), &wanted);
    assert_eq!(support::pack(&as_path).expect("packed").len(), archive.len());
}

#[test]
fn the_host_gets_no_special_bits_and_no_nodes() {
    let folder = tempdir().expect("temporary folder");
    let source = folder.path().join("source");
    fs::create_dir(&source).expect("made");
    rich_tree(&source);
    let archive = support::pack(&source).expect("packed");
    let copy = folder.path().join("copy");
    let unpacked = kiln_tree::unpack_into(&archive[..], &copy, &UnpackOptions::host()).expect("unpacked");
    assert_eq!(unpacked.skipped, 3);
    assert!(!copy.join("fifo").exists() && !copy.join("null").exists());
    let mode = |name: &str| fs::metadata(copy.join(name)).expect("there").mode() & 0o7777;
    assert_eq!((mode("setuid"), mode("setgid"), mode("empty-folder/inner")), (0o755, 0o711, 0o777));
}

#[test]
fn a_lone_file_becomes_the_path_itself() {
    let folder = tempdir().expect("temporary folder");
    let at = |name: &str| folder.path().join(name);
    fs::write(at("source"), b"content").expect("written");
    support::set_time(&at("source"), 5, 6);
    let mut archive = Vec::new();
    pack(&at("source"), Some(OsStr::new("other name")), &mut archive).expect("packed");

    let inside = at("inside");
    unpack_into(&archive, &inside).expect("unpacked");
    assert_eq!(fs::read(inside.join("other name")).expect("there"), b"content");

    let target = at("new/folder/target");
    for _ in 0..2 {
        let unpacked = unpack_as(&archive[..], &target, &UnpackOptions::host()).expect("unpacked");
        assert_eq!((unpacked.entries, unpacked.bytes), (1, 7));
        let metadata = fs::metadata(&target).expect("there");
        assert_eq!((metadata.len(), metadata.mtime(), metadata.mtime_nsec()), (7, 5, 6));
    }
    assert_eq!(fs::read_dir(at("new/folder")).expect("there").count(), 1);

    let error = unpack_as(&archive[..], &inside, &UnpackOptions::host()).expect_err("a folder is there");
    assert!(matches!(&error, UnpackError::Io { name, .. } if *name == inside), "{error:?}");
    assert_eq!(fs::read_dir(folder.path()).expect("there").count(), 3, "nothing temporary is left");
}

#[test]
fn a_link_is_packed_as_a_link_and_never_followed() {
    let folder = tempdir().expect("temporary folder");
    let link = folder.path().join("link");
    symlink("/etc", &link).expect("linked");
    let archive = support::pack(&link).expect("packed");
    let copy = folder.path().join("copy");
    unpack_as(&archive[..], &copy, &UnpackOptions::host()).expect("unpacked");
    assert_eq!(fs::read_link(&copy).expect("a link"), Path::new("/etc"));
}

#[test]
fn an_incomplete_file_never_takes_the_place_of_the_old_one() {
    let folder = tempdir().expect("temporary folder");
    let target = folder.path().join("target");
    fs::write(&target, b"old").expect("written");
    let whole = support::archive(&[support::file("new", &[1; 3000])]);
    for length in (0..whole.len() - 1023).step_by(97) {
        let error = unpack_as(&whole[..length], &target, &UnpackOptions::host()).expect_err("cut short");
        assert!(matches!(error, UnpackError::Truncated), "{error:?}");
    }
    let two = support::archive(&[support::file("new", b"1"), support::file("newer", b"2")]);
    unpack_as(&two[..], &target, &UnpackOptions::host()).expect_err("two files are not one");
    let none = support::archive(&[]);
    unpack_as(&none[..], &target, &UnpackOptions::host()).expect_err("nothing is not a file");
    assert_eq!(fs::read(&target).expect("there"), b"old");
    assert_eq!(fs::read_dir(folder.path()).expect("there").count(), 1);
}

/// Changes `path` to `length` bytes once the archive has begun to flow.
struct Meddler<'a> {
    path: &'a Path,
    length: u64,
    archive: Vec<u8>,
}

impl Write for Meddler<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        File::options().write(true).open(self.path)?.set_len(self.length)?;
        self.archive.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_file_that_changes_meanwhile_leaves_the_archive_whole() {
    const LENGTH: u64 = 1 << 20;
    let folder = tempdir().expect("temporary folder");
    let source = folder.path().join("source");
    fs::create_dir(&source).expect("made");
    let path = source.join("changing");
    fs::write(source.join("later"), b"later").expect("written");
    for (length, shrinks) in [(100_000, true), (2 * LENGTH, false)] {
        fs::write(&path, vec![9; LENGTH as usize]).expect("written");
        let mut meddler = Meddler { path: &path, length, archive: Vec::new() };
        let packed = pack(&source, None, &mut meddler);
        match packed {
            Err(PackError::Changed { path: changed }) if shrinks => assert_eq!(changed, path),
            other => assert!(!shrinks && other.is_ok(), "{other:?}"),
        }
        let copy = folder.path().join("copy");
        unpack_into(&meddler.archive, &copy).expect("a whole archive");
        let content = fs::read(copy.join("changing")).expect("there");
        assert_eq!(content.len() as u64, LENGTH);
        assert_eq!(content.iter().all(|byte| *byte == 9), !shrinks);
        assert_eq!(fs::read(copy.join("later")).expect("there"), b"later");
    }
}

#[test]
fn sizes_beyond_eight_gigabytes_are_announced_whole() {
    /// Keeps what is not zero, so that nothing large has to be kept.
    struct Head(Vec<u8>);
    impl Write for Head {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            if self.0.len() < 4096 {
                self.0.extend_from_slice(bytes);
                return Ok(bytes.len());
            }
            Err(io::ErrorKind::StorageFull.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let folder = tempdir().expect("temporary folder");
    let path = folder.path().join("sparse");
    File::create(&path).expect("made").set_len(9 << 30).expect("sparse");
    let mut head = Head(Vec::new());
    let error = pack(&path, None, &mut head).expect_err("the writer refuses");
    assert!(matches!(error, PackError::Write(_)), "{error:?}");
    let options = UnpackOptions { max_bytes: (9 << 30) - 1, ..UnpackOptions::host() };
    let error = kiln_tree::unpack_into(&head.0[..], &folder.path().join("copy"), &options).expect_err("one too many");
    assert!(matches!(error, UnpackError::Limit { what: "bytes", .. }), "{error:?}");
    let mut listed = tar::Archive::new(&head.0[..]);
    let entry = listed.entries().expect("an archive").next().expect("an entry").expect("well-formed");
    assert_eq!(entry.size(), 9 << 30);
}

#[test]
fn what_cannot_be_packed_is_named() {
    let folder = tempdir().expect("temporary folder");
    let missing = folder.path().join("missing");
    let error = support::pack(&missing).expect_err("not there");
    assert_eq!(error.raw_os_error(), Some(2));
    assert!(matches!(&error, PackError::Read { path, .. } if *path == missing), "{error:?}");
    let socket = folder.path().join("socket");
    drop(std::os::unix::net::UnixListener::bind(&socket).expect("bound"));
    support::pack(&socket).expect_err("a socket");
    let mut deep = folder.path().join("deep");
    // Beyond the length of a path, so step by step.
    fs::create_dir(&deep).expect("made");
    let mut at = File::open(&deep).expect("a folder");
    for _ in 0..600 {
        rustix::fs::mkdirat(&at, "d", rustix::fs::Mode::RWXU).expect("made");
        let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::DIRECTORY;
        at = rustix::fs::openat(&at, "d", flags, rustix::fs::Mode::empty()).expect("a folder").into();
    }
    deep.push("d");
    assert!(matches!(support::pack(&deep), Err(PackError::TooDeep { .. })));
}
