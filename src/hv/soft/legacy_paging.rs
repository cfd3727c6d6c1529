//! Translation outside long mode: none with paging off, 32-bit paging and PAE paging (Intel SDM volume 3A, 5.3 and 5.4).
//!
//! The four page-directory pointers of PAE paging are read at every walk, as AMD's processors do: they are not
//! registers of their own, and no saved state has them.

use super::cpu::{Cpu, cr0, cr4, efer};
use super::fault::{self, Stop};
use super::mmu::{
    ACCESSED, ADDRESS, Access, DIRTY, GLOBAL, LARGE, NO_EXECUTE, PRESENT, RESERVED, USER, WRITABLE, Walk,
};
use crate::units::{GuestAddr, PAGE_SIZE};

/// Physical address bits of a 32-bit entry.
const ADDRESS_32: u64 = 0xffff_f000;
/// Reserved in a 32-bit entry for a large page: bits 13 to 21, since there is no PSE-36.
const RESERVED_LARGE_32: u64 = 0x003f_e000;
/// Reserved in a page-directory pointer, beside the address bits that are not there: bits 1, 2 and 5 to 8.
const RESERVED_POINTER: u64 = 0x1e6;

/// An entry of a paging structure, and where it is.
#[derive(Clone, Copy)]
struct Entry {
    at: u64,
    value: u64,
}

/// What the entries on the way to a page say together.
struct Rights {
    writable: bool,
    user: bool,
    no_execute: bool,
}

impl Rights {
    const ALL: Self = Self { writable: true, user: true, no_execute: false };

    fn narrow(&mut self, entry: u64) {
        self.writable &= entry & WRITABLE != 0;
        self.user &= entry & USER != 0;
        self.no_execute |= entry & NO_EXECUTE != 0;
    }
}

impl Cpu {
    /// Translates a 32-bit linear address outside long mode; `None` when an entry has changed before its bits were set.
    pub(super) fn try_walk_legacy(&mut self, va: u64, access: Access, user: bool) -> Result<Option<Walk>, Stop> {
        let va = va & 0xffff_ffff;
        if self.control.cr0 & cr0::PG == 0 {
            let all = Walk { gpa: va, writable: true, executable: true, dirty: true, global: false, size: PAGE_SIZE };
            return Ok(Some(all));
        }
        if self.control.cr4 & cr4::PAE != 0 { self.walk_pae(va, access, user) } else { self.walk_32(va, access, user) }
    }

    /// 32-bit paging: two levels of 4-byte entries.
    fn walk_32(&mut self, va: u64, access: Access, user: bool) -> Result<Option<Walk>, Stop> {
        let reserved = || self.paging_fault(va, access, user, fault::PF_RESERVED | fault::PF_PRESENT);
        let entry = |at: u64| -> Result<Entry, Stop> {
            let offset = self.ram.offset_of(GuestAddr(at));
            let value = offset.and_then(|offset| self.ram.load::<u32>(offset)).ok_or_else(reserved)?.into();
            let present = value & PRESENT != 0;
            if present { Ok(Entry { at, value }) } else { Err(self.paging_fault(va, access, user, 0)) }
        };
        let mut rights = Rights::ALL;
        let directory = entry((self.control.cr3 & ADDRESS_32) + (va >> 22) * 4)?;
        rights.narrow(directory.value);
        if directory.value & LARGE != 0 && self.control.cr4 & cr4::PSE != 0 {
            if directory.value & RESERVED_LARGE_32 != 0 {
                return Err(reserved());
            }
            return self.reach::<4>(va, access, user, rights, &[directory], 22, ADDRESS_32);
        }
        let table = entry((directory.value & ADDRESS_32) + (va >> 12 & 0x3ff) * 4)?;
        rights.narrow(table.value);
        self.reach::<4>(va, access, user, rights, &[table, directory], 12, ADDRESS_32)
    }

    /// PAE paging: four pointers, then two levels of 8-byte entries.
    fn walk_pae(&mut self, va: u64, access: Access, user: bool) -> Result<Option<Walk>, Stop> {
        let nxe = self.control.efer & efer::NXE != 0;
        let never = RESERVED | 0x7ff0_0000_0000_0000 | if nxe { 0 } else { NO_EXECUTE };
        let reserved = || self.paging_fault(va, access, user, fault::PF_RESERVED | fault::PF_PRESENT);
        let entry = |at: u64, bad: u64| -> Result<Entry, Stop> {
            let offset = self.ram.offset_of(GuestAddr(at));
            let value = offset.and_then(|offset| self.ram.load::<u64>(offset)).ok_or_else(reserved)?;
            if value & PRESENT == 0 {
                return Err(self.paging_fault(va, access, user, 0));
            }
            if value & bad == 0 { Ok(Entry { at, value }) } else { Err(reserved()) }
        };
        let pointers = self.control.cr3 & 0xffff_ffe0;
        let pointer = entry(pointers + (va >> 30) * 8, RESERVED | !0x000f_ffff_ffff_ffff | RESERVED_POINTER)?;
        let mut rights = Rights::ALL;
        let directory = entry((pointer.value & ADDRESS) + (va >> 21 & 0x1ff) * 8, never)?;
        rights.narrow(directory.value);
        if directory.value & LARGE != 0 {
            if directory.value & 0x001f_e000 != 0 {
                return Err(reserved());
            }
            return self.reach::<8>(va, access, user, rights, &[directory], 21, ADDRESS);
        }
        let table = entry((directory.value & ADDRESS) + (va >> 12 & 0x1ff) * 8, never)?;
        rights.narrow(table.value);
        self.reach::<8>(va, access, user, rights, &[table, directory], 12, ADDRESS)
    }

    /// Ends a walk at its leaf, the first of `path`: checks rights, and sets accessed and dirty bits in entries of
    /// `BYTES`.
    #[expect(clippy::too_many_arguments, reason = "what a walk has found out")]
    fn reach<const BYTES: u64>(
        &mut self,
        va: u64,
        access: Access,
        user: bool,
        rights: Rights,
        path: &[Entry],
        shift: u32,
        address: u64,
    ) -> Result<Option<Walk>, Stop> {
        let writable = rights.writable || (!user && self.control.cr0 & cr0::WP == 0);
        let allowed = (rights.user || !user)
            && match access {
                Access::Read => true,
                Access::Write => writable,
                Access::Fetch => !rights.no_execute,
            };
        if !allowed {
            return Err(self.paging_fault(va, access, user, fault::PF_PRESENT));
        }
        let leaf = path[0].value;
        let dirty = access == Access::Write || leaf & DIRTY != 0;
        for (step, entry) in path.iter().enumerate() {
            let set = ACCESSED | if step == 0 && dirty { DIRTY } else { 0 };
            if entry.value & set != set && !self.mark_entry::<BYTES>(*entry, set) {
                return Ok(None);
            }
        }
        let within = (1u64 << shift) - 1;
        Ok(Some(Walk {
            gpa: leaf & address & !within | va & within,
            writable,
            executable: !rights.no_execute,
            dirty,
            global: leaf & GLOBAL != 0 && self.control.cr4 & cr4::PGE != 0,
            size: 1 << shift,
        }))
    }

    /// Sets bits of an entry that was just read, unless it is another one now.
    fn mark_entry<const BYTES: u64>(&mut self, Entry { at, value }: Entry, set: u64) -> bool {
        if BYTES == 4 {
            self.set_paging_entry(at, value as u32, (value | set) as u32)
        } else {
            self.set_paging_entry(at, value, value | set)
        }
    }
}
