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
use crate::units::PAGE_SIZE;

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

/// Files one after another, as one disk: a root filesystem whose files' contents are shared with other images.
///
/// Sizes are taken once: a file that shrinks gives read errors, and nothing behind it moves.
///
/// ```no_run
/// # fn f() -> std::io::Result<()> {
/// use kiln::block::{BlockBackend, ConcatBackend};
/// let disk = ConcatBackend::open(["root.erofs", "layer.content"])?;
/// println!("{} bytes", disk.size().0);
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct ConcatBackend {
    /// In order, none of them empty.
    segments: Vec<Segment>,
    size: Bytes,
}

#[derive(Debug)]
struct Segment {
    file: File,
    /// Where it starts and ends on the disk, in bytes.
    start: u64,
    end: u64,
}

impl ConcatBackend {
    /// What each file's length is a multiple of, in bytes: a page of the guest, so that no page is in two files.
    pub const ALIGNMENT: u64 = PAGE_SIZE;

    /// Opens the files at `paths`, in this order.
    ///
    /// # Errors
    /// The host's, and `InvalidInput` when a file's length is not a multiple of [`ConcatBackend::ALIGNMENT`].
    pub fn open<P: AsRef<Path>>(paths: impl IntoIterator<Item = P>) -> io::Result<Self> {
        let files: Vec<_> = paths.into_iter().map(|path| File::open(path.as_ref())).collect::<Result<_, _>>()?;
        Self::new(files)
    }

    /// Serves open files, in this order.
    ///
    /// # Errors
    /// As [`ConcatBackend::open`].
    pub fn new(files: impl IntoIterator<Item = File>) -> io::Result<Self> {
        let (mut segments, mut start) = (Vec::new(), 0_u64);
        for file in files {
            let length = file.metadata()?.len();
            if length % Self::ALIGNMENT != 0 {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidInput,
                    "a part of a disk is not a whole number of pages",
                ));
            }
            let end = start.checked_add(length).ok_or(io::ErrorKind::InvalidInput)?;
            if length > 0 {
                segments.push(Segment { file, start, end });
            }
            start = end;
        }
        Ok(Self { segments, size: Bytes(start) })
    }
}

impl BlockBackend for ConcatBackend {
    fn size(&self) -> Bytes {
        self.size
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let end = offset.checked_add(buf.len() as u64);
        if end.is_none_or(|end| end > self.size.0) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let (mut at, mut rest) = (offset, buf);
        let first = self.segments.partition_point(|segment| segment.end <= offset);
        for segment in &self.segments[first..] {
            let here = usize::try_from(segment.end - at).unwrap_or(usize::MAX).min(rest.len());
            let (part, after) = rest.split_at_mut(here);
            segment.file.read_exact_at(part, at - segment.start)?;
            (at, rest) = (at + here as u64, after);
            if rest.is_empty() {
                break;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;

    use super::*;

    fn file_of(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    #[test]
    fn parts_that_are_not_whole_pages_are_refused() {
        let error = ConcatBackend::new([file_of(&[1; 4096]), file_of(&[2; 4095])]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        assert_eq!(ConcatBackend::new([]).unwrap().size(), Bytes(0));
    }

    #[test]
    fn a_part_that_shrinks_is_an_error_and_moves_nothing() {
        let first = file_of(&[1; 8192]);
        let disk = ConcatBackend::new([first.try_clone().unwrap(), file_of(&[2; 4096])]).unwrap();
        first.set_len(4096).unwrap();
        let mut buf = [0; 4096];
        assert_eq!(disk.read_at(4096, &mut buf).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        disk.read_at(8192, &mut buf).unwrap();
        assert_eq!(buf, [2; 4096]);
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn parts_read_as_if_they_were_one_file(
            pages in proptest::collection::vec(0..4_usize, 0..6),
            reads in proptest::collection::vec((0..70_000_u64, 0..20_000_usize), 1..20),
        ) {
            let mut whole = Vec::new();
            let files: Vec<_> = pages.iter().enumerate().map(|(part, pages)| {
                let bytes: Vec<_> = (0..pages * 4096).map(|at| (at as u8).wrapping_mul(31) ^ part as u8).collect();
                whole.extend_from_slice(&bytes);
                file_of(&bytes)
            }).collect();
            let disk = ConcatBackend::new(files).unwrap();
            prop_assert_eq!(disk.size(), Bytes(whole.len() as u64));
            for (offset, length) in reads {
                let mut buf = vec![0xee; length];
                let read = disk.read_at(offset, &mut buf);
                match whole.get(offset as usize..offset as usize + length) {
                    Some(expected) => {
                        prop_assert!(read.is_ok());
                        prop_assert_eq!(&buf, expected);
                    }
                    None => prop_assert_eq!(read.unwrap_err().kind(), io::ErrorKind::UnexpectedEof),
                }
            }
        }

        #[test]
        fn offsets_beyond_any_disk_are_errors(offset in any::<u64>(), length in 1..5000_usize) {
            let disk = ConcatBackend::new([file_of(&[0; 4096])]).unwrap();
            prop_assume!(offset > 4096);
            prop_assert!(disk.read_at(offset, &mut vec![0; length]).is_err());
        }
    }

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
