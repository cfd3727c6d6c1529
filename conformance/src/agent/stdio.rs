//! STDIN, STDOUT and STDERR: which bytes go where, and end-of-file.

use bytes::Bytes;
use kiln_wire::frame::Kind;

use super::Subject;
use super::subject::argv;
use super::subject::until;
use crate::case::Case;
use crate::case::Finding;
use crate::case::same;

pub(super) const CASES: &[Case<Subject>] = &[
    Case::new("A39", "every byte passes both ways unchanged", all_bytes),
    Case::new("A40", "where one STDIN frame ends means nothing", tiny_frames),
    Case::new("A41", "an empty STDIN frame is end-of-file, and what follows it is dropped", after_the_end),
    Case::new("A42", "a SIGNAL after end-of-file counts", signal_after_the_end),
    Case::new("A43", "standard output and standard error are kept apart", apart),
    Case::new("A44", "input for a process that has closed its standard input is dropped", closed_input),
    Case::new("A45", "RESIZE is ignored without a terminal", no_terminal),
    Case::new("A46", "input and output pass while both are open", dialogue),
];

fn all_bytes(agent: &Subject) -> Result<(), Finding> {
    let all: Vec<u8> = (0..=u8::MAX).cycle().take(10_000).collect();
    let mut session = agent.start(&argv(&["cat"]))?;
    session.send(Kind::Stdin, all.clone())?;
    session.end_of_input()?;
    session.rest()?.prints(all)
}

fn tiny_frames(agent: &Subject) -> Result<(), Finding> {
    let text = b"one byte a frame".repeat(20);
    let mut session = agent.start(&argv(&["cat"]))?;
    for &byte in &text {
        session.send(Kind::Stdin, vec![byte])?;
    }
    session.end_of_input()?;
    session.rest()?.prints(text)
}

fn after_the_end(agent: &Subject) -> Result<(), Finding> {
    let mut session = agent.start(&argv(&["sh", "-c", "cat; cat; echo end"]))?;
    session.send(Kind::Stdin, &b"in time "[..])?;
    session.end_of_input()?;
    session.send(Kind::Stdin, &b"too late"[..])?;
    session.end_of_input()?;
    session.rest()?.prints("in time end\n")
}

fn signal_after_the_end(agent: &Subject) -> Result<(), Finding> {
    let mut session = agent.start(&argv(&["sleep", "300"]))?;
    session.end_of_input()?;
    session.signal(15)?;
    session.rest()?.exits(143)
}

fn apart(agent: &Subject) -> Result<(), Finding> {
    let seen = agent.sh("echo out; echo err >&2; echo out again; echo err again >&2")?;
    seen.prints("out\nout again\n")?;
    same("stderr", &seen.stderr(), "err\nerr again\n")
}

fn closed_input(agent: &Subject) -> Result<(), Finding> {
    let script = format!("exec <&-; echo closed; {}; echo done", until("closed-go"));
    let mut session = agent.start_sh(&script)?;
    session.hear("closed\n")?;
    session.send(Kind::Stdin, vec![0; 4 << 20])?;
    agent.sh(": > closed-go")?.exits(0)?;
    session.rest()?.prints("done\n")
}

fn no_terminal(agent: &Subject) -> Result<(), Finding> {
    let mut session = agent.start(&argv(&["cat"]))?;
    session.send(Kind::Resize, vec![0, 80, 0, 25])?;
    session.send(Kind::Resize, Bytes::new())?;
    session.send(Kind::Stdin, &b"hi"[..])?;
    session.end_of_input()?;
    session.rest()?.prints("hi")
}

fn dialogue(agent: &Subject) -> Result<(), Finding> {
    let mut session = agent.start(&argv(&["cat"]))?;
    for line in ["one\n", "two\n", "three\n"] {
        session.send(Kind::Stdin, line.as_bytes().to_vec())?;
        session.hear(line)?;
    }
    session.end_of_input()?;
    session.rest()?.prints("")
}
