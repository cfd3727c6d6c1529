//! An archive of an image, in any of its forms: any bytes give an image that is whole in the store, or a typed error and
//! no debris.
#![no_main]

use std::fs;
use std::io::Cursor;
use std::sync::LazyLock;

use kiln::image::Digest;
use kiln::image::Image;
use kiln::image::ImageStore;
use kiln::image::ImportError;
use kiln::image::ImportOptions;
use kiln::image::PullPolicy;
use libfuzzer_sys::fuzz_target;
use tokio::runtime::Runtime;

static RUNTIME: LazyLock<Runtime> =
    LazyLock::new(|| tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime"));

const BLOCK: usize = 512;

fuzz_target!(|bytes: &[u8]| {
    let mut bytes = bytes.to_vec();
    bytes.chunks_exact_mut(BLOCK).for_each(mend);
    let folder = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("a folder");
    RUNTIME.block_on(async {
        let store = ImageStore::open(folder.path().join("store")).await.expect("a store");
        import(&store, bytes).await;
        check(&store);
    });
});

/// A sum that is right, so that the other fields of a header are read at all.
fn mend(block: &mut [u8]) {
    if &block[257..262] == b"ustar" {
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
        block[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    }
}

async fn import(store: &ImageStore, bytes: Vec<u8>) {
    let options = ImportOptions::new().name("localhost/fuzz").max_bytes(4 << 20).max_entries(256);
    match store.import_archive_from(Cursor::new(bytes), &options).await {
        Ok(image) => {
            let named = Image::builder("localhost/fuzz").store(store.clone()).policy(PullPolicy::Never).pull().await;
            assert_eq!(named.expect("it is whole").digest(), image.digest());
        }
        Err(ImportError::Store(error)) => panic!("not the archive's fault: {error:?}"),
        Err(_) => {}
    }
}

/// Every blob is what its name says, and there is nothing else.
fn check(store: &ImageStore) {
    for entry in fs::read_dir(store.root().join("blobs/sha256")).expect("there") {
        let path = entry.expect("readable").path();
        let digest = Digest::of(&fs::read(&path).expect("readable"));
        assert_eq!(path.file_name().expect("a name").to_str(), Some(&*digest.hex()));
    }
}
