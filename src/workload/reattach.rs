//! One run of the workload as the agent tells of it, over connections that may break.

use std::sync::Arc;
use std::sync::OnceLock;
use std::time::Duration;

use kiln_wire::control::Control;
use kiln_wire::control::ControlAck;

use crate::exec;
use crate::exec::ExecError;
use crate::exec::ExecExit;
use crate::exec::Frames;
use crate::exec::Link;
use crate::workload::ANSWER;
use crate::workload::ESRCH;

/// Connections in a row that may break before they have brought anything.
const BARREN: u32 = 5;

/// Before a connection that broke is made again.
const PAUSE: Duration = Duration::from_millis(50);

/// What all handles of a run share.
#[derive(Debug)]
pub(super) struct Run {
    pub(super) link: Link,
    pub(super) number: u64,
    pub(super) pid: u32,
    pub(super) stop_signal: u8,
    /// How it ended, once one of the handles has seen that.
    pub(super) exit: OnceLock<ExecExit>,
}

impl Run {
    /// Has the agent do `action`, which is about this run and opens a stream.
    pub(super) async fn follow(self: Arc<Self>, action: Control) -> Result<(ControlAck, Frames), ExecError> {
        let (ack, frames) = exec::ask(self.link.connector(), &action, ANSWER).await?;
        if ack.errno == Some(ESRCH) && !ack.ok {
            return Err(ExecError::Replaced);
        }
        Ok((exec::accepted(ack)?, frames))
    }
}

/// Counts the connections that break, so that an agent which only ever hangs up is not asked for ever.
#[derive(Debug, Default)]
pub(super) struct Losses(u32);

impl Losses {
    /// A connection brought something.
    pub(super) fn forget(&mut self) {
        self.0 = 0;
    }

    /// Whether to go on after `error`: how long to pause then, or the error again.
    pub(super) fn bear(&mut self, error: ExecError) -> Result<Duration, ExecError> {
        match error {
            // A guest that is gone refuses the next connection; one that was restored from a snapshot takes it.
            ExecError::AgentGone(_) if self.0 < BARREN => {
                self.0 += 1;
                Ok(PAUSE)
            }
            error => Err(error),
        }
    }
}
