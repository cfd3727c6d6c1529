//! Writing an OCI layout folder with one image of one layer.
//!
//! For images made on the spot, such as the default image around a static busybox. Blobs first,
//! `index.json` last and by rename, so the folder is a valid layout at every instant.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;
use std::path::PathBuf;

use serde_json::json;

use crate::image::atomic_file::AtomicFile;
use crate::image::config::ImageConfig;
use crate::image::digest::Digest;
use crate::image::error::LayoutError;
use crate::image::manifest::Descriptor;
use crate::image::manifest::Index;
use crate::image::manifest::OCI_CONFIG;
use crate::image::manifest::OCI_INDEX;
use crate::image::manifest::OCI_LAYER;
use crate::image::manifest::OCI_MANIFEST;
use crate::image::manifest::REF_NAME;
use crate::image::manifest::Resolved;
use crate::image::platform::Platform;
use crate::image::store::run_blocking;

/// Writes an image whose only layer is the uncompressed archive `tar` into the layout `folder`,
/// tagged `tag`, and returns the digest of its manifest.
///
/// The folder is created if missing; images with other tags in it are kept, one with this tag is
/// replaced (its blobs stay). The same input gives the same bytes. Processes writing to one layout
/// at the same time may lose each other's tags.
///
/// # Errors
///
/// [`LayoutError::Io`] if writing fails, [`LayoutError::Manifest`] if there is an `index.json`
/// that is not an index.
///
/// # Cancel safety
///
/// Dropping the future does not stop the writing; the folder stays valid.
///
/// # Examples
///
/// ```no_run
/// # async fn f(tar: Vec<u8>) -> Result<(), kiln::image::LayoutError> {
/// let mut config = kiln::image::ImageConfig::default();
/// config.cmd = vec!["/bin/sh".into()];
/// kiln::image::write_single_layer("layout", "latest", tar, &config).await?;
/// let image = kiln::image::Image::from_oci_layout("layout").await?;
/// # Ok(()) }
/// ```
pub async fn write_single_layer(
    folder: impl Into<PathBuf>,
    tag: impl Into<String>,
    tar: Vec<u8>,
    config: &ImageConfig,
) -> Result<Digest, LayoutError> {
    let (folder, tag, config) = (folder.into(), tag.into(), config.clone());
    run_blocking(move || write(&folder, tag, &tar, &config)).await
}

fn write(folder: &Path, tag: String, tar: &[u8], config: &ImageConfig) -> Result<Digest, LayoutError> {
    let blobs = folder.join("blobs/sha256");
    fs::create_dir_all(&blobs).map_err(io_at(&blobs))?;
    put(&folder.join("oci-layout"), br#"{"imageLayoutVersion":"1.0.0"}"#)?;
    let layer = put_blob(&blobs, OCI_LAYER, tar)?;
    let config = put_blob(&blobs, OCI_CONFIG, &config.to_json(&[layer.digest]))?;
    let manifest = json!({
        "schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config, "layers": [layer],
    });
    let mut entry = put_blob(&blobs, OCI_MANIFEST, manifest.to_string().as_bytes())?;
    entry.platform = Some(Platform::default());
    entry.annotations = Some(BTreeMap::from([(REF_NAME.to_owned(), tag)]));
    let digest = entry.digest;
    put_entry(&folder.join("index.json"), entry)?;
    Ok(digest)
}

fn put_entry(path: &Path, entry: Descriptor) -> Result<(), LayoutError> {
    let mut entries = match fs::read(path) {
        Ok(bytes) => match Resolved::parse(&bytes)? {
            Resolved::Index(Index { manifests }) => manifests,
            Resolved::Image(_) => {
                let reason = "index.json is not an index";
                return Err(LayoutError::NotALayout { path: path.to_owned(), reason });
            }
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(source) => return Err(LayoutError::Io { path: path.to_owned(), source }),
    };
    entries.retain(|other| other.ref_name() != entry.ref_name());
    entries.push(entry);
    let index = json!({ "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries });
    put(path, index.to_string().as_bytes())
}

fn put_blob(blobs: &Path, media_type: &str, bytes: &[u8]) -> Result<Descriptor, LayoutError> {
    let digest = Digest::of(bytes);
    put(&blobs.join(digest.hex()), bytes)?;
    Ok(Descriptor {
        media_type: media_type.to_owned(),
        digest,
        size: bytes.len() as u64,
        platform: None,
        annotations: None,
    })
}

fn put(path: &Path, bytes: &[u8]) -> Result<(), LayoutError> {
    AtomicFile::write(path, bytes).map_err(io_at(path))
}

fn io_at(path: &Path) -> impl FnOnce(io::Error) -> LayoutError + '_ {
    move |source| LayoutError::Io { path: path.to_owned(), source }
}
