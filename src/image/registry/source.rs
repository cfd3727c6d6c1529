//! One host that may have the image: the origin or a mirror.
//!
//! Every wait here has a deadline and ends when another part of the pull has failed.

use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use oci_client::Client;
use oci_client::client::BlobResponse;
use oci_client::client::ClientConfig;
use oci_client::client::ClientProtocol;
use oci_client::client::SizedStream;
use oci_client::secrets::RegistryAuth as OciAuth;
use tokio::time::Instant;
use tokio::time::timeout_at;
use tokio_util::sync::CancellationToken;

use crate::image::digest::Digest;
use crate::image::error::PullError;
use crate::image::manifest::DOCKER_LIST;
use crate::image::manifest::DOCKER_MANIFEST;
use crate::image::manifest::Descriptor;
use crate::image::manifest::Manifest;
use crate::image::manifest::OCI_INDEX;
use crate::image::manifest::OCI_MANIFEST;
use crate::image::reference::Reference;
use crate::image::registry::USER_AGENT;
use crate::image::registry::auth::RegistryAuth;
use crate::image::registry::backoff::Backoff;
use crate::image::registry::failure::Asked;
use crate::image::registry::failure::Cure;
use crate::image::registry::failure::Failure;
use crate::image::registry::login;
use crate::image::registry::transport::RegistryTransport;
use crate::image::registry::transport::Tls;
use crate::image::store::run_blocking;

/// As good as never, and still within the clock's range whatever was asked for.
pub(super) const FAR_FUTURE: Duration = Duration::from_secs(30 * 365 * 24 * 3600);

/// A host, how to speak to it, and as whom.
pub(super) struct Source {
    /// The host, for messages.
    pub(super) registry: String,
    /// The image, for messages.
    reference: String,
    /// Addresses requests, to the mirror if this is one.
    target: oci_client::Reference,
    tls: Option<Tls>,
    auth: RegistryAuth,
    /// Asks for tokens.
    asking: reqwest::Client,
    session: Mutex<Session>,
    step_timeout: Duration,
    retries: u32,
    /// Whether it has answered a request that it might have refused.
    is_known: AtomicBool,
    /// Set when one blob has failed, so that the others end and clean up.
    pub(super) stop: CancellationToken,
}

/// The client keeps the first credentials that it is shown, so new ones need a client that has not been used.
#[derive(Clone)]
struct Session {
    client: Client,
    auth: OciAuth,
}

/// How patient to be.
#[derive(Clone, Copy, Debug)]
pub(super) struct Patience {
    pub(super) step_timeout: Duration,
    pub(super) retries: u32,
}

/// Where a blob's body starts.
pub(super) enum Body {
    /// At its first byte.
    Whole(SizedStream),
    /// Where it was asked to.
    Rest(SizedStream),
}

impl Source {
    pub(super) fn new(
        reference: &Reference,
        mirror: Option<&str>,
        transport: &RegistryTransport,
        auth: RegistryAuth,
        patience: Patience,
    ) -> Result<Self, PullError> {
        let mut target = reference.as_oci().clone();
        if let Some(host) = mirror {
            target.set_mirror_registry(host.to_owned());
        }
        let registry = mirror.unwrap_or_else(|| reference.registry()).to_owned();
        let tls = transport.resolve(&registry);
        let oci_auth = match &auth {
            RegistryAuth::Basic { user, password } => OciAuth::Basic(user.clone(), password.clone()),
            RegistryAuth::Bearer { token } => OciAuth::Bearer(token.clone()),
            // An identity is exchanged at the login.
            RegistryAuth::Anonymous | RegistryAuth::Identity { .. } => OciAuth::Anonymous,
        };
        let Patience { step_timeout, retries } = patience;
        let session = Mutex::new(Session { client: client(tls.as_ref())?, auth: oci_auth });
        let asking = login::client(tls.as_ref())?;
        let (reference, is_known, stop) = (reference.to_string(), AtomicBool::new(false), CancellationToken::new());
        Ok(Self { registry, reference, target, tls, auth, asking, session, step_timeout, retries, is_known, stop })
    }

