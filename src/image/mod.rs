//! OCI images: where they come from, and the verified copy of them on this machine.
//!
//! ```text
//! registry (oci-client)  ─┐
//!                         ├─> store: blobs/sha256/<hex>, each verified before it gets its name ─> Image
//! OCI layout folder      ─┤
//! archive, stream of one ─┘
//! ```
//!
//! An [`Image`] is a plain value: the digest of its manifest, its configuration, and its layers as
//! blobs of the [`ImageStore`]. Nothing is unpacked here; that is `rootfs`.
//!
//! Everything that arrives is hostile until its sha256 has been checked, and its content stays
//! hostile after that (a digest proves origin, not good will): manifests and configurations have
//! size limits, and no name out of them ever becomes a path. Refused: digests other than sha256,
//! schema 1 manifests, foreign ("non-distributable") and encrypted layers, and the `urls` field of
//! descriptors, which would let an image choose what this host connects to.

mod archive;
mod atomic_file;
mod builder;
mod compression;
mod config;
mod customize;
mod digest;
mod error;
mod index_search;
mod layout;
mod layout_writer;
mod manifest;
mod platform;
mod progress;
mod reference;
mod registry;
mod store;

use std::any::Any;
use std::fmt;
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::OnceLock;

use tokio::io::AsyncRead;

pub use archive::ImportError;
pub use archive::ImportOptions;
pub(crate) use atomic_file::AtomicFile;
pub use builder::OciImageBuilder;
pub use builder::PullPolicy;
pub(crate) use compression::decompress;
pub use config::ConfigError;
pub use config::ImageConfig;
pub use customize::CustomizeError;
pub use customize::ImageChanges;
pub use customize::ImageFile;
pub use digest::Digest;
pub use digest::DigestParseError;
pub use error::LayoutError;
pub use error::ManifestError;
pub use error::PullError;
pub use layout_writer::write_single_layer;
pub use platform::Platform;
pub use platform::PlatformParseError;
pub use progress::Progress;
pub use progress::ProgressEvent;
pub use progress::ProgressEvents;
pub use reference::Reference;
pub use reference::ReferenceError;
pub use registry::CredentialsError;
pub use registry::DockerConfig;
pub use registry::HelperError;
pub use registry::Mirror;
pub use registry::RegistryAuth;
pub use registry::RegistryTransport;
pub use registry::Tls;
pub use store::BlobError;
pub use store::Collected;
pub use store::ImageStore;
use store::Lease;
pub use store::StoreError;
pub use store::StoreOptions;
pub use store::StoredImage;
pub use store::Verified;
pub(crate) use store::run_blocking;

/// One layer of an image: a compressed or plain tar archive in the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layer {
    digest: Digest,
    diff_id: Digest,
    size: u64,
}

impl Layer {
    /// Digest of the layer as transported, which is its name in the store.
    #[must_use]
    pub const fn digest(&self) -> &Digest {
        &self.digest
    }

    /// Digest of the uncompressed archive, as the image's configuration promises it.
    #[must_use]
    pub const fn diff_id(&self) -> &Digest {
        &self.diff_id
    }

    /// Size as transported, in bytes.
    #[must_use]
    pub const fn size(&self) -> u64 {
        self.size
    }
}

/// A verified image whose blobs are in a local store.
///
/// Cheap to clone. For as long as it lives no collection of garbage, in whatever process, removes its blobs; dropping it
/// removes nothing.
#[derive(Clone)]
pub struct Image {
    inner: Arc<Inner>,
}

struct Inner {
    digest: Digest,
    config: ImageConfig,
    layers: Vec<Layer>,
    store: ImageStore,
    /// What of the store must stay for as long as this value and its clones live.
    _lease: Lease,
    companion: OnceLock<Arc<dyn Any + Send + Sync>>,
}

impl Image {
    fn new(digest: Digest, config: ImageConfig, layers: Vec<Layer>, store: ImageStore, lease: Lease) -> Self {
        Self { inner: Arc::new(Inner { digest, config, layers, store, _lease: lease, companion: OnceLock::new() }) }
    }

    /// Pulls `reference` into the user's store and returns the verified image.
    ///
    /// Blobs already in the store are not fetched again. Credentials are those of the user's Docker configuration. For
    /// others, another store or another policy see [`Image::builder`].
    ///
    /// # Errors
    ///
    /// [`PullError`] says which step failed; nothing half-written is left in the store.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future abandons the pull. Blobs that were complete stay; the one being written
    /// is removed.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn f() -> Result<(), kiln::image::PullError> {
    /// let image = kiln::image::Image::pull("docker.io/library/alpine:3.20").await?;
    /// println!("{} runs {:?}", image.digest(), image.config().command());
    /// # Ok(()) }
    /// ```
    pub async fn pull(reference: &str) -> Result<Self, PullError> {
        Self::builder(reference).pull().await
    }

    /// Starts the description of a pull.
    pub fn builder(reference: impl Into<String>) -> OciImageBuilder {
        OciImageBuilder::new(reference.into())
    }

    /// Imports the image of an OCI layout folder into the user's store.
    ///
    /// The layout must hold exactly one image for `linux/amd64`; name one of several with
    /// [`ImageStore::import_oci_layout`].
    ///
    /// # Errors
    ///
    /// [`LayoutError`] says what is wrong with the folder; nothing half-written is left in the store.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future abandons the import; the blob being copied is removed.
    pub async fn from_oci_layout(path: impl AsRef<Path>) -> Result<Self, LayoutError> {
        ImageStore::open_default().await?.import_oci_layout(path, None).await
    }

