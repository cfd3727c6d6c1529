//! Byte streams into the guest: where the exec layer and whatever carries it meet.
//!
//! A real VM connects by vsock; a Unix socket or an in-memory duplex serves as well, and tests use both.

use std::fmt::Debug;
use std::io;

use futures::future::BoxFuture;
use tokio::io::{AsyncRead, AsyncWrite};

/// A byte stream to a guest port.
pub trait GuestStream: AsyncRead + AsyncWrite + Debug + Unpin + Send {}

impl<T: AsyncRead + AsyncWrite + Debug + Unpin + Send> GuestStream for T {}

/// Opens streams to guest ports.
pub trait Connector: Debug + Send + Sync {
    /// Connects to `port`; the stream is usable at once.
    ///
    /// # Errors
    /// `ConnectionRefused` when nothing listens there, `NotConnected` when the guest is gone, `TimedOut`
    /// when it does not answer.
    ///
    /// # Cancel safety
    /// Dropping the future gives up the attempt and leaves nothing behind.
    fn connect(&self, port: u32) -> BoxFuture<'_, io::Result<Box<dyn GuestStream>>>;
}
