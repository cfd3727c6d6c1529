//! The handles: standard input as `AsyncWrite`, the outputs as `AsyncRead`.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Context;
use std::task::Poll;
use std::task::ready;

use bytes::Bytes;
use tokio::io::AsyncRead;
use tokio::io::AsyncWrite;
use tokio::io::ReadBuf;
use tokio::sync::mpsc;
use tokio_util::sync::PollSender;

use crate::exec::lanes::Lane;
use crate::exec::lanes::Lanes;

/// The most that one write hands to the driver (32 KiB): a signal waits for one piece at most.
const PIECE: usize = 32 << 10;

/// Pieces that may wait for the driver.
const PIECES: usize = 2;

/// The standard input of a process in a guest.
///
/// Writing waits when the process does not read: about 64 KiB wait here, the rest in the agent and the pipe. Shutting it down, or dropping it,
/// is the process's end-of-file. Writing to a process that has ended is `BrokenPipe`; the protocol does not tell
/// when a process merely closes its input, the agent then drops what comes.
#[derive(Debug)]
pub struct ExecStdin {
    pieces: PollSender<Bytes>,
}

impl ExecStdin {
    pub(crate) fn new() -> (Self, mpsc::Receiver<Bytes>) {
        let (sender, receiver) = mpsc::channel(PIECES);
        (Self { pieces: PollSender::new(sender) }, receiver)
    }
}

impl AsyncWrite for ExecStdin {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        // An empty STDIN frame would be end-of-file.
        if buf.is_empty() {
            return Poll::Ready(Ok(0));
        }
        let closed = |_| io::Error::from(io::ErrorKind::BrokenPipe);
        ready!(self.pieces.poll_reserve(cx)).map_err(closed)?;
        let piece = &buf[..buf.len().min(PIECE)];
        self.pieces.send_item(Bytes::copy_from_slice(piece)).map_err(closed)?;
        Poll::Ready(Ok(piece.len()))
    }

    /// Does nothing: like a pipe, the handle keeps nothing back.
    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    /// Sends end-of-file after what was written.
    fn poll_shutdown(mut self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.pieces.close();
        Poll::Ready(Ok(()))
    }
}

#[derive(Debug)]
struct Reader {
    lanes: Arc<Lanes>,
    lane: Lane,
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.lanes.close(self.lane);
    }
}

/// The standard output of a process in a guest (with a terminal, everything it prints).
///
/// End-of-file means that the process and everything that shared its output have closed it or that the process has ended; a session
/// that fails is an error instead. What happens to bytes that nobody reads is said in [`crate::exec`].
#[derive(Debug)]
pub struct ExecStdout(Reader);

impl ExecStdout {
    pub(crate) fn new(lanes: Arc<Lanes>) -> Self {
        Self(Reader { lanes, lane: Lane::Stdout })
    }
}

impl AsyncRead for ExecStdout {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.0.lanes.poll_read(self.0.lane, cx, buf)
    }
}

/// The standard error of a process in a guest; as [`ExecStdout`].
#[derive(Debug)]
pub struct ExecStderr(Reader);

impl ExecStderr {
    pub(crate) fn new(lanes: Arc<Lanes>) -> Self {
        Self(Reader { lanes, lane: Lane::Stderr })
    }
}

impl AsyncRead for ExecStderr {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.0.lanes.poll_read(self.0.lane, cx, buf)
    }
}
