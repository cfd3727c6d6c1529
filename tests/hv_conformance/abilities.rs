//! What an engine of this host may lack, and how that is found out: by asking it, never by knowing the host.

use iced_x86::Decoder;
use iced_x86::DecoderOptions;
use iced_x86::Mnemonic;
use iced_x86::code_asm::*;
use kiln::hv::HvError;

use crate::bench::Bench;
use crate::cases::apic;
use crate::guest::Guest;
use crate::guest::keep;
use crate::layout::DEVICE;
use crate::layout::HOLE;
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

/// Instructions that some hosts' emulators of kernel mode do not execute. A refusal of any other is a failure.
const MAY_BE_MISSING: &[Mnemonic] = &[
    Mnemonic::Clac,
    Mnemonic::Cmpxchg16b,
    Mnemonic::Int3,
    Mnemonic::Popcnt,
    Mnemonic::Stac,
    Mnemonic::Xgetbv,
    Mnemonic::Xrstor,
    Mnemonic::Xsave,
    Mnemonic::Xsetbv,
];

/// Why an engine's error is no failure of the engine: an instruction that its host may lack.
pub(crate) fn excuse(error: &HvError) -> Option<String> {
    match error {
        HvError::Unimplemented { bytes, what, .. } => {
            let instruction = Decoder::new(64, bytes, DecoderOptions::NONE).decode();
            let mnemonic = instruction.mnemonic();
            MAY_BE_MISSING.contains(&mnemonic).then(|| format!("does not execute {mnemonic:?} ({what})"))
        }
        _ => None,
    }
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
        const HYPERVISOR: u32 = 0x4000_0000;
        let mut guest = Guest::new();
        guest.user(|a| {
            a.mov(eax, HYPERVISOR)?;
            a.cpuid()
        });
        let Ok(mut machine) = Machine::new(bench, &guest) else { return false };
        matches!(machine.run(), Ok(End::Done)) && machine.state().gpr[3] as u32 == u32::from_le_bytes(*b"KVMK")
    },
};
