//! Layers that are damaged or mean harm: each a typed error, and nothing left behind.

mod image_support;

use std::time::Duration;

use image_support::Entry;
use image_support::LayerBlob;
use image_support::Place;
use image_support::Tar;
use kiln::image::Digest;
use kiln::rootfs;
use kiln::rootfs::LayerErrorKind as Kind;
use kiln::rootfs::Limits;
use kiln::rootfs::RootfsCache;
use kiln::rootfs::RootfsError;

async fn refused_blob(blob: LayerBlob) -> (Kind, Option<String>) {
    let place = Place::new().await;
    let digest = Digest::of(&blob.blob);
    let error = place.build(&[blob]).await.expect_err("the layer must be refused");
    assert_eq!(place.debris(), [""; 0]);
    assert!(std::fs::read_dir(place.cache.folder()).unwrap().next().is_none(), "nothing is left in the cache");
    match error {
        RootfsError::Layer(error) => {
            assert_eq!(error.layer, digest);
            (error.kind, error.entry)
        }
        error => panic!("not the layer's fault: {error:?}"),
    }
}

async fn refused(tar: Tar) -> (Kind, Option<String>) {
    refused_blob(LayerBlob::plain(tar.finish())).await
}

#[tokio::test]
async fn parent_components() {
    for name in ["../evil", "a/../../evil", "a/..", ".."] {
        let (kind, entry) = refused(Tar::new().file(name, b"x")).await;
        assert!(matches!(kind, Kind::ParentComponent), "{name}: {kind:?}");
        assert_eq!(entry.as_deref(), Some(name));
    }
    let (kind, _) = refused(Tar::new().pax(&[("path", b"ok/../../evil")]).file("ok", b"x")).await;
    assert!(matches!(kind, Kind::ParentComponent));
    let (kind, _) = refused(Tar::new().file("../.wh.evil", b"")).await;
    assert!(matches!(kind, Kind::ParentComponent));
}

#[tokio::test]
async fn absolute_names() {
    for name in ["/etc/passwd", "//x", "/."] {
        let (kind, entry) = refused(Tar::new().file(name, b"x")).await;
        assert!(matches!(kind, Kind::AbsoluteName), "{name}: {kind:?}");
        assert_eq!(entry.as_deref(), Some(name));
    }
}

#[tokio::test]
async fn links_out_of_the_image() {
    for target in ["..", "../../etc", "sub/../../../etc", "/../etc"] {
        let (kind, entry) = refused(Tar::new().folder("sub/").symlink("out", target).file("out/passwd", b"x")).await;
        assert!(matches!(kind, Kind::SymlinkEscape), "{target}: {kind:?}");
        assert_eq!(entry.as_deref(), Some("out/passwd"));
    }
}

#[tokio::test]
async fn an_absolute_link_cannot_reach_the_host() {
    let outside = tempfile::tempdir().unwrap();
    let target = outside.path().to_str().unwrap();
    let place = Place::new().await;
    let tar = Tar::new().symlink("out", target).file("out/planted", b"x").finish();
    let root = place.build(&[LayerBlob::plain(tar)]).await.unwrap();
    assert!(std::fs::read_dir(outside.path()).unwrap().next().is_none());
    let (_folder, tree) = image_support::extract(&root.path);
    let inside = format!("{}/planted", target.trim_start_matches('/'));
    assert!(tree.contains_key(std::ffi::OsStr::new(&inside)), "it lands inside the image");
}

#[tokio::test]
async fn links_in_circles() {
    let (kind, _) = refused(Tar::new().symlink("a", "b").symlink("b", "a").file("a/x", b"")).await;
    assert!(matches!(kind, Kind::SymlinkLoop));
}

#[tokio::test]
async fn long_chains_of_links_walked_again_and_again() {
    // Every name goes through 39 links whose targets have 512 components each, 20,000 steps: a thousand names are too
    // many, long before the archive is.
    let mut tar = Tar::new().folder("d/");
    let dots = "./".repeat(511);
    for link in 0..39 {
        let next = if link == 38 { "d".to_owned() } else { format!("l{}", link + 1) };
        tar = tar.symlink(&format!("l{link}"), &format!("{dots}{next}"));
    }
    for name in 0..1000 {
        tar = tar.file(&format!("l0/{name}"), b"");
    }
    let (kind, entry) = refused(tar).await;
    assert!(matches!(kind, Kind::Limit { what: "components of link targets", .. }), "{kind:?}");
    assert!(entry.is_some_and(|entry| entry.starts_with("l0/")));
}

