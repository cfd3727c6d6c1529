//! From an image's layers to one read-only filesystem image that a guest can mount.
//!
//! ```text
//! layer 0 (tar, gzip, zstd) ─┐        ┌─ tree: names, owners, modes, attributes (memory)
//! layer 1 ───────────────────┼─ apply ┤
//! ...                        ┘        └─ content (streamed into the file) ──> EROFS, cached by digest
//! ```
//!
//! Nothing is unpacked onto the host's file system, so no archive can write outside its image, no
//! root is needed to keep owners and devices, and it makes no difference what the host's file
//! system can represent. How names are walked, and what is refused, is in `resolve`.

mod cache;
mod erofs;
mod error;
mod layer;
mod limits;
mod pax;
mod resolve;
mod tar_reader;
mod tree;

use std::path::PathBuf;

use tokio_util::sync::CancellationToken;

use crate::image::AtomicFile;
use crate::image::Digest;
use crate::image::Image;
use crate::image::run_blocking;

pub use cache::RootfsCache;
pub use error::LayerError;
pub use error::LayerErrorKind;
pub use error::RootfsError;
pub use limits::Limits;

/// A finished root filesystem image.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RootImage {
    /// The file: a read-only EROFS, a multiple of 4 KiB long. Never changed once it exists.
    pub path: PathBuf,
    /// Names its content: same digest, same bytes.
    pub digest: Digest,
}

/// Builds the root filesystem of `image`, or finds it in `cache`.
///
/// # Errors
///
/// [`RootfsError::Layer`] if a layer is damaged or hostile, others if the host fails; nothing
/// half-written is left in the cache.
///
/// # Cancel safety
///
/// Dropping the future abandons the build at the next piece read of an archive and removes what it
/// has written.
///
/// # Examples
///
/// ```no_run
/// # async fn f() -> Result<(), Box<dyn std::error::Error>> {
/// use kiln::image::Image;
/// use kiln::rootfs::{self, RootfsCache};
/// let image = Image::from_oci_layout("busybox").await?;
/// let root = rootfs::build(&image, &RootfsCache::open_default().await?).await?;
/// println!("mount -t erofs {}", root.path.display());
/// # Ok(()) }
/// ```
pub async fn build(image: &Image, cache: &RootfsCache) -> Result<RootImage, RootfsError> {
    let abandoned = CancellationToken::new();
    let _abandon_on_drop = abandoned.clone().drop_guard();
    let (image, cache) = (image.clone(), cache.clone());
    run_blocking(move || {
        let root = cache.place(&image);
        if cache::is_present(&root.path).map_err(io_at(&root.path))? {
            return Ok(root);
        }
        let file = AtomicFile::create(cache.folder()).map_err(io_at(cache.folder()))?;
        match write(&image, &cache, &file, &root, abandoned) {
            Ok(()) => file.commit(&root.path).map_err(io_at(&root.path))?,
            Err(error) => {
                file.discard();
                return Err(error);
            }
        }
        tracing::debug!(image = %image.digest(), path = %root.path.display(), "root filesystem built");
        Ok(root)
    })
    .await
}

fn write(
    image: &Image,
    cache: &RootfsCache,
    file: &AtomicFile,
    root: &RootImage,
    abandoned: CancellationToken,
) -> Result<(), RootfsError> {
    let blocks = erofs::BlockWriter::new(file.file()).map_err(io_at(&root.path))?;
    let mut applier = layer::Applier::new(cache.current_limits(), blocks, abandoned);
    for layer in image.layers() {
        let fail = |kind| LayerError { layer: *layer.digest(), entry: None, kind };
        let blob = image.open_layer(layer).map_err(|error| fail(LayerErrorKind::Read(error)))?;
        applier.apply(layer, blob)?;
    }
    let mut uuid = [0; 16];
    uuid.copy_from_slice(&root.digest.as_bytes()[..16]);
    erofs::finish(&applier.tree, applier.blocks, uuid).map_err(|error| match error {
        erofs::WriteError::Io(source) => RootfsError::Io { path: root.path.clone(), source },
        erofs::WriteError::FormatLimit => RootfsError::FormatLimit,
    })
}

fn io_at(path: &std::path::Path) -> impl FnOnce(std::io::Error) -> RootfsError + '_ {
    move |source| RootfsError::Io { path: path.to_owned(), source }
}
