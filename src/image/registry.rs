//! Pulling from a registry (distribution-spec), by `oci-client`.
//!
//! That crate speaks the protocol and does the authentication; this module decides what to fetch
//! and checks what arrives. Every step has a deadline. Plain HTTP is spoken to loopback registries
//! and to no others.
//!
//! Known limit: `oci-client` reads a manifest into memory whole before its size can be refused, so
//! a hostile registry can make this process hold what it manages to send within one step's
//! deadline. Blobs, configurations included, are streamed and stop at their promised size.

use std::error::Error;
use std::fmt;
use std::io;
use std::time::Duration;

use futures::StreamExt;
use futures::stream;
use oci_client::Client;
use oci_client::client::ClientConfig;
use oci_client::client::ClientProtocol;
use oci_client::client::SizedStream;
use oci_client::errors::DigestError;
use oci_client::errors::OciDistributionError;
use oci_client::errors::OciErrorCode;
use tokio::time::Instant;
use tokio::time::timeout;
use tokio::time::timeout_at;
use tokio_util::sync::CancellationToken;

use crate::image::Image;
use crate::image::config::ImageConfig;
use crate::image::digest::Digest;
use crate::image::error::ManifestError;
use crate::image::error::PullError;
use crate::image::manifest::DOCKER_LIST;
use crate::image::manifest::DOCKER_MANIFEST;
use crate::image::manifest::Descriptor;
use crate::image::manifest::MAX_INDEX_DEPTH;
use crate::image::manifest::Manifest;
use crate::image::manifest::OCI_INDEX;
use crate::image::manifest::OCI_MANIFEST;
use crate::image::manifest::Resolved;
use crate::image::reference::Reference;
use crate::image::store::BlobWriter;
use crate::image::store::ExpectedBlob;
use crate::image::store::ImageStore;
use crate::image::store::run_blocking;

/// Blobs fetched at once, as Docker does: more only share the same link.
const PARALLEL_BLOBS: usize = 3;

/// How much of a blob is gathered before it is hashed and written in one blocking job. With
/// [`PARALLEL_BLOBS`] this bounds a pull's memory.
const WRITE_CHUNK: usize = 1 << 20;

/// A blob slower than this, on average, is a registry that keeps us waiting, in bytes a second.
const MIN_BYTES_PER_SECOND: u64 = 32 << 10;

/// As good as never, and still within the clock's range whatever was asked for.
const FAR_FUTURE: Duration = Duration::from_secs(30 * 365 * 24 * 3600);

/// Who to be at the registry. Its `Debug` form hides the secret.
#[derive(Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum RegistryAuth {
    /// Nobody. A registry that hands out tokens to everyone is asked for one.
    #[default]
    Anonymous,
    /// User and password, for basic authentication or in exchange for a token.
    Basic {
        /// The user.
        user: String,
        /// The password.
        password: String,
    },
}

impl RegistryAuth {
    /// User and password.
    #[must_use]
    pub fn basic(user: impl Into<String>, password: impl Into<String>) -> Self {
        Self::Basic { user: user.into(), password: password.into() }
    }

    fn to_oci(&self) -> oci_client::secrets::RegistryAuth {
        match self {
            Self::Anonymous => oci_client::secrets::RegistryAuth::Anonymous,
            Self::Basic { user, password } => oci_client::secrets::RegistryAuth::Basic(user.clone(), password.clone()),
        }
    }
}

impl fmt::Debug for RegistryAuth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Anonymous => f.write_str("Anonymous"),
            Self::Basic { user, .. } => f.debug_struct("Basic").field("user", user).finish_non_exhaustive(),
        }
    }
}

/// Pulls `reference` into `store`.
#[tracing::instrument(skip_all, fields(%reference))]
pub(super) async fn pull(
    store: &ImageStore,
    reference: &Reference,
    auth: &RegistryAuth,
    step_timeout: Duration,
) -> Result<Image, PullError> {
    let client = client(reference, step_timeout)?;
    let stop = CancellationToken::new();
    let pull = Pull { client, reference, auth: auth.to_oci(), store, step_timeout, stop };
    let (digest, manifest) = pull.resolve().await?;
    let config = pull.config(&manifest).await?;
    // Parsed before the layers are fetched: an image that cannot run is not worth the transfer.
    let image = store.assemble(digest, &manifest, &config)?;
    pull.layers(&manifest).await?;
    tracing::debug!(%digest, layers = manifest.layers.len(), "pulled");
    Ok(image)
}

