//! Signals to a process that somebody else holds.

use std::time::Duration;

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::exec::ExecError;
use crate::exec::driver::Message;

/// How long a signal may wait for its place behind others that the connection does not take (10 s).
const SEND_DEADLINE: Duration = Duration::from_secs(10);

/// Sends signals to a process while another task waits for it or reads its events.
///
/// Does not keep the process alive: once its [`ExecChild`](crate::exec::ExecChild) is dropped, signals go nowhere.
#[derive(Clone, Debug)]
pub struct ExecSignaller {
    messages: mpsc::Sender<Message>,
    kill: CancellationToken,
}

impl ExecSignaller {
    pub(crate) fn new(messages: mpsc::Sender<Message>, kill: CancellationToken) -> Self {
        Self { messages, kill }
    }

    /// Sends signal `number` to the whole process group.
    ///
    /// A signal is sent after the input that was already handed to the agent. While the process does not read its input and more than the agent
    /// buffers (128 KiB and a pipe) is waiting, a signal waits too; [`kill`](Self::kill) does not: after five seconds it closes the
    /// connection, at which the agent kills the group.
    ///
    /// # Errors
    /// [`ExecError::Ended`] when the process has ended; [`ExecError::Timeout`] when sixteen earlier signals have been waiting for the
    /// connection for ten seconds.
    ///
    /// # Cancel safety
    /// Cancelled, the signal was either queued or not.
    pub async fn signal(&self, number: u8) -> Result<(), ExecError> {
        self.send(Message::Signal(number)).await
    }

    /// Tells the process's terminal its size, in characters; ignored without a terminal.
    ///
    /// # Errors
    /// As [`signal`](Self::signal).
    ///
    /// # Cancel safety
    /// Cancelled, the size was either queued or not.
    pub async fn resize(&self, cols: u16, rows: u16) -> Result<(), ExecError> {
        self.send(Message::Resize(cols, rows)).await
    }

    /// Starts to kill the process group with SIGKILL; does nothing when it has ended.
    pub fn kill(&self) {
        self.kill.cancel();
    }

    async fn send(&self, message: Message) -> Result<(), ExecError> {
        let sent = tokio::time::timeout(SEND_DEADLINE, self.messages.send(message)).await;
        sent.map_err(|_| ExecError::Timeout { after: SEND_DEADLINE })?.map_err(|_| ExecError::Ended)
    }
}
