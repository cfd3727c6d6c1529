//! A guest's agent behind a Unix socket of the host's, for tools outside this program.

use std::ffi::OsString;
use std::fs::Permissions;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use kiln_wire::AGENT_PORT;
use tokio::fs;
use tokio::io::copy_bidirectional;
use tokio::net::UnixListener;
use tokio::net::UnixStream;
use tokio::task::JoinSet;
use tokio_util::task::AbortOnDropHandle;

use crate::transport::Connector;

/// Connections served at once; further ones wait in the listener's queue.
const MAX_CONNECTIONS: usize = 1024;

/// How long the guest may take to accept a connection.
const CONNECT_DEADLINE: Duration = Duration::from_secs(10);

/// How long a socket that is already there may take to refuse; one that does not is in use.
const LEFTOVER_DEADLINE: Duration = Duration::from_secs(1);

/// How long to leave the listener alone after the system refused a connection for want of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves the exec protocol on a Unix socket, for [`ExecBuilder::new`](crate::exec::ExecBuilder::new) in another program.
///
/// Whoever may open the socket may run commands in the guest as any user of the guest's: it is made with mode 0600.
///
/// # Dropping
/// Removes the socket and closes its connections, at which the agent ends their processes. Does not wait for that.
#[derive(Debug)]
pub struct ExecSocket {
    path: PathBuf,
    _server: AbortOnDropHandle<()>,
}

impl ExecSocket {
    /// Serves the agent behind `connector` at `path`.
    ///
    /// A socket that an ended program has left at `path` is replaced; anything else that is there is not.
    ///
    /// # Errors
    /// `AddrInUse` when something is at `path`; otherwise why the socket cannot be made there.
    ///
    /// # Cancel safety
    /// Cancelled, nothing is served; an empty socket may stay at `path`, which the next call replaces.
    pub async fn bind(path: impl Into<PathBuf>, connector: Arc<dyn Connector>) -> io::Result<Self> {
        let path = path.into();
        remove_leftover(&path).await?;
        let listener = listen(&path).await?;
        let server = AbortOnDropHandle::new(tokio::spawn(serve(listener, connector)));
        Ok(Self { path, _server: server })
    }

    /// Where the socket is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for ExecSocket {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::debug!(%error, path = %self.path.display(), "exec socket was already gone");
        }
    }
}

/// Binds under a temporary name in the same folder: nobody can connect before the socket has its mode.
async fn listen(path: &Path) -> io::Result<UnixListener> {
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
    let mut temporary = OsString::from(".");
    temporary.push(name);
    temporary.push(format!(".{}.new", std::process::id()));
    let temporary = path.with_file_name(temporary);
    let _ = fs::remove_file(&temporary).await;
    let listener = UnixListener::bind(&temporary)?;
    let published = publish(&temporary, path).await;
    let _ = fs::remove_file(&temporary).await;
    published.map(|()| listener)
}

async fn publish(temporary: &Path, path: &Path) -> io::Result<()> {
    fs::set_permissions(temporary, Permissions::from_mode(0o600)).await?;
    // Unlike a rename, a link does not replace what is there.
    fs::hard_link(temporary, path).await.map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => io::ErrorKind::AddrInUse.into(),
        _ => error,
    })
}

/// Removes a socket that nobody answers.
async fn remove_leftover(path: &Path) -> io::Result<()> {
    let found = fs::symlink_metadata(path).await;
    if !found.is_ok_and(|found| found.file_type().is_socket()) {
        return Ok(());
    }
    match tokio::time::timeout(LEFTOVER_DEADLINE, UnixStream::connect(path)).await {
        Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path).await,
        _ => Ok(()),
    }
}

async fn serve(listener: UnixListener, connector: Arc<dyn Connector>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept(), if connections.len() < MAX_CONNECTIONS => match accepted {
                Ok((stream, _)) => {
                    connections.spawn(relay(stream, Arc::clone(&connector)));
                }
                Err(error) => {
                    tracing::warn!(%error, "exec socket cannot accept");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

/// Passes bytes on until one side is gone; the other then sees its connection close, which is how sessions end.
async fn relay(mut host: UnixStream, connector: Arc<dyn Connector>) {
    let connecting = tokio::time::timeout(CONNECT_DEADLINE, connector.connect(AGENT_PORT));
    let mut guest = match connecting.await {
        Ok(Ok(guest)) => guest,
        Ok(Err(error)) => return tracing::debug!(%error, "exec socket's guest refused"),
        Err(_) => return tracing::debug!("exec socket's guest did not answer"),
    };
    if let Err(error) = copy_bidirectional(&mut host, &mut guest).await {
        tracing::debug!(%error, "exec socket's connection ended");
    }
}
