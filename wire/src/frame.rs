//! Frames and their incremental parser: `kind: u8 | length: u32 big-endian | payload`.
//!
//! Input is hostile: a length over [`MAX_FRAME`] is refused from the five header bytes alone, and a payload is never
//! allocated ahead of the bytes that really arrived, so a peer cannot make this end allocate by promising.

use std::io;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use thiserror::Error;

/// The largest payload of one frame, in bytes (16 MiB).
pub const MAX_FRAME: usize = 16 * 1024 * 1024;

/// Length of a frame's header, in bytes.
pub const HEADER_LEN: usize = 5;

/// What a frame carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Kind {
    /// Bytes for the process's standard input; an empty payload is end-of-file. Host to agent.
    Stdin,
    /// Bytes of the process's standard output. Agent to host.
    Stdout,
    /// Bytes of the process's standard error. Agent to host.
    Stderr,
    /// The terminal's new size. Host to agent.
    Resize,
    /// One byte, a signal for the whole process group. Host to agent.
    Signal,
    /// The process ended, see [`crate::exit::Exit`]. Agent to host.
    Exit,
    /// The process could not be started, or the session failed. Agent to host.
    Error,
    /// The process runs, see [`crate::started::Started`]; only when REQUEST asked for it. Agent to host.
    Started,
    /// Output of the workload that is no longer there, see [`crate::lost::Lost`]. Agent to host.
    Lost,
    /// One JSON action, or its acknowledgement. Both directions.
    Control,
    /// The JSON that starts a process. Host to agent.
    Request,
    /// A kind that this version does not know; a receiver skips it.
    Unknown(u8),
}

impl Kind {
    /// The byte on the wire.
    #[must_use]
    pub const fn to_byte(self) -> u8 {
        match self {
            Self::Stdin => 0x00,
            Self::Stdout => 0x01,
            Self::Stderr => 0x02,
            Self::Resize => 0x03,
            Self::Signal => 0x04,
            Self::Exit => 0x05,
            Self::Error => 0x06,
            Self::Started => 0x07,
            Self::Lost => 0x08,
            Self::Control => 0xfe,
            Self::Request => 0xff,
            Self::Unknown(byte) => byte,
        }
    }

    /// The kind that `byte` stands for.
    #[must_use]
    pub const fn from_byte(byte: u8) -> Self {
        match byte {
            0x00 => Self::Stdin,
            0x01 => Self::Stdout,
            0x02 => Self::Stderr,
            0x03 => Self::Resize,
            0x04 => Self::Signal,
            0x05 => Self::Exit,
            0x06 => Self::Error,
            0x07 => Self::Started,
            0x08 => Self::Lost,
            0xfe => Self::Control,
            0xff => Self::Request,
            other => Self::Unknown(other),
        }
    }

    /// Whether frames of this kind are pieces of a byte stream, so that where one ends and the next begins means nothing.
    #[must_use]
    pub const fn is_stream(self) -> bool {
        matches!(self, Self::Stdin | Self::Stdout | Self::Stderr)
    }
}

/// One frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// What it carries.
    pub kind: Kind,
    /// Its payload, at most [`MAX_FRAME`] bytes.
    pub payload: Bytes,
}

impl Frame {
    /// A frame of `kind` around `payload`.
    #[must_use]
    pub fn new(kind: Kind, payload: impl Into<Bytes>) -> Self {
        Self { kind, payload: payload.into() }
    }

    /// Appends the frame's bytes to `dst`.
    ///
    /// # Errors
    /// [`FrameError::TooLarge`] when the payload is over [`MAX_FRAME`]; `dst` is then unchanged.
    pub fn encode(&self, dst: &mut BytesMut) -> Result<(), FrameError> {
        let header = header(self.kind, self.payload.len())?;
        dst.reserve(HEADER_LEN + self.payload.len());
        dst.put_slice(&header);
        dst.put_slice(&self.payload);
        Ok(())
    }
}

/// The header of a frame with a payload of `len` bytes, for a sender that writes the payload itself.
///
/// # Errors
/// [`FrameError::TooLarge`] when `len` is over [`MAX_FRAME`].
pub fn header(kind: Kind, len: usize) -> Result<[u8; HEADER_LEN], FrameError> {
    match u32::try_from(len) {
        Ok(wire_len) if len <= MAX_FRAME => {
            let [a, b, c, d] = wire_len.to_be_bytes();
            Ok([kind.to_byte(), a, b, c, d])
        }
        _ => Err(FrameError::TooLarge { len: u64::try_from(len).unwrap_or(u64::MAX) }),
    }
}

