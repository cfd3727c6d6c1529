//! The conformance suite of the exec protocol (`docs/exec-protocol.md`): numbered cases for any agent and any host.
//!
//! [`agent::run`] plays the host against an agent behind a Unix socket, [`host::run`] plays the agent against a host
//! program. Each case is one observable sentence of the document, checked from outside, with blocking I/O and a deadline
//! on every wait. Nothing here uses the code under test; only the frames and the JSON are shared, in `kiln_wire`.

pub mod agent;
mod case;
pub mod host;
mod program;
mod report;
mod session;

pub use case::Case;
pub use case::Finding;
pub use program::CommandLine;
pub use report::Line;
pub use report::Only;
pub use report::Report;
pub use report::Verdict;
