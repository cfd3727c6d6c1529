//! Why there is no pool, or no VM from it.

use std::time::Duration;

use crate::vm::StartError;

/// Why a pool was not made. Nothing of it is left running then.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PoolError {
    /// A pool holds one VM at least, and not fewer than it keeps.
    #[error("a pool of {min} to {max} VMs cannot be")]
    Limits {
        /// How many it shall keep.
        min: usize,
        /// How many it may hold.
        max: usize,
    },
    /// One of the VMs that shall be there from the start did not start.
    #[error("a VM of the pool did not start")]
    Start(#[from] StartError),
}

/// Why a pool handed out no VM.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AcquireError {
    /// A VM did not start; this acquire was the first of those that were waiting.
    #[error("a VM of the pool did not start")]
    Start(#[from] StartError),
    /// None was free in time.
    #[error("no VM of the pool was free within {after:?}")]
    Timeout {
        /// How long was waited.
        after: Duration,
    },
    /// The pool was shut down, or its runtime was.
    #[error("the pool is closed")]
    Closed,
}