    /// Imports the image of an archive file into the user's store: an OCI layout as a tar file, or what `docker save`
    /// writes; compressed by gzip or zstd, or not.
    ///
    /// The archive must hold exactly one image for `linux/amd64`; name one of several with [`ImageStore::import_archive`].
    ///
    /// # Errors
    ///
    /// [`ImportError`] says what is wrong and where; nothing half-written is left in the store.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future abandons the import. Blobs that were complete stay; all else is removed.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn f() -> Result<(), kiln::image::ImportError> {
    /// let image = kiln::image::Image::from_archive("app.tar.gz").await?;
    /// # Ok(()) }
    /// ```
    pub async fn from_archive(path: impl AsRef<Path>) -> Result<Self, ImportError> {
        ImageStore::open_default().await?.import_archive(path, &ImportOptions::new()).await
    }

    /// Imports the image of an archive into the user's store as it arrives. Otherwise like [`Image::from_archive`].
    ///
    /// # Errors
    ///
    /// [`ImportError`] says what is wrong and where; nothing half-written is left in the store.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future abandons the import and drops the reader. Blobs that were complete stay; all else is removed.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn f() -> Result<(), kiln::image::ImportError> {
    /// let image = kiln::image::Image::from_archive_reader(tokio::io::stdin()).await?;
    /// # Ok(()) }
    /// ```
    pub async fn from_archive_reader(reader: impl AsyncRead + Send + Unpin + 'static) -> Result<Self, ImportError> {
        ImageStore::open_default().await?.import_archive_from(reader, &ImportOptions::new()).await
    }

    /// Imports the image at `path` into the user's store: a folder is an OCI layout, a file an archive.
    ///
    /// There must be exactly one image for `linux/amd64`; name one of several with [`ImageStore::import_path`].
    ///
    /// # Errors
    ///
    /// [`ImportError`] says what is wrong and where; nothing half-written is left in the store.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future abandons the import. Blobs that were complete stay; all else is removed.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn f() -> Result<(), kiln::image::ImportError> {
    /// let image = kiln::image::Image::from_path("app.tar").await?;
    /// # Ok(()) }
    /// ```
    pub async fn from_path(path: impl AsRef<Path>) -> Result<Self, ImportError> {
        ImageStore::open_default().await?.import_path(path, &ImportOptions::new()).await
    }

    /// Digest of the image's manifest.
    #[must_use]
    pub fn digest(&self) -> &Digest {
        &self.inner.digest
    }

    /// What the image's author configured: command, environment, user, folder.
    #[must_use]
    pub fn config(&self) -> &ImageConfig {
        &self.inner.config
    }

    /// The layers, lowest first.
    #[must_use]
    pub fn layers(&self) -> &[Layer] {
        &self.inner.layers
    }

    /// Makes the image that `changes` turn this one into. It is in the same store, with a digest of its own and no name.
    ///
    /// # Errors
    ///
    /// [`CustomizeError`] says what cannot be had; nothing half-written is left in the store.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future does not stop the writing; the store stays whole.
    pub async fn changed(&self, changes: ImageChanges) -> Result<Self, CustomizeError> {
        let image = self.clone();
        run_blocking(move || customize::customize(image.store(), &image, &changes)).await
    }

    /// The layers taken together, as the specification names them (image-spec, config.md, "Layer ChainID"); of an image
    /// without layers, the digest of nothing. Images with the same chain have the same files.
    #[must_use]
    pub fn chain_id(&self) -> Digest {
        let ids: Vec<_> = self.inner.layers.iter().map(|layer| layer.diff_id).collect();
        chain_id(&ids)
    }

    /// The store that has the layers' blobs, and what is made from them.
    #[must_use]
    pub fn store(&self) -> &ImageStore {
        &self.inner.store
    }

    /// What those above keep with this value and its clones: made by whoever asks first. There is one; `None` for a second
    /// type of it.
    pub(crate) fn companion<T: Any + Send + Sync>(&self, make: impl FnOnce() -> T) -> Option<Arc<T>> {
        let companion = self.inner.companion.get_or_init(|| Arc::new(make()));
        Arc::clone(companion).downcast().ok()
    }

    /// Opens a layer's blob. Blocking.
    pub(crate) fn open_layer(&self, layer: &Layer) -> io::Result<File> {
        File::open(self.inner.store.blob_path(layer.digest()))
    }

    /// Removes a layer's blob if its content is not what its name says, and tells whether it did. Blocking.
    pub(crate) fn discard_damaged_layer(&self, layer: &Layer) -> io::Result<bool> {
        self.inner.store.discard_damaged(layer.digest())
    }
}

/// See [`Image::chain_id`].
fn chain_id(diff_ids: &[Digest]) -> Digest {
    let Some((lowest, others)) = diff_ids.split_first() else { return Digest::of(b"") };
    others.iter().fold(*lowest, |chain, id| Digest::of(format!("{chain} {id}").as_bytes()))
}

impl fmt::Debug for Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Image")
            .field("digest", &self.inner.digest)
            .field("layers", &self.inner.layers.len())
            .finish_non_exhaustive()
    }
}
