//! What images share in a store: each layer converted once, whatever becomes of the files, and the same bytes always.

mod image_support;

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::num::NonZeroUsize;
use std::os::unix::fs::FileExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use futures::StreamExt;
use image_support::Flat;
use image_support::LayerBlob;
use image_support::Place;
use image_support::Tar;
use image_support::extract;
use image_support::flat;
use kiln::Image;
use kiln::image::Digest;
use kiln::image::ImageStore;
use kiln::image::Progress;
use kiln::image::ProgressEvent;
use kiln::rootfs;
use kiln::rootfs::Builder;
use kiln::rootfs::LayerErrorKind;
use kiln::rootfs::Limits;
use kiln::rootfs::RootfsError;
use kiln::vm::StartError;
use kiln::vm::VmConfig;

fn lower() -> Vec<u8> {
    Tar::new().file("big", &[1; 300_000]).file("small", b"2").folder("d/").file("d/long", &[6; 5000]).finish()
}

fn upper() -> Vec<u8> {
    Tar::new().file("big", &[3; 100_000]).file(".wh.small", b"").finish()
}

fn content_of(flat: &Flat, name: &str) -> Vec<u8> {
    extract(&flat.path).1[OsStr::new(name)].bytes.clone()
}

/// The files made from layers, by name.
fn derived(place: &Place) -> BTreeMap<String, Vec<u8>> {
    let files = fs::read_dir(place.derived()).unwrap().map(|entry| entry.unwrap());
    files.map(|file| (file.file_name().into_string().unwrap(), fs::read(file.path()).unwrap())).collect()
}

fn inode(path: &Path) -> u64 {
    fs::metadata(path).unwrap().ino()
}

#[tokio::test]
async fn same_layers_give_the_same_files_one_at_a_time_and_all_at_once() {
    let layers = || {
        let more = (0..6_u8).map(|number| {
            let files = (0..40).map(|file| (format!("l{number}/{file}"), vec![number; file * 100]));
            LayerBlob::gzip(&files.fold(Tar::new(), |tar, (name, content)| tar.file(&name, &content)).finish())
        });
        [LayerBlob::gzip(&lower()), LayerBlob::zstd(&upper())].into_iter().chain(more).collect::<Vec<_>>()
    };
    let (first, second, third) = (Place::new().await, Place::new().await, Place::new().await);
    let parallel = |count| NonZeroUsize::new(count).unwrap();
    let one = Builder::new(&first.import(&layers()).await).parallel(parallel(1)).build().await.unwrap();
    let all = Builder::new(&second.import(&layers()).await).parallel(parallel(8)).build().await.unwrap();
    let flat = third.build(&layers()).await.unwrap();
    assert_eq!((one.digest(), one.size()), (all.digest(), all.size()));
    assert_eq!(one.digest(), flat.root.digest());
    // A content and an index for each layer, and what joins them.
    assert_eq!(derived(&first).len(), 8 * 2 + 1);
    assert_eq!(derived(&first), derived(&second));
    assert_eq!(derived(&first), derived(&third));
    let files: Vec<u8> = one.files().iter().flat_map(|path| fs::read(path).unwrap()).collect();
    assert_eq!(files.len() as u64, one.size().0);
    assert!(fs::read(&flat.path).unwrap() == files, "the flat file is the files one after another");
}

#[tokio::test]
async fn the_compression_of_a_layer_makes_no_difference() {
    let place = Place::new().await;
    let gzip = place.import(&[LayerBlob::gzip(&lower())]).await;
    let zstd = place.import(&[LayerBlob::zstd(&lower())]).await;
    assert_ne!(gzip.digest(), zstd.digest());
    assert_eq!(rootfs::build(&gzip).await.unwrap(), rootfs::build(&zstd).await.unwrap());
    assert_eq!(derived(&place).len(), 3);
}

#[tokio::test]
async fn images_share_the_layers_that_they_have_in_common() {
    let place = Place::new().await;
    let base = place.build(&[LayerBlob::gzip(&lower())]).await.unwrap();
    let before = inode(&base.root.files()[1]);
    let child = place.build(&[LayerBlob::gzip(&lower()), LayerBlob::gzip(&upper())]).await.unwrap();
    assert_eq!((base.root.files().len(), child.root.files().len()), (2, 3));
    assert_eq!(base.root.files()[1], child.root.files()[1]);
    assert_eq!(inode(&child.root.files()[1]), before, "the layer was not converted again");
    assert_eq!(content_of(&base, "big"), [1; 300_000]);
    assert_eq!(content_of(&child, "big"), [3; 100_000]);
    assert_eq!(content_of(&child, "d/long"), [6; 5000]);
}

