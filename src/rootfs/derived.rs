//! Where in a store the files made from layers are.
//!
//! ```text
//! <diff id>-2.content   contents of a layer's longer files (see `content`)
//! <diff id>-2.index     the layer's entries (see `index`); complete means that the content is too
//! <chain id>-2.erofs    the metadata of an image's filesystem, which refers to contents (see `record`)
//! ```

use std::path::Path;
use std::path::PathBuf;

use crate::image::Digest;
use crate::image::ImageStore;

/// Raised when the same layers give other bytes than before, so that old files are not taken.
pub(super) const VERSION: u32 = 2;

/// The folder of a store.
#[derive(Clone, Debug)]
pub(super) struct Derived {
    folder: PathBuf,
}

impl Derived {
    pub(super) fn of(store: &ImageStore) -> Self {
        Self { folder: store.derived() }
    }

    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    pub(super) fn content(&self, diff_id: &Digest) -> PathBuf {
        self.place(diff_id, "content")
    }

    pub(super) fn index(&self, diff_id: &Digest) -> PathBuf {
        self.place(diff_id, "index")
    }

    pub(super) fn joined(&self, chain_id: &Digest) -> PathBuf {
        self.place(chain_id, "erofs")
    }

    fn place(&self, id: &Digest, what: &str) -> PathBuf {
        self.folder.join(format!("{}-{VERSION}.{what}", id.hex()))
    }
}
