//! What CPUID says (SDM 2A, CPUID): the baseline profile, which is the processor that `soft` implements and that a
//! hardware engine can show too. Nothing is advertised that is not implemented.
//!
//! The vendor is GenuineIntel, because Linux then touches the fewest odd MSRs: 0x17 and 0x1a0 instead of
//! AMD's c0010000-3, 07, 15, 55, 114 and c0011029. Family 6, model 15 is the oldest 64-bit one of that
//! vendor without a quirk in Linux (models up to 13 lose PAT, 14 has an erratum about large pages),
//! and old enough to be in no list of speculation bugs by model. The hypervisor leaves are KVM's, as
//! the paravirtual clock is.

/// The name of what is shown here. Saved guests rely on all of it, so whoever changes a bit changes the name.
pub(crate) const PROFILE: &str = "soft-sse2-1";

/// Ticks of the time stamp counter in a second.
pub(crate) const TSC_HZ: u64 = 1_000_000_000;
/// The same in kHz.
pub(crate) const TSC_KHZ: u32 = (TSC_HZ / 1_000) as u32;
/// Ticks of the local APIC timer's clock in a second, which is what leaf 0x15 calls the crystal.
const CRYSTAL_HZ: u32 = 1_000_000_000;

/// Width of a guest-physical address (leaf 0x80000008).
pub(crate) const PHYS_BITS: u32 = 40;
/// Width of a linear address: four levels of paging.
const LINEAR_BITS: u32 = 48;

const MAX_BASIC: u32 = 0x16;
const MAX_HYPERVISOR: u32 = 0x4000_0010;
const MAX_EXTENDED: u32 = 0x8000_0008;

/// Family 6, model 15, stepping 1: leaf 1, and EDX after reset.
pub(crate) const SIGNATURE: u32 = 0x0000_06f1;
const BRAND: &[u8; 48] = b"kiln software processor\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";

const CACHE_LINE: u32 = 64;

/// CR4.OSXSAVE, which leaf 1 shows.
const CR4_OSXSAVE: u64 = 1 << 18;

/// What of a vCPU's state and surroundings shows in its CPUID.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Context {
    /// The local APIC's id.
    pub(crate) apic_id: u32,
    /// How many vCPUs the machine has.
    pub(crate) vcpus: u32,
    /// Whether the local APIC is enabled in IA32_APIC_BASE.
    pub(crate) apic_enabled: bool,
    /// CR4.
    pub(crate) cr4: u64,
    /// Frequency of the time stamp counter: [`TSC_KHZ`] in the profile, and what the host has under an engine that
    /// cannot change it.
    pub(crate) tsc_khz: u32,
}

/// The leaves that say something, each with its first subleaf that does not: for an engine that gives its host a table.
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
pub(crate) fn leaves() -> impl Iterator<Item = (u32, u32)> {
    let subleaves = |leaf| match leaf {
        4 => 5,
        7 => 2,
        0xb => 3,
        _ => 0,
    };
    let hypervisor = [0x4000_0000, 0x4000_0001, MAX_HYPERVISOR];
    (0..=MAX_BASIC).chain(hypervisor).chain(0x8000_0000..=MAX_EXTENDED).map(move |leaf| (leaf, subleaves(leaf)))
}

/// EAX, EBX, ECX and EDX of a leaf. One past the last basic or extended leaf reads as the last basic
/// leaf, as on this vendor's processors.
pub(crate) fn cpuid(leaf: u32, subleaf: u32, of: Context) -> [u32; 4] {
    match leaf {
        0x4000_0000..=0x4fff_ffff => hypervisor(leaf, of.tsc_khz),
        0x8000_0000..=MAX_EXTENDED => extended(leaf),
        0..=MAX_BASIC => basic(leaf, subleaf, of),
        _ => basic(MAX_BASIC, subleaf, of),
    }
}

fn basic(leaf: u32, subleaf: u32, of: Context) -> [u32; 4] {
    match leaf {
        0 => [MAX_BASIC, text(b"Genu"), text(b"ntel"), text(b"ineI")],
        1 => features(of),
        // "Caches are in leaf 4" (0xff), and one as the count of times to ask.
        2 => [0x0000_ff01, 0, 0, 0],
        4 => cache(subleaf, of.vcpus),
        // ARAT: the APIC timer never stops.
        6 => [1 << 2, 0, 0, 0],
        7 => structured_features(subleaf),
        0xb => topology(subleaf, of),
        0x15 => time_stamp_counter(of.tsc_khz),
        0x16 => [mhz(of.tsc_khz), mhz(of.tsc_khz), mhz(of.tsc_khz), 0],
        _ => [0; 4],
    }
}

