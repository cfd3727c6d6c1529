//! From a folder, or a file, to an archive.
//!
//! The tree may change meanwhile. What vanishes is left out; of a file that grows, what was there when it was opened is
//! packed; one that shrinks is filled up with zeros, so that the archive stays whole, and reported at the end.

use std::collections::HashMap;
use std::ffi::CString;
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::io::Read;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::path::PathBuf;

use rustix::fs::AtFlags;
use rustix::fs::CWD;
use rustix::fs::Dir;
use rustix::fs::FileType;
use rustix::fs::Mode;
use rustix::fs::OFlags;
use rustix::io::Errno;
use tar::EntryType;

use crate::MAX_DEPTH;
use crate::error::PackError;
use crate::stat::Stat;
use crate::writer::Entry;
use crate::writer::Writer;

/// How much of a file is read at once, in bytes (64 KiB).
const PIECE: usize = 64 << 10;

/// Packs the file or folder at `path` into a POSIX pax archive.
///
/// A folder becomes the entry `.` and, sorted, everything below it. Anything else becomes one entry, named `name` or by
/// the path's last component. Symbolic links are packed as links, `path` itself included; names of the same file as hard
/// links; sockets not at all. Of `/proc` and `/sys`, wherever they are mounted below `path`, there is an empty folder: what the kernel makes up
/// while it is read means nothing elsewhere.
///
/// # Errors
/// [`PackError`]; with [`PackError::Changed`] the archive is complete, with any other it has no end mark, so that nobody
/// takes it for complete.
pub fn pack(path: &Path, name: Option<&OsStr>, out: impl Write) -> Result<(), PackError> {
    let mut packer = Packer {
        writer: Writer::new(out),
        root: path,
        linked: HashMap::new(),
        buffer: vec![0; PIECE].into_boxed_slice(),
        changed: None,
    };
    let read = |source: Errno| PackError::Read { path: path.to_owned(), source: source.into() };
    let stat = Stat::from(rustix::fs::statat(CWD, path, AtFlags::SYMLINK_NOFOLLOW).map_err(read)?);
    match stat.kind {
        FileType::Directory => packer.tree(open_folder(CWD, path).map_err(read)?)?,
        FileType::Socket => {
            let source = io::Error::new(io::ErrorKind::Unsupported, "a socket cannot be packed");
            return Err(PackError::Read { path: path.to_owned(), source });
        }
        _ => {
            let name = name.or(path.file_name()).unwrap_or(path.as_os_str());
            packer.leaf(Leaf { folder: CWD, at: path, name: name.as_bytes(), path }, stat)?;
        }
    }
    packer.finish()
}

struct Packer<'a, W: Write> {
    writer: Writer<W>,
    root: &'a Path,
    /// The first name of each file that has several.
    linked: HashMap<(u64, u64), Vec<u8>>,
    buffer: Box<[u8]>,
    changed: Option<PathBuf>,
}

/// Something that is no folder: where it is, its name in the archive, and its path for messages.
struct Leaf<'a> {
    folder: BorrowedFd<'a>,
    at: &'a Path,
    name: &'a [u8],
    path: &'a Path,
}

/// A folder whose entries are being packed.
struct Open {
    folder: OwnedFd,
    names: std::vec::IntoIter<CString>,
    /// Length of the folder's own name, with a slash if it has one.
    prefix: usize,
}

