//! x87, MMX, SSE and SSE2: state and instructions, complete for a processor whose CPUID shows these and no later
//! extension (Intel SDM volume 1, chapters 8 to 11).
//!
//! Arithmetic is done in integers ([`real`]) so that values, NaNs and exception flags are the same on every host;
//! the SSE forms use host floating point where that provably gives the same. Where vendors differ, AMD's Zen 4 was
//! the model. What belongs to other modules: fences, PAUSE, CLFLUSH, prefetches and MOVNTI.

mod access;
mod extended;
mod fxsave;
mod lane;
mod mxcsr;
mod real;
mod sse_convert;
mod sse_fp;
mod sse_int;
mod sse_move;
mod wide;
mod x87;
mod x87_arith;
mod x87_compare;
mod x87_control;
mod x87_move;
mod x87_transcendental;

use iced_x86::CpuidFeature;
use iced_x86::Instruction;
use iced_x86::Mnemonic;

use crate::hv::state::x86_64::Fpu;

use super::exec::Executor;

use extended::Extended;
use x87::X87;

/// x87, MMX and SSE registers.
#[derive(Clone, Debug)]
pub(super) struct FpuState {
    pub(super) xmm: [u128; 16],
    pub(super) mxcsr: u32,
    x87: X87,
}

impl FpuState {
    /// The state after reset and FNINIT.
    pub(super) fn new() -> Self {
        Self { xmm: [0; 16], mxcsr: mxcsr::RESET, x87: X87::new() }
    }

    /// The architectural state. The selectors beside the x87 pointers are not part of it, as in FXSAVE64.
    pub(super) fn save(&self) -> Fpu {
        let pointers = self.x87.pointers;
        Fpu {
            fcw: self.x87.control,
            fsw: self.x87.status_word(),
            ftw: self.x87.valid,
            fop: pointers.opcode,
            fip: pointers.ip,
            fdp: pointers.dp,
            st: std::array::from_fn(|i| {
                let value = self.x87.raw(i as u8);
                (value.sig, value.se)
            }),
            mxcsr: self.mxcsr,
            xmm: self.xmm.map(lane::qwords),
        }
    }

    /// State from outside; bits that no instruction could have set are dropped.
    pub(super) fn restore(state: &Fpu) -> Self {
        let mut x87 = X87::new();
        x87.set_control(state.fcw);
        x87.set_status_word(state.fsw);
        x87.valid = state.ftw;
        x87.pointers =
            x87::Pointers { opcode: state.fop & 0x7ff, ip: state.fip, dp: state.fdp, ..x87::Pointers::default() };
        for (i, &(sig, se)) in (0..).zip(&state.st) {
            x87.set_raw(i, Extended { sig, se });
        }
        Self { xmm: state.xmm.map(lane::from_qwords), mxcsr: state.mxcsr & mxcsr::MASK, x87 }
    }
}

/// The executor of an x87, MMX, SSE or SSE2 instruction; `None` for all others.
pub(super) fn executor(insn: &Instruction) -> Option<Executor> {
    // The decoder counts WAIT to the 8086.
    let wait = insn.mnemonic() == Mnemonic::Wait;
    if !wait && !insn.cpuid_features().iter().all(|&feature| is_supported(feature)) {
        return None;
    }
    match insn.mnemonic() {
        Mnemonic::Ldmxcsr => Some(mxcsr::ldmxcsr),
        Mnemonic::Stmxcsr => Some(mxcsr::stmxcsr),
        _ => sse_move::executor(insn)
            .or_else(|| sse_int::executor(insn))
            .or_else(|| sse_fp::executor(insn))
            .or_else(|| sse_convert::executor(insn))
            .or_else(|| fxsave::executor(insn))
            .or_else(|| x87_control::executor(insn))
            .or_else(|| x87_move::executor(insn))
            .or_else(|| x87_arith::executor(insn))
            .or_else(|| x87_compare::executor(insn))
            .or_else(|| x87_transcendental::executor(insn)),
    }
}

fn is_supported(feature: CpuidFeature) -> bool {
    matches!(
        feature,
        CpuidFeature::FPU
            | CpuidFeature::FPU287
            | CpuidFeature::FPU387
            | CpuidFeature::CMOV
            | CpuidFeature::FXSR
            | CpuidFeature::MMX
            | CpuidFeature::SSE
            | CpuidFeature::SSE2
            | CpuidFeature::X64
    )
}

#[cfg(test)]
mod tests;
