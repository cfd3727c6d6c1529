//! A connector to an exec socket in the file system.

use std::io;
use std::path::PathBuf;

use futures::future::BoxFuture;
use tokio::net::UnixStream;

use crate::transport::Connector;
use crate::transport::GuestStream;

/// Connects to a Unix socket that speaks the exec protocol: a VM's, or `kiln-agent --unix PATH`.
///
/// There is one service behind such a socket, so the port is not looked at.
#[derive(Clone, Debug)]
pub struct UnixConnector {
    path: PathBuf,
}

impl UnixConnector {
    /// A connector to the socket at `path`; nothing is opened yet.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }
}

impl Connector for UnixConnector {
    fn connect(&self, _port: u32) -> BoxFuture<'_, io::Result<Box<dyn GuestStream>>> {
        Box::pin(async move {
            let stream = UnixStream::connect(&self.path).await?;
            Ok(Box::new(stream) as Box<dyn GuestStream>)
        })
    }
}
