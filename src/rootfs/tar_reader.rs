//! Reading hostile tar archives: POSIX ustar and pax, GNU long names, v7.
//!
//! The header's fields are the `tar` crate's; the walk from entry to entry is not, because that
//! crate reads extension records of any size into memory and splits pax records at newlines, which
//! breaks binary attributes such as `security.capability`.
//!
//! Refused, rather than read wrongly: sparse files and volume labels.

use std::io;
use std::io::Read;

use tar::EntryType;
use tar::Header;

use crate::rootfs::error::LayerErrorKind;
use crate::rootfs::limits::MAX_EXTENSION;
use crate::rootfs::pax::PaxRecords;
use crate::rootfs::tree::Meta;
use crate::rootfs::tree::Time;

const BLOCK: usize = 512;

/// What an entry is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum EntryKind {
    File { size: u64 },
    Folder,
    Symlink(Vec<u8>),
    HardLink(Vec<u8>),
    Char { major: u32, minor: u32 },
    Block { major: u32, minor: u32 },
    Fifo,
}

/// An entry's header and the extension records before it, joined.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) path: Vec<u8>,
    pub(super) kind: EntryKind,
    pub(super) meta: Meta,
}

/// Walks an archive. The content of an entry may be read, in part or not at all, before the next.
#[derive(Debug)]
pub(super) struct TarReader<R> {
    input: R,
    /// Content of the current entry not yet read, in bytes.
    content: u64,
    /// Padding after it, to the next block.
    padding: u64,
}

#[derive(Default)]
struct Extensions {
    pax: PaxRecords,
    long_name: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
}

impl<R: Read> TarReader<R> {
    pub(super) const fn new(input: R) -> Self {
        Self { input, content: 0, padding: 0 }
    }

    /// The next entry, `None` at the end of the archive.
    pub(super) fn next_entry(&mut self) -> Result<Option<Entry>, LayerErrorKind> {
        let mut extensions = Extensions::default();
        while let Some(header) = self.next_header()? {
            match header.entry_type() {
                EntryType::XHeader => extensions.pax = PaxRecords::parse(&self.extension(&header)?)?,
                EntryType::GNULongName => extensions.long_name = Some(until_nul(self.extension(&header)?)),
                EntryType::GNULongLink => extensions.long_link = Some(until_nul(self.extension(&header)?)),
                // Comments and defaults for the archive as a whole; Docker ignores them as well.
                EntryType::XGlobalHeader => {
                    let size = content_size(&header)?;
                    self.begin_content(size)?;
                }
                kind => return self.entry(&header, kind, extensions).map(Some),
            }
        }
        Ok(None)
    }

    /// The content of the current entry.
    pub(super) const fn content(&mut self) -> Content<'_, R> {
        Content { reader: self }
    }

    /// Reads what follows the end of the archive, so that all of it has passed through `input`.
    pub(super) fn drain(mut self) -> Result<R, LayerErrorKind> {
        io::copy(&mut self.input, &mut io::sink()).map_err(read_error)?;
        Ok(self.input)
    }

    fn entry(&mut self, header: &Header, kind: EntryType, extensions: Extensions) -> Result<Entry, LayerErrorKind> {
        let Extensions { mut pax, long_name, long_link } = extensions;
        if pax.is_sparse {
            return Err(LayerErrorKind::Unsupported("a sparse file"));
        }
        let path = pax.path.take().or(long_name).unwrap_or_else(|| header.path_bytes().into_owned());
        let link = pax.link_path.take().or(long_link);
        let link = || link.or_else(|| header.link_name_bytes().map(std::borrow::Cow::into_owned)).unwrap_or_default();
        let size = match pax.size {
            Some(size) => size,
            None => content_size(header)?,
        };
        let mut content = 0;
        let kind = match kind {
            // Archives from before POSIX mark a folder by its name alone.
            EntryType::Regular if path.ends_with(b"/") => EntryKind::Folder,
            EntryType::Regular | EntryType::Continuous => {
                content = size;
                EntryKind::File { size }
            }
            EntryType::Directory => EntryKind::Folder,
            EntryType::Symlink => EntryKind::Symlink(link()),
            EntryType::Link => EntryKind::HardLink(link()),
            EntryType::Char => device(header).map(|(major, minor)| EntryKind::Char { major, minor })?,
            EntryType::Block => device(header).map(|(major, minor)| EntryKind::Block { major, minor })?,
            EntryType::Fifo => EntryKind::Fifo,
            EntryType::GNUSparse => return Err(LayerErrorKind::Unsupported("a sparse file")),
            _ => return Err(LayerErrorKind::Unsupported("this type of archive entry")),
        };
        // Some writers state a size for entries that have no content; POSIX says it means nothing
        // for links, and for a folder it is an allocation hint.
        self.begin_content(content)?;
        Ok(Entry { path, kind, meta: meta(header, pax)? })
    }

    /// Skips to the next header; `None` at the end mark or where the archive just stops after an
    /// entry, as some writers leave it.
    fn next_header(&mut self) -> Result<Option<Header>, LayerErrorKind> {
        self.skip_content()?;
        let mut header = Header::new_old();
        let got = read_full(&mut self.input, header.as_mut_bytes())?;
        if got == 0 || header.as_bytes().iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        if got < BLOCK {
            return Err(LayerErrorKind::Truncated);
        }
        if header.cksum().ok() != Some(checksum(header.as_bytes())) {
            return Err(LayerErrorKind::Malformed("header checksum"));
        }
        Ok(Some(header))
    }

    fn begin_content(&mut self, size: u64) -> Result<(), LayerErrorKind> {
        let end = size.checked_next_multiple_of(BLOCK as u64).ok_or(LayerErrorKind::Malformed("entry size"))?;
        self.content = size;
        self.padding = end - size;
        Ok(())
    }

    fn skip_content(&mut self) -> Result<(), LayerErrorKind> {
        let length = self.content.checked_add(self.padding).ok_or(LayerErrorKind::Malformed("entry size"))?;
        (self.content, self.padding) = (0, 0);
        let skipped = io::copy(&mut self.input.by_ref().take(length), &mut io::sink()).map_err(read_error)?;
        if skipped < length { Err(LayerErrorKind::Truncated) } else { Ok(()) }
    }

    fn extension(&mut self, header: &Header) -> Result<Vec<u8>, LayerErrorKind> {
        let size = content_size(header)?;
        if size > MAX_EXTENSION {
            return Err(LayerErrorKind::Limit { what: "bytes in an extension record", limit: MAX_EXTENSION });
        }
        self.begin_content(size)?;
        let mut bytes = Vec::new();
        self.content().read_to_end(&mut bytes).map_err(read_error)?;
        Ok(bytes)
    }
}