#[tokio::test]
async fn hard_links_to_nothing_to_a_folder_and_out() {
    let (kind, _) = refused(Tar::new().hard_link("a", "missing")).await;
    assert!(matches!(kind, Kind::HardLinkTarget(target) if target == "missing"));
    let (kind, _) = refused(Tar::new().folder("d/").hard_link("a", "d")).await;
    assert!(matches!(kind, Kind::HardLinkTarget(_)));
    let (kind, _) = refused(Tar::new().hard_link("a", "../../etc/passwd")).await;
    assert!(matches!(kind, Kind::ParentComponent));
    let (kind, _) = refused(Tar::new().symlink("out", "../..").hard_link("a", "out/etc/passwd")).await;
    assert!(matches!(kind, Kind::SymlinkEscape));
}

#[tokio::test]
async fn a_name_through_a_file() {
    let (kind, _) = refused(Tar::new().file("f", b"x").file("f/inside", b"y")).await;
    assert!(matches!(kind, Kind::NotAFolder));
    let (kind, _) = refused(Tar::new().file(".", b"root as a file")).await;
    assert!(matches!(kind, Kind::NotAFolder));
}

#[tokio::test]
async fn truncated_archives_in_every_compression() {
    let tar = Tar::new().file("a", &[3; 3000]).file("b", &pseudo_random(90_000)).finish();
    let cut = tar[..tar.len() - 30_000].to_vec();
    let (kind, _) = refused_blob(LayerBlob::plain(cut)).await;
    assert!(matches!(kind, Kind::Truncated), "{kind:?}");
    for whole in [LayerBlob::gzip(&tar), LayerBlob::zstd(&tar)] {
        let blob = whole.blob[..whole.blob.len() / 2].to_vec();
        let (kind, _) = refused_blob(LayerBlob { blob, ..whole }).await;
        assert!(matches!(kind, Kind::Truncated), "{kind:?}");
    }
}

#[tokio::test]
async fn an_archive_cut_inside_a_header() {
    let tar = Tar::new().file("a", b"x").file("b", b"y").finish();
    let (kind, _) = refused_blob(LayerBlob::plain(tar[..1124].to_vec())).await;
    assert!(matches!(kind, Kind::Truncated), "{kind:?}");
}

#[tokio::test]
async fn damaged_compression_and_things_that_are_no_archive() {
    let mut blob = LayerBlob::gzip(&Tar::new().file("a", &pseudo_random(50_000)).finish());
    let middle = blob.blob.len() / 2;
    blob.blob[middle..middle + 64].fill(0xff);
    let (kind, _) = refused_blob(blob).await;
    assert!(matches!(kind, Kind::Read(_) | Kind::Malformed(_) | Kind::DiffIdMismatch { .. }), "{kind:?}");
    let (kind, _) = refused_blob(LayerBlob::plain(vec![b'z'; 4096])).await;
    assert!(matches!(kind, Kind::Malformed("header checksum")), "{kind:?}");
}

#[tokio::test]
async fn another_archive_than_the_configuration_names() {
    let archive = Tar::new().file("a", b"x").finish();
    let blob = LayerBlob { diff_id: Digest::of(b"something else"), ..LayerBlob::gzip(&archive) };
    let (kind, _) = refused_blob(blob).await;
    assert!(matches!(kind, Kind::DiffIdMismatch { found } if found == Digest::of(&archive)));
}

#[tokio::test]
async fn names_that_linux_could_not_hold() {
    let (kind, _) = refused(Tar::new().file(&"n".repeat(256), b"")).await;
    assert!(matches!(kind, Kind::TooLong { what: "name", .. }));
    let (kind, _) = refused(Tar::new().file(&"n/".repeat(2500), b"")).await;
    assert!(matches!(kind, Kind::TooLong { what: "path", .. }));
    let (kind, _) = refused(Tar::new().symlink("a", &"t".repeat(4096))).await;
    assert!(matches!(kind, Kind::TooLong { what: "link target", .. }));
}

#[tokio::test]
async fn whiteouts_of_nothing() {
    for name in [".wh.", ".wh..", ".wh...", "d/.wh."] {
        let (kind, _) = refused(Tar::new().folder("d/").file(name, b"")).await;
        assert!(matches!(kind, Kind::BadWhiteout), "{name}: {kind:?}");
    }
}

#[tokio::test]
async fn what_is_not_implemented_is_not_guessed() {
    let version = [("GNU.sparse.major", &b"2"[..]), ("GNU.sparse.size", b"1")];
    let (kind, _) = refused(Tar::new().pax(&version).file("a", b"x")).await;
    assert!(matches!(kind, Kind::Unsupported(_)));
    let (kind, _) = refused(Tar::new().entry(&Entry { kind: b'V', ..Entry::default() })).await;
    assert!(matches!(kind, Kind::Unsupported(_)));
}

#[tokio::test]
async fn a_device_number_beyond_the_kernels() {
    let (kind, _) = refused(Tar::new().entry(&Entry { kind: b'3', device: (1 << 12, 0), ..Entry::default() })).await;
    assert!(matches!(kind, Kind::Malformed("device number")));
}

