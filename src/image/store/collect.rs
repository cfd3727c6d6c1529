//! What is in the store, and removing what nobody needs.
//!
//! Needed is what a reference leads to (manifest, configuration, layers, and what was made from those) and what is
//! [leased](super::lease). Everything else is garbage: blobs of images without a name, blobs of pulls that failed, files
//! made from layers that are gone, what killed processes left.

use std::collections::HashMap;
use std::collections::HashSet;
use std::fs;
use std::fs::File;
use std::io;
use std::io::Read;
use std::path::Path;
use std::time::SystemTime;

use crate::image::atomic_file::AtomicFile;
use crate::image::atomic_file::is_temporary;
use crate::image::config::ImageConfig;
use crate::image::digest::Digest;
use crate::image::manifest::Manifest;
use crate::image::manifest::Resolved;
use crate::image::platform::Platform;
use crate::image::store::ImageStore;
use crate::image::store::StoreError;
use crate::image::store::lease::leased;
use crate::image::store::lock::Claim;
use crate::image::store::run_blocking;

/// Longest content of a reference's file: a digest, a reference, a platform.
const MAX_REFERENCE: u64 = 4 << 10;

/// An image that the store has a name for.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct StoredImage {
    /// Its names, sorted.
    pub references: Vec<String>,
    /// Digest of its manifest.
    pub digest: Digest,
    /// What it is made for.
    pub platform: Platform,
    /// What its blobs, and what was made from them, take on disk, in bytes; shared with other images in part.
    pub size: u64,
    /// Whether all of its blobs are here, so that it can be used without a network.
    pub is_complete: bool,
    /// When it was last given one of its names.
    pub named: SystemTime,
}

/// What a collection removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Collected {
    /// Blobs: layers, configurations, manifests.
    pub blobs: u64,
    /// Files made from layers.
    pub derived: u64,
    /// Snapshots that were baked from images.
    pub baked: u64,
    /// Names of images that are not here any more, and what killed processes left.
    pub debris: u64,
    /// What all of it took on disk, in bytes.
    pub bytes: u64,
}

/// What [`ImageStore::verify`] found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Verified {
    /// Blobs that are what their names say.
    pub intact: u64,
    /// Blobs that were not and are removed now: the next pull fetches them again.
    pub removed: Vec<Digest>,
}

impl ImageStore {
    /// The images that have a name, sorted by digest.
    ///
    /// # Errors
    ///
    /// [`StoreError::Io`]; a file of the store that is damaged is no error, its image is left out.
    ///
    /// # Cancel safety
    ///
    /// Safe to drop.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn f() -> Result<(), kiln::image::StoreError> {
    /// for image in kiln::image::ImageStore::open_default().await?.images().await? {
    ///     println!("{:?} {} {} bytes", image.references, image.digest, image.size);
    /// }
    /// # Ok(()) }
    /// ```
    pub async fn images(&self) -> Result<Vec<StoredImage>, StoreError> {
        let store = self.clone();
        run_blocking(move || {
            let names = store.names()?;
            let sizes = Sizes::of(&store)?;
            let mut images: HashMap<Digest, StoredImage> = HashMap::new();
            for name in names {
                let Some(parts) = store.parts(&name.manifest)? else { continue };
                let image = images.entry(name.manifest).or_insert_with(|| StoredImage {
                    references: Vec::new(),
                    digest: name.manifest,
                    platform: parts.platform.clone(),
                    size: parts.all().map(|digest| sizes.of_digest(digest)).sum(),
                    is_complete: parts.layers.iter().all(|(layer, size)| store.contains(layer, *size)),
                    named: name.written,
                });
                image.references.push(name.reference);
                image.named = image.named.max(name.written);
            }
            let mut images: Vec<_> = images.into_values().collect();
            images.iter_mut().for_each(|image| image.references.sort());
            images.sort_by_key(|image| image.digest);
            Ok(images)
        })
        .await
    }

    /// Forgets what `reference` means, whatever the platform; whether it meant something. The image's blobs stay until
    /// [`ImageStore::gc`] finds that nobody needs them.
    ///
    /// # Errors
    ///
    /// [`StoreError::Io`].
    ///
    /// # Cancel safety
    ///
    /// Dropping the future does not stop the removal.
    pub async fn remove(&self, reference: &crate::image::Reference) -> Result<bool, StoreError> {
        let wanted = reference.to_string();
        self.remove_names(move |name| name.reference == wanted).await.map(|count| count > 0)
    }