#[tokio::test]
async fn a_second_build_only_looks() {
    let place = Place::new().await;
    let layers = || [LayerBlob::gzip(&lower()), LayerBlob::zstd(&upper())];
    let first = rootfs::build(&place.import(&layers()).await).await.unwrap();
    let inodes = || first.files().iter().map(|path| inode(path)).collect::<Vec<_>>();
    let before = inodes();
    assert_eq!(rootfs::build(&place.import(&layers()).await).await.unwrap(), first);
    assert_eq!(inodes(), before);
}

#[tokio::test]
async fn a_layer_that_an_image_has_twice_is_converted_once_and_applied_twice() {
    let place = Place::new().await;
    let layers = [LayerBlob::gzip(&lower()), LayerBlob::gzip(&upper()), LayerBlob::gzip(&lower())];
    let built = place.build(&layers).await.unwrap();
    assert_eq!(content_of(&built, "big"), [1; 300_000]);
    assert_eq!(content_of(&built, "small"), b"2");
    assert_eq!(built.root.files().len(), 2, "of the second layer nothing is left");
}

#[tokio::test]
async fn a_layer_of_which_everything_is_hidden_is_not_on_the_disk() {
    let secret = b"the secret that was removed ".repeat(400);
    let first = Tar::new().file("kept", &[5; 9000]).finish();
    let second = Tar::new().file("secret", &secret).file("small", &secret[..500]).finish();
    let third = Tar::new().file(".wh.secret", b"").file(".wh.small", b"").finish();
    let place = Place::new().await;
    let built = place.build(&[first, second, third].map(LayerBlob::plain)).await.unwrap();
    let image = fs::read(&built.path).unwrap();
    assert!(!image.windows(28).any(|window| window == &secret[..28]));
    assert_eq!(content_of(&built, "kept"), [5; 9000]);
}

#[tokio::test]
async fn an_image_without_layers_and_one_without_long_files() {
    let place = Place::new().await;
    let empty = place.build(&[]).await.unwrap();
    assert_eq!(extract(&empty.path).1.len(), 1);
    let short = place.build(&[LayerBlob::plain(Tar::new().file("f", b"1").finish())]).await.unwrap();
    assert_eq!((empty.root.files().len(), short.root.files().len()), (1, 1));
    assert_eq!(content_of(&short, "f"), b"1");
}

#[tokio::test]
async fn zeros_are_holes_in_the_store_and_in_the_flat_file() {
    let place = Place::new().await;
    let mut content = vec![0; 16 << 20];
    content[9 << 20] = 1;
    let built = place.build(&[LayerBlob::gzip(&Tar::new().file("sparse", &content).finish())]).await.unwrap();
    for path in built.root.files().iter().chain([&built.path]) {
        let sectors = fs::metadata(path).unwrap().blocks();
        assert!(sectors * 512 < 1 << 20, "{}: {sectors} sectors", path.display());
    }
    assert!(content_of(&built, "sparse") == content);
}

#[tokio::test]
async fn concurrent_builds_of_one_image_agree() {
    let place = Place::new().await;
    let tar = Tar::new().file("f", &[9; 2_000_000]).finish();
    let image = place.import(&[LayerBlob::gzip(&tar), LayerBlob::gzip(&upper())]).await;
    let builds: Vec<_> = (0..4).map(|_| tokio::spawn(Builder::new(&image).build())).collect();
    let mut roots = Vec::new();
    for build in builds {
        roots.push(build.await.unwrap().unwrap());
    }
    assert!(roots.iter().all(|root| *root == roots[0]));
    assert_eq!(content_of(&flat(&image).await.unwrap(), "f"), vec![9; 2_000_000]);
    assert!(place.debris().is_empty());
}

/// Whatever one file loses or has changed is there again after the next build.
#[tokio::test]
async fn files_that_were_removed_cut_short_or_damaged_are_made_anew() {
    let place = Place::new().await;
    let image = place.import(&[LayerBlob::gzip(&lower()), LayerBlob::zstd(&upper())]).await;
    rootfs::build(&image).await.unwrap();
    let good = derived(&place);
    for name in good.keys() {
        let path = place.derived().join(name);
        let whole = fs::read(&path).unwrap();
        fs::remove_file(&path).unwrap();
        check(&image, &place, &good).await;
        fs::write(&path, &whole[..whole.len().saturating_sub(4096)]).unwrap();
        check(&image, &place, &good).await;
        fs::write(&path, b"").unwrap();
        check(&image, &place, &good).await;
        if !name.ends_with(".content") {
            let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
            // In the superblock of a joined file, in the first entry of an index.
            let at = if name.ends_with(".erofs") { 1024 + 40 } else { 60 };
            file.write_all_at(&[0xaa; 4], at).unwrap();
            check(&image, &place, &good).await;
        }
    }
}

