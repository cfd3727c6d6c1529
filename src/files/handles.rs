//! An open file of the guest's as `AsyncRead` or `AsyncWrite`.

use std::fmt;
use std::io;
use std::pin::Pin;
use std::task::Context;
use std::task::Poll;
use std::task::ready;

use tokio::io::AsyncRead;
use tokio::io::AsyncWrite;
use tokio::io::ReadBuf;
use tokio_util::sync::ReusableBoxFuture;

use crate::exec::ExecError;
use crate::exec::ExecStdin;
use crate::exec::ExecStdout;
use crate::exec::StreamEnd;
use crate::exec::StreamSession;

/// A file of the guest's that is read as it comes.
///
/// End-of-file is the file's end as the guest says it; a session that fails before is an error, whose source is an [`ExecError`]. Up to 256 KiB
/// wait here for the reader, then the guest waits. Dropping it ends the transfer.
#[derive(Debug)]
pub struct GuestFileReader {
    path: String,
    size: u64,
    output: ExecStdout,
    /// Unused, and held: dropping it would be an end-of-file to a stream that takes no input.
    _input: ExecStdin,
    _end: StreamEnd,
}

impl GuestFileReader {
    pub(super) fn new(path: String, stream: StreamSession) -> Self {
        let StreamSession { input, output, total_len, end } = stream;
        Self { path, size: total_len.unwrap_or(0), output, _input: input, _end: end }
    }

    /// The file, as it was asked for.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The file's size when it was opened, in bytes. It is the guest's word: what is read may be more or less.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }
}

impl AsyncRead for GuestFileReader {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.output).poll_read(cx, buf)
    }
}

/// A file of the guest's that is being written.
///
/// Nothing is at its path before it is shut down: [`AsyncWriteExt::shutdown`](tokio::io::AsyncWriteExt::shutdown) syncs what was written, puts
/// the file in its place, and returns when it is there. **Dropping it before that leaves nothing behind**, whatever was written.
///
/// A guest that cannot take more, because its disk is full for example, fails the next write or the shutdown; the error's source is an
/// [`ExecError`].
pub struct GuestFileWriter {
    path: String,
    input: ExecStdin,
    /// The agent's last word; `None` once it was heard.
    end: Option<ReusableBoxFuture<'static, Result<(), ExecError>>>,
    stream: StreamEnd,
    _output: ExecStdout,
}

impl fmt::Debug for GuestFileWriter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestFileWriter")
            .field("path", &self.path)
            .field("stream", &self.stream)
            .finish_non_exhaustive()
    }
}

impl GuestFileWriter {
    pub(super) fn new(path: String, stream: StreamSession) -> Self {
        let StreamSession { input, output, end, .. } = stream;
        Self { path, input, end: Some(ReusableBoxFuture::new(end.done())), stream: end, _output: output }
    }

    /// The file, as it was asked for.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The agent's last word; the same each time.
    fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if let Some(end) = &mut self.end {
            // A clone of its state stays behind for the next caller.
            let ended = ready!(end.poll(cx));
            self.end = None;
            return Poll::Ready(ended.map_err(io::Error::from));
        }
        Poll::Ready(self.stream.try_done().unwrap_or(Ok(())).map_err(io::Error::from))
    }
}

impl AsyncWrite for GuestFileWriter {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match ready!(Pin::new(&mut self.input).poll_write(cx, buf)) {
            Ok(written) => Poll::Ready(Ok(written)),
            // The agent has ended the stream, and says why; it cannot be for having all bytes.
            Err(broken) => match ready!(self.poll_end(cx)) {
                Err(error) => Poll::Ready(Err(error)),
                Ok(()) => Poll::Ready(Err(broken)),
            },
        }
    }

    /// Does nothing: the handle keeps nothing back.
    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(Pin::new(&mut self.input).poll_shutdown(cx))?;
        self.poll_end(cx)
    }
}
