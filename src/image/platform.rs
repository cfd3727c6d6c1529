//! Which system and processor an image is made for (image-spec, image-index.md, "platform").

use std::fmt;
use std::str::FromStr;

use serde::Deserialize;
use serde::Serialize;

/// A system, a processor and, for some, which generation of it: `linux/amd64`, `linux/arm64/v8`.
///
/// ```
/// use kiln::image::Platform;
/// let platform: Platform = "linux/arm64/v8".parse().unwrap();
/// assert_eq!(platform.architecture, "arm64");
/// assert_eq!(Platform::default().to_string(), "linux/amd64");
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Platform {
    /// The processor, by Go's name: `amd64`, `arm64`...
    pub architecture: String,
    /// The system: `linux`.
    pub os: String,
    /// The processor's generation: `v2`, `v3` of amd64, `v8` of arm64...
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
}

/// Why a text is not a platform.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("platform {0:?} is not of the form os/architecture or os/architecture/variant")]
pub struct PlatformParseError(String);

impl Default for Platform {
    /// What every kiln guest runs: `linux/amd64`, the baseline.
    fn default() -> Self {
        Self { architecture: "amd64".to_owned(), os: "linux".to_owned(), variant: None }
    }
}

impl Platform {
    /// Whether an image made for `self` is one that a request for `wanted` means. A variant that is not said is the
    /// baseline: `v1` of amd64, `v8` of arm64.
    pub(crate) fn serves(&self, wanted: &Self) -> bool {
        self.os == wanted.os && self.architecture == wanted.architecture && self.generation() == wanted.generation()
    }

    fn generation(&self) -> &str {
        match (self.variant.as_deref(), self.architecture.as_str()) {
            (Some(variant), _) if !variant.is_empty() => variant,
            (_, "arm64") => "v8",
            _ => "v1",
        }
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        self.variant.as_ref().filter(|variant| !variant.is_empty()).map_or(Ok(()), |variant| write!(f, "/{variant}"))
    }
}

impl FromStr for Platform {
    type Err = PlatformParseError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let is_plain =
            |part: &&str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || b".-_".contains(&b));
        let parts: Vec<_> = text.split('/').filter(is_plain).collect();
        let (os, architecture, variant) = match *parts.as_slice() {
            [os, architecture] => (os, architecture, None),
            [os, architecture, variant] => (os, architecture, Some(variant.to_owned())),
            _ => return Err(PlatformParseError(text.to_owned())),
        };
        if text.matches('/').count() + 1 != parts.len() {
            return Err(PlatformParseError(text.to_owned()));
        }
        Ok(Self { architecture: architecture.to_owned(), os: os.to_owned(), variant })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_platforms_or_refused() {
        for text in ["linux/amd64", "linux/amd64/v3", "linux/arm64/v8"] {
            assert_eq!(text.parse::<Platform>().unwrap().to_string(), text);
        }
        for text in ["", "linux", "linux/", "/amd64", "linux//v1", "a/b/c/d", "linux/amd 64"] {
            assert!(text.parse::<Platform>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn an_unsaid_variant_is_the_baseline() {
        let serves = |made: &str, wanted: &str| made.parse::<Platform>().unwrap().serves(&wanted.parse().unwrap());
        assert!(serves("linux/amd64/v1", "linux/amd64"));
        assert!(serves("linux/arm64", "linux/arm64/v8"));
        assert!(!serves("linux/amd64/v3", "linux/amd64"));
        assert!(serves("linux/amd64/v3", "linux/amd64/v3"));
        assert!(!serves("linux/arm64", "linux/amd64"));
    }
}