#[tokio::test]
async fn an_extension_record_without_end() {
    let (kind, _) = refused(Tar::new().raw(b'L', b"long", &vec![b'a'; 1 << 20])).await;
    assert!(matches!(kind, Kind::Limit { .. }));
}

#[tokio::test]
async fn a_size_that_overflows() {
    let (kind, _) = refused(Tar::new().pax(&[("size", b"18446744073709551615")]).file("a", b"x")).await;
    assert!(matches!(kind, Kind::Malformed("entry size")), "{kind:?}");
    let (kind, _) = refused(Tar::new().pax(&[("size", b"9223372036854775807")]).file("a", b"x")).await;
    assert!(matches!(kind, Kind::Limit { .. } | Kind::Truncated), "{kind:?}");
}

async fn refused_by(limits: Limits, tar: Vec<u8>) -> Kind {
    let place = Place::new().await;
    let cache = RootfsCache::open(place.folder.path().join("rootfs")).await.unwrap().limits(limits);
    let image = place.import(&[LayerBlob::gzip(&tar)]).await;
    match rootfs::build(&image, &cache).await {
        Err(RootfsError::Layer(error)) => {
            assert_eq!(place.debris(), [""; 0]);
            error.kind
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn more_than_the_limits_allow() {
    let mut limits = Limits::default();
    limits.archive_bytes = 1 << 20;
    let bomb = Tar::new().file("zeros", &vec![0; 4 << 20]).finish();
    assert!(matches!(refused_by(limits, bomb).await, Kind::Limit { limit: 1_048_576, .. }));
    let mut limits = Limits::default();
    limits.entries = 3;
    let many = Tar::new().file("a", b"").file("b", b"").file("c", b"").file("d", b"").finish();
    assert!(matches!(refused_by(limits, many).await, Kind::Limit { what: "entries", .. }));
    let mut limits = Limits::default();
    limits.metadata_bytes = 1000;
    let names = Tar::new().file(&"a".repeat(200), b"").file(&"b".repeat(200), b"").file(&"c".repeat(200), b"").finish();
    assert!(matches!(refused_by(limits, names).await, Kind::Limit { what: "bytes of metadata", .. }));
}

#[tokio::test]
async fn folders_deeper_than_any_path() {
    // Each round goes through a link to the deepest folder so far, so no single name is long.
    let step = "d/".repeat(1000);
    let mut tar = Tar::new().folder(&step);
    for round in 0..3 {
        let start = if round == 0 { "link0".to_owned() } else { format!("link{round}") };
        let before = if round == 0 { step.clone() } else { format!("link{}/{step}", round - 1) };
        tar = tar.symlink(&start, &before).folder(&format!("{start}/{step}"));
    }
    let (kind, _) = refused(tar).await;
    assert!(matches!(kind, Kind::TooLong { what: "nesting of folders", .. }), "{kind:?}");
}

/// Whiteouts that each looked through all of a full folder would make hours of this.
#[tokio::test]
async fn many_whiteouts_of_a_full_folder_are_no_more_work_than_both() {
    const COUNT: usize = 40_000;
    let filled = (0..COUNT).fold(Tar::new(), |tar, index| tar.file(&format!("d/{index}"), b""));
    let hidden = |tar, _| Tar::file(tar, ".wh.d", b"");
    let layer = LayerBlob::plain((0..COUNT).fold(filled, hidden).finish());
    let place = Place::new().await;
    let built = tokio::time::timeout(Duration::from_secs(10), place.build(&[layer])).await;
    built.expect("in time").expect("a strange layer, and a valid one");
}

#[tokio::test]
async fn a_dropped_build_ends_inside_a_bomb() {
    // An archive with 32 GiB of zeros behind its end, in as many members as that takes.
    let mut blob = image_support::gzip(&Tar::new().file("f", b"1").finish());
    blob.extend(image_support::gzip(&vec![0; 32 << 20]).repeat(1024));
    let layer = LayerBlob { blob, ..LayerBlob::gzip(b"") };
    let place = Place::new().await;
    let image = place.import(&[layer]).await;
    let build = tokio::spawn({
        let cache = place.cache.clone();
        async move { rootfs::build(&image, &cache).await }
    });
    eventually(|| !place.debris().is_empty()).await;
    build.abort();
    eventually(|| place.debris().is_empty()).await;
}

/// Looks again and again, for ten seconds.
async fn eventually(happened: impl Fn() -> bool) {
    let looking = async {
        while !happened() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), looking).await.expect("in time");
}

/// Bytes that do not compress.
fn pseudo_random(count: usize) -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    })
    .take(count)
    .collect()
}
