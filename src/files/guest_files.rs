//! The files of one guest.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use kiln_wire::control::Control;
use tokio::io::AsyncReadExt;
use tokio::io::AsyncWriteExt;
use tokio::time::timeout;

use super::FileError;
use super::GuestFileReader;
use super::GuestFileWriter;
use super::STALL;
use crate::exec;
use crate::exec::ExecError;
use crate::exec::Link;
use crate::exec::StreamSession;
use crate::exec::UnixConnector;
use crate::transport::Connector;

/// The largest file that [`GuestFiles::read`] keeps in memory (64 MiB).
const READ_LIMIT: u64 = 64 << 20;

/// Up to here a file is written by one action, which costs one round trip; beyond it as a stream (256 KiB).
const ONE_ACTION: usize = 256 << 10;

/// The files of a running guest; cheap to clone.
///
/// A VM has its own: [`Vm::write_file`](crate::vm::Vm::write_file) and its neighbours. This type also serves any Unix socket that speaks
/// the exec protocol.
///
/// ```no_run
/// # async fn example() -> Result<(), kiln::files::FileError> {
/// use kiln::files::GuestFiles;
///
/// let files = GuestFiles::new("/run/vm-exec.sock");
/// files.write("/srv/config.json", br#"{"port": 80}"#).await?;
/// assert_eq!(files.read("/srv/config.json").await?, br#"{"port": 80}"#);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct GuestFiles {
    link: Link,
}

impl GuestFiles {
    /// The files that the agent behind the Unix socket at `path` sees.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self::over(Arc::new(UnixConnector::new(path)))
    }

    /// The files that the agent behind `connector` sees.
    pub fn over(connector: Arc<dyn Connector>) -> Self {
        Self::for_link(Link::new(connector))
    }

    pub(crate) fn for_link(link: Link) -> Self {
        Self { link }
    }

    /// Writes a file of mode 0644 whole, replacing what was there.
    ///
    /// # Errors
    /// [`FileError::Guest`]: no such folder, no space, or the agent cannot be reached. What was at `path` is then untouched.
    ///
    /// # Cancel safety
    /// Cancelled, the file was written whole or not at all.
    pub async fn write(&self, path: impl Into<String>, content: impl AsRef<[u8]>) -> Result<(), FileError> {
        self.put(path.into(), content.as_ref(), None).await
    }

    /// As [`write`](Self::write), with permission bits.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    ///
    /// # Cancel safety
    /// As [`write`](Self::write).
    pub async fn write_mode(
        &self,
        path: impl Into<String>,
        content: impl AsRef<[u8]>,
        mode: u32,
    ) -> Result<(), FileError> {
        self.put(path.into(), content.as_ref(), Some(mode)).await
    }

    async fn put(&self, path: String, content: &[u8], mode: Option<u32>) -> Result<(), FileError> {
        if content.len() <= ONE_ACTION {
            let action = Control::WriteFile { path: path.clone(), data_b64: STANDARD.encode(content), mode };
            let done = exec::control(self.link.connector(), &action, STALL).await;
            return done.map(|_| ()).map_err(|source| FileError::Guest { path, source });
        }
        let mut writer = self.create(path.clone(), mode).await?;
        for piece in content.chunks(ONE_ACTION) {
            step(&path, writer.write_all(piece)).await?;
        }
        step(&path, writer.shutdown()).await
    }

    /// Reads a file of 64 MiB at most.
    ///
    /// # Errors
    /// [`FileError::Guest`]: no such file, not a regular one, or the agent cannot be reached; [`FileError::TooLarge`].
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn read(&self, path: impl Into<String>) -> Result<Vec<u8>, FileError> {
        self.read_at_most(path, READ_LIMIT).await
    }

    /// Reads a file of `limit` bytes at most; one that grows meanwhile is cut off by an error, not by memory.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn read_at_most(&self, path: impl Into<String>, limit: u64) -> Result<Vec<u8>, FileError> {
        let path = path.into();
        let mut reader = self.open_read(path.clone()).await?;
        if reader.size() > limit {
            return Err(FileError::TooLarge { path, limit });
        }
        // The size is the guest's claim: memory is taken for what has come.
        let mut content = Vec::new();
        loop {
            content.reserve(64 << 10);
            if step(&path, reader.read_buf(&mut content)).await? == 0 {
                return Ok(content);
            }
            if content.len() as u64 > limit {
                return Err(FileError::TooLarge { path, limit });
            }
        }
    }

    /// Opens a regular file of any size for reading.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn open_read(&self, path: impl Into<String>) -> Result<GuestFileReader, FileError> {
        let path = path.into();
        let stream = self.stream(&path, Control::OpenRead { path: path.clone() }).await?;
        Ok(GuestFileReader::new(path, stream))
    }

    /// Opens a file of any size for writing; it appears, with mode 0644, when the writer is shut down.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    ///
    /// # Cancel safety
    /// Cancelled, nothing is at `path` that was not there before.
    pub async fn open_write(&self, path: impl Into<String>) -> Result<GuestFileWriter, FileError> {
        self.create(path.into(), None).await
    }

    /// As [`open_write`](Self::open_write), with permission bits.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    ///
    /// # Cancel safety
    /// As [`open_write`](Self::open_write).
    pub async fn open_write_mode(&self, path: impl Into<String>, mode: u32) -> Result<GuestFileWriter, FileError> {
        self.create(path.into(), Some(mode)).await
    }

    async fn create(&self, path: String, mode: Option<u32>) -> Result<GuestFileWriter, FileError> {
        let stream = self.stream(&path, Control::OpenWrite { path: path.clone(), mode }).await?;
        Ok(GuestFileWriter::new(path, stream))
    }

    pub(super) async fn stream(&self, path: &str, action: Control) -> Result<StreamSession, FileError> {
        let opened = StreamSession::open(self.link.connector(), &action).await;
        opened.map_err(|source| FileError::Guest { path: path.to_owned(), source })
    }
}

/// One step of a transfer of `path`, which has [`STALL`].
pub(super) async fn step<T>(path: &str, work: impl Future<Output = io::Result<T>>) -> Result<T, FileError> {
    let source = match timeout(STALL, work).await {
        Ok(Ok(value)) => return Ok(value),
        Ok(Err(error)) => ExecError::from_io(error),
        Err(_) => ExecError::Timeout { after: STALL },
    };
    Err(FileError::Guest { path: path.to_owned(), source })
}
