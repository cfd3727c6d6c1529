//! The way from an index to the one image of it that is for the wanted platform (image-spec, image-index.md).
//!
//! What to look at next is decided here and fetched elsewhere, from a registry or from a folder.

use std::collections::HashSet;

use crate::image::digest::Digest;
use crate::image::error::ManifestError;
use crate::image::manifest::DOCKER_LIST;
use crate::image::manifest::Descriptor;
use crate::image::manifest::Index;
use crate::image::manifest::Manifest;
use crate::image::manifest::OCI_INDEX;
use crate::image::manifest::Resolved;
use crate::image::platform::Platform;

/// How many indexes may lead to one another. Attestations nest one deep; more is a loop in disguise.
const MAX_INDEX_DEPTH: usize = 3;

/// How many indexes are looked into. Only one that was made to keep us busy has more.
const MAX_INDEXES: usize = 16;

/// How many platforms an error lists.
const MAX_LISTED: usize = 16;

/// A search in progress. Ask for the [`next`](Self::next) manifest, fetch it, and say so if it is an
/// [`index`](Self::index); the first that is none is the image.
#[derive(Debug)]
pub(super) struct IndexSearch {
    wanted: Platform,
    /// Still to be looked at, best last, each with the number of indexes that led there.
    pending: Vec<(Descriptor, usize)>,
    depth: usize,
    seen: HashSet<Digest>,
    available: Vec<Platform>,
}

impl IndexSearch {
    pub(super) fn new(start: Descriptor, wanted: Platform) -> Self {
        let mut search = Self::open(wanted);
        search.pending.push((start, 0));
        search
    }

    /// A search that begins with an index that has been fetched already, by its tag.
    pub(super) fn open(wanted: Platform) -> Self {
        Self { wanted, pending: Vec::new(), depth: 0, seen: HashSet::new(), available: Vec::new() }
    }

    /// What `index` offers in place of `wanted`.
    pub(super) fn nothing(index: &Index, wanted: Platform) -> ManifestError {
        let mut search = Self::open(wanted);
        search.list(index);
        search.no_platform()
    }

    /// The manifest or index to fetch now.
    pub(super) fn next(&mut self) -> Result<Descriptor, ManifestError> {
        while let Some((descriptor, depth)) = self.pending.pop() {
            if !self.seen.insert(descriptor.digest) {
                continue;
            }
            if depth > MAX_INDEX_DEPTH {
                return Err(ManifestError::IndexDepth(MAX_INDEX_DEPTH));
            }
            if self.seen.len() > MAX_INDEXES {
                return Err(ManifestError::TooManyIndexes { limit: MAX_INDEXES });
            }
            self.depth = depth;
            return Ok(descriptor);
        }
        Err(self.no_platform())
    }

    /// What was fetched is an index: chooses among its entries.
    pub(super) fn index(&mut self, index: &Index) -> Result<(), ManifestError> {
        let depth = self.depth + 1;
        let exact = |entry: &&Descriptor| entry.platform.as_ref().is_some_and(|platform| platform.serves(&self.wanted));
        if let Some(entry) = index.manifests.iter().find(exact) {
            // The author's word: whatever else was still to be looked at only might have led here.
            self.pending = vec![(entry.clone(), depth)];
            return Ok(());
        }
        self.list(index);
        let unnamed = index.manifests.iter().filter(|entry| entry.platform.is_none());
        // An image that does not say its platform is meant when there is no other choice; its configuration tells.
        let is_open = |entry: &&Descriptor| is_index(entry) || index.manifests.len() == 1;
        self.pending.extend(unnamed.filter(is_open).rev().map(|entry| (entry.clone(), depth)));
        Ok(())
    }

    fn list(&mut self, index: &Index) {
        for platform in index.manifests.iter().filter_map(|entry| entry.platform.as_ref()) {
            // Of a hostile index, only what could be a platform gets into a message.
            let is_named = platform.os != "unknown" && is_short(platform) && is_text(platform);
            if is_named && self.available.len() < MAX_LISTED && !self.available.contains(platform) {
                self.available.push(platform.clone());
            }
        }
    }

    fn no_platform(&mut self) -> ManifestError {
        ManifestError::NoPlatform {
            wanted: Box::new(self.wanted.clone()),
            available: std::mem::take(&mut self.available),
        }
    }
}

/// Searches where manifests can be read at once, by `read`; returns the image's manifest, parsed and as it was read.
pub(super) fn find_image<E: From<ManifestError>>(
    start: Descriptor,
    wanted: Platform,
    mut read: impl FnMut(&Descriptor) -> Result<Vec<u8>, E>,
) -> Result<(Digest, Vec<u8>, Manifest), E> {
    let mut search = IndexSearch::new(start, wanted);
    loop {
        let descriptor = search.next()?;
        let bytes = read(&descriptor)?;
        match Resolved::parse(&bytes)? {
            Resolved::Image(manifest) => return Ok((descriptor.digest, bytes, manifest)),
            Resolved::Index(index) => search.index(&index)?,
        }
    }
}

