//! How much an image may ask of this host.

/// Limits on one image's layers taken together. The defaults fit any image in ordinary use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Limits {
    /// Entries of all archives. Default: 2 Mi, about four times the largest images in use.
    pub entries: u64,
    /// Bytes of all archives after decompression: what a decompression bomb runs into. Default:
    /// 64 GiB.
    pub archive_bytes: u64,
    /// Bytes of all files' content, with the holes of sparse files, which an archive need not have: a small one could ask
    /// for any size. Default: 64 GiB.
    pub content_bytes: u64,
    /// Memory for names, owners, attributes, link targets and small files, in bytes. Default: 1 GiB.
    pub metadata_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { entries: 2 << 20, archive_bytes: 64 << 30, content_bytes: 64 << 30, metadata_bytes: 1 << 30 }
    }
}

/// Longest path in an archive: Linux's `PATH_MAX`.
pub(super) const MAX_PATH: usize = 4096;

/// Longest name: Linux's `NAME_MAX` and EROFS's `EROFS_NAME_LEN`.
pub(super) const MAX_NAME: usize = 255;

/// Longest link target: `PATH_MAX` less the terminator.
pub(super) const MAX_TARGET: usize = 4095;

/// Deepest folder: what a path of `PATH_MAX` bytes can name. Archives can build deeper ones through
/// symbolic links; nothing could open them.
pub(super) const MAX_DEPTH: usize = 2048;

/// Links followed in one name: Linux's `MAXSYMLINKS`.
pub(super) const MAX_SYMLINKS: usize = 40;

/// Components of link targets walked in all of an image's names: some seconds of work. An image whose every
/// name leads through `bin -> usr/bin` may have eight million of them; without a bound, a small archive of chained
/// links would cost hours.
pub(super) const MAX_LINK_STEPS: u64 = 16 << 20;

/// Largest extension record of an archive (pax, GNU long name), in bytes: room for all attributes
/// of a file at [`MAX_XATTR_BYTES`] with their framing.
pub(super) const MAX_EXTENSION: u64 = 512 << 10;

/// Runs of data in one sparse file: 16 MiB of memory, and 4 GiB of data with a hole behind every block.
pub(super) const MAX_SPARSE_RUNS: usize = 1 << 20;

/// All attributes of one file, in bytes: what EROFS can keep inline (16-bit count of 4-byte words).
pub(super) const MAX_XATTR_BYTES: usize = 4 * (u16::MAX as usize - 1);

/// Largest attribute value: the VFS's `XATTR_SIZE_MAX` is 65,536, of which EROFS's 16-bit size can
/// say all but the last byte.
pub(super) const MAX_XATTR_VALUE: usize = u16::MAX as usize;
