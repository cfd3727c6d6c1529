//! Importing an image from an archive: a layout as one tar file, or what `docker save` writes.
//!
//! ```text
//! file ─────────────────────────┐
//! AsyncRead ─> pump ─> pieces ──┴─> decompress ─> tar ─> contents ─> docker or oci ─> found ─> store
//!             (this task)          (a thread that may block)
//! ```
//!
//! The archive goes by once, and what its files are for is known at its end: until then they are [`contents`]. It is
//! hostile: its names are keys and never paths, everything in it is counted, and nothing gets into the store but what a
//! digest vouches for.

mod choice;
mod contents;
mod docker;
mod error;
mod found;
mod input;
mod names;
mod oci;
mod options;
mod spool;

use std::io::Read;
use std::path::Path;

use tokio::io::AsyncRead;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::image::Image;
use crate::image::archive::contents::Contents;
use crate::image::archive::contents::Limits;
pub use crate::image::archive::error::ImportError;
use crate::image::archive::found::Found;
use crate::image::archive::input::Pieces;
pub use crate::image::archive::options::ImportOptions;
use crate::image::layout;
use crate::image::layout::open_regular;
use crate::image::progress::ProgressEvent;
use crate::image::reference::Reference;
use crate::image::store::ImageStore;
use crate::image::store::run_blocking;

impl ImageStore {
    /// Imports an image from an archive in the file `path`.
    ///
    /// The archive is an OCI layout as a tar file, as `skopeo`, `podman` and `buildah` write it, or what `docker save`
    /// writes, in its older or its newer form. It may be compressed by gzip or zstd.
    ///
    /// # Errors
    ///
    /// [`ImportError`] says what is wrong and where; nothing half-written is left in the store.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future abandons the import. Blobs that were complete stay; all else is removed.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn f(store: kiln::image::ImageStore) -> Result<(), kiln::image::ImportError> {
    /// use kiln::image::ImportOptions;
    /// let image = store.import_archive("images.tar.gz", &ImportOptions::new().tag("app:1.2")).await?;
    /// println!("{} has {} layers", image.digest(), image.layers().len());
    /// # Ok(()) }
    /// ```
    pub async fn import_archive(&self, path: impl AsRef<Path>, options: &ImportOptions) -> Result<Image, ImportError> {
        let path = path.as_ref().to_owned();
        let name = parse_name(options)?;
        resolving(options, path.display().to_string());
        let job = Job::new(self, options);
        let _stop = job.stop.clone().drop_guard();
        let image = run_blocking(move || match open_regular(&path) {
            Ok(file) => job.run(file),
            Err(source) => Err(ImportError::Open { path, source }),
        });
        self.remember_as(image.await?, name.as_ref()).await
    }

    /// Imports an image from an archive as it arrives, of the kinds that [`ImageStore::import_archive`] takes.
    ///
    /// The reader is read to its end.
    ///
    /// # Errors
    ///
    /// [`ImportError`] says what is wrong and where; nothing half-written is left in the store.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future abandons the import and drops the reader. Blobs that were complete stay; all else is removed.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn f(store: kiln::image::ImageStore) -> Result<(), Box<dyn std::error::Error>> {
    /// use kiln::image::ImportOptions;
    /// let mut save = tokio::process::Command::new("docker").args(["save", "app"]).stdout(std::process::Stdio::piped()).spawn()?;
    /// let archive = save.stdout.take().expect("piped");
    /// let image = store.import_archive_from(archive, &ImportOptions::new()).await?;
    /// # Ok(()) }
    /// ```
    pub async fn import_archive_from(
        &self,
        reader: impl AsyncRead + Send + Unpin + 'static,
        options: &ImportOptions,
    ) -> Result<Image, ImportError> {
        let name = parse_name(options)?;
        resolving(options, options.tag.clone().unwrap_or_else(|| "an archive".to_owned()));
        let job = Job::new(self, options);
        let stop = job.stop.clone().drop_guard();
        let (sender, receiver) = mpsc::channel(input::AHEAD);
        let import = async {
            let image = run_blocking(move || job.run(Pieces::new(receiver)));
            let pump = input::pump(reader, sender, options.step_timeout);
            tokio::join!(image, pump).0
        };
        let image = import.await?;
        drop(stop);
        self.remember_as(image, name.as_ref()).await
    }

