//! Files that have arrived and of which it is not known yet whether they are needed.
//!
//! Each is a temporary file among the blobs, which a rename makes one.

use std::fs::File;
use std::io;
use std::io::Read;
use std::io::Seek;
use std::io::Write;
use std::path::PathBuf;

use crate::image::atomic_file::AtomicFile;
use crate::image::digest::Digest;
use crate::image::store::ImageStore;
use crate::image::store::StoreError;

/// Makes files beside the store's blobs.
#[derive(Debug)]
pub(super) struct Spool {
    store: ImageStore,
    folder: PathBuf,
}

/// A file being written. Dropping it removes it.
#[derive(Debug)]
pub(super) struct SpoolWriter {
    file: AtomicFile,
    folder: PathBuf,
}

/// A complete file. Dropping it removes it.
#[derive(Debug)]
pub(super) struct Spooled {
    file: AtomicFile,
}

impl Spool {
    pub(super) fn new(store: &ImageStore) -> Self {
        Self { store: store.clone(), folder: store.blobs() }
    }

    /// Starts a file of `size` bytes. Blocking.
    pub(super) fn file(&self, size: u64) -> Result<SpoolWriter, StoreError> {
        self.store.reserve(size)?;
        let file = AtomicFile::create(&self.folder).map_err(StoreError::io(&self.folder))?;
        Ok(SpoolWriter { file, folder: self.folder.clone() })
    }

    /// Makes a file the blob of this digest, which it has been found to have. Blocking.
    pub(super) fn adopt(&self, file: Spooled, digest: &Digest) -> Result<(), StoreError> {
        let path = self.store.blob_path(digest);
        file.file.commit(&path).map_err(StoreError::io(&path))
    }
}

impl SpoolWriter {
    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        self.file.file().write_all(bytes).map_err(StoreError::io(&self.folder))
    }

    pub(super) fn finish(self) -> Spooled {
        Spooled { file: self.file }
    }

    pub(super) fn discard(self) {
        self.file.discard();
    }
}

impl Spooled {
    /// Reads all of it, which is known to be short. Blocking.
    pub(super) fn read(&self) -> io::Result<Vec<u8>> {
        let mut file: &File = self.file.file();
        file.rewind()?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    pub(super) fn discard(self) {
        self.file.discard();
    }
}
