//! What a failed request means: to the caller, and for trying again.

use std::error::Error;
use std::io;

use oci_client::errors::DigestError;
use oci_client::errors::OciDistributionError;
use oci_client::errors::OciEnvelope;
use oci_client::errors::OciErrorCode;

use crate::image::error::PullError;

/// How much of what a registry says about a failure gets into an error.
const MAX_MESSAGE: usize = 300;

/// What may be done about a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cure {
    /// The same again, later.
    Wait,
    /// The same with a new token: the old one may have run out.
    Login,
    /// The same from the first byte: the registry cannot continue where it broke off.
    Restart,
    /// Nothing.
    Nothing,
}

/// A failed request.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) error: PullError,
    pub(super) cure: Cure,
}

impl Failure {
    pub(super) const fn new(error: PullError, cure: Cure) -> Self {
        Self { error, cure }
    }
}

/// Who was asked, and for what.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asked<'a> {
    /// The host.
    pub(super) registry: &'a str,
    /// The image.
    pub(super) reference: &'a str,
    /// "the manifest", "layer 2"...
    pub(super) what: &'a str,
}

impl Asked<'_> {
    /// Sorts the client's error. Addresses are left out of it: a registry redirects to ones that carry a signature.
    pub(super) fn failed(self, error: OciDistributionError) -> Failure {
        use OciDistributionError as E;
        match error {
            E::AuthenticationFailure(_) | E::UnauthorizedError { .. } => self.unauthorized(Cure::Login),
            E::ServerError { code, message, .. } => self.status(code, &message),
            E::ImageManifestNotFoundError(_) => self.unknown(),
            E::RegistryError { envelope, .. } => self.enveloped(&envelope),
            E::DigestError(DigestError::VerificationError { expected, actual }) => self.digest(&expected, &actual),
            E::RequestError(error) => self.request(error),
            E::IoError(error) => self.stream(error),
            error => Failure::new(self.registry(error), Cure::Nothing),
        }
    }

    /// The error of a body that was being read.
    pub(super) fn stream(self, error: io::Error) -> Failure {
        let kind = error.kind();
        match error.into_inner().map(|inner| inner.downcast::<reqwest::Error>()) {
            Some(Ok(error)) => self.request(*error),
            Some(Err(source)) => self.network(source, Cure::Wait),
            None => self.network(kind.to_string(), Cure::Wait),
        }
    }

    pub(super) fn request(self, error: reqwest::Error) -> Failure {
        let error = error.without_url();
        if let Some(status) = error.status() {
            return self.status(status.as_u16(), "");
        }
        match tls_error(&error) {
            Some(rustls::Error::InvalidCertificate(reason)) => {
                let source = format!("{reason:?}").into();
                let error = PullError::Certificate { registry: self.registry.to_owned(), source };
                return Failure::new(error, Cure::Nothing);
            }
            // What answers does not speak TLS.
            Some(rustls::Error::InvalidMessage(_)) => return self.network(error, Cure::Nothing),
            _ => {}
        }
        if error.is_redirect() || error.is_builder() {
            return Failure::new(self.registry(error), Cure::Nothing);
        }
        self.network(error, Cure::Wait)
    }

    pub(super) fn status(self, status: u16, message: &str) -> Failure {
        let (registry, what) = (self.registry.to_owned(), self.what.to_owned());
        match status {
            401 => self.unauthorized(Cure::Login),
            403 => self.unauthorized(Cure::Nothing),
            404 => self.unknown(),
            408 => Failure::new(self.registry(described(status, message)), Cure::Wait),
            416 => Failure::new(self.registry(described(status, message)), Cure::Restart),
            429 => Failure::new(PullError::RateLimited { registry, what }, Cure::Wait),
            500..=599 => Failure::new(PullError::Server { registry, what, status }, Cure::Wait),
            _ => Failure::new(self.registry(described(status, message)), Cure::Nothing),
        }
    }

    /// An answer outside the protocol.
    pub(super) fn registry(self, source: impl Into<Box<dyn Error + Send + Sync>>) -> PullError {
        PullError::Registry { registry: self.registry.to_owned(), what: self.what.to_owned(), source: source.into() }
    }

    pub(super) fn network(self, source: impl Into<Box<dyn Error + Send + Sync>>, cure: Cure) -> Failure {
        let (registry, what) = (self.registry.to_owned(), self.what.to_owned());
        Failure::new(PullError::Network { registry, what, source: source.into() }, cure)
    }

    pub(super) fn unauthorized(self, cure: Cure) -> Failure {
        let (registry, reference) = (self.registry.to_owned(), self.reference.to_owned());
        Failure::new(PullError::Unauthorized { registry, reference }, cure)
    }

    fn unknown(self) -> Failure {
        Failure::new(PullError::UnknownImage { reference: self.reference.to_owned() }, Cure::Nothing)
    }

    fn enveloped(self, envelope: &OciEnvelope) -> Failure {
        if has(envelope, &[OciErrorCode::Toomanyrequests]) {
            self.status(429, "")
        } else if has(envelope, &[OciErrorCode::Unauthorized, OciErrorCode::Denied]) {
            self.unauthorized(Cure::Nothing)
        } else if has(envelope, &[OciErrorCode::ManifestUnknown, OciErrorCode::NameUnknown, OciErrorCode::NotFound]) {
            self.unknown()
        } else {
            let message = bounded(&envelope.to_string());
            // The one refusal that a request for the rest of a blob can bring upon itself.
            let is_range = envelope.errors.iter().any(|error| error.code == OciErrorCode::SizeInvalid)
                || has(envelope, &[OciErrorCode::Other("RANGE_INVALID".to_owned())]);
            Failure::new(self.registry(message), if is_range { Cure::Restart } else { Cure::Nothing })
        }
    }

    fn digest(self, expected: &str, actual: &str) -> Failure {
        let what = self.what.to_owned();
        let error = match (expected.parse(), actual.parse()) {
            (Ok(expected), Ok(found)) => PullError::DigestMismatch { what, expected, found },
            _ => self.registry(bounded(&format!("{expected} is not {actual}"))),
        };
        Failure::new(error, Cure::Nothing)
    }
}

