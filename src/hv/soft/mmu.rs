//! Memory as instructions see it: linear addresses through 4-level paging (Intel SDM volume 3A, chapter 5)
//! to RAM or to a device. Outside long mode, [`legacy_paging`](super::legacy_paging) translates.
//!
//! The fast path is a [`Tlb`](super::tlb::Tlb) hit. Everything else comes here: the page walk with its
//! permission checks and accessed and dirty bits, accesses that cross a page (both pages are checked before a
//! byte is written), MMIO, and writes to pages that hold decoded instructions.

use crate::mem::Scalar;
use crate::units::{GuestAddr, PAGE_SIZE};

use super::cpu::{Cpu, cr0, cr4, efer, is_canonical};
use super::fault::{self, Exception, Stop};
use super::tlb::Grant;

pub(super) const PRESENT: u64 = 1 << 0;
pub(super) const WRITABLE: u64 = 1 << 1;
pub(super) const USER: u64 = 1 << 2;
pub(super) const ACCESSED: u64 = 1 << 5;
pub(super) const DIRTY: u64 = 1 << 6;
pub(super) const LARGE: u64 = 1 << 7;
pub(super) const GLOBAL: u64 = 1 << 8;
pub(super) const NO_EXECUTE: u64 = 1 << 63;
/// Physical address bits of a paging entry. CPUID says 40 physical bits; above them is reserved.
pub(super) const ADDRESS: u64 = 0x00ff_ffff_f000;
pub(super) const RESERVED: u64 = 0x000f_ff00_0000_0000;

/// What an access wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    Read,
    Write,
    Fetch,
}

/// On whose behalf: instructions access memory at the current privilege level, the processor's own
/// reads of descriptor tables and the TSS as a supervisor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Privilege {
    Current,
    Supervisor,
}

/// A completed page walk.
#[derive(Clone, Copy, Debug)]
pub(super) struct Walk {
    pub(super) gpa: u64,
    pub(super) writable: bool,
    pub(super) executable: bool,
    pub(super) dirty: bool,
    pub(super) global: bool,
    /// Bytes that the leaf entry maps.
    pub(super) size: u64,
}

/// Where a byte is.
#[derive(Clone, Copy, Debug)]
enum Place {
    Ram(u64),
    Device(u64),
}

const OUT_OF_RAM: Stop = Stop::Unimplemented("RAM offset out of range");

/// Exchanges until nobody comes between.
#[inline(always)]
fn update_by<T: Scalar>(
    mut old: T,
    mut new: impl FnMut(T) -> T,
    mut exchange: impl FnMut(T, T) -> Option<T>,
) -> Option<T> {
    loop {
        let found = exchange(old, new(old))?;
        if found.widen() == old.widen() {
            return Some(old);
        }
        old = found;
    }
}

impl Cpu {
    /// Reads a value at a linear address.
    ///
    /// # Errors
    /// #PF as paging says; #GP(0) for a non-canonical address (see [`stack_fault`](super::cpu::stack_fault)).
    #[inline(always)]
    pub(super) fn read<T: Scalar>(&mut self, va: u64) -> Result<T, Stop> {
        if let Some(offset) = self.tlb.read(va, T::SIZE)
            && let Some(value) = self.ram.load(offset)
        {
            return Ok(value);
        }
        self.read_slow(va, Access::Read, Privilege::Current)
    }

    /// Reads a value that the same instruction will write back: faults are those of the write.
    #[inline(always)]
    pub(super) fn read_for_write<T: Scalar>(&mut self, va: u64) -> Result<T, Stop> {
        if let Some(offset) = self.tlb.write(va, T::SIZE)
            && let Some(value) = self.ram.load(offset)
        {
            return Ok(value);
        }
        self.read_slow(va, Access::Write, Privilege::Current)
    }

    /// Writes a value at a linear address, all of it or nothing.
    #[inline(always)]
    pub(super) fn write<T: Scalar>(&mut self, va: u64, value: T) -> Result<(), Stop> {
        if let Some(offset) = self.tlb.write(va, T::SIZE)
            && self.ram.store(offset, value).is_some()
        {
            return Ok(());
        }
        self.write_slow(va, value, Privilege::Current)
    }

    /// Replaces the value at a linear address by what `new` makes of it, as one access and a full barrier, and returns what
    /// was there: LOCK. `new` may be called several times, and only the last call counts.
    #[inline(always)]
    pub(super) fn update<T: Scalar>(&mut self, va: u64, new: impl FnMut(T) -> T) -> Result<T, Stop> {
        match self.tlb.write(va, T::SIZE) {
            Some(offset) => self.update_ram(offset, new),
            None => self.update_slow(va, new),
        }
    }

