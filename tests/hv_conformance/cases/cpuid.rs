//! CPUID (volume 2): the profile that an engine claims, and the same from every engine that claims it.

use super::*;

cases!(cpuid:
    what_the_other_cases_rely_on,
    beyond_the_last_leaf,
    level_3_sees_the_same,
    engines_with_one_profile_agree,
    leaf_1_follows_the_apic_and_cr4,
);

const BASIC: u32 = 0x20;
const LEAVES: u64 = (BASIC + 0x11 + 9) as u64;
/// Subleaves that are asked of each leaf.
const SUBLEAVES: u64 = 4;

/// EAX, EBX, ECX and EDX of a leaf into memory at RDI; RDI moves on.
fn ask(a: &mut CodeAssembler, leaf: u32, subleaf: u32) -> Assembled {
    a.mov(eax, leaf)?;
    a.mov(ecx, subleaf)?;
    a.cpuid()?;
    for (n, register) in (0..).zip([eax, ebx, ecx, edx]) {
        a.mov(dword_ptr(rdi + n * 4), register)?;
    }
    a.add(rdi, 16)
}

/// A program that asks for every leaf, into [`DATA`].
fn asking() -> Guest {
    Guest::running(|a| {
        a.mov(edi, DATA as u32)?;
        for leaf in leaves() {
            (0..SUBLEAVES as u32).try_for_each(|subleaf| ask(a, leaf, subleaf))?;
        }
        Ok(())
    })
}

fn leaves() -> impl Iterator<Item = u32> {
    (0..BASIC).chain(0x4000_0000..0x4000_0011).chain(0x8000_0000..0x8000_0009)
}

/// A leaf and a subleaf, and what CPUID says of them.
type Answer = ((u32, u32), [u32; 4]);

fn all(bench: &Bench) -> Result<Vec<Answer>, Skip> {
    let guest = asking();
    run_to_end(bench, &guest)?;
    let bytes = guest.bytes(DATA, (LEAVES * SUBLEAVES * 16) as usize);
    let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four"));
    let names = leaves().flat_map(|leaf| (0..SUBLEAVES as u32).map(move |subleaf| (leaf, subleaf)));
    Ok(names.enumerate().map(|(n, name)| (name, [0, 4, 8, 12].map(|at| word(n * 16 + at)))).collect())
}

fn leaf(all: &[Answer], leaf: u32) -> [u32; 4] {
    all.iter().find(|(name, _)| *name == (leaf, 0)).expect("asked for").1
}

fn what_the_other_cases_rely_on(bench: &Bench) -> Outcome {
    let all = all(bench)?;
    let [_, _, c, d] = leaf(&all, 1);
    // CMPXCHG16B, x2APIC, TSC deadline, hypervisor; FPU, TSC, MSR, PAE, CX8, APIC, PGE, CMOV, PAT, FXSR, SSE, SSE2.
    for bit in [13, 21, 24, 31] {
        assert_eq!(c >> bit & 1, 1, "leaf 1 ECX bit {bit}");
    }
    for bit in [0, 4, 5, 6, 8, 9, 13, 15, 16, 24, 25, 26] {
        assert_eq!(d >> bit & 1, 1, "leaf 1 EDX bit {bit}");
    }
    // SYSCALL, XD, long mode.
    for bit in [11, 20, 29] {
        assert_eq!(leaf(&all, 0x8000_0001)[3] >> bit & 1, 1, "leaf 0x80000001 EDX bit {bit}");
    }
    assert_eq!(
        leaf(&all, 0x4000_0000)[1..],
        [u32::from_le_bytes(*b"KVMK"), u32::from_le_bytes(*b"VMKV"), u32::from(b'M')]
    );
    Ok(())
}

fn beyond_the_last_leaf(bench: &Bench) -> Outcome {
    let guest = Guest::running(|a| {
        a.mov(edi, DATA as u32)?;
        ask(a, 0, 0)?;
        // The last basic leaf, and one far beyond it.
        a.mov(eax, dword_ptr(DATA))?;
        a.xor(ecx, ecx)?;
        a.cpuid()?;
        a.mov(dword_ptr(DATA + 16), eax)?;
        a.mov(dword_ptr(DATA + 20), ebx)?;
        a.mov(edi, DATA as u32 + 32)?;
        ask(a, 0x7fff_ffff, 0)
    });
    run_to_end(bench, &guest)?;
    // Intel's processors answer with the last basic leaf, AMD's with zeros: one of the two, as the vendor says.
    let (last, beyond) = (guest.get(DATA + 16), guest.get(DATA + 32));
    let intel = guest.get(DATA + 4) as u32 == u32::from_le_bytes(*b"Genu");
    assert_eq!(beyond, if intel { last } else { 0 });
    Ok(())
}

fn level_3_sees_the_same(bench: &Bench) -> Outcome {
    let ask_all = |a: &mut CodeAssembler, to: u64| {
        a.mov(edi, to as u32)?;
        [0, 1, 7, 0x8000_0001].into_iter().try_for_each(|leaf| ask(a, leaf, 0))
    };
    let kernel = Guest::running(|a| ask_all(a, DATA));
    run_to_end(bench, &kernel)?;
    let mut user = Guest::new();
    user.user(|a| ask_all(a, USER_DATA));
    bench.needs(&crate::abilities::USER_CPUID)?;
    run_to_end(bench, &user)?;
    assert_eq!(user.bytes(USER_DATA, 64), kernel.bytes(DATA, 64));
    Ok(())
}

/// The software engine is what the others are compared with, and what it says twice is the same.
fn engines_with_one_profile_agree(bench: &Bench) -> Outcome {
    let soft = soft_of_same_profile(bench)?;
    for (((leaf, subleaf), ours), (_, theirs)) in all(bench)?.into_iter().zip(all(&soft)?) {
        assert_eq!(ours, theirs, "leaf {leaf:#x}, subleaf {subleaf}");
    }
    Ok(())
}

/// Bit 9 of EDX is the local APIC's enable in IA32_APIC_BASE.
fn leaf_1_follows_the_apic_and_cr4(bench: &Bench) -> Outcome {
    let guest = Guest::running(|a| {
        a.mov(edi, DATA as u32)?;
        ask(a, 1, 0)?;
        super::lapic::write_msr(a, 0x1b, 0xfee0_0100)?;
        ask(a, 1, 0)?;
        super::lapic::write_msr(a, 0x1b, 0xfee0_0900)?;
        ask(a, 1, 0)
    });
    run_to_end(bench, &guest)?;
    let apic = [0, 1, 2].map(|n| guest.get(DATA + n * 16 + 12) >> 9 & 1);
    assert_eq!(apic, [1, 0, 1]);
    Ok(())
}
