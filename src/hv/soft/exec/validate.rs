//! Which saved states a processor can be in.

use crate::hv::soft::cpu::{cr0, efer, seg};
use crate::hv::soft::flags;
use crate::hv::state::VcpuState;
use crate::hv::state::check::{check, require};
use crate::hv::state::x86_64::{Activity, Delivery, DeliverySource};

use super::control::{is_valid_cr3, is_valid_cr4};

/// In a segment's type: code; of data, that it grows down. And what a segment register in use has beside it: S and P.
const CODE: u16 = 1 << 3;
const EXPAND_DOWN: u16 = 1 << 2;
const IN_USE: u16 = 1 << 4 | 1 << 7;
/// CS.L and CS.D.
const LONG: u16 = 1 << 13;
const DEFAULT_32: u16 = 1 << 14;
/// A segment's privilege level.
const DPL: u16 = 3 << 5;

/// What is wrong with a state, if anything is.
pub(super) fn validate(state: &VcpuState) -> Result<(), &'static str> {
    check(state)?;
    mode(state)?;
    events(state)
}

/// Control registers are this processor's, and the code and stack segments suit the mode (Intel SDM volume 3A, 2.5, 22.1).
fn mode(state: &VcpuState) -> Result<(), &'static str> {
    require(is_valid_cr3(state.cr3), "CR3 past the physical address width")?;
    require(is_valid_cr4(state.cr4), "CR4 with bits this processor does not have")?;
    require(state.rflags & flags::VM == 0, "virtual-8086 mode")?;
    let (code, stack) = (state.segments[seg::CS].attributes, state.segments[seg::SS].attributes);
    require(code & (CODE | EXPAND_DOWN) != EXPAND_DOWN, "CS is a segment that grows down")?;
    let long_code = state.msrs.efer & efer::LMA != 0 && code & LONG != 0;
    require(long_code || state.rip >> 32 == 0, "RIP past 32 bits outside 64-bit mode")?;
    if state.cr0 & cr0::PE == 0 {
        return require(stack & DPL == 0, "real mode at a level of privilege");
    }
    // Until its first far jump, protected mode has the code segment of real mode, which may be of a data type.
    require(code & IN_USE == IN_USE, "CS is not a present code segment")?;
    if long_code {
        require(code & (CODE | DEFAULT_32) == CODE, "CS is not a 64-bit code segment")?;
    }
    Ok(())
}

/// What a processor waits for agrees with what it was told (SDM 9.4, 7.3 to 7.7).
fn events(state: &VcpuState) -> Result<(), &'static str> {
    let events = &state.events;
    let waits = matches!(state.activity, Activity::WaitsForInit | Activity::WaitsForStartUp);
    require(
        events.start_up.is_none() || state.activity == Activity::WaitsForStartUp,
        "a start-up message to a processor that does not wait for one",
    )?;
    let Some(delivery) = events.delivering else { return Ok(()) };
    require(!waits, "an event on its way into a processor that nobody has started")?;
    require(is_possible(&delivery, state.cr0 & cr0::PE != 0), "an event under way that there is not")
}

/// Whether an event's source has its vector, and whether it has an error code as it should: none in real mode.
fn is_possible(delivery: &Delivery, protected: bool) -> bool {
    let has_error = matches!(delivery.vector, 8 | 10..=14 | 17);
    match delivery.source {
        DeliverySource::External | DeliverySource::Software => delivery.error.is_none(),
        DeliverySource::Nmi => delivery.vector == 2 && delivery.error.is_none(),
        DeliverySource::Exception => {
            delivery.vector < 32 && delivery.vector != 2 && delivery.error.is_some() == (has_error && protected)
        }
    }
}