/// The image can be used, and from then on everything is as it was.
async fn check(image: &Image, place: &Place, good: &BTreeMap<String, Vec<u8>>) {
    let built = flat(image).await.unwrap();
    image_support::run("fsck.erofs", &[built.path.to_str().unwrap()]);
    // A build does not look at an index while what was joined of it fits; joining does.
    for name in good.keys().filter(|name| name.ends_with(".erofs")) {
        fs::remove_file(place.derived().join(name)).unwrap();
    }
    flat(image).await.unwrap();
    assert!(derived(place) == *good);
    assert!(place.debris().is_empty());
}

#[tokio::test]
async fn an_index_that_somebody_made_up_is_made_anew() {
    let place = Place::new().await;
    let image = place.import(&[LayerBlob::gzip(&lower())]).await;
    rootfs::build(&image).await.unwrap();
    let good = derived(&place);
    let (name, index) = good.iter().find(|(name, _)| name.ends_with(".index")).unwrap();
    // Its one long file lies far outside the content, and the checksum is right.
    let mut forged = index.clone();
    let length = forged.len();
    for byte in &mut forged[40 + 4..60] {
        *byte = 0xff;
    }
    let checksum = Digest::of(&forged[..length - 32]);
    forged[length - 32..].copy_from_slice(checksum.as_bytes());
    fs::write(place.derived().join(name), forged).unwrap();
    fs::remove_file(place.derived().join(good.keys().find(|name| name.ends_with(".erofs")).unwrap())).unwrap();
    rootfs::build(&image).await.unwrap();
    assert!(derived(&place) == good);
}

#[tokio::test]
async fn a_damaged_blob_is_removed_and_an_intact_one_that_lies_is_not() {
    let place = Place::new().await;
    let image = place.import(&[LayerBlob::gzip(&lower())]).await;
    let blob = place.store.root().join("blobs/sha256").join(image.layers()[0].digest().hex());
    let good = fs::read(&blob).unwrap();
    let mut bad = good.clone();
    let middle = bad.len() / 2;
    bad[middle] ^= 0x55;
    for bytes in [&bad[..], &good[..middle]] {
        fs::write(&blob, bytes).unwrap();
        assert!(matches!(rootfs::build(&image).await, Err(RootfsError::Layer(_))));
        assert!(!blob.exists(), "the damaged blob is gone");
        place.import(&[LayerBlob::gzip(&lower())]).await;
        assert_eq!(fs::read(&blob).unwrap(), good, "the next import brings it back");
    }
    rootfs::build(&image).await.unwrap();

    let lie = LayerBlob { diff_id: Digest::of(b"something else"), ..LayerBlob::gzip(&upper()) };
    let image = place.import(&[lie]).await;
    let blob = place.store.root().join("blobs/sha256").join(image.layers()[0].digest().hex());
    let error = rootfs::build(&image).await.unwrap_err();
    assert!(matches!(&error, RootfsError::Layer(error) if matches!(error.kind, LayerErrorKind::DiffIdMismatch { .. })));
    assert!(blob.exists(), "the blob is what was fetched");
}

#[tokio::test]
async fn progress_counts_every_layer_and_ends_with_built() {
    let place = Place::new().await;
    let image = place.import(&[LayerBlob::gzip(&lower()), LayerBlob::gzip(&upper())]).await;
    for round in ["cold", "found"] {
        let (progress, events) = Progress::channel();
        Builder::new(&image).progress(progress).build().await.unwrap();
        let events: Vec<_> = events.collect().await;
        for layer in image.layers() {
            let last = ProgressEvent::Unpacking { layer: *layer.digest(), done: layer.size(), total: layer.size() };
            assert!(events.contains(&last), "{round}: {events:?}");
        }
        let image = *image.digest();
        assert!(events.ends_with(&[ProgressEvent::Building { image }, ProgressEvent::Built { image }]), "{round}");
    }
}

#[tokio::test]
async fn of_several_bad_layers_one_is_named_and_the_good_ones_stay() {
    let place = Place::new().await;
    let bad = |name: &str| LayerBlob { diff_id: Digest::of(name.as_bytes()), ..LayerBlob::gzip(&lower()) };
    let image = place.import(&[LayerBlob::gzip(&upper()), bad("a"), bad("b")]).await;
    let Err(RootfsError::Layer(error)) = rootfs::build(&image).await else { panic!("two of the layers lie") };
    assert!(matches!(error.kind, LayerErrorKind::DiffIdMismatch { .. }), "{:?}", error.kind);
    assert!(place.debris().is_empty());
}

