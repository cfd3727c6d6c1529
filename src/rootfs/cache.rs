//! Finished filesystem images on disk, by what they were made of.
//!
//! `<cache>/<hex>.erofs`, where `<hex>` is the sha256 of the format version and the layers' digests.
//! Images that share all layers share the file, whatever their configuration. A file gets its name
//! complete and synced; several processes may build the same one, and the last rename wins over
//! identical bytes.

use std::fs;
use std::fs::File;
use std::io;
use std::io::Read;
use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;

use crate::image::AtomicFile;
use crate::image::Digest;
use crate::image::Image;
use crate::image::StoreError;
use crate::image::run_blocking;
use crate::rootfs::RootImage;
use crate::rootfs::erofs;
use crate::rootfs::error::RootfsError;
use crate::rootfs::limits::Limits;

/// Raised when the same layers give other bytes than before, so that old files are not taken.
const FORMAT: &str = "kiln erofs 2";

/// A folder of filesystem images. Cheap to clone.
#[derive(Clone, Debug)]
pub struct RootfsCache {
    folder: Arc<Path>,
    limits: Limits,
}

impl RootfsCache {
    /// Opens the cache in `folder`, creating it if missing and removing what killed builds left.
    ///
    /// # Errors
    ///
    /// [`RootfsError::Io`] when the folder cannot be created or read.
    ///
    /// # Cancel safety
    ///
    /// Safe to drop; the folder may have been created.
    pub async fn open(folder: impl Into<PathBuf>) -> Result<Self, RootfsError> {
        let folder: PathBuf = folder.into();
        run_blocking(move || {
            fs::create_dir_all(&folder)
                .and_then(|()| AtomicFile::sweep(&folder))
                .map_err(|source| RootfsError::Io { path: folder.clone(), source })?;
            Ok(Self { folder: folder.into(), limits: Limits::default() })
        })
        .await
    }

    /// Opens the user's cache, `~/.cache/kiln/rootfs`.
    ///
    /// # Errors
    ///
    /// As [`RootfsCache::open`]; [`RootfsError::Store`] when there is no home folder.
    ///
    /// # Cancel safety
    ///
    /// Safe to drop.
    pub async fn open_default() -> Result<Self, RootfsError> {
        let home = std::env::home_dir().ok_or(StoreError::NoHome)?;
        Self::open(home.join(".cache/kiln/rootfs")).await
    }

    /// Sets how much an image may ask of this host.
    #[must_use]
    pub const fn limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// The cache's folder.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    pub(super) const fn current_limits(&self) -> Limits {
        self.limits
    }

    /// Where the image's filesystem is or will be.
    pub(super) fn place(&self, image: &Image) -> RootImage {
        let layers = image.layers().iter().map(|layer| format!("{}\n", layer.diff_id()));
        let digest = Digest::of(format!("{FORMAT}\n{}", layers.collect::<String>()).as_bytes());
        RootImage { path: self.folder.join(format!("{}.erofs", digest.hex())), digest }
    }
}

/// Whether a finished image is there and whole as far as its superblock tells. Blocking.
pub(super) fn is_present(path: &Path) -> io::Result<bool> {
    let mut block0 = [0; erofs::BLOCK];
    let mut file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        result => result?,
    };
    match file.read_exact(&mut block0) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(false),
        result => result?,
    }
    let length = file.metadata()?.len();
    Ok(erofs::superblock_blocks(&block0).is_some_and(|blocks| u64::from(blocks) * erofs::BLOCK as u64 == length))
}
