//! Model-specific registers of the neutral state: they read back, and what is not there raises #GP(0) (volume 4).

use super::lapic::keep_msr;
use super::lapic::write_msr;
use super::*;

cases!(msrs:
    written_values_read_back_and_are_saved,
    restored_values_are_read,
    addresses_must_be_canonical,
    reserved_values_fault,
    unknown_registers_fault,
    efer_bits,
    the_paravirtual_clock,
);

const EFER_MSR: u32 = 0xc000_0080;
const PAT: u32 = 0x277;
const TSC_AUX: u32 = 0xc000_0103;
const CANONICAL: u64 = 0xffff_9000_1234_5678;

/// Every register, and a value that it takes.
const VALUES: [(u32, u64); 10] = [
    (0x174, 0x18),
    (0x175, CANONICAL),
    (0x176, CANONICAL + 8),
    (PAT, 0x0006_0504_0100_0706),
    (0xc000_0081, 0x0018_0008_1234_5678),
    (0xc000_0082, CANONICAL + 16),
    (0xc000_0083, CANONICAL + 24),
    (0xc000_0084, 0x4_7700),
    (0xc000_0102, CANONICAL + 32),
    (TSC_AUX, 0x1234_5678),
];

fn written_values_read_back_and_are_saved(bench: &Bench) -> Outcome {
    bench.needs(&crate::abilities::TSC_AUX)?;
    let guest = Guest::running(|a| {
        for (n, (msr, value)) in (0..).zip(VALUES) {
            write_msr(a, msr, value)?;
            keep_msr(a, n, msr)?;
        }
        Ok(())
    });
    let msrs = run_to_end(bench, &guest)?.msrs;
    assert_eq!(guest.results(), VALUES.map(|(_, value)| value));
    let saved = [
        msrs.sysenter_cs,
        msrs.sysenter_esp,
        msrs.sysenter_eip,
        msrs.pat,
        msrs.star,
        msrs.lstar,
        msrs.cstar,
        msrs.sfmask,
        msrs.kernel_gs_base,
        msrs.tsc_aux,
    ];
    assert_eq!(saved, VALUES.map(|(_, value)| value));
    Ok(())
}

fn restored_values_are_read(bench: &Bench) -> Outcome {
    bench.needs(&crate::abilities::TSC_AUX)?;
    let mut guest = Guest::running(|a| {
        for (n, (msr, _)) in (0..).zip(VALUES) {
            keep_msr(a, n, msr)?;
        }
        Ok(())
    });
    let values = VALUES.map(|(_, value)| value);
    let msrs = &mut guest.state.msrs;
    [
        msrs.sysenter_cs,
        msrs.sysenter_esp,
        msrs.sysenter_eip,
        msrs.pat,
        msrs.star,
        msrs.lstar,
        msrs.cstar,
        msrs.sfmask,
        msrs.kernel_gs_base,
        msrs.tsc_aux,
    ] = values;
    run_to_end(bench, &guest)?;
    assert_eq!(guest.results(), values);
    Ok(())
}

/// The write of a value to a register raises #GP(0) and changes nothing.
fn refuses(bench: &Bench, msr: u32, value: u64) -> Outcome {
    let guest = Guest::running(|a| write_msr(a, msr, value));
    let mut machine = Machine::new(bench, &guest)?;
    let trap = machine.run()?.trap_of(|| format!("{msr:#x} {value:#x}"));
    assert_eq!((trap.vector, trap.error), (13, 0), "{msr:#x} {value:#x}");
    let (mut msrs, before) = (machine.state().msrs, guest.state.msrs);
    msrs.tsc = before.tsc;
    assert_eq!(msrs, before, "{msr:#x} {value:#x}");
    Ok(())
}

fn addresses_must_be_canonical(bench: &Bench) -> Outcome {
    // The SYSENTER registers are not in this list: some processors take any value there.
    for msr in [0xc000_0082, 0xc000_0083, 0xc000_0100, 0xc000_0101, 0xc000_0102] {
        refuses(bench, msr, 1 << 47)?;
        refuses(bench, msr, 0x1234_5678_9abc_def0)?;
    }
    Ok(())
}

