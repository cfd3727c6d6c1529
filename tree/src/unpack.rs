//! From an archive to a folder, or a file.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::io::BufReader;
use std::io::Read;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::AtFlags;
use rustix::fs::Mode;
use rustix::fs::OFlags;
use rustix::io::Errno;

use crate::error::UnpackError;
use crate::pax::Time;
use crate::place;
use crate::place::Missing;
use crate::place::Name;
use crate::place::permissions;
use crate::reader::Entry;
use crate::reader::Kind;
use crate::reader::Piece;
use crate::reader::Reader;
use crate::reader::Rules;
use crate::stat::timestamps;

/// How much of the archive is read at once, in bytes (64 KiB).
const PIECE: usize = 64 << 10;

/// What the names of folders whose mode and time are still to be set may take, in bytes (64 MiB).
const MAX_FOLDER_NAMES: u64 = 64 << 20;

/// The archives of [`pack`](crate::pack()) and of any other program: 64 KiB are several names of the greatest length, and
/// programs write up to three extensions. Whoever sends an archive sends its end mark too.
const RULES: Rules = Rules {
    extension_bytes: 64 << 10,
    global_bytes: 64 << 10,
    extensions: 16,
    sparse_runs: 1 << 20,
    needs_end_mark: true,
};

/// What an archive may hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnpackOptions {
    /// Entries, at most.
    pub max_entries: u64,
    /// Bytes in all files together, with the holes in them, at most.
    pub max_bytes: u64,
    /// Whether to keep setuid, setgid and sticky bits, and to create device nodes and fifos. Otherwise the bits are cleared, and the
    /// nodes left out and counted.
    pub special: bool,
}

impl UnpackOptions {
    /// For the inside of a guest: everything, without limits of number and size. Modes of device nodes and fifos are subject to the
    /// process's umask.
    #[must_use]
    pub const fn guest() -> Self {
        Self { max_entries: u64::MAX, max_bytes: u64::MAX, special: true }
    }

    /// For the host: a million entries, 64 GiB, and nothing that could be of use to somebody else on the machine.
    #[must_use]
    pub const fn host() -> Self {
        Self { max_entries: 1_000_000, max_bytes: 64 << 30, special: false }
    }
}

/// What was unpacked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Unpacked {
    /// Entries, with those that were left out.
    pub entries: u64,
    /// Bytes in all files together, with the holes in them.
    pub bytes: u64,
    /// Device nodes and fifos that were left out.
    pub skipped: u64,
}

/// Unpacks `archive` into `folder`, which is made, with the folders above it, if it is missing.
///
/// An existing folder that the archive has too is kept and filled; anything else in the place of an entry is replaced. Owners are not
/// applied. What follows the archive's end mark is not looked at, though some of it may have been read.
///
/// # Errors
/// [`UnpackError`]; what had been unpacked before it stays.
pub fn unpack_into(archive: impl Read, folder: &Path, options: &UnpackOptions) -> Result<Unpacked, UnpackError> {
    let mut reader = Reader::new(BufReader::with_capacity(PIECE, archive), RULES);
    let first = reader.next_entry()?;
    unpack_all(reader, first, folder, options)
}

/// Unpacks what [`pack`](crate::pack()) made of one path, as `path`.
///
/// The first entry decides. If it is a folder, this is [`unpack_into`], and the entry `.` is `path` itself. Otherwise it must be the only
/// one, and becomes the file `path`, whatever its name: at once, in the place of an existing file, and only when the archive is whole.
///
/// # Errors
/// [`UnpackError`]; of a folder, what had been unpacked before it stays.
pub fn unpack_as(archive: impl Read, path: &Path, options: &UnpackOptions) -> Result<Unpacked, UnpackError> {
    let mut reader = Reader::new(BufReader::with_capacity(PIECE, archive), RULES);
    match reader.next_entry()? {
        None => Err(UnpackError::malformed("no entry")),
        Some(entry) if entry.kind == Kind::Folder => unpack_all(reader, Some(entry), path, options),
        Some(entry) => unpack_file(reader, entry, path, options),
    }
}

fn unpack_all<R: Read>(
    reader: Reader<R>,
    first: Option<Entry>,
    folder: &Path,
    options: &UnpackOptions,
) -> Result<Unpacked, UnpackError> {
    let mut unpacker = Unpacker::new(reader, folder, options)?;
    let mut next = first;
    while let Some(entry) = next {
        unpacker.entry(&entry)?;
        next = unpacker.reader.next_entry()?;
    }
    unpacker.finish_folders()?;
    Ok(unpacker.done)
}

