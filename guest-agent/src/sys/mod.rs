//! The system calls that rustix does not offer safely, and nothing else: the agent's only `unsafe`.
//!
//! Each function here is safe to call; what the kernel requires is argued in place.
#![allow(unsafe_code, reason = "the fence around clone, wait4, signalfd, AF_VSOCK, the time stamp counter and ioctls")]

pub(crate) mod counter;
mod entry;
pub(crate) mod net;
pub(crate) mod process;
pub(crate) mod random;
pub(crate) mod signal;
