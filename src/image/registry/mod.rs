//! Pulling from a registry (distribution-spec), by `oci-client`.
//!
//! That crate speaks the protocol; this module gets the credentials and tokens for it, decides what to fetch, from whom,
//! how often to try, and checks what arrives.
//!
//! ```text
//! mirrors, then the origin: source ── login, manifests ──> index_search ──> blobs, some at once ──> store
//!           auth, docker_config, helper, login ─┘  └─ transport    backoff, failure ─┘
//! ```
//!
//! Every step has a deadline. Plain HTTP is spoken to loopback registries and to those for which the caller asks for it.
//!
//! Known limits of `oci-client`: it reads a manifest or a refusal into memory whole before its size can be refused, so a
//! hostile registry can make this process hold what it manages to send within one step's deadline (blobs, configurations
//! included, are streamed and stop at their promised size). It shows no headers, so `Retry-After` is not heard and
//! `Content-Range` not compared; the length of a partial answer and the digest of the whole are.

mod auth;
mod backoff;
mod blob;
mod docker_config;
mod failure;
mod helper;
mod login;
mod source;
mod transport;

use std::collections::HashSet;
use std::time::Duration;

use futures::StreamExt;
use futures::stream;

pub(super) use auth::Credentials;
pub use auth::RegistryAuth;
pub use docker_config::CredentialsError;
pub use docker_config::DockerConfig;
pub use helper::HelperError;
pub use transport::Mirror;
pub use transport::RegistryTransport;
pub use transport::Tls;

use crate::image::Image;
use crate::image::config::ImageConfig;
use crate::image::digest::Digest;
use crate::image::error::ManifestError;
use crate::image::error::PullError;
use crate::image::index_search::IndexSearch;
use crate::image::manifest::Descriptor;
use crate::image::manifest::Manifest;
use crate::image::manifest::Resolved;
use crate::image::platform::Platform;
use crate::image::progress::Progress;
use crate::image::progress::ProgressEvent;
use crate::image::reference::Reference;
use crate::image::registry::blob::Download;
use crate::image::registry::blob::MIN_BYTES_PER_SECOND;
use crate::image::registry::source::Patience;
use crate::image::registry::source::Source;
use crate::image::store::ImageStore;
use crate::image::store::Lease;
use crate::image::store::run_blocking;

/// How we call ourselves.
const USER_AGENT: &str = concat!("kiln/", env!("CARGO_PKG_VERSION"));

/// How often a mirror is tried again: there is somebody else to ask.
const MIRROR_RETRIES: u32 = 1;

/// What a pull may be told beyond the image's name.
#[derive(Clone, Debug)]
pub(super) struct PullOptions {
    pub(super) credentials: Credentials,
    pub(super) platform: Platform,
    pub(super) transport: RegistryTransport,
    pub(super) mirrors: Vec<Mirror>,
    pub(super) retries: u32,
    pub(super) parallel_blobs: usize,
    pub(super) step_timeout: Duration,
    pub(super) progress: Progress,
}

/// Pulls `reference` into `store`: from the first mirror that has it, or else from its own registry.
#[tracing::instrument(skip_all, fields(%reference))]
pub(super) async fn pull(store: &ImageStore, reference: &Reference, options: &PullOptions) -> Result<Image, PullError> {
    // reqwest takes its TLS implementation from rustls's process-wide default and has no other way
    // in through oci-client. An embedding program that has chosen a provider keeps its choice.
    let _ = rustls::crypto::ring::default_provider().install_default();
    for mirror in &options.mirrors {
        mirror.check()?;
    }
    for mirror in &options.mirrors {
        match pull_from(store, reference, Some(mirror), options).await {
            Err(error) if is_the_sources(&error) => {
                let cause: &dyn std::error::Error = &error;
                tracing::warn!(mirror = mirror.host(), error = cause, "the mirror is passed over");
            }
            result => return result,
        }
    }
    pull_from(store, reference, None, options).await
}

/// Whether another source may do better.
const fn is_the_sources(error: &PullError) -> bool {
    !matches!(error, PullError::Store(_) | PullError::Credentials(_) | PullError::CaCertificate(_))
}

async fn pull_from(
    store: &ImageStore,
    reference: &Reference,
    mirror: Option<&Mirror>,
    options: &PullOptions,
) -> Result<Image, PullError> {
    let host = mirror.map_or_else(|| reference.registry(), Mirror::host);
    let auth = match &options.credentials {
        // Meant for the origin, and not to be shown to others.
        Credentials::Given(_) if mirror.is_some() => RegistryAuth::Anonymous,
        Credentials::Given(auth) => auth.clone(),
        Credentials::Docker(config) => config.credentials(host).await?,
    };
    let transport = mirror.map_or(&options.transport, Mirror::speak);
    let retries = mirror.map_or(options.retries, |_| options.retries.min(MIRROR_RETRIES));
    let patience = Patience { step_timeout: options.step_timeout, retries };
    let source = {
        let (reference, transport) = (reference.clone(), transport.clone());
        let mirror = mirror.map(|mirror| mirror.host().to_owned());
        // Blocking: the authorities that the system trusts are read from files.
        run_blocking(move || Source::new(&reference, mirror.as_deref(), &transport, auth, patience)).await?
    };
    Pull { source, reference, store, options }.run().await
}

struct Pull<'a> {
    source: Source,
    reference: &'a Reference,
    store: &'a ImageStore,
    options: &'a PullOptions,
}