    #[inline(always)]
    fn update_ram<T: Scalar>(&self, offset: u64, new: impl FnMut(T) -> T) -> Result<T, Stop> {
        let old = self.ram.load(offset);
        old.and_then(|old| update_by(old, new, |old, new| self.ram.compare_exchange(offset, old, new)))
            .ok_or(OUT_OF_RAM)
    }

    #[cold]
    #[inline(never)]
    fn update_slow<T: Scalar>(&mut self, va: u64, mut new: impl FnMut(T) -> T) -> Result<T, Stop> {
        let in_page = PAGE_SIZE - va % PAGE_SIZE;
        let first = self.place(va, Access::Write, Privilege::Current)?;
        if T::SIZE <= in_page
            && let Place::Ram(offset) = first
        {
            let old = self.update_ram(offset, new)?;
            self.note_ram_write(offset, T::SIZE);
            return Ok(old);
        }
        if T::SIZE > in_page
            && let Place::Ram(first) = first
            && let Place::Ram(second) = self.place(va.wrapping_add(in_page), Access::Write, Privilege::Current)?
        {
            let old = self.read(va)?;
            let exchange = |old, new| self.ram.compare_exchange_across(first, in_page, second, old, new);
            let old = update_by(old, new, exchange).ok_or(OUT_OF_RAM)?;
            self.note_ram_write(first, in_page);
            self.note_ram_write(second, T::SIZE - in_page);
            return Ok(old);
        }
        // A device has no read-modify-write.
        let old = self.read_for_write(va)?;
        self.write(va, new(old))?;
        Ok(old)
    }

    /// Reads as a supervisor whatever the privilege level: descriptor tables, the TSS.
    pub(super) fn read_system<T: Scalar>(&mut self, va: u64) -> Result<T, Stop> {
        self.read_slow(va, Access::Read, Privilege::Supervisor)
    }

    /// Writes as a supervisor: accessed and busy bits, and stack frames of a more privileged level.
    pub(super) fn write_system<T: Scalar>(&mut self, va: u64, value: T) -> Result<(), Stop> {
        self.write_slow(va, value, Privilege::Supervisor)
    }

    /// Checks that `len` bytes (at most a page) at `va` may be written, and marks their pages dirty.
    pub(super) fn probe_write(&mut self, va: u64, len: u64) -> Result<(), Stop> {
        self.place(va, Access::Write, Privilege::Current)?;
        let last = va.wrapping_add(len - 1);
        if (va ^ last) & !(PAGE_SIZE - 1) != 0 {
            self.place(last & !(PAGE_SIZE - 1), Access::Write, Privilege::Current)?;
        }
        Ok(())
    }

    /// The RAM offset of a byte for a host-side copy within its page, or `None` when it is a device's.
    pub(super) fn ram_offset(&mut self, va: u64, access: Access) -> Result<Option<u64>, Stop> {
        Ok(match self.place(va, access, Privilege::Current)? {
            Place::Ram(offset) => Some(offset),
            Place::Device(_) => None,
        })
    }

    /// The RAM offset that instruction bytes at `va` are fetched from.
    pub(super) fn fetch_offset(&mut self, va: u64) -> Result<u64, Stop> {
        if let Some(offset) = self.tlb.fetch(va) {
            return Ok(offset);
        }
        match self.place(va, Access::Fetch, Privilege::Current)? {
            Place::Ram(offset) => Ok(offset),
            Place::Device(_) => Err(Stop::Unimplemented("instruction fetch from a device")),
        }
    }

    /// Tells that RAM was written past the TLB (a host-side copy): decoded instructions there are dropped. To be called after
    /// the write, since other vCPUs act on it at once.
    #[inline]
    pub(super) fn note_ram_write(&mut self, offset: u64, len: u64) {
        self.sharing.wrote(offset, len);
        if self.code_map.hits(offset, len) {
            self.code_writes.push((offset, len as u32));
        }
    }

