//! The archive inside a layer's blob: decompressed, hashed and counted as it goes by.

use std::fs::File;
use std::io;
use std::io::BufRead;
use std::io::BufReader;
use std::io::Read;

use sha2::Digest as _;
use sha2::Sha256;
use tokio_util::sync::CancellationToken;

use crate::image::Digest;
use crate::rootfs::budget::Budget;
use crate::rootfs::error::LayerErrorKind;

/// The blob's read buffer, in bytes: large, because every refill is a system call.
const READ_BUFFER: usize = 256 << 10;

/// Reads an archive out of a blob, stops a decompression bomb and a conversion that nobody waits for.
pub(super) struct Archive<'a> {
    input: Box<dyn Read + 'a>,
    hasher: Sha256,
    length: u64,
    budget: &'a Budget,
    abandoned: &'a CancellationToken,
}

impl<'a> Archive<'a> {
    /// `watch` is told how much of the blob has been read, in bytes.
    pub(super) fn open(
        blob: File,
        budget: &'a Budget,
        abandoned: &'a CancellationToken,
        watch: impl FnMut(u64) + 'a,
    ) -> io::Result<Self> {
        let input = decompress(Watched { input: blob, done: 0, watch })?;
        Ok(Self { input, hasher: Sha256::new(), length: 0, budget, abandoned })
    }

    /// What went by: its digest, and its length in bytes.
    pub(super) fn finish(self) -> (Digest, u64) {
        (Digest::from_hasher(self.hasher), self.length)
    }
}

impl Read for Archive<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.abandoned.is_cancelled() {
            return Err(io::Error::other(LayerErrorKind::Abandoned));
        }
        let count = self.input.read(buffer)?;
        self.budget.archive_bytes(count as u64).map_err(io::Error::other)?;
        self.length += count as u64;
        self.hasher.update(&buffer[..count]);
        Ok(count)
    }
}

/// The archive inside the blob, by the blob's first bytes.
fn decompress<'a>(blob: impl Read + 'a) -> io::Result<Box<dyn Read + 'a>> {
    let mut blob = BufReader::with_capacity(READ_BUFFER, blob);
    let magic = blob.fill_buf()?;
    if magic.starts_with(&[0x1f, 0x8b]) {
        return Ok(Box::new(flate2::bufread::MultiGzDecoder::new(blob)));
    }
    // A frame, or the skippable frame that some writers of seekable zstd put first (RFC 8878, 3.1).
    let is_skippable = matches!(magic, [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..]);
    if magic.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) || is_skippable {
        return Ok(Box::new(zstd::stream::read::Decoder::with_buffer(blob)?));
    }
    Ok(Box::new(blob))
}

struct Watched<R, F> {
    input: R,
    done: u64,
    watch: F,
}

impl<R: Read, F: FnMut(u64)> Read for Watched<R, F> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.input.read(buffer)?;
        self.done += count as u64;
        (self.watch)(self.done);
        Ok(count)
    }
}
