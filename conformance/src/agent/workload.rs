//! The workload, which the agent owns: one at a time, so every case begins by ending the one before.

use std::collections::BTreeMap;
use std::time::Duration;

use kiln_wire::control::Control;
use kiln_wire::control::ControlAck;
use kiln_wire::control::feature::WORKLOAD;
use kiln_wire::failure::Failure;
use kiln_wire::frame::Frame;
use kiln_wire::frame::Kind;
use kiln_wire::lost::Lost;

use super::Subject;
use super::subject::ROOT;
use super::subject::argv;
use super::subject::done;
use super::subject::refused;
use super::subject::until;
use crate::case::Case;
use crate::case::Finding;
use crate::case::ensure;
use crate::case::same;
use crate::session::Session;
use crate::session::describe;

pub(super) const CASES: &[Case<Subject>] = &[
    Case::new("A117", "workload_start runs argv with env and cwd, and tells the pid", start).requires(&[WORKLOAD]),
    Case::new("A118", "workload_start runs argv as user", start_as_user).requires(&[WORKLOAD, ROOT]),
    Case::new("A119", "workload_start is refused with errno 16 while one runs, and not after its end", start_twice)
        .requires(&[WORKLOAD]),
    Case::new("A120", "workload_start of what does not start is refused in the words of ERROR", start_nothing)
        .requires(&[WORKLOAD]),
    Case::new("A121", "the workload reads nothing, and leads a process group of its own", surroundings)
        .requires(&[WORKLOAD]),
    Case::new("A122", "workload_logs has both outputs from the first byte on, and then EXIT", logs)
        .requires(&[WORKLOAD]),
    Case::new("A123", "workload_logs goes on as the workload writes", logs_live).requires(&[WORKLOAD]),
    Case::new(
        "A124",
        "workload_logs from an offset leaves out what is before it, one beyond the end is refused",
        logs_from,
    )
    .requires(&[WORKLOAD]),
    Case::new("A125", "many may read the logs, and leave", readers).requires(&[WORKLOAD]),
    Case::new("A126", "logs that nobody reads do not hold the workload up", unread).requires(&[WORKLOAD]),
    Case::new("A127", "LOST says how much is missing, where it is missing", lost).requires(&[WORKLOAD]),
    Case::new("A128", "workload_wait brings EXIT and nothing else", wait).requires(&[WORKLOAD]),
    Case::new("A129", "the workload outlives every connection", outlives).requires(&[WORKLOAD]),
    Case::new("A130", "a daemon that holds the outputs does not hold the end of the logs", daemon)
        .requires(&[WORKLOAD]),
    Case::new("A131", "signal reaches the whole process group of the workload", signal).requires(&[WORKLOAD]),
    Case::new("A132", "another run than the one that is meant is refused with errno 3", other_run)
        .requires(&[WORKLOAD]),
];

/// Linux's numbers of the refusals that hosts tell apart.
const ESRCH: Option<i32> = Some(3);
const EBUSY: Option<i32> = Some(16);

const LOGS: Control = Control::WorkloadLogs { run: None, from: None };
const WAIT: Control = Control::WorkloadWait { run: None };

/// Ends the workload that there may be, and waits for that.
fn clear(agent: &Subject) -> Result<(), Finding> {
    let killed = agent.control(&Control::Signal { signum: 9, run: None })?;
    if killed.ok { agent.stream(&WAIT)?.0.rest()?.exit().map(|_| ()) } else { Ok(()) }
}

/// The action that starts a shell in the suite's folder, which is also `$FOLDER`.
fn shell(agent: &Subject, script: &str) -> Control {
    let request = agent.shell(script);
    Control::WorkloadStart { argv: request.argv, env: request.env, cwd: request.cwd, user: None }
}

/// Starts a shell as the workload.
fn begin(agent: &Subject, script: &str) -> Result<ControlAck, Finding> {
    clear(agent)?;
    let ack = agent.control(&shell(agent, script))?;
    done(&ack)?;
    Ok(ack)
}

fn read(agent: &Subject, action: &Control) -> Result<Session, Finding> {
    Ok(agent.stream(action)?.0)
}

/// Has the workload run to its end, and returns its code.
fn finish(agent: &Subject) -> Result<u32, Finding> {
    Ok(read(agent, &WAIT)?.rest()?.exit()?.code)
}

fn start(agent: &Subject) -> Result<(), Finding> {
    clear(agent)?;
    let env = BTreeMap::from([("NAME".to_owned(), "value".to_owned())]);
    let argv = argv(&["sh", "-c", "echo $NAME $1; pwd; echo $$", "sh", "a b"]).argv;
    let ack = agent.control(&Control::WorkloadStart { argv, env, cwd: Some(agent.path("")), user: None })?;
    done(&ack)?;
    let pid = ack.pid.ok_or_else(|| Finding::new("no pid"))?;
    ensure(ack.run.is_some(), || "no run".to_owned())?;
    let folder = agent.path("");
    read(agent, &LOGS)?.rest()?.prints(format!("value a b\n{}\n{pid}\n", folder.trim_end_matches('/')))
}

