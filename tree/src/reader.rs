//! Reading hostile tar archives: POSIX pax and ustar, GNU long names, v7.
//!
//! The header's fields are the `tar` crate's; the walk from entry to entry is not, because that crate reads extension
//! records of any size into memory. Refused, rather than read wrongly: sparse files, volume labels, archives without an end mark.

use std::borrow::Cow;
use std::ffi::OsStr;
use std::io;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use tar::EntryType;
use tar::Header;

use crate::error::UnpackError;
use crate::pax::Records;
use crate::pax::Time;
use crate::writer::BLOCK;

/// The largest extension record, in bytes (64 KiB).
const MAX_EXTENSION: u64 = 64 << 10;

/// Extension records before one entry; writers use up to three.
const MAX_EXTENSIONS: usize = 16;

/// What an entry is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
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
pub(crate) struct Entry {
    pub(crate) name: Vec<u8>,
    pub(crate) kind: Kind,
    /// Permission bits, with setuid, setgid and sticky.
    pub(crate) mode: u32,
    pub(crate) mtime: Time,
}

/// A name of an archive as a path, for errors.
pub(crate) fn shown(name: &[u8]) -> PathBuf {
    PathBuf::from(OsStr::from_bytes(name))
}

/// Walks an archive. The content of an entry may be read, in part or not at all, before the next.
#[derive(Debug)]
pub(crate) struct Reader<R> {
    input: R,
    /// Content of the current entry not yet read, in bytes.
    content: u64,
    /// Padding after it, to the next block.
    padding: u64,
}

#[derive(Default)]
struct Extensions {
    pax: Records,
    long_name: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
}

impl<R: Read> Reader<R> {
    pub(crate) const fn new(input: R) -> Self {
        Self { input, content: 0, padding: 0 }
    }

    /// The next entry, `None` at the end mark.
    pub(crate) fn next_entry(&mut self) -> Result<Option<Entry>, UnpackError> {
        let mut extensions = Extensions::default();
        for _ in 0..=MAX_EXTENSIONS {
            let Some(header) = self.next_header()? else { return Ok(None) };
            match header.entry_type() {
                EntryType::XHeader => extensions.pax = Records::parse(&self.extension(&header)?)?,
                EntryType::GNULongName => extensions.long_name = Some(until_nul(self.extension(&header)?)),
                EntryType::GNULongLink => extensions.long_link = Some(until_nul(self.extension(&header)?)),
                // Comments and defaults for the archive as a whole, which nobody writes for names and times.
                EntryType::XGlobalHeader => drop(self.extension(&header)?),
                kind => return self.entry(&header, kind, extensions).map(Some),
            }
        }
        Err(UnpackError::Limit { what: "extension records of one entry", limit: MAX_EXTENSIONS as u64 })
    }

    /// Reads on in the current entry's content; 0 is its end.
    pub(crate) fn read_content(&mut self, buffer: &mut [u8]) -> Result<usize, UnpackError> {
        let wanted = usize::try_from(self.content).unwrap_or(usize::MAX).min(buffer.len());
        let count = read(&mut self.input, &mut buffer[..wanted])?;
        if count == 0 && wanted > 0 {
            return Err(UnpackError::Truncated);
        }
        self.content -= count as u64;
        Ok(count)
    }

