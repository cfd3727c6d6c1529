//! Which instruction forms are compared: every user-mode form of the profile that runs natively in a guest.

use iced_x86::{Code, CpuidFeature, EncodingKind, Mnemonic, OpCodeOperandKind};

/// A rough kind, to run a part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    Integer,
    X87,
    Mmx,
    Sse,
}

impl Class {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Integer => "integer",
            Self::X87 => "x87",
            Self::Mmx => "mmx",
            Self::Sse => "sse",
        }
    }
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Form {
    pub(crate) code: Code,
    pub(crate) class: Class,
}

impl Form {
    pub(crate) fn matches(self, filter: &str) -> bool {
        self.class.name() == filter || format!("{:?}", self.code).to_lowercase().contains(&filter.to_lowercase())
    }
}

/// All forms, in iced's order.
pub(crate) fn all() -> Vec<Form> {
    Code::values().filter_map(|code| Some(Form { code, class: class(code)? })).collect()
}

fn class(code: Code) -> Option<Class> {
    let info = code.op_code();
    let usable = info.is_instruction() && info.mode64() && info.encoding() == EncodingKind::Legacy;
    if !usable || info.must_be_cpl0() || info.is_input_output() || unfaithful(code) {
        return None;
    }
    let mut class = Class::Integer;
    for feature in code.cpuid_features() {
        use CpuidFeature as F;
        match *feature {
            F::INTEL8086 | F::INTEL186 | F::INTEL286 | F::INTEL386 | F::INTEL486 | F::X64 | F::CMOV => {}
            F::CMPXCHG16B | F::CX8 | F::MULTIBYTENOP | F::PAUSE | F::CLFSH => {}
            F::FPU | F::FPU287 | F::FPU387 => class = Class::X87,
            F::MMX => class = Class::Mmx,
            F::SSE | F::SSE2 | F::FXSR => class = Class::Sse,
            _ => return None,
        }
    }
    Some(class)
}

/// What does not show the guest's own machine, or not the same on all hosts, when it runs natively under a
/// page-table hypervisor; and what leaves user mode by design.
fn unfaithful(code: Code) -> bool {
    use Mnemonic as M;
    let info = code.op_code();
    let segment = |kind: &OpCodeOperandKind| {
        use OpCodeOperandKind as K;
        matches!(kind, K::seg_reg | K::es | K::cs | K::ss | K::ds | K::fs | K::gs | K::farbr2_2 | K::farbr4_2)
    };
    if info.op_kinds().iter().any(segment) {
        return true;
    }
    match info.mnemonic() {
        // The host's segments, tables and identification.
        M::Sgdt | M::Sidt | M::Sldt | M::Str | M::Smsw | M::Lar | M::Lsl | M::Verr | M::Verw => true,
        M::Lss | M::Lfs | M::Lgs | M::Lds | M::Les | M::Retf | M::Iret | M::Iretd | M::Iretq => true,
        M::Cpuid | M::Rdtsc | M::Rdtscp | M::Rdpmc | M::Rdpid => true,
        // Ways out of user mode; INT3 ends every sequence.
        M::Int | M::Int1 | M::Int3 | M::Into | M::Syscall | M::Sysenter | M::Sysexit | M::Sysret => true,
        // Always a fault here, by privilege or by definition.
        M::Cli | M::Sti | M::Hlt | M::Ud0 | M::Ud1 | M::Ud2 => true,
        // AMD has prefetches there, which have no register form.
        M::Reservednop
            if matches!(
                code,
                Code::Reservednop_rm16_r16_0F0D | Code::Reservednop_rm32_r32_0F0D | Code::Reservednop_rm64_r64_0F0D
            ) =>
        {
            true
        }
        // Far through memory, and the transfers of 16 bits that vendors disagree about.
        M::Jmp | M::Call if info.op_kinds() == [OpCodeOperandKind::mem] => true,
        // The 66 prefix on near branches: Intel ignores it, AMD truncates RIP.
        M::Jmp | M::Call | M::Ret if info.operand_size() == 16 => true,
        _ if matches!(info.op_kinds().first(), Some(OpCodeOperandKind::br16_1 | OpCodeOperandKind::br16_2)) => true,
        // LOOP and JCXZ with an operand size prefix likewise.
        M::Loop | M::Loope | M::Loopne | M::Jrcxz | M::Jecxz | M::Jcxz => info.operand_size() == 16,
        _ => false,
    }
}

/// Whether the result is an approximation: the manual gives an error bound, and every vendor another last bit.
pub(crate) fn is_approximate(code: Code) -> bool {
    use Mnemonic as M;
    matches!(code.mnemonic(), M::F2xm1 | M::Fyl2x | M::Fyl2xp1 | M::Fptan | M::Fpatan | M::Fsin | M::Fcos | M::Fsincos)
        || matches!(code.mnemonic(), M::Rsqrtps | M::Rsqrtss | M::Rcpps | M::Rcpss)
}

/// Whether the x87 condition codes are undefined or vendors' manuals differ about them.
pub(crate) fn leaves_condition_codes(code: Code) -> bool {
    use Mnemonic as M;
    matches!(code.mnemonic(), M::Ffree | M::Ffreep | M::Fcomi | M::Fcomip | M::Fucomi | M::Fucomip)
        || matches!(code.mnemonic(), M::Fcmovb | M::Fcmove | M::Fcmovbe | M::Fcmovu)
        || matches!(code.mnemonic(), M::Fcmovnb | M::Fcmovne | M::Fcmovnbe | M::Fcmovnu)
}

/// Whether it touches MMX registers, and so moves the x87 state into MMX form. When in a faulting instruction that
/// happens differs between vendors.
pub(crate) fn touches_mmx(code: Code) -> bool {
    use OpCodeOperandKind as K;
    code.op_code().op_kinds().iter().any(|kind| matches!(kind, K::mm_reg | K::mm_rm | K::mm_or_mem))
}

/// Whether it saves or restores an image, which is done piece by piece: where it stops at a fault is the
/// processor's own matter.
pub(crate) fn moves_image(code: Code) -> bool {
    use Mnemonic as M;
    matches!(code.mnemonic(), M::Fxsave | M::Fxsave64 | M::Fxrstor | M::Fxrstor64)
        || matches!(code.mnemonic(), M::Fnsave | M::Fsave | M::Frstor | M::Fnstenv | M::Fstenv | M::Fldenv)
}

/// Whether an access may fault without a byte being stored: a mask of zero is the processor's choice.
pub(crate) fn is_masked_store(code: Code) -> bool {
    matches!(code.mnemonic(), Mnemonic::Maskmovq | Mnemonic::Maskmovdqu)
}

/// Whether an unmasked floating-point exception leaves a state that vendors do not agree about.
pub(crate) fn wants_masked(code: Code) -> bool {
    touches_mmx(code) || leaves_condition_codes(code)
}

/// Whether the stack pointer must be good for the instruction to get through.
pub(crate) fn uses_stack(code: Code) -> bool {
    code.op_code().is_stack_instruction() || matches!(code.mnemonic(), Mnemonic::Ret | Mnemonic::Call)
}
