//! Reading a workload's logs, for the tests against a real guest and for those against an agent alone.
#![allow(unreachable_pub, reason = "a part of several test binaries")]

use std::time::Duration;

use futures::StreamExt;
use futures::TryStreamExt;
use kiln::WorkloadLog;
use kiln::WorkloadLogs;

/// No piece takes anywhere near as long, also on a busy machine.
const DEADLINE: Duration = Duration::from_secs(60);

/// Everything up to the end: both outputs, and how much is lost.
pub async fn all(logs: WorkloadLogs) -> (String, String, u64) {
    let (mut stdout, mut stderr, mut lost) = (Vec::new(), Vec::new(), 0);
    let pieces: Vec<_> = tokio::time::timeout(DEADLINE, logs.try_collect()).await.expect("an end").expect("no error");
    for piece in pieces {
        match piece {
            WorkloadLog::Stdout(bytes) => stdout.extend(bytes),
            WorkloadLog::Stderr(bytes) => stderr.extend(bytes),
            WorkloadLog::Lost { bytes } => lost += bytes,
            other => panic!("{other:?}"),
        }
    }
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("these tests print text");
    (text(stdout), text(stderr), lost)
}

/// Waits until standard output has brought `expected`.
pub async fn hear(logs: &mut WorkloadLogs, expected: &str) {
    let mut heard = Vec::new();
    while heard.len() < expected.len() {
        let piece = tokio::time::timeout(DEADLINE, logs.next()).await.expect("a piece in time");
        match piece.expect("not over").expect("no error") {
            WorkloadLog::Stdout(bytes) => heard.extend(bytes),
            // A shell may have something to say about the end of its children.
            WorkloadLog::Stderr(_) => {}
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(String::from_utf8_lossy(&heard), expected);
}