fn features(of: Context) -> [u32; 4] {
    let bits = |bits: &[u32]| bits.iter().fold(0, |all, bit| all | 1u32 << bit);
    // CMPXCHG16B, x2APIC, TSC-deadline, running under a hypervisor.
    let mut ecx = bits(&[13, 21, 24, 31]);
    if of.cr4 & CR4_OSXSAVE != 0 {
        ecx |= 1 << 27;
    }
    // FPU PSE TSC MSR PAE CX8 PGE CMOV PAT CLFSH MMX FXSR SSE SSE2.
    let mut edx = bits(&[0, 3, 4, 5, 6, 8, 13, 15, 16, 19, 23, 24, 25, 26]);
    if of.apic_enabled {
        edx |= 1 << 9;
    }
    if of.vcpus > 1 {
        // HTT: the count of logical processors in EBX is valid.
        edx |= 1 << 28;
    }
    let count = of.vcpus.next_power_of_two().min(255);
    [SIGNATURE, of.apic_id << 24 | count << 16 | (CACHE_LINE / 8) << 8, ecx, edx]
}

/// Hints that REP string operations are fast, which they are here: host copies by the page. They
/// promise nothing that MOVS and STOS do not do anyway.
fn structured_features(subleaf: u32) -> [u32; 4] {
    match subleaf {
        // ERMS; FSRM.
        0 => [1, 1 << 9, 0, 1 << 4],
        // Fast zero-length MOVSB, fast short STOSB.
        1 => [1 << 10 | 1 << 11, 0, 0, 0],
        _ => [0; 4],
    }
}

/// Deterministic cache parameters. C libraries size their copy loops by them, and switch to
/// non-temporal stores, which gain nothing here, at three quarters of the last level: so that is large.
fn cache(subleaf: u32, vcpus: u32) -> [u32; 4] {
    let (kind, level, kib, ways) = match subleaf {
        0 => (1, 1, 32, 8),
        1 => (2, 1, 32, 8),
        2 => (3, 2, 1024, 16),
        3 => (3, 3, 32 * 1024, 16),
        _ => return [0; 4],
    };
    let threads = vcpus.next_power_of_two();
    let sharing = if level == 3 { threads } else { 1 };
    let sets = kib * 1024 / (CACHE_LINE * ways);
    let self_initialising = 1 << 8;
    let eax = kind | level << 5 | self_initialising | (sharing - 1) << 14 | (threads.min(64) - 1) << 26;
    [eax, (ways - 1) << 22 | (CACHE_LINE - 1), sets - 1, 0]
}

/// Extended topology: every vCPU is a core with one thread, all in one package.
fn topology(subleaf: u32, of: Context) -> [u32; 4] {
    const THREAD: u32 = 1;
    const CORE: u32 = 2;
    match subleaf {
        0 => [0, 1, THREAD << 8, of.apic_id],
        1 => [of.vcpus.next_power_of_two().trailing_zeros(), of.vcpus, CORE << 8 | 1, of.apic_id],
        _ => [0, 0, subleaf & 0xff, of.apic_id],
    }
}

/// The TSC as a multiple of the crystal, which is also what the APIC timer counts: in the profile 1/1 of 1 GHz. To the
/// nearest MHz, because Linux multiplies the crystal's kHz by the numerator in 32 bits.
fn time_stamp_counter(tsc_khz: u32) -> [u32; 4] {
    let (numerator, denominator) = (mhz(tsc_khz), CRYSTAL_HZ / 1_000_000);
    let common = gcd(numerator, denominator);
    [denominator / common, numerator / common, CRYSTAL_HZ, 0]
}

fn mhz(khz: u32) -> u32 {
    khz.saturating_add(500) / 1_000
}

fn gcd(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { gcd(b, a % b) }
}