/// Memory types 2 and 3 and those above 7 do not exist (13.12.2); EFER's unused bits are reserved.
fn reserved_values_fault(bench: &Bench) -> Outcome {
    for (msr, value) in [
        (EFER_MSR, EFER | 1 << 1),
        (EFER_MSR, EFER | 1 << 63),
        // LME cannot change while paging is on.
        (EFER_MSR, EFER & !(1 << 8)),
        (PAT, 0x0007_0406_0007_0402),
        (PAT, 0x0307_0406_0007_0406),
        (PAT, 0x0007_0406_0807_0406),
    ] {
        if msr == PAT {
            bench.needs(&crate::abilities::CHECKED_PAT)?;
        }
        refuses(bench, msr, value)?;
    }
    Ok(())
}

fn unknown_registers_fault(bench: &Bench) -> Outcome {
    for msr in [0x3fff_fff0, 0xc000_1234, 0xdead_beef, 0xffff_ffff] {
        refuses(bench, msr, 0)?;
        let guest = Guest::running(|a| a.mov(ecx, msr).and_then(|()| a.rdmsr()));
        let trap = run_once(bench, &guest)?.trap();
        assert_eq!((trap.vector, trap.error), (13, 0), "{msr:#x}");
    }
    Ok(())
}

/// 2.2.1: NXE and SCE come and go, LMA is not written.
fn efer_bits(bench: &Bench) -> Outcome {
    const NXE: u64 = 1 << 11;
    const LMA: u64 = 1 << 10;
    const SCE: u64 = 1;
    let guest = Guest::running(|a| {
        keep_msr(a, 0, EFER_MSR)?;
        write_msr(a, EFER_MSR, EFER & !NXE & !SCE)?;
        keep_msr(a, 1, EFER_MSR)?;
        write_msr(a, EFER_MSR, EFER & !LMA)?;
        keep_msr(a, 2, EFER_MSR)
    });
    let end = run_once(bench, &guest)?;
    // Some processors refuse to have LMA cleared, others ignore it; none does it.
    if end == End::Done {
        assert_eq!(guest.result(2), EFER);
    } else {
        assert_eq!(end.trap().vector, 13);
    }
    assert_eq!((guest.result(0), guest.result(1)), (EFER, EFER & !NXE & !SCE));
    Ok(())
}

/// Linux, `Documentation/virt/kvm/x86/msr.rst`: MSR_KVM_SYSTEM_TIME_NEW and MSR_KVM_WALL_CLOCK_NEW.
fn the_paravirtual_clock(bench: &Bench) -> Outcome {
    const SYSTEM_TIME: u32 = 0x4b56_4d01;
    const WALL_CLOCK: u32 = 0x4b56_4d00;
    let guest = Guest::running(|a| {
        write_msr(a, SYSTEM_TIME, DATA | 1)?;
        write_msr(a, WALL_CLOCK, DATA + 0x40)?;
        // A guest looks after it has set it.
        a.rdtsc()?;
        a.shl(rdx, 32)?;
        a.or(rax, rdx)?;
        keep(a, 0, rax)?;
        keep_msr(a, 1, SYSTEM_TIME)
    });
    let state = run_to_end(bench, &guest)?;
    let word = |at: u64| guest.get(DATA + at) as u32;
    let (version, then, time) = (word(0), guest.get(DATA + 8), guest.get(DATA + 16));
    assert!(version != 0 && version % 2 == 0, "version {version}");
    assert!(then <= guest.result(0), "a time stamp that has been");
    // Nanoseconds now, as a guest computes them: within the minutes that a test machine can be old.
    let (multiplier, shift) = (u64::from(word(24)), guest.bytes(DATA + 28, 1)[0] as i8);
    let ticks = guest.result(0) - then;
    let scaled = if shift < 0 { ticks >> -shift } else { ticks << shift };
    let now = time + ((u128::from(scaled) * u128::from(multiplier)) >> 32) as u64;
    assert!(multiplier != 0 && now < 3_600_000_000_000, "{now} ns");
    let wall = guest.get(DATA + 0x40);
    assert!(wall as u32 != 0 && (wall as u32).is_multiple_of(2), "wall clock version");
    assert!(wall >> 32 > 1_600_000_000, "seconds since 1970: {}", wall >> 32);
    assert_eq!((guest.result(1), state.msrs.kvm_system_time), (DATA | 1, DATA | 1));
    Ok(())
}
