//! The workload, spoken to frame by frame: it belongs to the agent, and hosts come and go.

mod wire;

use kiln_wire::control::ControlAck;
use kiln_wire::exit::Exit;
use kiln_wire::frame::Kind;
use kiln_wire::lost::Lost;
use serde_json::Value;
use serde_json::json;
use wire::Agent;
use wire::Connection;
use wire::support::Gate;
use wire::support::gone;
use wire::support::started;
use wire::until;

/// Linux's numbers of the refusals.
const ESRCH: Option<i32> = Some(3);
const EBUSY: Option<i32> = Some(16);
const EINVAL: Option<i32> = Some(22);

/// What the agent keeps of what nobody reads.
const BACKLOG: usize = 256 << 10;

fn start_with(agent: &Agent, mut fields: Value) -> ControlAck {
    fields["action"] = "workload_start".into();
    agent.ask(&fields.to_string())
}

/// Starts a shell, and returns its pid and run.
fn start(agent: &Agent, script: &str) -> (u32, u64) {
    let ack = start_with(agent, json!({ "argv": ["sh", "-c", script] }));
    assert!(ack.ok, "{ack:?}");
    (ack.pid.expect("a pid"), ack.run.expect("a run"))
}

fn signal(agent: &Agent, signum: u8) -> ControlAck {
    agent.ask(&json!({ "action": "signal", "signum": signum }).to_string())
}

