//! x87, MMX and SSE: state and instructions.

/// x87, MMX and SSE registers.
#[derive(Clone, Debug)]
pub(super) struct FpuState {
    pub(super) xmm: [u128; 16],
    pub(super) mxcsr: u32,
}

impl FpuState {
    pub(super) fn save(&self) -> crate::hv::state::x86_64::Fpu {
        Default::default()
    }
    pub(super) fn restore(_: &crate::hv::state::x86_64::Fpu) -> Self {
        Self { xmm: [0; 16], mxcsr: 0x1f80 }
    }
}
pub(super) fn executor(_: &iced_x86::Instruction) -> Option<super::exec::Executor> {
    Some(|_, _| Ok(super::fault::Flow::Next))
}
