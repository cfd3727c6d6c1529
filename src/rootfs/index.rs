//! The index of a converted layer: its archive's entries in order, without the long contents.
//!
//! ```text
//! "kilnidx" 1, diff id        what this is, and of which layer
//! length (u32), entry         again and again; entries are in postcard's form
//! entries, archive, content   totals: a u64 each, see `Totals`
//! sha256                      of all before it
//! ```
//!
//! An entry is what the archive said and no more: whether its name is acceptable, and what it does to the tree, is
//! decided each time it is applied. A damaged file is noticed by its checksum before the first entry is taken from it. One
//! that somebody made up, with a checksum that is right, cannot do more than a made-up archive could: lengths are bounded,
//! fields are checked, and extents lie inside the content.

use std::fs::File;
use std::io;
use std::io::BufReader;
use std::io::BufWriter;
use std::io::Read;
use std::io::Seek;
use std::io::SeekFrom;
use std::io::Write;

use kiln_tree::pax::Time;
use serde::Deserialize;
use serde::Serialize;
use sha2::Digest as _;
use sha2::Sha256;

use crate::image::Digest;
use crate::rootfs::erofs::BLOCK;
use crate::rootfs::erofs::INLINE_MAX;
use crate::rootfs::limits::MAX_XATTR_BYTES;
use crate::rootfs::tree::Meta;
use crate::rootfs::tree::Xattr;

/// What the file starts with; the last byte is the version of the format.
const MAGIC: [u8; 8] = *b"kilnidx\x01";

const HEADER: u64 = 8 + 32;
const TOTALS: u64 = 24;
const CHECKSUM: u64 = 32;

/// Longest entry, in bytes: a name, a link target and all attributes, each as long as an archive can make it.
const MAX_ENTRY: u32 = 4 << 20;

const BUFFER: usize = 256 << 10;

/// An entry of a layer's archive, with its content stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    /// As the archive has it: nothing about it has been checked.
    pub(super) path: Vec<u8>,
    pub(super) kind: EntryKind,
    pub(super) meta: Meta,
}

/// What an entry is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum EntryKind {
    File(Stored),
    Folder,
    /// Targets are as the archive has them.
    Symlink(Vec<u8>),
    HardLink(Vec<u8>),
    Char {
        major: u32,
        minor: u32,
    },
    Block {
        major: u32,
        minor: u32,
    },
    Fifo,
}

/// Where a file's bytes are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Stored {
    /// Here; at most [`INLINE_MAX`].
    Inline(Box<[u8]>),
    /// In the layer's content, from a block on.
    Blocks { start: u32, size: u64 },
}

/// What a layer amounts to, for limits over all layers of an image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Totals {
    pub(super) entries: u64,
    /// Length of the archive, in bytes.
    pub(super) archive_bytes: u64,
    /// Length of the content.
    pub(super) content_blocks: u32,
}

/// An entry as it is in the file.
#[derive(Serialize, Deserialize)]
struct Record<'a> {
    #[serde(borrow)]
    path: &'a serde_bytes::Bytes,
    #[serde(borrow)]
    kind: RecordKind<'a>,
    mode: u16,
    uid: u32,
    gid: u32,
    seconds: i64,
    nanoseconds: u32,
    #[serde(borrow)]
    xattrs: Vec<RecordXattr<'a>>,
}

#[derive(Serialize, Deserialize)]
enum RecordKind<'a> {
    Inline(#[serde(borrow)] &'a serde_bytes::Bytes),
    Blocks { start: u32, size: u64 },
    Folder,
    Symlink(#[serde(borrow)] &'a serde_bytes::Bytes),
    HardLink(#[serde(borrow)] &'a serde_bytes::Bytes),
    Char { major: u32, minor: u32 },
    Block { major: u32, minor: u32 },
    Fifo,
}

#[derive(Serialize, Deserialize)]
struct RecordXattr<'a> {
    index: u8,
    #[serde(borrow)]
    suffix: &'a serde_bytes::Bytes,
    #[serde(borrow)]
    value: &'a serde_bytes::Bytes,
}

impl<'a> Record<'a> {
    fn of(entry: &'a Entry) -> Self {
        let Meta { mode, uid, gid, mtime, xattrs } = &entry.meta;
        let xattr = |xattr: &'a Xattr| RecordXattr {
            index: xattr.index,
            suffix: serde_bytes::Bytes::new(&xattr.suffix),
            value: serde_bytes::Bytes::new(&xattr.value),
        };
        Self {
            path: serde_bytes::Bytes::new(&entry.path),
            kind: match &entry.kind {
                EntryKind::File(Stored::Inline(bytes)) => RecordKind::Inline(serde_bytes::Bytes::new(bytes)),
                EntryKind::File(Stored::Blocks { start, size }) => RecordKind::Blocks { start: *start, size: *size },
                EntryKind::Folder => RecordKind::Folder,
                EntryKind::Symlink(target) => RecordKind::Symlink(serde_bytes::Bytes::new(target)),
                EntryKind::HardLink(target) => RecordKind::HardLink(serde_bytes::Bytes::new(target)),
                EntryKind::Char { major, minor } => RecordKind::Char { major: *major, minor: *minor },
                EntryKind::Block { major, minor } => RecordKind::Block { major: *major, minor: *minor },
                EntryKind::Fifo => RecordKind::Fifo,
            },
            mode: *mode,
            uid: *uid,
            gid: *gid,
            seconds: mtime.seconds,
            nanoseconds: mtime.nanoseconds,
            xattrs: xattrs.iter().map(xattr).collect(),
        }
    }

    /// `None` if a field says what no archive can.
    fn into_entry(self, content_blocks: u32) -> Option<Entry> {
        let is_time = self.nanoseconds < 1_000_000_000;
        if !is_time || self.mode > 0o7777 {
            return None;
        }
        let mtime = Time { seconds: self.seconds, nanoseconds: self.nanoseconds };
        let meta = Meta { mode: self.mode, uid: self.uid, gid: self.gid, mtime, xattrs: xattrs(&self.xattrs)? };
        Some(Entry { path: self.path.to_vec(), kind: self.kind.into_kind(content_blocks)?, meta })
    }
}