impl<W: Write> Packer<'_, W> {
    fn tree(&mut self, root: OwnedFd) -> Result<(), PackError> {
        let mut name = Vec::new();
        let mut open = vec![self.enter(root, b".", 0)?];
        loop {
            let depth = open.len();
            let Some(current) = open.last_mut() else { return Ok(()) };
            let Some(next) = current.names.next() else {
                open.pop();
                continue;
            };
            name.truncate(current.prefix);
            name.extend_from_slice(next.to_bytes());
            let at = Path::new(OsStr::from_bytes(next.to_bytes()));
            let path = self.root.join(OsStr::from_bytes(&name));
            let folder = current.folder.as_fd();
            let Some(stat) = self.stat(folder, at, &path)? else { continue };
            match stat.kind {
                FileType::Directory if depth >= MAX_DEPTH => return Err(PackError::TooDeep { path }),
                FileType::Directory => match open_folder(folder, at) {
                    Ok(folder) => {
                        let inner = self.enter(folder, &name, name.len() + 1)?;
                        open.push(inner);
                        name.push(b'/');
                    }
                    // Gone, or something else by now.
                    Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => {}
                    Err(error) => return Err(PackError::Read { path, source: error.into() }),
                },
                _ => self.leaf(Leaf { folder, at, name: &name, path: &path }, stat)?,
            }
        }
    }

    fn stat(&self, folder: BorrowedFd<'_>, at: &Path, path: &Path) -> Result<Option<Stat>, PackError> {
        match rustix::fs::statat(folder, at, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(stat.into())),
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(PackError::Read { path: path.to_owned(), source: error.into() }),
        }
    }

    /// Writes a folder's entry and lists what is in it.
    fn enter(&mut self, folder: OwnedFd, name: &[u8], prefix: usize) -> Result<Open, PackError> {
        let below = prefix > 0;
        let listed = rustix::fs::fstat(&folder).and_then(|stat| {
            let names = if below && is_made_up(folder.as_fd())? { Vec::new() } else { list(folder.as_fd())? };
            Ok((Stat::from(stat), names))
        });
        let (stat, names) = listed
            .map_err(|error| PackError::Read { path: self.root.join(OsStr::from_bytes(name)), source: error.into() })?;
        self.begin(name, EntryType::Directory, &[], 0, &stat)?;
        Ok(Open { folder, names: names.into_iter(), prefix })
    }

    fn begin(&mut self, name: &[u8], kind: EntryType, link: &[u8], size: u64, stat: &Stat) -> Result<(), PackError> {
        let Stat { mode, uid, gid, mtime, device, .. } = *stat;
        let device = if matches!(kind, EntryType::Char | EntryType::Block) { device } else { (0, 0) };
        let entry = Entry { name, kind, link, mode, uid, gid, size, mtime, device };
        self.writer.begin(&entry).map_err(PackError::Write)
    }

    fn leaf(&mut self, leaf: Leaf<'_>, stat: Stat) -> Result<(), PackError> {
        let first = stat.shared.and_then(|shared| self.linked.get(&shared).cloned());
        if let Some(first) = first {
            return self.begin(leaf.name, EntryType::Link, &first, 0, &stat);
        }
        let packed = match stat.kind {
            FileType::RegularFile => self.file(&leaf)?,
            FileType::Symlink => self.symlink(&leaf, &stat)?,
            FileType::Fifo => self.node(&leaf, EntryType::Fifo, &stat)?,
            FileType::CharacterDevice => self.node(&leaf, EntryType::Char, &stat)?,
            FileType::BlockDevice => self.node(&leaf, EntryType::Block, &stat)?,
            // A socket means nothing without the process that listens on it.
            _ => false,
        };
        if let Some(shared) = stat.shared.filter(|_| packed) {
            self.linked.insert(shared, leaf.name.to_vec());
        }
        Ok(())
    }

    fn node(&mut self, leaf: &Leaf<'_>, kind: EntryType, stat: &Stat) -> Result<bool, PackError> {
        self.begin(leaf.name, kind, &[], 0, stat).map(|()| true)
    }

    fn symlink(&mut self, leaf: &Leaf<'_>, stat: &Stat) -> Result<bool, PackError> {
        match rustix::fs::readlinkat(leaf.folder, leaf.at, Vec::new()) {
            Ok(target) => self.begin(leaf.name, EntryType::Symlink, target.to_bytes(), 0, stat).map(|()| true),
            Err(error) => leaf.vanished(error),
        }
    }

    fn file(&mut self, leaf: &Leaf<'_>) -> Result<bool, PackError> {
        // Should a fifo have taken the file's place, opening it must not wait for a writer.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let mut file = match rustix::fs::openat(leaf.folder, leaf.at, flags, Mode::empty()) {
            Ok(file) => File::from(file),
            Err(error) => return leaf.vanished(error),
        };
        let stat = Stat::from(rustix::fs::fstat(&file).map_err(|error| leaf.error(error.into()))?);
        if stat.kind != FileType::RegularFile {
            self.changed.get_or_insert_with(|| leaf.path.to_owned());
            return Ok(false);
        }
        self.begin(leaf.name, EntryType::Regular, &[], stat.size, &stat)?;
        let missing = self.content(&mut file, stat.size, leaf)?;
        if missing > 0 {
            self.changed.get_or_insert_with(|| leaf.path.to_owned());
        }
        self.writer.zeros(missing).and_then(|()| self.writer.pad(stat.size)).map_err(PackError::Write)?;
        Ok(true)
    }

    /// Copies `size` bytes; returns how many of them the file no longer has.
    fn content(&mut self, file: &mut File, size: u64, leaf: &Leaf<'_>) -> Result<u64, PackError> {
        let mut left = size;
        while left > 0 {
            let wanted = usize::try_from(left).unwrap_or(usize::MAX).min(self.buffer.len());
            match file.read(&mut self.buffer[..wanted]) {
                Ok(0) => break,
                Ok(count) => {
                    self.writer.content(&self.buffer[..count]).map_err(PackError::Write)?;
                    left -= count as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(leaf.error(error)),
            }
        }
        Ok(left)
    }

    fn finish(self) -> Result<(), PackError> {
        self.writer.finish().map_err(PackError::Write)?;
        self.changed.map_or(Ok(()), |path| Err(PackError::Changed { path }))
    }
}

impl Leaf<'_> {
    fn error(&self, source: io::Error) -> PackError {
        PackError::Read { path: self.path.to_owned(), source }
    }

    /// Of a tree, what is gone is not there; a path that was asked for by name is missed.
    fn vanished(&self, error: Errno) -> Result<bool, PackError> {
        if error == Errno::NOENT && self.at != self.path { Ok(false) } else { Err(self.error(error.into())) }
    }
}

fn open_folder(folder: BorrowedFd<'_>, at: &Path) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(folder, at, flags, Mode::empty())
}

/// Whether the kernel makes up what a folder has in it.
#[cfg(target_os = "linux")]
fn is_made_up(folder: BorrowedFd<'_>) -> rustix::io::Result<bool> {
    const SYSFS_MAGIC: rustix::fs::FsWord = 0x6265_6572;
    Ok(matches!(rustix::fs::fstatfs(folder)?.f_type, rustix::fs::PROC_SUPER_MAGIC | SYSFS_MAGIC))
}

/// Whether the kernel makes up what a folder has in it.
#[cfg(not(target_os = "linux"))]
fn is_made_up(_folder: BorrowedFd<'_>) -> rustix::io::Result<bool> {
    Ok(false)
}

/// The names in a folder, sorted, so that the same tree makes the same archive.
fn list(folder: BorrowedFd<'_>) -> rustix::io::Result<Vec<CString>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(folder)? {
        let name = entry?.file_name().to_owned();
        if !matches!(name.to_bytes(), b"." | b"..") {
            names.push(name);
        }
    }
    names.sort_unstable();
    Ok(names)
}
