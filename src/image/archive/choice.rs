//! Which of several images is meant.

use std::collections::HashMap;

use crate::image::archive::error::ImportError;
use crate::image::reference::Reference;

/// An image that may be meant.
#[derive(Debug)]
pub(super) struct Candidate<T> {
    /// What it is known by; without any, `id` is its name.
    pub(super) names: Vec<String>,
    /// The same for the same image.
    pub(super) id: String,
    pub(super) image: T,
}

/// One candidate for each image, in order, with all its names.
pub(super) fn merged<T>(candidates: impl IntoIterator<Item = Candidate<T>>) -> Vec<Candidate<T>> {
    let mut merged: Vec<Candidate<T>> = Vec::new();
    let mut places = HashMap::new();
    for candidate in candidates {
        match places.get(&candidate.id) {
            Some(&place) => {
                let seen: &mut Candidate<T> = &mut merged[place];
                seen.names.extend(candidate.names);
            }
            None => {
                places.insert(candidate.id.clone(), merged.len());
                merged.push(candidate);
            }
        }
    }
    merged
}

/// The one that `tag` means or, without it, the only one there is; there is at least one.
pub(super) fn choose<T>(candidates: Vec<Candidate<T>>, tag: Option<&str>) -> Result<T, ImportError> {
    let mut meant: Vec<_> = match tag {
        None => candidates,
        Some(tag) => {
            let names = names(&candidates);
            let wanted = Wanted::new(tag);
            let meant: Vec<_> = candidates.into_iter().filter(|candidate| wanted.is(&candidate.names)).collect();
            if meant.is_empty() {
                return Err(ImportError::UnknownImage { tag: tag.to_owned(), names });
            }
            meant
        }
    };
    match (meant.pop(), meant.is_empty()) {
        (Some(only), true) => Ok(only.image),
        (Some(last), false) => {
            meant.push(last);
            Err(ImportError::Ambiguous { names: names(&meant) })
        }
        (None, _) => Err(ImportError::NotAnImage { reason: "its list of images is empty" }),
    }
}

fn names<T>(candidates: &[Candidate<T>]) -> Vec<String> {
    let of = |candidate: &Candidate<T>| match candidate.names.as_slice() {
        [] => vec![candidate.id.clone()],
        names => names.to_vec(),
    };
    let mut names: Vec<_> = candidates.iter().flat_map(of).collect();
    names.sort();
    names.dedup();
    names
}

/// A tag, as it stands and as a reference: `app:1` is `docker.io/library/app:1`.
struct Wanted<'a> {
    tag: &'a str,
    /// A bare `1.2` is a tag and not the image `1.2:latest`.
    reference: Option<Reference>,
}

impl<'a> Wanted<'a> {
    fn new(tag: &'a str) -> Self {
        let is_full = tag.contains([':', '/']);
        Self { tag, reference: is_full.then(|| tag.parse().ok()).flatten() }
    }

    fn is(&self, names: &[String]) -> bool {
        let same = |name: &String| {
            self.tag == name || self.reference.as_ref().is_some_and(|wanted| name.parse().as_ref() == Ok(wanted))
        };
        names.iter().any(same)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidates(list: &[(&str, &[&str])]) -> Vec<Candidate<String>> {
        let candidate = |(id, names): &(&str, &[&str])| Candidate {
            names: names.iter().map(|name| (*name).to_owned()).collect(),
            id: (*id).to_owned(),
            image: (*id).to_owned(),
        };
        merged(list.iter().map(candidate))
    }

    #[test]
    fn a_tag_is_text_or_a_reference() {
        let list: &[(&str, &[&str])] = &[("a", &["app:1", "1"]), ("b", &["quay.io/app:1", "2"])];
        for (tag, id) in
            [("app:1", "a"), ("docker.io/library/app:1", "a"), ("1", "a"), ("quay.io/app:1", "b"), ("2", "b")]
        {
            assert_eq!(choose(candidates(list), Some(tag)).unwrap(), id, "{tag}");
        }
        let error = choose(candidates(list), Some("3")).unwrap_err();
        assert!(matches!(error, ImportError::UnknownImage { names, .. } if names.len() == 4));
    }

    #[test]
    fn one_image_under_two_names_is_one_image() {
        let list: &[(&str, &[&str])] = &[("a", &["x"]), ("a", &["y"])];
        assert_eq!(choose(candidates(list), None).unwrap(), "a");
        assert_eq!(choose(candidates(list), Some("y")).unwrap(), "a");
    }

    #[test]
    fn two_images_are_listed() {
        let list: &[(&str, &[&str])] = &[("a", &["latest"]), ("b", &["latest"]), ("c", &[])];
        let error = choose(candidates(list), None).unwrap_err();
        assert_eq!(error.to_string(), r#"there are several images, name one by its tag: "c", "latest""#);
        let error = choose(candidates(list), Some("latest")).unwrap_err();
        assert!(matches!(error, ImportError::Ambiguous { names } if names == ["latest"]));
    }
}
