//! What the host makes of STDOUT and STDERR frames.

use std::time::Duration;

use bytes::Bytes;
use kiln_wire::frame::Kind;
use kiln_wire::frame::MAX_FRAME;

use super::play::Subject;
use super::play::exit;
use super::play::frame;
use crate::case::Case;
use crate::case::Finding;
use crate::case::ensure;
use crate::case::same;
use crate::session::encoded;

/// For so long an end that is waiting takes no byte.
const STALL: Duration = Duration::from_secs(1);

pub(super) const CASES: &[Case<Subject>] = &[
    Case::new("H07", "standard output and standard error come out apart", apart),
    Case::new("H08", "output in frames of one byte, and in empty ones, comes out whole", tiny),
    Case::new("H09", "a frame of 16 MiB comes out whole", longest),
    Case::new("H10", "frames may be split at every byte", split),
    Case::new("H11", "frames of unknown kind are skipped, also one of 16 MiB", unknown),
    Case::new("H12", "output comes out while the input is stuck", stuck_input),
    Case::new("H13", "output comes out before the process ends", before_the_end),
    Case::new("H14", "output that nobody reads is not taken without bound, and is not lost", unread),
];

fn apart(host: &Subject) -> Result<(), Finding> {
    let outcome = host.told(&[
        frame(Kind::Stdout, &b"out "[..]),
        frame(Kind::Stderr, &b"err "[..]),
        frame(Kind::Stdout, &b"more out"[..]),
        frame(Kind::Stderr, &b"more err"[..]),
        exit(0),
    ])?;
    outcome.prints("out more out")?;
    same("stderr", &outcome.stderr, "err more err")
}

fn tiny(host: &Subject) -> Result<(), Finding> {
    let all: Vec<u8> = (0..=u8::MAX).collect();
    let mut frames = Vec::new();
    for &byte in &all {
        frames.push(frame(Kind::Stdout, vec![byte]));
        frames.push(frame(Kind::Stdout, Bytes::new()));
    }
    frames.push(exit(0));
    host.told(&frames)?.prints(all)
}

fn longest(host: &Subject) -> Result<(), Finding> {
    let long: Vec<u8> = (0..=250).cycle().take(MAX_FRAME).collect();
    host.told(&[frame(Kind::Stdout, long.clone()), exit(0)])?.prints(long)
}

fn split(host: &Subject) -> Result<(), Finding> {
    let (host, mut session, _) = host.requested(&["program"])?;
    for byte in encoded(&[frame(Kind::Stdout, &b"split"[..]), exit(7)])? {
        session.send_bytes(&[byte])?;
    }
    let outcome = host.outcome()?;
    outcome.ends(7)?;
    same("stdout", &outcome.stdout, "split")
}

fn unknown(host: &Subject) -> Result<(), Finding> {
    let outcome = host.told(&[
        frame(Kind::Unknown(0x77), &b"of the future"[..]),
        frame(Kind::Stdout, &b"one "[..]),
        frame(Kind::Unknown(0x42), vec![0; MAX_FRAME]),
        frame(Kind::Unknown(0x7f), Bytes::new()),
        frame(Kind::Stdout, &b"two"[..]),
        exit(0),
    ])?;
    outcome.prints("one two")
}

fn stuck_input(host: &Subject) -> Result<(), Finding> {
    let (mut host, session, _) = host.requested(&["program"])?;
    // Never read at our end.
    host.feed(vec![0; 8 << 20]);
    let bytes = encoded(&[frame(Kind::Stdout, vec![b'x'; 1 << 20]), exit(0)])?;
    let outcome = host.outcome_of(session, bytes.to_vec())?;
    outcome.ends(0)?;
    ensure(outcome.stdout.len() == 1 << 20, || format!("{} of 1048576 bytes", outcome.stdout.len()))
}

fn before_the_end(host: &Subject) -> Result<(), Finding> {
    let (mut host, mut session, _) = host.requested(&["program"])?;
    session.send(Kind::Stdout, &b"early\n"[..])?;
    host.stdout.hear(b"early\n")?;
    session.send_all(&[exit(0)])?;
    host.outcome()?.ends(0)
}

fn unread(host: &Subject) -> Result<(), Finding> {
    const FLOOD: usize = 64 << 20;
    let (host, mut session, _) = host.requested(&["program"])?;
    let mut frames = vec![frame(Kind::Stdout, vec![b'x'; 1 << 20]); FLOOD >> 20];
    frames.push(exit(0));
    let frames = encoded(&frames)?;
    let sent = session.send_until_stuck(&frames, STALL)?;
    ensure(sent < FLOOD, || format!("{FLOOD} bytes were taken that nobody reads"))?;
    let rest = frames.get(sent..).unwrap_or_default().to_vec();
    let outcome = host.outcome_of(session, rest)?;
    outcome.ends(0)?;
    ensure(outcome.stdout.len() == FLOOD, || format!("{} of {FLOOD} bytes", outcome.stdout.len()))
}