    #[cold]
    #[inline(never)]
    fn read_slow<T: Scalar>(&mut self, va: u64, access: Access, privilege: Privilege) -> Result<T, Stop> {
        let in_page = PAGE_SIZE - va % PAGE_SIZE;
        let first = self.place(va, access, privilege)?;
        if T::SIZE <= in_page {
            return Ok(match first {
                Place::Ram(offset) => self.ram.load(offset).ok_or(OUT_OF_RAM)?,
                Place::Device(gpa) => T::narrow(self.device_read(gpa, T::SIZE)),
            });
        }
        let second = self.place(va.wrapping_add(in_page), access, privilege)?;
        let low = self.read_part(first, in_page);
        let high = self.read_part(second, T::SIZE - in_page);
        Ok(T::narrow(low | high << (8 * in_page)))
    }

    #[cold]
    #[inline(never)]
    fn write_slow<T: Scalar>(&mut self, va: u64, value: T, privilege: Privilege) -> Result<(), Stop> {
        let in_page = PAGE_SIZE - va % PAGE_SIZE;
        let first = self.place(va, Access::Write, privilege)?;
        if T::SIZE <= in_page {
            match first {
                Place::Ram(offset) => {
                    self.ram.store(offset, value).ok_or(OUT_OF_RAM)?;
                    self.note_ram_write(offset, T::SIZE);
                }
                Place::Device(gpa) => self.device_write(gpa, value.widen(), T::SIZE),
            }
            return Ok(());
        }
        let second = self.place(va.wrapping_add(in_page), Access::Write, privilege)?;
        self.write_part(first, value.widen(), in_page);
        self.write_part(second, value.widen() >> (8 * in_page), T::SIZE - in_page);
        Ok(())
    }

    fn read_part(&mut self, place: Place, len: u64) -> u128 {
        match place {
            Place::Device(gpa) => self.device_read(gpa, len),
            Place::Ram(offset) => (0..len).rev().fold(0, |value, i| {
                let byte = self.ram.load::<u8>(offset + i).unwrap_or(0xff);
                value << 8 | u128::from(byte)
            }),
        }
    }

    fn write_part(&mut self, place: Place, value: u128, len: u64) {
        match place {
            Place::Device(gpa) => self.device_write(gpa, value, len),
            Place::Ram(offset) => {
                for i in 0..len {
                    // Within the page that `place` translated, so within RAM.
                    let _ = self.ram.store(offset + i, (value >> (8 * i)) as u8);
                }
                self.note_ram_write(offset, len);
            }
        }
    }

    /// A device sees accesses of at most 8 bytes.
    fn device_read(&mut self, gpa: u64, len: u64) -> u128 {
        let mut bytes = [0xff; 16];
        for start in (0..len as usize).step_by(8) {
            let part = &mut bytes[start..(start + 8).min(len as usize)];
            let at = gpa + start as u64;
            if !self.apic_read(at, part) {
                self.io.mmio_read(GuestAddr(at), part);
            }
        }
        u128::from_le_bytes(bytes) & (u128::MAX >> (128 - 8 * len))
    }

    fn device_write(&mut self, gpa: u64, value: u128, len: u64) {
        let bytes = value.to_le_bytes();
        for start in (0..len as usize).step_by(8) {
            let part = &bytes[start..(start + 8).min(len as usize)];
            let at = gpa + start as u64;
            if !self.apic_write(at, part) {
                self.io.mmio_write(GuestAddr(at), part);
            }
        }
    }

    /// Translates one byte's address, caching the translation.
    fn place(&mut self, va: u64, access: Access, privilege: Privilege) -> Result<Place, Stop> {
        let user = privilege == Privilege::Current && self.cpl() == 3;
        if !is_canonical(va) {
            return Err(Exception::general_protection(0).into());
        }
        let walk = self.walk(va, access, user)?;
        let Some(offset) = self.ram.offset_of(GuestAddr(walk.gpa)) else {
            return Ok(Place::Device(walk.gpa));
        };
        if privilege == Privilege::Current {
            if access == Access::Fetch {
                self.fetches.note(va, walk.size, walk.global);
            }
            if walk.size > PAGE_SIZE {
                self.tlb.note_large(va, walk.size);
            }
            // Without the dirty bit the first write must come here to set it.
            let writable = walk.writable && walk.dirty && (access == Access::Write || !self.sharing.counts_grants());
            let grant = Grant {
                read: true,
                write: writable && self.sharing.may_grant(offset),
                // Only what was fetched from is noted, so only that may be fetched from without coming here.
                fetch: walk.executable && access == Access::Fetch,
                global: walk.global,
            };
            self.tlb.fill(va, offset, grant);
        }
        Ok(Place::Ram(offset))
    }