    /// Imports an image from `path`: a folder is an OCI layout, a file an archive.
    ///
    /// # Errors
    ///
    /// As [`ImageStore::import_archive`], and [`ImportError::Layout`].
    ///
    /// # Cancel safety
    ///
    /// Dropping the future abandons the import. Blobs that were complete stay; all else is removed.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn f(store: kiln::image::ImageStore) -> Result<(), kiln::image::ImportError> {
    /// use kiln::image::ImportOptions;
    /// let image = store.import_path("app", &ImportOptions::new().name("localhost/app")).await?;
    /// # Ok(()) }
    /// ```
    pub async fn import_path(&self, path: impl AsRef<Path>, options: &ImportOptions) -> Result<Image, ImportError> {
        let path = path.as_ref().to_owned();
        let asked = path.clone();
        let is_folder = run_blocking(move || match asked.metadata() {
            Ok(meta) => Ok(meta.is_dir()),
            Err(source) => Err(ImportError::Open { path: asked, source }),
        });
        if !is_folder.await? {
            return self.import_archive(&path, options).await;
        }
        let name = parse_name(options)?;
        let image = layout::import(self, &path, options.tag.as_deref(), &options.progress).await?;
        self.remember_as(image, name.as_ref()).await
    }

    async fn remember_as(&self, image: Image, name: Option<&Reference>) -> Result<Image, ImportError> {
        if let Some(name) = name {
            self.name(name, &image).await?;
        }
        Ok(image)
    }
}

/// Refused before anything is read.
fn parse_name(options: &ImportOptions) -> Result<Option<Reference>, ImportError> {
    Ok(options.name.as_deref().map(str::parse).transpose()?)
}

fn resolving(options: &ImportOptions, reference: String) {
    options.progress.send(ProgressEvent::Resolving { reference });
}

/// What the thread does that may block.
struct Job {
    store: ImageStore,
    options: ImportOptions,
    stop: CancellationToken,
}

impl Job {
    fn new(store: &ImageStore, options: &ImportOptions) -> Self {
        Self { store: store.clone(), options: options.clone(), stop: CancellationToken::new() }
    }

    fn run(&self, source: impl Read + 'static) -> Result<Image, ImportError> {
        let mut contents = Contents::new(&self.store, self.limits());
        let result = self.import(source, &mut contents);
        contents.discard();
        result
    }

    fn limits(&self) -> Limits {
        let ImportOptions { max_entries, max_bytes, progress, .. } = &self.options;
        Limits { entries: *max_entries, bytes: *max_bytes, progress: progress.clone() }
    }

    fn import(&self, source: impl Read + 'static, contents: &mut Contents) -> Result<Image, ImportError> {
        let archive = input::open(source, self.options.max_bytes, &self.stop);
        contents.fill(archive.map_err(|error| ImportError::of_read(error, None))?)?;
        let found = self.find(contents)?;
        // First, as from now on nobody collects what the image needs.
        let image = found.assemble(&self.store)?;
        found.store(&self.store, contents, &self.options.progress, &self.stop)?;
        Ok(image)
    }

    fn find(&self, contents: &Contents) -> Result<Found, ImportError> {
        let (index, items, tag) = (oci::index(contents)?, docker::items(contents)?, self.options.tag.as_deref());
        match (index, items) {
            (Some(index), items) => oci::find(&index, &items.unwrap_or_default(), contents, tag),
            (None, Some(items)) => docker::find(items, contents, tag),
            (None, None) => {
                Err(ImportError::NotAnImage { reason: "neither an oci layout nor the manifest.json of docker" })
            }
        }
    }
}
