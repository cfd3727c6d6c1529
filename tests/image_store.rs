//! The store survives what happens to processes.

mod image_support;

use std::fs;

use image_support::LayerBlob;
use image_support::Layout;
use image_support::Place;
use image_support::Tar;
use kiln::RootfsError;
use kiln::image::CustomizeError;
use kiln::image::ImageChanges;
use kiln::image::ImageFile;
use kiln::image::ImageStore;
use kiln::image::LayoutError;
use kiln::image::Reference;
use kiln::image::StoreError;
use kiln::units::Bytes;

#[tokio::test]
async fn debris_of_a_killed_writer_is_removed_and_a_write_in_progress_is_not() {
    let place = Place::new().await;
    let blobs = place.store.root().join("blobs/sha256");
    fs::write(blobs.join(".tmp-dead"), b"half").unwrap();
    let live = fs::File::create(blobs.join(".tmp-live")).unwrap();
    live.lock().unwrap();
    ImageStore::open(place.store.root()).await.unwrap();
    assert!(!blobs.join(".tmp-dead").exists());
    assert!(blobs.join(".tmp-live").exists());
}

#[tokio::test]
async fn a_blob_damaged_on_disk_is_imported_again() {
    let place = Place::new().await;
    let layers = || [LayerBlob::gzip(&Tar::new().file("f", b"1").finish())];
    let image = place.import(&layers()).await;
    let path = place.store.root().join("blobs/sha256").join(image.layers()[0].digest().hex());
    let good = fs::read(&path).unwrap();
    fs::write(&path, b"").unwrap();
    place.import(&layers()).await;
    assert_eq!(fs::read(&path).unwrap(), good);
}

#[tokio::test]
async fn images_share_their_blobs() {
    let place = Place::new().await;
    let shared = || LayerBlob::gzip(&Tar::new().file("shared", b"1").finish());
    let one = place.import(&[shared(), LayerBlob::gzip(&Tar::new().file("a", b"1").finish())]).await;
    let two = place.import(&[shared(), LayerBlob::gzip(&Tar::new().file("b", b"1").finish())]).await;
    assert_eq!(one.layers()[0], two.layers()[0]);
    // Three layers, two configurations, two manifests.
    assert_eq!(fs::read_dir(place.store.root().join("blobs/sha256")).unwrap().count(), 7);
}

fn file(name: &str, content: &[u8]) -> LayerBlob {
    LayerBlob::gzip(&Tar::new().file(name, content).finish())
}

fn reference(text: &str) -> Reference {
    text.parse().unwrap()
}

fn files_in(place: &Place, folder: &str) -> usize {
    fs::read_dir(place.store.root().join(folder)).unwrap().count()
}

/// Bytes that no compressor makes smaller.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 1_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..length).map(|_| next()).collect()
}

#[tokio::test]
async fn a_name_keeps_an_image_and_its_removal_gives_it_up() {
    let place = Place::new().await;
    let image = place.import(&[file("a", b"1"), file("b", &[7; 9000])]).await;
    let digest = *image.digest();
    for name in ["app:1", "app:latest"] {
        place.store.name(&reference(name), &image).await.unwrap();
    }
    kiln::rootfs::build(&image).await.unwrap();
    drop(image);
    assert_eq!(place.store.gc().await.unwrap().blobs, 0);
    let images = place.store.images().await.unwrap();
    let [stored] = images.as_slice() else { panic!("{images:?}") };
    assert_eq!(stored.references, ["docker.io/library/app:1", "docker.io/library/app:latest"]);
    assert_eq!((stored.digest, stored.is_complete), (digest, true));
    assert!(stored.size > 9000, "{stored:?}");

    assert!(place.store.remove(&reference("app:1")).await.unwrap());
    assert!(!place.store.remove(&reference("app:1")).await.unwrap());
    assert_eq!(place.store.gc().await.unwrap().blobs, 0);
    assert_eq!(place.store.remove_image(&digest).await.unwrap(), 1);
    assert!(place.store.images().await.unwrap().is_empty());
    let collected = place.store.gc().await.unwrap();
    // Two layers, configuration, manifest; of the layers an index and a content each, and the joined image.
    assert_eq!((collected.blobs, collected.derived), (4, 5));
    assert!(collected.bytes >= stored.size, "{collected:?} {stored:?}");
    for folder in ["blobs/sha256", "derived", "references"] {
        assert_eq!(files_in(&place, folder), 0, "{folder}");
    }
}

#[tokio::test]
async fn what_is_shared_stays_with_the_image_that_still_needs_it() {
    let place = Place::new().await;
    let shared = || file("shared", &[1; 6000]);
    let one = place.import(&[shared(), file("a", b"1")]).await;
    let two = place.import(&[shared(), file("b", b"1")]).await;
    place.store.name(&reference("two"), &two).await.unwrap();
    let expected = kiln::rootfs::build(&two).await.unwrap();
    kiln::rootfs::build(&one).await.unwrap();
    drop((one, two));
    // A layer, a configuration, a manifest; index and content of the layer, and the joined image.
    let collected = place.store.gc().await.unwrap();
    assert_eq!((collected.blobs, collected.derived), (3, 3));
    assert!(expected.files().iter().all(|file| file.exists()));
}

#[tokio::test]
async fn an_image_in_use_is_kept_whatever_is_removed() {
    let place = Place::new().await;
    let image = place.import(&[file("a", &[7; 9000])]).await;
    let copy = image.clone();
    drop(image);
    assert_eq!(place.store.gc().await.unwrap().blobs, 0);
    // Another process opens the store: its sweep leaves the lease alone.
    let other = ImageStore::open(place.store.root()).await.unwrap();
    assert_eq!(other.gc().await.unwrap().blobs, 0);
    kiln::rootfs::build(&copy).await.unwrap();
    drop(copy);
    assert_eq!(other.gc().await.unwrap().blobs, 3);
}