#[tokio::test]
async fn starting_a_guest_reports_and_limits_what_its_image_takes() {
    let place = Place::new().await;
    let image = place.import(&[LayerBlob::gzip(&lower())]).await;
    let (progress, events) = Progress::channel();
    let mut limits = Limits::default();
    limits.entries = 2;
    let error = image.start(VmConfig::new().root_limits(limits).progress(progress)).await.unwrap_err();
    let StartError::Rootfs(RootfsError::Layer(error)) = error else { panic!("{error:?}") };
    assert!(matches!(error.kind, LayerErrorKind::Limit { what: "entries", limit: 2 }), "{:?}", error.kind);
    let events: Vec<_> = events.collect().await;
    assert!(matches!(events[..], [ProgressEvent::Unpacking { .. }]), "{events:?}");
}

/// Limits hold for layers that were converted under others.
#[tokio::test]
async fn limits_count_layers_that_are_converted_already() {
    let place = Place::new().await;
    place.build(&[LayerBlob::gzip(&lower())]).await.unwrap();
    let image = place.import(&[LayerBlob::gzip(&lower()), LayerBlob::gzip(&upper())]).await;
    let archives = (lower().len() + upper().len()) as u64;
    for (entries, archive_bytes, what) in
        [(5, u64::MAX, Some("entries")), (6, archives - 1, Some("bytes in the layers' archives")), (6, archives, None)]
    {
        let mut limits = Limits::default();
        (limits.entries, limits.archive_bytes) = (entries, archive_bytes);
        match (Builder::new(&image).limits(limits).build().await, what) {
            (Err(RootfsError::Layer(error)), Some(expected)) => {
                assert!(matches!(error.kind, LayerErrorKind::Limit { what, .. } if what == expected), "{error:?}");
            }
            (built, None) => drop(built.unwrap()),
            (built, _) => panic!("{built:?}"),
        }
    }
}

/// A small file system of its own, where this machine lets us mount one.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn mount(size: &str) -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let option = format!("size={size}");
        let mount = Command::new("mount").args(["-t", "tmpfs", "-o", &option, "none"]).arg(folder.path()).output();
        let mount = mount.expect("mount is part of every Linux system");
        if mount.status.success() {
            return Some(Self(folder));
        }
        #[allow(clippy::print_stderr, reason = "a check that was not made must be seen, not passed over")]
        {
            eprintln!("NOT RUN on a full disk: {}", String::from_utf8_lossy(&mount.stderr).trim());
        }
        None
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(self.0.path()).status();
    }
}

#[tokio::test]
async fn a_full_disk_is_an_error_of_its_own_and_leaves_nothing() {
    let Some(disk) = SmallDisk::mount("4m") else { return };
    let long = Tar::new().file("long", &vec![7; 16 << 20]).finish();
    let names = (0..20_000).map(|number| format!("{number}/{}", "n".repeat(200)));
    let wide = names.fold(Tar::new(), |tar, name| tar.file(&name, b"")).finish();
    for archive in [long, wide] {
        let store = ImageStore::open(disk.0.path().join("images")).await.unwrap();
        let layout = image_support::Layout::of(&[LayerBlob::zstd(&archive)]);
        let image = store.import_oci_layout(layout.folder.path(), None).await.unwrap();
        let error = rootfs::build(&image).await.unwrap_err();
        assert!(matches!(error, RootfsError::DiskFull { .. }), "{error:?}");
        assert_eq!(fs::read_dir(disk.0.path().join("images/derived")).unwrap().count(), 0);
    }
    let place = Place::new().await;
    let built = rootfs::build(&place.import(&[LayerBlob::gzip(&lower())]).await).await.unwrap();
    fs::write(disk.0.path().join("filler"), vec![1; 16 << 20]).unwrap_err();
    let error = built.write_to(disk.0.path().join("root.erofs")).await.unwrap_err();
    assert!(matches!(error, RootfsError::DiskFull { .. }), "{error:?}");
    assert_eq!(fs::read_dir(disk.0.path()).unwrap().count(), 2, "the store and the filler");
}

#[tokio::test]
async fn writing_out_an_image_replaces_a_file_and_notices_changed_ones() {
    let place = Place::new().await;
    let built = rootfs::build(&place.import(&[LayerBlob::gzip(&lower())]).await).await.unwrap();
    let target = place.folder.path().join("root.erofs");
    fs::write(&target, "old").unwrap();
    built.write_to(&target).await.unwrap();
    assert_eq!(fs::metadata(&target).unwrap().len(), built.size().0);
    fs::write(&built.files()[1], b"").unwrap();
    assert!(matches!(built.write_to(&target).await, Err(RootfsError::Io { .. })));
    assert_eq!(fs::metadata(&target).unwrap().len(), built.size().0, "the old one is whole");
}
