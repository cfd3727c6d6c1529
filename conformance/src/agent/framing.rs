//! Frames: how they may arrive, and which end a session.

use kiln_wire::failure::Failure;
use kiln_wire::frame::Frame;
use kiln_wire::frame::Kind;
use kiln_wire::frame::MAX_FRAME;

use super::Subject;
use super::subject::argv;
use crate::case::Case;
use crate::case::Finding;
use crate::case::ensure;
use crate::session::encoded;

/// A STDIN header that announces one byte more than a frame may have.
const OVERSIZE: [u8; 5] = [0x00, 0x01, 0x00, 0x00, 0x01];

pub(super) const CASES: &[Case<Subject>] = &[
    Case::new("A01", "frames may be split at every byte", split),
    Case::new("A02", "frames that arrive together are told apart", coalesced),
    Case::new("A03", "a frame of unknown kind is skipped", unknown),
    Case::new("A04", "an unknown frame of 16 MiB is skipped", unknown_and_long),
    Case::new("A05", "a STDIN frame of 16 MiB arrives whole", longest),
    Case::new("A06", "a first header over 16 MiB ends the session before its payload comes", oversize_first),
    Case::new("A07", "a later header over 16 MiB ends the session and its process", oversize_later),
    Case::new("A08", "a REQUEST that is cut off starts nothing", truncated),
    Case::new("A09", "a first frame of another kind is a bad request", wrong_first),
    Case::new("A10", "a session that breaks the rules harms no other", bystander),
];

fn cat_session() -> Result<Vec<u8>, Finding> {
    let request = serde_json::to_vec(&argv(&["cat"]))?;
    let stdin = |bytes: &'static [u8]| Frame::new(Kind::Stdin, bytes);
    let bytes = encoded(&[Frame::new(Kind::Request, request), stdin(b"one "), stdin(b"two"), stdin(b"")])?;
    Ok(bytes.to_vec())
}

fn split(agent: &Subject) -> Result<(), Finding> {
    let mut session = agent.open()?;
    for byte in cat_session()? {
        session.send_bytes(&[byte])?;
    }
    session.rest()?.prints("one two")
}

fn coalesced(agent: &Subject) -> Result<(), Finding> {
    let mut session = agent.open()?;
    session.send_bytes(&cat_session()?)?;
    session.rest()?.prints("one two")
}

fn around_unknown(agent: &Subject, payload: Vec<u8>) -> Result<(), Finding> {
    let mut session = agent.start(&argv(&["cat"]))?;
    session.send(Kind::Stdin, &b"one "[..])?;
    session.send(Kind::Unknown(0x77), payload)?;
    session.send(Kind::Stdin, &b"two"[..])?;
    session.end_of_input()?;
    session.rest()?.prints("one two")
}

fn unknown(agent: &Subject) -> Result<(), Finding> {
    around_unknown(agent, b"of the future".to_vec())?;
    around_unknown(agent, Vec::new())
}

fn unknown_and_long(agent: &Subject) -> Result<(), Finding> {
    around_unknown(agent, vec![0; MAX_FRAME])
}

fn longest(agent: &Subject) -> Result<(), Finding> {
    let mut session = agent.start(&argv(&["md5sum"]))?;
    session.send(Kind::Stdin, vec![b'x'; MAX_FRAME])?;
    session.end_of_input()?;
    let seen = session.rest()?;
    seen.exits(0)?;
    let expected = agent.sh("head -c 16777216 /dev/zero | tr '\\0' x | md5sum")?.stdout();
    crate::case::same("md5sum", &seen.stdout(), expected)
}

fn oversize_first(agent: &Subject) -> Result<(), Finding> {
    let mut session = agent.open()?;
    session.send_bytes(&[0xff, 0xff, 0xff, 0xff, 0xff])?;
    ends_without_exit(&mut session)
}

fn ends_without_exit(session: &mut crate::session::Session) -> Result<(), Finding> {
    let seen = session.rest()?;
    ensure(!seen.frames.iter().any(|frame| frame.kind == Kind::Exit), || "EXIT, as if nothing were wrong".to_owned())
}

fn oversize_later(agent: &Subject) -> Result<(), Finding> {
    let life = agent.life("oversize")?;
    let mut session = agent.start_sh(&format!("{} echo up; sleep 300", life.held()))?;
    session.hear("up\n")?;
    session.send_bytes(&OVERSIZE)?;
    ends_without_exit(&mut session)?;
    life.ends()
}

fn truncated(agent: &Subject) -> Result<(), Finding> {
    let request = serde_json::to_vec(&agent.shell("echo ran > truncated"))?;
    let bytes = encoded(&[Frame::new(Kind::Request, request)])?;
    let mut session = agent.open()?;
    session.send_bytes(bytes.get(..bytes.len() - 1).unwrap_or_default())?;
    session.half_close()?;
    ends_without_exit(&mut session)?;
    ensure(!agent.is_there("truncated")?, || "it ran".to_owned())
}

fn wrong_first(agent: &Subject) -> Result<(), Finding> {
    for kind in [Kind::Stdin, Kind::Signal, Kind::Resize] {
        let mut session = agent.open()?;
        session.send(kind, vec![1])?;
        let failure = session.rest()?.failure()?;
        ensure(matches!(failure, Failure::BadRequest(_)), || format!("{kind:?} first: ERROR {failure}"))?;
    }
    Ok(())
}

fn bystander(agent: &Subject) -> Result<(), Finding> {
    let mut good = agent.start(&argv(&["cat"]))?;
    good.send(Kind::Stdin, &b"before "[..])?;
    good.hear("before ")?;
    let mut bad = agent.open()?;
    bad.send_bytes(&OVERSIZE)?;
    bad.rest()?;
    good.send(Kind::Stdin, &b"after"[..])?;
    good.end_of_input()?;
    good.rest()?.prints("after")
}