fn client(reference: &Reference, step_timeout: Duration) -> Result<Client, PullError> {
    // reqwest takes its TLS implementation from rustls's process-wide default and has no other way
    // in through oci-client. An embedding program that has chosen a provider keeps its choice.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let protocol = if reference.is_loopback() {
        ClientProtocol::HttpsExcept(vec![reference.as_oci().resolve_registry().to_owned()])
    } else {
        ClientProtocol::Https
    };
    let config = ClientConfig {
        protocol,
        connect_timeout: Some(step_timeout),
        read_timeout: Some(step_timeout),
        user_agent: concat!("kiln/", env!("CARGO_PKG_VERSION")),
        ..ClientConfig::default()
    };
    Client::try_from(config).map_err(|error| PullError::HttpClient(error.into()))
}

struct Pull<'a> {
    client: Client,
    reference: &'a Reference,
    auth: oci_client::secrets::RegistryAuth,
    store: &'a ImageStore,
    step_timeout: Duration,
    /// Set when one blob has failed, so that the others end and clean up.
    stop: CancellationToken,
}

impl Pull<'_> {
    /// Fetches the layers. After a failure the other transfers are stopped and waited for, not
    /// dropped: when the error is returned, what they had written is gone.
    async fn layers(&self, manifest: &Manifest) -> Result<(), PullError> {
        // Owned items: a closure over borrowed ones is too general for the compiler to see that the future is `Send`.
        let layers = manifest.layers.iter().cloned().enumerate().map(|(index, layer)| async move {
            let result = self.blob(format!("layer {index}"), &layer).await;
            if result.is_err() {
                self.stop.cancel();
            }
            result
        });
        // In the order they end, so the first error is the one that stopped the rest.
        let results: Vec<_> = stream::iter(layers).buffer_unordered(PARALLEL_BLOBS).collect().await;
        results.into_iter().collect()
    }

    /// Follows the reference through indexes to an image manifest, which ends up in the store.
    async fn resolve(&self) -> Result<(Digest, Manifest), PullError> {
        let mut reference = self.reference.as_oci().clone();
        let mut pinned = self.reference.digest().copied();
        for _ in 0..=MAX_INDEX_DEPTH {
            let (digest, bytes) = self.manifest(&reference, pinned).await?;
            match Resolved::parse(&bytes)? {
                Resolved::Image(manifest) => {
                    let store = self.store.clone();
                    run_blocking(move || store.put_small(&digest, &bytes)).await?;
                    return Ok((digest, manifest));
                }
                Resolved::Index(index) => {
                    let entry = index.choose()?;
                    reference = self.reference.pinned(&entry.digest);
                    pinned = Some(entry.digest);
                }
            }
        }
        Err(ManifestError::IndexDepth(MAX_INDEX_DEPTH).into())
    }

    async fn manifest(
        &self,
        reference: &oci_client::Reference,
        pinned: Option<Digest>,
    ) -> Result<(Digest, bytes::Bytes), PullError> {
        const ACCEPTED: [&str; 4] = [OCI_MANIFEST, OCI_INDEX, DOCKER_MANIFEST, DOCKER_LIST];
        let what = "the manifest";
        let request = self.client.pull_manifest_raw(reference, &self.auth, &ACCEPTED);
        let (bytes, _) = self.step(what, request).await?.map_err(|error| self.refused(what, error))?;
        if bytes.len() as u64 > Manifest::MAX_SIZE {
            return Err(PullError::TooLarge { what: what.to_owned(), limit: Manifest::MAX_SIZE });
        }
        let found = Digest::of(&bytes);
        match pinned {
            Some(expected) if expected != found => {
                Err(PullError::DigestMismatch { what: what.to_owned(), expected, found })
            }
            _ => Ok((found, bytes)),
        }
    }

    async fn config(&self, manifest: &Manifest) -> Result<Vec<u8>, PullError> {
        let what = "configuration";
        if manifest.config.size > ImageConfig::MAX_SIZE {
            return Err(PullError::TooLarge { what: what.to_owned(), limit: ImageConfig::MAX_SIZE });
        }
        self.blob(what.to_owned(), &manifest.config).await?;
        let (store, digest) = (self.store.clone(), manifest.config.digest);
        let bytes = run_blocking(move || store.read_small(&digest, ImageConfig::MAX_SIZE)).await?;
        if let Some(bytes) = bytes {
            return Ok(bytes);
        }
        // The blob was there by size but not by content: a damaged store heals by fetching again.
        self.fetch(what.to_owned(), &manifest.config).await?;
        let store = self.store.clone();
        let bytes = run_blocking(move || store.read_small(&digest, ImageConfig::MAX_SIZE)).await?;
        bytes.ok_or_else(|| PullError::Network { what: what.to_owned(), source: "blob vanished from the store".into() })
    }

    async fn blob(&self, what: String, descriptor: &Descriptor) -> Result<(), PullError> {
        let (store, digest, size) = (self.store.clone(), descriptor.digest, descriptor.size);
        if run_blocking(move || Ok::<_, PullError>(store.contains(&digest, size))).await? {
            return Ok(());
        }
        self.fetch(what, descriptor).await
    }

    async fn fetch(&self, what: String, descriptor: &Descriptor) -> Result<(), PullError> {
        let limit = self.step_timeout.saturating_add(Duration::from_secs(descriptor.size / MIN_BYTES_PER_SECOND));
        let deadline = Instant::now() + limit.min(FAR_FUTURE);
        let digest = descriptor.digest.to_string();
        let request = self.client.pull_blob_stream(self.reference.as_oci(), digest.as_str());
        let body = self.step(&what, request).await?.map_err(|error| self.refused(&what, error))?;
        let (store, expected) =
            (self.store.clone(), ExpectedBlob { what: what.clone(), digest: descriptor.digest, size: descriptor.size });
        let mut writer = run_blocking(move || Ok::<_, PullError>(BlobWriter::create(&store, expected)?)).await?;
        let mut body = body;
        loop {
            let mut chunk = Vec::new();
            let gathered = timeout_at(deadline, self.gather(&what, &mut body, &mut chunk)).await;
            let gathered = gathered.unwrap_or_else(|_| Err(PullError::Timeout { what: what.clone(), limit }));
            let more = match gathered {
                Ok(more) => more,
                Err(error) => {
                    return run_blocking(move || {
                        writer.discard();
                        Err(error)
                    })
                    .await;
                }
            };
            writer = run_blocking(move || Ok::<_, PullError>(writer.write(&chunk)?)).await?;
            if !more {
                return run_blocking(move || Ok::<_, PullError>(writer.finish()?)).await;
            }
        }
    }

    /// Collects the next [`WRITE_CHUNK`] bytes; false at the end of the body.
    async fn gather(&self, what: &str, body: &mut SizedStream, chunk: &mut Vec<u8>) -> Result<bool, PullError> {
        while chunk.len() < WRITE_CHUNK {
            match self.step(what, body.next()).await? {
                Some(Ok(bytes)) => chunk.extend_from_slice(&bytes),
                // The writer judges by size and digest itself, and so tells a short blob from a wrong one.
                Some(Err(error)) if is_digest_error(&error) => return Ok(false),
                Some(Err(error)) => return Err(PullError::Network { what: what.to_owned(), source: error.into() }),
                None => return Ok(false),
            }
        }
        Ok(true)
    }

    async fn step<T>(&self, what: &str, step: impl Future<Output = T>) -> Result<T, PullError> {
        let limit = self.step_timeout;
        tokio::select! {
            biased;
            () = self.stop.cancelled() => {
                Err(PullError::Network { what: what.to_owned(), source: "stopped, as another blob failed".into() })
            }
            result = timeout(limit, step) => {
                result.map_err(|_| PullError::Timeout { what: what.to_owned(), limit })
            }
        }
    }

    /// Sorts the client's error into what a caller can act on.
    fn refused(&self, what: &str, error: OciDistributionError) -> PullError {
        use OciDistributionError as E;
        let reference = || self.reference.to_string();
        let what = what.to_owned();
        match error {
            E::AuthenticationFailure(_) | E::UnauthorizedError { .. } | E::ServerError { code: 401 | 403, .. } => {
                PullError::Unauthorized { reference: reference() }
            }
            E::ImageManifestNotFoundError(_) | E::ServerError { code: 404, .. } => {
                PullError::UnknownImage { reference: reference() }
            }
            E::RegistryError { ref envelope, .. } => {
                let has = |codes: &[OciErrorCode]| envelope.errors.iter().any(|error| codes.contains(&error.code));
                if has(&[OciErrorCode::Unauthorized, OciErrorCode::Denied]) {
                    PullError::Unauthorized { reference: reference() }
                } else if has(&[OciErrorCode::ManifestUnknown, OciErrorCode::NameUnknown, OciErrorCode::NotFound]) {
                    PullError::UnknownImage { reference: reference() }
                } else {
                    PullError::Registry { what, source: error.into() }
                }
            }
            E::DigestError(DigestError::VerificationError { expected, actual }) => {
                match (expected.parse(), actual.parse()) {
                    (Ok(expected), Ok(found)) => PullError::DigestMismatch { what, expected, found },
                    _ => PullError::Registry { what, source: format!("{expected} is not {actual}").into() },
                }
            }
            E::RequestError(_) | E::IoError(_) => PullError::Network { what, source: error.into() },
            error => PullError::Registry { what, source: error.into() },
        }
    }
}

fn is_digest_error(error: &io::Error) -> bool {
    let mut cause: Option<&(dyn Error + 'static)> = error.get_ref().map(|error| error as _);
    while let Some(error) = cause {
        if error.is::<DigestError>() {
            return true;
        }
        cause = error.source();
    }
    false
}
