//! Random-access bytes behind a block device: where root filesystems and virtio-blk meet.
//!
//! Read-only, as a root image shared by many guests must be. Calls may block; they are made on a
//! device's own thread.

use std::fmt::Debug;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::units::Bytes;

/// Bytes that a block device serves.
pub trait BlockBackend: Debug + Send + Sync {
    /// How many there are; does not change.
    fn size(&self) -> Bytes;

    /// Fills `buf` from byte `offset` on.
    ///
    /// # Errors
    /// The host's, and `UnexpectedEof` when the range leaves the backend.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;
}

/// A file, opened for reading. Its size is taken once: a file that shrinks gives read errors.
#[derive(Debug)]
pub struct FileBackend {
    file: File,
    size: Bytes,
}

impl FileBackend {
    /// Opens the file at `path`.
    ///
    /// # Errors
    /// The host's.
    pub fn open(path: &Path) -> io::Result<Self> {
        Self::new(File::open(path)?)
    }

    /// Serves an open file.
    ///
    /// # Errors
    /// The host's, when the file's size cannot be found out.
    pub fn new(file: File) -> io::Result<Self> {
        let size = Bytes(file.metadata()?.len());
        Ok(Self { file, size })
    }
}

impl BlockBackend for FileBackend {
    fn size(&self) -> Bytes {
        self.size
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_file_is_read_at_offsets_and_not_past_its_end() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"0123456789").unwrap();
        let backend = FileBackend::new(file).unwrap();
        assert_eq!(backend.size(), Bytes(10));
        let mut buf = [0; 4];
        backend.read_at(6, &mut buf).unwrap();
        assert_eq!(&buf, b"6789");
        assert_eq!(backend.read_at(7, &mut buf).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
