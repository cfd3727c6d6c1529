//! A port of the host's that leads to one of the guest's.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::copy_bidirectional;
use tokio::net::TcpListener;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio_util::task::AbortOnDropHandle;

use super::GuestTcpStream;
use crate::transport::Connector;

/// Connections forwarded at once; further ones wait in the listener's queue.
const MAX_CONNECTIONS: usize = 1024;

/// How long to leave the listener alone after the system refused a connection for want of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Forwards TCP connections from an address of the host's to a port of the guest's.
///
/// Half-closes are passed on in both directions, and so are resets: a client whose connection the guest refuses or resets sees a reset. Up to 1024
/// connections are served at once.
///
/// # Dropping
/// Closes the listener and all its connections. Does not wait for that.
#[derive(Debug)]
pub struct TcpForwarder {
    local_addr: SocketAddr,
    guest_port: u16,
    _server: AbortOnDropHandle<()>,
}

impl TcpForwarder {
    /// Listens on `address` and forwards to `guest_port` of the guest whose agent is behind `connector`. Port 0 takes a free one.
    ///
    /// Whoever can connect to `address` reaches the server in the guest: for this machine only, bind a loopback address.
    ///
    /// # Errors
    /// Why the address cannot be listened on.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn bind(address: SocketAddr, guest_port: u16, connector: Arc<dyn Connector>) -> io::Result<Self> {
        let listener = TcpListener::bind(address).await?;
        let local_addr = listener.local_addr()?;
        let server = AbortOnDropHandle::new(tokio::spawn(serve(listener, guest_port, connector)));
        Ok(Self { local_addr, guest_port, _server: server })
    }

    /// Where it listens, with the port that was taken.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// The guest's port.
    #[must_use]
    pub fn guest_port(&self) -> u16 {
        self.guest_port
    }
}

async fn serve(listener: TcpListener, port: u16, connector: Arc<dyn Connector>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept(), if connections.len() < MAX_CONNECTIONS => match accepted {
                Ok((client, _)) => {
                    connections.spawn(forward(client, port, Arc::clone(&connector)));
                }
                Err(error) => {
                    tracing::warn!(%error, port, "forwarded port cannot accept");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn forward(mut client: TcpStream, port: u16, connector: Arc<dyn Connector>) {
    // What a client writes in small pieces it wants to arrive in small pieces.
    let _ = client.set_nodelay(true);
    let forwarded = async {
        let mut guest = GuestTcpStream::connect(&*connector, port).await?;
        copy_bidirectional(&mut client, &mut guest).await
    };
    if let Err(error) = forwarded.await {
        tracing::debug!(%error, port, "forwarded connection ended");
        // Closing with a reset: the client must not take a failure for an end.
        let _ = client.set_zero_linger();
    }
}
