//! The way from an image to its root filesystem, off the executor.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use futures::StreamExt;
use tokio_util::sync::CancellationToken;

use crate::image::Image;
use crate::image::Progress;
use crate::image::ProgressEvent;
use crate::image::run_blocking;
use crate::rootfs::budget::Budget;
use crate::rootfs::convert::Converter;
use crate::rootfs::derived::Derived;
use crate::rootfs::error::LayerError;
use crate::rootfs::error::LayerErrorKind;
use crate::rootfs::error::RootfsError;
use crate::rootfs::index::Index;
use crate::rootfs::join;
use crate::rootfs::join::Distinct;
use crate::rootfs::limits::Limits;
use crate::rootfs::root_image::RootImage;

/// Layers converted at the same time, at most; more would wait for the disk.
const MAX_PARALLEL: usize = 4;

/// How often layers are converted whose index turns out to be forged: the second one is ours.
const ATTEMPTS: usize = 2;

/// Builds the root filesystem of an image: see [`Builder::build`].
///
/// ```no_run
/// # async fn f(image: kiln::Image) -> Result<(), kiln::RootfsError> {
/// use kiln::rootfs::{Builder, Limits};
/// let mut limits = Limits::default();
/// limits.archive_bytes = 1 << 30;
/// let root = Builder::new(&image).limits(limits).build().await?;
/// println!("{:?} are {} bytes", root.files(), root.size().0);
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
#[must_use = "a builder does nothing until `build`"]
pub struct Builder {
    image: Image,
    limits: Limits,
    progress: Progress,
    parallel: Option<NonZeroUsize>,
}

/// A build that is going on.
#[derive(Debug)]
struct Build {
    image: Image,
    limits: Limits,
    progress: Progress,
    distinct: Distinct,
    abandoned: CancellationToken,
}

/// How long another conversion of the same layer is waited for: longer than any takes.
const CLAIM_PATIENCE: Duration = Duration::from_secs(600);

impl Builder {
    /// For `image`, with the default limits.
    pub fn new(image: &Image) -> Self {
        Self { image: image.clone(), limits: Limits::default(), progress: Progress::default(), parallel: None }
    }

    /// How much the image may ask of this host.
    pub const fn limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// Where to report to: [`ProgressEvent::Unpacking`] for each layer, then [`ProgressEvent::Building`] and
    /// [`ProgressEvent::Built`].
    pub fn progress(mut self, progress: Progress) -> Self {
        self.progress = progress;
        self
    }

    /// How many layers are converted at the same time; else as many as there are processors, and at most four. Each takes
    /// two threads and some three megabytes of memory, for a layer in zstd what its window takes besides, up to 128 MiB.
    pub const fn parallel(mut self, layers: NonZeroUsize) -> Self {
        self.parallel = Some(layers);
        self
    }

    /// Converts the layers that are not converted yet and joins them, or finds what was joined before.
    ///
    /// All files are in the image's store. Several tasks and processes may build the same image at once.
    ///
    /// # Errors
    ///
    /// [`RootfsError::Layer`] if a layer is damaged or hostile: of several the lowest, as far as it was read when the first
    /// was found out. [`RootfsError::DiskFull`] and others if the host fails. Nothing half-written is left in the store. A
    /// blob that is not the one that was fetched any more is removed, and fetched again by the next pull.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future abandons the build at the next piece read of an archive and removes what it has half-written;
    /// layers that were converted stay.
    pub async fn build(self) -> Result<RootImage, RootfsError> {
        let abandoned = CancellationToken::new();
        let _abandon_on_drop = abandoned.clone().drop_guard();
        let Self { image, limits, progress, parallel } = self;
        let distinct = Distinct::of(&image);
        let build = Arc::new(Build { image, limits, progress, distinct, abandoned });
        for _ in 0..ATTEMPTS {
            if let Some(root) = build.find().await? {
                return Ok(root);
            }
            let indexes = build.convert(parallel).await?;
            if let Some(root) = build.join(indexes).await? {
                return Ok(root);
            }
        }
        let changed =
            std::io::Error::new(std::io::ErrorKind::InvalidData, "converted layers change while they are read");
        Err(RootfsError::io(Derived::of(build.image.store()).folder())(changed))
    }
}

