//! Found and expected, as far as each reader can tell.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use tempfile::TempDir;

use crate::case::Case;
use crate::image_support;
use crate::image_support::Listing;
use crate::image_support::Seen;

/// Who found it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum By {
    /// `fsck.erofs --extract`: each name becomes a file of its own, without attributes; the owner is set after the mode,
    /// which clears setuid and setgid of all but folders.
    Fsck,
    Kernel,
    Umoci,
}

impl By {
    /// Leaves of `seen` what this reader shows.
    fn reduce(self, seen: &mut Seen, is_implied: bool) {
        if self == Self::Fsck {
            (seen.nlink, seen.same_as) = (0, None);
            seen.xattrs.clear();
            if seen.kind != "folder" {
                seen.mode &= 0o1777;
            }
        }
        // The time of extraction.
        if self == Self::Umoci && is_implied {
            seen.mtime = (0, 0);
        }
    }
}

/// Compares entry by entry, and names all that differs.
pub(crate) fn check(case: &Case, found: &Listing, by: By) -> Result<(), String> {
    let expected = reduced(case, &case.expected(), by);
    let found = reduced(case, found, by);
    let names: std::collections::BTreeSet<_> = expected.keys().chain(found.keys()).collect();
    let differences: Vec<_> = names
        .into_iter()
        .filter_map(|name| match (expected.get(name), found.get(name)) {
            (Some(expected), None) => Some(format!("  {name:?} is missing: {}", shown(expected))),
            (None, Some(found)) => Some(format!("  {name:?} should not be: {}", shown(found))),
            (Some(expected), Some(found)) if expected != found => {
                Some(format!("  {name:?} is {}\n    instead of {}", shown(found), shown(expected)))
            }
            _ => None,
        })
        .collect();
    if differences.is_empty() { Ok(()) } else { Err(format!("by {by:?}\n{}", differences.join("\n"))) }
}

fn reduced(case: &Case, listing: &Listing, by: By) -> Listing {
    let mut listing = listing.clone();
    for (name, seen) in &mut listing {
        by.reduce(seen, case.implied().any(|path| OsStr::from_bytes(path) == name));
    }
    listing
}

fn shown(seen: &Seen) -> String {
    let Seen { kind, mode, uid, gid, mtime, nlink, bytes, same_as, xattrs } = seen;
    let start = String::from_utf8_lossy(&bytes[..bytes.len().min(40)]);
    let length = bytes.len();
    format!("{kind} {mode:o} {uid}:{gid} {mtime:?} x{nlink} {length} {start:?} same as {same_as:?} {xattrs:?}")
}

/// A folder in memory if attributes can be kept there, which depends on the kernel, else on disk.
pub(crate) fn scratch_with_xattrs() -> TempDir {
    let folder = image_support::scratch();
    let flags = rustix::fs::XattrFlags::empty();
    match rustix::fs::setxattr(folder.path(), "user.kiln", b"1", flags) {
        Ok(()) => folder,
        Err(_) => tempfile::tempdir().expect("a temporary folder"),
    }
}
