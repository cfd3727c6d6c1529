//! What an engine of this host may lack, and how that is found out: by asking it, never by knowing the host.

use iced_x86::CpuidFeature;
use iced_x86::Decoder;
use iced_x86::DecoderOptions;
use iced_x86::Mnemonic;
use iced_x86::code_asm::*;
use kiln::hv::HvError;

use crate::bench::Bench;
use crate::cases::apic;
use crate::cases::lapic;
use crate::guest::*;
use crate::layout::*;
use crate::machine::End;
use crate::machine::Machine;
use crate::machine::run_once;

/// Something that an engine may lack on some hosts.
#[derive(Debug)]
pub(crate) struct Ability {
    pub(crate) name: &'static str,
    /// What an engine without it does or does not do, to go after its name.
    pub(crate) lack: &'static str,
    /// Whether the engine has it.
    pub(crate) probe: fn(&Bench) -> bool,
}

/// Instructions that some hosts' emulators of level 0 do not execute, beside those of the x87, MMX and SSE. A refusal of
/// any other is a failure.
const MAY_BE_MISSING: &[Mnemonic] = &[
    Mnemonic::Clac,
    Mnemonic::Cmpxchg16b,
    Mnemonic::Int,
    Mnemonic::Int1,
    Mnemonic::Int3,
    Mnemonic::Popcnt,
    Mnemonic::Rdtscp,
    Mnemonic::Stac,
    Mnemonic::Wait,
    Mnemonic::Xgetbv,
    Mnemonic::Xrstor,
    Mnemonic::Xsave,
    Mnemonic::Xsetbv,
];

/// Why an engine's error is no failure of the engine: an instruction that its host may lack.
pub(crate) fn excuse(error: &HvError) -> Option<String> {
    let HvError::Unimplemented { bytes, what, .. } = error else { return None };
    let instruction = Decoder::new(64, bytes, DecoderOptions::NONE).decode();
    let mnemonic = instruction.mnemonic();
    let float = |feature: &CpuidFeature| {
        matches!(feature, CpuidFeature::FPU | CpuidFeature::MMX | CpuidFeature::SSE | CpuidFeature::SSE2)
    };
    let may_be_missing = MAY_BE_MISSING.contains(&mnemonic) || instruction.cpuid_features().iter().any(float);
    // Bytes that are no instruction at all should raise #UD; an emulator may give up on them instead.
    let name = if instruction.is_invalid() { "opcodes that are none".to_owned() } else { format!("{mnemonic:?}") };
    (may_be_missing || instruction.is_invalid()).then(|| format!("does not execute {name} at level 0 ({what})"))
}

/// INT3 at level 0.
pub(crate) const INT3: Ability = Ability {
    name: "int3",
    lack: "does not execute INT3 at level 0",
    probe: |bench| {
        let guest = Guest::running(|a| a.int3());
        matches!(run_once(bench, &guest), Ok(End::Trap(trap)) if trap.vector == 3)
    },
};

/// The local APIC's error register and error interrupt (SDM volume 3A, 12.5.3).
pub(crate) const APIC_ERRORS: Ability = Ability {
    name: "APIC errors",
    lack: "does not report errors of the local APIC",
    probe: |bench| {
        let guest = Guest::running(|a| {
            apic::enable(a)?;
            apic::lapic_write(a, apic::ICR, apic::TO_SELF | apic::ASSERT)?;
            apic::lapic_write(a, apic::ESR, 0)?;
            apic::lapic_read(a, apic::ESR)?;
            keep(a, 0, rax)
        });
        matches!(run_once(bench, &guest), Ok(End::Done)) && guest.result(0) != 0
    },
};

/// Time that stands still when no vCPU runs; the seam allows an engine not to.
pub(crate) const STOPPED_TIME: Ability = Ability {
    name: "stopped time",
    lack: "cannot make time stand still",
    probe: |bench| {
        let Ok(mut machine) = Machine::new(bench, &Guest::running(|a| a.nop())) else { return false };
        machine.vm.stop_time();
        let first = machine.state().msrs.tsc;
        std::thread::sleep(std::time::Duration::from_millis(1));
        first == machine.state().msrs.tsc
    },
};

