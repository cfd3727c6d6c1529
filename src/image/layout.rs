//! Importing from an OCI layout folder (image-spec, image-layout.md).
//!
//! The folder is read, never written or trusted: sizes are limited before reading, digests are
//! checked while copying, and file names come from checked digests only.

use std::fs::File;
use std::fs::OpenOptions;
use std::io;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::path::PathBuf;

use serde::Deserialize;

use crate::image::Image;
use crate::image::config::ImageConfig;
use crate::image::digest::Digest;
use crate::image::error::LayoutError;
use crate::image::error::ManifestError;
use crate::image::index_search::IndexSearch;
use crate::image::index_search::find_image;
use crate::image::index_search::leads_to;
use crate::image::manifest::Descriptor;
use crate::image::manifest::Index;
use crate::image::manifest::Manifest;
use crate::image::manifest::Resolved;
use crate::image::platform::Platform;
use crate::image::progress::Progress;
use crate::image::progress::ProgressEvent;
use crate::image::store::ExpectedBlob;
use crate::image::store::ImageStore;
use crate::image::store::Lease;
use crate::image::store::run_blocking;

/// See [`ImageStore::import_oci_layout`].
///
/// One blocking job a blob, so that a dropped future stops the import at the next one.
pub(super) async fn import(
    store: &ImageStore,
    folder: &Path,
    tag: Option<&str>,
    progress: &Progress,
) -> Result<Image, LayoutError> {
    progress.send(ProgressEvent::Resolving { reference: folder.display().to_string() });
    let layout = Layout { folder: folder.to_owned() };
    let (store_, tag) = (store.clone(), tag.map(str::to_owned));
    let (layout, digest, manifest, config, _lease) = run_blocking(move || {
        let (digest, manifest, lease) = layout.resolve(&store_, tag.as_deref())?;
        let config = layout.read_blob("configuration", &manifest.config, ImageConfig::MAX_SIZE)?;
        store_.put_small(&manifest.config.digest, &config)?;
        Ok::<_, LayoutError>((layout, digest, manifest, config, lease))
    })
    .await?;
    let layers = manifest.layers.iter().map(|layer| (layer.digest, layer.size)).collect();
    progress.send(ProgressEvent::Resolved { image: digest, layers });
    for (index, layer) in manifest.layers.iter().enumerate() {
        let (store, layout, layer, progress) = (store.clone(), layout.clone(), layer.clone(), progress.clone());
        run_blocking(move || layout.copy_layer(&store, index, &layer, &progress)).await?;
    }
    let store = store.clone();
    run_blocking(move || {
        let image = store.assemble(digest, &manifest, &config)?;
        image.config().require(&Platform::default()).map_err(ManifestError::from)?;
        Ok(image)
    })
    .await
}

#[derive(Clone)]
struct Layout {
    folder: PathBuf,
}

impl Layout {
    /// Follows the tag through indexes to an image manifest, which ends up in the store; all of the image is kept from now on.
    fn resolve(&self, store: &ImageStore, tag: Option<&str>) -> Result<(Digest, Manifest, Lease), LayoutError> {
        self.check_version()?;
        let read = |descriptor: &Descriptor| self.read_blob("manifest", descriptor, Manifest::MAX_SIZE);
        let (digest, bytes, manifest) = find_image(self.entry(tag)?, Platform::default(), read)?;
        let lease = store.lease(&manifest.blobs(digest))?;
        store.put_small(&digest, &bytes)?;
        Ok((digest, manifest, lease))
    }

    fn check_version(&self) -> Result<(), LayoutError> {
        let refuse = |reason| LayoutError::NotALayout { path: self.folder.clone(), reason };
        let bytes = match self.read("oci-layout", Manifest::MAX_SIZE) {
            Err(LayoutError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                return Err(refuse("no oci-layout file"));
            }
            result => result?,
        };
        check_marker(&bytes).map_err(refuse)
    }

    fn entry(&self, tag: Option<&str>) -> Result<Descriptor, LayoutError> {
        let bytes = self.read("index.json", Manifest::MAX_SIZE)?;
        let Resolved::Index(index) = Resolved::parse(&bytes)? else {
            return Err(LayoutError::NotALayout { path: self.folder.clone(), reason: "index.json is not an index" });
        };
        select(&index, tag).cloned()
    }

