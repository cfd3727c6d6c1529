//! The documents of an archive around a layer that is good: any manifest and configuration give an image that is whole in
//! the store, or a typed error.
//!
//! The input is a manifest, a NUL byte and a configuration. In both `$DIFF` is the digest of the layer, and in the manifest
//! of a layout `$CONFIG`, `$SIZE` and `$LENGTH` are the digest and the size of the configuration and the size of the layer.
#![no_main]

use std::io::Cursor;
use std::sync::LazyLock;

use kiln::image::Digest;
use kiln::image::Image;
use kiln::image::ImageStore;
use kiln::image::ImportError;
use kiln::image::ImportOptions;
use kiln::image::PullPolicy;
use libfuzzer_sys::fuzz_target;
use serde_json::json;
use tokio::runtime::Runtime;

static RUNTIME: LazyLock<Runtime> =
    LazyLock::new(|| tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime"));

static LAYER: LazyLock<Vec<u8>> = LazyLock::new(|| archive(&[("file", b"content")]));

fuzz_target!(|bytes: &[u8]| {
    let mut parts = bytes.splitn(2, |byte| *byte == 0);
    let (manifest, config) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    let diff = Digest::of(&LAYER).to_string();
    let config = replace(config, &[("$DIFF", &diff)]);
    let (config_digest, size, length) =
        (Digest::of(&config).to_string(), config.len().to_string(), LAYER.len().to_string());
    let words = [("$DIFF", &*diff), ("$CONFIG", &config_digest), ("$SIZE", &size), ("$LENGTH", &length)];
    let manifest = replace(manifest, &words);
    RUNTIME.block_on(async {
        import(docker(&manifest, &config)).await;
        import(oci(&manifest, &config)).await;
    });
});

fn replace(document: &[u8], words: &[(&str, &str)]) -> Vec<u8> {
    // Not every input is text; one that is not stays as it is.
    let Ok(text) = str::from_utf8(document) else { return document.to_vec() };
    words.iter().fold(text.to_owned(), |text, (word, value)| text.replace(word, value)).into_bytes()
}

fn docker(manifest: &[u8], config: &[u8]) -> Vec<u8> {
    archive(&[("manifest.json", manifest), ("config.json", config), ("layer/layer.tar", &LAYER)])
}

fn oci(manifest: &[u8], config: &[u8]) -> Vec<u8> {
    let blob = |bytes: &[u8]| format!("blobs/sha256/{}", Digest::of(bytes).hex());
    let descriptor = json!({ "digest": Digest::of(manifest).to_string(), "size": manifest.len() });
    let index = json!({ "schemaVersion": 2, "manifests": [descriptor] }).to_string();
    archive(&[
        ("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#),
        ("index.json", index.as_bytes()),
        (&blob(manifest), manifest),
        (&blob(config), config),
        (&blob(&LAYER), &LAYER),
    ])
}

fn archive(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut archive = tar::Builder::new(Vec::new());
    for (name, content) in files {
        let mut header = tar::Header::new_ustar();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        archive.append_data(&mut header, name, *content).expect("written to memory");
    }
    archive.into_inner().expect("written to memory")
}

async fn import(archive: Vec<u8>) {
    let folder = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("a folder");
    let store = ImageStore::open(folder.path().join("store")).await.expect("a store");
    let options = ImportOptions::new().name("localhost/fuzz");
    match store.import_archive_from(Cursor::new(archive), &options).await {
        Ok(image) => {
            let named = Image::builder("localhost/fuzz").store(store.clone()).policy(PullPolicy::Never).pull().await;
            assert_eq!(named.expect("it is whole").digest(), image.digest());
        }
        Err(ImportError::Store(error)) => panic!("not the archive's fault: {error:?}"),
        Err(_) => {}
    }
}
