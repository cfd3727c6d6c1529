//! CONTROL: one action, one answer.

use std::time::SystemTime;
use std::time::UNIX_EPOCH;

use kiln_wire::control::Control;
use kiln_wire::frame::Kind;

use super::Subject;
use super::subject::ELSEWHERE;
use super::subject::answer;
use super::subject::done;
use super::subject::refused;
use crate::case::Case;
use crate::case::Finding;
use crate::case::ensure;

pub(super) const CASES: &[Case<Subject>] = &[
    Case::new("A74", "probe tells protocol 5", probe),
    Case::new("A75", "an action is answered once, and the agent closes", once),
    Case::new("A76", "an unknown action is refused as unknown CONTROL action", unknown_action),
    Case::new("A77", "malformed JSON is refused in an answer", malformed),
    Case::new("A78", "unknown fields of an action are ignored", unknown_fields),
    Case::new("A79", "signal has a pid, or is refused while there is no main process", signal),
    Case::new("A80", "sync is done", sync),
    Case::new("A81", "sync_time and drop_vfs_caches are done", clock_and_caches).requires(&[ELSEWHERE]),
];

fn probe(agent: &Subject) -> Result<(), Finding> {
    let ack = agent.control(&Control::Probe)?;
    done(&ack)?;
    ensure(ack.protocol == Some(5), || format!("protocol {:?}", ack.protocol))
}

fn once(agent: &Subject) -> Result<(), Finding> {
    let mut session = agent.open()?;
    session.send(Kind::Control, &br#"{"action":"probe"}"#[..])?;
    done(&answer(&mut session)?)?;
    session.closed()
}

fn unknown_action(agent: &Subject) -> Result<(), Finding> {
    let ack = agent.control_json(r#"{"action":"kiln_no_such_action","path":"/"}"#)?;
    let words = ack.error.clone().unwrap_or_default();
    ensure(!ack.ok && words == "unknown CONTROL action", || format!("ok {}, error {words:?}", ack.ok))
}

fn malformed(agent: &Subject) -> Result<(), Finding> {
    for json in ["", "not json", "[]", "{}", r#"{"action":"probe""#, r#"{"action":"write_file"}"#] {
        refused(&agent.control_json(json)?, json)?;
    }
    Ok(())
}

fn unknown_fields(agent: &Subject) -> Result<(), Finding> {
    done(&agent.control_json(r#"{"action":"probe","future":[1,{"deep":null}]}"#)?)
}

fn signal(agent: &Subject) -> Result<(), Finding> {
    // Signal 0 reaches a process without doing anything to it.
    let ack = agent.control(&Control::Signal { signum: 0, run: None })?;
    if ack.ok { ensure(ack.pid.is_some(), || "done, and no pid".to_owned()) } else { refused(&ack, "") }
}

fn sync(agent: &Subject) -> Result<(), Finding> {
    done(&agent.control(&Control::Sync)?)
}

fn clock_and_caches(agent: &Subject) -> Result<(), Finding> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
    let host_unix_ns = u64::try_from(now.as_nanos())?;
    done(&agent.control(&Control::SyncTime { host_unix_ns })?)?;
    let printed = agent.sh("date +%s")?.stdout();
    let seconds: u64 = String::from_utf8_lossy(&printed).trim().parse()?;
    ensure(seconds.abs_diff(now.as_secs()) < 30, || format!("the clock says {seconds}, not {}", now.as_secs()))?;
    done(&agent.control(&Control::DropVfsCaches)?)
}
