//! Frames in arbitrary pieces: however a stream is split, and whichever parser reads it, it says the same; what was parsed encodes to
//! the bytes that it came from.
//!
//! The first byte of the input is the longest piece, the rest is the stream.
#![no_main]

use bytes::BytesMut;
use kiln_wire::frame::Frame;
use kiln_wire::frame::FrameError;
use kiln_wire::frame::FrameParser;
use kiln_wire::frame::Kind;
use libfuzzer_sys::fuzz_target;

/// What a parser makes of a stream: its frames, and how it ended.
type Parsed = (Vec<Frame>, Result<(), FrameError>);

fuzz_target!(|input: &[u8]| {
    let Some((&longest, stream)) = input.split_first() else { return };
    let whole = parse(FrameParser::whole(), stream, stream.len());
    let pieces = parse(FrameParser::whole(), stream, usize::from(longest));
    assert_eq!(whole, pieces, "split at {longest}");
    let streamed = parse(FrameParser::streaming(), stream, usize::from(longest));
    assert_eq!(streamed.1, whole.1);
    // A streaming parser has handed on the beginning of a frame that never came whole.
    if whole.1.is_ok() {
        assert_eq!(joined(&streamed.0), joined(&whole.0));
    }
    let mut encoded = BytesMut::new();
    for frame in &whole.0 {
        frame.encode(&mut encoded).expect("it was parsed, so it is short enough");
    }
    assert!(stream.starts_with(&encoded));
});

fn parse(mut parser: FrameParser, stream: &[u8], longest: usize) -> Parsed {
    let (mut inbox, mut frames) = (BytesMut::new(), Vec::new());
    for piece in stream.chunks(longest.max(1)) {
        inbox.extend_from_slice(piece);
        loop {
            match parser.parse(&mut inbox) {
                Ok(Some(frame)) => frames.push(frame),
                Ok(None) => break,
                Err(error) => return (frames, Err(error)),
            }
        }
    }
    (frames, parser.finish(&inbox))
}

/// Frames as both parsers must agree on them: unknown ones gone, neighbouring pieces of a stream put together, empty ones kept apart.
fn joined(frames: &[Frame]) -> Vec<(Kind, Vec<u8>)> {
    let mut joined: Vec<(Kind, Vec<u8>)> = Vec::new();
    for Frame { kind, payload } in frames.iter().filter(|frame| !matches!(frame.kind, Kind::Unknown(_))) {
        match joined.last_mut() {
            Some((last, bytes)) if kind.is_stream() && last == kind && !bytes.is_empty() && !payload.is_empty() => {
                bytes.extend_from_slice(payload);
            }
            _ => joined.push((*kind, payload.to_vec())),
        }
    }
    joined
}
