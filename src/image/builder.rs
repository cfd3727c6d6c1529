//! The description of a pull: which image, from whom, with what credentials, into which store.

use std::time::Duration;

use crate::image::Image;
use crate::image::customize::ImageChanges;
use crate::image::customize::ImageFile;
use crate::image::customize::customize;
use crate::image::error::PullError;
use crate::image::progress::Progress;
use crate::image::progress::ProgressEvent;
use crate::image::reference::Reference;
use crate::image::registry;
use crate::image::registry::RegistryAuth;
use crate::image::store::ImageStore;
use crate::image::store::run_blocking;

/// When a pull asks the registry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PullPolicy {
    /// Always resolve the reference at the registry; fetch the blobs that are missing.
    #[default]
    Always,
    /// Ask the registry only if the store does not hold the whole image.
    Missing,
    /// Never use the network.
    Never,
}

/// How long the registry may take for one step: to connect, to answer a request, to send the next
/// part of a blob. Generous for a slow link, short enough that nobody takes a dead one for alive.
const DEFAULT_STEP_TIMEOUT: Duration = Duration::from_secs(30);

/// Describes a pull; made by [`Image::builder`].
///
/// ```no_run
/// # async fn f() -> Result<(), kiln::image::PullError> {
/// use kiln::image::{Image, PullPolicy, RegistryAuth};
/// let image = Image::builder("localhost:5000/team/app:1.2")
///     .auth(RegistryAuth::basic("ci", "secret"))
///     .policy(PullPolicy::Missing)
///     .pull()
///     .await?;
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
#[must_use = "a builder does nothing until `pull`"]
pub struct OciImageBuilder {
    reference: String,
    store: Option<ImageStore>,
    auth: RegistryAuth,
    policy: PullPolicy,
    step_timeout: Duration,
    progress: Progress,
    name: Option<String>,
    changes: ImageChanges,
}

impl OciImageBuilder {
    pub(super) fn new(reference: String) -> Self {
        Self {
            reference,
            store: None,
            auth: RegistryAuth::Anonymous,
            policy: PullPolicy::Always,
            step_timeout: DEFAULT_STEP_TIMEOUT,
            progress: Progress::default(),
            name: None,
            changes: ImageChanges::new(),
        }
    }

    /// The store to pull into; by default the user's, [`ImageStore::open_default`].
    pub fn store(mut self, store: ImageStore) -> Self {
        self.store = Some(store);
        self
    }

    /// Credentials for the registry; by default none.
    pub fn auth(mut self, auth: RegistryAuth) -> Self {
        self.auth = auth;
        self
    }

    /// When to ask the registry; by default always.
    pub const fn policy(mut self, policy: PullPolicy) -> Self {
        self.policy = policy;
        self
    }

    /// How long the registry may take to connect, to answer, and to send each next part of a blob;
    /// by default 30 seconds. A blob as a whole must also arrive faster than 32 KiB/s on average.
    pub const fn step_timeout(mut self, limit: Duration) -> Self {
        self.step_timeout = limit;
        self
    }

    /// Whom to report to; by default nobody.
    pub fn progress(mut self, progress: Progress) -> Self {
        self.progress = progress;
        self
    }

    /// A reference under which the store shall remember the image, beside the one it is pulled by. Where it means
    /// something there already, it means this image from now on.
    pub fn name(mut self, reference: impl Into<String>) -> Self {
        self.name = Some(reference.into());
        self
    }

    /// Replaces the image's ENTRYPOINT; its CMD is dropped then, as arguments for another program.
    pub fn entrypoint<S: Into<String>>(mut self, argv: impl IntoIterator<Item = S>) -> Self {
        self.changes = self.changes.entrypoint(argv);
        self
    }

    /// Replaces the image's CMD: the arguments of its ENTRYPOINT or, without one, the whole command.
    pub fn command<S: Into<String>>(mut self, argv: impl IntoIterator<Item = S>) -> Self {
        self.changes = self.changes.command(argv);
        self
    }

    /// Sets an environment variable, in place of the image's own of that name.
    pub fn env(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.changes = self.changes.env(name, value);
        self
    }

    /// Replaces the image's USER: `user`, `uid`, `user:group`, `uid:gid`.
    pub fn user(mut self, user: impl Into<String>) -> Self {
        self.changes = self.changes.user(user);
        self
    }

    /// Replaces the image's WORKDIR; an absolute path, made in the guest where it is missing.
    pub fn workdir(mut self, folder: impl Into<String>) -> Self {
        self.changes = self.changes.workdir(folder);
        self
    }

    /// The host name of the image's guests, unless [`VmConfig::hostname`](crate::vm::VmConfig::hostname) says another.
    pub fn hostname(mut self, name: impl Into<String>) -> Self {
        self.changes = self.changes.hostname(name);
        self
    }

    /// Adds a file to the image, over its layers.
    pub fn file(mut self, file: ImageFile) -> Self {
        self.changes = self.changes.file(file);
        self
    }

    /// Pulls the image, and makes the changed one when changes were asked for.
    ///
    /// # Errors
    ///
    /// [`PullError`] says which step failed; nothing half-written is left in the store.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future abandons the pull. Blobs that were complete stay; those being written
    /// are removed.
    pub async fn pull(self) -> Result<Image, PullError> {
        let reference: Reference = self.reference.parse()?;
        let name: Option<Reference> = self.name.as_deref().map(str::parse).transpose()?;
        self.changes.check()?;
        let store = match &self.store {
            Some(store) => store.clone(),
            None => ImageStore::open_default().await?,
        };
        let image = self.base(&store, &reference).await?;
        let changes = self.changes;
        run_blocking(move || {
            let image = if changes.is_empty() { image } else { customize(&store, &image, &changes)? };
            if let Some(name) = name {
                store.remember(&name, image.digest())?;
            }
            Ok(image)
        })
        .await
    }

    /// The image as its author made it.
    async fn base(&self, store: &ImageStore, reference: &Reference) -> Result<Image, PullError> {
        if self.policy != PullPolicy::Always {
            if let Some(image) = recall(store, reference).await? {
                return Ok(image);
            }
            if self.policy == PullPolicy::Never {
                return Err(PullError::UnknownImage { reference: reference.to_string() });
            }
        }
        self.progress.send(ProgressEvent::Resolving { reference: reference.to_string() });
        let image = registry::pull(store, reference, &self.auth, self.step_timeout).await?;
        let (store, reference, digest) = (store.clone(), reference.clone(), *image.digest());
        run_blocking(move || store.remember(&reference, &digest)).await?;
        Ok(image)
    }
}

async fn recall(store: &ImageStore, reference: &Reference) -> Result<Option<Image>, PullError> {
    let (store, reference) = (store.clone(), reference.clone());
    run_blocking(move || match store.recall(&reference) {
        Some(digest) => Ok(store.load(&digest)?),
        None => Ok(None),
    })
    .await
}