    /// Walks the paging structures (SDM 5.5), checks rights (5.6) and sets accessed and dirty bits (5.8). Begins anew when
    /// another vCPU changes an entry meanwhile.
    fn walk(&mut self, va: u64, access: Access, user: bool) -> Result<Walk, Stop> {
        loop {
            let walk = if self.is_long_mode() {
                self.try_walk(va, access, user)?
            } else {
                self.try_walk_legacy(va, access, user)?
            };
            if let Some(walk) = walk {
                return Ok(walk);
            }
        }
    }

    /// `None` when an entry has changed before its bits were set.
    fn try_walk(&mut self, va: u64, access: Access, user: bool) -> Result<Option<Walk>, Stop> {
        let nxe = self.control.efer & efer::NXE != 0;
        let fault = |code: u32| self.paging_fault(va, access, user, code);
        let mut table = self.control.cr3 & ADDRESS;
        let (mut writable, mut user_ok, mut no_execute) = (true, true, false);
        let mut path = [(0u64, 0u64); 4];
        let mut level = 4usize;
        let (entry, shift) = loop {
            level -= 1;
            let shift = 12 + 9 * level as u32;
            let at = table + (va >> shift & 0x1ff) * 8;
            let entry = self.paging_entry(at).ok_or_else(|| fault(fault::PF_RESERVED | fault::PF_PRESENT))?;
            if entry & PRESENT == 0 {
                return Err(fault(0));
            }
            let leaf = level == 0 || (entry & LARGE != 0 && level < 3);
            let misaligned = if leaf && level > 0 { ((1u64 << shift) - 1) & ADDRESS & !(1 << 12) } else { 0 };
            let reserved =
                RESERVED | misaligned | if nxe { 0 } else { NO_EXECUTE } | if level == 3 { LARGE } else { 0 };
            if entry & reserved != 0 {
                return Err(fault(fault::PF_RESERVED | fault::PF_PRESENT));
            }
            writable &= entry & WRITABLE != 0;
            user_ok &= entry & USER != 0;
            no_execute |= entry & NO_EXECUTE != 0;
            path[level] = (at, entry);
            if leaf {
                break (entry, shift);
            }
            table = entry & ADDRESS;
        };
        let write_ok = writable || (!user && self.control.cr0 & cr0::WP == 0);
        let allowed = (user_ok || !user)
            && match access {
                Access::Read => true,
                Access::Write => write_ok,
                Access::Fetch => !no_execute,
            };
        if !allowed {
            return Err(fault(fault::PF_PRESENT));
        }
        let dirty = access == Access::Write || entry & DIRTY != 0;
        for (step, &(at, value)) in path.iter().enumerate().skip(level) {
            let set = ACCESSED | if step == level && dirty { DIRTY } else { 0 };
            if value & set != set && !self.set_paging_entry(at, value, value | set) {
                return Ok(None);
            }
        }
        let offset_mask = (1u64 << shift) - 1;
        Ok(Some(Walk {
            gpa: (entry & ADDRESS & !offset_mask) | (va & offset_mask),
            writable: write_ok,
            executable: !no_execute,
            dirty,
            global: entry & GLOBAL != 0 && self.control.cr4 & cr4::PGE != 0,
            size: 1 << shift,
        }))
    }

    /// #PF with an error code that says `code` and what the access was.
    pub(super) fn paging_fault(&self, va: u64, access: Access, user: bool, code: u32) -> Stop {
        let pae = self.control.cr4 & cr4::PAE != 0;
        let fetch = match access {
            Access::Read => 0,
            Access::Write => fault::PF_WRITE,
            // The fetch bit is defined only with no-execute (or SMEP) enabled.
            Access::Fetch if pae && self.control.efer & efer::NXE != 0 => fault::PF_FETCH,
            Access::Fetch => 0,
        };
        Exception::page(va, code | fetch | if user { fault::PF_USER } else { 0 }).into()
    }

    fn paging_entry(&self, gpa: u64) -> Option<u64> {
        self.ram.load(self.ram.offset_of(GuestAddr(gpa))?)
    }

    /// Changes an entry that was just read, unless it is another one now.
    pub(super) fn set_paging_entry<T: Scalar + PartialEq>(&mut self, gpa: u64, old: T, new: T) -> bool {
        let Some(offset) = self.ram.offset_of(GuestAddr(gpa)) else { return true };
        let set = self.ram.compare_exchange(offset, old, new) == Some(old);
        if set {
            self.note_ram_write(offset, T::SIZE);
        }
        set
    }
}
