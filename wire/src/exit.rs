//! The EXIT payload: `code: u32 BE`, and, when known, `peak RSS in KiB: u64 BE`.

use bytes::{BufMut, Bytes, BytesMut};
use thiserror::Error;

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// The exit code, or 128+n for a process that signal n ended.
    pub code: u32,
    /// The largest resident set of the process, in KiB, when the agent knows it.
    pub peak_rss_kib: Option<u64>,
}

/// An EXIT payload that is neither 4 nor 12 bytes long.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("EXIT payload of {len} bytes, expected 4 or 12")]
pub struct ExitError {
    /// Its length, in bytes.
    pub len: usize,
}

impl Exit {
    /// The payload's bytes.
    #[must_use]
    pub fn encode(self) -> Bytes {
        let mut payload = BytesMut::with_capacity(12);
        payload.put_u32(self.code);
        if let Some(kib) = self.peak_rss_kib {
            payload.put_u64(kib);
        }
        payload.freeze()
    }

    /// Reads a payload.
    ///
    /// # Errors
    /// [`ExitError`] when it is neither 4 nor 12 bytes long.
    pub fn decode(payload: &[u8]) -> Result<Self, ExitError> {
        let wrong = ExitError { len: payload.len() };
        let (code, rest) = payload.split_first_chunk::<4>().ok_or(wrong)?;
        let peak_rss_kib = match <[u8; 8]>::try_from(rest) {
            Ok(kib) => Some(u64::from_be_bytes(kib)),
            Err(_) if rest.is_empty() => None,
            Err(_) => return Err(wrong),
        };
        Ok(Self { code: u32::from_be_bytes(*code), peak_rss_kib })
    }
}