    /// Forgets every name of the image with this manifest; how many it had.
    ///
    /// # Errors
    ///
    /// [`StoreError::Io`].
    ///
    /// # Cancel safety
    ///
    /// Dropping the future does not stop the removal.
    pub async fn remove_image(&self, manifest: &Digest) -> Result<u64, StoreError> {
        let manifest = *manifest;
        self.remove_names(move |name| name.manifest == manifest).await
    }

    async fn remove_names(&self, is_meant: impl Fn(&Name) -> bool + Send + 'static) -> Result<u64, StoreError> {
        let store = self.clone();
        run_blocking(move || {
            let mut removed = 0;
            for name in store.names()?.iter().filter(|name| is_meant(name)) {
                match fs::remove_file(&name.path) {
                    Ok(()) => removed += 1,
                    // Somebody else removed it.
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    Err(error) => return Err(StoreError::io(&name.path)(error)),
                }
            }
            Ok(removed)
        })
        .await
    }

    /// Removes everything that no name leads to and nobody uses, in whatever process: an [`Image`](crate::image::Image) keeps its own blobs for
    /// as long as it lives, and a running VM what it was started with.
    ///
    /// # Errors
    ///
    /// [`StoreError::Io`], and [`StoreError::Busy`] when another process collects for more than a minute.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future does not stop the removal.
    pub async fn gc(&self) -> Result<Collected, StoreError> {
        let store = self.clone();
        run_blocking(move || store.collect()).await
    }

    /// Reads every blob and removes those that are not what their names say.
    ///
    /// Nothing else needs that: what is damaged is noticed when it is used.
    ///
    /// # Errors
    ///
    /// [`StoreError::Io`].
    ///
    /// # Cancel safety
    ///
    /// Dropping the future stops after the blob that is being read.
    pub async fn verify(&self) -> Result<Verified, StoreError> {
        let store = self.clone();
        let digests = run_blocking(move || store.stored_blobs()).await?;
        let mut verified = Verified::default();
        for digest in digests {
            let store = self.clone();
            let path = store.blob_path(&digest);
            match run_blocking(move || Ok::<_, StoreError>(store.discard_damaged(&digest))).await? {
                Ok(false) => verified.intact += 1,
                Ok(true) => verified.removed.push(digest),
                // Collected meanwhile.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(StoreError::io(&path)(error)),
            }
        }
        Ok(verified)
    }

    /// See [`ImageStore::gc`]. Blocking.
    pub(super) fn collect(&self) -> Result<Collected, StoreError> {
        let _alone = self.lock_exclusive()?;
        let mut needed = leased(&self.leases()).map_err(StoreError::io(&self.leases()))?;
        let mut removed = Collected::default();
        for name in self.names()? {
            match self.parts(&name.manifest)? {
                Some(parts) => needed.extend(parts.all()),
                None => {
                    removed.bytes += remove(&name.path).map_err(StoreError::io(&name.path))?;
                    removed.debris += 1;
                }
            }
        }
        let is_needed = |name: &str| digest_of(name).is_some_and(|digest| needed.contains(&digest));
        (removed.blobs, removed.bytes) = add(sweep(&self.blobs(), is_needed)?, removed.bytes);
        (removed.derived, removed.bytes) = add(sweep(&self.derived(), is_needed)?, removed.bytes);
        let (baked, bytes) = self.collect_baked(|image| needed.contains(image))?;
        (removed.baked, removed.bytes) = add((baked, bytes), removed.bytes);
        removed.debris += self.sweep_debris()?;
        tracing::debug!(?removed, "collected");
        Ok(removed)
    }

    /// Removes what killed processes left; how many files. Blocking.
    pub(super) fn sweep_debris(&self) -> Result<u64, StoreError> {
        let mut removed = 0;
        for folder in [self.blobs(), self.derived(), self.references(), self.leases(), self.baked(), self.digests()] {
            removed += AtomicFile::sweep(&folder).map_err(StoreError::io(&folder))?;
        }
        let claims = self.claims();
        Ok(removed + Claim::sweep(&claims).map_err(StoreError::io(&claims))?)
    }

    fn names(&self) -> Result<Vec<Name>, StoreError> {
        let folder = self.references();
        let mut names = Vec::new();
        for entry in fs::read_dir(&folder).map_err(StoreError::io(&folder))? {
            let path = entry.map_err(StoreError::io(&folder))?.path();
            if !path.file_name().is_some_and(is_temporary)
                && let Some(name) = Name::read(&path)
            {
                names.push(name);
            }
        }
        Ok(names)
    }