fn hypervisor(leaf: u32, tsc_khz: u32) -> [u32; 4] {
    match leaf {
        0x4000_0000 => [MAX_HYPERVISOR, text(b"KVMK"), text(b"VMKV"), text(b"M\0\0\0")],
        // NOP_IO_DELAY, CLOCKSOURCE2, CLOCKSOURCE_STABLE.
        0x4000_0001 => [1 << 1 | 1 << 3 | 1 << 24, 0, 0, 0],
        // TSC and APIC timer frequency in kHz.
        MAX_HYPERVISOR => [tsc_khz, CRYSTAL_HZ / 1_000, 0, 0],
        _ => [0; 4],
    }
}

fn extended(leaf: u32) -> [u32; 4] {
    match leaf {
        0x8000_0000 => [MAX_EXTENDED, 0, 0, 0],
        // LAHF64; SYSCALL, NX, 1 GiB pages, RDTSCP, long mode.
        0x8000_0001 => [0, 0, 1, 1 << 11 | 1 << 20 | 1 << 26 | 1 << 27 | 1 << 29],
        0x8000_0002..=0x8000_0004 => {
            let (words, _) = BRAND.as_chunks::<4>();
            let first = ((leaf - 0x8000_0002) * 4) as usize;
            std::array::from_fn(|word| text(&words[first + word]))
        }
        // The second level again: 1 MiB, 16 ways, in this leaf's own encoding.
        0x8000_0006 => [0, 0, 1024 << 16 | 8 << 12 | CACHE_LINE, 0],
        // Invariant TSC.
        0x8000_0007 => [0, 0, 0, 1 << 8],
        0x8000_0008 => [PHYS_BITS | LINEAR_BITS << 8, 0, 0, 0],
        _ => [0; 4],
    }
}

