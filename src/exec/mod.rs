//! Running commands in a guest, with the habits of `tokio::process`.
//!
//! [`ExecBuilder`] connects to the agent, sends the request and returns an [`ExecChild`] whose `stdin`, `stdout` and
//! `stderr` are async handles. The layer speaks the protocol of `docs/exec-protocol.md` over any
//! [`Connector`](crate::transport::Connector): a VM's vsock, a Unix socket, an in-memory stream. It never learns which, and never asks
//! for more than a byte stream.
//!
//! ```text
//!   ExecStdin ──(bounded channel)──> ┌────────┐ ──frames──> agent
//!   signal, kill ──────────────────> │ driver │
//!   ExecStdout/Stderr <──(lanes)──── └────────┘ <──frames── agent
//!     or ExecEvents      wait <──(state)──┘
//! ```
//! One driver task a session owns the stream. Everything between it and the handles is bounded:
//!
//! - **Output that is not read** waits in a buffer of 256 KiB for each of the two outputs, then in the agent, then in the pipe, and then the
//!   process blocks: a slow reader loses nothing and slows nobody else.
//! - **While [`wait`](ExecChild::wait) runs**, an output whose handle is still inside the child keeps its first 256 KiB and drops the rest.
//! - **An output that nobody ever read** while somebody waits for the other one is treated alike, since the process
//!   could otherwise block for ever. Reading such an output afterwards gives what was kept and then an error of kind
//!   `Other`, never a silent gap. A handle that is dropped drops its bytes.
//! - **[`ExecEvents`]** takes both outputs in the order of their arrival, and holds the process back like any slow reader.
//! - **After a kill or a timeout** up to 4 MiB more are buffered for each output, so that an unread output does not keep the end away.
//!
//! # Dropping
//! Nothing here waits when it is dropped, in a runtime or outside one, and the order does not matter. A child, or the events made of
//! it, takes its process along ([`kill_on_drop`](ExecBuilder::kill_on_drop)); handles that were taken from it then read an error of kind `BrokenPipe`,
//! never an end-of-file. A runtime that goes takes its sessions along, and a VM its processes.
//!
//! # Deadlines
//! Connecting takes ten seconds at most and a start thirty; a [`timeout`](ExecBuilder::timeout) holds for everything from `spawn` to the exit. Without one,
//! waiting for a process or reading from it takes as long as the process does, and ends with the guest.
mod builder;
mod child;
mod control;
mod driver;
mod error;
mod events;
mod lanes;
mod link;
mod outcome;
mod renew;
mod session;
mod signaller;
mod socket;
mod stdio;
mod stream;
mod unix;

pub use builder::ExecBuilder;
pub use child::ExecChild;
pub use control::AgentInfo;
pub use control::control;
pub use control::probe;
pub use control::sync_time;
pub use control::wait_ready;
pub use error::ExecError;
pub use events::ExecEvent;
pub use events::ExecEvents;
pub use kiln_wire::control::Control;
pub use kiln_wire::control::ControlAck;
pub use outcome::ExecExit;
pub use outcome::ExecOutcome;
pub use renew::Renewal;
pub use renew::renew;
pub use signaller::ExecSignaller;
pub use socket::ExecSocket;
pub use stdio::ExecStderr;
pub use stdio::ExecStdin;
pub use stdio::ExecStdout;
pub use unix::UnixConnector;

pub(crate) use control::Frames;
pub(crate) use control::accepted;
pub(crate) use control::ask;
pub(crate) use link::Link;
pub(crate) use session::within;
pub(crate) use stream::StreamEnd;
pub(crate) use stream::StreamSession;
