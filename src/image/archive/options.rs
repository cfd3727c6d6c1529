//! How an image is imported: which one of several, under what name, within which limits.

use std::time::Duration;

use crate::image::progress::Progress;

/// How long a source may take for its next byte.
const STEP_TIMEOUT: Duration = Duration::from_secs(30);

/// As much as an image may have after decompression.
const MAX_BYTES: u64 = 64 << 30;

/// Archives of images have three entries a layer.
const MAX_ENTRIES: u64 = 64 << 10;

/// Which image to import from an archive or layout, and how. The default takes the only image there is.
///
/// ```
/// use kiln::image::ImportOptions;
/// let options = ImportOptions::new().tag("app:1.2").name("localhost/app:1.2");
/// # drop(options);
/// ```
#[derive(Clone, Debug)]
#[must_use = "options do nothing until something is imported with them"]
pub struct ImportOptions {
    pub(in crate::image) tag: Option<String>,
    pub(in crate::image) name: Option<String>,
    pub(in crate::image) progress: Progress,
    pub(super) step_timeout: Duration,
    pub(super) max_bytes: u64,
    pub(super) max_entries: u64,
}

impl Default for ImportOptions {
    fn default() -> Self {
        Self {
            tag: None,
            name: None,
            progress: Progress::default(),
            step_timeout: STEP_TIMEOUT,
            max_bytes: MAX_BYTES,
            max_entries: MAX_ENTRIES,
        }
    }
}

impl ImportOptions {
    /// The only image there is, without a name.
    pub fn new() -> Self {
        Self::default()
    }

    /// Which of several images: a repository and tag that `docker save` wrote down, or the value of the annotation
    /// `org.opencontainers.image.ref.name` or `io.containerd.image.name` in an OCI archive; `app:1` and
    /// `docker.io/library/app:1` mean the same. In a folder only the first annotation counts.
    pub fn tag(mut self, tag: impl Into<String>) -> Self {
        self.tag = Some(tag.into());
        self
    }

    /// A reference under which the store shall remember the image, so that [`Image::builder`](crate::image::Image::builder)
    /// finds it there without a network. Where it means something already, it means this image from now on.
    pub fn name(mut self, reference: impl Into<String>) -> Self {
        self.name = Some(reference.into());
        self
    }

    /// Whom to report to; by default nobody.
    pub fn progress(mut self, progress: Progress) -> Self {
        self.progress = progress;
        self
    }

    /// How long a reader may take for its next byte; by default 30 seconds. A file has no such limit.
    pub const fn step_timeout(mut self, limit: Duration) -> Self {
        self.step_timeout = limit;
        self
    }

    /// How many bytes an archive may have, both as it arrives and after decompression; by default 64 GiB.
    pub const fn max_bytes(mut self, limit: u64) -> Self {
        self.max_bytes = limit;
        self
    }

    /// How many entries an archive may have; by default 64 Ki.
    pub const fn max_entries(mut self, limit: u64) -> Self {
        self.max_entries = limit;
        self
    }
}
