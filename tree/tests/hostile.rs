//! Archives made to do harm: nothing outside the destination changes, nothing grows without bound, nothing panics.

mod support;

use std::fs;
use std::io;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::path::PathBuf;

use kiln_tree::UnpackError;
use kiln_tree::UnpackOptions;
use kiln_tree::Unpacked;
use proptest::prelude::*;
use support::archive;
use support::entry;
use support::file;
use support::folder;
use support::link;
use support::unpack_into;
use tar::EntryType;
use tempfile::TempDir;
use tempfile::tempdir;

/// A destination, and things outside it that must stay as they are.
struct Scene {
    folder: TempDir,
}

const SECRET: &[u8] = b"nobody's business";

impl Scene {
    fn new() -> Self {
        let scene = Self { folder: tempdir().expect("temporary folder") };
        fs::create_dir_all(scene.at("outside/folder")).expect("made");
        fs::write(scene.at("outside/file"), SECRET).expect("written");
        fs::create_dir(scene.at("inside")).expect("made");
        scene
    }

    fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn unpack(&self, entries: &[Vec<u8>]) -> Result<Unpacked, UnpackError> {
        let result = unpack_into(&archive(entries), &self.at("inside"));
        self.check();
        result
    }

    /// Everything outside is as it was.
    fn check(&self) {
        let names = |path: &Path| {
            let mut names: Vec<_> = fs::read_dir(path).expect("there").map(|e| e.expect("entry").file_name()).collect();
            names.sort_unstable();
            names
        };
        assert_eq!(names(self.folder.path()), ["inside", "outside"]);
        assert_eq!(names(&self.at("outside")), ["file", "folder"]);
        assert_eq!(names(&self.at("outside/folder")), [""; 0]);
        assert_eq!(fs::read(self.at("outside/file")).expect("there"), SECRET);
        let metadata = fs::metadata(self.at("outside/file")).expect("there");
        assert_eq!((metadata.nlink(), metadata.mode() & 0o7777), (1, 0o644));
        assert_eq!(fs::metadata(self.at("outside/folder")).expect("there").mode() & 0o7777, 0o755);
    }
}

fn escapes(result: Result<Unpacked, UnpackError>) {
    assert!(matches!(result, Err(UnpackError::Escape { .. })), "{result:?}");
}

fn long_name(name: &[u8]) -> Vec<u8> {
    entry(EntryType::GNULongName, b"long", b"", name)
}

#[test]
fn names_that_lead_out_are_refused() {
    for name in ["../outside/x", "a/../../outside/x", "..", "a/..", "/outside", "/", "./../x", "."] {
        let scene = Scene::new();
        escapes(scene.unpack(&[file(name, b"x")]));
        if name != "." {
            escapes(scene.unpack(&[folder(name)]));
        }
        escapes(scene.unpack(&[file("x", b""), link(EntryType::Link, "y", name)]));
        escapes(scene.unpack(&[link(EntryType::Symlink, name, "target")]));
    }
    let scene = Scene::new();
    escapes(scene.unpack(&[file("", b"x")]));
    let absolute = scene.at("outside/x");
    escapes(scene.unpack(&[long_name(absolute.as_os_str().as_encoded_bytes()), file("x", b"x")]));
    escapes(scene.unpack(&[entry(EntryType::XHeader, b"x", b"", b"12 path=a\0b\n"), file("x", b"x")]));
}

#[test]
fn a_link_inside_is_never_followed() {
    let scene = Scene::new();
    let outside = scene.at("outside").to_str().expect("text").to_owned();
    for target in ["../outside", &outside] {
        let out = || link(EntryType::Symlink, "out", target);
        escapes(scene.unpack(&[out(), file("out/x", b"x")]));
        escapes(scene.unpack(&[out(), folder("out/x")]));
        escapes(scene.unpack(&[out(), file("out/folder/x", b"x")]));
        escapes(scene.unpack(&[out(), link(EntryType::Symlink, "out/x", "y")]));
        escapes(scene.unpack(&[out(), link(EntryType::Link, "stolen", "out/file")]));
        escapes(scene.unpack(&[out(), file("mine", b"x"), link(EntryType::Link, "out/x", "mine")]));
    }
    assert!(!scene.at("inside/stolen").exists());
    // A link is fine as such, also one to nowhere.
    scene.unpack(&[link(EntryType::Symlink, "out", "../outside/file")]).expect("unpacked");
    scene.unpack(&[file("out", b"a file of its own")]).expect("replaces the link");
    assert!(fs::symlink_metadata(scene.at("inside/out")).expect("there").is_file());
}

#[test]
fn a_link_that_was_there_before_is_not_followed_either() {
    let scene = Scene::new();
    symlink("../outside", scene.at("inside/out")).expect("linked");
    symlink("../outside/file", scene.at("inside/out-file")).expect("linked");
    escapes(scene.unpack(&[file("out/x", b"x")]));
    scene.unpack(&[file("out-file", b"new")]).expect("replaces the link");
    scene.unpack(&[folder("out"), file("out/x", b"x")]).expect("replaces the link");
    assert_eq!(fs::read(scene.at("inside/out/x")).expect("there"), b"x");
}

