//! The content file of a converted layer: the files too long to be kept beside an inode, one after another.
//!
//! Each starts at a block boundary, in the order of the archive, and the last is filled up to one. Long stretches of zeros
//! are holes. Whatever refers to the file has its length, so that one cut short is noticed.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::rootfs::erofs::BLOCK;
use crate::rootfs::error::LayerErrorKind;
use crate::rootfs::tar_reader::Piece;

/// Gathered before it is written, in bytes: a system call for each small file would be most of the work.
const BUFFER: usize = 1 << 20;

/// Stretches of zeros are left out in pieces of this size, in bytes; smaller ones would cost more extents than they save.
const HOLE: usize = 64 << 10;

/// Why a content could not be stored.
#[derive(Debug)]
pub(super) enum AppendError {
    /// The archive's fault.
    Layer(LayerErrorKind),
    /// The host's.
    Write(io::Error),
}

/// Appends contents to a file that is empty at first.
#[derive(Debug)]
pub(super) struct ContentWriter<'a> {
    file: &'a File,
    buffer: Box<[u8]>,
    filled: usize,
    /// Where the buffer goes, in bytes; a multiple of its size.
    position: u64,
    /// The first free block.
    next: u32,
}

impl<'a> ContentWriter<'a> {
    pub(super) fn new(file: &'a File) -> Self {
        Self { file, buffer: vec![0; BUFFER].into(), filled: 0, position: 0, next: 0 }
    }

    /// Stores a content of exactly `size` bytes, of which `next` gives piece after piece; returns the block it starts at.
    pub(super) fn append(
        &mut self,
        mut next: impl FnMut(&mut [u8]) -> Result<Piece, LayerErrorKind>,
        size: u64,
    ) -> Result<u32, AppendError> {
        let start = self.next;
        let limit = LayerErrorKind::Limit { what: "blocks of content", limit: u64::from(u32::MAX) };
        let blocks = u32::try_from(size.div_ceil(BLOCK as u64)).ok();
        let end = blocks.and_then(|blocks| start.checked_add(blocks)).ok_or(AppendError::Layer(limit))?;
        let mut left = size;
        while left > 0 {
            let free = &mut self.buffer[self.filled..];
            let wanted = usize::try_from(left).unwrap_or(usize::MAX).min(free.len());
            let length = match next(&mut free[..wanted]).map_err(AppendError::Layer)? {
                Piece::End => return Err(AppendError::Layer(LayerErrorKind::Truncated)),
                Piece::Data(count) => {
                    self.advance(count)?;
                    count as u64
                }
                Piece::Hole(length) => {
                    self.hole(length.min(left))?;
                    length
                }
            };
            left = left.saturating_sub(length);
        }
        self.pad()?;
        self.next = end;
        Ok(start)
    }

    /// Zeros, of which only those that share a buffer with something else are looked at.
    fn hole(&mut self, mut length: u64) -> Result<(), AppendError> {
        let buffer = self.buffer.len() as u64;
        while length > 0 {
            if self.filled == 0 && length >= buffer {
                let whole = length - length % buffer;
                self.position += whole;
                length -= whole;
                continue;
            }
            let free = &mut self.buffer[self.filled..];
            let count = usize::try_from(length).unwrap_or(usize::MAX).min(free.len());
            free[..count].fill(0);
            self.advance(count)?;
            length -= count as u64;
        }
        Ok(())
    }

    fn pad(&mut self) -> Result<(), AppendError> {
        // The buffer is a whole number of blocks, so this fills it at most.
        let padding = self.filled.next_multiple_of(BLOCK) - self.filled;
        self.buffer[self.filled..][..padding].fill(0);
        self.advance(padding)
    }

    fn advance(&mut self, count: usize) -> Result<(), AppendError> {
        self.filled += count;
        if self.filled == self.buffer.len() { self.flush().map_err(AppendError::Write) } else { Ok(()) }
    }

    fn flush(&mut self) -> io::Result<()> {
        let bytes = &self.buffer[..self.filled];
        let mut data = 0..0;
        for (index, piece) in bytes.chunks(HOLE).enumerate() {
            let start = index * HOLE;
            if piece.iter().all(|byte| *byte == 0) {
                self.file.write_all_at(&bytes[data.clone()], self.position + data.start as u64)?;
                data = start + piece.len()..start + piece.len();
            } else {
                data.end = start + piece.len();
            }
        }
        self.file.write_all_at(&bytes[data.clone()], self.position + data.start as u64)?;
        self.position += self.filled as u64;
        self.filled = 0;
        Ok(())
    }

