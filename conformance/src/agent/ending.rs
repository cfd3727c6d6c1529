//! How a session ends: EXIT after all output, signals, daemons, and hosts that go away.

use std::thread;
use std::time::Duration;
use std::time::Instant;

use kiln_wire::frame::Frame;
use kiln_wire::frame::Kind;

use super::Subject;
use super::subject::argv;
use crate::case::Case;
use crate::case::Finding;
use crate::case::ensure;
use crate::session::Transcript;

/// How long a daemon may hold the session open at most: 100 ms by the document, and time for a busy machine.
const SOON: Duration = Duration::from_secs(3);

/// Longer than the time for which an agent forwards what a daemon writes (100 ms).
const BEYOND_GRACE: Duration = Duration::from_millis(150);

pub(super) const CASES: &[Case<Subject>] = &[
    Case::new("A47", "EXIT has the code of the process", code),
    Case::new("A48", "EXIT is the last frame, and the agent closes", last_frame),
    Case::new("A49", "EXIT is 4 bytes, or 12 with a peak RSS above zero", shape),
    Case::new("A50", "a process that signal n ended has code 128+n", by_signal),
    Case::new("A51", "EXIT comes after every byte of a process that writes and ends", after_output),
    Case::new("A52", "EXIT comes after every byte however slow the host reads", slow_host),
    Case::new("A53", "SIGNAL reaches the whole process group", whole_group),
    Case::new("A54", "a daemon that holds the outputs does not hold EXIT, and goes on after it", daemon),
    Case::new("A55", "a host that disconnects has the group sent SIGHUP and SIGCONT", disconnect),
    Case::new("A56", "what ignores SIGHUP is sent SIGKILL", stubborn),
    Case::new("A57", "a half-closed connection counts as a closed one", half_closed),
    Case::new("A58", "two hundred sessions at once do not mix", many),
];

fn code(agent: &Subject) -> Result<(), Finding> {
    for code in [0, 1, 7, 127, 255] {
        agent.sh(&format!("exit {code}"))?.exits(code)?;
    }
    Ok(())
}

fn last_frame(agent: &Subject) -> Result<(), Finding> {
    let mut session = agent.start(&argv(&["echo", "hi"]))?;
    session.rest()?.prints("hi\n")?;
    session.closed()
}

fn shape(agent: &Subject) -> Result<(), Finding> {
    match agent.sh("exit 3")?.exit()?.peak_rss_kib {
        Some(0) => Err(Finding::new("a peak RSS of 0")),
        Some(_) | None => Ok(()),
    }
}

fn by_signal(agent: &Subject) -> Result<(), Finding> {
    for (signal, number) in [("HUP", 1), ("KILL", 9), ("TERM", 15)] {
        agent.sh(&format!("kill -{signal} $$"))?.exits(128 + number)?;
    }
    Ok(())
}

fn after_output(agent: &Subject) -> Result<(), Finding> {
    let seen = agent.sh("head -c 1048576 /dev/zero; head -c 1048576 /dev/zero >&2; exit 3")?;
    seen.exits(3)?;
    whole(&seen.stdout())?;
    whole(&seen.stderr())
}

fn whole(bytes: &[u8]) -> Result<(), Finding> {
    ensure(bytes.len() == 1 << 20, || format!("{} of 1048576 bytes before EXIT", bytes.len()))
}

fn slow_host(agent: &Subject) -> Result<(), Finding> {
    let mut session = agent.start_sh("head -c 1048576 /dev/zero; exit 3")?;
    let (mut frames, mut unpaused) = (Vec::new(), 0);
    loop {
        let frame = session.next()?.ok_or_else(|| Finding::new("an end without EXIT"))?;
        unpaused += frame.payload.len();
        // Time must pass, or the process's end and its last bytes would never be further apart than the agent's patience.
        if unpaused > 128 << 10 {
            thread::sleep(BEYOND_GRACE);
            unpaused = 0;
        }
        let last = frame.kind == Kind::Exit;
        frames.push(frame);
        if last {
            break;
        }
    }
    let seen = Transcript { frames };
    seen.exits(3)?;
    whole(&seen.stdout())
}

fn whole_group(agent: &Subject) -> Result<(), Finding> {
    let life = agent.life("group")?;
    let mut session = agent.start_sh(&format!("{} sleep 300 & echo up; wait", life.held()))?;
    session.hear("up\n")?;
    session.signal(15)?;
    session.rest()?.exits(143)?;
    life.ends()
}

fn daemon(agent: &Subject) -> Result<(), Finding> {
    agent.sh("mkfifo daemon-go daemon-proof")?.exits(0)?;
    let mut session = agent.start_sh("(cat daemon-go > daemon-proof) & echo up")?;
    session.hear("up\n")?;
    let began = Instant::now();
    session.rest()?.exits(0)?;
    ensure(began.elapsed() < SOON, || format!("EXIT after {:?}", began.elapsed()))?;
    drop(session);
    // Only a daemon that lives carries this from one pipe to the other.
    let mut proof = agent.start_sh("echo alive > daemon-go & cat daemon-proof")?;
    proof.rest().map_err(|_| Finding::new("the daemon is gone after EXIT"))?.prints("alive\n")
}

fn disconnect(agent: &Subject) -> Result<(), Finding> {
    let life = agent.life("disconnect")?;
    // Waiting, so that the trap runs at once: a shell that is about to start a program runs it only after that.
    let script = "trap 'echo hup > got-hup; exit' HUP; sleep 300 & echo up; wait";
    let mut session = agent.start_sh(&format!("{} {script}", life.held()))?;
    session.hear("up\n")?;
    // Stopped, it sees the SIGHUP only with the SIGCONT.
    session.signal(19)?;
    drop(session);
    life.ends()?;
    ensure(agent.is_there("got-hup")?, || "the process was ended without SIGHUP".to_owned())
}

fn stubborn(agent: &Subject) -> Result<(), Finding> {
    let life = agent.life("stubborn")?;
    let script = "trap '' HUP TERM INT; echo up; sleep 300";
    let mut session = agent.start_sh(&format!("{} {script}", life.held()))?;
    session.hear("up\n")?;
    drop(session);
    life.ends()
}

fn half_closed(agent: &Subject) -> Result<(), Finding> {
    let life = agent.life("half")?;
    let mut session = agent.start_sh(&format!("{} echo up; sleep 300", life.held()))?;
    session.hear("up\n")?;
    session.half_close()?;
    life.ends()
}

fn many(agent: &Subject) -> Result<(), Finding> {
    let mut sessions = Vec::new();
    for number in 0..200 {
        let mut session = agent.start(&argv(&["cat"]))?;
        session.send(Kind::Stdin, format!("session {number}").into_bytes())?;
        sessions.push(session);
    }
    for (number, session) in sessions.iter_mut().enumerate() {
        session.hear(&format!("session {number}"))?;
    }
    let end = Frame::new(Kind::Stdin, Vec::new());
    for session in &mut sessions {
        session.send_all(std::slice::from_ref(&end))?;
        session.rest()?.exits(0)?;
    }
    Ok(())
}