fn logs(agent: &Agent) -> Connection {
    agent.stream(r#"{"action":"workload_logs"}"#)
}

fn logs_from(agent: &Agent, from: u64) -> Connection {
    agent.stream(&json!({ "action": "workload_logs", "from": from }).to_string())
}

/// What a reader was sent.
#[derive(Debug, Default, PartialEq, Eq)]
struct Heard {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    lost: u64,
    code: u32,
}

impl Heard {
    fn take(&mut self, kind: Kind, payload: &[u8]) {
        match kind {
            Kind::Stdout => self.stdout.extend_from_slice(payload),
            Kind::Stderr => self.stderr.extend_from_slice(payload),
            Kind::Lost => self.lost += Lost::decode(payload).expect("valid").bytes,
            other => panic!("{other:?} in the logs"),
        }
    }

    fn offset(&self) -> u64 {
        self.lost + (self.stdout.len() + self.stderr.len()) as u64
    }
}

/// Everything up to EXIT, which is the last frame.
fn rest(mut connection: Connection) -> Heard {
    let mut heard = Heard::default();
    loop {
        let frame = connection.next().expect("EXIT comes before the end");
        if frame.kind == Kind::Exit {
            let exit = Exit::decode(&frame.payload).expect("valid");
            assert!(exit.peak_rss_kib.is_some_and(|kib| kib > 0), "{exit:?}");
            assert_eq!(connection.next(), None, "nothing follows EXIT");
            return Heard { code: exit.code, ..heard };
        }
        heard.take(frame.kind, &frame.payload);
    }
}

/// Waits until standard output has brought `expected`, and nothing else has come.
fn hear(connection: &mut Connection, expected: &str) {
    let mut heard = Heard::default();
    while heard.stdout.len() < expected.len() {
        let frame = connection.next().expect("output");
        heard.take(frame.kind, &frame.payload);
    }
    assert_eq!(String::from_utf8_lossy(&heard.stdout), expected);
    assert_eq!((heard.stderr.len(), heard.lost), (0, 0));
}

fn wait(agent: &Agent) -> u32 {
    let heard = rest(agent.stream(r#"{"action":"workload_wait"}"#));
    assert_eq!(heard.offset(), 0, "waiting brings no output: {heard:?}");
    heard.code
}

#[test]
fn it_gets_the_request_and_nothing_to_read() {
    let agent = Agent::start();
    std::fs::create_dir(agent.path("folder")).expect("made");
    let script = "cat; echo $FROM_AGENT $OURS; pwd; id -u; readlink /proc/self/fd/0; echo $$; exit 7";
    let fields = json!({
        "argv": ["sh", "-c", script], "env": { "OURS": "too" }, "cwd": "folder", "user": "4242:4343",
    });
    // The user has to get into the folder.
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(agent.path("."), open).expect("ours");
    let ack = start_with(&agent, fields);
    assert_eq!((ack.ok, ack.run), (true, Some(1)), "{ack:?}");
    let heard = rest(logs(&agent));
    let folder = agent.path("folder");
    let expected = format!("yes too\n{}\n4242\n/dev/null\n{}\n", folder.display(), ack.pid.expect("a pid"));
    assert_eq!(String::from_utf8_lossy(&heard.stdout), expected);
    assert_eq!((heard.stderr, heard.lost, heard.code), (Vec::new(), 0, 7));
    assert_eq!(wait(&agent), 7);
}

#[test]
fn there_is_one_at_a_time_and_another_after_it() {
    let agent = Agent::start();
    assert_eq!(agent.refused(r#"{"action":"workload_logs"}"#, ESRCH), "no such workload is running");
    assert_eq!(agent.refused(r#"{"action":"workload_wait"}"#, ESRCH), "no such workload is running");
    let (pid, run) = start(&agent, "exec sleep 1000");
    let again = r#"{"action":"workload_start","argv":["true"]}"#;
    assert_eq!(agent.refused(again, EBUSY), "a workload is running");
    let ack = signal(&agent, 9);
    assert_eq!((ack.ok, ack.pid, ack.run), (true, Some(pid), Some(run)));
    assert_eq!(wait(&agent), 128 + 9);
    assert!(!signal(&agent, 0).ok);

    let (_, second) = start(&agent, "echo second");
    assert_ne!(second, run);
    assert_eq!(rest(logs(&agent)).stdout, b"second\n");
    // Whoever means the first one is told, and not given the second.
    for action in ["workload_logs", "workload_wait"] {
        let stale = json!({ "action": action, "run": run }).to_string();
        assert_eq!(agent.refused(&stale, ESRCH), "no such workload is running");
        let current = json!({ "action": action, "run": second }).to_string();
        assert_eq!(rest(agent.stream(&current)).code, 0);
    }
}

#[test]
fn what_does_not_start_says_why_and_replaces_nothing() {
    let agent = Agent::start();
    start(&agent, "exit 3");
    assert_eq!(wait(&agent), 3);
    for (fields, head) in [
        (json!({ "argv": ["no-such-program"] }), "not found: "),
        (json!({ "argv": ["/"] }), "not executable: "),
        (json!({ "argv": ["true"], "cwd": "/no/such/folder" }), "bad cwd: "),
        (json!({ "argv": ["true"], "user": "nobody-here" }), "unknown user: "),
        (json!({ "argv": [] }), "bad request: "),
        (json!({ "argv": ["a\0b"] }), "bad request: "),
        (json!({ "argv": ["true"], "env": { "A=B": "c" } }), "bad request: "),
    ] {
        let ack = start_with(&agent, fields.clone());
        assert!(!ack.ok && ack.error.as_ref().is_some_and(|text| text.starts_with(head)), "{fields}: {ack:?}");
    }
    assert_eq!(wait(&agent), 3, "the one that ended is still there");
}

#[test]
fn every_byte_comes_in_order_to_every_reader_at_any_time() {
    let agent = Agent::start();
    let mut gate = Gate::new(&agent.path("gate"));
    let (_, run) = start(&agent, "echo one; echo two >&2; read x < gate; echo three; read x < gate; exit 5");
    let mut early = logs(&agent);
    let first = [early.next().expect("output"), early.next().expect("output")];
    assert_eq!(first.each_ref().map(|frame| frame.kind), [Kind::Stdout, Kind::Stderr]);
    assert_eq!(first.each_ref().map(|frame| &frame.payload[..]), [&b"one\n"[..], b"two\n"]);
    let mut left = logs(&agent);
    left.next().expect("output");
    drop(left);
    gate.open();
    hear(&mut early, "three\n");
    let late = logs(&agent);
    let from_the_middle = logs_from(&agent, 6);
    let from_the_end = logs_from(&agent, 14);
    gate.open();
    let all = Heard { stdout: b"one\nthree\n".to_vec(), stderr: b"two\n".to_vec(), lost: 0, code: 5 };
    assert_eq!(rest(early), Heard { code: 5, ..Heard::default() });
    assert_eq!(rest(late), all);
    assert_eq!(rest(logs(&agent)), all, "after its end");
    let expected = Heard { stdout: b"three\n".to_vec(), stderr: b"o\n".to_vec(), lost: 0, code: 5 };
    assert_eq!(rest(from_the_middle), expected);
    assert_eq!(rest(from_the_end), Heard { code: 5, ..Heard::default() });
    let beyond = json!({ "action": "workload_logs", "run": run, "from": 15 }).to_string();
    assert_eq!(agent.refused(&beyond, EINVAL), "only 14 bytes have been written");
}

#[test]
fn what_nobody_reads_holds_nothing_up_and_what_is_lost_is_told() {
    let agent = Agent::start();
    // More than pipes, sockets and the backlog hold together.
    let script = "head -c 8000000 /dev/zero; printf end; echo last >&2";
    let mut gate = Gate::new(&agent.path("gate"));
    start(&agent, &format!("read x < gate; {script}"));
    let stuck = logs(&agent);
    gate.open();
    assert_eq!(wait(&agent), 0);
    let heard = rest(logs(&agent));
    assert_eq!((heard.lost + heard.stdout.len() as u64, heard.stderr.len()), (8_000_003, 5));
    assert_eq!(heard.offset() - heard.lost, BACKLOG as u64);
    assert!(heard.stdout.ends_with(b"\0end"));
    // The reader that was stuck has some from the beginning, a gap, and the newest.
    let heard = rest(stuck);
    assert!(heard.lost > 0, "{}", heard.lost);
    assert_eq!(heard.offset(), 8_000_008);
    assert!(heard.stdout.ends_with(b"\0end"));
    assert_eq!(heard.stderr, b"last\n");
    // An offset in the gap is one whose bytes are lost.
    let heard = rest(logs_from(&agent, 1_000_000));
    assert_eq!(heard.lost, 8_000_008 - 1_000_000 - BACKLOG as u64);
}

#[test]
fn a_reader_that_keeps_up_loses_nothing() {
    let agent = Agent::start();
    let mut gate = Gate::new(&agent.path("gate"));
    start(&agent, "while read x; do head -c 100000 /dev/zero; done < gate; exit 1");
    let mut reader = logs(&agent);
    let mut heard = Heard::default();
    for round in 1..=30 {
        gate.open();
        while heard.stdout.len() < round * 100_000 {
            let frame = reader.next().expect("output");
            heard.take(frame.kind, &frame.payload);
        }
    }
    // Its end-of-file.
    drop(gate);
    assert_eq!((heard.lost, heard.stdout.len()), (0, 3_000_000));
    assert_eq!(rest(reader).code, 1);
}

#[test]
fn readers_of_a_run_that_was_replaced_still_get_its_end() {
    let agent = Agent::start();
    start(&agent, "head -c 250000 /dev/zero; exit 4");
    assert_eq!(wait(&agent), 4);
    // Nothing of it is read here before the next run is over.
    let old = logs(&agent);
    let waiting = agent.stream(r#"{"action":"workload_wait"}"#);
    start(&agent, "echo new; exit 5");
    assert_eq!(wait(&agent), 5);
    let heard = rest(old);
    assert_eq!((heard.stdout.len(), heard.lost, heard.code), (250_000, 0, 4));
    assert_eq!(rest(waiting).code, 4);
    assert_eq!(rest(logs(&agent)).stdout, b"new\n");
}

#[test]
fn signals_reach_the_whole_group_of_the_run_that_is_meant() {
    let agent = Agent::start();
    let (_, run) = start(&agent, "sleep 1000.901 & echo up; wait; sleep 1000.902");
    hear(&mut logs(&agent), "up\n");
    let aimed = |run| json!({ "action": "signal", "signum": 15, "run": run }).to_string();
    assert_eq!(agent.refused(&aimed(run + 1), ESRCH), "no such workload is running");
    assert_eq!(agent.refused(r#"{"action":"signal","signum":65}"#, EINVAL).split(' ').next(), Some("signal"));
    assert!(agent.ask(&aimed(run)).ok);
    assert_eq!(wait(&agent), 128 + 15);
    agent.block_on(gone("1000.901"));
    assert_eq!(agent.refused(&aimed(run), ESRCH), "no such workload is running");
}

#[test]
fn hosts_that_leave_take_nothing_along() {
    let agent = Agent::start();
    let mut gate = Gate::new(&agent.path("gate"));
    start(&agent, "trap 'echo hung up' HUP; echo up; read x < gate; echo over");
    let mut reader = logs(&agent);
    hear(&mut reader, "up\n");
    let waiting = agent.stream(r#"{"action":"workload_wait"}"#);
    drop((reader, waiting));
    // Their sockets are closed, so the agent has seen them leave; half a second later it would kill.
    agent.block_on(agent.0.idle());
    gate.open();
    assert_eq!(rest(logs(&agent)).stdout, b"up\nover\n");
}

#[test]
fn a_child_that_holds_the_outputs_does_not_hold_the_end() {
    let agent = Agent::start();
    start(&agent, "sleep 1000.903 & echo $!; exit 6");
    let heard = rest(logs(&agent));
    assert_eq!(heard.code, 6);
    agent.block_on(started("1000.903"));
    let pid = String::from_utf8_lossy(&heard.stdout).trim().parse().expect("its pid");
    let pid = rustix::process::Pid::from_raw(pid).expect("a pid");
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("it goes on");
}

#[test]
fn a_child_that_never_stops_writing_keeps_neither_the_end_nor_the_agent() {
    let agent = Agent::start();
    start(&agent, "yes flood-903 & exit 6");
    assert_eq!(wait(&agent), 6);
    assert_eq!(agent.request(r#"{"argv":["echo","hi"]}"#).output(), b"hi\n");
    // Its next byte meets a closed pipe.
    agent.block_on(gone("flood-903"));
}

#[test]
fn the_time_that_it_ran_is_told() {
    let agent = Agent::start();
    let mut gate = Gate::new(&agent.path("gate"));
    start(&agent, "read x < gate");
    let ran = || {
        let mut connection = agent.control(r#"{"action":"workload_wait"}"#);
        connection.ack().ran_ms.expect("told")
    };
    let first = ran();
    until("time passes for it", || ran() > first);
    gate.open();
    assert_eq!(wait(&agent), 0);
    let last = ran();
    assert!(last > first, "{last}");
    let began = std::time::Instant::now();
    until("time passes", || began.elapsed().as_millis() > 50);
    assert_eq!(ran(), last, "it has ended");
}

#[test]
fn an_agent_that_is_stopped_takes_it_along() {
    let agent = Agent::start();
    start(&agent, "echo up; exec sleep 1000.904");
    hear(&mut logs(&agent), "up\n");
    agent.block_on(started("1000.904"));
    let (runtime, folder) = (tokio::runtime::Runtime::new().expect("a runtime"), agent.stop());
    runtime.block_on(gone("1000.904"));
    drop(folder);
}
