//! The bytes of an archive: where they come from, decompressed, counted, and stopped when nobody waits any more.

use std::io;
use std::io::BufReader;
use std::io::Read;
use std::time::Duration;

use bytes::Buf;
use bytes::Bytes;
use bytes::BytesMut;
use tokio::io::AsyncRead;
use tokio::io::AsyncReadExt;
use tokio::sync::mpsc::Receiver;
use tokio::sync::mpsc::Sender;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::image::archive::error::ImportError;
use crate::image::compression::decompress;

/// Gathered from a reader before it is handed over, in bytes.
const PIECE: usize = 128 << 10;

/// Pieces that wait between the reader and the thread that takes the archive apart.
pub(super) const AHEAD: usize = 2;

/// The read buffers, in bytes: large, because every refill of the outer one is a system call or a hand-over.
const BUFFER: usize = 128 << 10;

/// A part of the archive; an empty one is its end. A channel that closes without one was abandoned.
pub(super) type Piece = Result<Bytes, ImportError>;

/// Hands `reader` over, piece by piece, until its end or until nobody takes any more.
pub(super) async fn pump(mut reader: impl AsyncRead + Unpin, pieces: Sender<Piece>, step_timeout: Duration) {
    loop {
        let piece = tokio::select! {
            biased;
            () = pieces.closed() => return,
            piece = gather(&mut reader, step_timeout) => piece,
        };
        let is_last = piece.as_ref().map_or(true, Bytes::is_empty);
        if pieces.send(piece).await.is_err() || is_last {
            return;
        }
    }
}

async fn gather(reader: &mut (impl AsyncRead + Unpin), limit: Duration) -> Piece {
    let mut piece = BytesMut::with_capacity(PIECE);
    while piece.len() < PIECE {
        match timeout(limit, reader.read_buf(&mut piece)).await {
            Ok(Ok(0)) => break,
            Ok(Ok(_)) => {}
            Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
            Ok(Err(error)) => return Err(ImportError::Read(error)),
            Err(_) => return Err(ImportError::Timeout { limit }),
        }
    }
    Ok(piece.freeze())
}

/// The other end of [`pump`], for a thread that may block.
#[derive(Debug)]
pub(super) struct Pieces {
    pieces: Receiver<Piece>,
    current: Bytes,
    is_over: bool,
}

impl Pieces {
    pub(super) fn new(pieces: Receiver<Piece>) -> Self {
        Self { pieces, current: Bytes::new(), is_over: false }
    }
}

impl Read for Pieces {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.current.is_empty() && !self.is_over {
            self.current = self.pieces.blocking_recv().ok_or_else(abandoned)?.map_err(io::Error::other)?;
            self.is_over = self.current.is_empty();
        }
        let count = self.current.len().min(buffer.len());
        self.current.copy_to_slice(&mut buffer[..count]);
        Ok(count)
    }
}

/// No caller sees it: there is none any more.
fn abandoned() -> io::Error {
    io::Error::new(io::ErrorKind::BrokenPipe, "nobody waits for the import any more")
}

/// The archive in `source`, decompressed; neither may have more than `limit` bytes.
pub(super) fn open(
    source: impl Read + 'static,
    limit: u64,
    stop: &CancellationToken,
) -> io::Result<BufReader<Metered<Box<dyn Read>>>> {
    let meter = |input| Metered { input, left: limit, limit, stop: stop.clone() };
    let source: Box<dyn Read> = Box::new(source);
    let archive = decompress(BufReader::with_capacity(BUFFER, meter(source)))?;
    Ok(BufReader::with_capacity(BUFFER, meter(archive)))
}

/// Stops a source without end, a decompression bomb and an import that nobody waits for.
#[derive(Debug)]
pub(super) struct Metered<R> {
    input: R,
    left: u64,
    limit: u64,
    stop: CancellationToken,
}

impl<R: Read> Read for Metered<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.stop.is_cancelled() {
            return Err(abandoned());
        }
        let count = self.input.read(buffer)?;
        let limit = || io::Error::other(ImportError::Limit { what: "bytes in the archive", limit: self.limit });
        self.left = self.left.checked_sub(count as u64).ok_or_else(limit)?;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(bytes: Vec<u8>, limit: u64) -> Result<Vec<u8>, ImportError> {
        let mut read = Vec::new();
        let input = open(io::Cursor::new(bytes), limit, &CancellationToken::new());
        let result = input.and_then(|mut input| input.read_to_end(&mut read));
        result.map(|_| read).map_err(|error| ImportError::of_read(error, None))
    }

    #[test]
    fn a_frame_without_content_counts_as_it_arrives() {
        // Skippable frames of 8 bytes: a source without end that decompresses to nothing.
        let frames: Vec<u8> = [0x50, 0x2a, 0x4d, 0x18, 0, 0, 0, 0].repeat(1000);
        assert!(matches!(read(frames, 4000), Err(ImportError::Limit { limit: 4000, .. })));
    }

    #[test]
    fn a_bomb_is_stopped_by_what_comes_out_of_it() {
        let bomb = zstd::encode_all(&vec![0; 1 << 20][..], 1).unwrap();
        assert!(bomb.len() < 1000);
        assert!(matches!(read(bomb.clone(), 1 << 19), Err(ImportError::Limit { .. })));
        assert_eq!(read(bomb, 1 << 20).unwrap().len(), 1 << 20);
    }

    #[test]
    fn nobody_waits() {
        let stop = CancellationToken::new();
        let mut input = open(io::repeat(0), u64::MAX, &stop).unwrap();
        stop.cancel();
        let error = io::copy(&mut input, &mut io::sink()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    }
}
