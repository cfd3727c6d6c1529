//! Names inside an archive. They are keys and nothing else: none becomes a path of this host.

/// The name that `path` means, seen from the folder `folder`: without `.`, `..` and empty parts. `None` if it leads out of
/// the archive.
pub(super) fn resolve(folder: &str, path: &str) -> Option<String> {
    if path.starts_with('/') {
        return None;
    }
    let mut parts: Vec<&str> = folder.split('/').filter(|part| !part.is_empty()).collect();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()?),
            part => parts.push(part),
        }
    }
    Some(parts.join("/"))
}

/// The folder that `name` is in.
pub(super) fn folder(name: &str) -> &str {
    name.rsplit_once('/').map_or("", |(folder, _)| folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_seen_from_their_folder() {
        assert_eq!(resolve("", "./a//b/").as_deref(), Some("a/b"));
        assert_eq!(resolve("a", "../b/layer.tar").as_deref(), Some("b/layer.tar"));
        assert_eq!(resolve("a/b", "../..").as_deref(), Some(""));
        assert_eq!(folder("a/b/c"), "a/b");
        assert_eq!(folder("a"), "");
    }

    #[test]
    fn no_name_leads_out() {
        for (from, path) in [("", ".."), ("a", "../../b"), ("a", "b/../../../c"), ("", "/etc/passwd")] {
            assert_eq!(resolve(from, path), None, "{from:?} {path:?}");
        }
    }
}
