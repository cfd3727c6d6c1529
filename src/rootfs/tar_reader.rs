//! The archives of layers, as [`kiln_tree::reader`] reads them, with the metadata and errors of an image.

use std::io;
use std::io::Read;

use kiln_tree::ArchiveError;
use kiln_tree::reader;
use kiln_tree::reader::Reader;
use kiln_tree::reader::Rules;

use crate::rootfs::error::LayerErrorKind;
use crate::rootfs::limits::MAX_EXTENSION;
use crate::rootfs::limits::MAX_SPARSE_RUNS;
use crate::rootfs::pax::PaxRecords;
use crate::rootfs::tree::Meta;

pub(super) use kiln_tree::reader::Kind as EntryKind;
pub(super) use kiln_tree::reader::Piece;

/// Any layer that Docker applies is applied: what an archive takes to read is bounded by
/// [`Limits::archive_bytes`](crate::rootfs::Limits::archive_bytes), and whether it is whole is for its digest to say.
const RULES: Rules = Rules {
    extension_bytes: MAX_EXTENSION,
    global_bytes: u64::MAX,
    extensions: usize::MAX,
    sparse_runs: MAX_SPARSE_RUNS,
    needs_end_mark: false,
};

/// An entry of a layer.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) path: Vec<u8>,
    pub(super) kind: EntryKind,
    pub(super) meta: Meta,
}

/// Walks an archive. The content of an entry may be read, in part or not at all, before the next.
#[derive(Debug)]
pub(super) struct TarReader<R> {
    reader: Reader<R>,
}

impl<R: Read> TarReader<R> {
    pub(super) const fn new(input: R) -> Self {
        Self { reader: Reader::new(input, RULES) }
    }

    /// The next entry, `None` at the end of the archive.
    pub(super) fn next_entry(&mut self) -> Result<Option<Entry>, LayerErrorKind> {
        let mut pax = Ok(PaxRecords::default());
        let entry = self.reader.next_entry_with(|header| {
            // One that is bad stays bad, whatever follows it.
            if pax.is_ok() {
                pax = PaxRecords::parse(header);
            }
        });
        // It came before whatever stopped the reader.
        let pax = pax?;
        let entry = entry.map_err(LayerErrorKind::of_archive)?;
        entry.map(|entry| joined(entry, pax)).transpose()
    }

    /// The content of the current entry.
    pub(super) const fn content(&mut self) -> Content<'_, R> {
        Content { reader: &mut self.reader }
    }

    /// Reads what follows the end of the archive, so that all of it has passed through `input`.
    pub(super) fn drain(self) -> Result<R, LayerErrorKind> {
        self.reader.drain().map_err(LayerErrorKind::of_archive)
    }
}

fn joined(entry: reader::Entry, pax: PaxRecords) -> Result<Entry, LayerErrorKind> {
    let reader::Entry { name: path, kind, mode, header_uid, header_gid, mtime } = entry;
    let meta = Meta {
        mode: mode as u16, // of which the reader leaves 12 bits
        uid: owner(pax.uid.or(header_uid))?,
        gid: owner(pax.gid.or(header_gid))?,
        mtime,
        xattrs: pax.xattrs,
    };
    Ok(Entry { path, kind, meta })
}

fn owner(id: Option<u64>) -> Result<u32, LayerErrorKind> {
    let id = id.ok_or(LayerErrorKind::Malformed("number in a header"))?;
    u32::try_from(id).map_err(|_| LayerErrorKind::Malformed("owner beyond 32 bits"))
}

/// The content of one entry; as a [`Read`] with zeros for holes, and ends with `UnexpectedEof` if the archive does before the entry.
#[derive(Debug)]
pub(super) struct Content<'a, R> {
    reader: &'a mut Reader<R>,
}

impl<R: Read> Content<'_, R> {
    /// What comes next: data, or a hole in whole.
    pub(super) fn piece(&mut self, buffer: &mut [u8]) -> Result<Piece, LayerErrorKind> {
        self.reader.read_piece(buffer).map_err(LayerErrorKind::of_archive)
    }
}

impl<R: Read> Read for Content<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.reader.read_content(buffer).map_err(|error| match error {
            ArchiveError::Read(error) => error,
            ArchiveError::Truncated => io::ErrorKind::UnexpectedEof.into(),
            other => io::Error::other(LayerErrorKind::of_archive(other)),
        })
    }
}

impl LayerErrorKind {
    pub(super) fn of_archive(error: ArchiveError) -> Self {
        match error {
            ArchiveError::Read(error) => read_error(error),
            ArchiveError::Truncated => Self::Truncated,
            ArchiveError::Malformed(what) => Self::Malformed(what),
            ArchiveError::Sparse(_) => Self::Unsupported("a sparse file of an unknown format"),
            ArchiveError::UnknownType(_) => Self::Unsupported("this type of archive entry"),
            ArchiveError::Limit { what, limit } => Self::Limit { what, limit },
        }
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
