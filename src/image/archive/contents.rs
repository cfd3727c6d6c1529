//! The files of an archive, by name and by digest, until it is known which of them are needed.
//!
//! Entries come in any order, and what they are for is said by a document that may be the last. So every file is kept:
//! a short one in memory, others spooled to disk.

use std::collections::HashMap;
use std::collections::hash_map;
use std::io::Read;

use kiln_tree::reader::Entry;
use kiln_tree::reader::Kind;
use kiln_tree::reader::Piece;
use kiln_tree::reader::Reader;
use kiln_tree::reader::Rules;
use sha2::Digest as _;
use sha2::Sha256;

use crate::image::archive::error::ImportError;
use crate::image::archive::names;
use crate::image::archive::spool::Spool;
use crate::image::archive::spool::SpoolWriter;
use crate::image::archive::spool::Spooled;
use crate::image::compression::Compression;
use crate::image::digest::Digest;
use crate::image::progress::Progress;
use crate::image::progress::ProgressEvent;
use crate::image::store::ImageStore;

/// Image archives have short names and few extensions; what is in one is held in memory.
const RULES: Rules = Rules {
    extension_bytes: 64 << 10,
    global_bytes: 1 << 20,
    extensions: 16,
    sparse_runs: 1 << 16,
    needs_end_mark: true,
};

/// Longest name and longest link target, in bytes. Those that mean something have less than two hundred.
const MAX_NAME: usize = 512;

/// How many links are followed. Docker writes links to files, never to links.
const MAX_LINKS: usize = 16;

/// Files up to this length are held in memory, in bytes: it has room for any usual document.
const SMALL: u64 = 64 << 10;

/// All files in memory together, in bytes; more are spooled.
const MEMORY: u64 = 16 << 20;

/// Spooled files; each holds a descriptor. An image may have as many layers, and none has half of that.
const MAX_SPOOLED: u64 = 512;

/// Read at a time, in bytes.
const CHUNK: usize = 128 << 10;

/// Where layout and newer Docker archives have their blobs.
const BLOBS: &str = "blobs/sha256/";

/// What an archive may have, and whom to tell.
#[derive(Clone, Debug)]
pub(super) struct Limits {
    pub(super) entries: u64,
    pub(super) progress: Progress,
}

/// All files of an archive.
#[derive(Debug)]
pub(super) struct Contents {
    spool: Spool,
    names: HashMap<String, Named>,
    files: HashMap<Digest, Held>,
    memory_left: u64,
    spooled_left: u64,
}

/// What a name stands for.
#[derive(Debug)]
enum Named {
    File(Digest),
    /// To this name; `None` leads out of the archive.
    Link(Option<String>),
}

/// A file: what is known of it without its content.
#[derive(Clone, Copy, Debug)]
pub(super) struct Summary {
    pub(super) digest: Digest,
    pub(super) size: u64,
    pub(super) compression: Compression,
}

#[derive(Debug)]
struct Held {
    summary: Summary,
    content: Content,
}

#[derive(Debug)]
enum Content {
    Memory(Vec<u8>),
    Spooled(Spooled),
    /// It is in the store by now.
    Stored,
}

impl Contents {
    pub(super) fn new(store: &ImageStore) -> Self {
        Self {
            spool: Spool::new(store),
            names: HashMap::new(),
            files: HashMap::new(),
            memory_left: MEMORY,
            spooled_left: MAX_SPOOLED,
        }
    }

    /// Reads the archive to its end. Blocking.
    pub(super) fn fill(&mut self, archive: impl Read, limits: &Limits) -> Result<(), ImportError> {
        let mut reader = Reader::new(archive, RULES);
        let mut last: Option<String> = None;
        let mut left = limits.entries;
        while let Some(entry) = reader.next_entry().map_err(|error| ImportError::of_archive(error, last.as_deref()))? {
            let limit = ImportError::Limit { what: "entries in the archive", limit: limits.entries };
            left = left.checked_sub(1).ok_or(limit)?;
            let shown = String::from_utf8_lossy(&entry.name[..entry.name.len().min(MAX_NAME)]).into_owned();
            self.entry(entry, &mut reader, &shown, &limits.progress)?;
            last = Some(shown);
        }
        // What follows the end mark is padding, and for a compressed archive the check of all that was before.
        reader.drain().map_err(|error| ImportError::of_archive(error, None))?;
        Ok(())
    }

    fn entry(
        &mut self,
        entry: Entry,
        reader: &mut Reader<impl Read>,
        shown: &str,
        progress: &Progress,
    ) -> Result<(), ImportError> {
        if entry.name.len() > MAX_NAME {
            return Err(ImportError::Limit { what: "bytes in a name", limit: MAX_NAME as u64 });
        }
        // No document, being JSON, can refer to a name that is not UTF-8.
        let Ok(name) = String::from_utf8(entry.name) else { return Ok(()) };
        let name = names::resolve("", &name).ok_or_else(|| ImportError::Escape { name })?;
        let target = |target: &[u8]| String::from_utf8(target.to_vec()).ok().filter(|target| target.len() <= MAX_NAME);
        let named = match entry.kind {
            Kind::File { size } => Named::File(self.file(&name, size, reader, shown, progress)?),
            Kind::Symlink(to) => {
                Named::Link(target(&to).and_then(|target| names::resolve(names::folder(&name), &target)))
            }
            Kind::HardLink(to) => Named::Link(target(&to).and_then(|target| names::resolve("", &target))),
            _ => return Ok(()),
        };
        // As for every reader of archives, the last of a name counts.
        self.names.insert(name, named);
        Ok(())
    }