/// The content of one entry; ends with `UnexpectedEof` if the archive does before the entry.
#[derive(Debug)]
pub(super) struct Content<'a, R> {
    reader: &'a mut TarReader<R>,
}

impl<R: Read> Read for Content<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let limit = usize::try_from(self.reader.content).unwrap_or(usize::MAX).min(buffer.len());
        if limit == 0 {
            return Ok(0);
        }
        let count = self.reader.input.read(&mut buffer[..limit])?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.reader.content -= count as u64;
        Ok(count)
    }
}

/// An error of reading the archive, sorted into early end and the rest.
pub(super) fn read_error(error: io::Error) -> LayerErrorKind {
    // The limit on decompressed bytes travels through the decoders as an i/o error.
    match error.downcast::<LayerErrorKind>() {
        Ok(kind) => kind,
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => LayerErrorKind::Truncated,
        Err(error) => LayerErrorKind::Read(error),
    }
}

/// A number as parsed from its field; a field left blank is 0, as in archives from Go programs.
fn number<T: Default>(value: io::Result<T>, field: &[u8]) -> Result<T, LayerErrorKind> {
    if field.iter().all(|byte| matches!(byte, 0 | b' ')) {
        return Ok(T::default());
    }
    value.map_err(|_| LayerErrorKind::Malformed("number in a header"))
}

fn content_size(header: &Header) -> Result<u64, LayerErrorKind> {
    number(header.entry_size(), &header.as_old().size)
}

fn meta(header: &Header, pax: PaxRecords) -> Result<Meta, LayerErrorKind> {
    let old = header.as_old();
    let id = |value: u64| u32::try_from(value).map_err(|_| LayerErrorKind::Malformed("owner beyond 32 bits"));
    let uid = pax.uid.map_or_else(|| number(header.uid(), &old.uid), Ok)?;
    let gid = pax.gid.map_or_else(|| number(header.gid(), &old.gid), Ok)?;
    let seconds = || number(header.mtime(), &old.mtime).map(|seconds| Time { seconds: seconds.cast_signed(), nanoseconds: 0 });
    Ok(Meta {
        mode: (number(header.mode(), &old.mode)? & 0o7777) as u16,
        uid: id(uid)?,
        gid: id(gid)?,
        mtime: pax.mtime.map_or_else(seconds, Ok)?,
        xattrs: pax.xattrs,
    })
}

/// Device numbers that the kernel's 32-bit encoding can hold (12 bits major, 20 minor).
fn device(header: &Header) -> Result<(u32, u32), LayerErrorKind> {
    match (header.device_major(), header.device_minor()) {
        (Ok(Some(major)), Ok(Some(minor))) if major < 1 << 12 && minor < 1 << 20 => Ok((major, minor)),
        _ => Err(LayerErrorKind::Malformed("device number")),
    }
}

/// The sum of a header's bytes with its checksum field as spaces (POSIX pax, "ustar Interchange
/// Format").
fn checksum(header: &[u8]) -> u32 {
    let field = 148..156;
    header.iter().enumerate().map(|(at, byte)| if field.contains(&at) { 32 } else { u32::from(*byte) }).sum()
}

fn until_nul(mut bytes: Vec<u8>) -> Vec<u8> {
    if let Some(end) = bytes.iter().position(|byte| *byte == 0) {
        bytes.truncate(end);
    }
    bytes
}

/// Reads until `buffer` is full or the input ends; returns how much.
fn read_full(input: &mut impl Read, buffer: &mut [u8]) -> Result<usize, LayerErrorKind> {
    let mut filled = 0;
    while filled < buffer.len() {
        match input.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(read_error(error)),
        }
    }
    Ok(filled)
}