    fn read(&self, name: &str, limit: u64) -> Result<Vec<u8>, LayoutError> {
        let path = self.folder.join(name);
        let mut bytes = Vec::new();
        open_regular(&path)
            .and_then(|file| file.take(limit + 1).read_to_end(&mut bytes))
            .map_err(|source| LayoutError::Io { path, source })?;
        if bytes.len() as u64 > limit {
            return Err(LayoutError::TooLarge { what: name.to_owned(), limit });
        }
        Ok(bytes)
    }

    fn open_blob(&self, what: &str, digest: &Digest) -> Result<File, LayoutError> {
        let path = self.folder.join("blobs/sha256").join(digest.hex());
        open_regular(&path).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => LayoutError::MissingBlob { what: what.to_owned(), digest: *digest },
            _ => LayoutError::Io { path, source },
        })
    }

    fn read_blob(&self, what: &str, descriptor: &Descriptor, limit: u64) -> Result<Vec<u8>, LayoutError> {
        if descriptor.size > limit {
            return Err(LayoutError::TooLarge { what: what.to_owned(), limit });
        }
        let mut bytes = Vec::new();
        self.open_blob(what, &descriptor.digest)?
            .take(descriptor.size + 1)
            .read_to_end(&mut bytes)
            .map_err(|source| LayoutError::Io { path: self.folder.clone(), source })?;
        let found = bytes.len() as u64;
        if found < descriptor.size {
            return Err(LayoutError::Truncated { what: what.to_owned(), expected: descriptor.size, found });
        }
        if found > descriptor.size {
            return Err(LayoutError::TooLarge { what: what.to_owned(), limit: descriptor.size });
        }
        let found = Digest::of(&bytes);
        if found != descriptor.digest {
            return Err(LayoutError::DigestMismatch { what: what.to_owned(), expected: descriptor.digest, found });
        }
        Ok(bytes)
    }

    fn copy_layer(
        &self,
        store: &ImageStore,
        index: usize,
        layer: &Descriptor,
        progress: &Progress,
    ) -> Result<(), LayoutError> {
        let report = |done| progress.send(ProgressEvent::Fetching { layer: layer.digest, done, total: layer.size });
        if store.contains(&layer.digest, layer.size) {
            report(layer.size);
            return Ok(());
        }
        let what = format!("layer {index}");
        let file = self.open_blob(&what, &layer.digest)?;
        let expected = ExpectedBlob { what, digest: layer.digest, size: layer.size };
        Ok(store.put_from(expected, &mut Watched { input: file, done: 0, watch: report })?)
    }
}

/// Tells how much has been read.
struct Watched<R, F> {
    input: R,
    done: u64,
    watch: F,
}

impl<R: Read, F: FnMut(u64)> Read for Watched<R, F> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.input.read(buffer)?;
        self.done += count as u64;
        (self.watch)(self.done);
        Ok(count)
    }
}

/// Refuses an `oci-layout` file of another version than 1, and says why.
pub(super) fn check_marker(bytes: &[u8]) -> Result<(), &'static str> {
    #[derive(Deserialize)]
    struct Marker {
        #[serde(rename = "imageLayoutVersion")]
        version: String,
    }
    let marker: Marker = serde_json::from_slice(bytes).map_err(|_| "oci-layout is not valid json")?;
    if marker.version.starts_with("1.") { Ok(()) } else { Err("image layout version is not 1") }
}

fn select<'a>(index: &'a Index, tag: Option<&str>) -> Result<&'a Descriptor, LayoutError> {
    let wanted = Platform::default();
    let mut candidates = index.manifests.iter().filter(|entry| leads_to(entry, &wanted));
    if let Some(tag) = tag {
        let found = candidates.find(|entry| entry.ref_name() == Some(tag));
        return found.ok_or_else(|| LayoutError::UnknownImage { tag: tag.to_owned() });
    }
    match (candidates.next(), candidates.count()) {
        (Some(only), 0) => Ok(only),
        (Some(_), more) => Err(LayoutError::Ambiguous { count: more + 1 }),
        (None, _) => Err(IndexSearch::nothing(index, wanted).into()),
    }
}

/// Opens a regular file; a FIFO or device in a hostile folder must not make the reader wait.
pub(super) fn open_regular(path: &Path) -> io::Result<File> {
    let nonblocking = i32::try_from(rustix::fs::OFlags::NONBLOCK.bits()).map_err(io::Error::other)?;
    let file = OpenOptions::new().read(true).custom_flags(nonblocking).open(path)?;
    if file.metadata()?.is_file() {
        Ok(file)
    } else {
        Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"))
    }
}
