//! Renew: what a guest is told when it goes on from a snapshot.

use std::time::SystemTime;
use std::time::UNIX_EPOCH;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use kiln_wire::control::Control;
use kiln_wire::control::feature::RENEW;

use super::Subject;
use super::subject::ELSEWHERE;
use super::subject::done;
use super::subject::refused;
use crate::case::Case;
use crate::case::Finding;
use crate::case::ensure;

/// Linux's number for an argument that makes no sense.
const EINVAL: i32 = 22;

pub(super) const CASES: &[Case<Subject>] = &[
    Case::new("A133", "renew with a field that makes no sense is refused with errno 22", nonsense).requires(&[RENEW]),
    Case::new("A134", "renew sets clock, host name and machine id, and answers as probe does", renew)
        .requires(&[RENEW, ELSEWHERE]),
];

fn entropy(bytes: usize) -> String {
    STANDARD.encode(vec![7; bytes])
}

fn nonsense(agent: &Subject) -> Result<(), Finding> {
    let good = entropy(32);
    let fields = [
        r#""entropy_b64":"not base64!""#.to_owned(),
        format!(r#""entropy_b64":"{}""#, entropy(31)),
        format!(r#""entropy_b64":"{}""#, entropy(513)),
        format!(r#""entropy_b64":"{good}","machine_id":"0123""#),
        format!(r#""entropy_b64":"{good}","machine_id":"{}""#, "A".repeat(32)),
        format!(r#""entropy_b64":"{good}","hostname":"""#),
        format!(r#""entropy_b64":"{good}","hostname":"{}""#, "h".repeat(65)),
    ];
    for fields in fields {
        let ack = agent.control_json(&format!(r#"{{"action":"renew","host_unix_ns":0,{fields}}}"#))?;
        refused(&ack, &fields)?;
        ensure(ack.errno == Some(EINVAL), || format!("errno {:?} for {fields}", ack.errno))?;
    }
    refused(&agent.control_json(r#"{"action":"renew","host_unix_ns":0}"#)?, "no entropy")
}

fn renew(agent: &Subject) -> Result<(), Finding> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
    let id = "0123456789abcdef0123456789abcdef";
    let action = Control::Renew {
        host_unix_ns: u64::try_from(now.as_nanos())?,
        tsc: None,
        entropy_b64: entropy(64),
        hostname: Some("renewed".to_owned()),
        machine_id: Some(id.to_owned()),
    };
    let ack = agent.control(&action)?;
    done(&ack)?;
    ensure(ack.protocol == Some(5), || format!("protocol {:?}", ack.protocol))?;
    ensure(ack.features.iter().any(|feature| feature == RENEW), || format!("features {:?}", ack.features))?;
    let printed = agent.sh("hostname; cat /etc/machine-id; date +%s")?.stdout();
    let printed = String::from_utf8_lossy(&printed).into_owned();
    let seconds = printed.strip_prefix(&format!("renewed\n{id}\n")).and_then(|rest| rest.trim().parse::<u64>().ok());
    let right = seconds.is_some_and(|seconds| seconds.abs_diff(now.as_secs()) < 30);
    ensure(right, || format!("the guest says {printed:?} at {}", now.as_secs()))
}
