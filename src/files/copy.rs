//! Trees between host and guest, as tar archives on a stream.
//!
//! Reading and writing the host's files blocks, so a thread of its own does that for each copy; bounded channels join it to the async side. Whichever
//! side ends first takes the other along: the thread's next read or write fails when the future is gone.

use std::ffi::OsString;
use std::io;
use std::io::Read;
use std::io::Write;
use std::path::Path;
use std::path::PathBuf;

use bytes::Buf;
use bytes::Bytes;
use kiln_tree::PackError;
use kiln_tree::UnpackError;
use kiln_tree::UnpackOptions;
use kiln_tree::Unpacked;
use kiln_wire::control::Control;
use tokio::io::AsyncReadExt;
use tokio::io::AsyncWriteExt;
use tokio::sync::mpsc;
use tokio::sync::oneshot;

use super::FileError;
use super::GuestFileReader;
use super::GuestFileWriter;
use super::GuestFiles;
use super::guest_files::step;

/// Pieces between a copy's thread and its future.
const PIECES: usize = 4;

/// Bytes in a piece, at most (64 KiB).
const PIECE: usize = 64 << 10;

impl GuestFiles {
    /// Copies a file or folder of the host's, with all that is in it, to `guest`.
    ///
    /// `guest` is the copy's own path, not that of a folder to put it into; only for a file may it end in `/`, and the file then keeps its
    /// name. A folder that exists is merged into: files in it that the tree also has are replaced. Kept are permission bits, modification times,
    /// symbolic and hard links (within the tree), FIFOs and device nodes; everything belongs to root. Links are copied, not followed.
    ///
    /// # Errors
    /// [`FileError::Pack`] for what cannot be read here; [`FileError::Guest`] for what the guest refuses. What had been copied stays.
    ///
    /// # Cancel safety
    /// Cancelled, a part of the tree may have been copied.
    pub async fn copy_in(&self, host: impl Into<PathBuf>, guest: impl Into<String>) -> Result<(), FileError> {
        let (host, guest) = (host.into(), guest.into());
        let unreadable = |source| FileError::pack(&host, PackError::Read { path: host.clone(), source });
        let found = tokio::fs::symlink_metadata(&host).await.map_err(unreadable)?;
        let (folder, name) = if found.is_dir() { (guest.clone(), None) } else { file_target(&host, &guest) };
        let stream = self.stream(&guest, Control::Unpack { path: folder }).await?;
        let (pieces, queue) = mpsc::channel(PIECES);
        let packing = {
            let host = host.clone();
            in_thread("kiln-pack", move || kiln_tree::pack(&host, name.as_deref(), PieceWriter::new(pieces)))
        }
        .map_err(|source| FileError::pack(&host, PackError::Read { path: host.clone(), source }))?;
        let sent = send(GuestFileWriter::new(guest, stream), queue, packing).await?;
        sent.map_err(|error| FileError::pack(&host, error))
    }

    /// Copies a file or folder of the guest's, with all that is in it, to `host`, within the limits of
    /// [`UnpackOptions::host`].
    ///
    /// `host` is the copy's own path, as in [`copy_in`](Self::copy_in). The guest's archive is taken for hostile: nothing leaves `host`, no
    /// link in it is followed, set-user-id and set-group-id bits are cleared, device nodes, FIFOs and sockets are left out and counted.
    /// Everything belongs to the user that runs this.
    ///
    /// # Errors
    /// [`FileError::Guest`] for what the guest refuses or cannot read; [`FileError::Unpack`] for what cannot be written here. What had been copied
    /// stays.
    ///
    /// # Cancel safety
    /// Cancelled, a part of the tree may have been copied.
    pub async fn copy_out(&self, guest: impl Into<String>, host: impl Into<PathBuf>) -> Result<Unpacked, FileError> {
        self.copy_out_with(guest, host, UnpackOptions::host()).await
    }

    /// As [`copy_out`](Self::copy_out), with limits and permissions of the caller's choice.
    ///
    /// # Errors
    /// As [`copy_out`](Self::copy_out).
    ///
    /// # Cancel safety
    /// As [`copy_out`](Self::copy_out).
    pub async fn copy_out_with(
        &self,
        guest: impl Into<String>,
        host: impl Into<PathBuf>,
        options: UnpackOptions,
    ) -> Result<Unpacked, FileError> {
        let (guest, host) = (guest.into(), host.into());
        let stream = self.stream(&guest, Control::Pack { path: guest.clone() }).await?;
        let (pieces, queue) = mpsc::channel(PIECES);
        let unpacking = {
            let host = host.clone();
            in_thread("kiln-unpack", move || kiln_tree::unpack_as(PieceReader::new(queue), &host, &options))
        }
        .map_err(|source| FileError::unpack(&host, UnpackError::Io { name: host.clone(), source }))?;
        let unpacked = receive(GuestFileReader::new(guest, stream), pieces, unpacking).await?;
        unpacked.map_err(|error| FileError::unpack(&host, error))
    }
}

