//! The processors that guests see, as tables for KVM_SET_CPUID2 and lists of MSRs.
//!
//! A guest looks once at what its processor can do and then relies on it, so both profiles show only what the neutral
//! state can hold: nothing beyond x87 and SSE in XSAVE's reach, no feature with an MSR that is not saved, no
//! performance counters, no nested virtualization.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Kvm, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VmFd};
use sha2::{Digest as _, Sha256};

use super::clock::Rate;
use super::engine::Profile;
use super::failed;
use crate::hv::HvError;
use crate::hv::profile::{self, Context, PROFILE, TSC_KHZ};

/// EAX, EBX, ECX, EDX.
type Registers = [u32; 4];
const ECX: usize = 2;
const EDX: usize = 3;

/// What of the baseline a host may lack: leaf, register, bit and name. Not here: what KVM makes without the processor's
/// help, and hints.
const NEEDED: [(u32, usize, u32, &str); 22] = [
    (1, ECX, 13, "CMPXCHG16B"),
    (1, ECX, 21, "x2APIC"),
    (1, EDX, 0, "x87"),
    (1, EDX, 3, "PSE"),
    (1, EDX, 4, "TSC"),
    (1, EDX, 5, "MSR"),
    (1, EDX, 6, "PAE"),
    (1, EDX, 8, "CMPXCHG8B"),
    (1, EDX, 13, "PGE"),
    (1, EDX, 15, "CMOV"),
    (1, EDX, 16, "PAT"),
    (1, EDX, 19, "CLFLUSH"),
    (1, EDX, 23, "MMX"),
    (1, EDX, 24, "FXSAVE"),
    (1, EDX, 25, "SSE"),
    (1, EDX, 26, "SSE2"),
    (0x8000_0001, ECX, 0, "LAHF in 64-bit mode"),
    (0x8000_0001, EDX, 11, "SYSCALL"),
    (0x8000_0001, EDX, 20, "no-execute pages"),
    (0x8000_0001, EDX, 26, "1 GiB pages"),
    (0x8000_0001, EDX, 27, "RDTSCP"),
    (0x8000_0007, EDX, 8, "an invariant time stamp counter"),
];

/// SSE3, PCLMULQDQ, SSSE3, CMPXCHG16B, PCID, SSE4.1, SSE4.2, x2APIC, MOVBE, POPCNT, AES, RDRAND.
const HOST_1_ECX: u32 = bits(&[0, 1, 9, 13, 17, 19, 20, 21, 22, 23, 25, 30]);
/// The baseline's, and virtual 8086 mode extensions, debugging extensions, SYSENTER and PSE-36.
const HOST_1_EDX: u32 = bits(&[0, 1, 2, 3, 4, 5, 6, 8, 11, 13, 15, 16, 17, 19, 23, 24, 25, 26]);
/// FSGSBASE, BMI1, SMEP, BMI2, ERMS, INVPCID, FDP only on exceptions, no FCS and FDS, RDSEED, ADX, SMAP, CLFLUSHOPT, CLWB, SHA.
const HOST_7_EBX: u32 = bits(&[0, 3, 6, 7, 8, 9, 10, 13, 18, 19, 20, 23, 24, 29]);
/// UMIP, GFNI (its SSE form), RDPID, MOVDIRI, MOVDIR64B.
const HOST_7_ECX: u32 = bits(&[2, 8, 22, 27, 28]);
/// FSRM, MD_CLEAR, SERIALIZE.
const HOST_7_EDX: u32 = bits(&[4, 10, 14]);
/// Fast zero-length MOVSB, fast short STOSB, fast short CMPSB and SCASB.
const HOST_7_1_EAX: u32 = bits(&[10, 11, 12]);
/// LAHF, LZCNT, SSE4A, misaligned SSE, PREFETCHW.
const HOST_80000001_ECX: u32 = bits(&[0, 5, 6, 7, 8]);
/// SYSCALL, NX, MMX extensions, 1 GiB pages, RDTSCP, long mode.
const HOST_80000001_EDX: u32 = bits(&[11, 20, 22, 26, 27, 29]);