/// The file is unpacked under a temporary name beside `path`, in a walk of one component like any other entry.
fn unpack_file<R: Read>(
    reader: Reader<R>,
    mut entry: Entry,
    path: &Path,
    options: &UnpackOptions,
) -> Result<Unpacked, UnpackError> {
    let at_path = |source: io::Error| UnpackError::Io { name: path.to_owned(), source };
    let name = path.file_name().ok_or_else(|| at_path(Errno::ISDIR.into()))?;
    if matches!(entry.kind, Kind::HardLink(_)) {
        return Err(UnpackError::malformed("a hard link to nothing"));
    }
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut unpacker = Unpacker::new(reader, parent, options)?;
    let temporary = free_name(unpacker.root.as_fd()).map_err(|error| at_path(error.into()))?;
    entry.name = temporary.clone();
    let unpacked = unpacker.entry(&entry).and_then(|()| {
        if unpacker.reader.next_entry()?.is_some() {
            return Err(UnpackError::malformed("more than the one file"));
        }
        if unpacker.done.skipped == 0 {
            let root = &unpacker.root;
            rustix::fs::renameat(root, &temporary[..], root, name.as_bytes()).map_err(|error| at_path(error.into()))?;
        }
        Ok(unpacker.done)
    });
    if unpacked.is_err() {
        // It may not have been made at all; the error that counts is the first.
        let _ = rustix::fs::unlinkat(&unpacker.root, &temporary[..], AtFlags::empty());
    }
    unpacked.map_err(|error| match error {
        UnpackError::Io { source, .. } => at_path(source),
        other => other,
    })
}

/// A name that nothing in `folder` has.
fn free_name(folder: BorrowedFd<'_>) -> rustix::io::Result<Vec<u8>> {
    for attempt in 0_u64.. {
        let name = format!(".kiln-new-{}-{attempt}", std::process::id()).into_bytes();
        match rustix::fs::statat(folder, &name[..], AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => return Ok(name),
            Err(error) => return Err(error),
            Ok(_) => {}
        }
    }
    Err(Errno::EXIST)
}

/// A folder's mode and time are set when it is complete: filling it changes the one and may need another of the other.
#[derive(Clone, Copy, Debug)]
struct FolderEnd {
    mode: u32,
    mtime: Time,
}

struct Unpacker<'a, R> {
    reader: Reader<R>,
    root: OwnedFd,
    options: &'a UnpackOptions,
    folders: BTreeMap<Vec<u8>, FolderEnd>,
    /// Bytes of the names in `folders`.
    folder_names: u64,
    buffer: Box<[u8]>,
    done: Unpacked,
}

impl<'a, R: Read> Unpacker<'a, R> {
    fn new(reader: Reader<R>, folder: &Path, options: &'a UnpackOptions) -> Result<Self, UnpackError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let open = || Ok(rustix::fs::open(folder, flags, Mode::empty())?);
        let root = std::fs::create_dir_all(folder).and_then(|()| open());
        let root = root.map_err(|source| UnpackError::Io { name: folder.to_owned(), source })?;
        let buffer = vec![0; PIECE].into_boxed_slice();
        let (folders, folder_names, done) = (BTreeMap::new(), 0, Unpacked::default());
        Ok(Self { reader, root, options, folders, folder_names, buffer, done })
    }

    fn entry(&mut self, entry: &Entry) -> Result<(), UnpackError> {
        if self.done.entries >= self.options.max_entries {
            return Err(UnpackError::Limit { what: "entries", limit: self.options.max_entries });
        }
        self.done.entries += 1;
        let name = Name::new(&entry.name)?;
        if entry.kind == Kind::Folder {
            return self.folder(&name, entry);
        }
        let (parents, last) = name.split()?;
        if !self.options.special && matches!(entry.kind, Kind::Fifo | Kind::Char { .. } | Kind::Block { .. }) {
            self.done.skipped += 1;
            return Ok(());
        }
        let parent = place::walk(self.root.as_fd(), parents, Missing::Make, &name)?;
        let at = Spot { parent: parent.as_fd(), last, name: &name };
        match &entry.kind {
            Kind::Folder => Ok(()),
            Kind::File { size } => self.file(&at, *size, entry),
            Kind::Symlink(target) => symlink(&at, target, entry.mtime),
            Kind::HardLink(target) => self.hard_link(&at, target),
            Kind::Fifo => at.node(Node::Fifo, entry),
            &Kind::Char { major, minor } => at.node(Node::Char(major, minor), entry),
            &Kind::Block { major, minor } => at.node(Node::Block(major, minor), entry),
        }
    }

    fn folder(&mut self, name: &Name<'_>, entry: &Entry) -> Result<(), UnpackError> {
        if let Ok((parents, last)) = name.split() {
            let parent = place::walk(self.root.as_fd(), parents, Missing::Make, name)?;
            place::ensure_folder(parent.as_fd(), last).map_err(|error| name.error(error))?;
        }
        let key = name.key();
        self.folder_names += key.len() as u64;
        if self.folder_names > MAX_FOLDER_NAMES {
            return Err(UnpackError::Limit { what: "bytes in the names of all folders", limit: MAX_FOLDER_NAMES });
        }
        self.folders.insert(key, FolderEnd { mode: self.mode(entry), mtime: entry.mtime });
        Ok(())
    }

    fn mode(&self, entry: &Entry) -> u32 {
        if self.options.special { entry.mode } else { entry.mode & 0o777 }
    }

