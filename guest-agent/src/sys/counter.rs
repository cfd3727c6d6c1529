//! The processor's time stamp counter.

/// What it shows now; `None` where there is none.
#[cfg(target_arch = "x86_64")]
pub(crate) fn time_stamp() -> Option<u64> {
    // SAFETY: RDTSC is part of x86-64 and only reads. Nobody in the agent has the kernel forbid it (PR_SET_TSC).
    Some(unsafe { std::arch::x86_64::_rdtsc() })
}

#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn time_stamp() -> Option<u64> {
    None
}
