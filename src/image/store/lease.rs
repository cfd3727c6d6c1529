//! What is in use, so that no collector of whatever process removes it.
//!
//! A lease is a file that lists digests and is locked by whoever needs them. One whose lock is free belongs to nobody any
//! more and counts for nothing.

use std::collections::HashSet;
use std::fs;
use std::fs::File;
use std::fs::TryLockError;
use std::io;
use std::io::Read;
use std::path::Path;
use std::path::PathBuf;

use crate::image::atomic_file::AtomicFile;
use crate::image::digest::Digest;
use crate::image::store::ImageStore;
use crate::image::store::StoreError;

/// Largest lease that is read: many times that of an image with all the layers that it may have.
const MAX_SIZE: u64 = 1 << 20;

/// Keeps blobs, and what is made from them, for as long as it lives.
///
/// The file is one that [`AtomicFile`] never gives a name of its own: locked while it is needed and gone with its owner,
/// as such files are.
#[derive(Debug)]
pub(crate) struct Lease {
    _file: AtomicFile,
}

impl ImageStore {
    pub(super) fn leases(&self) -> PathBuf {
        self.root().join("leases")
    }

    /// Keeps `digests`: of blobs, and the diff ids and chain ids of what is made from them, there or not. Blocking.
    pub(crate) fn lease(&self, digests: &[Digest]) -> Result<Lease, StoreError> {
        let folder = self.leases();
        // A collector that is at work may have looked at the leases already.
        let _no_collector = self.lock_shared()?;
        let file = AtomicFile::create(&folder).map_err(StoreError::io(&folder))?;
        let lines: String = digests.iter().map(|digest| format!("{digest}\n")).collect();
        match io::Write::write_all(&mut file.file(), lines.as_bytes()) {
            Ok(()) => Ok(Lease { _file: file }),
            Err(error) => {
                file.discard();
                Err(StoreError::io(&folder)(error))
            }
        }
    }
}

/// The digests of all leases; those that belong to nobody are removed. Only under the exclusive lock. Blocking.
pub(super) fn leased(folder: &Path) -> io::Result<HashSet<Digest>> {
    let mut digests = HashSet::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let Ok(file) = File::open(&path) else { continue };
        match file.try_lock() {
            Ok(()) => drop(fs::remove_file(&path)),
            Err(TryLockError::WouldBlock) => {
                let mut text = String::new();
                file.take(MAX_SIZE).read_to_string(&mut text)?;
                digests.extend(text.lines().filter_map(|line| line.parse::<Digest>().ok()));
            }
            Err(TryLockError::Error(error)) => return Err(error),
        }
    }
    Ok(digests)
}