/// SSE moves of 16 bytes from and to registers of devices.
pub(crate) const SSE_MMIO: Ability = Ability {
    name: "SSE MMIO",
    lack: "does not execute SSE moves from and to devices",
    probe: |bench| {
        let guest = Guest::running(|a| {
            a.mov(rbx, DEVICE)?;
            a.movups(xmm0, xmmword_ptr(rbx))
        });
        matches!(run_once(bench, &guest), Ok(End::Done))
    },
};

/// Operands whose first part is memory and whose second is not.
pub(crate) const STRADDLING: Ability = Ability {
    name: "straddling",
    lack: "does not execute accesses that straddle the end of memory",
    probe: |bench| {
        let guest = Guest::running(|a| {
            a.mov(rbx, HOLE - 4)?;
            a.mov(qword_ptr(rbx), rbx)
        });
        matches!(run_once(bench, &guest), Ok(End::Done))
    },
};

/// CPUID at level 3 says what the engine was told. A hypervisor without hardware support runs level 3 on the host's
/// processor, whose CPUID faults only where the host can make it.
pub(crate) const USER_CPUID: Ability = Ability {
    name: "user CPUID",
    lack: "lets CPUID at level 3 see the host's processor",
    probe: |bench| {
        // The number of the last leaf, which is the engine's to say.
        let ask = |a: &mut CodeAssembler, to: u64| {
            a.xor(eax, eax)?;
            a.cpuid()?;
            a.mov(dword_ptr(to), eax)
        };
        let kernel = Guest::running(|a| ask(a, DATA));
        let mut user = Guest::new();
        user.user(|a| ask(a, USER_DATA));
        let ran = |guest: &Guest| matches!(run_once(bench, guest), Ok(End::Done));
        ran(&kernel) && ran(&user) && kernel.get(DATA) == user.get(USER_DATA)
    },
};

/// Whether a write by `build` is refused with #GP.
fn refuses(bench: &Bench, build: impl FnOnce(&mut CodeAssembler) -> Assembled) -> bool {
    matches!(run_once(bench, &Guest::running(build)), Ok(End::Trap(trap)) if trap.vector == 13)
}

/// The upper halves of CR0 and CR4 are reserved.
pub(crate) const HIGH_BITS: Ability = Ability {
    name: "upper halves",
    lack: "ignores the upper halves of what is written to CR0 and CR4",
    probe: |bench| {
        refuses(bench, |a| {
            a.mov(rax, CR0 | 1 << 63)?;
            a.mov(cr0, rax)
        })
    },
};

/// IA32_PAT takes memory types only.
pub(crate) const CHECKED_PAT: Ability = Ability {
    name: "checked PAT",
    lack: "takes memory types that do not exist in IA32_PAT",
    probe: |bench| refuses(bench, |a| lapic::write_msr(a, 0x277, 2)),
};

/// The x2APIC registers' reserved bits.
pub(crate) const X2APIC_RESERVED_BITS: Ability = Ability {
    name: "x2APIC reserved bits",
    lack: "ignores reserved bits in writes to x2APIC registers",
    probe: |bench| {
        refuses(bench, |a| {
            lapic::enable_x2apic(a)?;
            lapic::write_msr(a, lapic::x2apic(apic::TPR), 0x1000)
        })
    },
};

/// INT1 of level 3 is a trap: its frame says the next instruction.
pub(crate) const USER_INT1: Ability = Ability {
    name: "INT1 at level 3",
    lack: "takes INT1 of level 3 for a fault",
    probe: |bench| {
        let mut guest = Guest::new();
        guest.user(|a| a.int1());
        matches!(run_once(bench, &guest), Ok(End::Trap(trap)) if trap.vector == 1 && trap.rip == USER_CODE + 1)
    },
};

/// CR0.TS and CR0.EM hold at level 3.
pub(crate) const USER_TS: Ability = Ability {
    name: "CR0.TS at level 3",
    lack: "does not obey CR0.TS and CR0.EM at level 3",
    probe: |bench| {
        let mut guest = Guest::new();
        guest.user(|a| a.fnop());
        guest.state.cr0 |= 8;
        matches!(run_once(bench, &guest), Ok(End::Trap(trap)) if trap.vector == 7)
    },
};

