//! A layout inside an archive: what `skopeo`, `podman`, `buildah` and newer versions of `docker save` write.

use std::collections::HashMap;

use crate::image::archive::choice::Candidate;
use crate::image::archive::choice::choose;
use crate::image::archive::choice::merged;
use crate::image::archive::contents::Contents;
use crate::image::archive::docker::Item;
use crate::image::archive::error::ImportError;
use crate::image::archive::found::Found;
use crate::image::archive::found::check_size;
use crate::image::config::ImageConfig;
use crate::image::digest::Digest;
use crate::image::index_search::IndexSearch;
use crate::image::index_search::find_image;
use crate::image::index_search::leads_to;
use crate::image::layout::check_marker;
use crate::image::manifest::Descriptor;
use crate::image::manifest::Index;
use crate::image::manifest::Manifest;
use crate::image::manifest::Resolved;
use crate::image::platform::Platform;

const INDEX: &str = "index.json";
const MARKER: &str = "oci-layout";

/// The full name of an image, as containerd and Docker write it beside the tag.
const CONTAINERD_NAME: &str = "io.containerd.image.name";

/// The index of the layout, `None` if there is none. Blocking.
pub(super) fn index(contents: &Contents) -> Result<Option<Index>, ImportError> {
    let (Some(marker), Some(index)) = (contents.find(MARKER)?, contents.find(INDEX)?) else { return Ok(None) };
    let marker = contents.document(MARKER, &marker.digest, Manifest::MAX_SIZE)?;
    check_marker(&marker).map_err(|reason| ImportError::NotAnImage { reason })?;
    let index = contents.document(INDEX, &index.digest, Manifest::MAX_SIZE)?;
    match Resolved::parse(&index)? {
        Resolved::Index(index) => Ok(Some(index)),
        Resolved::Image(_) => Err(ImportError::NotAnImage { reason: "index.json is not an index" }),
    }
}

/// The image that `tag` means, by the index or by the `items` that Docker lists beside it. Blocking.
pub(super) fn find(
    index: &Index,
    items: &[Item],
    contents: &Contents,
    tag: Option<&str>,
) -> Result<Found, ImportError> {
    let wanted = Platform::default();
    let entries = index.manifests.iter().filter(|entry| leads_to(entry, &wanted));
    let mut candidates = merged(entries.map(|entry| Candidate {
        names: entry_names(entry),
        id: entry.digest.to_string(),
        image: entry.clone(),
    }));
    if candidates.is_empty() {
        return Err(IndexSearch::nothing(index, wanted).into());
    }
    add_repo_tags(&mut candidates, items, contents)?;
    let start = choose(candidates, tag)?;
    let read = |descriptor: &Descriptor| blob(contents, "manifest", descriptor, Manifest::MAX_SIZE);
    let (digest, document, manifest) = find_image(start, wanted, read)?;
    let config = blob(contents, "configuration", &manifest.config, ImageConfig::MAX_SIZE)?;
    Found::new(digest, manifest, document, config)
}

fn entry_names(entry: &Descriptor) -> Vec<String> {
    let full = entry.annotations.as_ref().and_then(|annotations| annotations.get(CONTAINERD_NAME));
    entry.ref_name().into_iter().map(str::to_owned).chain(full.cloned()).collect()
}

/// Docker's own list knows images by the file of their configuration.
fn add_repo_tags(
    candidates: &mut [Candidate<Descriptor>],
    items: &[Item],
    contents: &Contents,
) -> Result<(), ImportError> {
    let mut tags: HashMap<Digest, Vec<String>> = HashMap::new();
    for item in items {
        if let Some(config) = contents.find(&item.config)? {
            tags.entry(config.digest).or_default().extend(item.repo_tags.iter().cloned());
        }
    }
    if tags.is_empty() {
        return Ok(());
    }
    for candidate in candidates {
        // One that cannot be read has no name for that, and is refused if it is chosen.
        let document = blob(contents, "manifest", &candidate.image, Manifest::MAX_SIZE);
        let manifest = document.ok().and_then(|bytes| Resolved::parse(&bytes).ok());
        if let Some(Resolved::Image(manifest)) = manifest {
            candidate.names.extend(tags.get(&manifest.config.digest).into_iter().flatten().cloned());
        }
    }
    Ok(())
}

fn blob(contents: &Contents, what: &str, descriptor: &Descriptor, limit: u64) -> Result<Vec<u8>, ImportError> {
    let bytes = contents.document(what, &descriptor.digest, limit)?;
    check_size(what, descriptor, bytes.len() as u64)?;
    Ok(bytes)
}
