//! Verified blobs on disk, by digest.
//!
//! ```text
//! <store>/blobs/sha256/<hex>          a blob; its content had this digest when it was written
//! <store>/blobs/sha256/.tmp-<random>  a blob being written (see `atomic_file`)
//! <store>/derived/<hex>-<what>         made from layers: <hex> is a diff id or a chain id; see `rootfs`
//! <store>/baked/...                   snapshots that were baked from images (see `baked`)
//! <store>/digests/<hex>               the digest of a file elsewhere (see `file_digests`)
//! <store>/leases/.tmp-<random>        what is in use (see `lease`)
//! <store>/claims/<hex>                who does which work (see `lock`)
//! <store>/lock                        whether garbage is being collected
//! <store>/references/<hex>            what a reference resolved to; <hex> = sha256 of the reference and platform
//! ```
//!
//! A blob gets its name only after its digest and size have been checked and its bytes synced, so
//! a crash at any instant leaves a store that opens. Several processes may share a store: writers
//! of the same blob write the same bytes, and the last rename wins.

mod baked;
mod collect;
mod file_digests;
mod lease;
mod lock;
mod quota;

use std::fs;
use std::fs::File;
use std::io;
use std::io::BufWriter;
use std::io::Read;
use std::io::Write;
use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use sha2::Digest as _;
use sha2::Sha256;

use crate::blocking::ShuttingDown;
use crate::blocking::blocking;
use crate::image::Image;
use crate::image::Layer;
use crate::image::atomic_file::AtomicFile;
use crate::image::chain_id;
use crate::image::config::ImageConfig;
use crate::image::digest::Digest;
use crate::image::error::LayoutError;
use crate::image::error::ManifestError;
use crate::image::layout;
use crate::image::manifest::Manifest;
use crate::image::manifest::Resolved;
use crate::image::platform::Platform;
use crate::image::progress::Progress;
use crate::image::reference::Reference;
use crate::units::Bytes;

pub use collect::Collected;
pub use collect::StoredImage;
pub use collect::Verified;
pub(crate) use lease::Lease;
pub use quota::StoreOptions;

/// How many bytes are read or copied at once.
const COPY_CHUNK: usize = 256 << 10;

/// A content-addressed store of image blobs. Cheap to clone.
#[derive(Clone, Debug)]
pub struct ImageStore {
    root: Arc<Path>,
    quota: Option<Bytes>,
}

/// Why the store itself failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// There is no home folder to hold the default store.
    #[error("no home folder for the default image store; open one at an explicit path")]
    NoHome,
    /// The file system under the store failed (full, read-only, not permitted...).
    #[error("image store i/o at {path}")]
    Io {
        /// Where.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The runtime is shutting down.
    #[error("the runtime is shutting down")]
    Shutdown,
    /// The file system under the store is full, or the user's share of it.
    #[error("no space left for the image store at {path}")]
    DiskFull {
        /// Where.
        path: PathBuf,
    },
    /// More than the store's [quota](StoreOptions::quota) allows, also after garbage was collected.
    #[error("{} more bytes than the {} that the image store has would exceed its quota of {}", .needed.0, .used.0, .limit.0)]
    Quota {
        /// The quota.
        limit: Bytes,
        /// What the store takes.
        used: Bytes,
        /// What was to be added.
        needed: Bytes,
    },
    /// Another process collects garbage and does not come to an end.
    #[error("the image store is locked at {path}, still after {after:?}")]
    Busy {
        /// The lock.
        path: PathBuf,
        /// How long it was waited for.
        after: Duration,
    },
}

impl StoreError {
    /// What a failure at `path` means.
    pub(crate) fn io(path: &Path) -> impl FnOnce(io::Error) -> Self + '_ {
        move |source| match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::DiskFull { path: path.to_owned() },
            _ => Self::Io { path: path.to_owned(), source },
        }
    }
}

/// Why bytes were not accepted as a blob.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BlobError {
    /// The content has another digest than promised.
    #[error("{what} has digest {found}, expected {expected}")]
    DigestMismatch {
        /// Which blob.
        what: String,
        /// The promised digest.
        expected: Digest,
        /// The digest of what arrived.
        found: Digest,
    },
    /// The content ended early.
    #[error("{what} ends after {found} of {expected} bytes")]
    Truncated {
        /// Which blob.
        what: String,
        /// The promised size, in bytes.
        expected: u64,
        /// What arrived, in bytes.
        found: u64,
    },
    /// The content is longer than promised or than accepted.
    #[error("{what} is longer than {limit} bytes")]
    TooLarge {
        /// Which blob.
        what: String,
        /// The promised size or the limit, in bytes.
        limit: u64,
    },
    /// The store failed.
    #[error("the image store failed")]
    Store(#[from] StoreError),
}