/// CR4.OSXMMEXCPT holds at level 3.
pub(crate) const USER_OSXMMEXCPT: Ability = Ability {
    name: "CR4.OSXMMEXCPT at level 3",
    lack: "does not obey CR4.OSXMMEXCPT at level 3",
    probe: |bench| {
        let mut guest = Guest::new();
        // One through zero, unmasked.
        guest.user(|a| a.divss(xmm0, xmm1));
        guest.state.cr4 &= !(1 << 10);
        guest.state.fpu.mxcsr = 0x1d80;
        guest.state.fpu.xmm[0] = [0x3f80_0000, 0];
        matches!(run_once(bench, &guest), Ok(End::Trap(trap)) if trap.vector == 6)
    },
};

/// Whether a bit of CPUID's answer is set, as level 0 sees it.
fn cpuid_bit(bench: &Bench, leaf: u32, register: usize, bit: u32) -> bool {
    let guest = Guest::running(|a| {
        a.mov(eax, leaf)?;
        a.xor(ecx, ecx)?;
        a.cpuid()
    });
    let Ok(mut machine) = Machine::new(bench, &guest) else { return false };
    matches!(machine.run(), Ok(End::Done)) && machine.state().gpr[register] >> bit & 1 != 0
}

const EXTENDED_FEATURES: u32 = 0x8000_0001;
const EDX: usize = 2;

/// Pages of 1 GiB.
pub(crate) const GIGABYTE_PAGES: Ability = Ability {
    name: "1 GiB pages",
    lack: "shows guests a processor without pages of 1 GiB",
    probe: |bench| cpuid_bit(bench, EXTENDED_FEATURES, EDX, 26),
};

/// RDTSCP, and with it IA32_TSC_AUX.
pub(crate) const TSC_AUX: Ability = Ability {
    name: "RDTSCP",
    lack: "shows guests a processor without RDTSCP and IA32_TSC_AUX",
    probe: |bench| cpuid_bit(bench, EXTENDED_FEATURES, EDX, 27),
};

/// RFLAGS.IOPL is kept and lets level 3 use ports.
pub(crate) const IOPL: Ability = Ability {
    name: "IOPL",
    lack: "does not keep RFLAGS.IOPL",
    probe: |bench| {
        let mut guest = Guest::new();
        guest.user(|a| a.out(0x80, al));
        guest.state.rflags |= IOPL3;
        matches!(run_once(bench, &guest), Ok(End::Done))
    },
};

/// SYSCALL of level 3 arrives at level 0.
pub(crate) const SYSCALL: Ability = Ability {
    name: "SYSCALL",
    lack: "does not enter level 0 by SYSCALL",
    probe: |bench| {
        let mut guest = Guest::new();
        guest.user(|a| a.syscall());
        guest.code(|a| a.nop());
        let msrs = &mut guest.state.msrs;
        (msrs.star, msrs.lstar) = (u64::from(SYSRET_BASE) << 48 | u64::from(KERNEL_CS) << 32, CODE);
        let Ok(mut machine) = Machine::new(bench, &guest) else { return false };
        matches!(machine.run(), Ok(End::Done)) && machine.state().segments[1].selector == KERNEL_CS
    },
};

/// INT n of level 3.
pub(crate) const USER_INT: Ability = Ability {
    name: "INT at level 3",
    lack: "does not execute INT n at level 3",
    probe: |bench| {
        let mut guest = Guest::new();
        guest.user(|a| a.int(0x80));
        guest.gate(0x80, Guest::stub(0x80), USER_GATE);
        matches!(run_once(bench, &guest), Ok(End::Trap(trap)) if trap.vector == 0x80)
    },
};

/// The local APIC notes what is in service.
pub(crate) const IN_SERVICE: Ability = Ability {
    name: "in service",
    lack: "keeps no interrupt in service in the local APIC (its ISR reads zero in a handler)",
    probe: |bench| {
        let mut guest = Guest::running(|a| {
            apic::enable(a)?;
            a.sti()?;
            apic::lapic_write(a, apic::ICR, apic::TO_SELF | apic::ASSERT | 0x41)?;
            apic::await_result(a, 0, 1)
        });
        guest.handler(0x41, |a| {
            apic::lapic_read(a, apic::ISR + 0x20)?;
            keep(a, 1, rax)?;
            count(a, 0)?;
            a.iretq()
        });
        matches!(run_once(bench, &guest), Ok(End::Done)) && guest.result(1) == 2
    },
};