/// The guest's folder to unpack a single file into, and its name there.
fn file_target(host: &Path, guest: &str) -> (String, Option<OsString>) {
    match guest.rsplit_once('/') {
        Some((folder, "")) => (format!("{folder}/"), host.file_name().map(OsString::from)),
        Some((folder, name)) => (format!("{folder}/"), Some(name.into())),
        None => ("/".to_owned(), Some(guest.into())),
    }
}

/// Runs `work` on a thread of its own; what comes of it arrives on the channel, unless it panics.
fn in_thread<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<oneshot::Receiver<T>> {
    let (sender, result) = oneshot::channel();
    let thread = std::thread::Builder::new().name(name.to_owned());
    // Whoever waited may be gone.
    thread.spawn(move || drop(sender.send(work())))?;
    Ok(result)
}

/// Sends what the thread packs. The outer error is the guest's, which a failure of the thread then follows from.
async fn send(
    mut writer: GuestFileWriter,
    mut queue: mpsc::Receiver<Bytes>,
    packing: oneshot::Receiver<Result<(), PackError>>,
) -> Result<Result<(), PackError>, FileError> {
    let path = writer.path().to_owned();
    while let Some(piece) = queue.recv().await {
        step(&path, writer.write_all(&piece)).await?;
    }
    let packed = packing.await.unwrap_or_else(|_| Err(PackError::Write(panicked())));
    match packed {
        // Not an end-of-file for the guest: dropping the writer tells it that the archive is cut short.
        Err(error @ (PackError::Read { .. } | PackError::Write(_) | PackError::TooDeep { .. })) => Ok(Err(error)),
        whole => {
            step(&path, writer.shutdown()).await?;
            Ok(whole)
        }
    }
}

/// Hands the guest's archive to the thread that unpacks it. The outer error is the guest's, which a failure of the thread then follows from.
async fn receive(
    mut reader: GuestFileReader,
    pieces: mpsc::Sender<Bytes>,
    unpacking: oneshot::Receiver<Result<Unpacked, UnpackError>>,
) -> Result<Result<Unpacked, UnpackError>, FileError> {
    let path = reader.path().to_owned();
    let mut buffer = bytes::BytesMut::new();
    loop {
        buffer.reserve(PIECE);
        let end = step(&path, reader.read_buf(&mut buffer)).await? == 0;
        // A thread that takes no more has failed, and says why.
        if pieces.send(buffer.split().freeze()).await.is_err() || end {
            break;
        }
    }
    drop(pieces);
    Ok(unpacking.await.unwrap_or_else(|_| Err(UnpackError::Read(panicked()))))
}

fn panicked() -> io::Error {
    io::Error::other("the copy's thread panicked")
}

/// The thread's end towards the guest.
struct PieceWriter {
    pieces: mpsc::Sender<Bytes>,
    buffer: Vec<u8>,
}

impl PieceWriter {
    fn new(pieces: mpsc::Sender<Bytes>) -> Self {
        Self { pieces, buffer: Vec::with_capacity(PIECE) }
    }
}

impl Write for PieceWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = bytes.len().min(PIECE - self.buffer.len());
        self.buffer.extend_from_slice(&bytes[..taken]);
        if self.buffer.len() == PIECE {
            self.flush()?;
        }
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        let full = std::mem::replace(&mut self.buffer, Vec::with_capacity(PIECE));
        self.pieces.blocking_send(full.into()).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

/// The thread's end from the guest; an empty piece is the end.
struct PieceReader {
    pieces: mpsc::Receiver<Bytes>,
    piece: Bytes,
    ended: bool,
}

impl PieceReader {
    fn new(pieces: mpsc::Receiver<Bytes>) -> Self {
        Self { pieces, piece: Bytes::new(), ended: false }
    }
}

impl Read for PieceReader {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        while self.piece.is_empty() && !self.ended {
            self.piece = self.pieces.blocking_recv().ok_or(io::ErrorKind::UnexpectedEof)?;
            self.ended = self.piece.is_empty();
        }
        let taken = into.len().min(self.piece.len());
        self.piece.copy_to_slice(&mut into[..taken]);
        Ok(taken)
    }
}
