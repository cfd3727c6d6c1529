//! Layers that mean harm to the host or waste its time. Those that are refused are in `layer_corpus`.

mod image_support;

use std::time::Duration;

use image_support::LayerBlob;
use image_support::Place;
use image_support::Tar;
use kiln::rootfs;

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
    let build = tokio::spawn(async move { rootfs::build(&image).await });
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
