//! A layer's archive to its content and its index, once for all images that have the layer.
//!
//! The blob is read, decompressed, hashed and taken apart in one pass; nothing of the archive is held but what passes. The
//! content gets its name first and the index last, both synced, so whoever finds an index finds the whole layer. Whoever
//! converts the same layer at the same time writes the same bytes, and the last to finish wins.

use std::fs;
use std::fs::File;
use std::io;
use std::io::Read;
use std::path::Path;
use std::thread;

use tokio_util::sync::CancellationToken;

use crate::image::AtomicFile;
use crate::image::Image;
use crate::image::Layer;
use crate::image::Progress;
use crate::image::ProgressEvent;
use crate::rootfs::archive::Archive;
use crate::rootfs::budget::Share;
use crate::rootfs::content::AppendError;
use crate::rootfs::content::ContentWriter;
use crate::rootfs::derived::Derived;
use crate::rootfs::erofs::BLOCK;
use crate::rootfs::erofs::INLINE_MAX;
use crate::rootfs::error::LayerError;
use crate::rootfs::error::LayerErrorKind;
use crate::rootfs::error::RootfsError;
use crate::rootfs::index::Entry;
use crate::rootfs::index::EntryKind;
use crate::rootfs::index::Index;
use crate::rootfs::index::IndexError;
use crate::rootfs::index::IndexWriter;
use crate::rootfs::index::Stored;
use crate::rootfs::tar_reader;
use crate::rootfs::tar_reader::TarReader;
use crate::rootfs::tar_reader::read_error;

/// What converting a layer takes.
#[derive(Debug)]
pub(super) struct Converter<'a> {
    pub(super) image: &'a Image,
    pub(super) budget: Share<'a>,
    pub(super) progress: &'a Progress,
    pub(super) abandoned: &'a CancellationToken,
}

/// Why a conversion stopped.
enum Stop {
    Layer { entry: Option<String>, kind: LayerErrorKind },
    Content(io::Error),
    Index(io::Error),
}

impl Converter<'_> {
    /// The index of `layer`, which is converted if it is not yet. Blocking.
    pub(super) fn index(&self, layer: &Layer) -> Result<Index, RootfsError> {
        let derived = Derived::of(self.image.store());
        if let Some(index) = open(&derived, layer)? {
            self.report(layer, layer.size());
            return Ok(index);
        }
        self.convert(&derived, layer)?;
        tracing::debug!(layer = %layer.digest(), diff_id = %layer.diff_id(), "layer converted");
        let index = derived.index(layer.diff_id());
        let vanished = || io::Error::new(io::ErrorKind::NotFound, "a converted layer was removed or changed at once");
        open(&derived, layer)?.ok_or_else(|| RootfsError::io(&index)(vanished()))
    }

    fn report(&self, layer: &Layer, done: u64) {
        let done = done.min(layer.size());
        self.progress.send(ProgressEvent::Unpacking { layer: *layer.digest(), done, total: layer.size() });
    }

    fn convert(&self, derived: &Derived, layer: &Layer) -> Result<(), RootfsError> {
        let folder = derived.folder();
        let content = AtomicFile::create(folder).map_err(RootfsError::io(folder))?;
        let index = match AtomicFile::create(folder) {
            Ok(index) => index,
            Err(error) => {
                content.discard();
                return Err(RootfsError::io(folder)(error));
            }
        };
        let (content_path, index_path) = (derived.content(layer.diff_id()), derived.index(layer.diff_id()));
        if let Err(stop) = self.stream(layer, content.file(), index.file()) {
            content.discard();
            index.discard();
            return Err(match stop {
                Stop::Layer { entry, kind } => self.refuse(layer, entry, kind),
                Stop::Content(error) => RootfsError::io(&content_path)(error),
                Stop::Index(error) => RootfsError::io(&index_path)(error),
            });
        }
        // What is written counts as used already.
        if let Err(error) = self.image.store().reserve(0) {
            content.discard();
            index.discard();
            return Err(error.into());
        }
        if let Err(error) = content.commit(&content_path) {
            index.discard();
            return Err(RootfsError::io(&content_path)(error));
        }
        index.commit(&index_path).map_err(RootfsError::io(&index_path))
    }

    /// The error for an archive that is not acceptable. If the blob is not the one that was fetched any more, it goes, so
    /// that the next pull fetches it again.
    fn refuse(&self, layer: &Layer, entry: Option<String>, kind: LayerErrorKind) -> RootfsError {
        if !matches!(kind, LayerErrorKind::Abandoned) {
            match self.image.discard_damaged_layer(layer) {
                Ok(true) => tracing::warn!(layer = %layer.digest(), "damaged blob removed from the store"),
                Ok(false) => {}
                Err(error) => tracing::debug!(layer = %layer.digest(), %error, "blob cannot be checked"),
            }
        }
        LayerError { layer: *layer.digest(), entry, kind }.into()
    }

    fn stream(&self, layer: &Layer, content: &File, index: &File) -> Result<(), Stop> {
        thread::scope(|scope| {
            let blob = self.image.open_layer(layer);
            let watch = |done| self.report(layer, done);
            let archive = blob.and_then(|blob| Archive::open(scope, blob, self.budget, self.abandoned, watch));
            let archive = archive.map_err(|error| Stop::layer(read_error(error)))?;
            self.split(layer, archive, content, index)
        })
    }

    /// Takes the archive apart. The archive goes with this, whatever comes of it, and its thread after that.
    fn split(&self, layer: &Layer, archive: Archive<'_>, content: &File, index: &File) -> Result<(), Stop> {
        let mut reader = TarReader::new(archive);
        let mut content = ContentWriter::new(content);
        let mut index = IndexWriter::new(index, layer.diff_id()).map_err(Stop::Index)?;
        while let Some(entry) = reader.next_entry().map_err(Stop::layer)? {
            let at = |kind| Stop::Layer { entry: Some(String::from_utf8_lossy(&entry.path).into_owned()), kind };
            self.budget.entries(1).map_err(at)?;
            if let tar_reader::EntryKind::File { size } = entry.kind {
                self.budget.content_bytes(size).map_err(at)?;
            }
            let kind = kind(&entry.kind, &mut reader, &mut content).map_err(|error| match error {
                AppendError::Layer(kind) => at(kind),
                AppendError::Write(error) => Stop::Content(error),
            })?;
            index.push(&Entry { path: entry.path, kind, meta: entry.meta }).map_err(Stop::Index)?;
        }
        let (found, length) = reader.drain().map_err(Stop::layer)?.finish();
        if found != *layer.diff_id() {
            return Err(Stop::layer(LayerErrorKind::DiffIdMismatch { found }));
        }
        let blocks = content.finish().map_err(Stop::Content)?;
        index.finish(length, blocks).map_err(Stop::Index)
    }
}

