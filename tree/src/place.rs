//! The destination: one open folder, and names that are walked from it component by component.
//!
//! Nothing here resolves a name that has more than one component, so no symbolic link inside the destination is followed,
//! whoever made it and whenever.

use std::io;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;

use rustix::fs::AtFlags;
use rustix::fs::FileType;
use rustix::fs::Mode;
use rustix::fs::OFlags;
use rustix::io::Errno;

use crate::MAX_DEPTH;
use crate::error::UnpackError;
use crate::error::shown;

/// The longest name of an entry, in bytes (Linux's PATH_MAX).
const MAX_NAME: usize = 4096;

/// The longest component of a name, in bytes (Linux's NAME_MAX).
const MAX_COMPONENT: usize = 255;

/// The mode of folders that the archive needs and has no entry for.
const DEFAULT_FOLDER_MODE: u32 = 0o755;

/// A name that stays inside the destination. `components` is empty for the destination itself.
#[derive(Clone, Debug)]
pub(crate) struct Name<'a> {
    whole: &'a [u8],
    components: Vec<&'a [u8]>,
}

impl<'a> Name<'a> {
    /// Checks a name from an archive; `.` and doubled slashes are allowed.
    pub(crate) fn new(whole: &'a [u8]) -> Result<Self, UnpackError> {
        if whole.len() > MAX_NAME {
            return Err(UnpackError::Limit { what: "bytes in a name", limit: MAX_NAME as u64 });
        }
        let components: Vec<_> =
            whole.split(|byte| *byte == b'/').filter(|part| !matches!(*part, b"" | b".")).collect();
        if whole.is_empty() || whole.starts_with(b"/") || whole.contains(&0) || components.contains(&&b".."[..]) {
            return Err(UnpackError::Escape { name: shown(whole) });
        }
        if components.iter().any(|part| part.len() > MAX_COMPONENT) {
            return Err(UnpackError::Limit { what: "bytes in a component of a name", limit: MAX_COMPONENT as u64 });
        }
        if components.len() > MAX_DEPTH {
            return Err(UnpackError::Limit { what: "components in a name", limit: MAX_DEPTH as u64 });
        }
        Ok(Self { whole, components })
    }

    pub(crate) fn components(&self) -> &[&'a [u8]] {
        &self.components
    }

    /// The same for all spellings of the name; a folder's is a prefix of, and sorts before, those of what is in it.
    pub(crate) fn key(&self) -> Vec<u8> {
        self.components.join(&b'/')
    }

    /// The folders above, and the last component. The destination itself has neither.
    pub(crate) fn split(&self) -> Result<(&[&'a [u8]], &'a [u8]), UnpackError> {
        match self.components.split_last() {
            Some((last, parents)) => Ok((parents, last)),
            None => Err(UnpackError::Escape { name: shown(self.whole) }),
        }
    }

    pub(crate) fn error(&self, error: impl Into<io::Error>) -> UnpackError {
        UnpackError::Io { name: shown(self.whole), source: error.into() }
    }
}

/// Opens a folder of this very name in `parent`.
fn open_folder(parent: BorrowedFd<'_>, component: &[u8]) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(parent, component, flags, Mode::empty())
}

/// What an [`open_folder`] that failed means for the entry `name`.
fn refused(name: &Name<'_>, parent: BorrowedFd<'_>, component: &[u8], error: Errno) -> UnpackError {
    match kind_of(parent, component) {
        Ok(Some(FileType::Symlink)) => UnpackError::Escape { name: shown(name.whole) },
        _ => name.error(error),
    }
}

/// What is there, if anything.
fn kind_of(parent: BorrowedFd<'_>, component: &[u8]) -> rustix::io::Result<Option<FileType>> {
    match rustix::fs::statat(parent, component, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(FileType::from_raw_mode(stat.st_mode))),
        Err(Errno::NOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whether [`walk`] makes what is missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Missing {
    Make,
    Refuse,
}

/// Opens the folder that `components` lead to from `root`.
pub(crate) fn walk(
    root: BorrowedFd<'_>,
    components: &[&[u8]],
    missing: Missing,
    name: &Name<'_>,
) -> Result<OwnedFd, UnpackError> {
    let mut folder = root.try_clone_to_owned().map_err(|error| name.error(error))?;
    for component in components {
        folder = match open_folder(folder.as_fd(), component) {
            Err(Errno::NOENT) if missing == Missing::Make => {
                make_folder(folder.as_fd(), component, DEFAULT_FOLDER_MODE).map_err(|error| name.error(error))?
            }
            opened => opened.map_err(|error| refused(name, folder.as_fd(), component, error))?,
        };
    }
    Ok(folder)
}

/// Makes a folder of exactly `mode`, whatever the process's umask.
fn make_folder(parent: BorrowedFd<'_>, component: &[u8], mode: u32) -> rustix::io::Result<OwnedFd> {
    rustix::fs::mkdirat(parent, component, Mode::RWXU)?;
    let folder = open_folder(parent, component)?;
    rustix::fs::fchmod(&folder, permissions(mode))?;
    Ok(folder)
}

/// Makes sure of a folder that can be filled: one that exists is kept, anything else in its place is not.
pub(crate) fn ensure_folder(parent: BorrowedFd<'_>, component: &[u8]) -> rustix::io::Result<()> {
    match kind_of(parent, component)? {
        Some(FileType::Directory) => return Ok(()),
        Some(_) => rustix::fs::unlinkat(parent, component, AtFlags::empty())?,
        None => {}
    }
    rustix::fs::mkdirat(parent, component, Mode::RWXU)
}

/// Removes what is in the place of an entry that is no folder; a folder only when it is empty.
pub(crate) fn clear(parent: BorrowedFd<'_>, component: &[u8]) -> rustix::io::Result<()> {
    match kind_of(parent, component)? {
        Some(FileType::Directory) => rustix::fs::unlinkat(parent, component, AtFlags::REMOVEDIR),
        Some(_) => rustix::fs::unlinkat(parent, component, AtFlags::empty()),
        None => Ok(()),
    }
}

/// Permission bits as the system's type has them.
#[allow(clippy::unnecessary_cast, reason = "the type differs between systems")]
pub(crate) fn permissions(mode: u32) -> Mode {
    Mode::from_raw_mode(mode as rustix::fs::RawMode)
}
