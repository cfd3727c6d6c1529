//! A connection to a TCP port of the guest's.

use std::io;
use std::pin::Pin;
use std::task::Context;
use std::task::Poll;

use kiln_wire::control::Control;
use tokio::io::AsyncRead;
use tokio::io::AsyncWrite;
use tokio::io::ReadBuf;

use crate::exec::ExecError;
use crate::exec::ExecStdin;
use crate::exec::ExecStdout;
use crate::exec::StreamEnd;
use crate::exec::StreamSession;
use crate::transport::Connector;

/// A connection to a TCP port on the guest's loopback interface.
///
/// As with any TCP stream, shutting down the write side is a half-close: the server reads end-of-file and may go on writing. A connection that
/// the server resets is an error of kind `ConnectionReset`. Bounded buffers between here and the server make a slow side slow the other one.
///
/// # Dropping
/// Closes the connection at once, and bytes on their way to the guest are lost; unless the write side was shut down, after which they still have
/// five seconds to arrive. Does not wait for that.
#[derive(Debug)]
pub struct GuestTcpStream {
    input: ExecStdin,
    output: ExecStdout,
    end: StreamEnd,
    shut_down: bool,
}

impl Drop for GuestTcpStream {
    fn drop(&mut self) {
        if self.shut_down {
            self.end.let_go();
        }
    }
}

impl GuestTcpStream {
    /// Connects to `port` of the guest whose agent is behind `connector`, within ten seconds.
    ///
    /// # Errors
    /// [`ExecError::System`] when the guest refuses, with [`ExecError::kind`] `ConnectionRefused` when nothing listens on `port`; else why
    /// the agent cannot be reached.
    ///
    /// # Cancel safety
    /// Cancel safe: an attempt that is given up leaves nothing behind.
    pub async fn connect(connector: &dyn Connector, port: u16) -> Result<Self, ExecError> {
        let stream = StreamSession::open(connector, &Control::Connect { port }).await?;
        Ok(Self { input: stream.input, output: stream.output, end: stream.end, shut_down: false })
    }
}

impl AsyncRead for GuestTcpStream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.output).poll_read(cx, buf)
    }
}

impl AsyncWrite for GuestTcpStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.input).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.input).poll_flush(cx)
    }

    /// Half-closes: end-of-file for the server, after what was written.
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.shut_down = true;
        Pin::new(&mut self.input).poll_shutdown(cx)
    }
}
