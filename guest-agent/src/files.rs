//! Files that the host writes and reads: whole, and atomic.

use std::fs;
use std::fs::File;
use std::fs::Permissions;
use std::io;
use std::io::Read;
use std::io::Seek;
use std::io::SeekFrom;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::path::PathBuf;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rustix::fs::OFlags;

use crate::refusal::Refusal;

/// Permission bits of a file whose writer names none.
const DEFAULT_MODE: u32 = 0o644;

/// The largest file that `read_file` answers unless told otherwise (4 MiB).
const DEFAULT_MAX_READ: u64 = 4 << 20;

/// The largest file that fits one CONTROL frame as base64 (11 MiB).
const LARGEST_READ: u64 = 11 << 20;

/// The largest piece of a file in one CONTROL frame (8 MiB).
pub(crate) const LARGEST_CHUNK: u64 = 8 << 20;

/// A file on its way to `path`: under a temporary name beside it, which goes away with this value unless it is finished.
#[derive(Debug)]
pub(crate) struct Replacement {
    file: File,
    path: PathBuf,
    temporary: Option<PathBuf>,
}

impl Replacement {
    pub(crate) fn new(path: &Path) -> io::Result<Self> {
        path.file_name().ok_or(rustix::io::Errno::ISDIR)?;
        if fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_dir()) {
            return Err(rustix::io::Errno::ISDIR.into());
        }
        let (file, temporary) = create_beside(path)?;
        Ok(Self { file, path: path.to_owned(), temporary: Some(temporary) })
    }

    pub(crate) fn write(&mut self, data: &[u8]) -> io::Result<()> {
        self.file.write_all(data)
    }

    /// Puts the file in its place: readers see the old one or the whole new one.
    pub(crate) fn finish(mut self, mode: Option<u32>) -> io::Result<()> {
        self.file.set_permissions(Permissions::from_mode(mode.unwrap_or(DEFAULT_MODE) & 0o7777))?;
        self.file.sync_all()?;
        if let Some(temporary) = &self.temporary {
            fs::rename(temporary, &self.path)?;
            self.temporary = None;
        }
        Ok(())
    }
}

impl Drop for Replacement {
    fn drop(&mut self) {
        if let Some(temporary) = &self.temporary {
            let _ = fs::remove_file(temporary);
        }
    }
}

/// Creates a file of a new name; never through a link, and never one that is there already.
fn create_beside(path: &Path) -> io::Result<(File, PathBuf)> {
    let pid = std::process::id();
    for attempt in 0_u32.. {
        let temporary = path.with_file_name(format!(".kiln-new-{pid}-{attempt}"));
        match fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary) {
            Ok(file) => return Ok((file, temporary)),
            // Another session's, or left over from an agent that was killed.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
    Err(io::ErrorKind::AlreadyExists.into())
}

/// Writes `data_b64` to `path`.
pub(crate) fn write(path: &str, data_b64: &str, mode: Option<u32>) -> Result<(), Refusal> {
    let data = decode(data_b64)?;
    write_atomically(Path::new(path), &data, mode).map_err(|error| Refusal::system(path, &error))
}

pub(crate) fn write_atomically(path: &Path, data: &[u8], mode: Option<u32>) -> io::Result<()> {
    let mut replacement = Replacement::new(path)?;
    replacement.write(data)?;
    replacement.finish(mode)
}

pub(crate) fn decode(data_b64: &str) -> Result<Vec<u8>, Refusal> {
    STANDARD.decode(data_b64).map_err(|error| Refusal::new(format!("data_b64: {error}")))
}

/// Opens a regular file for reading. Anything else is refused, and not waited for: a FIFO that a workload has left
/// somewhere would stop the whole agent, in the opening already.
pub(crate) fn open_regular(path: &str) -> io::Result<File> {
    let nonblocking = i32::try_from(OFlags::NONBLOCK.bits()).map_err(io::Error::other)?;
    let file = fs::OpenOptions::new().read(true).custom_flags(nonblocking).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    Ok(file)
}

/// Reads all of `path` as base64.
pub(crate) fn read(path: &str, max_bytes: Option<u64>) -> Result<String, Refusal> {
    let max = max_bytes.unwrap_or(DEFAULT_MAX_READ).min(LARGEST_READ);
    let mut data = Vec::new();
    let read = open_regular(path).and_then(|file| file.take(max + 1).read_to_end(&mut data));
    match read {
        Err(error) => Err(Refusal::system(path, &error)),
        Ok(_) if data.len() as u64 > max => Err(too_large(path, max)),
        Ok(_) => Ok(STANDARD.encode(data)),
    }
}

/// Reads at most `len` bytes of `path` from `offset` as base64, and tells the file's size.
pub(crate) fn read_chunk(path: &str, offset: u64, len: u64, max_bytes: Option<u64>) -> Result<(String, u64), Refusal> {
    let system = |error: io::Error| Refusal::system(path, &error);
    let mut file = open_regular(path).map_err(system)?;
    let total = file.metadata().map_err(system)?.len();
    if let Some(max) = max_bytes.filter(|max| total > *max) {
        return Err(too_large(path, max));
    }
    let mut data = Vec::new();
    file.seek(SeekFrom::Start(offset)).map_err(system)?;
    file.take(len.min(LARGEST_CHUNK)).read_to_end(&mut data).map_err(system)?;
    Ok((STANDARD.encode(data), total))
}

fn too_large(path: &str, max: u64) -> Refusal {
    Refusal::new(format!("{path}: larger than {max} bytes"))
}
