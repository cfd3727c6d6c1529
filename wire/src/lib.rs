//! The exec wire protocol between kiln and its in-guest agent, without I/O.
//!
//! Owns the frame format and its parser ([`frame`]), the JSON of the REQUEST and CONTROL frames ([`request`],
//! [`control`]), the STARTED, LOST and EXIT payloads ([`started`], [`lost`], [`exit`]), the texts of the ERROR frame ([`failure`]), and the
//! boot configuration that the host puts into the agent's initramfs ([`boot`]). `docs/exec-protocol.md` is its specification. It opens no socket, reads no
//! clock and starts no process; both ends use the same code, so that they cannot disagree about a byte.
#![forbid(unsafe_code)]

pub mod boot;
#[cfg(feature = "codec")]
pub mod codec;
pub mod control;
pub mod exit;
pub mod failure;
pub mod frame;
pub mod lost;
pub mod request;
pub mod started;

/// The version of the protocol's table of frames and actions, as `probe` reports it.
pub const PROTOCOL: u32 = 5;

/// The vsock port on which the agent listens.
pub const AGENT_PORT: u32 = 1028;