/// Whether the client noticed the wrong digest of a body, at its end.
pub(super) fn is_digest_error(error: &io::Error) -> bool {
    error.get_ref().is_some_and(|inner| inner.is::<DigestError>())
}

fn has(envelope: &OciEnvelope, codes: &[OciErrorCode]) -> bool {
    envelope.errors.iter().any(|error| codes.contains(&error.code))
}

fn described(status: u16, message: &str) -> String {
    bounded(format!("status {status}: {message}").trim_end_matches([':', ' ']))
}

fn bounded(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(MAX_MESSAGE).collect()
}

fn tls_error(error: &reqwest::Error) -> Option<&rustls::Error> {
    let mut cause: Option<&(dyn Error + 'static)> = error.source();
    while let Some(error) = cause {
        if let Some(tls) = error.downcast_ref::<rustls::Error>() {
            return Some(tls);
        }
        // The source of an i/o error is that of what it wraps, which so would be passed over.
        let wrapped = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        cause = wrapped.map(|inner| inner as &(dyn Error + 'static)).or_else(|| error.source());
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    const ASKED: Asked<'_> = Asked { registry: "registry.example", reference: "registry.example/app", what: "layer 0" };

    #[test]
    fn statuses_have_their_cures() {
        let cures = [(401, Cure::Login), (403, Cure::Nothing), (404, Cure::Nothing), (416, Cure::Restart)];
        for (status, cure) in cures.into_iter().chain([429, 500, 502, 503, 504, 408].map(|status| (status, Cure::Wait)))
        {
            assert_eq!(ASKED.status(status, "").cure, cure, "{status}");
        }
        assert_eq!(ASKED.status(418, "").cure, Cure::Nothing);
    }

    #[test]
    fn a_registrys_words_are_bounded_and_one_line() {
        let failure = ASKED.status(418, &"no\n".repeat(999));
        let message = failure.error.source().unwrap().to_string();
        assert!(message.len() <= MAX_MESSAGE && !message.contains('\n'), "{message}");
    }
}
