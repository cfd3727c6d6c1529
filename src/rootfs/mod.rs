//! From an image's layers to one read-only filesystem that a guest can mount.
//!
//! ```text
//! layer 0 (tar, gzip, zstd) ── convert, once ──> index, content ─┐
//! layer 1 ──────────────────── convert, once ──> index, content ─┼─ join ──> metadata of the image's EROFS
//! ...                                                            ┘
//!
//! the guest's disk: [metadata of this image][content of layer 0][content of layer 1]...
//! ```
//!
//! `convert` reads an archive once, whatever number of images has the layer, and splits it: what its files hold
//! goes to a content file, block by block as a filesystem wants it, everything else to an index. `join` applies the
//! indexes in order to a tree in memory and writes an EROFS image that is metadata alone; its inodes point behind its own
//! end, into the contents, because the guest sees all files one after another as one disk. So the first start of an image
//! costs its new layers, and the second start of anything nothing.
//!
//! Nothing is unpacked onto the host's file system, so no archive can write outside its image, no
//! root is needed to keep owners and devices, and it makes no difference what the host's file
//! system can represent. How names are walked, and what is refused, is in `resolve`.
//!
//! Memory is bounded: a conversion holds three megabytes of buffers, and what a decompressor needs (zstd at most 128 MiB for
//! its window), for each of at most four layers at a time; a join holds the tree, which
//! [`Limits::metadata_bytes`] bounds, and the places of its inodes.

mod archive;
mod budget;
mod builder;
mod content;
mod convert;
mod derived;
mod erofs;
mod error;
mod index;
mod join;
mod layer;
mod limits;
mod pax;
mod record;
mod resolve;
mod root_image;
mod tar_reader;
mod tree;

use crate::image::Image;

pub use builder::Builder;
pub use error::LayerError;
pub use error::LayerErrorKind;
pub use error::RootfsError;
pub use limits::Limits;
pub use root_image::RootImage;

/// Builds the root filesystem of `image` with the default [`Limits`], or finds it in the image's store.
///
/// # Errors
///
/// As [`Builder::build`].
///
/// # Cancel safety
///
/// As [`Builder::build`]: dropping the future abandons the build and leaves nothing half-written.
///
/// # Examples
///
/// ```no_run
/// # async fn f() -> Result<(), Box<dyn std::error::Error>> {
/// use kiln::image::Image;
/// use kiln::rootfs;
/// let image = Image::from_oci_layout("busybox").await?;
/// let root = rootfs::build(&image).await?;
/// root.write_to("root.erofs").await?;
/// println!("mount -t erofs -o loop root.erofs /mnt");
/// # Ok(()) }
/// ```
pub async fn build(image: &Image) -> Result<RootImage, RootfsError> {
    Builder::new(image).build().await
}