impl ImageStore {
    /// Opens the store in `root`, creating it if missing and removing what killed writers left.
    ///
    /// # Errors
    ///
    /// [`StoreError::Io`] when the folder cannot be created or read.
    ///
    /// # Cancel safety
    ///
    /// Safe to drop; the folder may have been created.
    pub async fn open(root: impl Into<PathBuf>) -> Result<Self, StoreError> {
        Self::options().open(root).await
    }

    /// Starts the description of how to open a store.
    pub fn options() -> StoreOptions {
        StoreOptions::default()
    }

    fn open_blocking(root: PathBuf, options: StoreOptions) -> Result<Self, StoreError> {
        let store = Self { root: root.into(), quota: options.quota };
        for folder in [
            store.blobs(),
            store.derived(),
            store.references(),
            store.leases(),
            store.claims(),
            store.baked(),
            store.digests(),
        ] {
            fs::create_dir_all(&folder).map_err(StoreError::io(&folder))?;
        }
        store.sweep_debris()?;
        Ok(store)
    }

    const fn quota(&self) -> Option<Bytes> {
        self.quota
    }

    /// Opens the user's store, `~/.cache/kiln/images`.
    ///
    /// # Errors
    ///
    /// As [`ImageStore::open`], and [`StoreError::NoHome`].
    ///
    /// # Cancel safety
    ///
    /// Safe to drop.
    pub async fn open_default() -> Result<Self, StoreError> {
        let home = std::env::home_dir().ok_or(StoreError::NoHome)?;
        Self::open(home.join(".cache/kiln/images")).await
    }

    /// The store's folder.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Imports an image from an OCI layout folder (image-spec, image-layout.md).
    ///
    /// With a `tag`, the entry of `index.json` whose `org.opencontainers.image.ref.name` is that
    /// tag; without, the only image for `linux/amd64`.
    ///
    /// # Errors
    ///
    /// [`LayoutError`] says what is wrong with the folder; nothing half-written is left here.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future abandons the import; a blob being copied is removed.
    pub async fn import_oci_layout(&self, folder: impl AsRef<Path>, tag: Option<&str>) -> Result<Image, LayoutError> {
        layout::import(self, folder.as_ref(), tag, &Progress::default()).await
    }

    /// Remembers `image`, which must be of this store, under `reference`; where that means something already, it means
    /// this image from now on.
    ///
    /// # Errors
    ///
    /// [`StoreError::Io`].
    ///
    /// # Cancel safety
    ///
    /// Dropping the future does not stop the writing; the reference means the old image or the new.
    pub async fn name(&self, reference: &Reference, image: &Image) -> Result<(), StoreError> {
        let (store, reference, digest) = (self.clone(), reference.clone(), *image.digest());
        let platform = image.config().platform.clone();
        run_blocking(move || store.remember(&reference, &platform, &digest)).await
    }

    pub(super) fn blobs(&self) -> PathBuf {
        self.root.join("blobs/sha256")
    }

    /// The folder of what is made from layers. The name of each file starts with the hex digits of the diff id or chain
    /// id that it was made from, by which the collector tells whether it is still of use.
    pub(crate) fn derived(&self) -> PathBuf {
        self.root.join("derived")
    }

    fn references(&self) -> PathBuf {
        self.root.join("references")
    }

