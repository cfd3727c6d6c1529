//! An image as its archive describes it, checked, on its way into the store.

use tokio_util::sync::CancellationToken;

use crate::image::Image;
use crate::image::archive::contents::Contents;
use crate::image::archive::error::ImportError;
use crate::image::config::ImageConfig;
use crate::image::digest::Digest;
use crate::image::manifest::Descriptor;
use crate::image::manifest::Manifest;
use crate::image::platform::Platform;
use crate::image::progress::Progress;
use crate::image::progress::ProgressEvent;
use crate::image::store::ImageStore;

/// An image that can run, if its layers are here.
#[derive(Debug)]
pub(super) struct Found {
    digest: Digest,
    manifest: Manifest,
    /// The manifest as its digest has it.
    document: Vec<u8>,
    config: Vec<u8>,
}

impl Found {
    /// Checks what can be told without the layers: an image that cannot run is not worth its disk space.
    pub(super) fn new(
        digest: Digest,
        manifest: Manifest,
        document: Vec<u8>,
        config: Vec<u8>,
    ) -> Result<Self, ImportError> {
        let (parsed, _) = ImageConfig::parse(&config)?;
        parsed.require(&Platform::default())?;
        Ok(Self { digest, manifest, document, config })
    }

    /// The image, which keeps what it needs from collectors, there or not. Blocking.
    pub(super) fn assemble(&self, store: &ImageStore) -> Result<Image, ImportError> {
        Ok(store.assemble(self.digest, &self.manifest, &self.config)?)
    }

    /// Puts the image into the store, its manifest last. Blocking.
    pub(super) fn store(
        &self,
        store: &ImageStore,
        contents: &mut Contents,
        progress: &Progress,
        stop: &CancellationToken,
    ) -> Result<(), ImportError> {
        let layers = self.manifest.layers.iter().map(|layer| (layer.digest, layer.size)).collect();
        progress.send(ProgressEvent::Resolved { image: self.digest, layers });
        for (index, layer) in self.manifest.layers.iter().enumerate() {
            if stop.is_cancelled() {
                return Err(ImportError::Read(std::io::ErrorKind::BrokenPipe.into()));
            }
            keep_layer(store, contents, &format!("layer {index}"), layer)?;
            progress.send(ProgressEvent::Fetching { layer: layer.digest, done: layer.size, total: layer.size });
        }
        store.put_small(&self.manifest.config.digest, &self.config)?;
        store.put_small(&self.digest, &self.document)?;
        Ok(())
    }
}

fn keep_layer(store: &ImageStore, contents: &mut Contents, what: &str, layer: &Descriptor) -> Result<(), ImportError> {
    if store.contains(&layer.digest, layer.size) {
        return Ok(());
    }
    let missing = || ImportError::Missing { what: what.to_owned(), name: layer.digest.to_string() };
    let summary = contents.summary(&layer.digest).ok_or_else(missing)?;
    check_size(what, layer, summary.size)?;
    contents.store(store, &layer.digest)
}

/// Refuses a blob of another length than its descriptor says.
pub(super) fn check_size(what: &str, descriptor: &Descriptor, found: u64) -> Result<(), ImportError> {
    if found == descriptor.size {
        return Ok(());
    }
    Err(ImportError::SizeMismatch { what: what.to_owned(), expected: descriptor.size, found })
}
