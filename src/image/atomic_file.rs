//! Files that appear whole or not at all.
//!
//! Written beside their place under a temporary name, synced, renamed. The writer holds an
//! exclusive lock on the temporary file for as long as it lives, so whoever opens the folder next
//! can tell the debris of a killed process (lock free) from a write in progress (lock held) without
//! guessing by age.

use std::ffi::OsStr;
use std::fs;
use std::fs::File;
use std::fs::OpenOptions;
use std::fs::TryLockError;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::path::PathBuf;

/// Marks temporary files; no finished file's name starts so.
const PREFIX: &str = ".tmp-";

/// Draws before giving up on finding a free temporary name: with 128 random bits a second draw is
/// already a sign of a broken random source.
const MAX_DRAWS: usize = 8;

/// A file being written. Dropping it without [`AtomicFile::commit`] removes it.
#[derive(Debug)]
pub(crate) struct AtomicFile {
    file: Option<File>,
    path: PathBuf,
    committed: bool,
}

impl AtomicFile {
    /// Creates a temporary file in `folder`. Blocking.
    pub(crate) fn create(folder: &Path) -> io::Result<Self> {
        for _ in 0..MAX_DRAWS {
            let mut random = [0; 16];
            getrandom::fill(&mut random).map_err(io::Error::other)?;
            let path = folder.join(format!("{PREFIX}{}", hex::encode(random)));
            let file = match OpenOptions::new().read(true).write(true).create_new(true).open(&path) {
                Ok(file) => file,
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                Err(error) => return Err(error),
            };
            file.lock()?;
            // A sweep may have taken the file for debris between its creation and the lock.
            if file.metadata()?.nlink() > 0 {
                return Ok(Self { file: Some(file), path, committed: false });
            }
        }
        Err(io::Error::new(io::ErrorKind::AlreadyExists, "no free temporary name"))
    }

    /// The open file.
    pub(crate) fn file(&self) -> &File {
        self.file.as_ref().expect("the file is taken only by commit and drop, which consume it")
    }

    /// Syncs the content and gives it its name, replacing what was there. Blocking.
    pub(crate) fn commit(mut self, target: &Path) -> io::Result<()> {
        if let Err(error) = self.file().sync_all().and_then(|()| fs::rename(&self.path, target)) {
            self.discard();
            return Err(error);
        }
        self.committed = true;
        // The rename itself lives in the folder.
        if let Some(folder) = target.parent() {
            File::open(folder)?.sync_all()?;
        }
        Ok(())
    }

    /// Removes the file now, on a thread that may block; dropping does it later, in the background.
    pub(crate) fn discard(mut self) {
        self.committed = true;
        // A failure leaves debris that the next sweep finds.
        let _ = fs::remove_file(&self.path);
    }

    /// Writes `bytes` to `target` in one step. Blocking.
    pub(crate) fn write(target: &Path, bytes: &[u8]) -> io::Result<()> {
        let folder = target.parent().ok_or(io::ErrorKind::InvalidInput)?;
        let file = Self::create(folder)?;
        match io::Write::write_all(&mut file.file(), bytes) {
            Ok(()) => file.commit(target),
            Err(error) => {
                file.discard();
                Err(error)
            }
        }
    }

    /// Removes what killed writers left in `folder`; writes in progress are untouched. How many files that were. Blocking.
    pub(crate) fn sweep(folder: &Path) -> io::Result<u64> {
        let mut removed = 0;
        for entry in fs::read_dir(folder)? {
            let entry = entry?;
            if !is_temporary(&entry.file_name()) {
                continue;
            }
            // Gone meanwhile: its writer has finished.
            let Ok(file) = File::open(entry.path()) else { continue };
            match file.try_lock() {
                Ok(()) => {
                    remove_if_present(&entry.path())?;
                    removed += 1;
                }
                Err(TryLockError::WouldBlock) => {}
                Err(TryLockError::Error(error)) => return Err(error),
            }
        }
        Ok(removed)
    }
}

/// Whether a file of this name is one that has not got its own name yet.
pub(crate) fn is_temporary(name: &OsStr) -> bool {
    name.as_encoded_bytes().starts_with(PREFIX.as_bytes())
}

/// A file, or a folder that somebody was writing under such a name.
fn remove_if_present(path: &Path) -> io::Result<()> {
    let is_folder = fs::symlink_metadata(path).is_ok_and(|meta| meta.is_dir());
    match if is_folder { fs::remove_dir_all(path) } else { fs::remove_file(path) } {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

impl Drop for AtomicFile {
    fn drop(&mut self) {
        if self.committed {
            return;
        }
        // A failure leaves debris that the next sweep finds.
        let _ = fs::remove_file(&self.path);
        // The name goes at once; freeing the blocks of a large file, which the last close does, takes
        // milliseconds that are not an executor's.
        if let (Some(file), Ok(runtime)) = (self.file.take(), tokio::runtime::Handle::try_current()) {
            drop(runtime.spawn_blocking(move || drop(file)));
        }
    }
}