    pub(super) fn asked<'a>(&'a self, what: &'a str) -> Asked<'a> {
        Asked { registry: &self.registry, reference: &self.reference, what }
    }

    pub(super) const fn backoff(&self) -> Backoff {
        Backoff::new(self.retries)
    }

    /// The longest that a blob may take if it arrives at `rate`, attempts and pauses included.
    pub(super) fn blob_limit(&self, size: u64, rate: u64) -> Duration {
        let attempts = self.step_timeout.saturating_mul(self.retries.saturating_add(1));
        let pauses = if self.retries > 0 { Backoff::longest() } else { Duration::ZERO };
        attempts.saturating_add(pauses).saturating_add(Duration::from_secs(size / rate)).min(FAR_FUTURE)
    }

    /// Gets a token, if the registry wants one. A password that it takes as it is goes with the requests themselves.
    pub(super) async fn login(&self) -> Result<(), PullError> {
        let mut backoff = self.backoff();
        loop {
            match self.log_in().await {
                Ok(()) => return Ok(()),
                Err(failure) if failure.cure == Cure::Wait => self.wait(&mut backoff, failure.error).await?,
                Err(failure) => return Err(failure.error),
            }
        }
    }

    async fn log_in(&self) -> Result<(), Failure> {
        if matches!(self.auth, RegistryAuth::Bearer { .. }) {
            return Ok(());
        }
        let what = "a token";
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        let root = format!("{scheme}://{}/v2/", self.target.resolve_registry());
        let token = login::token(&self.asking, self.asked(what), &root, self.target.repository(), &self.auth);
        if let Some(token) = self.step(what, None, token).await?? {
            let client = if self.is_known.load(Ordering::Relaxed) {
                let tls = self.tls.clone();
                // Blocking: the authorities that the system trusts are read from files.
                let client = run_blocking(move || client(tls.as_ref())).await;
                client.map_err(|error| Failure::new(error, Cure::Nothing))?
            } else {
                self.session().client
            };
            let auth = OciAuth::Bearer(token);
            // Requests for blobs do not show it any.
            client.store_auth_if_needed(self.target.resolve_registry(), &auth).await;
            let session = Session { client, auth };
            *self.session.lock().unwrap_or_else(PoisonError::into_inner) = session;
        }
        Ok(())
    }

    /// The manifest or index at `digest`, or where the reference points to.
    pub(super) async fn manifest(&self, digest: Option<&Digest>) -> Result<(Digest, Bytes), PullError> {
        let (mut backoff, mut may_log_in) = (self.backoff(), true);
        loop {
            match self.try_manifest(digest).await {
                Ok(found) => return Ok(found),
                Err(failure) => self.cure(failure, &mut backoff, &mut may_log_in).await?,
            }
        }
    }

    async fn try_manifest(&self, digest: Option<&Digest>) -> Result<(Digest, Bytes), Failure> {
        const ACCEPTED: [&str; 4] = [OCI_MANIFEST, OCI_INDEX, DOCKER_MANIFEST, DOCKER_LIST];
        let what = "the manifest";
        let target = match digest {
            Some(digest) => self.target.clone_with_digest(digest.to_string()),
            None => self.target.clone(),
        };
        let Session { client, auth } = self.session();
        let request = client.pull_manifest_raw(&target, &auth, &ACCEPTED);
        let (bytes, _) = self.step(what, None, request).await?.map_err(|error| self.asked(what).failed(error))?;
        self.is_known.store(true, Ordering::Relaxed);
        let refused = |error| Err(Failure::new(error, Cure::Nothing));
        if bytes.len() as u64 > Manifest::MAX_SIZE {
            return refused(PullError::TooLarge { what: what.to_owned(), limit: Manifest::MAX_SIZE });
        }
        let found = Digest::of(&bytes);
        match digest {
            Some(expected) if *expected != found => {
                refused(PullError::DigestMismatch { what: what.to_owned(), expected: *expected, found })
            }
            _ => Ok((found, bytes)),
        }
    }

