//! Where snapshots that were baked from images are kept, and which of them are still of use.
//!
//! ```text
//! <store>/baked/<image>-<variant>-<key>/   a snapshot; <image> = the manifest's digest
//! ```
//! `<variant>` stands for what the image was baked for and `<key>` for what with; of the snapshots of one variant only the
//! newest is kept by a collection. A snapshot that is removed while guests run from it goes on serving them: they
//! have its files open.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::Path;
use std::path::PathBuf;
use std::time::SystemTime;

use super::collect::digest_of;
use super::quota::occupied;
use crate::image::atomic_file::is_temporary;
use crate::image::digest::Digest;
use crate::image::store::ImageStore;
use crate::image::store::StoreError;

/// Digits of a variant's name: enough that two of one image do not meet.
const VARIANT_DIGITS: usize = 16;

/// The file that makes a folder a snapshot. It is never written again, so it tells how old that is: the folder itself would
/// be new once one of its files has been removed.
const MANIFEST: &str = "snapshot.json";

impl ImageStore {
    pub(super) fn baked(&self) -> PathBuf {
        self.root().join("baked")
    }

    /// The place of the snapshot that is baked from `image` for `variant` with what `key` stands for.
    pub(crate) fn baked_place(&self, image: &Digest, variant: &Digest, key: &Digest) -> PathBuf {
        let name = format!("{}-{}-{}", image.hex(), &variant.hex()[..VARIANT_DIGITS], key.hex());
        self.baked().join(name)
    }

    /// What all snapshots take on disk, in bytes. Blocking.
    pub(super) fn baked_size(&self) -> Result<u64, StoreError> {
        let folder = self.baked();
        let snapshots = fs::read_dir(&folder).map_err(StoreError::io(&folder))?;
        Ok(snapshots.filter_map(|entry| Some(size_of_folder(&entry.ok()?.path()))).sum())
    }

    /// Removes the snapshots of images that are not needed, and those that newer ones stand for; how many, and what they
    /// took. Blocking.
    pub(super) fn collect_baked(&self, is_needed: impl Fn(&Digest) -> bool) -> Result<(u64, u64), StoreError> {
        let folder = self.baked();
        let mut newest: HashMap<String, (SystemTime, PathBuf)> = HashMap::new();
        let mut useless = Vec::new();
        for entry in fs::read_dir(&folder).map_err(StoreError::io(&folder))? {
            let entry = entry.map_err(StoreError::io(&folder))?;
            let (path, name) = (entry.path(), entry.file_name());
            if is_temporary(&name) {
                continue;
            }
            // Without a manifest, what a collector that was killed has left.
            let baked = fs::metadata(path.join(MANIFEST)).and_then(|meta| meta.modified()).ok();
            let variant = name.to_str().and_then(|name| variant_of(name, &is_needed));
            match variant.map(|variant| newest.entry(variant.to_owned())).zip(baked) {
                None => useless.push(path),
                Some((entry, baked)) => {
                    let best = entry.or_insert_with(|| (baked, path.clone()));
                    if best.1 != path {
                        let older = if best.0 < baked { std::mem::replace(best, (baked, path)).1 } else { path };
                        useless.push(older);
                    }
                }
            }
        }
        let mut bytes = 0;
        for path in &useless {
            bytes += remove_folder(path).map_err(StoreError::io(path))?;
        }
        Ok((useless.len() as u64, bytes))
    }
}

/// Image and variant in a snapshot's name, if the image is needed.
fn variant_of<'a>(name: &'a str, is_needed: &impl Fn(&Digest) -> bool) -> Option<&'a str> {
    digest_of(name).filter(is_needed)?;
    name.get(..64 + 1 + VARIANT_DIGITS)
}

fn size_of_folder(folder: &Path) -> u64 {
    let files = fs::read_dir(folder).into_iter().flatten();
    // Gone meanwhile counts nothing.
    files.filter_map(|entry| Some(occupied(&entry.ok()?.metadata().ok()?))).sum()
}

/// What the folder took. It has no snapshot any more from the first moment on: the manifest goes first.
fn remove_folder(folder: &Path) -> io::Result<u64> {
    let bytes = size_of_folder(folder);
    let there = |result: io::Result<()>| match result {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    };
    if !fs::symlink_metadata(folder).is_ok_and(|meta| meta.is_dir()) {
        return there(fs::remove_file(folder)).map(|()| bytes);
    }
    there(fs::remove_file(folder.join(MANIFEST)))?;
    there(fs::remove_dir_all(folder)).map(|()| bytes)
}
