//! Manifests and indexes (image-spec manifest.md and image-index.md; Docker's schema 2 twins).
//!
//! Only the fields that decide something are read. Own types rather than `oci-client`'s, because
//! layouts share them and because digests parse to a checked type here.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde::Serialize;

use crate::image::digest::Digest;
use crate::image::error::ManifestError;
use crate::image::platform::Platform;

pub(super) const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub(super) const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub(super) const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
pub(super) const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
pub(super) const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
pub(super) const OCI_LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
pub(super) const REF_NAME: &str = "org.opencontainers.image.ref.name";

/// Layer archives this crate can apply. The compression itself is told by the archive's first
/// bytes, as Docker does, because builders mislabel it.
const LAYER_TYPES: [&str; 6] = [
    OCI_LAYER,
    "application/vnd.oci.image.layer.v1.tar+gzip",
    "application/vnd.oci.image.layer.v1.tar+zstd",
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.diff.tar.gzip",
    "application/vnd.docker.image.rootfs.diff.tar.zstd",
];

/// Docker stops at 127 layers; other builders stay below it to be usable there.
const MAX_LAYERS: usize = 512;

/// All layers as transported, in bytes: as much as an image may have after decompression.
const MAX_LAYER_BYTES: u64 = 64 << 30;

/// A pointer to a blob.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Descriptor {
    #[serde(rename = "mediaType", default)]
    pub(super) media_type: String,
    pub(super) digest: Digest,
    pub(super) size: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) platform: Option<Platform>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) annotations: Option<BTreeMap<String, String>>,
}

impl Descriptor {
    pub(super) fn ref_name(&self) -> Option<&str> {
        self.annotations.as_ref()?.get(REF_NAME).map(String::as_str)
    }
}

/// An image manifest.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Manifest {
    pub(super) config: Descriptor,
    pub(super) layers: Vec<Descriptor>,
}

impl Manifest {
    /// What registries accept at most (distribution-spec, "Pushing Manifests"), in bytes.
    pub(super) const MAX_SIZE: u64 = 4 << 20;

    /// The blobs of the image of this manifest, whose own digest is `own`.
    pub(super) fn blobs(&self, own: Digest) -> Vec<Digest> {
        [own, self.config.digest].into_iter().chain(self.layers.iter().map(|layer| layer.digest)).collect()
    }

    fn check(&self) -> Result<(), ManifestError> {
        if self.layers.len() > MAX_LAYERS {
            return Err(ManifestError::TooManyLayers { found: self.layers.len(), limit: MAX_LAYERS });
        }
        let total = self.layers.iter().fold(0, |total: u64, layer| total.saturating_add(layer.size));
        if total > MAX_LAYER_BYTES {
            return Err(ManifestError::LayersTooLarge { total, limit: MAX_LAYER_BYTES });
        }
        match self.layers.iter().find(|layer| !LAYER_TYPES.contains(&layer.media_type.as_str())) {
            Some(layer) => Err(ManifestError::LayerMediaType(layer.media_type.clone())),
            None => Ok(()),
        }
    }
}

/// An index of manifests.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Index {
    pub(super) manifests: Vec<Descriptor>,
}

/// What a digest or tag leads to.
#[derive(Clone, Debug)]
pub(super) enum Resolved {
    Image(Manifest),
    Index(Index),
}

impl Resolved {
    /// Parses either kind, told apart by content rather than by a header that may lie.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, ManifestError> {
        #[derive(Deserialize)]
        struct Probe {
            #[serde(rename = "schemaVersion")]
            schema_version: u64,
            #[serde(rename = "mediaType")]
            media_type: Option<String>,
            manifests: Option<serde::de::IgnoredAny>,
        }
        let json = |error: serde_json::Error| ManifestError::Json(error.into());
        let probe: Probe = serde_json::from_slice(bytes).map_err(json)?;
        if probe.schema_version != 2 {
            return Err(ManifestError::SchemaVersion(probe.schema_version));
        }
        let is_index = match probe.media_type.as_deref() {
            Some(OCI_INDEX | DOCKER_LIST) => true,
            Some(OCI_MANIFEST | DOCKER_MANIFEST) => false,
            _ => probe.manifests.is_some(),
        };
        if is_index {
            return Ok(Self::Index(serde_json::from_slice(bytes).map_err(json)?));
        }
        let manifest: Manifest = serde_json::from_slice(bytes).map_err(json)?;
        manifest.check()?;
        Ok(Self::Image(manifest))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const EXAMPLE: &str = r#"{"schemaVersion":2,"config":{"mediaType":"application/vnd.oci.image.config.v1+json",
        "digest":"sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855","size":7},"layers":[
        {"mediaType":"application/vnd.docker.image.rootfs.diff.tar.gzip","size":9,
        "digest":"sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"}]}"#;

    #[test]
    fn a_manifest_without_a_media_type_is_told_from_an_index_by_its_fields() {
        assert!(matches!(Resolved::parse(EXAMPLE.as_bytes()), Ok(Resolved::Image(_))));
        let index = br#"{"schemaVersion":2,"manifests":[]}"#;
        assert!(matches!(Resolved::parse(index), Ok(Resolved::Index(_))));
        let old = br#"{"schemaVersion":1,"fsLayers":[]}"#;
        assert!(matches!(Resolved::parse(old), Err(ManifestError::SchemaVersion(1))));
    }

    proptest! {
        #[test]
        fn any_bytes_are_parsed_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = Resolved::parse(&bytes);
        }

        #[test]
        fn damaged_manifests_are_parsed_or_refused(at in any::<prop::sample::Index>(), byte in any::<u8>()) {
            let mut bytes = EXAMPLE.as_bytes().to_vec();
            let at = at.index(bytes.len());
            bytes[at] = byte;
            let _ = Resolved::parse(&bytes);
        }
    }
}
