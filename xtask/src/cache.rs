//! `~/.cache/kiln`: what is built once and found again.
//!
//! A section (`kernel`, `agent`) holds one folder per key and a symbolic link `current` to the one in use. A
//! folder appears complete, by rename, and is never changed afterwards; so readers need no lock, and an
//! interrupted build leaves only a scratch folder, which the next one removes.

use std::fs;
use std::fs::File;
use std::io;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::path::PathBuf;

use anyhow::Context;
use anyhow::Result;
use kiln::vm::Assets;

const SCRATCH_PREFIX: &str = ".scratch-";

/// One section of the cache.
pub(crate) struct Section {
    dir: PathBuf,
}

/// A section while this process is the only one adding to it.
pub(crate) struct Writer<'a> {
    section: &'a Section,
    scratch: PathBuf,
    _lock: File,
}

impl Section {
    /// Opens the section, creating its folder when needed.
    pub(crate) fn open(name: &str) -> Result<Self> {
        Self::at(Assets::user().context("no home folder: set HOME")?.dir().join(name))
    }

    fn at(dir: PathBuf) -> Result<Self> {
        fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        Ok(Self { dir })
    }

    /// The folder of `key`, if it is there.
    pub(crate) fn find(&self, key: &str) -> Option<PathBuf> {
        Some(self.dir.join(key)).filter(|dir| dir.is_dir())
    }

    /// The path through `current`, whether or not it exists.
    pub(crate) fn current(&self) -> PathBuf {
        self.dir.join("current")
    }

    /// Makes `current` point to `key`, in one step.
    pub(crate) fn select(&self, key: &str) -> Result<()> {
        let current = self.current();
        if fs::read_link(&current).is_ok_and(|to| to == Path::new(key)) {
            return Ok(());
        }
        // A symbolic link cannot be replaced in place, but one can be renamed over another.
        let fresh = self.dir.join(format!(".current-{}", std::process::id()));
        remove_if_there(&fresh)?;
        symlink(key, &fresh)
            .and_then(|()| fs::rename(&fresh, &current))
            .with_context(|| format!("cannot point {} to {key}", current.display()))
    }

    /// Waits for other writers, then removes what interrupted ones left.
    pub(crate) fn writer(&self) -> Result<Writer<'_>> {
        let path = self.dir.join(".lock");
        let lock = File::create(&path).and_then(|file| file.lock().map(|()| file));
        let lock = lock.with_context(|| format!("cannot lock {}", path.display()))?;
        for entry in fs::read_dir(&self.dir)? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with(SCRATCH_PREFIX) {
                fs::remove_dir_all(entry.path())?;
            }
        }
        let scratch = self.dir.join(format!("{SCRATCH_PREFIX}{}", std::process::id()));
        fs::create_dir(&scratch).with_context(|| format!("cannot create {}", scratch.display()))?;
        Ok(Writer { section: self, scratch, _lock: lock })
    }
}

impl Writer<'_> {
    /// A folder on the cache's filesystem that goes away with the writer.
    pub(crate) fn scratch(&self) -> &Path {
        &self.scratch
    }

    /// Moves a finished folder from the scratch area to its key.
    pub(crate) fn publish(&self, finished: &Path, key: &str) -> Result<PathBuf> {
        let to = self.section.dir.join(key);
        fs::rename(finished, &to).with_context(|| format!("cannot move the result to {}", to.display()))?;
        Ok(to)
    }
}

impl Drop for Writer<'_> {
    fn drop(&mut self) {
        // What cannot be removed now is removed by the next writer.
        let _ = fs::remove_dir_all(&self.scratch);
    }
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_published_folder_is_found_and_current_follows_the_selection() {
        let dir = tempfile::tempdir().unwrap();
        let section = Section::at(dir.path().join("section")).unwrap();
        for key in ["one", "two"] {
            let writer = section.writer().unwrap();
            let entry = writer.scratch().join("entry");
            fs::create_dir(&entry).unwrap();
            fs::write(entry.join("file"), key).unwrap();
            writer.publish(&entry, key).unwrap();
            section.select(key).unwrap();
        }
        assert_eq!(fs::read_to_string(section.current().join("file")).unwrap(), "two");
        assert_eq!(fs::read_to_string(section.find("one").unwrap().join("file")).unwrap(), "one");
        assert_eq!(section.find("three"), None);
    }

    #[test]
    fn a_writer_removes_what_an_interrupted_one_left_and_its_own_scratch() {
        let dir = tempfile::tempdir().unwrap();
        let section = Section::at(dir.path().join("section")).unwrap();
        let left = section.dir.join(format!("{SCRATCH_PREFIX}0"));
        fs::create_dir_all(left.join("deep")).unwrap();
        let writer = section.writer().unwrap();
        assert!(!left.exists());
        let scratch = writer.scratch().to_owned();
        drop(writer);
        assert!(!scratch.exists());
    }
}