    /// Writes what is left; returns the file's length in blocks.
    pub(super) fn finish(mut self) -> io::Result<u32> {
        self.flush()?;
        // A hole at the end has not made it longer.
        self.file.set_len(u64::from(self.next) * BLOCK as u64)?;
        Ok(self.next)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::io::Seek;
    use std::os::unix::fs::MetadataExt;

    use proptest::prelude::*;

    use super::*;

    /// The pieces of a content that is in memory.
    fn pieces(mut content: &[u8]) -> impl FnMut(&mut [u8]) -> Result<Piece, LayerErrorKind> {
        move |buffer| {
            Ok(match content.read(buffer).unwrap() {
                0 => Piece::End,
                count => Piece::Data(count),
            })
        }
    }

    #[test]
    fn a_hole_of_a_tebibyte_takes_neither_time_nor_room() {
        let mut file = tempfile::tempfile().unwrap();
        let mut writer = ContentWriter::new(&file);
        let mut parts = [Piece::Data(3), Piece::Hole((1 << 40) + 5), Piece::Data(4)].into_iter();
        let next = |buffer: &mut [u8]| {
            let piece = parts.next().unwrap();
            if let Piece::Data(count) = piece {
                buffer[..count].fill(9);
            }
            Ok(piece)
        };
        writer.append(next, (1 << 40) + 12).unwrap();
        writer.finish().unwrap();
        assert!(file.metadata().unwrap().blocks() * 512 <= 1 << 20);
        let mut end = [1; 8];
        file.seek(io::SeekFrom::Start((1 << 40) + 7)).unwrap();
        file.read_exact(&mut end).unwrap();
        assert_eq!(end, [0, 9, 9, 9, 9, 0, 0, 0]);
    }

    #[test]
    fn zeros_take_no_room_and_read_as_zeros() {
        let mut file = tempfile::tempfile().unwrap();
        let mut writer = ContentWriter::new(&file);
        let zeros = vec![0; 8 << 20];
        assert_eq!(writer.append(pieces(&zeros), zeros.len() as u64).unwrap(), 0);
        assert_eq!(writer.append(pieces(&[7; 5000]), 5000).unwrap(), 2048);
        assert_eq!(writer.append(pieces(&zeros[..1 << 20]), 1 << 20).unwrap(), 2050);
        assert_eq!(writer.finish().unwrap(), 2306);
        let metadata = file.metadata().unwrap();
        assert_eq!(metadata.len(), 2306 * 4096);
        assert!(metadata.blocks() * 512 <= 256 << 10, "{} sectors", metadata.blocks());
        let mut bytes = Vec::new();
        file.rewind().unwrap();
        file.read_to_end(&mut bytes).unwrap();
        let nonzero: Vec<_> = bytes.iter().enumerate().filter(|(_, byte)| **byte != 0).map(|(at, _)| at).collect();
        assert_eq!((nonzero.first(), nonzero.last()), (Some(&(8 << 20)), Some(&((8 << 20) + 4999))));
    }

    #[test]
    fn a_content_that_ends_early_is_the_archives_fault() {
        let file = tempfile::tempfile().unwrap();
        let error = ContentWriter::new(&file).append(pieces(&[1; 100]), 2000).unwrap_err();
        assert!(matches!(error, AppendError::Layer(LayerErrorKind::Truncated)));
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn contents_are_where_they_are_said_to_be(
            contents in proptest::collection::vec((0..400_000_usize, 0..3_u8), 0..12),
        ) {
            let mut file = tempfile::tempfile().unwrap();
            let mut writer = ContentWriter::new(&file);
            let mut expected = Vec::new();
            for (size, value) in contents {
                let content = vec![value; size];
                let start = writer.append(pieces(&content), size as u64).unwrap();
                prop_assert_eq!(u64::from(start) * 4096, expected.len() as u64);
                expected.extend_from_slice(&content);
                expected.resize(expected.len().next_multiple_of(4096), 0);
            }
            prop_assert_eq!(u64::from(writer.finish().unwrap()) * 4096, expected.len() as u64);
            let mut bytes = Vec::new();
            file.rewind().unwrap();
            file.read_to_end(&mut bytes).unwrap();
            prop_assert!(bytes == expected);
        }
    }
}
