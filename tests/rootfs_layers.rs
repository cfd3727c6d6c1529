//! Layers become the tree their author meant (image-spec, layer.md).

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
async fn every_compression_gives_the_same_tree() {
    let tar = Tar::new().folder("etc/").file("etc/motd", b"hello").symlink("motd", "etc/motd").finish();
    let plain = listing(&[LayerBlob::plain(tar.clone())]).await;
    assert_eq!(names(&plain), ["etc", "etc/motd", "motd"]);
    assert_eq!(bytes(&plain, "etc/motd"), b"hello");
    assert_eq!(listing(&[LayerBlob::gzip(&tar)]).await, plain);
    assert_eq!(listing(&[LayerBlob::zstd(&tar)]).await, plain);
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
async fn whiteouts_remove_what_lower_layers_had() {
    let lower = Tar::new()
        .file("gone", b"1")
        .file("kept", b"2")
        .folder("folder/")
        .file("folder/gone", b"3")
        .file("folder/kept", b"4")
        .folder("whole/")
        .file("whole/inside", b"5");
    let upper = Tar::new().file(".wh.gone", b"").file("folder/.wh.gone", b"").file(".wh.whole", b"").file("new", b"6");
    let tree = listing(&[LayerBlob::gzip(&lower.finish()), LayerBlob::gzip(&upper.finish())]).await;
    assert_eq!(names(&tree), ["folder", "folder/kept", "kept", "new"]);
}

#[tokio::test]
async fn an_opaque_folder_keeps_only_what_its_own_layer_adds_whatever_the_order() {
    let lower = Tar::new().folder("a/").file("a/old", b"1").folder("a/sub/").file("a/sub/old", b"2").finish();
    let mark_first = Tar::new().file("a/.wh..wh..opq", b"").file("a/new", b"3").file("a/sub/new", b"4").finish();
    let mark_last = Tar::new().file("a/new", b"3").file("a/sub/new", b"4").file("a/.wh..wh..opq", b"").finish();
    for upper in [mark_first, mark_last] {
        let tree = listing(&[LayerBlob::plain(lower.clone()), LayerBlob::plain(upper)]).await;
        assert_eq!(names(&tree), ["a", "a/new", "a/sub", "a/sub/new"]);
    }
}

#[tokio::test]
async fn a_whiteout_does_not_touch_its_own_layer() {
    let lower = Tar::new().file("x", b"old").folder("d/").file("d/old", b"1").finish();
    let upper = Tar::new().file("x", b"new").file(".wh.x", b"").file("d/new", b"2").file(".wh.d", b"").finish();
    let tree = listing(&[LayerBlob::plain(lower), LayerBlob::plain(upper)]).await;
    assert_eq!(names(&tree), ["d", "d/new", "x"]);
    assert_eq!(bytes(&tree, "x"), b"new");
}

#[tokio::test]
async fn whiteouts_of_what_is_not_there_and_aufs_records_do_nothing() {
    let tar = Tar::new().file(".wh.nothing", b"").file("no/such/.wh.x", b"").file(".wh..wh.plnk", b"").file("f", b"1");
    assert_eq!(names(&listing(&[LayerBlob::plain(tar.finish())]).await), ["f"]);
}

#[tokio::test]
async fn a_file_replaces_a_folder_and_a_folder_a_file() {
    let lower = Tar::new().folder("a/").file("a/inside", b"1").file("b", b"2").finish();
    let upper = Tar::new().file("a", b"file").folder("b/").file("b/inside", b"3").finish();
    let tree = listing(&[LayerBlob::plain(lower), LayerBlob::plain(upper)]).await;
    assert_eq!(names(&tree), ["a", "b", "b/inside"]);
    assert_eq!(bytes(&tree, "a"), b"file");
}

#[tokio::test]
async fn a_folder_listed_again_changes_owner_and_keeps_its_content() {
    let lower = Tar::new().folder("d/").file("d/inside", b"1").finish();
    let upper = Tar::new().entry(&Entry { name: b"d", kind: b'5', mode: 0o700, uid: 9, ..Entry::default() }).finish();
    let tree = listing(&[LayerBlob::plain(lower), LayerBlob::plain(upper)]).await;
    assert_eq!(names(&tree), ["d", "d/inside"]);
    assert_eq!((tree[OsStr::new("d")].mode, tree[OsStr::new("d")].uid), (0o700, 9));
}

#[tokio::test]
async fn the_root_entry_sets_the_roots_owner_and_mode() {
    // "/" is how `umoci insert` names it.
    for name in [&b"./"[..], b".", b"/"] {
        let tar = Tar::new().entry(&Entry { name, kind: b'5', mode: 0o711, uid: 3, gid: 4, ..Entry::default() });
        let tree = listing(&[LayerBlob::plain(tar.file("./f", b"1").finish())]).await;
        let root = &tree[OsStr::new("")];
        assert_eq!((root.mode, root.uid, root.gid), (0o711, 3, 4));
        assert_eq!(names(&tree), ["f"]);
    }
}

#[tokio::test]
async fn names_through_a_link_land_where_the_guest_would_put_them() {
    let lower = Tar::new()
        .folder("usr/bin/")
        .symlink("bin", "usr/bin")
        .folder("run/")
        .folder("var/")
        .symlink("var/run", "/run")
        .symlink("var/up", "../run");
    let upper = Tar::new().file("bin/sh", b"1").file("var/run/a", b"2").file("var/up/b", b"3").finish();
    let tree = listing(&[LayerBlob::plain(lower.finish()), LayerBlob::plain(upper)]).await;
    assert_eq!(
        names(&tree),
        ["bin", "run", "run/a", "run/b", "usr", "usr/bin", "usr/bin/sh", "var", "var/run", "var/up"]
    );
}

#[tokio::test]
async fn long_names_and_targets_in_gnu_and_pax_form() {
    let folder = "d".repeat(255);
    let name = format!("{folder}/{}", "n".repeat(255));
    let target = format!("/{}", "t".repeat(4000));
    let gnu = Tar::new().file(&name, b"content").symlink("link", &target).finish();
    let pax = Tar::new()
        .pax(&[("path", name.as_bytes())])
        .file("short", b"content")
        .pax(&[("linkpath", target.as_bytes())])
        .symlink("link", "short")
        .finish();
    for tar in [gnu, pax] {
        let tree = listing(&[LayerBlob::plain(tar)]).await;
        assert_eq!(names(&tree), [folder.as_str(), name.as_str(), "link"]);
        assert_eq!(bytes(&tree, &name), b"content");
        assert_eq!(bytes(&tree, "link"), target.as_bytes());
    }
}

#[tokio::test]
async fn names_that_are_not_utf8_are_kept_as_bytes() {
    use std::os::unix::ffi::OsStrExt;
    let tar = Tar::new().entry(&Entry { name: b"caf\xe9", content: b"1", ..Entry::default() }).finish();
    let tree = listing(&[LayerBlob::plain(tar)]).await;
    assert!(tree.contains_key(OsStr::from_bytes(b"caf\xe9")));
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
async fn the_kernels_driver_sees_links_devices_and_attributes() {
    let capability: &[u8] = &[1, 0, 0, 2, 0, 0x0a, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let lower = Tar::new()
        .file("first", &[7; 5000])
        .hard_link("second", "first")
        .entry(&Entry { name: b"null", kind: b'3', mode: 0o666, device: (1, 3), ..Entry::default() })
        .entry(&Entry { name: b"disk", kind: b'4', mode: 0o660, device: (259, 70_000), ..Entry::default() })
        .entry(&Entry { name: b"pipe", kind: b'6', ..Entry::default() })
        .pax(&[("SCHILY.xattr.user.note", b"a\nb"), ("SCHILY.xattr.security.capability", capability)])
        .file("ping", b"program");
    let upper = Tar::new().folder("sub/").hard_link("sub/third", "/first").finish();
    let (_place, root) = build(&[LayerBlob::gzip(&lower.finish()), LayerBlob::gzip(&upper)]).await;
    image_support::run("fsck.erofs", &[root.path.to_str().unwrap()]);
    let Some(mounted) = Mounted::new(&root.path) else { return };
    let tree = image_support::list(mounted.path());
    let kinds = |name: &str| tree[OsStr::new(name)].kind.as_str();
    assert_eq!([kinds("null"), kinds("disk"), kinds("pipe")], ["char 1:3", "block 259:70000", "fifo"]);
    assert_eq!((tree[OsStr::new("sub/third")].nlink, bytes(&tree, "sub/third")), (3, &[7; 5000][..]));
    assert_eq!(tree[OsStr::new("")].nlink, 3);
    let inode = |name: &str| std::os::unix::fs::MetadataExt::ino(&fs::metadata(mounted.path().join(name)).unwrap());
    assert_eq!(inode("first"), inode("sub/third"));
    let mut value = [0; 64];
    let ping = mounted.path().join("ping");
    let length = rustix::fs::getxattr(&ping, "user.note", &mut value[..]).unwrap();
    assert_eq!(&value[..length], b"a\nb");
    let length = rustix::fs::getxattr(&ping, "security.capability", &mut value[..]).unwrap();
    assert_eq!(&value[..length], capability);
    assert_eq!(fs::read(&ping).unwrap(), b"program");
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
