//! What can go wrong on the way to an [`Image`](crate::image::Image), one enum per operation.

use std::error::Error;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use crate::image::config::ConfigError;
use crate::image::customize::CustomizeError;
use crate::image::digest::Digest;
use crate::image::platform::Platform;
use crate::image::reference::ReferenceError;
use crate::image::registry::CredentialsError;
use crate::image::store::BlobError;
use crate::image::store::StoreError;

/// Why a manifest, and what it leads to, does not describe an image that can run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ManifestError {
    /// Not the JSON of a manifest or an index.
    #[error("manifest is not valid")]
    Json(#[source] Box<dyn Error + Send + Sync>),
    /// A manifest of another generation, e.g. schema 1.
    #[error("manifest has schema version {0}, expected 2")]
    SchemaVersion(u64),
    /// The layers are of a kind that cannot be applied (encrypted, foreign, not tar...).
    #[error("layer media type {0:?} is not supported")]
    LayerMediaType(String),
    /// An index leads to an index leads to an index...
    #[error("image indexes are nested more than {0} deep")]
    IndexDepth(usize),
    /// More layers than any real image has.
    #[error("image has {found} layers, more than {limit}")]
    TooManyLayers {
        /// How many it has.
        found: usize,
        /// How many are accepted.
        limit: usize,
    },
    /// Layers that together are longer than any real image: a registry could fill the disk with them.
    #[error("layers of {total} bytes together, more than {limit}")]
    LayersTooLarge {
        /// What the manifest promises, in bytes.
        total: u64,
        /// What is accepted, in bytes.
        limit: u64,
    },
    /// Manifest and configuration disagree.
    #[error("manifest lists {manifest} layers, configuration {config}")]
    LayerCount {
        /// Layers of the manifest.
        manifest: usize,
        /// `diff_ids` of the configuration.
        config: usize,
    },
    /// The image is made for other processors or systems.
    #[error("no image for {wanted}, only for {}", platforms(available))]
    NoPlatform {
        /// What was asked for.
        wanted: Box<Platform>,
        /// What there is; the first few.
        available: Vec<Platform>,
    },
    /// More nested indexes than any real image has.
    #[error("the image's index leads to more than {limit} others")]
    TooManyIndexes {
        /// How many are looked into.
        limit: usize,
    },
    /// The configuration is not acceptable.
    #[error("image configuration is not valid")]
    Config(#[from] ConfigError),
    /// The store failed.
    #[error("the image store failed")]
    Store(#[from] StoreError),
}

fn platforms(platforms: &[Platform]) -> String {
    if platforms.is_empty() {
        return "none that is named".to_owned();
    }
    platforms.iter().map(Platform::to_string).collect::<Vec<_>>().join(", ")
}

/// Why a pull failed. Whatever the reason, nothing half-written is left in the store.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PullError {
    /// The reference does not parse.
    #[error("the image reference is not valid")]
    Reference(#[from] ReferenceError),
    /// The registry has no such repository, tag or digest; or, with
    /// [`PullPolicy::Never`](crate::image::PullPolicy::Never), the store has not.
    #[error("no image {reference}")]
    UnknownImage {
        /// The reference.
        reference: String,
    },
    /// The registry wants (other) credentials.
    #[error("{registry} does not authorize us to pull {reference}")]
    Unauthorized {
        /// The host that refuses.
        registry: String,
        /// The reference.
        reference: String,
    },
    /// Content has another digest than promised.
    #[error("{what} has digest {found}, expected {expected}")]
    DigestMismatch {
        /// Which blob.
        what: String,
        /// The promised digest.
        expected: Digest,
        /// The digest of what arrived.
        found: Digest,
    },
    /// A blob is shorter than its descriptor says.
    #[error("{what} ends after {found} of {expected} bytes")]
    Truncated {
        /// Which blob.
        what: String,
        /// The promised size, in bytes.
        expected: u64,
        /// What arrived, in bytes.
        found: u64,
    },
    /// A blob is longer than its descriptor says or than is accepted.
    #[error("{what} is longer than {limit} bytes")]
    TooLarge {
        /// Which blob.
        what: String,
        /// The promised size or the limit, in bytes.
        limit: u64,
    },
    /// The manifest or configuration cannot be used.
    #[error("the image cannot be used")]
    Manifest(#[source] ManifestError),
    /// The registry answered outside the protocol, or refuses.
    #[error("{registry}'s answer for {what} cannot be used")]
    Registry {
        /// The host.
        registry: String,
        /// What was asked for.
        what: String,
        /// The answer.
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
    /// No HTTP client could be set up, for want of trusted CA certificates as a rule (install the
    /// distribution's `ca-certificates`); the client wants them for loopback registries as well.
    #[error("no http client can be set up; are ca certificates installed?")]
    HttpClient(#[source] Box<dyn Error + Send + Sync>),
    /// The connection failed or broke.
    #[error("connection to {registry} failed while fetching {what}")]
    Network {
        /// The host.
        registry: String,
        /// What was being fetched.
        what: String,
        /// What the network said.
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
    /// The registry went silent or was too slow.
    #[error("{registry} took more than {limit:?} for {what}")]
    Timeout {
        /// The host.
        registry: String,
        /// What was being fetched.
        what: String,
        /// The deadline it missed.
        limit: Duration,
    },
    /// The image is there but could not be changed as asked.
    #[error("the image cannot be changed as asked")]
    Customize(#[source] CustomizeError),
    /// The store failed.
    #[error("the image store failed")]
    Store(#[from] StoreError),
    /// With [`PullPolicy::Never`](crate::image::PullPolicy::Never): the store knows the image and has lost a part of it.
    #[error("the store lacks a part of {reference}, and the network is not to be used")]
    Incomplete {
        /// The reference.
        reference: String,
    },
    /// The registry wants us to come back later, and said so as often as we may ask.
    #[error("{registry} limits how often it may be asked, and did so for {what}")]
    RateLimited {
        /// The host.
        registry: String,
        /// What was asked for.
        what: String,
    },
    /// The registry has a trouble of its own, and had it as often as we may ask.
    #[error("{registry} failed with status {status} for {what}")]
    Server {
        /// The host.
        registry: String,
        /// What was asked for.
        what: String,
        /// The HTTP status, 500 to 599.
        status: u16,
    },
    /// The registry's certificate is not one that is trusted. If it is the right one, name the authority that made it with
    /// [`Tls::ca_certificate`](crate::image::Tls::ca_certificate).
    #[error(
        "the certificate of {registry} is not trusted; name its authority with `Tls::ca_certificate` if it should be"
    )]
    Certificate {
        /// The host.
        registry: String,
        /// What is wrong with it.
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
    /// What was given to [`Tls::ca_certificate`](crate::image::Tls::ca_certificate) is not a certificate.
    #[error("the certificate of an authority is not valid")]
    CaCertificate(#[source] Box<dyn Error + Send + Sync>),
    /// The user's credentials could not be read.
    #[error("the credentials for the registry cannot be read")]
    Credentials(#[from] CredentialsError),
}

impl From<CustomizeError> for PullError {
    fn from(error: CustomizeError) -> Self {
        match error {
            CustomizeError::Store(error) => Self::Store(error),
            error => Self::Customize(error),
        }
    }
}

impl From<BlobError> for PullError {
    fn from(error: BlobError) -> Self {
        match error {
            BlobError::DigestMismatch { what, expected, found } => Self::DigestMismatch { what, expected, found },
            BlobError::Truncated { what, expected, found } => Self::Truncated { what, expected, found },
            BlobError::TooLarge { what, limit } => Self::TooLarge { what, limit },
            BlobError::Store(error) => Self::Store(error),
        }
    }
}

impl From<ManifestError> for PullError {
    fn from(error: ManifestError) -> Self {
        match error {
            ManifestError::Store(error) => Self::Store(error),
            error => Self::Manifest(error),
        }
    }
}

/// Why an OCI layout folder could not be imported or written. Nothing half-written is left.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LayoutError {
    /// A file of the layout cannot be read or written.
    #[error("layout i/o at {path}")]
    Io {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The folder is not an OCI layout of version 1.
    #[error("{path} is not an oci layout: {reason}")]
    NotALayout {
        /// The folder.
        path: PathBuf,
        /// What is missing or wrong.
        reason: &'static str,
    },
    /// No entry of `index.json` has this tag.
    #[error("the layout has no image tagged {tag:?}")]
    UnknownImage {
        /// The tag asked for.
        tag: String,
    },
    /// There are several images; a tag must choose.
    #[error("the layout holds {count} images; name one by its tag")]
    Ambiguous {
        /// How many.
        count: usize,
    },
    /// A blob that the layout refers to is not in it.
    #[error("the layout lacks {what}, blob {digest}")]
    MissingBlob {
        /// What it would be.
        what: String,
        /// Its digest.
        digest: Digest,
    },
    /// Content has another digest than promised.
    #[error("{what} has digest {found}, expected {expected}")]
    DigestMismatch {
        /// Which blob.
        what: String,
        /// The promised digest.
        expected: Digest,
        /// The digest of the content.
        found: Digest,
    },
    /// A blob is shorter than its descriptor says.
    #[error("{what} ends after {found} of {expected} bytes")]
    Truncated {
        /// Which blob.
        what: String,
        /// The promised size, in bytes.
        expected: u64,
        /// What is there, in bytes.
        found: u64,
    },
    /// A blob is longer than its descriptor says or than is accepted.
    #[error("{what} is longer than {limit} bytes")]
    TooLarge {
        /// Which blob.
        what: String,
        /// The promised size or the limit, in bytes.
        limit: u64,
    },
    /// The manifest or configuration cannot be used.
    #[error("the image cannot be used")]
    Manifest(#[source] ManifestError),
    /// The store failed.
    #[error("the image store failed")]
    Store(#[from] StoreError),
}

impl From<BlobError> for LayoutError {
    fn from(error: BlobError) -> Self {
        match error {
            BlobError::DigestMismatch { what, expected, found } => Self::DigestMismatch { what, expected, found },
            BlobError::Truncated { what, expected, found } => Self::Truncated { what, expected, found },
            BlobError::TooLarge { what, limit } => Self::TooLarge { what, limit },
            BlobError::Store(error) => Self::Store(error),
        }
    }
}

impl From<ManifestError> for LayoutError {
    fn from(error: ManifestError) -> Self {
        match error {
            ManifestError::Store(error) => Self::Store(error),
            error => Self::Manifest(error),
        }
    }
}
