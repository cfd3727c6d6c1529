//! The LOST payload: `bytes: u64 BE`.

use bytes::{BufMut, Bytes, BytesMut};
use thiserror::Error;

/// Output of the workload that the agent no longer has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lost {
    /// How many bytes, of both outputs together.
    pub bytes: u64,
}

/// A LOST payload that is not 8 bytes long.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("LOST payload of {len} bytes, expected 8")]
pub struct LostError {
    /// Its length, in bytes.
    pub len: usize,
}

impl Lost {
    /// The payload's bytes.
    #[must_use]
    pub fn encode(self) -> Bytes {
        let mut payload = BytesMut::with_capacity(8);
        payload.put_u64(self.bytes);
        payload.freeze()
    }

    /// Reads a payload.
    ///
    /// # Errors
    /// [`LostError`] when it is not 8 bytes long.
    pub fn decode(payload: &[u8]) -> Result<Self, LostError> {
        let bytes = <[u8; 8]>::try_from(payload).map_err(|_| LostError { len: payload.len() })?;
        Ok(Self { bytes: u64::from_be_bytes(bytes) })
    }
}