#[tokio::test]
async fn a_lease_whose_holder_was_killed_keeps_nothing() {
    let place = Place::new().await;
    let image = place.import(&[file("a", b"1")]).await;
    let digest = image.digest().to_string();
    drop(image);
    fs::write(place.store.root().join("leases/.tmp-dead"), digest).unwrap();
    fs::write(place.store.root().join("claims/dead"), "").unwrap();
    let collected = place.store.gc().await.unwrap();
    assert_eq!(collected.blobs, 3);
    assert_eq!((files_in(&place, "leases"), files_in(&place, "claims")), (0, 0));
}

#[tokio::test]
async fn names_that_lead_nowhere_are_passed_over_and_collected() {
    let place = Place::new().await;
    let image = place.import(&[file("a", b"1")]).await;
    place.store.name(&reference("good"), &image).await.unwrap();
    let references = place.store.root().join("references");
    fs::write(references.join("torn"), "sha256:12").unwrap();
    fs::write(references.join("empty"), "").unwrap();
    fs::write(references.join("lost"), format!("sha256:{}\ndocker.io/library/lost:latest\n", "0".repeat(64))).unwrap();
    assert_eq!(place.store.images().await.unwrap().len(), 1);
    place.store.gc().await.unwrap();
    assert!(!references.join("lost").exists());
    assert_eq!(place.store.images().await.unwrap().len(), 1);
}

#[tokio::test]
async fn verifying_finds_damage_of_the_same_size() {
    let place = Place::new().await;
    let image = place.import(&[file("a", b"1")]).await;
    let layer = *image.layers()[0].digest();
    let path = place.store.root().join("blobs/sha256").join(layer.hex());
    let mut bytes = fs::read(&path).unwrap();
    bytes[10] ^= 1;
    fs::write(&path, bytes).unwrap();
    let verified = place.store.verify().await.unwrap();
    assert_eq!((verified.intact, verified.removed), (2, vec![layer]));
    assert!(!path.exists());
    assert_eq!(place.store.verify().await.unwrap().removed, []);
}

#[tokio::test]
async fn a_quota_makes_room_by_collecting_and_refuses_what_does_not_fit() {
    let place = Place::new().await;
    let store = ImageStore::options().quota(Bytes::kib(600)).open(place.store.root()).await.unwrap();
    let import = |name: &'static str, length: usize| {
        let (store, layout) = (store.clone(), Layout::of(&[file(name, &noise(length))]));
        async move { store.import_oci_layout(layout.folder.path(), None).await }
    };
    let first = import("first", 400 << 10).await.unwrap();
    let refused = import("second", 300 << 10).await.expect_err("the first is in use");
    let LayoutError::Store(StoreError::Quota { limit, used, needed }) = refused else { panic!("{refused:?}") };
    assert_eq!(limit, Bytes::kib(600));
    assert!(used.0 >= 400 << 10 && needed.0 >= 300 << 10, "{used:?} {needed:?}");
    assert_eq!(place.debris(), [""; 0]);
    // Nobody needs the first any more, so the second takes its place.
    drop(first);
    let second = import("second", 300 << 10).await.unwrap();
    assert_eq!(place.store.gc().await.unwrap().blobs, 0);
    // What is made from the layer counts as well.
    let refused = kiln::rootfs::build(&second).await.expect_err("does not fit");
    assert!(matches!(refused, RootfsError::Store(StoreError::Quota { .. })), "{refused:?}");
    assert_eq!((files_in(&place, "derived"), place.debris()), (0, Vec::new()));
}

/// A file system of its own, so small that it gets full.
struct Small {
    folder: tempfile::TempDir,
}

impl Small {
    fn mount(size: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().to_str().unwrap();
        image_support::run("mount", &["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs", target]);
        Self { folder }
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        image_support::run("umount", &["--lazy", self.folder.path().to_str().unwrap()]);
    }
}

#[tokio::test]
async fn a_full_disk_is_a_typed_error_and_leaves_nothing() {
    let small = Small::mount("2m");
    let store = ImageStore::open(small.folder.path().join("store")).await.unwrap();
    let count = |folder: &str| fs::read_dir(store.root().join(folder)).unwrap().count();
    let fits = Layout::of(&[file("fits", &noise(900 << 10))]);
    let image = store.import_oci_layout(fits.folder.path(), None).await.unwrap();
    let before = count("blobs/sha256");
    let large = Layout::of(&[file("large", &noise(1900 << 10))]);
    let error = store.import_oci_layout(large.folder.path(), None).await.expect_err("does not fit");
    assert!(matches!(error, LayoutError::Store(StoreError::DiskFull { .. })), "{error:?}");
    // The small documents of the refused image fit and stay until they are collected.
    assert_eq!(store.gc().await.unwrap().blobs, 2);
    assert_eq!(count("blobs/sha256"), before);
    // 900 KiB are there, as much again does not fit beside it.
    let filler = store.root().join("filler");
    fs::write(&filler, noise(700 << 10)).unwrap();
    let error = kiln::rootfs::build(&image).await.expect_err("does not fit");
    assert!(matches!(error, RootfsError::DiskFull { .. }), "{error:?}");
    assert_eq!(count("derived"), 0);
    fs::remove_file(&filler).unwrap();
    kiln::rootfs::build(&image).await.unwrap();
    let error = image.changed(ImageChanges::new().file(ImageFile::new("/f", noise(900 << 10)))).await;
    assert!(matches!(error, Err(CustomizeError::Store(StoreError::DiskFull { .. }))), "{error:?}");
}
