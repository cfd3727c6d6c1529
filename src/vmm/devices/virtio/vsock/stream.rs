//! Streams to the guest for tokio: nothing here waits but for a lock that is held for a copy.

use std::fmt;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::task::coop;

use super::mux::Key;
use super::mux::Mux;
use crate::transport::Connector;
use crate::transport::GuestStream;
use crate::vmm::devices::virtio::Doorbell;

/// How long a guest may take to answer a request. Its kernel answers in interrupt context, so this is
/// far beyond a loaded host's delays, and what a caller waits at most for a guest that hangs.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);

/// What device and streams share.
#[derive(Debug)]
pub(super) struct Shared {
    mux: Mutex<Mux>,
    pub(super) doorbell: Arc<Doorbell>,
}

impl Shared {
    pub(super) fn new() -> Self {
        Self { mux: Mutex::new(Mux::new()), doorbell: Arc::default() }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Mux> {
        self.mux.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does something to the connections, and wakes the device if it now has packets to deliver.
    fn with<T>(&self, act: impl FnOnce(&mut Mux) -> T) -> T {
        let (result, ring) = {
            let mut mux = self.lock();
            (act(&mut mux), mux.has_packets())
        };
        if ring {
            self.doorbell.ring();
        }
        result
    }
}

/// Connects to the guest's ports; clones reach the same guest.
#[derive(Clone)]
pub struct VsockConnector {
    pub(super) shared: Arc<Shared>,
}

impl fmt::Debug for VsockConnector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VsockConnector").finish_non_exhaustive()
    }
}

impl VsockConnector {
    /// Ends all connections, now and later: the guest is gone.
    pub(in crate::vmm) fn guest_gone(&self) {
        self.shared.lock().guest_gone();
    }

    async fn open(&self, port: u32) -> io::Result<VsockStream> {
        let key = self.shared.with(|mux| mux.connect(port))?;
        // From here on dropping the stream gives the attempt up.
        let stream = VsockStream { shared: Arc::clone(&self.shared), key };
        let answer = std::future::poll_fn(|cx| self.shared.with(|mux| mux.poll_connected(key, cx)));
        tokio::time::timeout(CONNECT_TIMEOUT, answer).await??;
        Ok(stream)
    }
}

impl Connector for VsockConnector {
    fn connect(&self, port: u32) -> BoxFuture<'_, io::Result<Box<dyn GuestStream>>> {
        Box::pin(async move { Ok(Box::new(self.open(port).await?) as Box<dyn GuestStream>) })
    }
}

/// A stream to a port of the guest.
///
/// Shutting down the write side leaves the read side open. Dropping it delivers what was written, for a
/// few seconds at most, unless bytes from the guest are still unread: then the guest sees a reset.
pub struct VsockStream {
    shared: Arc<Shared>,
    key: Key,
}

impl fmt::Debug for VsockStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VsockStream").field("key", &self.key).finish_non_exhaustive()
    }
}

impl AsyncRead for VsockStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        // A guest that always has more must not keep its reader's task from the deadlines beside it.
        let coop = ready!(coop::poll_proceed(cx));
        let read = self.shared.with(|mux| mux.poll_read(self.key, cx, into));
        if read.is_ready() {
            coop.made_progress();
        }
        read
    }
}

impl AsyncWrite for VsockStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let coop = ready!(coop::poll_proceed(cx));
        let written = self.shared.with(|mux| mux.poll_write(self.key, cx, bytes));
        if written.is_ready() {
            coop.made_progress();
        }
        written
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // The device takes what is written as fast as the guest's credit allows; nothing is held back.
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.shared.with(|mux| mux.shut_down_write(self.key));
        Poll::Ready(Ok(()))
    }
}

impl Drop for VsockStream {
    fn drop(&mut self) {
        self.shared.with(|mux| mux.release(self.key, Instant::now()));
    }
}
