//! The digests of files that hardly ever change, such as a guest kernel, so that they need not be read at each start.
//!
//! ```text
//! <store>/digests/<hex>   the digest of a file; <hex> = sha256 of what tells that it is still the same
//! ```

use std::fs;
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::Duration;
use std::time::SystemTime;

use crate::image::atomic_file::AtomicFile;
use crate::image::digest::Digest;
use crate::image::store::ImageStore;

/// Coarser than the clock of any file system.
const SETTLED: Duration = Duration::from_secs(2);

/// Digests of files, remembered in a store.
///
/// A file counts as the same while device, inode, size and both times are. One that was changed within the last moments
/// is read each time: the host's clock for files is coarse, so it may change once more without a trace.
#[derive(Debug)]
pub(crate) struct FileDigests {
    folder: PathBuf,
}

impl ImageStore {
    pub(super) fn digests(&self) -> PathBuf {
        self.root().join("digests")
    }

    pub(crate) fn file_digests(&self) -> FileDigests {
        FileDigests { folder: self.digests() }
    }
}

impl FileDigests {
    /// The digest of `file`, from `read` unless it is known. Blocking.
    pub(crate) fn of(&self, file: &File, read: impl FnOnce() -> io::Result<Digest>) -> io::Result<Digest> {
        let meta = file.metadata()?;
        let times = [meta.mtime(), meta.mtime_nsec(), meta.ctime(), meta.ctime_nsec()];
        let stamp = format!("{} {} {} {times:?}", meta.dev(), meta.ino(), meta.len());
        let place = self.folder.join(Digest::of(stamp.as_bytes()).hex());
        if let Some(known) = fs::read_to_string(&place).ok().and_then(|text| text.trim_end().parse().ok()) {
            return Ok(known);
        }
        let digest = read()?;
        let changed = SystemTime::UNIX_EPOCH + Duration::from_secs(meta.ctime().max(0) as u64);
        if changed.elapsed().is_ok_and(|age| age > SETTLED) {
            AtomicFile::write(&place, format!("{digest}\n").as_bytes())?;
        }
        Ok(digest)
    }
}
