//! Images as files: their bytes, and what is large. Which tree layers mean is in `layer_corpus`.

mod image_support;

use std::ffi::OsStr;
use std::fs;

use image_support::Entry;
use image_support::Flat;
use image_support::LayerBlob;
use image_support::Listing;
use image_support::Mounted;
use image_support::Place;
use image_support::Tar;
use image_support::extract;

async fn build(layers: &[LayerBlob]) -> (Place, Flat) {
    let place = Place::new().await;
    let root = place.build(layers).await.unwrap();
    (place, root)
}

async fn listing(layers: &[LayerBlob]) -> Listing {
    let (_place, root) = build(layers).await;
    extract(&root.path).1
}

fn names(listing: &Listing) -> Vec<&str> {
    listing.keys().map(|name| name.to_str().unwrap()).filter(|name| !name.is_empty()).collect()
}

fn bytes<'a>(listing: &'a Listing, name: &str) -> &'a [u8] {
    &listing[OsStr::new(name)].bytes
}

#[tokio::test]
async fn owner_mode_setuid_and_time_are_kept() {
    let tar = Tar::new()
        .entry(&Entry { name: b"su", mode: 0o4755, uid: 7, gid: 3_000_000_000, mtime: 12, ..Entry::default() })
        .entry(&Entry { name: b"tmp", kind: b'5', mode: 0o1777, uid: 65_536, ..Entry::default() })
        .pax(&[("mtime", b"1234567890.123456789"), ("uid", b"4000000000")])
        .file("precise", b"x")
        .finish();
    let (_place, root) = build(&[LayerBlob::plain(tar)]).await;
    // Neither tool shows the setuid bit (`fsck.erofs` sets the owner after the mode, `dump.erofs`
    // prints permissions only), so it is read from the inode that `dump.erofs` points to.
    let dump = image_support::run("dump.erofs", &["--path=/su", root.path.to_str().unwrap()]);
    let nid: usize = dump.split("NID: ").nth(1).unwrap().split_whitespace().next().unwrap().parse().unwrap();
    let image = fs::read(&root.path).unwrap();
    let meta_start = u32::from_le_bytes(image[1024 + 40..][..4].try_into().unwrap()) as usize;
    let inode = &image[meta_start * 4096 + nid * 32..];
    assert_eq!(u16::from_le_bytes([inode[4], inode[5]]), 0o104_755);
    let (_folder, tree) = extract(&root.path);
    let su = &tree[OsStr::new("su")];
    assert_eq!((su.uid, su.gid, su.mtime), (7, 3_000_000_000, (12, 0)));
    let tmp = &tree[OsStr::new("tmp")];
    assert_eq!((tmp.kind.as_str(), tmp.mode, tmp.uid), ("folder", 0o1777, 65_536));
    let precise = &tree[OsStr::new("precise")];
    assert_eq!((precise.mtime, precise.uid), ((1_234_567_890, 123_456_789), 4_000_000_000));
}

#[tokio::test]
async fn an_archive_without_its_end_mark_is_whole() {
    let mut tar = Tar::new().file("a", b"1").finish();
    tar.truncate(tar.len() - 1024);
    assert_eq!(names(&listing(&[LayerBlob::plain(tar.clone())]).await), ["a"]);
    // `umoci insert` leaves out the last padding as well.
    for length in [513, 700] {
        tar.truncate(512);
        tar.resize(length, b'1');
        let tree = listing(&[LayerBlob::plain(tar.clone())]).await;
        assert_eq!((names(&tree), bytes(&tree, "a")), (vec!["a"], &b"1"[..]), "{length}");
    }
}

#[tokio::test]
async fn a_large_folder_is_found_by_every_name() {
    let mut tar = Tar::new();
    let names: Vec<String> = (0..3000).map(|n| format!("many/file-{n}-{}", "x".repeat(n % 200))).collect();
    for name in &names {
        tar = tar.file(name, name.as_bytes());
    }
    let (_place, root) = build(&[LayerBlob::zstd(&tar.finish())]).await;
    let (_folder, tree) = extract(&root.path);
    for name in &names {
        assert_eq!(bytes(&tree, name), name.as_bytes());
    }
    // Looking a name up is the driver's bisection; listing, as fsck does, is not.
    let Some(mounted) = Mounted::new(&root.path) else { return };
    for name in &names {
        assert_eq!(fs::read(mounted.path().join(name)).unwrap(), name.as_bytes());
    }
    assert!(!mounted.path().join("many/file-").exists());
}

#[tokio::test]
async fn the_deepest_folders_can_be_made_and_whited_out() {
    let deep = "d/".repeat(2000);
    let lower = Tar::new().folder(&deep).finish();
    let upper = Tar::new().file(".wh.d", b"").file("left", b"1").finish();
    assert_eq!(names(&listing(&[LayerBlob::plain(lower.clone()), LayerBlob::plain(upper)]).await), ["left"]);
    let opaque = Tar::new().file(".wh..wh..opq", b"").file("left", b"1").finish();
    assert_eq!(names(&listing(&[LayerBlob::plain(lower), LayerBlob::plain(opaque)]).await), ["left"]);
}

#[tokio::test]
async fn an_image_may_end_wherever_its_last_inode_does() {
    // Of that many sizes in a row some fill their last block to the end.
    for count in 100..230 {
        let files = (0..count).map(|index| format!("{index:04}"));
        let tar = files.fold(Tar::new(), |tar, name| tar.file(&name, b""));
        let place = Place::new().await;
        let built = place.build(&[LayerBlob::plain(tar.finish())]).await.unwrap();
        drop(extract(&built.path));
    }
}

#[tokio::test]
async fn a_hole_takes_neither_time_nor_room() {
    let records = [("GNU.sparse.size", &b"34359738368"[..]), ("GNU.sparse.map", b"34359738367,1")];
    let tar = Tar::new().file("before", &[1; 5000]).pax(&records).file("hole", b"x").file("after", &[2; 5000]);
    let (_place, root) = build(&[LayerBlob::plain(tar.finish())]).await;
    let blocks = std::os::unix::fs::MetadataExt::blocks(&fs::metadata(&root.path).unwrap());
    assert!(blocks * 512 < 1 << 20, "{blocks} blocks");
    let Some(mounted) = Mounted::new(&root.path) else { return };
    let hole = fs::File::open(mounted.path().join("hole")).unwrap();
    let mut end = [7; 2];
    std::os::unix::fs::FileExt::read_exact_at(&hole, &mut end, (32 << 30) - 2).unwrap();
    assert_eq!((hole.metadata().unwrap().len(), end), (32 << 30, [0, b'x']));
    assert_eq!(fs::read(mounted.path().join("after")).unwrap(), [2; 5000]);
}
