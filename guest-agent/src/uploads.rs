//! Files that arrive in pieces, one CONTROL action each (`write_file_chunk`).
//!
//! The host may never send the rest, so only so many are kept; the oldest makes room for the newest.

use std::collections::VecDeque;
use std::path::Path;

use crate::files;
use crate::files::LARGEST_CHUNK;
use crate::files::Replacement;
use crate::refusal::Refusal;

/// Unfinished uploads, at most.
const MAX_UPLOADS: usize = 64;

/// The unfinished uploads, oldest first.
#[derive(Debug, Default)]
pub(crate) struct Uploads {
    unfinished: VecDeque<Upload>,
}

#[derive(Debug)]
struct Upload {
    path: String,
    token: String,
    replacement: Replacement,
    /// Bytes that have arrived.
    length: u64,
}

/// One piece.
#[derive(Debug)]
pub(crate) struct Chunk {
    pub(crate) path: String,
    pub(crate) token: String,
    pub(crate) offset: u64,
    pub(crate) data_b64: String,
    pub(crate) last: bool,
    pub(crate) mode: Option<u32>,
}

impl Uploads {
    /// Adds a piece. A failed write ends its upload and removes what had arrived; a piece that is refused for what it says changes nothing.
    pub(crate) fn add(&mut self, chunk: Chunk) -> Result<(), Refusal> {
        let Chunk { path, token, offset, data_b64, last, mode } = chunk;
        let data = files::decode(&data_b64)?;
        if data.len() as u64 > LARGEST_CHUNK {
            return Err(Refusal::new(format!("{path}: a piece of more than {LARGEST_CHUNK} bytes")));
        }
        let mut upload = self.take(path, token, offset)?;
        let system = |path: &str, error| Refusal::system(path, &error);
        upload.replacement.write(&data).map_err(|error| system(&upload.path, error))?;
        upload.length += data.len() as u64;
        if last {
            return upload.replacement.finish(mode).map_err(|error| system(&upload.path, error));
        }
        self.unfinished.push_back(upload);
        if self.unfinished.len() > MAX_UPLOADS {
            self.unfinished.pop_front();
        }
        Ok(())
    }

    /// Takes the upload out that a piece at `offset` continues, or begins it.
    fn take(&mut self, path: String, token: String, offset: u64) -> Result<Upload, Refusal> {
        let known = self.unfinished.iter().position(|upload| upload.path == path);
        let next = known.and_then(|at| self.unfinished.get(at)).filter(|upload| upload.token == token);
        let next = next.map_or(0, |upload| upload.length);
        if offset != 0 && offset != next {
            return Err(Refusal::new(format!("{path}: offset {offset} instead of {next}")));
        }
        let known = known.and_then(|at| self.unfinished.remove(at));
        match known {
            Some(upload) if offset == next && upload.token == token => Ok(upload),
            // The old one's bytes go before the new one's come: there may not be room for both.
            old => {
                drop(old);
                let replacement = Replacement::new(Path::new(&path)).map_err(|error| Refusal::system(&path, &error))?;
                Ok(Upload { path, token, replacement, length: 0 })
            }
        }
    }
}
