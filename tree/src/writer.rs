//! The archive that [`crate::pack()`] writes: ustar headers, and a pax header before those that do not say everything.

use std::io;
use std::io::BufWriter;
use std::io::Write;

use tar::EntryType;
use tar::Header;

use crate::pax::Time;
use crate::pax::push_record;

pub(crate) const BLOCK: u64 = 512;

/// How much is collected before it is written, in bytes (64 KiB: a pipe).
const BUFFER: usize = 64 << 10;

/// The largest size that a header has in octal, which every reader understands.
const MAX_OCTAL_SIZE: u64 = (1 << 33) - 1;

/// What a header says.
#[derive(Debug)]
pub(crate) struct Entry<'a> {
    pub(crate) name: &'a [u8],
    pub(crate) kind: EntryType,
    /// Target of a symbolic or hard link, else empty.
    pub(crate) link: &'a [u8],
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) size: u64,
    pub(crate) mtime: Time,
    pub(crate) device: (u32, u32),
}

#[derive(Debug)]
pub(crate) struct Writer<W: Write> {
    out: BufWriter<W>,
}

impl<W: Write> Writer<W> {
    pub(crate) fn new(out: W) -> Self {
        Self { out: BufWriter::with_capacity(BUFFER, out) }
    }

    /// Writes an entry's headers; its content, if it has any, and [`Writer::pad`] follow.
    pub(crate) fn begin(&mut self, entry: &Entry<'_>) -> io::Result<()> {
        let records = records(entry);
        if !records.is_empty() {
            let size = records.len() as u64;
            let mut header = Header::new_ustar();
            header.as_old_mut().name[..14].copy_from_slice(b"././@PaxHeader");
            header.set_entry_type(EntryType::XHeader);
            header.set_mode(0o644);
            header.set_size(size);
            self.header(header)?;
            self.content(&records)?;
            self.pad(size)?;
        }
        self.header(entry_header(entry)?)
    }

    pub(crate) fn content(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.out.write_all(bytes)
    }

    pub(crate) fn zeros(&mut self, count: u64) -> io::Result<()> {
        io::copy(&mut io::Read::take(io::repeat(0), count), &mut self.out).map(|_| ())
    }

    /// Fills the last block of a content of `size` bytes.
    pub(crate) fn pad(&mut self, size: u64) -> io::Result<()> {
        self.zeros(size.wrapping_neg() % BLOCK)
    }

    /// Writes the end mark, and all that is still in the buffer.
    pub(crate) fn finish(mut self) -> io::Result<()> {
        self.zeros(2 * BLOCK)?;
        self.out.flush()
    }

    fn header(&mut self, mut header: Header) -> io::Result<()> {
        header.set_cksum();
        self.out.write_all(header.as_bytes())
    }
}

/// What does not fit the header's own fields.
fn records(entry: &Entry<'_>) -> Vec<u8> {
    let fields = Header::new_ustar();
    let fields = fields.as_old();
    let mut records = Vec::new();
    let texts = [("path", entry.name, fields.name.len()), ("linkpath", entry.link, fields.linkname.len())];
    let long = || texts.iter().filter(|(_, text, room)| text.len() > *room);
    if long().any(|(_, text, _)| std::str::from_utf8(text).is_err()) {
        // Records are UTF-8 unless they say otherwise.
        push_record(&mut records, "hdrcharset", b"BINARY");
    }
    for (key, text, _) in long() {
        push_record(&mut records, key, text);
    }
    if entry.size > MAX_OCTAL_SIZE {
        push_record(&mut records, "size", entry.size.to_string().as_bytes());
    }
    if entry.mtime.nanoseconds > 0 || entry.mtime.seconds < 0 {
        push_record(&mut records, "mtime", entry.mtime.to_string().as_bytes());
    }
    records
}

fn entry_header(entry: &Entry<'_>) -> io::Result<Header> {
    let mut header = Header::new_ustar();
    // A long text is cut here and whole in the pax header.
    copy_cut(&mut header.as_old_mut().name, entry.name);
    copy_cut(&mut header.as_old_mut().linkname, entry.link);
    header.set_entry_type(entry.kind);
    header.set_mode(entry.mode);
    header.set_uid(u64::from(entry.uid));
    header.set_gid(u64::from(entry.gid));
    header.set_size(entry.size);
    header.set_mtime(u64::try_from(entry.mtime.seconds).unwrap_or(0));
    header.set_device_major(entry.device.0)?;
    header.set_device_minor(entry.device.1)?;
    Ok(header)
}

fn copy_cut(field: &mut [u8], text: &[u8]) {
    for (to, from) in field.iter_mut().zip(text) {
        *to = *from;
    }
}
