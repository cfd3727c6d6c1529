//! The archive inside a layer's blob: decompressed on a thread of its own, hashed and counted as it goes by.
//!
//! Decompression is two thirds of the work of a conversion, hashing and writing the rest; on two threads the longest layer
//! of an image, which is what one waits for, takes that much less.

use std::fs::File;
use std::io;
use std::io::BufReader;
use std::io::Read;
use std::sync::mpsc::Receiver;
use std::sync::mpsc::Sender;
use std::sync::mpsc::SyncSender;
use std::sync::mpsc::channel;
use std::sync::mpsc::sync_channel;
use std::thread::Builder;
use std::thread::Scope;

use sha2::Digest as _;
use sha2::Sha256;
use tokio_util::sync::CancellationToken;

use crate::image::Digest;
use crate::image::decompress;
use crate::rootfs::budget::Share;
use crate::rootfs::error::LayerErrorKind;

/// The blob's read buffer, in bytes: large, because every refill is a system call.
const READ_BUFFER: usize = 256 << 10;

/// Decompressed at a time, in bytes; small enough for a processor's cache, where the other thread finds it.
const PIECE: usize = 256 << 10;

/// Pieces that wait between the threads.
const AHEAD: usize = 2;

/// Reads an archive out of a blob, stops a decompression bomb and a conversion that nobody waits for.
///
/// Dropping it ends the thread at the piece that it is at.
#[derive(Debug)]
pub(super) struct Archive<'a> {
    pieces: Receiver<io::Result<Vec<u8>>>,
    used: Sender<Vec<u8>>,
    piece: Vec<u8>,
    /// How much of the piece has been read.
    at: usize,
    hasher: Sha256,
    length: u64,
    budget: Share<'a>,
    abandoned: &'a CancellationToken,
}

impl<'a> Archive<'a> {
    /// Starts to decompress. `watch` is told how much of the blob has been read, in bytes.
    pub(super) fn open<'scope>(
        scope: &'scope Scope<'scope, '_>,
        blob: File,
        budget: Share<'a>,
        abandoned: &'a CancellationToken,
        watch: impl FnMut(u64) + Send + 'scope,
    ) -> io::Result<Self> {
        let (filled, pieces) = sync_channel(AHEAD);
        let (used, empty) = channel();
        let decompress = move || {
            if let Err(error) = pump(Watched { input: blob, done: 0, watch }, &filled, &empty) {
                // Nobody reads any more: then nobody wants to know.
                let _ = filled.send(Err(error));
            }
        };
        Builder::new().name("kiln-decompress".to_owned()).spawn_scoped(scope, decompress)?;
        Ok(Self { pieces, used, piece: Vec::new(), at: 0, hasher: Sha256::new(), length: 0, budget, abandoned })
    }

    /// What went by: its digest, and its length in bytes.
    pub(super) fn finish(self) -> (Digest, u64) {
        (Digest::from_hasher(self.hasher), self.length)
    }

    /// Takes the next piece; after the last there is an empty one.
    fn advance(&mut self) -> io::Result<()> {
        if self.abandoned.is_cancelled() {
            return Err(io::Error::other(LayerErrorKind::Abandoned));
        }
        let next = match self.pieces.recv() {
            Ok(piece) => piece?,
            Err(_) => Vec::new(),
        };
        self.budget.archive_bytes(next.len() as u64).map_err(io::Error::other)?;
        self.length += next.len() as u64;
        self.hasher.update(&next);
        self.at = 0;
        // The other end is gone when the blob has been read.
        let _ = self.used.send(std::mem::replace(&mut self.piece, next));
        Ok(())
    }
}

impl Read for Archive<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.at == self.piece.len() {
            self.advance()?;
        }
        let count = (&self.piece[self.at..]).read(buffer)?;
        self.at += count;
        Ok(count)
    }
}

/// Decompresses until the end, an error, or nobody reads any more.
fn pump(blob: impl Read, filled: &SyncSender<io::Result<Vec<u8>>>, empty: &Receiver<Vec<u8>>) -> io::Result<()> {
    let mut archive = decompress(BufReader::with_capacity(READ_BUFFER, blob))?;
    loop {
        // There are never more than are under way, which `AHEAD` bounds.
        let mut piece = empty.try_recv().unwrap_or_default();
        piece.resize(PIECE, 0);
        let (length, read) = fill(&mut archive, &mut piece);
        piece.truncate(length);
        let is_last = piece.is_empty();
        // What came before an error is good.
        if !is_last && filled.send(Ok(piece)).is_err() {
            return Ok(());
        }
        read?;
        if is_last {
            return Ok(());
        }
    }
}

/// Reads until `buffer` is full, the input ends, or it fails; how much, and how it went.
fn fill(input: &mut impl Read, buffer: &mut [u8]) -> (usize, io::Result<()>) {
    let mut filled = 0;
    while filled < buffer.len() {
        match input.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return (filled, Err(error)),
        }
    }
    (filled, Ok(()))
}

struct Watched<F> {
    input: File,
    done: u64,
    watch: F,
}

impl<F: FnMut(u64)> Read for Watched<F> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.input.read(buffer)?;
        self.done += count as u64;
        (self.watch)(self.done);
        Ok(count)
    }
}