    fn file(
        &mut self,
        name: &str,
        size: u64,
        reader: &mut Reader<impl Read>,
        shown: &str,
        progress: &Progress,
    ) -> Result<Digest, ImportError> {
        let promised = name.strip_prefix(BLOBS).and_then(|hex| format!("sha256:{hex}").parse::<Digest>().ok());
        let mut sink = self.sink(size)?;
        let mut hasher = Sha256::new();
        let mut start = Vec::new();
        let mut done = 0;
        let mut chunk = vec![0; CHUNK.min(usize::try_from(size).unwrap_or(CHUNK))];
        let result = loop {
            let bytes = match reader.read_piece(&mut chunk) {
                Ok(Piece::End) => break Ok(()),
                Ok(Piece::Data(count)) => &chunk[..count],
                // No blob has one, and a small archive could fill the disk with them.
                Ok(Piece::Hole(_)) => {
                    break Err(ImportError::Unsupported { entry: shown.to_owned(), what: "a sparse file" });
                }
                Err(error) => break Err(ImportError::of_archive(error, Some(shown))),
            };
            start.extend(bytes.iter().take(4_usize.saturating_sub(start.len())));
            hasher.update(bytes);
            if let Err(error) = sink.write(bytes) {
                break Err(error);
            }
            done += bytes.len() as u64;
            // A blob that is not short is a layer, as far as one can tell now.
            if let (Some(layer), true) = (promised, size > SMALL) {
                progress.send(ProgressEvent::Fetching { layer, done, total: size });
            }
        };
        let digest = Digest::from_hasher(hasher);
        let result = result.and_then(|()| match promised {
            Some(expected) if expected != digest => {
                Err(ImportError::DigestMismatch { what: name.to_owned(), expected, found: digest })
            }
            _ => Ok(()),
        });
        if let Err(error) = result {
            sink.discard();
            return Err(error);
        }
        self.hold(Summary { digest, size, compression: Compression::of(&start) }, sink);
        Ok(digest)
    }

    fn sink(&mut self, size: u64) -> Result<Sink, ImportError> {
        if size <= SMALL && size <= self.memory_left {
            return Ok(Sink::Memory(Vec::new()));
        }
        if self.spooled_left == 0 {
            return Err(ImportError::Limit { what: "large files in the archive", limit: MAX_SPOOLED });
        }
        Ok(Sink::Spool(self.spool.file()?))
    }

    /// Keeps a file, unless the same content is here already: then one of the two is enough.
    fn hold(&mut self, summary: Summary, sink: Sink) {
        let hash_map::Entry::Vacant(place) = self.files.entry(summary.digest) else { return sink.discard() };
        let content = match sink {
            Sink::Memory(bytes) => {
                self.memory_left -= summary.size;
                Content::Memory(bytes)
            }
            Sink::Spool(writer) => {
                self.spooled_left -= 1;
                Content::Spooled(writer.finish())
            }
        };
        place.insert(Held { summary, content });
    }

    /// The file that `name` stands for, through links.
    pub(super) fn find(&self, name: &str) -> Result<Option<Summary>, ImportError> {
        let escape = || ImportError::Escape { name: name.to_owned() };
        let mut at = names::resolve("", name).ok_or_else(escape)?;
        for _ in 0..=MAX_LINKS {
            match self.names.get(&at) {
                None => return Ok(None),
                Some(Named::File(digest)) => return Ok(self.summary(digest)),
                Some(Named::Link(target)) => at = target.clone().ok_or_else(escape)?,
            }
        }
        Err(ImportError::LinkLoop { name: name.to_owned(), limit: MAX_LINKS })
    }

    /// The file of this content.
    pub(super) fn summary(&self, digest: &Digest) -> Option<Summary> {
        self.files.get(digest).map(|held| held.summary)
    }

    /// Reads a document of at most `limit` bytes. Blocking.
    pub(super) fn document(&self, what: &str, digest: &Digest, limit: u64) -> Result<Vec<u8>, ImportError> {
        let missing = || ImportError::Missing { what: what.to_owned(), name: digest.to_string() };
        let held = self.files.get(digest).ok_or_else(missing)?;
        if held.summary.size > limit {
            return Err(ImportError::TooLarge { what: what.to_owned(), limit });
        }
        match &held.content {
            Content::Memory(bytes) => Ok(bytes.clone()),
            Content::Spooled(file) => file.read().map_err(ImportError::Read),
            Content::Stored => Err(missing()),
        }
    }

    /// Makes a file a blob of the store. Blocking.
    pub(super) fn store(&mut self, store: &ImageStore, digest: &Digest) -> Result<(), ImportError> {
        let Some(held) = self.files.get_mut(digest) else { return Ok(()) };
        match std::mem::replace(&mut held.content, Content::Stored) {
            Content::Memory(bytes) => store.put_small(digest, &bytes)?,
            Content::Spooled(file) => self.spool.adopt(file, digest)?,
            Content::Stored => {}
        }
        Ok(())
    }

    /// Removes what was not needed. Dropping does that as well, and closes the files somewhere else. Blocking.
    pub(super) fn discard(self) {
        for held in self.files.into_values() {
            if let Content::Spooled(file) = held.content {
                file.discard();
            }
        }
    }
}

/// Where a file goes that is being read.
enum Sink {
    Memory(Vec<u8>),
    Spool(SpoolWriter),
}

impl Sink {
    fn write(&mut self, bytes: &[u8]) -> Result<(), ImportError> {
        match self {
            Self::Memory(held) => held.extend_from_slice(bytes),
            Self::Spool(writer) => writer.write(bytes)?,
        }
        Ok(())
    }

    fn discard(self) {
        if let Self::Spool(writer) = self {
            writer.discard();
        }
    }
}