impl RecordKind<'_> {
    fn into_kind(self, content_blocks: u32) -> Option<EntryKind> {
        let is_device = |major, minor| major < 1 << 12 && minor < 1 << 20;
        Some(match self {
            Self::Inline(bytes) if bytes.len() <= INLINE_MAX => EntryKind::File(Stored::Inline(bytes.to_vec().into())),
            Self::Blocks { start, size } => {
                let end = u64::from(start) + size.div_ceil(BLOCK as u64);
                (size > INLINE_MAX as u64 && end <= u64::from(content_blocks)).then_some(())?;
                EntryKind::File(Stored::Blocks { start, size })
            }
            Self::Folder => EntryKind::Folder,
            Self::Symlink(target) => EntryKind::Symlink(target.to_vec()),
            Self::HardLink(target) => EntryKind::HardLink(target.to_vec()),
            Self::Char { major, minor } if is_device(major, minor) => EntryKind::Char { major, minor },
            Self::Block { major, minor } if is_device(major, minor) => EntryKind::Block { major, minor },
            Self::Fifo => EntryKind::Fifo,
            Self::Inline(_) | Self::Char { .. } | Self::Block { .. } => return None,
        })
    }
}

/// Attributes sorted by name, each once, that an inode can hold.
fn xattrs(records: &[RecordXattr<'_>]) -> Option<Vec<Xattr>> {
    let read = |record: &RecordXattr<'_>| Xattr::from_parts(record.index, record.suffix, record.value);
    let xattrs = records.iter().map(read).collect::<Option<Vec<_>>>()?;
    let is_sorted = xattrs.is_sorted_by(|one, next| one.cmp_name(next).is_lt());
    let size: usize = xattrs.iter().map(Xattr::stored_size).sum();
    (is_sorted && size <= MAX_XATTR_BYTES).then_some(xattrs)
}

/// Writes an index, entry by entry.
#[derive(Debug)]
pub(super) struct IndexWriter<W: Write> {
    out: BufWriter<W>,
    hasher: Sha256,
    /// The entry being written, with its length.
    entry: Vec<u8>,
    entries: u64,
}

impl<W: Write> IndexWriter<W> {
    pub(super) fn new(out: W, diff_id: &Digest) -> io::Result<Self> {
        let out = BufWriter::with_capacity(BUFFER, out);
        let mut writer = Self { out, hasher: Sha256::new(), entry: Vec::new(), entries: 0 };
        writer.put(&MAGIC)?;
        writer.put(diff_id.as_bytes())?;
        Ok(writer)
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.hasher.update(bytes);
        self.out.write_all(bytes)
    }

    pub(super) fn push(&mut self, entry: &Entry) -> io::Result<()> {
        let mut bytes = std::mem::take(&mut self.entry);
        bytes.clear();
        bytes.extend_from_slice(&[0; 4]);
        postcard::to_io(&Record::of(entry), &mut bytes).map_err(io::Error::other)?;
        let length = u32::try_from(bytes.len() - 4).ok().filter(|length| *length <= MAX_ENTRY);
        let length = length.ok_or_else(|| io::Error::other("an entry longer than an archive can make it"))?;
        bytes[..4].copy_from_slice(&length.to_le_bytes());
        self.put(&bytes)?;
        self.entry = bytes;
        self.entries += 1;
        Ok(())
    }

    /// Completes the file; the number of entries is known here.
    pub(super) fn finish(mut self, archive_bytes: u64, content_blocks: u32) -> io::Result<()> {
        for total in [self.entries, archive_bytes, u64::from(content_blocks)] {
            self.put(&total.to_le_bytes())?;
        }
        let Self { mut out, hasher, .. } = self;
        out.write_all(&hasher.finalize())?;
        out.flush()
    }
}

/// Why an index gives no more entries.
#[derive(Debug, thiserror::Error)]
pub(super) enum IndexError {
    #[error("i/o")]
    Io(#[from] io::Error),
    /// It is to be made anew.
    #[error("damaged")]
    Damaged,
}

/// An index whose checksum was right when it was opened.
#[derive(Debug)]
pub(super) struct Index<R = File> {
    input: BufReader<R>,
    totals: Totals,
    /// Length of all entries, and of those still to come, in bytes.
    length: u64,
    left: u64,
    entry: Vec<u8>,
}

impl<R: Read + Seek> Index<R> {
    /// Reads all of `input` once, to check it. Blocking.
    pub(super) fn open(input: R, diff_id: &Digest) -> Result<Self, IndexError> {
        let mut input = BufReader::with_capacity(BUFFER, input);
        let whole = input.seek(SeekFrom::End(0))?;
        input.rewind()?;
        let length = whole.checked_sub(HEADER + TOTALS + CHECKSUM).ok_or(IndexError::Damaged)?;
        let mut hasher = Sha256::new();
        let header: [u8; HEADER as usize] = hashed(&mut input, &mut hasher)?;
        if header[..8] != MAGIC || header[8..] != *diff_id.as_bytes() {
            return Err(IndexError::Damaged);
        }
        let hashed_length = io::copy(&mut input.by_ref().take(length), &mut HashInto(&mut hasher))?;
        let totals: [u8; TOTALS as usize] = hashed(&mut input, &mut hasher)?;
        let checksum: [u8; CHECKSUM as usize] = hashed(&mut input, &mut Sha256::new())?;
        if hashed_length != length || checksum != *hasher.finalize() {
            return Err(IndexError::Damaged);
        }
        let total = |at: usize| totals[at..at + 8].iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte));
        let content_blocks = u32::try_from(total(16)).map_err(|_| IndexError::Damaged)?;
        let totals = Totals { entries: total(0), archive_bytes: total(8), content_blocks };
        let mut index = Self { input, totals, length, left: 0, entry: Vec::new() };
        index.rewind()?;
        Ok(index)
    }

    pub(super) const fn totals(&self) -> Totals {
        self.totals
    }

    /// Goes back to the first entry: an image may have the same layer twice.
    pub(super) fn rewind(&mut self) -> io::Result<()> {
        self.input.seek(SeekFrom::Start(HEADER))?;
        self.left = self.length;
        Ok(())
    }

    /// The next entry, `None` after the last.
    pub(super) fn next_entry(&mut self) -> Result<Option<Entry>, IndexError> {
        if self.left == 0 {
            return Ok(None);
        }
        let mut length = [0; 4];
        self.read(&mut length)?;
        let length = u32::from_le_bytes(length);
        if length > MAX_ENTRY || u64::from(length) > self.left {
            return Err(IndexError::Damaged);
        }
        let mut entry = std::mem::take(&mut self.entry);
        entry.resize(length as usize, 0);
        self.read(&mut entry)?;
        self.entry = entry;
        let record = postcard::from_bytes::<Record<'_>>(&self.entry).ok();
        record.and_then(|record| record.into_entry(self.totals.content_blocks)).ok_or(IndexError::Damaged).map(Some)
    }

    fn read(&mut self, bytes: &mut [u8]) -> Result<(), IndexError> {
        self.left = self.left.checked_sub(bytes.len() as u64).ok_or(IndexError::Damaged)?;
        read_exact(&mut self.input, bytes)
    }
}