impl Pull<'_> {
    async fn run(&self) -> Result<Image, PullError> {
        self.options.progress.send(ProgressEvent::Resolving { reference: self.reference.to_string() });
        self.source.login().await?;
        let (digest, manifest, _lease) = self.resolve().await?;
        let config = self.config(&manifest).await?;
        // Judged before the layers are fetched: an image that cannot run is not worth the transfer.
        let (store, parsed) = (self.store.clone(), manifest.clone());
        let image = run_blocking(move || Ok::<_, PullError>(store.assemble(digest, &parsed, &config)?)).await?;
        image.config().require(&self.options.platform).map_err(ManifestError::from)?;
        let layers = manifest.layers.iter().map(|layer| (layer.digest, layer.size)).collect();
        self.options.progress.send(ProgressEvent::Resolved { image: digest, layers });
        self.layers(&manifest).await?;
        tracing::debug!(%digest, registry = %self.source.registry, layers = manifest.layers.len(), "pulled");
        Ok(image)
    }

    /// Follows the reference through indexes to an image manifest, which ends up in the store; all of the image is kept from
    /// now on.
    async fn resolve(&self) -> Result<(Digest, Manifest, Lease), PullError> {
        let mut search = IndexSearch::open(self.options.platform.clone());
        let (mut digest, mut bytes) = self.source.manifest(self.reference.digest()).await?;
        loop {
            match Resolved::parse(&bytes)? {
                Resolved::Image(manifest) => {
                    let store = self.store.clone();
                    let blobs = manifest.blobs(digest);
                    let keep = move || {
                        let lease = store.lease(&blobs)?;
                        store.put_small(&digest, &bytes).map(|()| lease)
                    };
                    return Ok((digest, manifest, run_blocking(keep).await?));
                }
                Resolved::Index(index) => search.index(&index)?,
            }
            (digest, bytes) = self.source.manifest(Some(&search.next()?.digest)).await?;
        }
    }

    async fn config(&self, manifest: &Manifest) -> Result<Vec<u8>, PullError> {
        let what = "configuration";
        if manifest.config.size > ImageConfig::MAX_SIZE {
            return Err(PullError::TooLarge { what: what.to_owned(), limit: ImageConfig::MAX_SIZE });
        }
        // By content, not by size as the layers: so a damaged store heals by fetching again.
        if let Some(bytes) = self.stored(&manifest.config).await? {
            return Ok(bytes);
        }
        self.fetch(what.to_owned(), &manifest.config, None).await?;
        let vanished = || self.source.asked(what).registry("the blob vanished from the store");
        self.stored(&manifest.config).await?.ok_or_else(vanished)
    }

    async fn stored(&self, blob: &Descriptor) -> Result<Option<Vec<u8>>, PullError> {
        let (store, digest) = (self.store.clone(), blob.digest);
        run_blocking(move || Ok(store.read_small(&digest, ImageConfig::MAX_SIZE)?)).await
    }

    /// Fetches the layers, each once. After a failure the other transfers are stopped and waited for, not dropped: when
    /// the error is returned, what they had written is gone.
    async fn layers(&self, manifest: &Manifest) -> Result<(), PullError> {
        let mut seen = HashSet::new();
        let layers = manifest.layers.iter().cloned().enumerate().filter(|(_, layer)| seen.insert(layer.digest));
        // Owned items: a closure over borrowed ones is too general for the compiler to see that the future is `Send`.
        let layers: Vec<_> = layers.collect();
        self.reserve(layers.iter().map(|(_, layer)| (layer.digest, layer.size)).collect()).await?;
        let layers = layers.into_iter().map(|(index, layer)| async move {
            let result = self.layer(index, &layer).await;
            if result.is_err() {
                self.source.stop.cancel();
            }
            result
        });
        // In the order they end, so the first error is the one that stopped the rest.
        let results: Vec<_> = stream::iter(layers).buffer_unordered(self.options.parallel_blobs.max(1)).collect().await;
        results.into_iter().collect()
    }

    /// Makes sure that there is room for all that is missing: each layer by itself might fit.
    async fn reserve(&self, layers: Vec<(Digest, u64)>) -> Result<(), PullError> {
        let store = self.store.clone();
        let missing = move || {
            let missing = layers.iter().filter(|(digest, size)| !store.contains(digest, *size)).map(|(_, size)| *size);
            Ok(store.reserve(missing.fold(0, u64::saturating_add))?)
        };
        run_blocking(missing).await
    }

    /// A layer that is here is not fetched, and one that somebody else is fetching is waited for.
    async fn layer(&self, index: usize, layer: &Descriptor) -> Result<(), PullError> {
        let what = format!("layer {index}");
        let name = format!("fetch {}", layer.digest);
        let _claim = tokio::select! {
            claim = self.store.claim(&name, self.source.blob_limit(layer.size, MIN_BYTES_PER_SECOND)) => claim?,
            () = self.source.stop.cancelled() => None,
        };
        let (store, digest, size) = (self.store.clone(), layer.digest, layer.size);
        if run_blocking(move || Ok::<_, PullError>(store.contains(&digest, size))).await? {
            self.options.progress.send(ProgressEvent::Fetching { layer: digest, done: size, total: size });
            return Ok(());
        }
        self.fetch(what, layer, Some(&self.options.progress)).await
    }

    async fn fetch(&self, what: String, blob: &Descriptor, progress: Option<&Progress>) -> Result<(), PullError> {
        Download { source: &self.source, store: self.store, what, blob, progress }.run().await
    }
}
