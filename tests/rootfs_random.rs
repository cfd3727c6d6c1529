//! Random trees through archive, image and back, by two readers nobody here wrote: `fsck.erofs`
//! and, where the machine allows a loop mount, the kernel.

mod image_support;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use image_support::Entry;
use image_support::LayerBlob;
use image_support::Listing;
use image_support::Mounted;
use image_support::Place;
use image_support::Tar;
use proptest::prelude::*;
use proptest::test_runner::Config;
use proptest::test_runner::TestRunner;

#[derive(Clone, Debug)]
enum Node {
    File { content: Vec<u8>, owner: u32, mode: u32, mtime: u64 },
    Symlink(Vec<u8>),
    Folder { children: BTreeMap<Vec<u8>, Node>, owner: u32, mode: u32, mtime: u64 },
}

fn name() -> impl Strategy<Value = Vec<u8>> {
    let length = prop_oneof![8 => 1..12_usize, 1 => 200..=255_usize];
    let byte = (1..=255_u8).prop_filter("a slash ends a name", |byte| *byte != b'/');
    length
        .prop_flat_map(move |length| proptest::collection::vec(byte.clone(), length))
        .prop_filter("reserved", |name| !matches!(name.as_slice(), b"." | b"..") && !name.starts_with(b".wh."))
}

/// Sizes around what decides the layout: nothing, inline, blocks and their edges.
fn content() -> impl Strategy<Value = Vec<u8>> {
    let size =
        prop_oneof![Just(0_usize), 1..64_usize, 1000..1050_usize, 4090..4100_usize, 8190..8196_usize, 0..20_000_usize,];
    (size, any::<u8>()).prop_map(|(size, seed)| (0..size).map(|at| (at as u8).wrapping_mul(31) ^ seed).collect())
}

fn node() -> impl Strategy<Value = Node> {
    let owner = prop_oneof![Just(0), 1..70_000_u32, any::<u32>().prop_filter("-1 means none", |id| *id != u32::MAX)];
    let mtime = 0..(1_u64 << 33);
    let leaf = prop_oneof![
        4 => (content(), owner.clone(), 0..0o1000_u32, mtime.clone())
            .prop_map(|(content, owner, mode, mtime)| Node::File { content, owner, mode, mtime }),
        1 => prop_oneof![
            proptest::collection::vec(1..=255_u8, 1..100),
            proptest::collection::vec(1..=255_u8, 1000..=4095),
        ]
        .prop_map(Node::Symlink),
    ];
    leaf.prop_recursive(5, 200, 40, move |inner| {
        (proptest::collection::btree_map(name(), inner, 0..40), owner.clone(), 0..0o1000_u32, mtime.clone())
            .prop_map(|(children, owner, mode, mtime)| Node::Folder { children, owner, mode, mtime })
    })
}

/// Appends the node's entries and notes what a reader has to find.
fn describe(tar: Tar, path: &[u8], node: &Node, expected: &mut BTreeMap<OsString, (Vec<u8>, u32, u32, u64)>) -> Tar {
    let mut note = |bytes: &[u8], owner, mode, mtime| {
        expected.insert(OsString::from_vec(path.to_vec()), (bytes.to_vec(), owner, mode, mtime));
    };
    match node {
        Node::File { content, owner, mode, mtime } => {
            note(content, *owner, *mode, *mtime);
            tar.entry(&Entry {
                name: path,
                content,
                uid: *owner,
                gid: *owner,
                mode: *mode,
                mtime: *mtime,
                ..Entry::default()
            })
        }
        Node::Symlink(target) => {
            note(target, 5, 0o777, 6);
            tar.entry(&Entry {
                name: path,
                link: target,
                kind: b'2',
                uid: 5,
                gid: 5,
                mode: 0o777,
                mtime: 6,
                ..Entry::default()
            })
        }
        Node::Folder { children, owner, mode, mtime } => {
            note(b"", *owner, *mode, *mtime);
            let header = Entry {
                name: path,
                kind: b'5',
                uid: *owner,
                gid: *owner,
                mode: *mode,
                mtime: *mtime,
                ..Entry::default()
            };
            let tar = if path.is_empty() { tar.entry(&Entry { name: b"./", ..header }) } else { tar.entry(&header) };
            children.iter().fold(tar, |tar, (name, child)| {
                let separator: &[u8] = if path.is_empty() { b"" } else { b"/" };
                describe(tar, &[path, separator, name].concat(), child, expected)
            })
        }
    }
}

fn compare(found: &Listing, expected: &BTreeMap<OsString, (Vec<u8>, u32, u32, u64)>) {
    assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
    for (path, (bytes, owner, mode, mtime)) in expected {
        let seen = &found[path];
        assert!(seen.bytes == *bytes, "content of {path:?}");
        assert_eq!(
            (seen.uid, seen.gid, seen.mode, seen.mtime),
            (*owner, *owner, *mode, (*mtime as i64, 0)),
            "{path:?}"
        );
    }
}

#[test]
fn a_random_tree_comes_back_as_it_was() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let root = (proptest::collection::btree_map(name(), node(), 0..60), 0..0o1000_u32)
        .prop_map(|(children, mode)| Node::Folder { children, owner: 0, mode, mtime: 1 });
    let mut runner = TestRunner::new(Config { cases: 20, failure_persistence: None, ..Config::default() });
    runner
        .run(&root, |root| {
            let mut expected = BTreeMap::new();
            let tar = describe(Tar::new(), b"", &root, &mut expected).finish();
            let (_place, image) = runtime.block_on(async {
                let place = Place::new().await;
                let image = place.build(&[LayerBlob::zstd(&tar)]).await.unwrap();
                (place, image)
            });
            let (_folder, extracted) = image_support::extract(&image.path);
            compare(&extracted, &expected);
            if let Some(mounted) = Mounted::new(&image.path) {
                compare(&image_support::list(mounted.path()), &expected);
            }
            Ok(())
        })
        .unwrap();
}

/// Any archive gives an image that `fsck.erofs` accepts, or a typed error; never a panic.
#[test]
fn a_damaged_archive_is_refused_or_harmless() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let whole = Tar::new()
        .folder("d/")
        .pax(&[("path", b"d/long"), ("SCHILY.xattr.user.a", b"1"), ("mtime", b"1.5")])
        .file("x", &[1; 2000])
        .symlink("d/s", "long")
        .hard_link("h", "d/long")
        .file(".wh.h", b"")
        .finish();
    let damage = proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6);
    let mut runner = TestRunner::new(Config { cases: 150, failure_persistence: None, ..Config::default() });
    runner
        .run(&(damage, any::<bool>()), |(damage, mend)| {
            let mut tar = whole.clone();
            for (at, byte) in damage {
                let at = at.index(tar.len());
                tar[at] = byte;
                if mend {
                    mend_checksum(&mut tar, at / 512 * 512);
                }
            }
            let (place, built) = runtime.block_on(async {
                let place = Place::new().await;
                let built = place.build(&[LayerBlob::plain(tar)]).await;
                (place, built)
            });
            match built {
                Ok(root) => drop(image_support::run("fsck.erofs", &[root.path.to_str().unwrap()])),
                Err(kiln::rootfs::RootfsError::Layer(_)) => assert_eq!(place.debris(), [""; 0]),
                Err(error) => panic!("{error:?}"),
            }
            Ok(())
        })
        .unwrap();
}

/// Makes the block a header whose checksum is right, so that damage reaches the fields.
fn mend_checksum(tar: &mut [u8], header: usize) {
    let Some(block) = tar.get_mut(header..header + 512) else { return };
    block[148..156].fill(b' ');
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    block[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
}
