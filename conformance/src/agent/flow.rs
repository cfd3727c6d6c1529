//! Flow control: who waits for whom, and who does not.

use std::thread;
use std::time::Duration;

use kiln_wire::frame::Kind;

use super::Subject;
use super::subject::argv;
use super::subject::until;
use crate::case::Case;
use crate::case::Finding;
use crate::case::ensure;
use crate::session::Session;

/// For so long an end that is waiting takes no byte.
const STALL: Duration = Duration::from_secs(1);

/// More than the agent, the pipe and the sockets between take from a host whose process does not read (4 MiB).
const FLOOD: usize = 4 << 20;

pub(super) const CASES: &[Case<Subject>] = &[
    Case::new("A59", "unread output blocks its process, and nothing is lost", blocks),
    Case::new("A60", "unread output slows no other session", unread),
    Case::new("A61", "input that the process does not read is not taken without bound", backlog),
    Case::new("A62", "a SIGNAL behind unread input is not lost", signal_behind),
    Case::new("A63", "output and EXIT pass while input is stuck", output_meanwhile),
    Case::new("A64", "closing the connection kills the process also while input is stuck", close_while_stuck),
    Case::new("A65", "closing the connection kills the process also while output is stuck", close_while_blocked),
];

fn blocks(agent: &Subject) -> Result<(), Finding> {
    let mut session = agent.start_sh("head -c 8388608 /dev/zero; : > blocks-done")?;
    let first = session.next()?.ok_or_else(|| Finding::new("an end before any output"))?;
    // What is waited for must not happen, so time must pass.
    thread::sleep(STALL);
    let early = agent.is_there("blocks-done")?;
    let seen = session.rest()?;
    seen.exits(0)?;
    let printed = first.payload.len() + seen.stdout().len();
    ensure(printed == 8 << 20, || format!("{printed} of 8388608 bytes"))?;
    ensure(!early, || "8 MiB went into the agent unread".to_owned())
}

fn unread(agent: &Subject) -> Result<(), Finding> {
    let _stuck = agent.start(&argv(&["cat", "/dev/zero"]))?;
    for _ in 0..20 {
        agent.run(&argv(&["echo", "hi"]))?.prints("hi\n")?;
    }
    Ok(())
}

/// A session whose process reads nothing until the file `go` appears, flooded until nothing more is taken.
fn flooded(agent: &Subject, script: &str) -> Result<(Session, usize), Finding> {
    let mut session = agent.start_sh(script)?;
    session.hear("up\n")?;
    let header = kiln_wire::frame::header(Kind::Stdin, FLOOD)?;
    session.send_bytes(&header)?;
    let sent = session.send_until_stuck(&vec![0; FLOOD], STALL)?;
    ensure(sent < FLOOD, || format!("{FLOOD} bytes were taken that nobody reads"))?;
    Ok((session, sent))
}

fn backlog(agent: &Subject) -> Result<(), Finding> {
    let script = format!("echo up; {}; md5sum", until("backlog-go"));
    let (mut session, sent) = flooded(agent, &script)?;
    agent.sh(": > backlog-go")?.exits(0)?;
    session.send_bytes(&vec![0; FLOOD - sent])?;
    session.end_of_input()?;
    let expected = agent.sh(&format!("head -c {FLOOD} /dev/zero | md5sum"))?.stdout();
    session.rest()?.prints(expected)
}

fn signal_behind(agent: &Subject) -> Result<(), Finding> {
    // It reads on, so that the signal arrives; its input has no end.
    let script = format!("trap 'exit 9' TERM; echo up; {}; cat > /dev/null", until("signal-go"));
    let mut session = agent.start_sh(&script)?;
    session.hear("up\n")?;
    // Fits what the agent and the pipe take together.
    session.send(Kind::Stdin, vec![0; 160 << 10])?;
    session.signal(15)?;
    agent.sh(": > signal-go")?.exits(0)?;
    session.rest()?.exits(9)
}

fn output_meanwhile(agent: &Subject) -> Result<(), Finding> {
    let script = format!("echo up; {}; echo out; echo err >&2; exit 4", until("output-go"));
    let (mut session, _) = flooded(agent, &script)?;
    agent.sh(": > output-go")?.exits(0)?;
    let seen = session.rest()?;
    seen.exits(4)?;
    crate::case::same("stdout", &seen.stdout(), "out\n")?;
    crate::case::same("stderr", &seen.stderr(), "err\n")
}

fn close_while_stuck(agent: &Subject) -> Result<(), Finding> {
    let life = agent.life("stuck")?;
    let (session, _) = flooded(agent, &format!("{} echo up; sleep 300", life.held()))?;
    drop(session);
    life.ends()
}

fn close_while_blocked(agent: &Subject) -> Result<(), Finding> {
    let life = agent.life("blocked")?;
    let mut session = agent.start_sh(&format!("{} echo up; cat /dev/zero", life.held()))?;
    let first = session.next()?;
    ensure(first.is_some(), || "an end before any output".to_owned())?;
    drop(session);
    life.ends()
}
