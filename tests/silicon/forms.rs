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

/// Whether the stack pointer must be good for the instruction to get through.
pub(crate) fn uses_stack(code: Code) -> bool {
    code.op_code().is_stack_instruction() || matches!(code.mnemonic(), Mnemonic::Ret | Mnemonic::Call)
}
