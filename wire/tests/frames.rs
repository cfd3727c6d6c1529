//! The frame parser: any split of the byte stream gives the same frames, and bad input is refused before allocation.

use std::io;

use bytes::{Bytes, BytesMut};
use kiln_wire::exit::Exit;
use kiln_wire::failure::Failure;
use kiln_wire::frame::Frame;
use kiln_wire::frame::FrameError;
use kiln_wire::frame::FrameParser;
use kiln_wire::frame::Kind;
use kiln_wire::frame::MAX_FRAME;
use kiln_wire::frame::header;
use proptest::collection::vec;
use proptest::prelude::*;

fn frames() -> impl Strategy<Value = Vec<Frame>> {
    let frame = (any::<u8>(), vec(any::<u8>(), 0..200))
        .prop_map(|(kind, payload)| Frame::new(Kind::from_byte(kind % 8), payload));
    vec(frame, 0..12)
}

fn encode(frames: &[Frame]) -> Bytes {
    let mut bytes = BytesMut::new();
    for frame in frames {
        frame.encode(&mut bytes).expect("small frames");
    }
    bytes.freeze()
}

/// Feeds `bytes` cut at `cuts` and returns all frames.
fn parse_split(mut parser: FrameParser, bytes: &[u8], cuts: &[usize]) -> Vec<Frame> {
    let mut points: Vec<usize> = cuts.iter().map(|cut| cut % (bytes.len() + 1)).collect();
    points.push(bytes.len());
    points.sort_unstable();
    let mut buffer = BytesMut::new();
    let mut parsed = Vec::new();
    let mut from = 0;
    for to in points {
        buffer.extend_from_slice(&bytes[from..to]);
        from = to;
        while let Some(frame) = parser.parse(&mut buffer).expect("well-formed") {
            parsed.push(frame);
        }
    }
    parser.finish(&buffer).expect("ended between frames");
    parsed
}

/// What a streaming receiver may rely on: the order of everything, and the bytes of each run of stream frames; pieces of one
/// stream are joined here, end-of-file markers kept.
fn canonical(frames: Vec<Frame>) -> Vec<Frame> {
    let mut joined: Vec<Frame> = Vec::new();
    for frame in frames {
        if matches!(frame.kind, Kind::Unknown(_)) {
            continue;
        }
        match joined.last_mut() {
            Some(last)
                if last.kind == frame.kind
                    && frame.kind.is_stream()
                    && !last.payload.is_empty()
                    && !frame.payload.is_empty() =>
            {
                last.payload = [last.payload.as_ref(), frame.payload.as_ref()].concat().into();
            }
            _ => joined.push(frame),
        }
    }
    joined
}

proptest! {
    #[test]
    fn any_split_gives_the_same_frames(sent in frames(), cuts in vec(any::<usize>(), 0..20)) {
        let parsed = parse_split(FrameParser::whole(), &encode(&sent), &cuts);
        prop_assert_eq!(parsed, sent);
    }

    #[test]
    fn any_split_gives_the_same_streams(sent in frames(), cuts in vec(any::<usize>(), 0..20)) {
        let parsed = parse_split(FrameParser::streaming(), &encode(&sent), &cuts);
        prop_assert_eq!(canonical(parsed), canonical(sent));
    }

    #[test]
    fn any_proper_prefix_of_a_frame_is_truncated(payload in vec(any::<u8>(), 0..50), cut in any::<usize>()) {
        let bytes = encode(&[Frame::new(Kind::Control, payload)]);
        let cut = 1 + cut % (bytes.len() - 1);
        let mut buffer = BytesMut::from(&bytes[..cut]);
        let mut parser = FrameParser::whole();
        prop_assert_eq!(parser.parse(&mut buffer), Ok(None));
        prop_assert_eq!(parser.finish(&buffer), Err(FrameError::Truncated));
    }

    #[test]
    fn garbage_never_panics(garbage in vec(any::<u8>(), 0..400)) {
        let mut buffer = BytesMut::from(garbage.as_slice());
        let mut parser = FrameParser::streaming();
        while let Ok(Some(_)) = parser.parse(&mut buffer) {}
        let _ = Exit::decode(&garbage);
        let _ = Failure::decode(&garbage);
    }

    #[test]
    fn exit_survives_a_round_trip(code in any::<u32>(), peak_rss_kib in any::<Option<u64>>()) {
        let exit = Exit { code, peak_rss_kib };
        prop_assert_eq!(Exit::decode(&exit.encode()), Ok(exit));
    }
}

#[test]
fn an_oversize_length_is_refused_from_the_header_alone() {
    let mut buffer = BytesMut::from(&[0x01, 0x01, 0x00, 0x00, 0x01][..]);
    let capacity = buffer.capacity();
    let error = FrameParser::whole().parse(&mut buffer).expect_err("one byte over the limit");
    assert_eq!(error, FrameError::TooLarge { len: MAX_FRAME as u64 + 1 });
    assert_eq!(io::Error::from(error).kind(), io::ErrorKind::InvalidData);
    assert_eq!(buffer.capacity(), capacity);
}

#[test]
fn the_largest_frame_is_accepted() {
    assert!(header(Kind::Stdout, MAX_FRAME).is_ok());
    assert!(header(Kind::Stdout, MAX_FRAME + 1).is_err());
    let mut buffer = BytesMut::from(&[0x01, 0x01, 0x00, 0x00, 0x00][..]);
    assert_eq!(FrameParser::whole().parse(&mut buffer), Ok(None));
    // A promise of 16 MiB costs nothing until the bytes come.
    assert!(buffer.capacity() < 1024);
}

#[test]
fn a_truncated_stream_is_an_unexpected_end() {
    assert_eq!(io::Error::from(FrameError::Truncated).kind(), io::ErrorKind::UnexpectedEof);
}

#[test]
fn a_long_stream_frame_arrives_in_pieces() {
    let mut buffer = BytesMut::from(&[0x01, 0x00, 0x10, 0x00, 0x00, b'a', b'b'][..]);
    let mut parser = FrameParser::streaming();
    assert_eq!(parser.parse(&mut buffer), Ok(Some(Frame::new(Kind::Stdout, &b"ab"[..]))));
    assert_eq!(parser.parse(&mut buffer), Ok(None));
    assert_eq!(parser.finish(&buffer), Err(FrameError::Truncated));
}

#[test]
fn exit_is_four_or_twelve_bytes() {
    assert_eq!(Exit::decode(&[0, 0, 0, 7]), Ok(Exit { code: 7, peak_rss_kib: None }));
    assert_eq!(Exit::decode(&[0, 0, 0, 137, 0, 0, 0, 0, 0, 0, 4, 0]), Ok(Exit { code: 137, peak_rss_kib: Some(1024) }));
    for wrong in [0, 3, 5, 11, 13] {
        assert!(Exit::decode(&vec![0; wrong]).is_err(), "{wrong} bytes");
    }
}
