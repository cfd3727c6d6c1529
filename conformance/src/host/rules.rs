//! Agents that do not keep to the rules, and hosts that end before their process.

use std::time::Instant;

use kiln_wire::frame::Kind;

use super::play::Subject;
use super::play::frame;
use crate::case::Case;
use crate::case::Finding;
use crate::case::ensure;
use crate::session::PATIENCE;
use crate::session::encoded;

pub(super) const CASES: &[Case<Subject>] = &[
    Case::new("H25", "a connection that closes without EXIT or ERROR is a failure", closed),
    Case::new("H26", "a connection that ends inside a frame is a failure", truncated),
    Case::new("H27", "a header over 16 MiB is a failure at once", oversize),
    Case::new("H28", "an EXIT of another length than 4 or 12 is a failure", exit_shape),
    Case::new("H29", "an agent that cannot be reached is a failure", unreachable),
    Case::new("H30", "a host that is killed closes the connection", killed),
];

fn closed(host: &Subject) -> Result<(), Finding> {
    host.told(&[])?.fails()?;
    let outcome = host.told(&[frame(Kind::Stdout, &b"some"[..]), frame(Kind::Stderr, &b""[..])])?;
    outcome.fails()?;
    crate::case::same("stdout", &outcome.stdout, "some")
}

fn truncated(host: &Subject) -> Result<(), Finding> {
    let whole = encoded(&[frame(Kind::Stdout, &b"some"[..]), super::play::exit(0)])?;
    // In a header, in a stream's payload, and one byte before the end of EXIT.
    for length in [3, 7, whole.len() - 1] {
        let outcome = host.told_bytes(whole.get(..length).unwrap_or_default())?;
        outcome.fails().map_err(|finding| Finding::new(format!("after {length} bytes: {finding}")))?;
    }
    Ok(())
}

fn oversize(host: &Subject) -> Result<(), Finding> {
    for kind in [Kind::Stdout, Kind::Exit, Kind::Unknown(0x77)] {
        let (host, mut session, _) = host.requested(&["program"])?;
        // The payload never comes, and our end stays open.
        session.send_bytes(&[kind.to_byte(), 0x01, 0x00, 0x00, 0x01])?;
        host.outcome()?.fails()?;
    }
    Ok(())
}

fn exit_shape(host: &Subject) -> Result<(), Finding> {
    for length in [0, 3, 5, 11, 13] {
        let outcome = host.told(&[frame(Kind::Exit, vec![0; length])])?;
        outcome.fails().map_err(|finding| Finding::new(format!("{length} bytes: {finding}")))?;
    }
    Ok(())
}

fn unreachable(host: &Subject) -> Result<(), Finding> {
    host.alone(&["program"])?.outcome()?.fails()
}

fn killed(host: &Subject) -> Result<(), Finding> {
    let (mut host, mut session, _) = host.requested(&["program"])?;
    host.process.0.kill()?;
    let deadline = Instant::now() + PATIENCE;
    // It may have sent input before.
    while session.next()?.is_some() {
        ensure(Instant::now() < deadline, || "the connection stays open".to_owned())?;
    }
    Ok(())
}
