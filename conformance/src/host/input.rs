//! What the host sends: REQUEST first, then standard input.

use std::io::Write;
use std::time::Duration;

use kiln_wire::frame::Frame;
use kiln_wire::frame::Kind;

use super::play::Subject;
use super::play::exit;
use super::play::frame;
use crate::case::Case;
use crate::case::Finding;
use crate::case::ensure;
use crate::case::same;
use crate::session::Session;
use crate::session::describe;

/// For so long a host that is to stay is seen to stay.
const STAYS: Duration = Duration::from_millis(300);

pub(super) const CASES: &[Case<Subject>] = &[
    Case::new("H01", "the first frame is a REQUEST with the argv that was given", request),
    Case::new("H02", "the arguments are sent byte for byte", arguments),
    Case::new("H03", "standard input is sent in STDIN frames, its end as an empty one", stdin),
    Case::new("H04", "a long input is sent whole, in frames of at most 16 MiB", long_stdin),
    Case::new("H05", "input is sent as it comes, not only at its end", piecemeal),
    Case::new("H06", "the connection stays whole after the end of the input", no_half_close),
];

fn request(host: &Subject) -> Result<(), Finding> {
    let (host, mut session, request) = host.requested(&["program", "argument"])?;
    ensure(request.argv == ["program", "argument"], || format!("argv {:?}", request.argv))?;
    session.send_all(&[exit(0)])?;
    host.outcome()?.prints("")
}

fn arguments(host: &Subject) -> Result<(), Finding> {
    let odd = ["program", "", " a  b ", "'\"\\$HOME*", "new\nline", "\u{e4}\u{20ac}\u{1f600}", "--", "-x"];
    let (host, mut session, request) = host.requested(&odd)?;
    ensure(request.argv == odd, || format!("argv {:?}", request.argv))?;
    session.send_all(&[exit(0)])?;
    host.outcome()?.prints("")
}

/// The input up to the empty frame.
fn input(session: &mut Session) -> Result<Vec<u8>, Finding> {
    let mut input = Vec::new();
    loop {
        match session.next()? {
            Some(Frame { kind: Kind::Stdin, payload }) if payload.is_empty() => return Ok(input),
            Some(Frame { kind: Kind::Stdin, payload }) => input.extend_from_slice(&payload),
            other => return Err(Finding::new(format!("{} in place of STDIN", describe(other.as_ref())))),
        }
    }
}

fn sent_whole(host: &Subject, bytes: Vec<u8>) -> Result<(), Finding> {
    let (mut host, mut session, _) = host.requested(&["program"])?;
    host.feed(bytes.clone());
    same("the input", &input(&mut session)?, bytes)?;
    session.send_all(&[exit(0)])?;
    session.closed()?;
    host.outcome()?.prints("")
}

fn stdin(host: &Subject) -> Result<(), Finding> {
    sent_whole(host, b"in\0put\n".to_vec())?;
    sent_whole(host, Vec::new())
}

fn long_stdin(host: &Subject) -> Result<(), Finding> {
    // Longer than a frame may be; 251 is prime, so a piece in the wrong place shows.
    sent_whole(host, (0..=250).cycle().take(20 << 20).collect())
}

fn piecemeal(host: &Subject) -> Result<(), Finding> {
    let (mut host, mut session, _) = host.requested(&["program"])?;
    for line in [&b"one\n"[..], b"two\n"] {
        let stdin = host.stdin.as_mut().ok_or_else(|| Finding::new("no pipe"))?;
        stdin.write_all(line)?;
        stdin.flush()?;
        match session.next()? {
            Some(Frame { kind: Kind::Stdin, payload }) => same("the input", &payload, line)?,
            other => return Err(Finding::new(format!("{} in place of STDIN", describe(other.as_ref())))),
        }
    }
    session.send_all(&[exit(0)])?;
    host.outcome()?.prints("")
}

fn no_half_close(host: &Subject) -> Result<(), Finding> {
    let (mut host, mut session, _) = host.requested(&["program"])?;
    host.feed(b"input".to_vec());
    input(&mut session)?;
    // What is waited for must not happen, so time must pass.
    let next = session.next_within(STAYS)?;
    ensure(next.is_none(), || match next {
        Some(next) => format!("{} after the end of the input", describe(next.as_ref())),
        None => String::new(),
    })?;
    session.send_all(&[frame(Kind::Stdout, &b"still here"[..]), exit(0)])?;
    host.outcome()?.prints("still here")
}
