//! How much a store may take of its disk.

use std::fs;
use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use crate::image::store::ImageStore;
use crate::image::store::StoreError;
use crate::image::store::run_blocking;
use crate::units::Bytes;

/// How to open a store; made by [`ImageStore::options`].
///
/// ```no_run
/// # async fn f() -> Result<(), kiln::image::StoreError> {
/// use kiln::image::ImageStore;
/// use kiln::units::Bytes;
/// let store = ImageStore::options().quota(Bytes::gib(20)).open("/var/lib/app/images").await?;
/// # Ok(()) }
/// ```
#[derive(Clone, Copy, Debug, Default)]
#[must_use = "options do nothing until `open`"]
pub struct StoreOptions {
    pub(super) quota: Option<Bytes>,
}

impl StoreOptions {
    /// What blobs, and the files made from them, may take on disk together; by default whatever there is.
    ///
    /// What would go beyond is refused before it is written, as far as its size is known, after garbage has been collected.
    /// Images that have a name are never removed for it. It holds for what this store value and its clones write, and
    /// counts what others write.
    pub const fn quota(mut self, quota: Bytes) -> Self {
        self.quota = Some(quota);
        self
    }

    /// Opens the store in `root`, creating it if missing and removing what killed writers left.
    ///
    /// # Errors
    ///
    /// [`StoreError::Io`] when the folder cannot be created or read.
    ///
    /// # Cancel safety
    ///
    /// Safe to drop; the folder may have been created.
    pub async fn open(self, root: impl Into<PathBuf>) -> Result<ImageStore, StoreError> {
        let root = root.into();
        run_blocking(move || ImageStore::open_blocking(root, self)).await
    }
}

impl ImageStore {
    /// Makes sure that `needed` more bytes may be written. Blocking.
    pub(crate) fn reserve(&self, needed: u64) -> Result<(), StoreError> {
        let Some(quota) = self.quota() else { return Ok(()) };
        let fits = |used: u64| used.checked_add(needed).is_some_and(|total| total <= quota.0);
        if fits(self.used()?) {
            return Ok(());
        }
        self.collect()?;
        let used = self.used()?;
        if fits(used) {
            Ok(())
        } else {
            Err(StoreError::Quota { limit: quota, used: Bytes(used), needed: Bytes(needed) })
        }
    }

    /// What the store takes on disk, in bytes. Blocking.
    fn used(&self) -> Result<u64, StoreError> {
        let mut used = 0;
        for folder in [self.blobs(), self.derived()] {
            for entry in fs::read_dir(&folder).map_err(StoreError::io(&folder))? {
                // Gone meanwhile counts nothing.
                used += entry.and_then(|entry| entry.metadata()).map(|meta| occupied(&meta)).unwrap_or(0);
            }
        }
        Ok(used + self.baked_size()?)
    }
}

/// What a file takes on disk, holes not counted, in bytes.
pub(super) fn occupied(meta: &Metadata) -> u64 {
    // Of 512 bytes, whatever the file system's own blocks are (stat(2)).
    meta.blocks() * 512
}
