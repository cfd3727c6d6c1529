//! Streams opened by a CONTROL action: a file, a tree, a TCP connection.

use std::sync::Arc;
use std::time::Duration;

use kiln_wire::control::Control;
use kiln_wire::frame::Kind;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::exec::ExecError;
use crate::exec::ExecStdin;
use crate::exec::ExecStdout;
use crate::exec::driver::Mode;
use crate::exec::lanes::Lane;
use crate::exec::session;
use crate::exec::session::Progress;
use crate::exec::session::Session;
use crate::transport::Connector;

/// How long the agent may take to acknowledge a stream (10 s).
const OPEN_DEADLINE: Duration = Duration::from_secs(10);

/// An acknowledged stream. Dropping it closes the connection, at which the agent gives up whatever it does.
#[derive(Debug)]
pub(crate) struct StreamSession {
    /// Bytes to the guest; dropping or shutting it down is the end-of-file.
    pub(crate) input: ExecStdin,
    /// Bytes from the guest.
    pub(crate) output: ExecStdout,
    /// Of a file that is read: its size, in bytes.
    pub(crate) total_len: Option<u64>,
    /// How the stream goes on and ends.
    pub(crate) end: StreamEnd,
}

/// How a stream ends; holds its connection open.
#[derive(Debug)]
pub(crate) struct StreamEnd {
    state: Progress,
    let_go: CancellationToken,
    driver: Option<AbortOnDropHandle<()>>,
}

impl StreamEnd {
    /// Waits until the agent has done all that the stream asked for. Does not hold the connection open.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub(crate) fn done(&self) -> impl Future<Output = Result<(), ExecError>> + Send + 'static {
        let ended = self.state.clone().ended();
        async { ended.await.map(|_| ()) }
    }

    /// Has the stream go on without a holder, for five seconds at most, so that what is on its way to the guest arrives.
    pub(crate) fn let_go(&mut self) {
        if let Some(driver) = self.driver.take() {
            self.let_go.cancel();
            driver.detach();
        }
    }

    /// How it ended, if it has.
    pub(crate) fn try_done(&self) -> Option<Result<(), ExecError>> {
        self.state.try_ended().map(|ended| ended.map(|_| ())).transpose()
    }
}

impl StreamSession {
    /// Opens the stream that `action` asks for, within ten seconds.
    ///
    /// # Cancel safety
    /// Cancelled, the connection is closed.
    pub(crate) async fn open(connector: &dyn Connector, action: &Control) -> Result<Self, ExecError> {
        let opening = session::opening(Kind::Control, action)?;
        let opened = session::within(OPEN_DEADLINE, async {
            let stream = session::connect(connector, &opening).await?;
            let mut session = Session::new(stream, Mode::Stream, true, Instant::now(), None);
            Ok((session.state.started().await?, session))
        });
        let (start, Session { stdin, lanes, state, let_go, driver, .. }) = opened.await?;
        // Nothing comes on it; a reader that never reads must not count as one that may.
        lanes.close(Lane::Stderr);
        Ok(Self {
            input: stdin.ok_or(ExecError::Dropped)?,
            output: ExecStdout::new(Arc::clone(&lanes)),
            total_len: start.total_len,
            end: StreamEnd { state, let_go, driver: Some(driver) },
        })
    }
}
