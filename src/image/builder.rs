//! The description of a pull: which image, from whom, with what credentials, into which store.

use std::time::Duration;

use crate::image::Image;
use crate::image::customize::ImageChanges;
use crate::image::customize::ImageFile;
use crate::image::customize::customize;
use crate::image::error::PullError;
use crate::image::manifest::Manifest;
use crate::image::platform::Platform;
use crate::image::progress::Progress;
use crate::image::reference::Reference;
use crate::image::registry;
use crate::image::registry::Credentials;
use crate::image::registry::DockerConfig;
use crate::image::registry::Mirror;
use crate::image::registry::PullOptions;
use crate::image::registry::RegistryAuth;
use crate::image::registry::RegistryTransport;
use crate::image::store::ImageStore;
use crate::image::store::run_blocking;

/// When a pull asks the registry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PullPolicy {
    /// Always resolve the reference at the registry; fetch the blobs that are missing.
    #[default]
    Always,
    /// Ask the registry only if the store does not hold the whole image, and fetch only what it lacks.
    Missing,
    /// Never use the network. An image that the store does not know is [`PullError::UnknownImage`], one of which it has
    /// lost a part [`PullError::Incomplete`].
    Never,
}

/// How long the registry may take for one step: to connect, to answer a request, to send the next
/// part of a blob. Generous for a slow link, short enough that nobody takes a dead one for alive.
const DEFAULT_STEP_TIMEOUT: Duration = Duration::from_secs(30);

/// Enough for an outage of some seconds.
const DEFAULT_RETRIES: u32 = 4;

/// As Docker does: more only share the same link.
const DEFAULT_PARALLEL_BLOBS: usize = 3;

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
    policy: PullPolicy,
    options: PullOptions,
    name: Option<String>,
    changes: ImageChanges,
}

impl OciImageBuilder {
    pub(super) fn new(reference: String) -> Self {
        Self {
            reference,
            store: None,
            policy: PullPolicy::Always,
            options: PullOptions {
                credentials: Credentials::Docker(DockerConfig::user()),
                platform: Platform::default(),
                transport: RegistryTransport::Auto,
                mirrors: Vec::new(),
                retries: DEFAULT_RETRIES,
                parallel_blobs: DEFAULT_PARALLEL_BLOBS,
                step_timeout: DEFAULT_STEP_TIMEOUT,
                progress: Progress::default(),
            },
            name: None,
            changes: ImageChanges::new(),
        }
    }

    /// The store to pull into; by default the user's, [`ImageStore::open_default`].
    pub fn store(mut self, store: ImageStore) -> Self {
        self.store = Some(store);
        self
    }

    /// Credentials for the registry of the reference, in place of those in a Docker configuration; mirrors are not shown
    /// them. [`RegistryAuth::Anonymous`] is nobody, whatever a configuration says.
    pub fn auth(mut self, auth: RegistryAuth) -> Self {
        self.options.credentials = Credentials::Given(auth);
        self
    }

    /// The Docker configuration to take credentials from, for the registry and for mirrors, in place of
    /// [`auth`](Self::auth); by default the user's, `~/.docker/config.json`.
    ///
    /// ```
    /// use kiln::image::{DockerConfig, Image};
    /// let builder = Image::builder("registry.example/app").docker_config("/etc/ci/docker.json");
    /// # drop(builder);
    /// ```
    pub fn docker_config(mut self, config: impl Into<DockerConfig>) -> Self {
        self.options.credentials = Credentials::Docker(config.into());
        self
    }

    /// Which of an index's images to pull; by default the one that guests can run, `linux/amd64`.
    ///
    /// Images for others can be pulled and kept, not started.
    pub fn platform(mut self, platform: Platform) -> Self {
        self.options.platform = platform;
        self
    }

    /// How to speak to the registry of the reference; by default HTTPS, and plain HTTP to this machine.
    ///
    /// ```
    /// use kiln::image::{Image, RegistryTransport, Tls};
    /// let plain = Image::builder("10.0.0.7:5000/app").transport(RegistryTransport::PlainHttp);
    /// let tls = Image::builder("localhost:5000/app").transport(Tls::new());
    /// # drop((plain, tls));
    /// ```
    pub fn transport(mut self, transport: impl Into<RegistryTransport>) -> Self {
        self.options.transport = transport.into();
        self
    }

    /// A registry to ask before the one in the reference; several are asked in the order they are given in. One that
    /// lacks the image or fails is passed over, with an event in the trace. A reference that pins a digest gets that
    /// image, whoever has it; for a tag, a mirror is believed.
    pub fn mirror(mut self, mirror: impl Into<Mirror>) -> Self {
        self.options.mirrors.push(mirror.into());
        self
    }

    /// How often a request is tried again that failed for a reason that may pass: the network, a timeout, too many
    /// requests (429), a failure of the server (5xx); by default 4 times, after pauses that grow from a quarter of a
    /// second to 8 seconds. Of a blob that breaks off, only the rest is asked for, and the count starts anew after each
    /// MiB. Which pause a registry asks for (`Retry-After`) is not heard. A mirror is tried again once at most.
    pub const fn retries(mut self, retries: u32) -> Self {
        self.options.retries = retries;
        self
    }

    /// How many blobs are fetched at once, at least one; by default 3.
    pub const fn parallel_blobs(mut self, limit: usize) -> Self {
        self.options.parallel_blobs = limit;
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
        self.options.step_timeout = limit;
        self
    }

    /// Whom to report to; by default nobody.
    pub fn progress(mut self, progress: Progress) -> Self {
        self.options.progress = progress;
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
                store.remember(&name, &image.config().platform, image.digest())?;
            }
            Ok(image)
        })
        .await
    }

    /// The image as its author made it.
    async fn base(&self, store: &ImageStore, reference: &Reference) -> Result<Image, PullError> {
        if self.policy != PullPolicy::Always {
            match (recall(store, reference, &self.options.platform).await?, self.policy) {
                (Recalled::Whole(image), _) => return Ok(image),
                (Recalled::Unknown, PullPolicy::Never) => {
                    return Err(PullError::UnknownImage { reference: reference.to_string() });
                }
                (Recalled::Incomplete, PullPolicy::Never) => {
                    return Err(PullError::Incomplete { reference: reference.to_string() });
                }
                _ => {}
            }
        }
        let image = registry::pull(store, reference, &self.options).await?;
        let (store, reference, digest) = (store.clone(), reference.clone(), *image.digest());
        let platform = self.options.platform.clone();
        run_blocking(move || store.remember(&reference, &platform, &digest)).await?;
        Ok(image)
    }
}

/// What the store knows of a reference.
enum Recalled {
    Whole(Image),
    /// Which image it is, and not all of it.
    Incomplete,
    Unknown,
}

async fn recall(store: &ImageStore, reference: &Reference, platform: &Platform) -> Result<Recalled, PullError> {
    let (store, reference, platform) = (store.clone(), reference.clone(), platform.clone());
    run_blocking(move || {
        // A digest says itself which image it is, by whatever name that was pulled, unless it is an index's.
        let candidates = [store.recall(&reference, &platform), reference.digest().copied()];
        let mut known = candidates[0].is_some();
        for digest in candidates.into_iter().flatten() {
            match store.load(&digest)? {
                Some(image) if image.config().require(&platform).is_ok() => return Ok(Recalled::Whole(image)),
                Some(_) => {}
                None => known |= store.read_small(&digest, Manifest::MAX_SIZE)?.is_some(),
            }
        }
        Ok(if known { Recalled::Incomplete } else { Recalled::Unknown })
    })
    .await
}