    /// What the image of a manifest consists of; `None` if that cannot be told any more. Blocking.
    fn parts(&self, manifest: &Digest) -> Result<Option<Parts>, StoreError> {
        let Some(bytes) = self.read_small(manifest, Manifest::MAX_SIZE)? else { return Ok(None) };
        let Ok(Resolved::Image(parsed)) = Resolved::parse(&bytes) else { return Ok(None) };
        let Some(config) = self.read_small(&parsed.config.digest, ImageConfig::MAX_SIZE)? else { return Ok(None) };
        let Ok((config, diff_ids)) = ImageConfig::parse(&config) else { return Ok(None) };
        let layers = parsed.layers.iter().map(|layer| (layer.digest, layer.size)).collect();
        let made_from = [diff_ids.as_slice(), &[crate::image::chain_id(&diff_ids)]].concat();
        let documents = [*manifest, parsed.config.digest];
        Ok(Some(Parts { documents, layers, made_from, platform: config.platform }))
    }

    /// The digests of all blobs here. Blocking.
    fn stored_blobs(&self) -> Result<Vec<Digest>, StoreError> {
        let folder = self.blobs();
        let entries = fs::read_dir(&folder).map_err(StoreError::io(&folder))?;
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        Ok(names.filter_map(|name| digest_of(&name)).collect())
    }
}

/// A file of `references/`.
struct Name {
    path: std::path::PathBuf,
    manifest: Digest,
    reference: String,
    written: SystemTime,
}

impl Name {
    /// `None` for what is not one, as a crash of the whole machine may leave it.
    fn read(path: &Path) -> Option<Self> {
        let file = File::open(path).ok()?;
        let written = file.metadata().and_then(|meta| meta.modified()).ok()?;
        let mut text = String::new();
        file.take(MAX_REFERENCE).read_to_string(&mut text).ok()?;
        let mut lines = text.lines();
        let (manifest, reference) = (lines.next()?.parse().ok()?, lines.next()?.to_owned());
        Some(Self { path: path.to_owned(), manifest, reference, written })
    }
}

/// What an image consists of.
struct Parts {
    /// Manifest and configuration.
    documents: [Digest; 2],
    /// With their sizes.
    layers: Vec<(Digest, u64)>,
    /// Diff ids and the chain id.
    made_from: Vec<Digest>,
    platform: Platform,
}

impl Parts {
    /// Each once.
    fn all(&self) -> impl Iterator<Item = Digest> {
        let layers = self.layers.iter().map(|(layer, _)| *layer);
        let all = self.documents.into_iter().chain(layers).chain(self.made_from.iter().copied());
        all.collect::<HashSet<_>>().into_iter()
    }
}

/// What the files of each digest take on disk.
struct Sizes(HashMap<Digest, u64>);

impl Sizes {
    fn of(store: &ImageStore) -> Result<Self, StoreError> {
        let mut sizes = HashMap::new();
        for folder in [store.blobs(), store.derived()] {
            for entry in fs::read_dir(&folder).map_err(StoreError::io(&folder))? {
                let entry = entry.map_err(StoreError::io(&folder))?;
                let digest = entry.file_name().to_str().and_then(digest_of);
                // Gone meanwhile counts nothing.
                if let (Some(digest), Ok(meta)) = (digest, entry.metadata()) {
                    *sizes.entry(digest).or_default() += super::quota::occupied(&meta);
                }
            }
        }
        Ok(Self(sizes))
    }

    fn of_digest(&self, digest: Digest) -> u64 {
        self.0.get(&digest).copied().unwrap_or(0)
    }
}

/// The digest at the front of the name of a blob or of a file made from layers.
pub(super) fn digest_of(name: &str) -> Option<Digest> {
    format!("sha256:{}", name.get(..64)?).parse().ok()
}

/// Removes the files of `folder` that are not needed; how many, and what they took. Temporary ones are left to their own
/// sweep, which can tell whether somebody is writing them.
fn sweep(folder: &Path, is_needed: impl Fn(&str) -> bool) -> Result<(u64, u64), StoreError> {
    let (mut files, mut bytes) = (0, 0);
    for entry in fs::read_dir(folder).map_err(StoreError::io(folder))? {
        let entry = entry.map_err(StoreError::io(folder))?;
        let name = entry.file_name();
        if is_temporary(&name) || name.to_str().is_some_and(&is_needed) {
            continue;
        }
        bytes += remove(&entry.path()).map_err(StoreError::io(&entry.path()))?;
        files += 1;
    }
    Ok((files, bytes))
}

/// What the file took.
fn remove(path: &Path) -> io::Result<u64> {
    let bytes = fs::symlink_metadata(path).map(|meta| super::quota::occupied(&meta)).unwrap_or(0);
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(bytes),
    }
}

const fn add((files, bytes): (u64, u64), total: u64) -> (u64, u64) {
    (files, total + bytes)
}
