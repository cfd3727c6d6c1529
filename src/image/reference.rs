//! Names of images: `docker.io/library/alpine:3.20`, `localhost:5000/x@sha256:...`.
//!
//! The grammar and its defaults (`docker.io`, `library/`, `latest`) are those of the distribution
//! project, as `oci-client` implements them. This module adds what that parser leaves open: the
//! digest must be one this crate can check, and loopback registries are told apart.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use crate::image::digest::Digest;
use crate::image::digest::DigestParseError;

/// A parsed image reference.
///
/// ```
/// use kiln::image::Reference;
/// let reference: Reference = "alpine".parse().unwrap();
/// assert_eq!(reference.to_string(), "docker.io/library/alpine:latest");
/// assert!("localhost:5000/x".parse::<Reference>().unwrap().is_loopback());
/// ```
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Reference {
    inner: oci_client::Reference,
    digest: Option<Digest>,
}

/// Why a text is not an image reference.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ReferenceError {
    /// Not of the form `[registry/]repository[:tag][@sha256:digest]`.
    #[error("image reference {reference:?} is not valid: {reason}")]
    Syntax {
        /// The text.
        reference: String,
        /// What the grammar objects to.
        reason: String,
    },
    /// The pinned digest is not a sha256 digest.
    #[error("image reference {reference:?} pins a digest that cannot be checked")]
    Digest {
        /// The text.
        reference: String,
        /// What is wrong with the digest.
        #[source]
        source: DigestParseError,
    },
}

impl Reference {
    /// The registry's host and, if given, port.
    #[must_use]
    pub fn registry(&self) -> &str {
        self.inner.registry()
    }

    /// The repository, e.g. `library/alpine`.
    #[must_use]
    pub fn repository(&self) -> &str {
        self.inner.repository()
    }

    /// The tag, absent when only a digest was given.
    #[must_use]
    pub fn tag(&self) -> Option<&str> {
        self.inner.tag()
    }

    /// The digest to which the reference is pinned.
    #[must_use]
    pub const fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }

    /// Whether the registry is this machine, spoken to by plain HTTP unless told otherwise.
    #[must_use]
    pub fn is_loopback(&self) -> bool {
        is_loopback(self.registry())
    }

    pub(super) const fn as_oci(&self) -> &oci_client::Reference {
        &self.inner
    }
}

/// Whether a host, with or without a port, is this machine.
pub(super) fn is_loopback(registry: &str) -> bool {
    let host = match registry.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or(rest),
        None => registry.split(':').next().unwrap_or(registry),
    };
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

impl FromStr for Reference {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let inner: oci_client::Reference = text.parse().map_err(|error: oci_client::ParseError| {
            ReferenceError::Syntax { reference: text.to_owned(), reason: error.to_string() }
        })?;
        let digest = inner
            .digest()
            .map(str::parse)
            .transpose()
            .map_err(|source| ReferenceError::Digest { reference: text.to_owned(), source })?;
        Ok(Self { inner, digest })
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.fmt(f)
    }
}

impl fmt::Debug for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn local(text: &str) -> bool {
        text.parse::<Reference>().unwrap().is_loopback()
    }

    #[test]
    fn only_this_machine_is_spoken_to_in_plain_http() {
        assert!(local("localhost:5000/x"));
        assert!(local("localhost/x"));
        assert!(local("127.0.0.1:5000/x"));
        assert!(local("127.9.9.9/x"));
        assert!(!local("localhost.example:5000/x"));
        assert!(!local("127.0.0.1.example/x"));
        assert!(!local("10.0.0.1:5000/x"));
        assert!(!local("x/localhost"));
    }

    #[test]
    fn a_digest_that_cannot_be_checked_is_refused() {
        let sha512 = format!("x@sha512:{}", "0".repeat(128));
        assert!(matches!(sha512.parse::<Reference>(), Err(ReferenceError::Digest { .. })));
    }

    proptest! {
        #[test]
        fn any_text_is_parsed_or_refused(text in "\\PC{0,80}") {
            let _ = text.parse::<Reference>();
        }
    }
}
