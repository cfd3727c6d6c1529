//! CONTROL sessions: one action for the agent, one acknowledgement.

use std::time::Duration;
use std::time::SystemTime;
use std::time::UNIX_EPOCH;

use bytes::BytesMut;
use futures::StreamExt;
use kiln_wire::codec::FrameCodec;
use kiln_wire::control::Control;
use kiln_wire::control::ControlAck;
use kiln_wire::failure::Failure;
use kiln_wire::frame::Frame;
use kiln_wire::frame::Kind;
use tokio::time::Instant;
use tokio_util::codec::FramedRead;

use crate::exec::ExecError;
use crate::exec::builder;
use crate::transport::Connector;

/// How long one probe of a booting guest may take before it is tried again.
const PROBE_ATTEMPT: Duration = Duration::from_secs(1);

/// Between two probes of a booting guest.
const PROBE_INTERVAL: Duration = Duration::from_millis(5);

/// Asks the agent which protocol it speaks.
///
/// # Errors
/// [`ExecError::Connect`], [`ExecError::AgentGone`] or [`ExecError::Timeout`] when it does not answer within `deadline`;
/// [`ExecError::Protocol`] when what answers is no agent.
///
/// # Cancel safety
/// Cancel safe.
pub async fn probe(connector: &dyn Connector, deadline: Duration) -> Result<u32, ExecError> {
    let ack = control(connector, &Control::Probe, deadline).await?;
    ack.protocol.ok_or_else(|| ExecError::Protocol { detail: "probe answered without a version".to_owned() })
}

/// Probes until the agent answers, as it will once the guest has booted, and returns the protocol it speaks.
///
/// # Errors
/// [`ExecError::Timeout`] when nothing answered within `deadline`; [`ExecError::Protocol`] at once when what answers is no agent.
///
/// # Cancel safety
/// Cancel safe.
pub async fn wait_ready(connector: &dyn Connector, deadline: Duration) -> Result<u32, ExecError> {
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

/// Has the agent do `action`.
///
/// # Errors
/// [`ExecError::Refused`] when it did not do it; [`ExecError::Connect`], [`ExecError::AgentGone`] or [`ExecError::Timeout`] when it
/// does not answer within `deadline`; [`ExecError::Protocol`] when the answer makes no sense.
///
/// # Cancel safety
/// Cancelled, the action was done or not.
pub async fn control(connector: &dyn Connector, action: &Control, deadline: Duration) -> Result<ControlAck, ExecError> {
    let bad = |detail: String| ExecError::BadRequest { detail };
    let json = serde_json::to_vec(action).map_err(|error| bad(error.to_string()))?;
    let mut opening = BytesMut::new();
    Frame::new(Kind::Control, json).encode(&mut opening).map_err(|error| bad(error.to_string()))?;
    let answer = tokio::time::timeout(deadline, exchange(connector, &opening)).await;
    let ack = answer.unwrap_or(Err(ExecError::Timeout { after: deadline }))?;
    match ack {
        ControlAck { ok: true, .. } => Ok(ack),
        ControlAck { error, .. } => {
            Err(ExecError::Refused { text: error.unwrap_or_else(|| "no reason given".to_owned()) })
        }
    }
}

async fn exchange(connector: &dyn Connector, opening: &[u8]) -> Result<ControlAck, ExecError> {
    let stream = builder::open(connector, opening).await?;
    let mut frames = FramedRead::new(stream, FrameCodec::streaming());
    let frame = frames.next().await.ok_or_else(ExecError::hung_up)?.map_err(ExecError::gone)?;
    match frame.kind {
        Kind::Control => {
            serde_json::from_slice(&frame.payload).map_err(|error| ExecError::Protocol { detail: error.to_string() })
        }
        Kind::Error => Err(Failure::decode(&frame.payload).into()),
        other => Err(ExecError::Protocol { detail: format!("unexpected {other:?} frame") }),
    }
}