/// Whether the entry may lead to an image for `wanted`.
pub(super) fn leads_to(entry: &Descriptor, wanted: &Platform) -> bool {
    entry.platform.as_ref().is_none_or(|platform| platform.serves(wanted))
}

fn is_index(entry: &Descriptor) -> bool {
    entry.media_type == OCI_INDEX || entry.media_type == DOCKER_LIST
}

fn is_short(platform: &Platform) -> bool {
    platform.to_string().len() <= 64
}

fn is_text(platform: &Platform) -> bool {
    platform.to_string().parse::<Platform>().is_ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn descriptor(name: &str, media_type: &str, platform: Option<&str>) -> Descriptor {
        Descriptor {
            media_type: media_type.to_owned(),
            digest: Digest::of(name.as_bytes()),
            size: 1,
            platform: platform.map(|text| text.parse().unwrap()),
            annotations: None,
        }
    }

    fn image(platform: &str) -> Descriptor {
        descriptor(platform, "", Some(platform))
    }

    fn nested(name: &str) -> Descriptor {
        descriptor(name, OCI_INDEX, None)
    }

    fn search(wanted: &str, manifests: Vec<Descriptor>) -> IndexSearch {
        let mut search = IndexSearch::open(wanted.parse().unwrap());
        search.index(&Index { manifests }).unwrap();
        search
    }

    #[test]
    fn the_baseline_processor_is_chosen_among_its_levels() {
        let entries = vec![image("linux/arm64"), image("linux/amd64/v3"), image("linux/amd64")];
        let found = search("linux/amd64", entries.clone()).next().unwrap();
        assert_eq!(found.digest, image("linux/amd64").digest);
        let found = search("linux/amd64/v3", entries).next().unwrap();
        assert_eq!(found.digest, image("linux/amd64/v3").digest);
    }

    #[test]
    fn without_a_match_the_error_lists_what_there_is() {
        let entries = vec![image("linux/arm64"), image("unknown/unknown"), image("linux/s390x")];
        let error = search("linux/amd64", entries).next().unwrap_err();
        assert_eq!(error.to_string(), "no image for linux/amd64, only for linux/arm64, linux/s390x");
    }

    #[test]
    fn nested_indexes_are_searched_in_order_and_each_once() {
        let mut search = search("linux/amd64", vec![nested("a"), image("linux/arm64"), nested("b"), nested("a")]);
        assert_eq!(search.next().unwrap().digest, nested("a").digest);
        search.index(&Index { manifests: vec![image("linux/s390x")] }).unwrap();
        assert_eq!(search.next().unwrap().digest, nested("b").digest);
        search.index(&Index { manifests: vec![image("linux/amd64")] }).unwrap();
        assert_eq!(search.next().unwrap().digest, image("linux/amd64").digest);
    }

    #[test]
    fn an_image_without_a_platform_is_taken_only_when_there_is_no_other() {
        let unnamed = descriptor("x", "", None);
        assert_eq!(search("linux/amd64", vec![unnamed.clone()]).next().unwrap().digest, unnamed.digest);
        let error = search("linux/amd64", vec![unnamed, image("linux/arm64")]).next().unwrap_err();
        assert!(matches!(error, ManifestError::NoPlatform { .. }));
    }

    #[test]
    fn depth_and_number_of_indexes_are_bounded() {
        let mut deep = search("linux/amd64", vec![nested("0")]);
        let error = (1..9).find_map(|level| {
            let entry = deep.next().err();
            deep.index(&Index { manifests: vec![nested(&level.to_string())] }).unwrap();
            entry
        });
        assert!(matches!(error, Some(ManifestError::IndexDepth(_))), "{error:?}");
        let mut wide = search("linux/amd64", (0..99).map(|name| nested(&name.to_string())).collect());
        let error = (0..99).find_map(|_| wide.next().err());
        assert!(matches!(error, Some(ManifestError::TooManyIndexes { .. })), "{error:?}");
    }

    proptest! {
        #[test]
        fn hostile_platforms_do_not_get_into_messages(os in "\\PC{0,200}", architecture in ".{0,9}") {
            let platform = Some(Platform { os, architecture, variant: None });
            let entry = Descriptor { platform, ..nested("x") };
            let error = search("linux/amd64", vec![entry]).next().map(|_| ()).map_err(|error| error.to_string());
            if let Err(message) = error {
                prop_assert!(message.len() < 200 && message.is_ascii(), "{message}");
            }
        }
    }
}
