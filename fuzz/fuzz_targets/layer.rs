//! Two layers of an image, from their archives to its root filesystem: any bytes give one or a typed error, and no debris.
#![no_main]

use std::fs;
use std::path::Path;
use std::sync::LazyLock;

use kiln::RootfsError;
use kiln::image::Digest;
use kiln::image::Image;
use kiln::image::ImageStore;
use kiln::rootfs::Builder;
use kiln::rootfs::Limits;
use libfuzzer_sys::fuzz_target;
use serde_json::Value;
use serde_json::json;
use tokio::runtime::Runtime;

static RUNTIME: LazyLock<Runtime> =
    LazyLock::new(|| tokio::runtime::Builder::new_current_thread().build().expect("a runtime"));

const BLOCK: usize = 512;

fuzz_target!(|bytes: &[u8]| {
    let mut bytes = bytes.to_vec();
    bytes.chunks_exact_mut(BLOCK).for_each(mend);
    let (lower, upper) = bytes.split_at(bytes.len() / 2 / BLOCK * BLOCK);
    let folder = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("a folder");
    write_layout(&folder.path().join("layout"), &[lower, upper]);
    RUNTIME.block_on(build(folder.path()));
});

/// A sum that is right, so that the other fields of a header are read at all.
fn mend(block: &mut [u8]) {
    if &block[257..262] == b"ustar" {
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
        block[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    }
}

fn write_layout(folder: &Path, layers: &[&[u8]]) {
    fs::create_dir_all(folder.join("blobs/sha256")).expect("created");
    let blob = |media_type: &str, bytes: &[u8]| {
        let digest = Digest::of(bytes);
        fs::write(folder.join("blobs/sha256").join(digest.hex()), bytes).expect("written");
        json!({ "mediaType": media_type, "digest": digest.to_string(), "size": bytes.len() })
    };
    let diff_ids: Vec<_> = layers.iter().map(|layer| Digest::of(layer).to_string()).collect();
    let config = json!({
        "architecture": "amd64", "os": "linux", "config": {}, "rootfs": { "type": "layers", "diff_ids": diff_ids },
    });
    let config = blob("application/vnd.oci.image.config.v1+json", config.to_string().as_bytes());
    let layers: Vec<Value> = layers.iter().map(|layer| blob("application/vnd.oci.image.layer.v1.tar", layer)).collect();
    let media_type = "application/vnd.oci.image.manifest.v1+json";
    let manifest = json!({ "schemaVersion": 2, "mediaType": media_type, "config": config, "layers": layers });
    let manifest = blob(media_type, manifest.to_string().as_bytes());
    let index = json!({ "schemaVersion": 2, "manifests": [manifest] });
    fs::write(folder.join("index.json"), index.to_string()).expect("written");
    fs::write(folder.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).expect("written");
}

async fn build(folder: &Path) {
    let store = ImageStore::open(folder.join("store")).await.expect("a store");
    let image = store.import_oci_layout(folder.join("layout"), None).await.expect("the layout is well-formed");
    let mut limits = Limits::default();
    (limits.entries, limits.archive_bytes, limits.metadata_bytes) = (1000, 1 << 20, 1 << 20);
    let builder = Builder::new(&image).limits(limits);
    match builder.clone().build().await {
        Ok(root) => {
            check(root.size().0, root.files());
            assert_eq!(builder.build().await.expect("found"), root);
        }
        Err(RootfsError::Layer(_)) => {}
        Err(error) => panic!("not the layers' fault: {error:?}"),
    }
    no_debris(&image);
}

/// The superblock counts all blocks of the files.
fn check(size: u64, files: &[std::path::PathBuf]) {
    let lengths = files.iter().map(|file| fs::metadata(file).expect("there").len());
    assert_eq!(lengths.sum::<u64>(), size);
    let joined = fs::read(&files[0]).expect("there");
    let blocks: [u8; 4] = joined[1024 + 36..][..4].try_into().expect("four bytes");
    assert_eq!(u64::from(u32::from_le_bytes(blocks)) * 4096, size);
}

fn no_debris(image: &Image) {
    for entry in fs::read_dir(image.store().root().join("derived")).expect("there") {
        let name = entry.expect("readable").file_name();
        assert!(!name.as_encoded_bytes().starts_with(b"."), "{name:?}");
    }
}
