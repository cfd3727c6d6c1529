//! Reading hostile tar archives: POSIX pax and ustar, GNU long names, v7.
//!
//! The one reader for all archives that come from outside: trees out of a guest, and the layers of an image. What its users
//! do not have in common is in [`Rules`], and in the pax records that [`Reader::next_entry_with`] shows.
//!
//! The header's fields are the `tar` crate's; the walk from entry to entry is not, because that crate reads extension
//! records of any size into memory and splits pax records at newlines, which breaks binary attributes. Refused, rather
//! than read wrongly: volume labels, and sparse files in formats that nobody had thought of yet.

use std::borrow::Cow;
use std::io;
use std::io::Read;

use tar::EntryType;
use tar::GnuExtSparseHeader;
use tar::Header;

use crate::error::ArchiveError;
use crate::pax::Records;
use crate::pax::Time;
use crate::sparse;
use crate::sparse::Next;
use crate::writer::BLOCK;

/// What an archive may ask of its reader, and what it has to have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rules {
    /// Bytes in one extension (a pax header or a GNU long name), at most; it is held in memory.
    pub extension_bytes: u64,
    /// Bytes in one global pax header, at most; it is skipped.
    pub global_bytes: u64,
    /// Extensions and global headers before one entry, at most.
    pub extensions: usize,
    /// Runs of data in one sparse file, at most; 16 bytes each are held in memory.
    pub sparse_runs: usize,
    /// Whether an archive that just stops after an entry, as some writers leave it, counts as cut short.
    pub needs_end_mark: bool,
}

/// What an entry is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A file; the only kind that has content.
    File {
        /// Length of the content, in bytes; of a sparse file with its holes, so that the archive may be far smaller.
        size: u64,
    },
    /// A folder.
    Folder,
    /// A symbolic link to this target, which may be empty.
    Symlink(Vec<u8>),
    /// Another name for the entry of this name, which may be empty.
    HardLink(Vec<u8>),
    /// A character device.
    Char {
        /// Below 2^12, as in the kernel's 32-bit encoding.
        major: u32,
        /// Below 2^20.
        minor: u32,
    },
    /// A block device.
    Block {
        /// Below 2^12, as in the kernel's 32-bit encoding.
        major: u32,
        /// Below 2^20.
        minor: u32,
    },
    /// A named pipe.
    Fifo,
}

/// An entry's header and the extensions before it, joined.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// As the archive has it: nothing about it has been checked.
    pub name: Vec<u8>,
    /// What it is.
    pub kind: Kind,
    /// Permission bits, with setuid, setgid and sticky.
    pub mode: u32,
    /// The owner in the header; `None` if that is no number, which those who do not need it do not mind. A pax record `uid`
    /// goes before it, see [`Reader::next_entry_with`].
    pub header_uid: Option<u64>,
    /// The group in the header, likewise.
    pub header_gid: Option<u64>,
    /// When it was last changed.
    pub mtime: Time,
}

/// A part of a content: see [`Reader::read_piece`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Piece {
    /// So many bytes, more than none, are in the buffer.
    Data(usize),
    /// So many zeros, more than none, which the archive does not have and the buffer neither.
    Hole(u64),
    /// The content is at its end.
    End,
}

/// Walks an archive. The content of an entry may be read, in part or not at all, before the next.
///
/// After an error the reader is of no more use: where the next header starts is not known.
#[derive(Debug)]
pub struct Reader<R> {
    input: R,
    rules: Rules,
    /// What the archive has of the current entry and was not yet read, in bytes.
    stored: u64,
    /// Padding after it, to the next block.
    padding: u64,
    /// What the stored bytes are of the current entry.
    content: sparse::Content,
}

#[derive(Default)]
struct Extensions {
    pax: Records,
    long_name: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
}

impl<R: Read> Reader<R> {
    /// Reads `input` in pieces as small as a header, so it should be buffered.
    pub const fn new(input: R, rules: Rules) -> Self {
        Self { input, rules, stored: 0, padding: 0, content: sparse::Content::empty() }
    }

    /// The next entry, `None` at the end of the archive.
    ///
    /// # Errors
    /// [`ArchiveError`].
    pub fn next_entry(&mut self) -> Result<Option<Entry>, ArchiveError> {
        self.next_entry_with(|_| {})
    }