#[test]
fn a_folder_that_becomes_a_link_gets_neither_mode_nor_time_through_it() {
    let scene = Scene::new();
    let mut hostile = folder("swap");
    hostile[100..108].copy_from_slice(b"0000777\0");
    let sum: u32 = (0..512).map(|at| if (148..156).contains(&at) { 32 } else { u32::from(hostile[at]) }).sum();
    hostile[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    scene.unpack(&[hostile, link(EntryType::Symlink, "swap", "../outside/folder")]).expect("the folder was empty");
    assert!(fs::symlink_metadata(scene.at("inside/swap")).expect("there").is_symlink());
}

#[test]
fn a_hard_link_to_a_link_is_a_link() {
    let scene = Scene::new();
    scene
        .unpack(&[link(EntryType::Symlink, "out", "../outside/file"), link(EntryType::Link, "again", "out")])
        .expect("unpacked");
    assert!(fs::symlink_metadata(scene.at("inside/again")).expect("there").is_symlink());
    // What is unpacked at either name later does not go through the other.
    scene.unpack(&[file("again", b"new")]).expect("unpacked");
    let itself = scene.unpack(&[file("x", b""), link(EntryType::Link, "./x", "x")]);
    assert!(matches!(itself, Err(UnpackError::Malformed { .. })), "{itself:?}");
}

#[test]
fn what_is_in_the_way_is_replaced_unless_that_loses_a_tree() {
    let scene = Scene::new();
    scene.unpack(&[file("a", b"1"), folder("a"), file("a/b", b"2"), folder("c"), file("c", b"3")]).expect("unpacked");
    assert_eq!(fs::read(scene.at("inside/a/b")).expect("there"), b"2");
    assert_eq!(fs::read(scene.at("inside/c")).expect("there"), b"3");
    let error = scene.unpack(&[file("a", b"4")]).expect_err("not empty");
    assert_eq!(error.raw_os_error(), Some(39));
    assert!(matches!(&error, UnpackError::Io { name, .. } if name == Path::new("a")), "{error:?}");
    let error = scene.unpack(&[file("c/d", b"5")]).expect_err("a file is no folder");
    assert_eq!(error.raw_os_error(), Some(20));
    let error = scene.unpack(&[link(EntryType::Link, "d", "missing")]).expect_err("no target");
    assert_eq!(error.raw_os_error(), Some(2));
}

#[test]
fn limits_hold() {
    let scene = Scene::new();
    let limited = |entries: &[Vec<u8>], max_entries, max_bytes| {
        let options = UnpackOptions { max_entries, max_bytes, special: false };
        kiln_tree::unpack_into(&archive(entries)[..], &scene.at("inside"), &options)
    };
    let limit = |result: Result<Unpacked, UnpackError>, wanted: &str| match result {
        Err(UnpackError::Limit { what, .. }) => assert_eq!(what, wanted),
        other => panic!("{other:?}"),
    };
    let two = [file("a", b"123"), file("b", b"456")];
    assert_eq!(limited(&two, 2, 6).expect("fits"), Unpacked { entries: 2, bytes: 6, skipped: 0 });
    limit(limited(&two, 1, 6), "entries");
    limit(limited(&two, 2, 5), "bytes");
    let skipped = [entry(EntryType::Char, b"n", b"", b""), entry(EntryType::Fifo, b"p", b"", b"")];
    limit(limited(&skipped, 1, 0), "entries");
    assert_eq!(limited(&skipped, 2, 0).expect("fits").skipped, 2);

    limit(scene.unpack(&[long_name(&[b'x'; 70_000]), file("x", b"")]), "bytes in an extension record");
    limit(scene.unpack(&[long_name(&b"x/".repeat(3000)), file("x", b"")]), "bytes in a name");
    limit(scene.unpack(&[long_name(&b"x/".repeat(600)), file("x", b"")]), "components in a name");
    limit(scene.unpack(&[long_name(&[b'x'; 256]), file("x", b"")]), "bytes in a component of a name");
    limit(scene.unpack(&vec![long_name(b"x"); 20]), "extension records of one entry");
    // A size that only a promise could have.
    let mut huge = file("x", b"");
    huge[124..136].copy_from_slice(&[0x80, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]);
    let sum: u32 = (0..512).map(|at| if (148..156).contains(&at) { 32 } else { u32::from(huge[at]) }).sum();
    huge[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    let result = scene.unpack(&[huge]);
    assert!(matches!(result, Err(UnpackError::Malformed { .. })), "{result:?}");
}

/// Gives folder entries for ever.
struct Endless {
    next: u64,
    ready: io::Cursor<Vec<u8>>,
}

impl Read for Endless {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.ready.read(buffer)? {
            0 => {
                self.next += 1;
                let mut folders = long_name(format!("{}{}", "x/".repeat(500), self.next).as_bytes());
                folders.extend(folder("x"));
                self.ready = io::Cursor::new(folders);
                self.ready.read(buffer)
            }
            count => Ok(count),
        }
    }
}

#[test]
fn an_archive_without_end_meets_a_limit() {
    let scene = Scene::new();
    let options = UnpackOptions { max_entries: 300, ..UnpackOptions::host() };
    let endless = Endless { next: 0, ready: io::Cursor::new(Vec::new()) };
    let result = kiln_tree::unpack_into(endless, &scene.at("inside"), &options);
    assert!(matches!(result, Err(UnpackError::Limit { what: "entries", .. })), "{result:?}");
}

#[test]
fn a_truncated_archive_is_never_taken_for_a_whole_one() {
    let folder = tempdir().expect("temporary folder");
    let source = folder.path().join("source");
    fs::create_dir_all(source.join("folder/inner")).expect("made");
    fs::write(source.join("folder").join("n".repeat(150)), [8; 3000]).expect("written");
    fs::hard_link(source.join("folder").join("n".repeat(150)), source.join("again")).expect("linked");
    symlink("target", source.join("link")).expect("linked");
    let whole = support::pack(&source).expect("packed");
    let end_mark = whole.len() - 1024;
    for length in (0..end_mark + 512).step_by(97) {
        let copy = tempdir().expect("temporary folder");
        let result = unpack_into(&whole[..length], copy.path());
        assert!(matches!(result, Err(UnpackError::Truncated)), "{length}: {result:?}");
    }
    // One block of zeros is an end mark, as with every reader.
    unpack_into(&whole[..end_mark + 512], &folder.path().join("copy")).expect("whole");
}

#[test]
fn what_is_not_understood_is_refused() {
    let scene = Scene::new();
    let unsupported = |entries: &[Vec<u8>]| {
        let result = scene.unpack(entries);
        assert!(matches!(result, Err(UnpackError::Unsupported { .. })), "{result:?}");
    };
    unsupported(&[entry(EntryType::new(b'V'), b"x", b"", b"")]);
    unsupported(&[
        entry(EntryType::XHeader, b"x", b"", b"22 GNU.sparse.major=2\n21 GNU.sparse.size=0\n"),
        file("x", b""),
    ]);
    let mut damaged = file("x", b"");
    damaged[0] = b'y';
    let result = scene.unpack(&[damaged]);
    assert!(matches!(result, Err(UnpackError::Malformed { .. })), "{result:?}");
}

fn any_entry() -> impl Strategy<Value = Vec<u8>> {
    let kind = prop::sample::select(&b"0123456705xLKgS"[..]);
    let name = || {
        let part = prop::sample::select(&["a", "b", "out", "..", ".", "", "folder", "file"][..]);
        prop::collection::vec(part, 0..4).prop_map(|parts| parts.join("/"))
    };
    (kind, name(), name(), prop::collection::vec(any::<u8>(), 0..40), any::<bool>()).prop_map(
        |(kind, name, target, content, out)| {
            let target = if out { "../outside".to_owned() } else { target };
            let content = match kind {
                b'x' => format!("{} path={target}\n", target.len() + 9).into_bytes(),
                b'L' | b'K' => target.clone().into_bytes(),
                _ => content,
            };
            entry(EntryType::new(kind), name.as_bytes(), target.as_bytes(), &content)
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn any_entries_stay_inside(entries in prop::collection::vec(any_entry(), 0..12)) {
        let scene = Scene::new();
        // One after the other, so that a refused one does not hide the rest.
        for entry in &entries {
            let _ = scene.unpack(std::slice::from_ref(entry));
        }
        let _ = scene.unpack(&entries);
        // The destination itself is the caller's word: a link in its place is followed, here to one that an entry has made.
        if !scene.at("inside/a").is_symlink() {
            let _ = kiln_tree::unpack_as(&archive(&entries)[..], &scene.at("inside/a"), &UnpackOptions::host());
        }
        scene.check();
    }

    #[test]
    fn damaged_archives_are_unpacked_or_refused(
        entries in prop::collection::vec(any_entry(), 1..6),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        fix_checksums in any::<bool>(),
    ) {
        let scene = Scene::new();
        let mut bytes = archive(&entries);
        for (at, byte) in damage {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if fix_checksums {
            for block in bytes.chunks_mut(512) {
                let sum: u32 = block.iter().enumerate()
                    .map(|(at, byte)| if (148..156).contains(&at) { 32 } else { u32::from(*byte) }).sum();
                block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
            }
        }
        let _ = unpack_into(&bytes, &scene.at("inside"));
        scene.check();
    }

    #[test]
    fn random_bytes_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
        let scene = Scene::new();
        let _ = unpack_into(&bytes, &scene.at("inside"));
        scene.check();
    }
}
