//! A snapshot's folder, written beside its place and renamed: a crash leaves the old one or the new one.

use std::fs;
use std::fs::File;
use std::fs::OpenOptions;
use std::io;
use std::io::Write as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags, renameat_with};

use super::SnapshotError;
use super::io_error;

/// Marks folders that are being written; the rest of the name is random.
const PREFIX: &str = ".tmp-snapshot-";
/// Draws before giving up on a temporary folder: each loses only to another writer's sweep in the same moment.
const MAX_DRAWS: usize = 8;

/// A folder being written, locked for as long as its writer lives. Dropping it without [`commit`](Self::commit)
/// removes it.
#[derive(Debug)]
pub(super) struct Draft {
    path: PathBuf,
    _lock: File,
    committed: bool,
}

impl Draft {
    /// A new folder beside `target`; removes what writers that were killed have left there.
    pub(super) fn beside(target: &Path) -> Result<Self, SnapshotError> {
        let folder = parent(target);
        sweep(folder).map_err(io_error(folder))?;
        for _ in 0..MAX_DRAWS {
            let mut random = [0; 16];
            getrandom::fill(&mut random).map_err(io::Error::other).map_err(io_error(folder))?;
            let path = folder.join(format!("{PREFIX}{}", hex::encode(random)));
            fs::create_dir(&path).map_err(io_error(&path))?;
            // A sweep may take it for abandoned between its creation and the lock.
            if let Some(lock) = lock(&path).map_err(io_error(&path))? {
                return Ok(Self { path, _lock: lock, committed: false });
            }
        }
        Err(io_error(folder)(io::ErrorKind::AlreadyExists.into()))
    }

    /// A new file in the folder.
    pub(super) fn create(&self, name: &str) -> Result<File, SnapshotError> {
        let path = self.path.join(name);
        OpenOptions::new().read(true).write(true).create_new(true).open(&path).map_err(io_error(&path))
    }

    /// A new file with `bytes`, safe on disk.
    pub(super) fn write(&self, name: &str, bytes: &[u8]) -> Result<File, SnapshotError> {
        let mut file = self.create(name)?;
        let written = file.write_all(bytes).and_then(|()| file.sync_all());
        written.map(|()| file).map_err(io_error(&self.path.join(name)))
    }

    /// Gives the folder its place, in the stead of what was there.
    pub(super) fn commit(mut self, target: &Path) -> Result<(), SnapshotError> {
        let folder = parent(target);
        let old = self.rename(target).map_err(io_error(target))?;
        self.committed = true;
        File::open(folder).and_then(|folder| folder.sync_all()).map_err(io_error(folder))?;
        // What cannot be removed now is for the next writer's sweep.
        let _ = old.map(fs::remove_dir_all);
        Ok(())
    }

    /// Renames; returns where the old folder is now if there was one.
    fn rename(&self, target: &Path) -> io::Result<Option<PathBuf>> {
        File::open(&self.path)?.sync_all()?;
        match fs::rename(&self.path, target) {
            Ok(()) => Ok(None),
            // Something is there: they change places in one step, which not every filesystem can.
            Err(error) if target.is_dir() => {
                renameat_with(CWD, &self.path, CWD, target, RenameFlags::EXCHANGE).map_err(|_| error)?;
                Ok(Some(self.path.clone()))
            }
            Err(error) => Err(error),
        }
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if !self.committed {
            // What cannot be removed now is for the next writer's sweep.
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

/// Where `target` lies. A bare name lies in the current folder.
fn parent(target: &Path) -> &Path {
    target.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Locks a folder; `None` when it is not there any more.
fn lock(path: &Path) -> io::Result<Option<File>> {
    let gone = |error: io::Error| if error.kind() == io::ErrorKind::NotFound { Ok(None) } else { Err(error) };
    let folder = match File::open(path) {
        Ok(folder) => folder,
        Err(error) => return gone(error),
    };
    folder.lock()?;
    match fs::metadata(path) {
        Ok(there) => Ok((there.ino() == folder.metadata()?.ino()).then_some(folder)),
        Err(error) => gone(error),
    }
}

/// Removes folders whose writers are gone: those whose lock is free. An old snapshot whose removal was cut short is
/// one of them.
fn sweep(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if !entry.file_name().as_encoded_bytes().starts_with(PREFIX.as_bytes()) || !entry.file_type()?.is_dir() {
            continue;
        }
        // Gone meanwhile: its writer has finished, or another one sweeps too.
        let Ok(left) = File::open(entry.path()) else { continue };
        if left.try_lock().is_ok() {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
    Ok(())
}