impl Build {
    async fn find(self: &Arc<Self>) -> Result<Option<RootImage>, RootfsError> {
        let build = Arc::clone(self);
        run_blocking(move || {
            let found = join::find(&build.image)?;
            if found.is_some() {
                for layer in &build.distinct.layers {
                    let (layer, size) = (*layer.digest(), layer.size());
                    build.progress.send(ProgressEvent::Unpacking { layer, done: size, total: size });
                }
                build.progress.send(ProgressEvent::Building { image: *build.image.digest() });
                build.progress.send(ProgressEvent::Built { image: *build.image.digest() });
            }
            Ok(found)
        })
        .await
    }

    /// Converts several layers at a time. After an error the others are abandoned and waited for, so that nothing of them
    /// is left.
    async fn convert(self: &Arc<Self>, parallel: Option<NonZeroUsize>) -> Result<Vec<Index>, RootfsError> {
        let parallel = match parallel {
            Some(parallel) => parallel.get(),
            // It may read files to find out.
            None => run_blocking(|| Ok::<_, RootfsError>(default_parallel())).await?,
        };
        let budget = Arc::new(Budget::new(self.limits, self.distinct.layers.len()));
        let conversions = (0..self.distinct.layers.len()).map(|number| {
            let (build, budget) = (Arc::clone(self), Arc::clone(&budget));
            async move {
                // Somebody else's conversion of this layer is worth waiting for.
                let name = format!("convert {}", build.distinct.layers[number].diff_id());
                let _claim = build.image.store().claim(&name, CLAIM_PATIENCE).await?;
                run_blocking(move || build.convert_one(number, &budget).inspect_err(|_| build.abandoned.cancel())).await
            }
        });
        let results: Vec<_> = futures::stream::iter(conversions).buffered(parallel).collect().await;
        let mut indexes = Vec::with_capacity(results.len());
        let mut failed = None;
        for result in results {
            match result {
                Ok(index) => indexes.push(index),
                // Abandoned is what the first to fail made the others.
                Err(error) if failed.is_none() || failed.as_ref().is_some_and(is_abandoned) => failed = Some(error),
                Err(_) => {}
            }
        }
        failed.map_or(Ok(indexes), |error| Err(self.blame(error, &budget)))
    }

    /// Names the layer that a shared limit is due to, and not the one that happened to reach it.
    fn blame(&self, error: RootfsError, budget: &Budget) -> RootfsError {
        match (error, budget.at_fault().and_then(|number| self.distinct.layers.get(number))) {
            (
                RootfsError::Layer(LayerError { layer, kind: kind @ LayerErrorKind::Limit { .. }, .. }),
                Some(at_fault),
            ) if layer != *at_fault.digest() => LayerError { layer: *at_fault.digest(), entry: None, kind }.into(),
            (error, _) => error,
        }
    }

    fn convert_one(&self, number: usize, budget: &Budget) -> Result<Index, RootfsError> {
        let layer = &self.distinct.layers[number];
        if self.abandoned.is_cancelled() {
            return Err(LayerError { layer: *layer.digest(), entry: None, kind: LayerErrorKind::Abandoned }.into());
        }
        let Self { image, progress, abandoned, .. } = self;
        Converter { image, budget: budget.share(number), progress, abandoned }.index(layer)
    }

    async fn join(self: &Arc<Self>, indexes: Vec<Index>) -> Result<Option<RootImage>, RootfsError> {
        let build = Arc::clone(self);
        run_blocking(move || {
            let image = &build.image;
            build.progress.send(ProgressEvent::Building { image: *image.digest() });
            let joined = join::join(image, &build.distinct, indexes, build.limits, &build.abandoned)?;
            if joined.is_some() {
                build.progress.send(ProgressEvent::Built { image: *image.digest() });
            }
            Ok(joined)
        })
        .await
    }
}

const fn is_abandoned(error: &RootfsError) -> bool {
    matches!(error, RootfsError::Layer(LayerError { kind: LayerErrorKind::Abandoned, .. }))
}

fn default_parallel() -> usize {
    thread::available_parallelism().map_or(1, NonZeroUsize::get).min(MAX_PARALLEL)
}