    /// The same, and shows `see` the content of every pax header on the way, for [`pairs`](crate::pax::pairs) to take apart.
    ///
    /// The reader itself takes the name, link target, size and time, and knows sparse files. Of several headers before one
    /// entry the last counts alone.
    ///
    /// # Errors
    /// [`ArchiveError`].
    pub fn next_entry_with(&mut self, mut see: impl FnMut(&[u8])) -> Result<Option<Entry>, ArchiveError> {
        let mut extensions = Extensions::default();
        for _ in 0..=self.rules.extensions {
            let Some(header) = self.next_header()? else { return Ok(None) };
            match header.entry_type() {
                EntryType::XHeader => {
                    let content = self.extension(&header)?;
                    extensions.pax = Records::parse(&content)?;
                    see(&content);
                }
                EntryType::GNULongName => extensions.long_name = Some(until_nul(self.extension(&header)?)),
                EntryType::GNULongLink => extensions.long_link = Some(until_nul(self.extension(&header)?)),
                // Comments and defaults for the archive as a whole, which nobody writes for names and times; Docker
                // ignores them as well.
                EntryType::XGlobalHeader => self.begin_extension(&header, self.rules.global_bytes).map(drop)?,
                kind => return self.entry(&header, kind, extensions).map(Some),
            }
        }
        let limit = self.rules.extensions as u64;
        Err(ArchiveError::Limit { what: "extension records of one entry", limit })
    }

    /// Reads on in the current entry's content, with zeros for the holes of a sparse file; 0 is its end.
    ///
    /// # Errors
    /// [`ArchiveError::Read`], and [`ArchiveError::Truncated`] if the archive ends before the entry.
    pub fn read_content(&mut self, buffer: &mut [u8]) -> Result<usize, ArchiveError> {
        match self.content.next() {
            Next::End => Ok(0),
            Next::Data(length) => self.read_data(buffer, length),
            Next::Hole(length) => {
                let count = at_most(buffer, length);
                buffer[..count].fill(0);
                self.content.advance(count as u64);
                Ok(count)
            }
        }
    }

    /// The same, for those who can do better with a hole than write zeros: however long it is, it comes at once.
    ///
    /// An empty `buffer` gets no data.
    ///
    /// # Errors
    /// As [`Reader::read_content`].
    pub fn read_piece(&mut self, buffer: &mut [u8]) -> Result<Piece, ArchiveError> {
        match self.content.next() {
            Next::End => Ok(Piece::End),
            Next::Data(length) => self.read_data(buffer, length).map(Piece::Data),
            Next::Hole(length) => {
                self.content.advance(length);
                Ok(Piece::Hole(length))
            }
        }
    }

    fn read_data(&mut self, buffer: &mut [u8], length: u64) -> Result<usize, ArchiveError> {
        let wanted = at_most(buffer, length);
        if wanted == 0 {
            return Ok(0);
        }
        let count = read(&mut self.input, &mut buffer[..wanted])?;
        if count == 0 {
            return Err(ArchiveError::Truncated);
        }
        // What the map has of data is what is stored, see `Map::content`.
        self.stored -= count as u64;
        self.content.advance(count as u64);
        Ok(count)
    }

    /// Reads what follows the end of the archive, so that all of it has passed through the input, and gives that back.
    ///
    /// # Errors
    /// [`ArchiveError::Read`].
    pub fn drain(mut self) -> Result<R, ArchiveError> {
        io::copy(&mut self.input, &mut io::sink()).map_err(ArchiveError::Read)?;
        Ok(self.input)
    }