    fn file(&mut self, at: &Spot<'_>, size: u64, entry: &Entry) -> Result<(), UnpackError> {
        let total = self.done.bytes.checked_add(size).filter(|total| *total <= self.options.max_bytes);
        let total = total.ok_or(UnpackError::Limit { what: "bytes", limit: self.options.max_bytes })?;
        at.clear()?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let private = Mode::RUSR | Mode::WUSR;
        let file = rustix::fs::openat(at.parent, at.last, flags, private).map_err(|error| at.name.error(error))?;
        let file = File::from(file);
        self.fill(&file, size, at.name)?;
        rustix::fs::fchmod(&file, permissions(self.mode(entry)))
            .and_then(|()| rustix::fs::futimens(&file, &timestamps(entry.mtime)))
            .map_err(|error| at.name.error(error))?;
        self.done.bytes = total;
        Ok(())
    }

    /// Writes the content of the current entry, and leaves out its holes.
    fn fill(&mut self, file: &File, size: u64, name: &Name<'_>) -> Result<(), UnpackError> {
        let mut position = 0;
        let mut is_hole = false;
        loop {
            match self.reader.read_piece(&mut self.buffer)? {
                Piece::Data(count) => {
                    file.write_all_at(&self.buffer[..count], position).map_err(|error| name.error(error))?;
                    position += count as u64;
                    is_hole = false;
                }
                Piece::Hole(length) => {
                    position += length;
                    is_hole = true;
                }
                Piece::End if is_hole => return file.set_len(size).map_err(|error| name.error(error)),
                Piece::End => return Ok(()),
            }
        }
    }

    fn hard_link(&self, at: &Spot<'_>, target: &[u8]) -> Result<(), UnpackError> {
        let target = Name::new(target)?;
        let (parents, last) = target.split()?;
        if target.components() == at.name.components() {
            return Err(UnpackError::malformed("a hard link to itself"));
        }
        let parent = place::walk(self.root.as_fd(), parents, Missing::Refuse, &target)?;
        at.clear()?;
        // Without AT_SYMLINK_FOLLOW a link to a symbolic link is a second name of that link.
        rustix::fs::linkat(&parent, last, at.parent, at.last, AtFlags::empty()).map_err(|error| at.name.error(error))
    }

    /// Sets modes and times, in the reverse order of names: what is in a folder comes before the folder itself.
    fn finish_folders(&mut self) -> Result<(), UnpackError> {
        while let Some((key, end)) = self.folders.pop_last() {
            let whole = if key.is_empty() { b"." } else { &key[..] };
            let name = Name::new(whole)?;
            let folder = match place::walk(self.root.as_fd(), name.components(), Missing::Refuse, &name) {
                Ok(folder) => folder,
                // A later entry has taken its place.
                Err(UnpackError::Escape { .. }) => continue,
                Err(UnpackError::Io { source, .. }) if replaced(&source) => continue,
                Err(error) => return Err(error),
            };
            rustix::fs::fchmod(&folder, permissions(end.mode))
                .and_then(|()| rustix::fs::futimens(&folder, &timestamps(end.mtime)))
                .map_err(|error| name.error(error))?;
        }
        Ok(())
    }
}

fn replaced(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

/// Where an entry that is no folder goes.
struct Spot<'a> {
    parent: BorrowedFd<'a>,
    last: &'a [u8],
    name: &'a Name<'a>,
}

#[cfg_attr(target_vendor = "apple", allow(dead_code, reason = "it makes none"))]
enum Node {
    Fifo,
    Char(u32, u32),
    Block(u32, u32),
}

impl Spot<'_> {
    fn clear(&self) -> Result<(), UnpackError> {
        place::clear(self.parent, self.last).map_err(|error| self.name.error(error))
    }

    fn set_time(&self, mtime: Time) -> Result<(), UnpackError> {
        rustix::fs::utimensat(self.parent, self.last, &timestamps(mtime), AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|error| self.name.error(error))
    }

    fn node(&self, node: Node, entry: &Entry) -> Result<(), UnpackError> {
        self.clear()?;
        make_node(self.parent, self.last, &node, entry.mode).map_err(|error| self.name.error(error))?;
        self.set_time(entry.mtime)
    }
}

fn symlink(at: &Spot<'_>, target: &[u8], mtime: Time) -> Result<(), UnpackError> {
    at.clear()?;
    rustix::fs::symlinkat(target, at.parent, at.last).map_err(|error| at.name.error(error))?;
    at.set_time(mtime)
}

#[cfg(not(target_vendor = "apple"))]
fn make_node(parent: BorrowedFd<'_>, last: &[u8], node: &Node, mode: u32) -> rustix::io::Result<()> {
    use rustix::fs::FileType;
    use rustix::fs::makedev;
    let (kind, device) = match *node {
        Node::Fifo => (FileType::Fifo, 0),
        Node::Char(major, minor) => (FileType::CharacterDevice, makedev(major, minor)),
        Node::Block(major, minor) => (FileType::BlockDevice, makedev(major, minor)),
    };
    rustix::fs::mknodat(parent, last, kind, permissions(mode), device)
}

/// That system has no `mknodat` before version 13.
#[cfg(target_vendor = "apple")]
fn make_node(_: BorrowedFd<'_>, _: &[u8], _: &Node, _: u32) -> rustix::io::Result<()> {
    Err(Errno::NOTSUP)
}