fn hashed<const N: usize>(input: &mut impl Read, hasher: &mut Sha256) -> Result<[u8; N], IndexError> {
    let mut bytes = [0; N];
    read_exact(input, &mut bytes)?;
    hasher.update(bytes);
    Ok(bytes)
}

fn read_exact(input: &mut impl Read, bytes: &mut [u8]) -> Result<(), IndexError> {
    input.read_exact(bytes).map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => IndexError::Damaged,
        _ => IndexError::Io(error),
    })
}

struct HashInto<'a>(&'a mut Sha256);

impl Write for HashInto<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use proptest::prelude::*;

    use super::*;

    fn kind() -> impl Strategy<Value = EntryKind> {
        let bytes = || proptest::collection::vec(any::<u8>(), 0..60);
        prop_oneof![
            proptest::collection::vec(any::<u8>(), 0..=INLINE_MAX)
                .prop_map(|bytes| EntryKind::File(Stored::Inline(bytes.into()))),
            (0..100_u32, 1025..9000_u64).prop_map(|(start, size)| EntryKind::File(Stored::Blocks { start, size })),
            Just(EntryKind::Folder),
            bytes().prop_map(EntryKind::Symlink),
            bytes().prop_map(EntryKind::HardLink),
            (0..1_u32 << 12, 0..1_u32 << 20).prop_map(|(major, minor)| EntryKind::Char { major, minor }),
            (0..1_u32 << 12, 0..1_u32 << 20).prop_map(|(major, minor)| EntryKind::Block { major, minor }),
            Just(EntryKind::Fifo),
        ]
    }

    fn entry() -> impl Strategy<Value = Entry> {
        let xattr = (b'a'..=b'z', proptest::collection::vec(any::<u8>(), 0..20))
            .prop_map(|(name, value)| Xattr::new(&[b"user.", &[name][..]].concat(), &value).unwrap());
        let xattrs = proptest::collection::vec(xattr, 0..4).prop_map(|mut xattrs| {
            xattrs.sort_by(Xattr::cmp_name);
            xattrs.dedup_by(|one, other| one.cmp_name(other).is_eq());
            xattrs
        });
        let path = proptest::collection::vec(any::<u8>(), 0..60);
        (path, kind(), 0..=0o7777_u16, any::<u32>(), any::<i64>(), 0..1_000_000_000_u32, xattrs).prop_map(
            |(path, kind, mode, uid, seconds, nanoseconds, xattrs)| {
                let mtime = Time { seconds, nanoseconds };
                Entry { path, kind, meta: Meta { mode, uid, gid: !uid, mtime, xattrs } }
            },
        )
    }

    fn written(entries: &[Entry]) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut writer = IndexWriter::new(&mut bytes, &Digest::of(b"layer")).unwrap();
        entries.iter().for_each(|entry| writer.push(entry).unwrap());
        writer.finish(77, 200).unwrap();
        bytes
    }

    fn opened(bytes: Vec<u8>) -> Result<Index<Cursor<Vec<u8>>>, IndexError> {
        Index::open(Cursor::new(bytes), &Digest::of(b"layer"))
    }

    fn all(index: &mut Index<Cursor<Vec<u8>>>) -> Result<Vec<Entry>, IndexError> {
        std::iter::from_fn(|| index.next_entry().transpose()).collect()
    }

    #[test]
    fn another_layers_index_is_no_use() {
        let bytes = written(&[]);
        assert!(opened(bytes.clone()).is_ok());
        assert!(matches!(Index::open(Cursor::new(bytes), &Digest::of(b"other")), Err(IndexError::Damaged)));
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn entries_come_back_and_again_after_rewinding(entries in proptest::collection::vec(entry(), 0..20)) {
            let mut index = opened(written(&entries)).unwrap();
            let totals = Totals { entries: entries.len() as u64, archive_bytes: 77, content_blocks: 200 };
            prop_assert_eq!(index.totals(), totals);
            prop_assert_eq!(&all(&mut index).unwrap(), &entries);
            index.rewind().unwrap();
            prop_assert_eq!(all(&mut index).unwrap(), entries);
        }

        #[test]
        fn any_changed_byte_and_any_cut_is_noticed(
            entries in proptest::collection::vec(entry(), 0..5), at in any::<prop::sample::Index>(), change in 1..=255_u8,
        ) {
            let mut bytes = written(&entries);
            let at = at.index(bytes.len());
            let cut = bytes[..at].to_vec();
            prop_assert!(matches!(opened(cut), Err(IndexError::Damaged)));
            bytes[at] ^= change;
            prop_assert!(matches!(opened(bytes), Err(IndexError::Damaged)));
        }

        /// Forgery: the checksum is right and the rest may be anything.
        #[test]
        fn bytes_with_a_right_checksum_are_entries_or_damage(
            entries in proptest::collection::vec(entry(), 0..5),
            changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
            noise in proptest::collection::vec(any::<u8>(), 0..200),
            only_noise in any::<bool>(),
        ) {
            let mut bytes = written(&entries);
            let (start, end) = (HEADER as usize, bytes.len() - (TOTALS + CHECKSUM) as usize);
            if only_noise {
                bytes.splice(start..end, noise);
            } else if end > start {
                for (at, byte) in changes {
                    bytes[start + at.index(end - start)] = byte;
                }
            }
            let signed = bytes.len() - CHECKSUM as usize;
            let checksum = Digest::of(&bytes[..signed]);
            bytes[signed..].copy_from_slice(checksum.as_bytes());
            if let Ok(entries) = all(&mut opened(bytes).unwrap()) {
                for entry in entries {
                    if let EntryKind::File(Stored::Blocks { start, size }) = entry.kind {
                        prop_assert!(u64::from(start) + size.div_ceil(4096) <= 200);
                    }
                }
            }
        }
    }
}
