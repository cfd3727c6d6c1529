//! What a guest that goes on from a snapshot, or as a clone, is told before anything else.

use std::time::Duration;
use std::time::SystemTime;
use std::time::UNIX_EPOCH;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use kiln_wire::control::Control;
use kiln_wire::control::TimeStamp;

use crate::exec::AgentInfo;
use crate::exec::ExecError;
use crate::exec::control;
use crate::transport::Connector;
use crate::units::GuestTime;

/// Random bytes for a guest: twice what the key of its generator has.
const ENTROPY: usize = 64;

/// The time and the names to give a guest; [`renew`] adds entropy, which is never given twice.
#[derive(Clone, Debug, Default)]
#[must_use = "it does nothing until it is sent"]
pub struct Renewal {
    time: Option<GuestTime>,
    hostname: Option<String>,
    machine_id: Option<String>,
}

impl Renewal {
    /// With a reading of the guest's time stamp counter the guest's clock becomes as right as that is, however long the
    /// message is on its way; without, it is late by that way.
    pub fn new(time: Option<GuestTime>) -> Self {
        Self { time, ..Self::default() }
    }

    /// The host name, at most 64 bytes; else it stays.
    pub fn hostname(mut self, name: impl Into<String>) -> Self {
        self.hostname = Some(name.into());
        self
    }

    /// The content of `/etc/machine-id`, 32 lowercase hexadecimal digits; else it stays.
    pub fn machine_id(mut self, id: impl Into<String>) -> Self {
        self.machine_id = Some(id.into());
        self
    }

    fn into_action(self) -> Result<Control, getrandom::Error> {
        let mut entropy = [0; ENTROPY];
        getrandom::fill(&mut entropy)?;
        let at = self.time.map_or_else(SystemTime::now, |time| time.at);
        // 584 years fit.
        let host_unix_ns = at.duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos() as u64;
        Ok(Control::Renew {
            host_unix_ns,
            tsc: self.time.map(|GuestTime { ticks, hz, .. }| TimeStamp { ticks, hz }),
            entropy_b64: STANDARD.encode(entropy),
            hostname: self.hostname,
            machine_id: self.machine_id,
        })
    }
}

/// Sets the guest's clock and names, and has its random number generator start afresh. Returns what the agent says of
/// itself: it is alive.
///
/// # Errors
/// [`ExecError::System`] when the guest's system refused a part of it; [`ExecError::Refused`] by an agent that does not know
/// this; [`ExecError::Connect`], [`ExecError::AgentGone`] or [`ExecError::Timeout`] when it does not answer within
/// `deadline`.
///
/// # Cancel safety
/// Cancelled, it was done or not.
///
/// # Examples
/// ```no_run
/// # async fn f(machine: kiln::vmm::Machine) -> Result<(), kiln::ExecError> {
/// use kiln::exec::{Renewal, renew};
/// let renewal = Renewal::new(machine.guest_time()).hostname("worker-7");
/// renew(machine.connector(), renewal, std::time::Duration::from_secs(5)).await?;
/// # Ok(()) }
/// ```
pub async fn renew(connector: &dyn Connector, renewal: Renewal, deadline: Duration) -> Result<AgentInfo, ExecError> {
    let bad = |error: getrandom::Error| ExecError::BadRequest { detail: format!("the host has no entropy: {error}") };
    let ack = control::control(connector, &renewal.into_action().map_err(bad)?, deadline).await?;
    control::info(&ack)
}
