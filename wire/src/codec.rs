//! The frames as a `tokio_util` codec; the parsing itself is [`crate::frame`]'s.

use std::io;

use bytes::BytesMut;
use tokio_util::codec::{Decoder, Encoder};

use crate::frame::Frame;
use crate::frame::FrameParser;

/// Encoder and decoder of [`Frame`]s for `tokio_util::codec::Framed` and its halves.
///
/// Errors are `io::Error`s: `InvalidData` for a frame over [`crate::frame::MAX_FRAME`], `UnexpectedEof` for a
/// stream that ends inside a frame.
#[derive(Debug)]
pub struct FrameCodec {
    parser: FrameParser,
}

impl FrameCodec {
    /// A codec that decodes frames exactly as sent.
    #[must_use]
    pub const fn whole() -> Self {
        Self { parser: FrameParser::whole() }
    }

    /// A codec that decodes long stream frames in pieces, see [`FrameParser::streaming`].
    #[must_use]
    pub const fn streaming() -> Self {
        Self { parser: FrameParser::streaming() }
    }
}

impl Decoder for FrameCodec {
    type Item = Frame;
    type Error = io::Error;

    fn decode(&mut self, src: &mut BytesMut) -> io::Result<Option<Frame>> {
        Ok(self.parser.parse(src)?)
    }

    fn decode_eof(&mut self, src: &mut BytesMut) -> io::Result<Option<Frame>> {
        if let Some(frame) = self.parser.parse(src)? {
            return Ok(Some(frame));
        }
        self.parser.finish(src)?;
        Ok(None)
    }
}

impl Encoder<Frame> for FrameCodec {
    type Error = io::Error;

    fn encode(&mut self, frame: Frame, dst: &mut BytesMut) -> io::Result<()> {
        Ok(frame.encode(dst)?)
    }
}