    pub(super) fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.blobs().join(digest.hex())
    }

    /// Whether the blob is here with this size. Blocking.
    ///
    /// The size catches a file system that lost data after a crash; content is checked again when
    /// it is used (layers against their `diff_id`, small blobs by [`ImageStore::read_small`]).
    pub(super) fn contains(&self, digest: &Digest, size: u64) -> bool {
        fs::metadata(self.blob_path(digest)).is_ok_and(|meta| meta.is_file() && meta.len() == size)
    }

    /// Reads a manifest or configuration back, `None` if it is missing or damaged. Blocking.
    pub(super) fn read_small(&self, digest: &Digest, limit: u64) -> Result<Option<Vec<u8>>, StoreError> {
        let path = self.blob_path(digest);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(StoreError::Io { path, source }),
        };
        let mut bytes = Vec::new();
        file.take(limit + 1).read_to_end(&mut bytes).map_err(StoreError::io(&path))?;
        Ok((Digest::of(&bytes) == *digest).then_some(bytes))
    }

    /// Removes a blob whose content has another digest than its name by now, so that the next pull fetches it again; an
    /// intact one stays, whatever else is wrong with it. Tells whether it removed one. Blocking.
    pub(super) fn discard_damaged(&self, digest: &Digest) -> io::Result<bool> {
        let path = self.blob_path(digest);
        let mut file = File::open(&path)?;
        let mut hasher = Sha256::new();
        let mut chunk = vec![0; COPY_CHUNK];
        loop {
            match file.read(&mut chunk) {
                Ok(0) => break,
                Ok(count) => hasher.update(&chunk[..count]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        if Digest::from_hasher(hasher) == *digest {
            return Ok(false);
        }
        fs::remove_file(&path).map(|()| true)
    }

    /// Stores a small blob whose digest is already known to be right. Blocking.
    pub(super) fn put_small(&self, digest: &Digest, bytes: &[u8]) -> Result<(), StoreError> {
        debug_assert_eq!(Digest::of(bytes), *digest, "put_small takes verified bytes");
        if self.contains(digest, bytes.len() as u64) {
            return Ok(());
        }
        self.reserve(bytes.len() as u64)?;
        let path = self.blob_path(digest);
        AtomicFile::write(&path, bytes).map_err(StoreError::io(&path))
    }

    /// Stores the blob that `write` writes, which is also told where, for its errors; returns its digest and size, and
    /// keeps it. Blocking.
    pub(super) fn put_written<E: From<StoreError>>(
        &self,
        write: impl FnOnce(&mut dyn Write, &Path) -> Result<(), E>,
    ) -> Result<(Digest, u64, Lease), E> {
        let folder = self.blobs();
        let file = AtomicFile::create(&folder).map_err(StoreError::io(&folder))?;
        let written =
            Hashed::write_all_of(file.file(), |out| write(out, &folder), |error| StoreError::io(&folder)(error).into());
        // What is written counts as used already.
        let kept = written.and_then(|(digest, size)| {
            self.reserve(0)?;
            Ok((digest, size, self.lease(&[digest])?))
        });
        match kept {
            Ok((digest, size, lease)) => {
                let path = self.blob_path(&digest);
                file.commit(&path).map_err(StoreError::io(&path))?;
                Ok((digest, size, lease))
            }
            Err(error) => {
                file.discard();
                Err(error)
            }
        }
    }

    /// Copies a blob out of `source`, checking it on the way. Blocking.
    pub(super) fn put_from(&self, expected: ExpectedBlob, source: &mut dyn Read) -> Result<(), BlobError> {
        let mut writer = BlobWriter::create(self, expected)?;
        let mut chunk = vec![0; COPY_CHUNK];
        loop {
            let count = match source.read(&mut chunk) {
                Ok(0) => return writer.finish(),
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(source) => {
                    let path = writer.discard();
                    return Err(StoreError::io(&path)(source).into());
                }
            };
            writer = writer.write(&chunk[..count])?;
        }
    }

    /// Remembers what `reference` resolved to for `platform`. Blocking.
    pub(super) fn remember(
        &self,
        reference: &Reference,
        platform: &Platform,
        manifest: &Digest,
    ) -> Result<(), StoreError> {
        // One that finds the old content to lead nowhere would remove the new.
        let _no_collector = self.lock_shared()?;
        let path = self.reference_path(reference, platform);
        AtomicFile::write(&path, format!("{manifest}\n{reference}\n").as_bytes()).map_err(StoreError::io(&path))
    }

    /// The image manifest `reference` last resolved to for `platform`, if known. Blocking.
    pub(super) fn recall(&self, reference: &Reference, platform: &Platform) -> Option<Digest> {
        fs::read_to_string(self.reference_path(reference, platform)).ok()?.lines().next()?.parse().ok()
    }

    /// A reference means one image for each platform; the usual one goes without saying.
    fn reference_path(&self, reference: &Reference, platform: &Platform) -> PathBuf {
        let mut name = reference.to_string();
        if !platform.serves(&Platform::default()) {
            name = format!("{name} {platform}");
        }
        self.references().join(Digest::of(name.as_bytes()).hex())
    }

    /// The image of a manifest, if every blob of it is here. Blocking.
    pub(super) fn load(&self, manifest: &Digest) -> Result<Option<Image>, ManifestError> {
        let Some(bytes) = self.read_small(manifest, Manifest::MAX_SIZE)? else { return Ok(None) };
        let Resolved::Image(parsed) = Resolved::parse(&bytes)? else { return Ok(None) };
        let Some(config) = self.read_small(&parsed.config.digest, ImageConfig::MAX_SIZE)? else { return Ok(None) };
        if parsed.layers.iter().any(|layer| !self.contains(&layer.digest, layer.size)) {
            return Ok(None);
        }
        self.assemble(*manifest, &parsed, &config).map(Some)
    }

    /// Joins a manifest and its configuration to an image, which keeps its blobs from now on. Blocking.
    pub(super) fn assemble(&self, digest: Digest, manifest: &Manifest, config: &[u8]) -> Result<Image, ManifestError> {
        let (config, diff_ids) = ImageConfig::parse(config)?;
        if diff_ids.len() != manifest.layers.len() {
            return Err(ManifestError::LayerCount { manifest: manifest.layers.len(), config: diff_ids.len() });
        }
        let mut needs = vec![digest, manifest.config.digest, chain_id(&diff_ids)];
        let layers = manifest.layers.iter().zip(diff_ids);
        let layers: Vec<_> =
            layers.map(|(layer, diff_id)| Layer { digest: layer.digest, diff_id, size: layer.size }).collect();
        needs.extend(layers.iter().flat_map(|layer| [layer.digest, layer.diff_id]));
        Ok(Image::new(digest, config, layers, self.clone(), self.lease(&needs)?))
    }
}

/// What a blob must turn out to be.
#[derive(Clone, Debug)]
pub(super) struct ExpectedBlob {
    /// For messages: "layer 2", "configuration"...
    pub(super) what: String,
    pub(super) digest: Digest,
    pub(super) size: u64,
}

/// A blob on its way into the store. All methods block; on an error the file is gone.
#[derive(Debug)]
pub(super) struct BlobWriter {
    file: AtomicFile,
    target: PathBuf,
    expected: ExpectedBlob,
    hasher: Sha256,
    written: u64,
}

impl BlobWriter {
    pub(super) fn create(store: &ImageStore, expected: ExpectedBlob) -> Result<Self, StoreError> {
        store.reserve(expected.size)?;
        let folder = store.blobs();
        let file = AtomicFile::create(&folder).map_err(StoreError::io(&folder))?;
        let target = store.blob_path(&expected.digest);
        Ok(Self { file, target, expected, hasher: Sha256::new(), written: 0 })
    }

    /// How many bytes it has.
    pub(super) const fn written(&self) -> u64 {
        self.written
    }

    pub(super) fn write(mut self, bytes: &[u8]) -> Result<Self, BlobError> {
        self.written += bytes.len() as u64;
        if self.written > self.expected.size {
            let limit = self.expected.size;
            let what = std::mem::take(&mut self.expected.what);
            self.discard();
            return Err(BlobError::TooLarge { what, limit });
        }
        self.hasher.update(bytes);
        if let Err(source) = self.file.file().write_all(bytes) {
            let path = self.discard();
            return Err(StoreError::io(&path)(source).into());
        }
        Ok(self)
    }

    pub(super) fn finish(self) -> Result<(), BlobError> {
        let Self { file, target, expected, hasher, written } = self;
        let found = Digest::from_hasher(hasher);
        if written == expected.size && found == expected.digest {
            return Ok(file.commit(&target).map_err(StoreError::io(&target))?);
        }
        file.discard();
        if written < expected.size {
            return Err(BlobError::Truncated { what: expected.what, expected: expected.size, found: written });
        }
        Err(BlobError::DigestMismatch { what: expected.what, expected: expected.digest, found })
    }

    /// Removes the file; returns where the blob would have been.
    pub(super) fn discard(self) -> PathBuf {
        self.file.discard();
        self.target
    }
}

/// Hashes and counts what is written.
struct Hashed<W> {
    out: W,
    hasher: Sha256,
    size: u64,
}

impl<W: Write> Hashed<W> {
    /// The digest and size of what `write` writes.
    fn write_all_of<E>(
        out: W,
        write: impl FnOnce(&mut dyn Write) -> Result<(), E>,
        failed: impl FnOnce(io::Error) -> E,
    ) -> Result<(Digest, u64), E> {
        let mut hashed = Hashed { out: BufWriter::with_capacity(COPY_CHUNK, out), hasher: Sha256::new(), size: 0 };
        write(&mut hashed)?;
        hashed.flush().map_err(failed)?;
        Ok((Digest::from_hasher(hashed.hasher), hashed.size))
    }
}

impl<W: Write> Write for Hashed<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.out.write(bytes)?;
        self.hasher.update(&bytes[..count]);
        self.size += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// Runs bounded file work off the executor.
///
/// Dropping the returned future does not interrupt the work, only the wait for it.
pub(crate) async fn run_blocking<T, E>(work: impl FnOnce() -> Result<T, E> + Send + 'static) -> Result<T, E>
where
    T: Send + 'static,
    E: From<StoreError> + Send + 'static,
{
    blocking(work).await.unwrap_or_else(|ShuttingDown| Err(StoreError::Shutdown.into()))
}