fn start_as_user(agent: &Subject) -> Result<(), Finding> {
    clear(agent)?;
    let (argv, env) = (argv(&["sh", "-c", "id -u; id -g"]).argv, BTreeMap::new());
    let user = Some("4242:4343".to_owned());
    done(&agent.control(&Control::WorkloadStart { argv, env, cwd: Some("/".to_owned()), user })?)?;
    read(agent, &LOGS)?.rest()?.prints("4242\n4343\n")
}

fn start_twice(agent: &Subject) -> Result<(), Finding> {
    let first = begin(agent, "exec sleep 100")?;
    let ack = agent.control(&shell(agent, "true"))?;
    refused(&ack, "one runs")?;
    ensure(ack.errno == EBUSY, || format!("errno {:?}", ack.errno))?;
    clear(agent)?;
    let second = agent.control(&shell(agent, "echo second"))?;
    done(&second)?;
    ensure(second.run != first.run, || format!("run {:?} twice", first.run))?;
    read(agent, &LOGS)?.rest()?.prints("second\n")
}

fn start_nothing(agent: &Subject) -> Result<(), Finding> {
    begin(agent, "exit 3")?;
    ensure(finish(agent)? == 3, || "another code".to_owned())?;
    let program = |name: &str| Control::WorkloadStart {
        argv: vec![name.to_owned()],
        env: BTreeMap::new(),
        cwd: Some("/no/such/folder".to_owned()).filter(|_| name == "true"),
        user: None,
    };
    let words = |name| -> Result<Failure, Finding> {
        let ack = agent.control(&program(name))?;
        refused(&ack, name)?;
        Ok(Failure::decode(ack.error.unwrap_or_default().as_bytes()))
    };
    let failure = words("kiln-no-such-program")?;
    ensure(matches!(failure, Failure::NotFound(_)), || format!("{failure:?}"))?;
    let failure = words("/")?;
    ensure(matches!(failure, Failure::NotExecutable(_)), || format!("{failure:?}"))?;
    let failure = words("true")?;
    ensure(matches!(failure, Failure::BadCwd(_)), || format!("{failure:?}"))?;
    // The one that ended is not replaced by what did not start.
    ensure(finish(agent)? == 3, || "the earlier run is gone".to_owned())
}

fn surroundings(agent: &Subject) -> Result<(), Finding> {
    let ack = begin(agent, "cat; read -r stat < /proc/$$/stat; echo \"${stat##*) }\"")?;
    let stat = read(agent, &LOGS)?.rest()?;
    stat.exits(0)?;
    let stat = String::from_utf8_lossy(&stat.stdout()).into_owned();
    let group = stat.split(' ').nth(2).and_then(|group| group.parse().ok());
    ensure(group == ack.pid, || format!("group {group:?} of process {:?}", ack.pid))
}

fn logs(agent: &Subject) -> Result<(), Finding> {
    begin(agent, "head -c 100000 /dev/zero; echo end; echo oops >&2; exit 7")?;
    // While it may still run, and after its end.
    for _ in 0..2 {
        let seen = read(agent, &LOGS)?.rest()?;
        seen.exits(7)?;
        let stdout = seen.stdout();
        ensure(stdout.len() == 100_004 && stdout.ends_with(b"\0end\n"), || format!("{} bytes", stdout.len()))?;
        same("stderr", &seen.stderr(), "oops\n")?;
        finish(agent)?;
    }
    Ok(())
}

fn logs_live(agent: &Subject) -> Result<(), Finding> {
    begin(agent, &format!("echo one; {}; echo two; exit 5", until("workload-live-go")))?;
    let mut session = read(agent, &LOGS)?;
    session.hear("one\n")?;
    agent.sh(": > workload-live-go")?.exits(0)?;
    session.hear("two\n")?;
    session.rest()?.exits(5)?;
    session.closed()
}

fn logs_from(agent: &Subject) -> Result<(), Finding> {
    begin(agent, "printf 0123456789")?;
    finish(agent)?;
    for (from, expected) in [(0, "0123456789"), (4, "456789"), (10, "")] {
        read(agent, &Control::WorkloadLogs { run: None, from: Some(from) })?.rest()?.prints(expected)?;
    }
    refused(&agent.control(&Control::WorkloadLogs { run: None, from: Some(11) })?, "11 of 10 bytes")
}

fn readers(agent: &Subject) -> Result<(), Finding> {
    begin(agent, &format!("echo one; {}; echo two", until("workload-readers-go")))?;
    let mut sessions = Vec::new();
    for _ in 0..10 {
        let mut session = read(agent, &LOGS)?;
        session.hear("one\n")?;
        sessions.push(session);
    }
    sessions.truncate(5);
    agent.sh(": > workload-readers-go")?.exits(0)?;
    for mut session in sessions {
        session.rest()?.prints("two\n")?;
    }
    Ok(())
}

/// More than an agent may be expected to keep, with a reader that read the first line and then nothing.
fn flooded(agent: &Subject, name: &str) -> Result<Session, Finding> {
    begin(agent, &format!("echo up; {}; head -c 4000000 /dev/zero; echo end", until(name)))?;
    let mut session = read(agent, &LOGS)?;
    session.hear("up\n")?;
    agent.sh(&format!(": > {name}"))?.exits(0)?;
    Ok(session)
}

