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
use tokio::io::AsyncReadExt;
use tokio::io::AsyncWriteExt;
use tokio::io::Interest;
use tokio::io::WriteHalf;
use tokio::net::UnixListener;
use tokio::net::UnixStream;
use tokio::net::unix::OwnedReadHalf;
use tokio::task::JoinSet;
use tokio_util::task::AbortOnDropHandle;

use crate::transport::Connector;
use crate::transport::GuestStream;

/// Connections served at once; further ones wait in the listener's queue.
const MAX_CONNECTIONS: usize = 1024;

/// How long the guest may take to accept a connection.
const CONNECT_DEADLINE: Duration = Duration::from_secs(10);

/// How long a socket that is already there may take to refuse; one that does not is in use.
const LEFTOVER_DEADLINE: Duration = Duration::from_secs(1);

/// Bytes taken from the host at once (64 KiB).
const PIECE: usize = 64 << 10;

/// How often to look whether a host hung up, while its bytes cannot be passed on.
const HANG_UP_INTERVAL: Duration = Duration::from_millis(100);

/// How long a host may take to hang up after the agent did.
const LINGER: Duration = Duration::from_secs(2);

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
    /// Cancelled, nothing is served; a socket that nobody answers may stay at `path`, which the next call replaces.
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
    temporary.push(format!(".{:016x}", getrandom::u64().map_err(io::Error::other)?));
    let temporary = Temporary(path.with_file_name(temporary));
    let listener = UnixListener::bind(&temporary.0)?;
    fs::set_permissions(&temporary.0, Permissions::from_mode(0o600)).await?;
    // Unlike a rename, a link does not replace what is there.
    match fs::hard_link(&temporary.0, path).await {
        Ok(()) => Ok(listener),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Err(io::ErrorKind::AddrInUse.into()),
        Err(error) => Err(error),
    }
}

/// A name that goes with this value.
struct Temporary(PathBuf);

impl Drop for Temporary {
    fn drop(&mut self) {
        // It may not have been made yet.
        let _ = std::fs::remove_file(&self.0);
    }
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
async fn relay(host: UnixStream, connector: Arc<dyn Connector>) {
    let connecting = tokio::time::timeout(CONNECT_DEADLINE, connector.connect(AGENT_PORT));
    let guest = match connecting.await {
        Ok(Ok(guest)) => guest,
        Ok(Err(error)) => return tracing::debug!(%error, "exec socket's guest refused"),
        Err(_) => return tracing::debug!("exec socket's guest did not answer"),
    };
    let (mut from_host, mut to_host) = host.into_split();
    let (mut from_guest, to_guest) = tokio::io::split(guest);
    let up = pass_up(&mut from_host, to_guest);
    tokio::pin!(up);
    tokio::select! {
        // The host's end is the session's, also where the agent has more to say.
        () = &mut up => return,
        down = tokio::io::copy(&mut from_guest, &mut to_host) => {
            if let Err(error) = down {
                return tracing::debug!(%error, "exec socket's connection ended");
            }
        }
    }
    // The agent has said its last word. What the host still sends is taken until it hangs up, so that its reading is not cut short by a reset.
    let _ = to_host.shutdown().await;
    let _ = tokio::time::timeout(LINGER, up).await;
}

/// Passes on what the host sends until it hangs up; what a guest no longer takes is dropped, since its last words may be on their way.
async fn pass_up(host: &mut OwnedReadHalf, mut guest: WriteHalf<Box<dyn GuestStream>>) {
    let mut buffer = vec![0; PIECE];
    let mut taken = true;
    while let Ok(read @ 1..) = host.read(&mut buffer).await {
        if !taken {
            continue;
        }
        tokio::select! {
            biased;
            written = guest.write_all(&buffer[..read]) => taken = written.is_ok(),
            // A guest that does not read must not keep the host's hang-up from it.
            () = hung_up(host) => return,
        }
    }
}

/// Waits until the host has closed its end; what it sent before may still be unread. The system tells this with readiness to read, which unread
/// bytes keep up, so there is no event to wait for.
async fn hung_up(host: &OwnedReadHalf) {
    loop {
        tokio::time::sleep(HANG_UP_INTERVAL).await;
        match host.ready(Interest::READABLE).await {
            Ok(ready) if !ready.is_read_closed() => {}
            _ => return,
        }
    }
}
