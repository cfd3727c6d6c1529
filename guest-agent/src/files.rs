//! Files that the host writes and reads: whole, and atomic.

use std::fs;
use std::fs::File;
use std::fs::Permissions;
use std::io;
use std::io::Read;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::path::PathBuf;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rustix::fs::OFlags;

/// Permission bits of a file whose writer names none.
const DEFAULT_MODE: u32 = 0o644;

/// The largest file that `read_file` answers unless told otherwise (4 MiB).
const DEFAULT_MAX_READ: u64 = 4 << 20;

/// The largest file that fits one CONTROL frame as base64 (11 MiB).
const LARGEST_READ: u64 = 11 << 20;

/// Writes `data_b64` to `path`: readers see the old file or the whole new one.
pub(crate) fn write(path: &str, data_b64: &str, mode: Option<u32>) -> Result<(), String> {
    let data = STANDARD.decode(data_b64).map_err(|error| format!("data_b64: {error}"))?;
    write_atomically(Path::new(path), &data, mode.unwrap_or(DEFAULT_MODE)).map_err(|error| format!("{path}: {error}"))
}

pub(crate) fn write_atomically(path: &Path, data: &[u8], mode: u32) -> io::Result<()> {
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
    let mut temporary_name = std::ffi::OsString::from(".");
    temporary_name.push(name);
    temporary_name.push(".kiln-new");
    let temporary: PathBuf = path.with_file_name(temporary_name);
    // Left over from an agent that was stopped in between; `create_new` then never follows a link put there.
    let _ = fs::remove_file(&temporary);
    let written = (|| {
        let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
        file.write_all(data)?;
        file.set_permissions(Permissions::from_mode(mode & 0o7777))?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    })();
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written
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
pub(crate) fn read(path: &str, max_bytes: Option<u64>) -> Result<String, String> {
    let max = max_bytes.unwrap_or(DEFAULT_MAX_READ).min(LARGEST_READ);
    let mut data = Vec::new();
    let read = open_regular(path).and_then(|file| file.take(max + 1).read_to_end(&mut data));
    match read {
        Err(error) => Err(format!("{path}: {error}")),
        Ok(_) if data.len() as u64 > max => Err(format!("{path}: larger than {max} bytes")),
        Ok(_) => Ok(STANDARD.encode(data)),
    }
}
