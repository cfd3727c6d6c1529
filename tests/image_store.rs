//! The store survives what happens to processes.

mod image_support;

use std::fs;

use image_support::LayerBlob;
use image_support::Place;
use image_support::Tar;
use kiln::image::ImageStore;

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
