//! What no x86-64 processor can be in, whatever runs it. Engines add what is theirs.

use super::VcpuState;

const CR0_PE: u64 = 1 << 0;
const CR0_NW: u64 = 1 << 29;
const CR0_CD: u64 = 1 << 30;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// SCE, LME, LMA and NXE.
const EFER_KNOWN: u64 = 1 << 0 | EFER_LME | EFER_LMA | 1 << 11;
/// Of RFLAGS: bit 1 reads as one; bits 3, 5 and 15, and all above ID, as zero.
const RFLAGS_FIXED: u64 = 1 << 1;
const RFLAGS_KNOWN: u64 = 0x3f_7fd7;

/// FS and GS, whose bases are whole addresses.
const FS: usize = 4;
const GS: usize = 5;

/// That `what` does not hold of a state, or nothing.
pub(in crate::hv) fn require(holds: bool, what: &'static str) -> Result<(), &'static str> {
    if holds { Ok(()) } else { Err(what) }
}

/// Whether a linear address is canonical with 48 bits.
#[inline(always)]
pub(in crate::hv) const fn is_canonical(address: u64) -> bool {
    (((address << 16) as i64) >> 16) as u64 == address
}

/// Whether each byte of a PAT names a memory type (Intel SDM volume 3A, 12.12.2).
pub(in crate::hv) fn is_valid_pat(value: u64) -> bool {
    value.to_le_bytes().iter().all(|kind| matches!(kind, 0 | 1 | 4..=7))
}

/// Whether a CR0 value does not contradict itself (SDM 2.5).
pub(in crate::hv) fn is_valid_cr0(value: u64) -> bool {
    let without = |bit: u64, needed: u64| value & bit != 0 && value & needed == 0;
    value >> 32 == 0 && !without(CR0_PG, CR0_PE) && !without(CR0_NW, CR0_CD)
}

/// What is wrong with a state under every engine, if anything is.
pub(in crate::hv) fn check(state: &VcpuState) -> Result<(), &'static str> {
    let msrs = &state.msrs;
    require(is_valid_cr0(state.cr0), "CR0 contradicts itself")?;
    require(msrs.efer & !EFER_KNOWN == 0, "EFER with bits this processor does not have")?;
    let (long, paging) = (msrs.efer & EFER_LMA != 0, state.cr0 & CR0_PG != 0);
    require(long == (paging && msrs.efer & EFER_LME != 0), "EFER.LMA is not what EFER.LME and CR0.PG make it")?;
    require(!long || state.cr4 & CR4_PAE != 0, "long mode without CR4.PAE")?;
    require(state.cr8 <= 15, "CR8 above 15")?;
    require(state.rflags & RFLAGS_FIXED != 0 && state.rflags & !RFLAGS_KNOWN == 0, "RFLAGS with reserved bits")?;
    require(state.dr[4] >> 32 == 0 && state.dr[5] >> 32 == 0, "DR6 or DR7 wider than 32 bits")?;
    require(addresses(state).into_iter().all(is_canonical), "an address is not canonical")?;
    let mut segments = state.segments.iter().chain([&state.ldtr, &state.tr]);
    require(segments.all(|segment| segment.attributes & 0x0f00 == 0), "segment attributes with limit bits")?;
    require(is_valid_pat(msrs.pat), "PAT names no memory type")?;
    require(msrs.sfmask >> 32 == 0 && msrs.tsc_aux >> 32 == 0, "an MSR wider than 32 bits")
}

fn addresses(state: &VcpuState) -> [u64; 12] {
    let msrs = &state.msrs;
    [
        state.rip,
        state.gdtr.base,
        state.idtr.base,
        state.ldtr.base,
        state.tr.base,
        state.segments[FS].base,
        state.segments[GS].base,
        msrs.lstar,
        msrs.cstar,
        msrs.kernel_gs_base,
        msrs.sysenter_esp,
        msrs.sysenter_eip,
    ]
}