    /// Asks for a blob, from byte `offset` on.
    pub(super) async fn open(
        &self,
        what: &str,
        blob: &Descriptor,
        offset: u64,
        deadline: Instant,
    ) -> Result<Body, Failure> {
        let digest = blob.digest.to_string();
        let client = self.session().client;
        let asked = self.asked(what);
        if offset == 0 {
            let request = client.pull_blob_stream(&self.target, digest.as_str());
            let body = self.step(what, Some(deadline), request).await?.map_err(|error| asked.failed(error))?;
            return Ok(Body::Whole(body));
        }
        let request = client.pull_blob_stream_partial(&self.target, digest.as_str(), offset, None);
        match self.step(what, Some(deadline), request).await?.map_err(|error| asked.failed(error))? {
            BlobResponse::Full(body) => Ok(Body::Whole(body)),
            // The client hides which part it is; that its length is right and, in the end, the digest have to do.
            BlobResponse::Partial(body) if body.content_length.is_none_or(|length| length == blob.size - offset) => {
                Ok(Body::Rest(body))
            }
            BlobResponse::Partial(_) => {
                Err(Failure::new(asked.registry("another part than was asked for"), Cure::Restart))
            }
        }
    }

    /// Does what can be done about a failure; its error when that is nothing more.
    pub(super) async fn cure(
        &self,
        failure: Failure,
        backoff: &mut Backoff,
        may_log_in: &mut bool,
    ) -> Result<(), PullError> {
        match failure.cure {
            Cure::Wait => self.wait(backoff, failure.error).await,
            // A token may have run out; a password that was wrong from the start is not shown twice.
            Cure::Login if self.is_known.load(Ordering::Relaxed) && std::mem::take(may_log_in) => {
                self.log_in().await.map_err(|failure| failure.error)
            }
            _ => Err(failure.error),
        }
    }

    async fn wait(&self, backoff: &mut Backoff, error: PullError) -> Result<(), PullError> {
        let Some(pause) = backoff.pause() else { return Err(error) };
        tracing::debug!(registry = %self.registry, %error, ?pause, "trying again");
        tokio::select! {
            biased;
            () = self.stop.cancelled() => Err(error),
            () = tokio::time::sleep(pause) => Ok(()),
        }
    }

    /// Waits for `step` as long as a step may take, and not beyond `deadline`.
    pub(super) async fn step<T>(
        &self,
        what: &str,
        deadline: Option<Instant>,
        step: impl Future<Output = T>,
    ) -> Result<T, Failure> {
        let now = Instant::now();
        let own = now + self.step_timeout.min(FAR_FUTURE);
        let (end, cure) = match deadline {
            Some(deadline) if deadline < own => (deadline, Cure::Nothing),
            _ => (own, Cure::Wait),
        };
        tokio::select! {
            biased;
            () = self.stop.cancelled() => {
                Err(self.asked(what).network("stopped, as another blob failed", Cure::Nothing))
            }
            result = timeout_at(end, step) => result.map_err(|_| {
                let (registry, what) = (self.registry.clone(), what.to_owned());
                Failure::new(PullError::Timeout { registry, what, limit: self.step_timeout }, cure)
            }),
        }
    }

    fn session(&self) -> Session {
        self.session.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// It has no deadlines of its own: every wait for it has one here.
fn client(tls: Option<&Tls>) -> Result<Client, PullError> {
    let config = ClientConfig {
        protocol: if tls.is_some() { ClientProtocol::Https } else { ClientProtocol::Http },
        extra_root_certificates: tls.map(Tls::certificates).transpose()?.unwrap_or_default(),
        accept_invalid_certificates: tls.is_some_and(Tls::accepts_everything),
        user_agent: USER_AGENT,
        ..ClientConfig::default()
    };
    Client::try_from(config).map_err(|error| PullError::HttpClient(error.into()))
}
