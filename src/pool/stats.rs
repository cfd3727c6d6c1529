//! What a pool tells about itself.

/// A pool at one moment, and what it has done since it was made.
///
/// `idle + starting + in_use + stopping` never exceeds the pool's maximum.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PoolStats {
    /// VMs that are ready and wait for a user.
    pub idle: usize,
    /// VMs that are being started.
    pub starting: usize,
    /// VMs that are with a user, or on the way to one.
    pub in_use: usize,
    /// VMs that are being stopped; their memory is still theirs.
    pub stopping: usize,
    /// Acquires that wait for a VM.
    pub waiting: usize,
    /// VMs that started.
    pub started: u64,
    /// VMs that users got; one that was given to several counts each time.
    pub handed_out: u64,
    /// VMs that ended by themselves: while they were idle, or with their user.
    pub crashed: u64,
    /// VMs that were stopped because their user was done with them.
    pub discarded: u64,
    /// VMs that were stopped because nobody had needed them for long enough.
    pub expired: u64,
    /// Starts that failed.
    pub failed_starts: u64,
    /// Acquires whose time was up.
    pub timed_out: u64,
}
