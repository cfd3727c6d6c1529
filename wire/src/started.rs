//! The STARTED payload: `pid: u32 BE`.

use bytes::{BufMut, Bytes, BytesMut};
use thiserror::Error;

/// The process of a session runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Started {
    /// Its id in the guest, which is also that of its process group.
    pub pid: u32,
}

/// A STARTED payload that is not 4 bytes long.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("STARTED payload of {len} bytes, expected 4")]
pub struct StartedError {
    /// Its length, in bytes.
    pub len: usize,
}

impl Started {
    /// The payload's bytes.
    #[must_use]
    pub fn encode(self) -> Bytes {
        let mut payload = BytesMut::with_capacity(4);
        payload.put_u32(self.pid);
        payload.freeze()
    }

    /// Reads a payload.
    ///
    /// # Errors
    /// [`StartedError`] when it is not 4 bytes long.
    pub fn decode(payload: &[u8]) -> Result<Self, StartedError> {
        let pid = <[u8; 4]>::try_from(payload).map_err(|_| StartedError { len: payload.len() })?;
        Ok(Self { pid: u32::from_be_bytes(pid) })
    }
}
