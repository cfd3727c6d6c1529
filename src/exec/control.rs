//! CONTROL sessions: one action for the agent, one acknowledgement.

use std::time::Duration;
use std::time::SystemTime;
use std::time::UNIX_EPOCH;

use futures::StreamExt;
use kiln_wire::codec::FrameCodec;
use kiln_wire::control::Control;
use kiln_wire::control::ControlAck;
use kiln_wire::control::feature;
use kiln_wire::failure::Failure;
use kiln_wire::frame::Kind;
use tokio::time::Instant;
use tokio_util::codec::FramedRead;

use crate::exec::ExecError;
use crate::exec::session;
use crate::transport::Connector;
use crate::transport::GuestStream;

/// How long one probe of a booting guest may take before it is tried again.
const PROBE_ATTEMPT: Duration = Duration::from_secs(1);

/// Between two probes of a booting guest.
const PROBE_INTERVAL: Duration = Duration::from_millis(5);

/// What an agent says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct AgentInfo {
    /// The version of the protocol's table of frames and actions.
    pub protocol: u32,
    /// Whether it says when a process has started.
    pub tells_starts: bool,
    /// Whether it serves streams: files, trees and TCP connections.
    pub serves_streams: bool,
    /// Whether it owns a workload.
    pub owns_workload: bool,
}

impl AgentInfo {
    /// An agent that speaks `protocol` and has nothing beyond it.
    #[must_use]
    pub const fn new(protocol: u32) -> Self {
        Self { protocol, tells_starts: false, serves_streams: false, owns_workload: false }
    }
}

/// Asks the agent which protocol it speaks and what it can do.
///
/// # Errors
/// [`ExecError::Connect`], [`ExecError::AgentGone`] or [`ExecError::Timeout`] when it does not answer within `deadline`;
/// [`ExecError::Protocol`] when what answers is no agent.
///
/// # Cancel safety
/// Cancel safe.
pub async fn probe(connector: &dyn Connector, deadline: Duration) -> Result<AgentInfo, ExecError> {
    info(&control(connector, &Control::Probe, deadline).await?)
}

/// What an agent says of itself in its answer to `probe` or `renew`.
pub(super) fn info(ack: &ControlAck) -> Result<AgentInfo, ExecError> {
    let no_version = || ExecError::Protocol { detail: "the agent answered without a version".to_owned() };
    let protocol = ack.protocol.ok_or_else(no_version)?;
    let has = |feature| ack.features.iter().any(|found| found == feature);
    Ok(AgentInfo {
        protocol,
        tells_starts: has(feature::STARTED),
        serves_streams: has(feature::STREAMS),
        owns_workload: has(feature::WORKLOAD),
    })
}

/// Probes until the agent answers, as it will once the guest has booted.
///
/// # Errors
/// [`ExecError::Timeout`] when nothing answered within `deadline`; [`ExecError::Protocol`] at once when what answers is no agent.
///
/// # Cancel safety
/// Cancel safe.
pub async fn wait_ready(connector: &dyn Connector, deadline: Duration) -> Result<AgentInfo, ExecError> {
    // A deadline beyond what the clock can express never comes.
    let end = Instant::now().checked_add(deadline);
    loop {
        let left = end.map_or(deadline, |end| end.saturating_duration_since(Instant::now()));
        match probe(connector, left.min(PROBE_ATTEMPT)).await {
            Err(ExecError::Connect(_) | ExecError::AgentGone(_) | ExecError::Timeout { .. }) => {}
            answered => return answered,
        }
        if end.is_some_and(|end| Instant::now() + PROBE_INTERVAL >= end) {
            return Err(ExecError::Timeout { after: deadline });
        }
        tokio::time::sleep(PROBE_INTERVAL).await;
    }
}

/// Sets the guest's wall clock to the host's, as after a restore.
///
/// # Errors
/// As [`control`].
///
/// # Cancel safety
/// Cancelled, the clock was set or not.
pub async fn sync_time(connector: &dyn Connector, deadline: Duration) -> Result<(), ExecError> {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let host_unix_ns = u64::try_from(since_epoch.as_nanos()).unwrap_or(u64::MAX);
    control(connector, &Control::SyncTime { host_unix_ns }, deadline).await.map(|_| ())
}

/// Has the agent do `action`, which is none of those that open a stream.
///
/// # Errors
/// [`ExecError::System`] when the guest's system refused it, [`ExecError::Refused`] when the agent did; [`ExecError::Connect`],
/// [`ExecError::AgentGone`] or [`ExecError::Timeout`] when it does not answer within `deadline`; [`ExecError::Protocol`] when the answer
/// makes no sense.
///
/// # Cancel safety
/// Cancelled, the action was done or not.
pub async fn control(connector: &dyn Connector, action: &Control, deadline: Duration) -> Result<ControlAck, ExecError> {
    if action.opens_stream() {
        return Err(ExecError::BadRequest { detail: "the action opens a stream".to_owned() });
    }
    let (ack, _) = ask(connector, action, deadline).await?;
    accepted(ack)
}

/// What follows the acknowledgement of an action; long STDOUT and STDERR frames come in pieces.
pub(crate) type Frames = FramedRead<Box<dyn GuestStream>, FrameCodec>;

/// The agent's answer to `action`, whatever it is, and the frames after it, for which nobody has set a deadline yet.
///
/// # Cancel safety
/// Cancelled, the action was done or not; dropping the frames closes the connection.
pub(crate) async fn ask(
    connector: &dyn Connector,
    action: &Control,
    deadline: Duration,
) -> Result<(ControlAck, Frames), ExecError> {
    session::within(deadline, exchange(connector, action)).await
}

/// An acknowledgement that is one, or why the action was refused.
pub(crate) fn accepted(ack: ControlAck) -> Result<ControlAck, ExecError> {
    if ack.ok {
        return Ok(ack);
    }
    let text = ack.error.unwrap_or_else(|| "no reason given".to_owned());
    Err(match ack.errno {
        Some(errno) => ExecError::System { errno, detail: text },
        None => ExecError::Refused { text },
    })
}

async fn exchange(connector: &dyn Connector, action: &Control) -> Result<(ControlAck, Frames), ExecError> {
    let opening = session::opening(Kind::Control, action)?;
    let stream = session::connect(connector, &opening).await?;
    let mut frames = FramedRead::new(stream, FrameCodec::streaming());
    let frame = frames.next().await.ok_or_else(ExecError::hung_up)?.map_err(ExecError::gone)?;
    match frame.kind {
        Kind::Control => match serde_json::from_slice(&frame.payload) {
            Ok(ack) => Ok((ack, frames)),
            Err(error) => Err(ExecError::Protocol { detail: error.to_string() }),
        },
        Kind::Error => Err(Failure::decode(&frame.payload).into()),
        other => Err(ExecError::Protocol { detail: format!("unexpected {other:?} frame") }),
    }
}