impl Stop {
    const fn layer(kind: LayerErrorKind) -> Self {
        Self::Layer { entry: None, kind }
    }
}

/// What the entry is, with its content stored.
fn kind(
    kind: &tar_reader::EntryKind,
    reader: &mut TarReader<impl Read>,
    content: &mut ContentWriter<'_>,
) -> Result<EntryKind, AppendError> {
    Ok(match kind {
        tar_reader::EntryKind::File { size } => EntryKind::File(store(*size, reader, content)?),
        tar_reader::EntryKind::Folder => EntryKind::Folder,
        tar_reader::EntryKind::Symlink(target) => EntryKind::Symlink(target.clone()),
        tar_reader::EntryKind::HardLink(target) => EntryKind::HardLink(target.clone()),
        tar_reader::EntryKind::Char { major, minor } => EntryKind::Char { major: *major, minor: *minor },
        tar_reader::EntryKind::Block { major, minor } => EntryKind::Block { major: *major, minor: *minor },
        tar_reader::EntryKind::Fifo => EntryKind::Fifo,
    })
}

fn store(size: u64, reader: &mut TarReader<impl Read>, content: &mut ContentWriter<'_>) -> Result<Stored, AppendError> {
    if size > INLINE_MAX as u64 {
        let mut pieces = reader.content();
        return content.append(|buffer| pieces.piece(buffer), size).map(|start| Stored::Blocks { start, size });
    }
    let mut bytes = Vec::with_capacity(size as usize);
    reader.content().read_to_end(&mut bytes).map_err(|error| AppendError::Layer(read_error(error)))?;
    Ok(Stored::Inline(bytes.into()))
}

/// The index of a layer, `None` if the layer is not converted or the files are damaged.
fn open(derived: &Derived, layer: &Layer) -> Result<Option<Index>, RootfsError> {
    let path = derived.index(layer.diff_id());
    let file = match File::open(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        result => result.map_err(RootfsError::io(&path))?,
    };
    match Index::open(file, layer.diff_id()) {
        Ok(index) => {
            let length = u64::from(index.totals().content_blocks) * BLOCK as u64;
            let content = derived.content(layer.diff_id());
            if has_length(&content, length).map_err(RootfsError::io(&content))? {
                return Ok(Some(index));
            }
        }
        Err(IndexError::Damaged) => {}
        Err(IndexError::Io(error)) => return Err(RootfsError::io(&path)(error)),
    }
    forget(derived, layer)?;
    Ok(None)
}

/// Whether there is a file of this length at `path`.
pub(super) fn has_length(path: &Path, length: u64) -> io::Result<bool> {
    match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        result => result.map(|metadata| metadata.is_file() && metadata.len() == length),
    }
}

/// Removes a damaged index, so that the layer is converted again. Its content stays until the new one takes its name: at
/// this moment it may be somebody else's new one.
pub(super) fn forget(derived: &Derived, layer: &Layer) -> Result<(), RootfsError> {
    let path = derived.index(layer.diff_id());
    tracing::warn!(path = %path.display(), "converted layer is damaged");
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(RootfsError::io(&path)(error)),
        _ => Ok(()),
    }
}
