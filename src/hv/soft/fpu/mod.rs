//! x87, MMX and SSE: state and instructions.

/// x87, MMX and SSE registers.
#[derive(Clone, Debug)]
pub(super) struct FpuState {
    pub(super) xmm: [u128; 16],
    pub(super) mxcsr: u32,
}