/// An interrupt that waits is taken at the first boundary at which it may be, and not some instructions later.
pub(crate) const PROMPT_INTERRUPTS: Ability = Ability {
    name: "prompt interrupts",
    lack: "takes an interrupt some instructions later than it could",
    probe: |bench| {
        let mut guest = Guest::running(|a| {
            apic::enable(a)?;
            apic::lapic_write(a, apic::ICR, apic::TO_SELF | apic::ASSERT | 0x41)?;
            a.sti()?;
            (0..8).try_for_each(|_| a.nop())
        });
        guest.handler(0x41, |a| {
            count(a, 0)?;
            apic::end_of_interrupt(a)?;
            a.iretq()
        });
        matches!(run_once(bench, &guest), Ok(End::Done)) && guest.result(0) == 1
    },
};

/// A write that reaches into a page that is not there writes nothing.
pub(crate) const WHOLE_WRITES: Ability = Ability {
    name: "whole writes",
    lack: "writes the first part of an operand before it finds the second page missing",
    probe: |bench| {
        let guest = Guest::running(|a| {
            a.mov(rbx, WINDOW + 0xffc)?;
            a.mov(qword_ptr(rbx), rbx)
        });
        guest.map(WINDOW, FRAMES | RW | P);
        matches!(run_once(bench, &guest), Ok(End::Trap(_))) && guest.get(FRAMES + 0xff8) == 0
    },
};

/// Alignment is not checked unless CR0.AM and RFLAGS.AC are both set.
pub(crate) const UNCHECKED_ALIGNMENT: Ability = Ability {
    name: "CR0.AM",
    lack: "checks alignment at level 3 whatever CR0.AM says",
    probe: |bench| {
        let mut guest = Guest::new();
        guest.user(|a| a.mov(eax, dword_ptr(USER_DATA + 1)));
        guest.state.rflags |= 1 << 18;
        matches!(run_once(bench, &guest), Ok(End::Done))
    },
};

/// The delivery of an event looks at the TSS's limit.
pub(crate) const TSS_LIMITS: Ability = Ability {
    name: "TSS limits",
    lack: "does not look at the limit of the TSS when it takes a stack from it",
    probe: |bench| {
        let mut guest = Guest::running(|a| a.ud2());
        guest.gate(6, Guest::stub(6), INTERRUPT_GATE | 1);
        guest.state.tr.limit = 0x23;
        matches!(run_once(bench, &guest), Ok(End::Trap(trap)) if trap.vector != 6)
    },
};

/// IRETQ looks at the descriptor that it loads CS with.
pub(crate) const CHECKED_IRET: Ability = Ability {
    name: "checked IRETQ",
    lack: "lets IRETQ load CS with a data segment",
    probe: |bench| {
        let guest = Guest::running(|a| {
            a.push(i32::from(KERNEL_SS))?;
            a.push(0x5000)?;
            a.pushfq()?;
            a.push(i32::from(KERNEL_SS))?;
            a.push(CODE as i32)?;
            a.iretq()
        });
        matches!(run_once(bench, &guest), Ok(End::Trap(trap)) if trap.cs == u64::from(KERNEL_CS))
    },
};

/// A benign exception whose gate is not present becomes #NP, and not #DF.
pub(crate) const BENIGN_EXCEPTIONS: Ability = Ability {
    name: "benign exceptions",
    lack: "makes a double fault of a benign exception whose delivery fails",
    probe: |bench| {
        let guest = Guest::running(|a| a.ud2());
        guest.gate(6, Guest::stub(6), 0x0e00);
        matches!(run_once(bench, &guest), Ok(End::Trap(trap)) if trap.vector != 8)
    },
};

/// A single step of each repetition.
pub(crate) const STEPPED_REPETITIONS: Ability = Ability {
    name: "stepped repetitions",
    lack: "does not stop single steps at every repetition of a string",
    probe: |bench| {
        let mut guest = Guest::running(|a| a.rep().stosb());
        guest.state.gpr[1] = 3;
        guest.state.gpr[7] = DATA;
        guest.state.rflags |= 1 << 8;
        guest.handler(1, |a| {
            count(a, 0)?;
            // Steps on, but for the string's end.
            a.cmp(rcx, 0)?;
            let mut on = a.create_label();
            a.jne(on)?;
            finish(a)?;
            a.set_label(&mut on)?;
            a.iretq()
        });
        matches!(run_once(bench, &guest), Ok(End::Done)) && guest.result(0) == 3
    },
};
