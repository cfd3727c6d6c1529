//! STARTED, and what the agent says that it can do.

mod wire;

use kiln_wire::exit::Exit;
use kiln_wire::failure::Failure;
use kiln_wire::frame::Frame;
use kiln_wire::frame::Kind;
use kiln_wire::started::Started;
use wire::Agent;
use wire::Connection;
use wire::SmallDisk;
use wire::until;

fn all(mut connection: Connection) -> Vec<Frame> {
    std::iter::from_fn(|| connection.next()).collect()
}

fn kinds(frames: &[Frame]) -> Vec<Kind> {
    frames.iter().map(|frame| frame.kind).collect()
}

#[test]
fn probe_names_the_features() {
    let ack = Agent::start().ask(r#"{"action":"probe"}"#);
    assert_eq!((ack.ok, ack.protocol), (true, Some(kiln_wire::PROTOCOL)));
    assert_eq!(ack.features, ["started", "streams", "workload", "renew"]);
}

#[test]
fn started_is_the_first_frame_and_names_the_group() {
    let agent = Agent::start();
    let mut session = agent.request(r#"{"argv":["sh","-c","echo $$; read x"],"started":true}"#);
    let first = session.next().expect("a frame");
    assert_eq!(first.kind, Kind::Started);
    let pid = Started::decode(&first.payload).expect("valid").pid;
    assert_eq!(session.next().expect("a frame").payload, format!("{pid}\n").as_bytes());
    let group = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("it runs");
    let fields: Vec<_> = group.rsplit(") ").next().expect("fields").split_whitespace().collect();
    assert_eq!(fields[2], pid.to_string(), "it leads its group");
    // It comes although the process says nothing.
    let mut silent = agent.request(r#"{"argv":["sleep","1000"],"started":true}"#);
    assert_eq!(silent.next().expect("a frame").kind, Kind::Started);
}

#[test]
fn a_chain_is_started_once() {
    let agent = Agent::start();
    let frames = all(agent.request(r#"{"argv":["echo","1"],"chain":[["echo","2"],["echo","3"]],"started":true}"#));
    assert_eq!(frames.iter().filter(|frame| frame.kind == Kind::Started).count(), 1);
    assert_eq!(frames[0].kind, Kind::Started);
    assert_eq!(Exit::decode(&frames.last().expect("EXIT").payload).expect("valid").code, 0);
}

#[test]
fn nobody_is_told_who_did_not_ask() {
    let agent = Agent::start();
    assert_eq!(kinds(&all(agent.request(r#"{"argv":["true"]}"#))), [Kind::Exit]);
    assert_eq!(kinds(&all(agent.request(r#"{"argv":["true"],"started":false}"#))), [Kind::Exit]);
}

#[test]
fn what_does_not_run_has_not_started() {
    let agent = Agent::start();
    let frames = all(agent.request(r#"{"argv":["no-such-program"],"started":true}"#));
    assert_eq!(kinds(&frames), [Kind::Error]);
    assert_eq!(Failure::decode(&frames[0].payload), Failure::NotFound("no-such-program".to_owned()));
}

#[test]
fn a_file_that_cannot_be_staged_is_told_with_the_systems_number() {
    let agent = Agent::start();
    let disk = SmallDisk::new(agent.path("disk"), 64);
    let data = "AAAA".repeat(64 << 10);
    let staged = format!(r#"{{"argv":["true"],"stage_files":[{{"path":"disk/x","data_b64":"{data}"}}]}}"#);
    let failure = agent.request(&staged).failure();
    assert!(matches!(&failure, Failure::System { errno: 28, detail } if detail.contains("disk/x")), "{failure:?}");
    assert_eq!(wire::names(&agent.path("disk")), [""; 0]);
    drop(disk);
}

#[test]
fn a_hung_up_group_is_killed_even_when_its_leader_went_at_once() {
    let agent = Agent::start();
    // The leader ends at SIGHUP; its child ignores it and must be killed after the grace.
    let script = "(trap '' HUP; exec sleep 1000.801) & wait";
    let json = format!(r#"{{"argv":["sh","-c","{script}"],"started":true}}"#);
    let mut session = agent.request(&json);
    assert_eq!(session.next().expect("a frame").kind, Kind::Started);
    until("the child sleeps", || sleeps("1000.801"));
    drop(session);
    until("the child is killed", || !sleeps("1000.801"));
}

fn sleeps(marker: &str) -> bool {
    std::fs::read_dir("/proc").expect("mounted").flatten().any(|process| {
        let line = std::fs::read(process.path().join("cmdline")).unwrap_or_default();
        line.starts_with(b"sleep\0") && String::from_utf8_lossy(&line).contains(marker)
    })
}