    fn entry(&mut self, header: &Header, kind: EntryType, extensions: Extensions) -> Result<Entry, ArchiveError> {
        let Extensions { mut pax, long_name, long_link } = extensions;
        let sparse_name = pax.sparse.as_mut().and_then(|sparse| sparse.name.take());
        let name = sparse_name.or(pax.path).or(long_name).unwrap_or_else(|| header.path_bytes().into_owned());
        let link = pax.link_path.or(long_link);
        let link = || link.or_else(|| header.link_name_bytes().map(Cow::into_owned)).unwrap_or_default();
        let size = pax.size.map_or_else(|| content_size(header), Ok)?;
        // Entries that are no files may state a size too, which means nothing: POSIX has no content for them.
        let kind = match kind {
            EntryType::GNUSparse => Kind::File { size: self.begin_old_sparse(header, size)? },
            // Archives from before POSIX mark a folder by its name alone.
            EntryType::Regular if name.ends_with(b"/") => Kind::Folder,
            EntryType::Regular | EntryType::Continuous => match &pax.sparse {
                Some(sparse) => Kind::File { size: self.begin_pax_sparse(sparse, size, &name)? },
                None => Kind::File { size: self.begin_whole(size)? },
            },
            EntryType::Directory => Kind::Folder,
            EntryType::Symlink => Kind::Symlink(link()),
            EntryType::Link => Kind::HardLink(link()),
            EntryType::Char => device(header).map(|(major, minor)| Kind::Char { major, minor })?,
            EntryType::Block => device(header).map(|(major, minor)| Kind::Block { major, minor })?,
            EntryType::Fifo => Kind::Fifo,
            _ => return Err(ArchiveError::UnknownType(name)),
        };
        let old = header.as_old();
        let mode = number(header.mode(), &old.mode)? & 0o7777;
        let seconds = || number(header.mtime(), &old.mtime).map(u64::cast_signed);
        let mtime = match pax.mtime {
            Some(mtime) => mtime,
            None => Time { seconds: seconds()?, nanoseconds: 0 },
        };
        let header_uid = number(header.uid(), &old.uid).ok();
        let header_gid = number(header.gid(), &old.gid).ok();
        Ok(Entry { name, kind, mode, header_uid, header_gid, mtime })
    }

    /// Begins a file that is not sparse; returns its size.
    fn begin_whole(&mut self, size: u64) -> Result<u64, ArchiveError> {
        self.begin_stored(size)?;
        self.content.begin_whole(size);
        Ok(size)
    }

    /// Begins a file in the old format, with the rest of its map before its content; returns its size.
    fn begin_old_sparse(&mut self, header: &Header, stored: u64) -> Result<u64, ArchiveError> {
        let malformed = || ArchiveError::Malformed("header of a sparse file");
        let header = header.as_gnu().ok_or_else(malformed)?;
        let size = number(header.real_size(), &header.realsize)?;
        let mut map = sparse::Map::new(self.rules.sparse_runs);
        map.push_headers(&header.sparse)?;
        let mut is_extended = header.isextended != [0];
        while is_extended {
            let mut more = GnuExtSparseHeader::new();
            if read_full(&mut self.input, more.as_mut_bytes())? < more.as_bytes().len() {
                return Err(ArchiveError::Truncated);
            }
            map.push_headers(more.sparse())?;
            is_extended = more.isextended != [0];
        }
        self.begin_stored(stored)?;
        self.content = map.content(size, stored)?;
        Ok(size)
    }

    /// Begins a file in one of the pax formats; returns its size.
    fn begin_pax_sparse(&mut self, records: &sparse::Records, stored: u64, name: &[u8]) -> Result<u64, ArchiveError> {
        let size = records.size.ok_or(ArchiveError::Malformed("sparse file without its size"))?;
        let mut map = sparse::Map::new(self.rules.sparse_runs);
        self.begin_stored(stored)?;
        match records.place() {
            sparse::Place::Records => records.fill(&mut map)?,
            sparse::Place::Content => map = self.map_in_content(map)?,
            sparse::Place::Unknown => return Err(ArchiveError::Sparse(name.to_vec())),
        }
        self.content = map.content(size, self.stored)?;
        Ok(size)
    }

    fn map_in_content(&mut self, map: sparse::Map) -> Result<sparse::Map, ArchiveError> {
        let mut lines = sparse::Lines::new(map);
        let mut is_whole = false;
        while !is_whole {
            let mut block = [0; BLOCK as usize];
            self.stored = self.stored.checked_sub(BLOCK).ok_or(ArchiveError::Malformed("map of a sparse file"))?;
            if read_full(&mut self.input, &mut block)? < block.len() {
                return Err(ArchiveError::Truncated);
            }
            is_whole = lines.push(&block)?;
        }
        Ok(lines.into_map())
    }