fn text(bytes: &[u8; 4]) -> u32 {
    u32::from_le_bytes(*bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: Context = Context { apic_id: 0, vcpus: 1, apic_enabled: true, cr4: 0, tsc_khz: TSC_KHZ };

    fn string(registers: &[u32]) -> String {
        let bytes: Vec<u8> = registers.iter().flat_map(|word| word.to_le_bytes()).collect();
        String::from_utf8(bytes).unwrap().trim_end_matches('\0').to_owned()
    }

    #[test]
    fn sdm_cpuid_vendor_brand_and_hypervisor() {
        let [max, b, c, d] = cpuid(0, 0, ONE);
        assert_eq!((max, string(&[b, d, c])), (0x16, "GenuineIntel".to_owned()));
        let brand: Vec<u32> = (0x8000_0002..=0x8000_0004).flat_map(|leaf| cpuid(leaf, 0, ONE)).collect();
        assert_eq!(string(&brand), "kiln software processor");
        let [max, b, c, d] = cpuid(0x4000_0000, 0, ONE);
        assert_eq!((max, string(&[b, c, d])), (0x4000_0010, "KVMKVMKVM".to_owned()));
        assert_eq!(cpuid(0x8000_0000, 0, ONE)[0], 0x8000_0008);
    }

    #[test]
    fn sdm_cpuid_01_exactly_the_profiles_features() {
        let [signature, _, ecx, edx] = cpuid(1, 0, ONE);
        let family = signature >> 8 & 0xf;
        let model = signature >> 4 & 0xf | signature >> 12 & 0xf0;
        assert_eq!((family, model), (6, 15));
        assert_eq!(ecx, 0x8120_2000);
        assert_eq!(edx, 0x0789_a379);
        for (name, absent) in [("SSE3", 0), ("SSSE3", 9), ("FMA", 12), ("PCID", 17), ("SSE4.1", 19), ("SSE4.2", 20)]
            .into_iter()
            .chain([("POPCNT", 23), ("XSAVE", 26), ("OSXSAVE", 27), ("AVX", 28), ("RDRAND", 30)])
        {
            assert_eq!(ecx >> absent & 1, 0, "{name}");
        }
        let without_apic = cpuid(1, 0, Context { apic_enabled: false, ..ONE })[3];
        assert_eq!(edx & !without_apic, 1 << 9);
        let osxsave = cpuid(1, 0, Context { cr4: CR4_OSXSAVE, ..ONE })[2];
        assert_eq!(osxsave & !ecx, 1 << 27);
    }

    #[test]
    fn sdm_cpuid_01_and_0b_identify_the_vcpu() {
        let of = Context { apic_id: 2, vcpus: 3, ..ONE };
        let [_, ebx, _, edx] = cpuid(1, 0, of);
        assert_eq!((ebx >> 24, ebx >> 16 & 0xff, ebx >> 8 & 0xff, edx >> 28 & 1), (2, 4, 8, 1));
        assert_eq!(cpuid(0xb, 0, of), [0, 1, 0x100, 2]);
        assert_eq!(cpuid(0xb, 1, of), [2, 3, 0x201, 2]);
        assert_eq!(cpuid(0xb, 2, of), [0, 0, 2, 2]);
        assert_eq!(cpuid(0xb, 1, ONE), [0, 1, 0x201, 0]);
    }

    #[test]
    fn sdm_cpuid_04_cache_sizes_multiply_out() {
        let size = |subleaf| {
            let [eax, ebx, ecx, _] = cpuid(4, subleaf, ONE);
            let (ways, partitions, line) = ((ebx >> 22) + 1, (ebx >> 12 & 0x3ff) + 1, (ebx & 0xfff) + 1);
            (eax & 0x1f, eax >> 5 & 7, ways * partitions * line * (ecx + 1))
        };
        assert_eq!([0, 1, 2, 3].map(size), [(1, 1, 32 << 10), (2, 1, 32 << 10), (3, 2, 1 << 20), (3, 3, 32 << 20)]);
        assert_eq!(cpuid(4, 4, ONE)[0] & 0x1f, 0);
        let sharing = cpuid(4, 3, Context { vcpus: 3, ..ONE })[0] >> 14 & 0xfff;
        assert_eq!(sharing, 3);
    }

    #[test]
    fn sdm_cpuid_time_leaves_agree() {
        let [denominator, numerator, crystal, _] = cpuid(0x15, 0, ONE);
        assert_eq!(u64::from(crystal) * u64::from(numerator) / u64::from(denominator), TSC_HZ);
        assert_eq!(cpuid(0x16, 0, ONE)[0], 1000);
        assert_eq!(cpuid(0x4000_0010, 0, ONE), [1_000_000, 1_000_000, 0, 0]);
        assert_eq!(cpuid(0x8000_0007, 0, ONE)[3], 1 << 8);
        assert_eq!(cpuid(6, 0, ONE), [4, 0, 0, 0]);
        let other = Context { tsc_khz: 2_595_124, ..ONE };
        assert_eq!(cpuid(0x15, 0, other), [200, 519, 1_000_000_000, 0]);
        assert_eq!((cpuid(0x16, 0, other)[0], cpuid(0x4000_0010, 0, other)), (2595, [2_595_124, 1_000_000, 0, 0]));
    }

    #[test]
    fn kvm_features_are_those_the_kernel_needs() {
        assert_eq!(cpuid(0x4000_0001, 0, ONE), [0x0100_000a, 0, 0, 0]);
        assert_eq!(cpuid(0x4000_0100, 0, ONE), [0; 4]);
    }

    #[test]
    fn sdm_cpuid_extended_features_and_address_sizes() {
        assert_eq!(cpuid(0x8000_0001, 0, ONE), [0, 0, 1, 0x2c10_0800]);
        assert_eq!(cpuid(0x8000_0008, 0, ONE)[0], 0x3028);
    }

    #[test]
    fn sdm_cpuid_beyond_the_last_leaf_is_the_last_basic_leaf() {
        let last = cpuid(0x16, 0, ONE);
        for leaf in [0x17, 0x3fff_ffff, 0x8000_0009, 0xffff_ffff] {
            assert_eq!(cpuid(leaf, 0, ONE), last, "{leaf:#x}");
        }
        for unused in [3, 5, 8, 9, 0xa, 0xd, 0x14] {
            assert_eq!(cpuid(unused, 0, ONE), [0; 4], "{unused:#x}");
        }
    }

    #[test]
    fn the_profile_has_not_changed_under_its_name() {
        use sha2::{Digest as _, Sha256};
        let mut all = Sha256::new();
        let leaves = (0..=MAX_BASIC).chain(0x4000_0000..=MAX_HYPERVISOR).chain(0x8000_0000..=MAX_EXTENDED);
        for (leaf, subleaf) in leaves.flat_map(|leaf| (0..5).map(move |subleaf| (leaf, subleaf))) {
            cpuid(leaf, subleaf, ONE).iter().for_each(|word| all.update(word.to_le_bytes()));
        }
        // A guest that was saved under the old name would find another processor: give the new one a new name.
        assert_eq!((PROFILE, hex::encode(&all.finalize()[..8]).as_str()), ("soft-sse2-1", "54591d8252693c14"));
    }
}
