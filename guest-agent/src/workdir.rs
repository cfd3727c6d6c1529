//! Makes the image's WORKDIR where the image does not have it, as Docker does.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::fs;
use std::fs::Permissions;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Component;
use std::path::Path;
use std::path::PathBuf;

use rustix::io::Errno;

/// Links on the way, at most: as many as Linux follows.
const MAX_LINKS: usize = 40;

/// Makes the folder `path` below `root`, and those above it, with mode 0755 and owned by whoever this process is.
///
/// Walks as a process does whose root is `root`: `..` does not lead out, a link begins again there. Where a link leads to nothing, what it names is made,
/// which `mkdir -p` does not do.
pub(crate) fn make(root: &Path, path: &Path) -> io::Result<()> {
    let mut left = steps(path);
    let mut here = PathBuf::new();
    let mut links = 0;
    while let Some(step) = left.pop_front() {
        if step == ".." {
            here.pop();
            continue;
        }
        let next = here.join(step);
        let place = root.join(&next);
        match fs::symlink_metadata(&place) {
            Ok(found) if found.is_dir() => here = next,
            Ok(found) if found.is_symlink() => {
                links += 1;
                if links > MAX_LINKS {
                    return Err(Errno::LOOP.into());
                }
                let target = fs::read_link(&place)?;
                if target.is_absolute() {
                    here = PathBuf::new();
                }
                for step in steps(&target).into_iter().rev() {
                    left.push_front(step);
                }
            }
            Ok(_) => return Err(Errno::NOTDIR.into()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                fs::create_dir(&place)?;
                // Whatever the mask of this process says.
                fs::set_permissions(&place, Permissions::from_mode(0o755))?;
                here = next;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// The names on the way, `..` among them.
fn steps(path: &Path) -> VecDeque<OsString> {
    let steps = path.components().filter_map(|component| match component {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some("..".into()),
        Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
    });
    steps.collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn root() -> tempfile::TempDir {
        tempfile::tempdir().expect("temporary folder")
    }

    fn is_dir(root: &tempfile::TempDir, path: &str) -> bool {
        fs::symlink_metadata(root.path().join(path)).is_ok_and(|found| found.is_dir())
    }

    fn made(root: &tempfile::TempDir, path: &str) -> io::Result<()> {
        make(root.path(), Path::new(path))
    }

    #[test]
    fn every_folder_on_the_way_is_made_with_its_mode() {
        let root = root();
        made(&root, "/srv/./app//data/").expect("made");
        for folder in ["srv", "srv/app", "srv/app/data"] {
            assert_eq!(fs::metadata(root.path().join(folder)).expect("there").permissions().mode() & 0o7777, 0o755);
        }
        // What is there stays as it is.
        fs::set_permissions(root.path().join("srv"), Permissions::from_mode(0o700)).expect("ours");
        made(&root, "srv/other").expect("made");
        assert_eq!(fs::metadata(root.path().join("srv")).expect("there").permissions().mode() & 0o7777, 0o700);
        for nothing in ["", "/", "."] {
            made(&root, nothing).expect("nothing to do");
        }
    }

    #[test]
    fn links_are_walked_inside_the_root() {
        let root = root();
        symlink("/var/lib", root.path().join("absolute")).expect("made");
        symlink("var/./cache/../spool", root.path().join("relative")).expect("made");
        symlink("../../../../etc", root.path().join("out")).expect("made");
        made(&root, "/absolute/app").expect("made");
        made(&root, "/relative/app").expect("made");
        made(&root, "/out/app/../../../../up").expect("made");
        for folder in ["var/lib/app", "var/cache", "var/spool/app", "etc/app", "up"] {
            assert!(is_dir(&root, folder), "{folder}");
        }
    }

    #[test]
    fn what_cannot_be_a_folder_is_an_error() {
        let root = root();
        fs::write(root.path().join("file"), "").expect("written");
        symlink("loop", root.path().join("loop")).expect("made");
        let errno = |path: &str| made(&root, path).expect_err("impossible").raw_os_error();
        assert_eq!(errno("/file"), Some(libc::ENOTDIR));
        assert_eq!(errno("/file/app"), Some(libc::ENOTDIR));
        assert_eq!(errno("/loop/app"), Some(libc::ELOOP));
        assert_eq!(errno(&format!("/{}", "x".repeat(300))), Some(libc::ENAMETOOLONG));
    }
}
