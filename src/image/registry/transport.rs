//! How to speak to a registry's host: plain or encrypted, and whom to trust.

use std::fmt;

use oci_client::client::Certificate;
use oci_client::client::CertificateEncoding;
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use crate::image::error::PullError;
use crate::image::reference::Reference;
use crate::image::reference::ReferenceError;
use crate::image::reference::is_loopback;

/// How to speak to a registry.
///
/// The HTTP client goes through the proxy that the process's environment names (`HTTPS_PROXY`, `HTTP_PROXY`, `NO_PROXY`),
/// if any.
///
/// ```
/// use kiln::image::{Image, RegistryTransport, Tls};
/// # let pem = "";
/// let intranet = Image::builder("registry.intranet:5000/app").transport(Tls::new().ca_certificate(pem));
/// let plain = Image::builder("10.0.0.7:5000/app").transport(RegistryTransport::PlainHttp);
/// # drop((intranet, plain));
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum RegistryTransport {
    /// HTTPS; to this machine itself (`localhost`, `127.0.0.1`, `[::1]`) plain HTTP.
    #[default]
    Auto,
    /// HTTP without encryption. Whoever is on the way reads the credentials; images are still verified when the
    /// reference pins a digest, and only then.
    PlainHttp,
    /// HTTPS, to this machine too.
    Https(Tls),
}

/// Whose certificates to trust.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Tls {
    authorities: Vec<Vec<u8>>,
    trust: Trust,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Trust {
    #[default]
    Authorities,
    Everybody,
}

impl Tls {
    /// Trust in the authorities that the system trusts.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Trusts this authority too: one certificate or several, in PEM. What is not a certificate is refused by the pull,
    /// as [`PullError::CaCertificate`].
    #[must_use]
    pub fn ca_certificate(mut self, pem: impl Into<Vec<u8>>) -> Self {
        self.authorities.push(pem.into());
        self
    }

    /// Trusts every certificate, of whomever. Then encryption protects from nobody who can answer in the registry's
    /// place: for tests.
    #[must_use]
    pub fn accept_invalid_certificates(mut self) -> Self {
        self.trust = Trust::Everybody;
        self
    }

    pub(super) const fn accepts_everything(&self) -> bool {
        matches!(self.trust, Trust::Everybody)
    }

    /// Checked here, because the client says of a bad certificate only that it cannot be set up.
    pub(super) fn certificates(&self) -> Result<Vec<Certificate>, PullError> {
        let mut certificates = Vec::new();
        for pem in &self.authorities {
            let before = certificates.len();
            for der in CertificateDer::pem_slice_iter(pem) {
                let der = der.map_err(|error| PullError::CaCertificate(error.to_string().into()))?;
                RootCertStore::empty().add(der.clone()).map_err(|error| PullError::CaCertificate(error.into()))?;
                certificates.push(Certificate { encoding: CertificateEncoding::Der, data: der.to_vec() });
            }
            if certificates.len() == before {
                return Err(PullError::CaCertificate("it holds no pem certificate".into()));
            }
        }
        Ok(certificates)
    }
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls").field("authorities", &self.authorities.len()).field("trust", &self.trust).finish()
    }
}

impl From<Tls> for RegistryTransport {
    fn from(tls: Tls) -> Self {
        Self::Https(tls)
    }
}

impl RegistryTransport {
    /// How to speak to `host` in particular: encrypted, trusting these, or plain.
    pub(super) fn resolve(&self, host: &str) -> Option<Tls> {
        match self {
            Self::PlainHttp => None,
            Self::Auto if is_loopback(host) => None,
            Self::Auto => Some(Tls::new()),
            Self::Https(tls) => Some(tls.clone()),
        }
    }
}

/// A registry that may have the same images, to be asked before the one in the reference.
///
/// Its host is all that matters; a text is one that is spoken to in the usual way.
///
/// ```
/// use kiln::image::{Image, Mirror, RegistryTransport};
/// let builder = Image::builder("alpine:3.20")
///     .mirror("mirror.example:5000")
///     .mirror(Mirror::new("10.0.0.7:5000").transport(RegistryTransport::PlainHttp));
/// # drop(builder);
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mirror {
    host: String,
    transport: RegistryTransport,
}

impl Mirror {
    /// The mirror at `host`, or `host:port`.
    #[must_use]
    pub fn new(host: impl Into<String>) -> Self {
        Self { host: host.into(), transport: RegistryTransport::Auto }
    }

    /// How to speak to it.
    #[must_use]
    pub fn transport(mut self, transport: impl Into<RegistryTransport>) -> Self {
        self.transport = transport.into();
        self
    }

    pub(super) fn host(&self) -> &str {
        &self.host
    }

    pub(super) const fn speak(&self) -> &RegistryTransport {
        &self.transport
    }

    /// Refuses what is not a host, before it becomes part of an address.
    pub(super) fn check(&self) -> Result<(), ReferenceError> {
        let parsed = format!("{}/x", self.host).parse::<Reference>();
        match parsed {
            Ok(reference) if reference.registry() == self.host => Ok(()),
            _ => Err(ReferenceError::Syntax {
                reference: self.host.clone(),
                reason: "a mirror is named by its host and, if need be, port".to_owned(),
            }),
        }
    }
}

impl From<&str> for Mirror {
    fn from(host: &str) -> Self {
        Self::new(host)
    }
}

impl From<String> for Mirror {
    fn from(host: String) -> Self {
        Self::new(host)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_http_is_for_this_machine_or_asked_for() {
        let auto = RegistryTransport::Auto;
        assert_eq!(auto.resolve("localhost:5000"), None);
        assert_eq!(auto.resolve("[::1]:5000"), None);
        assert_eq!(auto.resolve("registry.example"), Some(Tls::new()));
        assert_eq!(RegistryTransport::PlainHttp.resolve("registry.example"), None);
        let tls = Tls::new().accept_invalid_certificates();
        assert_eq!(RegistryTransport::from(tls.clone()).resolve("localhost:5000"), Some(tls));
    }

    #[test]
    fn what_is_no_certificate_is_refused() {
        let broken = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        for pem in ["", "nothing", broken] {
            let error = Tls::new().ca_certificate(pem).certificates().unwrap_err();
            assert!(matches!(error, PullError::CaCertificate(_)), "{error:?}");
        }
    }

    #[test]
    fn a_mirror_is_a_host() {
        for host in ["mirror.example", "mirror:5000", "localhost", "127.0.0.1:5000"] {
            Mirror::new(host).check().unwrap();
        }
        for host in ["", "mirror", "http://mirror.example", "mirror.example/path", "a b.c", "u:p@mirror.example"] {
            assert!(Mirror::new(host).check().is_err(), "{host}");
        }
    }
}
