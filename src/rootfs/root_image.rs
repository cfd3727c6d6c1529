//! A finished root filesystem: the files that are its disk, and writing them out as one.

use std::fs::File;
use std::io;
use std::io::Read;
use std::io::Seek;
use std::io::SeekFrom;
use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;

use rustix::fs::SeekFrom as RawSeek;
use rustix::io::Errno;
use tokio_util::sync::CancellationToken;

use crate::image::AtomicFile;
use crate::image::Digest;
use crate::image::run_blocking;
use crate::rootfs::error::RootfsError;
use crate::units::Bytes;

/// Copied between two looks at whether anybody still waits, in bytes.
const PIECE: u64 = 16 << 20;

/// A finished root filesystem: files that, one after another, are a read-only EROFS image.
///
/// The first has the metadata of this image, the others the contents of its layers, which other images share. Each is a
/// multiple of 4 KiB long and never changes while it has its name. [`ConcatBackend`](crate::block::ConcatBackend) makes
/// one disk of them, [`RootImage::write_to`] one file.
///
/// Cheap to clone. Dropping it does nothing: the files stay in the image's store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RootImage {
    files: Arc<[PathBuf]>,
    /// Of each file, in bytes.
    lengths: Arc<[u64]>,
    digest: Digest,
}

impl RootImage {
    pub(super) fn new(parts: impl Iterator<Item = (PathBuf, u64)>, digest: Digest) -> Self {
        let (files, lengths): (Vec<_>, Vec<_>) = parts.unzip();
        Self { files: files.into(), lengths: lengths.into(), digest }
    }

    /// The files, in the order in which they make a disk.
    #[must_use]
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// Names what the files hold together: same digest, same bytes.
    #[must_use]
    pub const fn digest(&self) -> &Digest {
        &self.digest
    }

    /// Length of all files together. They may take less room: long stretches of zeros are holes.
    #[must_use]
    pub fn size(&self) -> Bytes {
        Bytes(self.lengths.iter().sum())
    }

    /// The files with their lengths in bytes.
    pub(super) fn parts(&self) -> impl Iterator<Item = (&Path, u64)> {
        self.files.iter().map(PathBuf::as_path).zip(self.lengths.iter().copied())
    }

    /// Writes the image to `path` as one EROFS file, for tools and other machines; holes stay holes.
    ///
    /// The file appears whole or not at all, and replaces what had its name.
    ///
    /// # Errors
    ///
    /// [`RootfsError::DiskFull`], and [`RootfsError::Io`] for all else that a file system can say; also when the image's
    /// files have been removed or changed since it was built.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future abandons the copy at the next piece of some megabytes and removes what it has written.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn f(image: kiln::Image) -> Result<(), kiln::RootfsError> {
    /// kiln::rootfs::build(&image).await?.write_to("root.erofs").await?;
    /// // mount -t erofs -o loop root.erofs /mnt
    /// # Ok(()) }
    /// ```
    pub async fn write_to(&self, path: impl Into<PathBuf>) -> Result<(), RootfsError> {
        let abandoned = CancellationToken::new();
        let _abandon_on_drop = abandoned.clone().drop_guard();
        let (root, path) = (self.clone(), path.into());
        run_blocking(move || root.write_blocking(&path, &abandoned)).await
    }

    fn write_blocking(&self, path: &Path, abandoned: &CancellationToken) -> Result<(), RootfsError> {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let file = AtomicFile::create(folder).map_err(RootfsError::io(folder))?;
        if let Err(error) = self.copy_all(path, file.file(), abandoned) {
            file.discard();
            return Err(error);
        }
        // A bare name has the empty path for a folder, which cannot be opened.
        let target = path.file_name().map(|name| folder.join(name));
        let target = target.ok_or_else(|| RootfsError::io(path)(io::ErrorKind::InvalidInput.into()))?;
        file.commit(&target).map_err(RootfsError::io(path))
    }

    fn copy_all(&self, path: &Path, out: &File, abandoned: &CancellationToken) -> Result<(), RootfsError> {
        let mut start = 0;
        for (part, length) in self.parts() {
            let input = File::open(part).map_err(RootfsError::io(part))?;
            let found = input.metadata().map_err(RootfsError::io(part))?.len();
            if found != length {
                let changed =
                    io::Error::new(io::ErrorKind::InvalidData, "the file has changed since the image was built");
                return Err(RootfsError::io(part)(changed));
            }
            copy(&input, length, out, start, abandoned).map_err(RootfsError::io(path))?;
            start += length;
        }
        out.set_len(start).map_err(RootfsError::io(path))
    }
}

/// Copies the data of `input`, and none of its holes, to `start` and on.
fn copy(mut input: &File, length: u64, mut out: &File, start: u64, abandoned: &CancellationToken) -> io::Result<()> {
    let mut at = 0;
    while let Some(data) = next_data(input, at)? {
        at = data;
        let end = rustix::fs::seek(input, RawSeek::Hole(at))?.min(length).min(at + PIECE);
        if abandoned.is_cancelled() {
            return Err(io::ErrorKind::Interrupted.into());
        }
        input.seek(SeekFrom::Start(at))?;
        out.seek(SeekFrom::Start(start + at))?;
        let copied = io::copy(&mut input.take(end - at), &mut out)?;
        if copied == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        at += copied;
    }
    Ok(())
}

/// Where data is found from `at` on; `None` if there are only holes.
fn next_data(input: &File, at: u64) -> io::Result<Option<u64>> {
    match rustix::fs::seek(input, RawSeek::Data(at)) {
        Err(Errno::NXIO) => Ok(None),
        result => Ok(Some(result?)),
    }
}