/// MSRs that guests may read and write (Intel SDM volume 4; Linux, `Documentation/virt/kvm/x86/msr.rst`): those of the
/// state, and the few constant ones that kernels ask for. The x2APIC's are not KVM's to filter.
const MSRS: [&[u32]; 3] = [
    &[0x10, 0x17, 0x1b, 0x8b, 0x174, 0x175, 0x176, 0x1a0, 0x277, 0x6e0],
    &[
        0xc000_0080,
        0xc000_0081,
        0xc000_0082,
        0xc000_0083,
        0xc000_0084,
        0xc000_0100,
        0xc000_0101,
        0xc000_0102,
        0xc000_0103,
    ],
    &[0x4b56_4d00, 0x4b56_4d01],
];

/// A processor to show.
#[derive(Debug)]
pub(super) struct Shown {
    kind: Profile,
    name: String,
    rate: Rate,
    /// What the host offers, for [`Profile::Host`].
    offered: Vec<kvm_cpuid_entry2>,
}

impl Shown {
    /// # Errors
    /// [`HvError::Missing`] with all that the host lacks of the baseline.
    pub(super) fn new(kvm: &Kvm, kind: Profile, rate: Rate) -> Result<Self, HvError> {
        let offered = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(failed("KVM_GET_SUPPORTED_CPUID"))?;
        let mut shown = Self { kind, name: String::new(), rate, offered: offered.as_slice().to_vec() };
        let what = shown.missing();
        if kind == Profile::Baseline && !what.is_empty() {
            return Err(HvError::Missing { what });
        }
        shown.name = shown.named();
        Ok(shown)
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn kind(&self) -> Profile {
        self.kind
    }

    pub(super) fn tsc_khz(&self) -> u32 {
        self.rate.guest_khz
    }

    /// What vCPU `id` of `vcpus` shows.
    pub(super) fn table(&self, id: u8, vcpus: u8) -> Result<CpuId, HvError> {
        let context = self.context(id, vcpus);
        CpuId::from_entries(&self.entries(context)).map_err(|_| HvError::Unsupported("a CPUID table of this size"))
    }

    /// Keeps guests from MSRs that are not in the state. The host's own profile lets them read others, whose values are
    /// the kernel's.
    pub(super) fn filter_msrs(&self, vm: &VmFd) -> Result<(), HvError> {
        let allowed: Vec<(u32, u32, Vec<u8>)> = MSRS.iter().map(|numbers| bitmap(numbers)).collect();
        let all = vec![0xff; (READABLE_AT_ONCE / 8) as usize];
        let mut ranges: Vec<MsrFilterRange<'_>> = allowed
            .iter()
            .map(|(base, count, bitmap)| MsrFilterRange {
                flags: MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE,
                base: *base,
                msr_count: *count,
                bitmap,
            })
            .collect();
        if self.kind == Profile::Host {
            ranges.iter_mut().for_each(|range| range.flags = MsrFilterRangeFlags::WRITE);
            ranges.extend([0, 0xc000_0000, 0xc001_0000, 0x4b56_4d00].map(|base| MsrFilterRange {
                flags: MsrFilterRangeFlags::READ,
                base,
                msr_count: READABLE_AT_ONCE,
                bitmap: &all,
            }));
        }
        vm.set_msr_filter(MsrFilterDefaultAction::DENY, &ranges).map_err(failed("KVM_X86_SET_MSR_FILTER"))
    }

    fn context(&self, id: u8, vcpus: u8) -> Context {
        // KVM itself follows the local APIC's enable bit and CR4.OSXSAVE.
        Context { apic_id: id.into(), vcpus: vcpus.into(), apic_enabled: true, cr4: 0, tsc_khz: self.tsc_khz() }
    }

    fn entries(&self, of: Context) -> Vec<kvm_cpuid_entry2> {
        let mut entries = Vec::new();
        for (leaf, subleaves) in profile::leaves() {
            for subleaf in 0..subleaves.max(1) {
                let baseline = profile::cpuid(leaf, subleaf, of);
                let [eax, ebx, ecx, edx] = match self.kind {
                    Profile::Baseline => baseline,
                    Profile::Host => self.host(leaf, subleaf, baseline, of),
                };
                let flags = if subleaves > 0 { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 };
                let (function, index) = (leaf, subleaf);
                entries.push(kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx, ..Default::default() });
            }
        }
        entries
    }

