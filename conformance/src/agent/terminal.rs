//! Sessions with a terminal.

use std::time::Instant;

use kiln_wire::frame::Frame;
use kiln_wire::frame::Kind;
use kiln_wire::request::Request;

use super::Subject;
use crate::case::Case;
use crate::case::Finding;
use crate::case::ensure;
use crate::session::PATIENCE;
use crate::session::Session;
use crate::session::describe;

pub(super) const CASES: &[Case<Subject>] = &[
    Case::new("A66", "all three standard streams are a terminal of the size asked for", is_terminal),
    Case::new("A67", "the terminal is the controlling one of the process", controlling),
    Case::new("A68", "standard error comes in STDOUT frames", one_output),
    Case::new("A69", "RESIZE changes the terminal's size", resize),
    Case::new("A70", "an empty STDIN frame is end-of-file for a terminal too", end_of_file),
    Case::new("A71", "the interrupt character interrupts the foreground process", interrupt),
    Case::new("A72", "TERM is set with a terminal", term),
    Case::new("A73", "a host that disconnects ends a process with a terminal", disconnect),
];

fn with_terminal(agent: &Subject, script: &str) -> Request {
    Request { tty: true, cols: Some(91), rows: Some(33), ..agent.shell(script) }
}

/// What a script prints on a terminal, whose line ends are CR LF.
fn shown(agent: &Subject, script: &str) -> Result<String, Finding> {
    let seen = agent.start(&with_terminal(agent, script))?.rest()?;
    seen.exits(0)?;
    ensure(seen.of(Kind::Stderr).is_empty(), || "a STDERR frame".to_owned())?;
    Ok(String::from_utf8_lossy(&seen.stdout()).replace('\r', ""))
}

fn shows(agent: &Subject, script: &str, expected: &str) -> Result<(), Finding> {
    let text = shown(agent, script)?;
    ensure(text == expected, || format!("printed {text:?}, expected {expected:?}"))
}

fn is_terminal(agent: &Subject) -> Result<(), Finding> {
    shows(agent, "test -t 0 && test -t 1 && test -t 2 && stty size", "33 91\n")
}

fn controlling(agent: &Subject) -> Result<(), Finding> {
    shows(agent, "echo to the terminal > /dev/tty", "to the terminal\n")
}

fn one_output(agent: &Subject) -> Result<(), Finding> {
    shows(agent, "echo out; echo err >&2", "out\nerr\n")
}

fn resize(agent: &Subject) -> Result<(), Finding> {
    let mut session = agent.start(&with_terminal(agent, "stty -echo; echo up; read -r line; stty size"))?;
    wait_for(&mut session, "up\r\n")?;
    session.send(Kind::Resize, vec![0, 120, 0, 40])?;
    session.send(Kind::Stdin, &b"\n"[..])?;
    let seen = session.rest()?;
    seen.exits(0)?;
    let text = String::from_utf8_lossy(&seen.stdout()).replace(['\r', '\n'], "");
    ensure(text == "40 120", || format!("rows and columns are {text:?}, expected \"40 120\""))
}

fn end_of_file(agent: &Subject) -> Result<(), Finding> {
    let mut session = agent.start(&with_terminal(agent, "stty -echo; echo up; cat; echo end"))?;
    wait_for(&mut session, "up\r\n")?;
    session.send(Kind::Stdin, &b"line\n"[..])?;
    session.end_of_input()?;
    session.rest()?.prints("line\r\nend\r\n")
}

fn interrupt(agent: &Subject) -> Result<(), Finding> {
    let mut session = agent.start(&with_terminal(agent, "echo up; exec sleep 300"))?;
    wait_for(&mut session, "up\r\n")?;
    session.send(Kind::Stdin, vec![3])?;
    session.rest()?.exits(130)
}

fn term(agent: &Subject) -> Result<(), Finding> {
    shows(agent, "echo ${TERM:+set}", "set\n")
}

fn disconnect(agent: &Subject) -> Result<(), Finding> {
    let life = agent.life("terminal")?;
    let mut session =
        agent.start(&with_terminal(agent, &format!("trap '' HUP; {} echo up; sleep 300", life.held())))?;
    wait_for(&mut session, "up\r\n")?;
    drop(session);
    life.ends()
}

/// Waits until the terminal has shown `marker`, whatever else it shows.
fn wait_for(session: &mut Session, marker: &str) -> Result<(), Finding> {
    let deadline = Instant::now() + PATIENCE;
    let mut shown = String::new();
    while !shown.contains(marker) {
        match session.next_within(deadline.saturating_duration_since(Instant::now()))? {
            Some(Some(Frame { kind: Kind::Stdout, payload })) => shown.push_str(&String::from_utf8_lossy(&payload)),
            Some(other) => return Err(Finding::new(format!("{} in place of output", describe(other.as_ref())))),
            None => return Err(Finding::new(format!("only {shown:?} within {PATIENCE:?}"))),
        }
    }
    Ok(())
}