/// Why a stream of frames cannot be continued.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum FrameError {
    /// A payload is longer than [`MAX_FRAME`].
    #[error("frame of {len} bytes is over the limit of {MAX_FRAME}")]
    TooLarge {
        /// The length that was asked for.
        len: u64,
    },
    /// The stream ended inside a frame.
    #[error("stream ended inside a frame")]
    Truncated,
}

impl From<FrameError> for io::Error {
    fn from(error: FrameError) -> Self {
        let kind = match error {
            FrameError::TooLarge { .. } => io::ErrorKind::InvalidData,
            FrameError::Truncated => io::ErrorKind::UnexpectedEof,
        };
        Self::new(kind, error)
    }
}

/// A frame whose header was read and whose payload is still arriving.
#[derive(Clone, Copy, Debug)]
struct Partial {
    kind: Kind,
    left: usize,
}

/// Incremental parser: give it a growing buffer, take frames.
///
/// [`whole`](Self::whole) returns each frame as it was sent. [`streaming`](Self::streaming) hands a STDIN, STDOUT or STDERR payload
/// on in the pieces in which it arrives, so that a 16 MiB frame never has to be in memory at once; a piece
/// is never empty unless the frame was (an empty STDIN frame means end-of-file), and a frame of unknown kind is dropped as it arrives.
#[derive(Debug)]
pub struct FrameParser {
    streaming: bool,
    partial: Option<Partial>,
}

impl FrameParser {
    /// A parser that returns frames exactly as sent.
    #[must_use]
    pub const fn whole() -> Self {
        Self { streaming: false, partial: None }
    }

    /// A parser that returns stream frames in pieces and skips unknown kinds.
    #[must_use]
    pub const fn streaming() -> Self {
        Self { streaming: true, partial: None }
    }

    /// Takes the next frame off the front of `src`, or `None` when more bytes are needed.
    ///
    /// # Errors
    /// [`FrameError::TooLarge`] for a header that announces more than [`MAX_FRAME`]; the stream cannot be
    /// resynchronised after it.
    pub fn parse(&mut self, src: &mut BytesMut) -> Result<Option<Frame>, FrameError> {
        loop {
            let partial = match self.partial {
                Some(partial) => partial,
                None => match Self::parse_header(src)? {
                    Some(partial) => *self.partial.insert(partial),
                    None => return Ok(None),
                },
            };
            let in_pieces = self.streaming && (partial.kind.is_stream() || matches!(partial.kind, Kind::Unknown(_)));
            let needed = if in_pieces { partial.left.min(1) } else { partial.left };
            if src.len() < needed {
                return Ok(None);
            }
            let taken = partial.left.min(src.len());
            let left = partial.left - taken;
            self.partial = (left > 0).then_some(Partial { left, ..partial });
            if self.streaming && matches!(partial.kind, Kind::Unknown(_)) {
                src.advance(taken);
            } else {
                return Ok(Some(Frame { kind: partial.kind, payload: src.split_to(taken).freeze() }));
            }
        }
    }

    /// Checks that a stream that ended with `rest` unparsed ended between two frames.
    ///
    /// # Errors
    /// [`FrameError::Truncated`] when it ended inside one.
    pub fn finish(&self, rest: &[u8]) -> Result<(), FrameError> {
        if self.partial.is_none() && rest.is_empty() { Ok(()) } else { Err(FrameError::Truncated) }
    }

    fn parse_header(src: &mut BytesMut) -> Result<Option<Partial>, FrameError> {
        let Some(&[kind, a, b, c, d]) = src.first_chunk::<HEADER_LEN>() else {
            return Ok(None);
        };
        let len = u32::from_be_bytes([a, b, c, d]);
        match usize::try_from(len) {
            Ok(left) if left <= MAX_FRAME => {
                src.advance(HEADER_LEN);
                Ok(Some(Partial { kind: Kind::from_byte(kind), left }))
            }
            _ => Err(FrameError::TooLarge { len: u64::from(len) }),
        }
    }
}