    /// The host's own processor, where `baseline` is what the other profile shows: vendor, model and caches, what the
    /// state can hold of its features, and this machine's topology and clock.
    fn host(&self, leaf: u32, subleaf: u32, baseline: Registers, of: Context) -> Registers {
        let own = self.offered(leaf, subleaf);
        let [eax, ebx, ecx, edx] = own;
        match leaf {
            0 | 0x8000_0000 => [baseline[0], ebx, ecx, edx],
            1 => {
                // Under a hypervisor, the deadline timer, and the count in EBX: as in the baseline.
                let made = bits(&[24, 31]);
                let counted = bits(&[9, 28]);
                let ecx = ecx & HOST_1_ECX | baseline[ECX] & made;
                [eax, baseline[1], ecx, edx & HOST_1_EDX | baseline[EDX] & counted]
            }
            4 if eax & 0x1f != 0 => {
                // How many share the cache, and how many cores there are.
                let sharing = bits(&[14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25]) | 0xfc00_0000;
                let threads = of.vcpus.next_power_of_two();
                let shared = if eax >> 5 & 7 >= 3 { threads } else { 1 };
                [eax & !sharing | (shared - 1) << 14 | (threads.min(64) - 1) << 26, ebx, ecx, edx]
            }
            7 if subleaf == 0 => [baseline[0], ebx & HOST_7_EBX, ecx & HOST_7_ECX, edx & HOST_7_EDX],
            7 => [eax & HOST_7_1_EAX, 0, 0, 0],
            2 | 4 | 0x8000_0002..=0x8000_0006 => own,
            0x8000_0001 => [eax, ebx, ecx & HOST_80000001_ECX, edx & HOST_80000001_EDX],
            0x8000_0008 => [eax & 0xffff, 0, 0, 0],
            _ => baseline,
        }
    }

    fn offered(&self, leaf: u32, subleaf: u32) -> Registers {
        let found = self.offered.iter().find(|entry| {
            let indexed = entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0;
            entry.function == leaf && (!indexed || entry.index == subleaf)
        });
        found.map_or([0; 4], |entry| [entry.eax, entry.ebx, entry.ecx, entry.edx])
    }

    fn missing(&self) -> Vec<&'static str> {
        let lacks =
            |(leaf, register, bit, _): &&(u32, usize, u32, &str)| self.offered(*leaf, 0)[*register] >> bit & 1 == 0;
        NEEDED.iter().filter(lacks).map(|(.., name)| *name).collect()
    }

    /// The name says everything that a guest may rely on; the clock's frequency to the MHz, as of two crystals.
    fn named(&self) -> String {
        let fixed = if self.rate.steered { "" } else { "-fixed" };
        let own_clock = format!("@{}MHz{fixed}", (self.tsc_khz().saturating_add(500)) / 1_000);
        if self.kind == Profile::Baseline {
            let clock = if self.tsc_khz() == TSC_KHZ && self.rate.steered { "" } else { own_clock.as_str() };
            return format!("{PROFILE}{clock}");
        }
        let mut digest = Sha256::new();
        for entry in self.entries(Context { tsc_khz: TSC_KHZ, ..self.context(0, 1) }) {
            for word in [entry.function, entry.index, entry.eax, entry.ebx, entry.ecx, entry.edx] {
                digest.update(word.to_le_bytes());
            }
        }
        format!("host-{}{own_clock}", hex::encode(&digest.finalize()[..8]))
    }
}

/// MSRs in one range of a filter: as many as the two architectural ranges have.
const READABLE_AT_ONCE: u32 = 0x2000;

/// A range of MSRs in which the ones with `numbers`, ascending, are allowed: its first, its size, and a bit each.
fn bitmap(numbers: &[u32]) -> (u32, u32, Vec<u8>) {
    let (first, last) = (numbers.first().copied().unwrap_or(0), numbers.last().copied().unwrap_or(0));
    let count = last - first + 1;
    let mut bitmap = vec![0u8; count.div_ceil(8) as usize];
    for at in numbers.iter().map(|number| number - first) {
        bitmap[(at / 8) as usize] |= 1 << (at % 8);
    }
    (first, count, bitmap)
}

const fn bits(set: &[u32]) -> u32 {
    let (mut all, mut n) = (0, 0);
    while n < set.len() {
        all |= 1 << set[n];
        n += 1;
    }
    all
}