    fn entry(&mut self, header: &Header, kind: EntryType, extensions: Extensions) -> Result<Entry, UnpackError> {
        let Extensions { pax, long_name, long_link } = extensions;
        let name = pax.path.or(long_name).unwrap_or_else(|| header.path_bytes().into_owned());
        let unsupported = |what| UnpackError::Unsupported { name: shown(&name), what };
        if pax.is_sparse {
            return Err(unsupported("a sparse file"));
        }
        let link = pax.link_path.or(long_link);
        let link = || link.or_else(|| header.link_name_bytes().map(Cow::into_owned)).unwrap_or_default();
        let size = pax.size.map_or_else(|| content_size(header), Ok)?;
        let kind = match kind {
            // Archives from before POSIX mark a folder by its name alone.
            EntryType::Regular if name.ends_with(b"/") => Kind::Folder,
            EntryType::Regular | EntryType::Continuous => Kind::File { size },
            EntryType::Directory => Kind::Folder,
            EntryType::Symlink => Kind::Symlink(link()),
            EntryType::Link => Kind::HardLink(link()),
            EntryType::Char => device(header).map(|(major, minor)| Kind::Char { major, minor })?,
            EntryType::Block => device(header).map(|(major, minor)| Kind::Block { major, minor })?,
            EntryType::Fifo => Kind::Fifo,
            EntryType::GNUSparse => return Err(unsupported("a sparse file")),
            _ => return Err(unsupported("of an unknown type")),
        };
        // Other entries may state a size too, which means nothing: POSIX has no content for them.
        self.begin_content(if let Kind::File { size } = kind { size } else { 0 })?;
        let old = header.as_old();
        let mode = number(header.mode(), &old.mode)? & 0o7777;
        let seconds = || number(header.mtime(), &old.mtime).map(u64::cast_signed);
        let mtime = match pax.mtime {
            Some(mtime) => mtime,
            None => Time { seconds: seconds()?, nanoseconds: 0 },
        };
        Ok(Entry { name, kind, mode, mtime })
    }

    /// Skips to the next header; `None` at the end mark.
    fn next_header(&mut self) -> Result<Option<Header>, UnpackError> {
        self.skip_content()?;
        let mut header = Header::new_old();
        let mut rest = &mut header.as_mut_bytes()[..];
        while !rest.is_empty() {
            match read(&mut self.input, rest)? {
                0 => return Err(UnpackError::Truncated),
                count => rest = &mut rest[count..],
            }
        }
        if header.as_bytes().iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        if header.cksum().ok() != Some(checksum(header.as_bytes())) {
            return Err(UnpackError::malformed("header checksum"));
        }
        Ok(Some(header))
    }

    fn begin_content(&mut self, size: u64) -> Result<(), UnpackError> {
        let end = size.checked_next_multiple_of(BLOCK).ok_or(UnpackError::malformed("entry size"))?;
        (self.content, self.padding) = (size, end - size);
        Ok(())
    }

    fn skip_content(&mut self) -> Result<(), UnpackError> {
        // A multiple of the block's length that fits, see `begin_content`.
        let length = self.content + self.padding;
        (self.content, self.padding) = (0, 0);
        let skipped = io::copy(&mut self.input.by_ref().take(length), &mut io::sink()).map_err(UnpackError::Read)?;
        if skipped < length { Err(UnpackError::Truncated) } else { Ok(()) }
    }

    fn extension(&mut self, header: &Header) -> Result<Vec<u8>, UnpackError> {
        let size = content_size(header)?;
        if size > MAX_EXTENSION {
            return Err(UnpackError::Limit { what: "bytes in an extension record", limit: MAX_EXTENSION });
        }
        self.begin_content(size)?;
        let mut bytes = Vec::new();
        self.input.by_ref().take(size).read_to_end(&mut bytes).map_err(UnpackError::Read)?;
        self.content = 0;
        if (bytes.len() as u64) < size { Err(UnpackError::Truncated) } else { Ok(bytes) }
    }
}

fn read(input: &mut impl Read, buffer: &mut [u8]) -> Result<usize, UnpackError> {
    loop {
        match input.read(buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result.map_err(UnpackError::Read),
        }
    }
}

/// A number as parsed from its field; a field left blank is 0, as in archives from Go programs.
fn number<T: Default>(value: io::Result<T>, field: &[u8]) -> Result<T, UnpackError> {
    if field.iter().all(|byte| matches!(byte, 0 | b' ')) {
        return Ok(T::default());
    }
    value.map_err(|_| UnpackError::malformed("number in a header"))
}

fn content_size(header: &Header) -> Result<u64, UnpackError> {
    number(header.entry_size(), &header.as_old().size)
}

/// Device numbers that the kernel's 32-bit encoding can hold (12 bits major, 20 minor).
fn device(header: &Header) -> Result<(u32, u32), UnpackError> {
    match (header.device_major(), header.device_minor()) {
        (Ok(Some(major)), Ok(Some(minor))) if major < 1 << 12 && minor < 1 << 20 => Ok((major, minor)),
        _ => Err(UnpackError::malformed("device number")),
    }
}

/// The sum of a header's bytes with its checksum field as spaces (POSIX pax, "ustar Interchange Format").
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
