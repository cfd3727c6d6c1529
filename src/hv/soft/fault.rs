//! What can stop an instruction before it completes.

/// An exception to be delivered to the guest (Intel SDM volume 3A, section 7.15).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Exception {
    pub(super) vector: u8,
    /// Pushed on the handler's stack by the vectors that have one.
    pub(super) error: Option<u32>,
    /// The faulting linear address, for page faults.
    pub(super) cr2: Option<u64>,
}

/// Page-fault error code: the page was present, so the access broke a protection.
pub(super) const PF_PRESENT: u32 = 1 << 0;
/// Page-fault error code: a write.
pub(super) const PF_WRITE: u32 = 1 << 1;
/// Page-fault error code: in user mode.
pub(super) const PF_USER: u32 = 1 << 2;
/// Page-fault error code: a reserved bit was set in a paging entry.
pub(super) const PF_RESERVED: u32 = 1 << 3;
/// Page-fault error code: an instruction fetch.
pub(super) const PF_FETCH: u32 = 1 << 4;

impl Exception {
    const fn plain(vector: u8) -> Self {
        Self { vector, error: None, cr2: None }
    }
    const fn with_code(vector: u8, error: u32) -> Self {
        Self { vector, error: Some(error), cr2: None }
    }
    pub(super) const DIVIDE: Self = Self::plain(0);
    pub(super) const DEBUG: Self = Self::plain(1);
    pub(super) const NMI: Self = Self::plain(2);
    pub(super) const BOUND: Self = Self::plain(5);
    pub(super) const INVALID_OPCODE: Self = Self::plain(6);
    pub(super) const NO_FPU: Self = Self::plain(7);
    pub(super) const X87: Self = Self::plain(16);
    pub(super) const SIMD: Self = Self::plain(19);
    pub(super) const DOUBLE: Self = Self::with_code(8, 0);

    pub(super) const fn invalid_tss(code: u32) -> Self {
        Self::with_code(10, code)
    }
    pub(super) const fn not_present(code: u32) -> Self {
        Self::with_code(11, code)
    }
    pub(super) const fn stack(code: u32) -> Self {
        Self::with_code(12, code)
    }
    pub(super) const fn general_protection(code: u32) -> Self {
        Self::with_code(13, code)
    }
    pub(super) const fn page(address: u64, code: u32) -> Self {
        Self { vector: 14, error: Some(code), cr2: Some(address) }
    }
}

/// Why an instruction did not complete. Nothing that it would have changed has changed, but for what
/// the architecture says is visible (the finished iterations of a repeated string instruction).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stop {
    /// The guest gets an exception.
    Fault(Exception),
    /// The engine cannot do this: a typed error for the host, never a wrong result for the guest.
    Unimplemented(&'static str),
}

impl From<Exception> for Stop {
    fn from(exception: Exception) -> Self {
        Self::Fault(exception)
    }
}

/// Where execution goes after an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flow {
    /// To the next instruction.
    Next,
    /// To `Cpu::rip`, which the instruction has set.
    Jump,
    /// To `Cpu::rip`, but something else changed that the run loop must look at first: interrupts
    /// may have become deliverable, or how addresses or instructions are understood has changed.
    Sync,
    /// To `Cpu::rip`, after as much work as a slice is: it is time for a look at everything, the clock too.
    Again,
    /// Sleep until an interrupt (HLT); `Cpu::rip` is after it.
    Halt,
}