fn unread(agent: &Subject) -> Result<(), Finding> {
    let _stuck = flooded(agent, "workload-unread-go")?;
    ensure(finish(agent)? == 0, || "another code".to_owned())
}

fn lost(agent: &Subject) -> Result<(), Finding> {
    const WRITTEN: u64 = 3 + 4_000_000 + 4;
    let slow = flooded(agent, "workload-lost-go")?;
    finish(agent)?;
    for (who, mut session, heard) in [("a late reader", read(agent, &LOGS)?, 0), ("a slow one", slow, 3)] {
        let seen = session.rest()?;
        seen.exits(0)?;
        let mut missing = 0;
        for frame in seen.frames.iter().filter(|frame| frame.kind == Kind::Lost) {
            missing += Lost::decode(&frame.payload)?.bytes;
        }
        let came = seen.stdout().len() as u64;
        ensure(heard + came + missing == WRITTEN, || format!("{who}: {heard} + {came} + {missing} lost of {WRITTEN}"))?;
        ensure(missing > 0, || format!("{who} got more than was kept"))?;
        ensure(seen.stdout().ends_with(b"\0end\n"), || format!("{who}: the newest bytes are missing"))?;
        let first = seen.frames.first();
        ensure(heard > 0 || first.is_some_and(|frame| frame.kind == Kind::Lost), || {
            format!("{who}: {} in place of LOST", describe(first))
        })?;
    }
    Ok(())
}

fn wait(agent: &Subject) -> Result<(), Finding> {
    begin(agent, &format!("echo one; {}; exit 9", until("workload-wait-go")))?;
    let (mut session, ack) = agent.stream(&WAIT)?;
    ensure(ack.ran_ms.is_some(), || "no ran_ms".to_owned())?;
    let early = session.next_within(Duration::from_millis(200))?;
    ensure(early.is_none(), || "a frame before the end".to_owned())?;
    agent.sh(": > workload-wait-go")?.exits(0)?;
    for mut session in [session, read(agent, &WAIT)?] {
        match session.next()? {
            Some(frame @ Frame { kind: Kind::Exit, .. }) => {
                let seen = describe(Some(&frame));
                ensure(seen == "EXIT 9", || seen)?;
            }
            other => return Err(Finding::new(format!("{} in place of EXIT", describe(other.as_ref())))),
        }
        session.closed()?;
    }
    Ok(())
}

fn outlives(agent: &Subject) -> Result<(), Finding> {
    begin(agent, &format!("trap 'echo hung up' HUP; echo one; {}; echo two", until("workload-outlives-go")))?;
    let mut reader = read(agent, &LOGS)?;
    reader.hear("one\n")?;
    drop((reader, read(agent, &WAIT)?));
    // As long as an agent may take to kill what a host has left.
    std::thread::sleep(Duration::from_secs(1));
    agent.sh(": > workload-outlives-go")?.exits(0)?;
    read(agent, &LOGS)?.rest()?.prints("one\ntwo\n")
}

fn daemon(agent: &Subject) -> Result<(), Finding> {
    begin(agent, &format!("({}; : > workload-daemon-went-on) & echo up; exit 6", until("workload-daemon-go")))?;
    let seen = read(agent, &LOGS)?.rest()?;
    seen.exits(6)?;
    same("stdout", &seen.stdout(), "up\n")?;
    agent.sh(": > workload-daemon-go")?.exits(0)?;
    agent.appears("workload-daemon-went-on")
}

fn signal(agent: &Subject) -> Result<(), Finding> {
    let life = agent.life("workload-signal-life")?;
    let ack = begin(agent, &format!("{} sleep 100 & echo up; wait; sleep 100", life.held()))?;
    read(agent, &LOGS)?.hear("up\n")?;
    let reached = agent.control(&Control::Signal { signum: 15, run: None })?;
    done(&reached)?;
    ensure(reached.pid == ack.pid, || format!("pid {:?}, expected {:?}", reached.pid, ack.pid))?;
    let code = finish(agent)?;
    ensure(code == 128 + 15, || format!("EXIT {code}"))?;
    life.ends()?;
    refused(&agent.control(&Control::Signal { signum: 0, run: None })?, "it has ended")
}

fn other_run(agent: &Subject) -> Result<(), Finding> {
    let old = begin(agent, "exit 0")?.run;
    let new = begin(agent, "exec sleep 100")?.run;
    for action in [
        Control::WorkloadLogs { run: old, from: None },
        Control::WorkloadWait { run: old },
        Control::Signal { signum: 9, run: old },
    ] {
        let ack = agent.control(&action)?;
        refused(&ack, "another run")?;
        ensure(ack.errno == ESRCH, || format!("errno {:?}", ack.errno))?;
    }
    done(&agent.control(&Control::Signal { signum: 9, run: new })?)?;
    let code = read(agent, &Control::WorkloadWait { run: new })?.rest()?.exit()?.code;
    ensure(code == 128 + 9, || format!("EXIT {code}"))?;
    clear(agent)
}