    /// Skips to the next header; `None` at the end.
    fn next_header(&mut self) -> Result<Option<Header>, ArchiveError> {
        self.skip_content()?;
        let mut header = Header::new_old();
        let length = read_full(&mut self.input, header.as_mut_bytes())?;
        if length == 0 && !self.rules.needs_end_mark {
            return Ok(None);
        }
        // Also one of zeros, as with Go's `archive/tar`, which is what Docker applies layers with.
        if length < header.as_bytes().len() {
            return Err(ArchiveError::Truncated);
        }
        if header.as_bytes().iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        if header.cksum().ok() != Some(checksum(header.as_bytes())) {
            return Err(ArchiveError::Malformed("header checksum"));
        }
        Ok(Some(header))
    }

    fn begin_stored(&mut self, size: u64) -> Result<(), ArchiveError> {
        let end = size.checked_next_multiple_of(BLOCK).ok_or(ArchiveError::Malformed("entry size"))?;
        (self.stored, self.padding) = (size, end - size);
        Ok(())
    }

    fn skip_content(&mut self) -> Result<(), ArchiveError> {
        // A multiple of the block's length that fits, see `begin_stored`.
        let length = self.stored + self.padding;
        // Some writers leave the last entry's padding out with the end mark, and Go's reader, which is Docker's, takes that.
        let needed = if self.rules.needs_end_mark { length } else { self.stored };
        (self.stored, self.padding) = (0, 0);
        self.content.begin_whole(0);
        let skipped = io::copy(&mut self.input.by_ref().take(length), &mut io::sink()).map_err(ArchiveError::Read)?;
        if skipped < needed { Err(ArchiveError::Truncated) } else { Ok(()) }
    }

    fn extension(&mut self, header: &Header) -> Result<Vec<u8>, ArchiveError> {
        let size = self.begin_extension(header, self.rules.extension_bytes)?;
        let mut bytes = Vec::new();
        self.input.by_ref().take(size).read_to_end(&mut bytes).map_err(ArchiveError::Read)?;
        self.stored = 0;
        if (bytes.len() as u64) < size { Err(ArchiveError::Truncated) } else { Ok(bytes) }
    }

    fn begin_extension(&mut self, header: &Header, limit: u64) -> Result<u64, ArchiveError> {
        let size = content_size(header)?;
        if size > limit {
            return Err(ArchiveError::Limit { what: "bytes in an extension record", limit });
        }
        self.begin_stored(size)?;
        Ok(size)
    }
}

fn at_most(buffer: &[u8], length: u64) -> usize {
    usize::try_from(length).unwrap_or(usize::MAX).min(buffer.len())
}

/// Reads until `buffer` is full or the input ends; returns how much.
fn read_full(input: &mut impl Read, buffer: &mut [u8]) -> Result<usize, ArchiveError> {
    let mut filled = 0;
    while filled < buffer.len() {
        match read(input, &mut buffer[filled..])? {
            0 => break,
            count => filled += count,
        }
    }
    Ok(filled)
}

fn read(input: &mut impl Read, buffer: &mut [u8]) -> Result<usize, ArchiveError> {
    loop {
        match input.read(buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result.map_err(ArchiveError::Read),
        }
    }
}

/// A number as parsed from its field; a field left blank is 0, as in archives from Go programs.
fn number<T: Default>(value: io::Result<T>, field: &[u8]) -> Result<T, ArchiveError> {
    if field.iter().all(|byte| matches!(byte, 0 | b' ')) {
        return Ok(T::default());
    }
    value.map_err(|_| ArchiveError::Malformed("number in a header"))
}

fn content_size(header: &Header) -> Result<u64, ArchiveError> {
    number(header.entry_size(), &header.as_old().size)
}

/// Device numbers that the kernel's 32-bit encoding can hold (12 bits major, 20 minor).
fn device(header: &Header) -> Result<(u32, u32), ArchiveError> {
    match (header.device_major(), header.device_minor()) {
        (Ok(Some(major)), Ok(Some(minor))) if major < 1 << 12 && minor < 1 << 20 => Ok((major, minor)),
        _ => Err(ArchiveError::Malformed("device number")),
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
