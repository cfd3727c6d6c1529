//! What `docker save` writes beside or instead of a layout: `manifest.json`, which names the files of each image.
//!
//! ```text
//! manifest.json      [{"Config": "<id>.json", "RepoTags": ["app:1"], "Layers": ["<layer>/layer.tar", ...]}]
//! <id>.json          the configuration
//! <layer>/layer.tar  a layer; or a link to another one's, where two layers are the same
//! repositories       tags, as older versions of Docker read them; not looked at
//! ```

use serde::Deserialize;
use serde::Serialize;

use crate::image::archive::choice::Candidate;
use crate::image::archive::choice::choose;
use crate::image::archive::choice::merged;
use crate::image::archive::contents::Contents;
use crate::image::archive::contents::Summary;
use crate::image::archive::error::ImportError;
use crate::image::archive::found::Found;
use crate::image::compression::Compression;
use crate::image::config::ImageConfig;
use crate::image::config::null_as_default;
use crate::image::digest::Digest;
use crate::image::error::ManifestError;
use crate::image::manifest::Descriptor;
use crate::image::manifest::Manifest;
use crate::image::manifest::OCI_CONFIG;
use crate::image::manifest::OCI_LAYER;
use crate::image::manifest::OCI_MANIFEST;
use crate::image::manifest::Resolved;

const MANIFEST: &str = "manifest.json";

/// One image of `manifest.json`.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Item {
    pub(super) config: String,
    #[serde(default, deserialize_with = "null_as_default")]
    pub(super) repo_tags: Vec<String>,
    #[serde(default, deserialize_with = "null_as_default")]
    layers: Vec<String>,
}

/// The images of `manifest.json`, `None` without that file. Blocking.
pub(super) fn items(contents: &Contents) -> Result<Option<Vec<Item>>, ImportError> {
    let Some(file) = contents.find(MANIFEST)? else { return Ok(None) };
    let bytes = contents.document(MANIFEST, &file.digest, Manifest::MAX_SIZE)?;
    let json = |error: serde_json::Error| ImportError::Json { name: MANIFEST, source: error.into() };
    serde_json::from_slice(&bytes).map(Some).map_err(json)
}

/// The image that `tag` means. Blocking.
pub(super) fn find(items: Vec<Item>, contents: &Contents, tag: Option<&str>) -> Result<Found, ImportError> {
    let candidates =
        items.into_iter().map(|item| Candidate { names: item.repo_tags.clone(), id: item.config.clone(), image: item });
    describe(&choose(merged(candidates), tag)?, contents)
}

/// Gives the image the manifest that the archive lacks. The same files give the same one.
fn describe(item: &Item, contents: &Contents) -> Result<Found, ImportError> {
    let what = "configuration";
    let missing = |what: &str, name: &str| ImportError::Missing { what: what.to_owned(), name: name.to_owned() };
    let config = contents.find(&item.config)?.ok_or_else(|| missing(what, &item.config))?;
    let document = contents.document(what, &config.digest, ImageConfig::MAX_SIZE)?;
    let (_, diff_ids) = ImageConfig::parse(&document)?;
    if diff_ids.len() != item.layers.len() {
        return Err(ManifestError::LayerCount { manifest: item.layers.len(), config: diff_ids.len() }.into());
    }
    let layer = |(index, (name, diff_id)): (usize, (&String, &Digest))| {
        let what = format!("layer {index}");
        let file = contents.find(name)?.ok_or_else(|| missing(&what, name))?;
        layer(what, &file, diff_id)
    };
    let layers = item.layers.iter().zip(&diff_ids).enumerate().map(layer).collect::<Result<Vec<_>, _>>()?;
    let manifest = write(&Written {
        schema_version: 2,
        media_type: OCI_MANIFEST,
        config: descriptor(OCI_CONFIG.to_owned(), &config),
        layers,
    });
    // Read back, so that it passes the checks of any other.
    let Resolved::Image(parsed) = Resolved::parse(&manifest)? else {
        return Err(ImportError::NotAnImage { reason: "its manifest is an index" });
    };
    Found::new(Digest::of(&manifest), parsed, manifest, document)
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Written {
    schema_version: u8,
    media_type: &'static str,
    config: Descriptor,
    layers: Vec<Descriptor>,
}

fn write(manifest: &Written) -> Vec<u8> {
    serde_json::to_vec(manifest).expect("texts and numbers are valid json")
}

/// A plain archive is what the configuration promises. A compressed one, as some tools write, is checked when it is
/// converted.
fn layer(what: String, file: &Summary, diff_id: &Digest) -> Result<Descriptor, ImportError> {
    let suffix = match file.compression {
        _ if file.digest == *diff_id => "",
        Compression::Gzip => "+gzip",
        Compression::Zstd => "+zstd",
        Compression::None => {
            return Err(ImportError::DigestMismatch { what, expected: *diff_id, found: file.digest });
        }
    };
    Ok(descriptor(format!("{OCI_LAYER}{suffix}"), file))
}

fn descriptor(media_type: String, file: &Summary) -> Descriptor {
    Descriptor { media_type, digest: file.digest, size: file.size, platform: None, annotations: None }
}
