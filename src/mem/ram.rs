//! The mapping itself, and the processor's view of it: loads and stores here, read-modify-writes in `atomic`.
#![allow(unsafe_code, reason = "unsafe fence: the one place that turns RAM offsets into host pointers")]

use std::fs::File;
use std::io;
use std::ptr::NonNull;
use std::sync::Mutex;

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};
use vm_memory::bitmap::Bitmap as _;
use vm_memory::mmap::{GuestRegionMmap, MmapRegion};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::CodePages;
use super::MemoryId;
use super::MemoryImage;
use super::PageSet;
use super::cell::Cell;
use crate::units::{Bytes, GuestAddr, PAGE_SIZE};

/// Where the MMIO hole begins: RAM below this GPA is the low part.
pub const HOLE_START: GuestAddr = GuestAddr(0xc000_0000);
/// Where the MMIO hole ends: RAM that does not fit below the hole continues here.
pub const HOLE_END: GuestAddr = GuestAddr(0x1_0000_0000);

/// The devices' view of RAM; writes through it are noted in [`CodePages`].
pub type GuestMemory = GuestMemoryMmap<CodePages>;

/// A byte's position in the host mapping (not a guest-physical address: see the hole).
pub type RamOffset = u64;

/// Why guest RAM could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RamError {
    /// The size is zero, not a multiple of the page size, or past what this machine model has room for.
    #[error("guest memory of {} bytes: want a multiple of {PAGE_SIZE}, from one page to 1 TiB", .0.0)]
    Size(Bytes),
    /// The host refused the mapping.
    #[error("mapping {} bytes of guest memory", .0.0)]
    Map(Bytes, #[source] io::Error),
    /// A file that is to be mapped ends before the memory does.
    #[error("a file of {} bytes, where {} are wanted from byte {offset} on", found.0, wanted.0)]
    FileTooShort {
        /// The file's size.
        found: Bytes,
        /// Where the memory begins in it.
        offset: u64,
        /// The memory's size.
        wanted: Bytes,
    },
    /// A place in a file that cannot be mapped: not on a page boundary, or past what a file can have.
    #[error("memory cannot begin at byte {0} of a file")]
    FileOffset(u64),
    /// The file cannot be looked at.
    #[error("looking at a memory file")]
    File(#[source] io::Error),
    /// What RAM holds could not be kept.
    #[error("copying guest memory")]
    Freeze(#[source] io::Error),
    /// The host did not take memory back.
    #[error("giving memory back to the host")]
    GiveBack(#[source] io::Error),
}

/// An integer the processor moves to and from memory, little endian.
pub trait Scalar: Copy + sealed::Sealed {
    /// Its size in bytes.
    const SIZE: u64;
    /// Zero-extends.
    fn widen(self) -> u128;
    /// Keeps the low bytes.
    fn narrow(wide: u128) -> Self;
}
mod sealed {
    /// Types for which every bit pattern is a value and that have no padding.
    #[allow(private_bounds, reason = "how they lie in memory is this module's matter")]
    pub trait Sealed: super::Cell {}
}
macro_rules! scalar {
    ($($t:ty),*) => { $(
        impl sealed::Sealed for $t {}
        impl Scalar for $t {
            const SIZE: u64 = size_of::<$t>() as u64;
            #[inline(always)]
            fn widen(self) -> u128 {
                self.into()
            }
            #[inline(always)]
            fn narrow(wide: u128) -> Self {
                wide as Self
            }
        }
    )* };
}
scalar!(u8, u16, u32, u64, u128);

#[derive(Debug)]
struct Mapping {
    base: NonNull<u8>,
    len: usize,
}

impl Mapping {
    /// Owns what the host mapped; it never maps at zero.
    fn new(base: *mut std::ffi::c_void, len: usize) -> Result<Self, RamError> {
        let size = Bytes(len as u64);
        let base = NonNull::new(base.cast()).ok_or_else(|| RamError::Map(size, io::ErrorKind::OutOfMemory.into()))?;
        Ok(Self { base, len })
    }
}

fn checked_len(size: Bytes) -> Result<usize, RamError> {
    let len = usize::try_from(size.0).map_err(|_| RamError::Size(size))?;
    if size.0 == 0 || !size.0.is_multiple_of(PAGE_SIZE) || size > Bytes::gib(1024) {
        return Err(RamError::Size(size));
    }
    Ok(len)
}

// SAFETY: the mapping is plain memory that any thread may reach; all access goes through `Cell`s
// or `vm-memory` operations, which permit concurrent change by design (the guest is concurrent).
unsafe impl Send for Mapping {}
// SAFETY: as for Send.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: `base` and `len` are what `mmap` or `mmap_anonymous` returned for this mapping, nobody else
        // unmaps it, and both views of it live in the `GuestRam` that owns it. A failure leaves the
        // mapping in place, which is harmless.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), self.len) };
    }
}

/// The RAM of one guest: zeroed, or what a file holds. Not backed by host memory until touched.
#[derive(Debug)]
pub struct GuestRam {
    // Field order: the `memory` view is dropped before the mapping it points into.
    memory: GuestMemory,
    mapping: Mapping,
    code_pages: CodePages,
    low: u64,
    source: Option<MemoryImage>,
    /// Whether what nobody has written reads as zeros.
    zeroed: bool,
    split_locks: Mutex<()>,
}

impl GuestRam {
    /// Maps `size` bytes of zeroed RAM.
    ///
    /// # Errors
    /// [`RamError::Size`] when `size` is not a positive multiple of the page size or above 1 TiB, and
    /// [`RamError::Map`] when the host has no room.
    pub fn new(size: Bytes) -> Result<Self, RamError> {
        let len = checked_len(size)?;
        // SAFETY: a fresh anonymous mapping at an address of the kernel's choice aliases nothing.
        let base = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        }
        .map_err(|e| RamError::Map(size, e.into()))?;
        Ok(Self { zeroed: true, ..Self::over(Mapping::new(base, len)?)? })
    }

    /// Maps `size` bytes of `file` from byte `offset` on as RAM, copy-on-write: what the guest writes stays in this
    /// mapping, and any number of guests share what they only read. Nothing is read here; the mapping outlives the
    /// handle and the file's name.
    ///
    /// The file must not change for as long as the mapping lives. A guest may see a change, or not; if the file is
    /// cut, the host ends the process that touches what is gone (SIGBUS). So give a memory file a new content by
    /// renaming a new file over it, as [`Snapshot::write`](../snapshot/struct.Snapshot.html#method.write) does.
    ///
    /// # Errors
    /// [`RamError::Size`] as [`new`](Self::new); [`RamError::FileOffset`] when `offset` is no multiple of the page
    /// size; [`RamError::FileTooShort`] when the file ends before the memory; [`RamError::File`] and
    /// [`RamError::Map`] with the host's reason.
    pub fn from_file(file: &File, offset: u64, size: Bytes) -> Result<Self, RamError> {
        let len = checked_len(size)?;
        let end = offset.checked_add(size.0).filter(|_| offset.is_multiple_of(PAGE_SIZE));
        let end = end.filter(|end| i64::try_from(*end).is_ok()).ok_or(RamError::FileOffset(offset))?;
        let found = Bytes(file.metadata().map_err(RamError::File)?.len());
        if found.0 < end {
            return Err(RamError::FileTooShort { found, offset, wanted: size });
        }
        // SAFETY: a fresh mapping at an address of the kernel's choice aliases nothing. It is private, so no store
        // through it reaches the file. That the file may change under it is no worse than a guest that writes: all
        // access is volatile, to bytes of which any value is valid. Pages past the file's end cannot be touched
        // without a signal; there are none now (just checked), and the caller keeps it so.
        let base = unsafe {
            mmap(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::NORESERVE,
                file,
                offset,
            )
        }
        .map_err(|e| RamError::Map(size, e.into()))?;
        Self::over(Mapping::new(base, len)?)
    }

    /// Replaces `len` bytes from RAM offset `offset` on by what `file` holds at the same offset, copy-on-write and under
    /// the conditions of [`from_file`](Self::from_file). For memory that is not in use yet.
    ///
    /// # Errors
    /// As `from_file`; a range that is not whole pages of RAM is a [`RamError::Size`].
    pub fn overlay(&mut self, file: &File, offset: RamOffset, len: Bytes) -> Result<(), RamError> {
        let pages = checked_len(len)?;
        let start = self.range(offset, len.0).ok_or(RamError::Size(len))?;
        if !offset.is_multiple_of(PAGE_SIZE) {
            return Err(RamError::FileOffset(offset));
        }
        let found = Bytes(file.metadata().map_err(RamError::File)?.len());
        if found.0 < offset + len.0 {
            return Err(RamError::FileTooShort { found, offset, wanted: len });
        }
        self.zeroed = false;
        // SAFETY: `start` and `pages` are whole pages in this mapping (`range`, `checked_len`), so the fixed address
        // replaces memory that only this value owns, and nobody uses it meanwhile (`&mut self`). No Rust reference
        // points into it, and it stays readable and writable. For the file see `from_file`.
        unsafe {
            mmap(
                start.cast(),
                pages,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED,
                file,
                offset,
            )
        }
        .map_err(|e| RamError::Map(len, e.into()))?;
        Ok(())
    }

    /// Says which image the mapped files are.
    pub(super) fn with_source(mut self, source: MemoryImage) -> Self {
        self.source = Some(source);
        self
    }

    /// The image that it was [mapped](MemoryImage::map) from: what RAM was before anybody wrote to it.
    #[must_use]
    pub fn source(&self) -> Option<&MemoryImage> {
        self.source.as_ref()
    }

    /// Whether it is known what RAM was before anybody wrote to it: zeros, or its [`source`](Self::source).
    pub(super) fn began_known(&self) -> bool {
        self.zeroed || self.source.is_some()
    }

    /// The pages in which RAM may differ from the image called `id`; `None` when that is not known, as it is not unless
    /// RAM was mapped from that image or from one that builds on it.
    #[must_use]
    pub fn written_since(&self, id: &MemoryId) -> Option<PageSet> {
        let above = self.source()?.above(id)?;
        let mut pages = self.private_pages()?;
        above.into_iter().for_each(|extent| pages.add(extent));
        Some(pages)
    }

    /// The pages that may have been written since the files were mapped; `None` when the host does not tell.
    #[must_use]
    pub fn private_pages(&self) -> Option<PageSet> {
        PageSet::private(self.address(), self.size().0)
    }

    /// Where the host has it.
    pub(super) fn address(&self) -> u64 {
        self.mapping.base.as_ptr() as u64
    }

    fn over(mapping: Mapping) -> Result<Self, RamError> {
        let size = Bytes(mapping.len as u64);
        let code_pages = CodePages::new(size.0);
        let low = size.0.min(HOLE_START.0);
        let mut regions = vec![region(&mapping, GuestAddr(0), 0, low, &code_pages)?];
        if size.0 > low {
            regions.push(region(&mapping, HOLE_END, low, size.0 - low, &code_pages)?);
        }
        let memory = GuestMemory::from_regions(regions).map_err(|e| RamError::Map(size, io::Error::other(e)))?;
        Ok(Self { memory, mapping, code_pages, low, source: None, zeroed: false, split_locks: Mutex::new(()) })
    }

    /// The devices' view, in guest-physical addresses.
    #[must_use]
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Pages of decoded instructions that device writes are checked against.
    #[must_use]
    pub fn code_pages(&self) -> &CodePages {
        &self.code_pages
    }

    /// The size of RAM.
    #[must_use]
    pub fn size(&self) -> Bytes {
        Bytes(self.mapping.len as u64)
    }

    /// The guest-physical pieces of RAM: start and size, ascending.
    #[must_use]
    pub fn pieces(&self) -> Vec<(GuestAddr, Bytes)> {
        let high = self.size().0 - self.low;
        let mut pieces = vec![(GuestAddr(0), Bytes(self.low))];
        if high > 0 {
            pieces.push((HOLE_END, Bytes(high)));
        }
        pieces
    }

    /// The RAM offset of a guest-physical address, or `None` where there is no RAM.
    #[inline]
    #[must_use]
    pub fn offset_of(&self, gpa: GuestAddr) -> Option<RamOffset> {
        if gpa.0 < self.low {
            return Some(gpa.0);
        }
        let offset = gpa.0.checked_sub(HOLE_END.0)?.checked_add(HOLE_START.0)?;
        (offset < self.size().0 && offset >= self.low).then_some(offset)
    }

    /// Reads a `T` at a RAM offset of any alignment; `None` when it does not lie in RAM whole.
    ///
    /// The processor's view: one compare and one move. Other threads may write at the same time. A value of up to 8 bytes
    /// is one that was there at some moment, if it is aligned or at least stays in a cache line; any other is some
    /// mixture, as on a real machine.
    #[inline(always)]
    #[must_use]
    pub fn load<T: Scalar>(&self, offset: RamOffset) -> Option<T> {
        if !self.has::<T>(offset) {
            return None;
        }
        // SAFETY: the whole `T` lies in the mapping, as was just checked, which Rust has no references into.
        Some(unsafe { T::load(self.mapping.base.as_ptr(), offset) })
    }

    /// Writes a `T` at a RAM offset of any alignment; `None`, with nothing written, when it does not
    /// lie in RAM whole. The processor's view: not noted in [`CodePages`]. Seen by others as [`load`](Self::load) says, and
    /// in the order of this thread's loads and stores where [`TOTAL_STORE_ORDER`](super::TOTAL_STORE_ORDER) holds.
    #[inline(always)]
    pub fn store<T: Scalar>(&self, offset: RamOffset, value: T) -> Option<()> {
        if !self.has::<T>(offset) {
            return None;
        }
        // SAFETY: as for `load`; the mapping is writable.
        unsafe { T::store(self.mapping.base.as_ptr(), offset, value) };
        Some(())
    }

    /// Replaces `current` at an offset that is a multiple of the size, and returns what was there; `None` outside RAM, and
    /// where the host has no such instruction.
    #[inline(always)]
    pub(super) fn exchange_aligned<T: Scalar>(&self, offset: RamOffset, current: T, new: T) -> Option<T> {
        if !self.has::<T>(offset) || !offset.is_multiple_of(T::SIZE) {
            return None;
        }
        // SAFETY: as for `store`; the mapping begins on a page boundary, so its offset's alignment is the place's.
        unsafe { T::compare_exchange(self.mapping.base.as_ptr().add(offset as usize), current, new) }
    }

    /// Whose turn it is to change a value in two words.
    pub(super) fn split_locks(&self) -> &Mutex<()> {
        &self.split_locks
    }

    /// Copies `len` bytes from RAM offset `from` to `to`, which must not overlap; `None`, with nothing
    /// copied, when either range leaves RAM or they overlap.
    pub fn copy(&self, from: RamOffset, to: RamOffset, len: u64) -> Option<()> {
        let (src, dst) = (self.range(from, len)?, self.range(to, len)?);
        if from.abs_diff(to) < len {
            return None;
        }
        // SAFETY: both ranges lie in the mapping (`range`) and do not overlap (just checked). No Rust
        // reference points into the mapping.
        unsafe { std::ptr::copy_nonoverlapping(src, dst, len as usize) };
        Some(())
    }

    /// Sets `len` bytes from RAM offset `to` to `value`; `None`, with nothing written, when the range leaves RAM.
    pub fn fill(&self, to: RamOffset, value: u8, len: u64) -> Option<()> {
        let dst = self.range(to, len)?;
        // SAFETY: the range lies in the mapping (`range`), and no Rust reference points into it.
        unsafe { std::ptr::write_bytes(dst, value, len as usize) };
        Some(())
    }

    /// Reads `into.len()` bytes at a RAM offset; `None`, with nothing read, when the range leaves RAM.
    pub fn read_bytes(&self, from: RamOffset, into: &mut [u8]) -> Option<()> {
        let src = self.range(from, into.len() as u64)?;
        // SAFETY: the source lies in the mapping (`range`); `into` is a Rust slice and so does not
        // overlap it, as no Rust reference points into the mapping.
        unsafe { std::ptr::copy_nonoverlapping(src, into.as_mut_ptr(), into.len()) };
        Some(())
    }

    /// Gives `len` bytes from RAM offset `offset` on back to the host, which forgets what was written there. Memory of
    /// [`new`](Self::new) reads as zeros then, and takes room again once it is written. Memory that was mapped from
    /// files reads as **what the files hold**, and is shared again: not as zeros. Noted in [`CodePages`] as written.
    ///
    /// For pages that the guest has said to be unused. Other threads may reach them meanwhile, and find the old content
    /// or the new, page by page.
    ///
    /// # Errors
    /// [`RamError::Size`] when the range is not whole pages of RAM; [`RamError::GiveBack`] with the host's reason.
    pub fn give_back(&self, offset: RamOffset, len: Bytes) -> Result<(), RamError> {
        let bytes = checked_len(len)?;
        let aligned = offset.is_multiple_of(PAGE_SIZE);
        let start = self.range(offset, len.0).filter(|_| aligned).ok_or(RamError::Size(len))?;
        // SAFETY: `start` and `bytes` are whole pages in this mapping (`range`, `checked_len`), which stays readable and
        // writable: only its content changes, to zeros or to the file's. Any content is valid, no Rust reference points
        // into the mapping, and whoever reads it meanwhile does so by volatile access.
        let given = unsafe { madvise(start.cast(), bytes, Advice::LinuxDontNeed) };
        // Also after an error, which may have come half way.
        self.code_pages.mark_dirty(offset as usize, bytes);
        given.map_err(|e| RamError::GiveBack(e.into()))
    }

    #[inline(always)]
    fn has<T: Scalar>(&self, offset: RamOffset) -> bool {
        // The mapping is at least a page, so the subtraction cannot wrap.
        offset <= (self.mapping.len - size_of::<T>()) as u64
    }

    fn range(&self, offset: RamOffset, len: u64) -> Option<*mut u8> {
        let end = offset.checked_add(len)?;
        if end > self.mapping.len as u64 {
            return None;
        }
        // SAFETY: offset <= end <= len was just checked, so the result stays in (or one past) the mapping.
        Some(unsafe { self.mapping.base.as_ptr().add(offset as usize) })
    }
}

fn region(
    mapping: &Mapping,
    gpa: GuestAddr,
    offset: u64,
    len: u64,
    pages: &CodePages,
) -> Result<GuestRegionMmap<CodePages>, RamError> {
    // SAFETY: offset + len <= mapping.len by construction in `GuestRam::new`, so the pointer stays in the mapping.
    let start = unsafe { mapping.base.as_ptr().add(offset as usize) };
    // SAFETY: `start` is valid for `len` bytes of shared, volatile access for as long as `mapping`
    // lives, and `GuestRam` drops its regions first. vm-memory does not unmap raw regions.
    let region = unsafe {
        vm_memory::mmap::MmapRegionBuilder::new_with_bitmap(len as usize, pages.for_region(offset))
            .with_raw_mmap_pointer(start)
            .with_mmap_prot((ProtFlags::READ | ProtFlags::WRITE).bits() as i32)
            .with_mmap_flags((MapFlags::PRIVATE | MapFlags::NORESERVE).bits() as i32)
            .build()
    }
    .map_err(|e| RamError::Map(Bytes(len), io::Error::other(e)))?;
    let region: MmapRegion<CodePages> = region;
    GuestRegionMmap::new(region, GuestAddress(gpa.0))
        .ok_or_else(|| RamError::Map(Bytes(len), io::ErrorKind::InvalidInput.into()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;

    use vm_memory::Bytes as _;

    use super::*;

    #[test]
    fn access_at_the_edge_of_ram() {
        let ram = GuestRam::new(Bytes(8192)).unwrap();
        assert_eq!(ram.store(8184, 0x1122_3344_5566_7788u64), Some(()));
        assert_eq!(ram.load::<u32>(8188), Some(0x1122_3344));
        assert_eq!(ram.load::<u64>(8185), None);
        assert_eq!(ram.store(8192, 0u8), None);
        assert_eq!(ram.load::<u8>(u64::MAX), None);
        assert_eq!(ram.copy(0, 4, 8), None);
        assert_eq!(ram.copy(8184, 3, 8), Some(()));
        assert_eq!(ram.load::<u64>(3), Some(0x1122_3344_5566_7788));
    }

    #[test]
    fn a_mapped_file_is_shared_until_written_and_never_changes() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(3 * PAGE_SIZE).unwrap();
        file.write_all_at(b"saved", PAGE_SIZE).unwrap();
        let [one, other] = [(); 2].map(|()| GuestRam::from_file(&file, PAGE_SIZE, Bytes(2 * PAGE_SIZE)).unwrap());
        one.store(0, b'S').unwrap();
        one.memory().write_obj(7u64, GuestAddress(PAGE_SIZE)).unwrap();
        let mut bytes = [0; 5];
        assert_eq!((one.read_bytes(0, &mut bytes), &bytes), (Some(()), b"Saved"));
        assert_eq!((other.read_bytes(0, &mut bytes), &bytes), (Some(()), b"saved"));
        assert_eq!((one.load::<u64>(PAGE_SIZE), other.load::<u64>(PAGE_SIZE)), (Some(7), Some(0)));
        let mut on_disk = [1; 5];
        file.read_exact_at(&mut on_disk, PAGE_SIZE).unwrap();
        assert_eq!(&on_disk, b"saved");
    }

    #[test]
    fn a_file_that_does_not_hold_the_memory_is_refused() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(2 * PAGE_SIZE).unwrap();
        let map = |offset, size| GuestRam::from_file(&file, offset, Bytes(size)).unwrap_err();
        assert!(matches!(map(PAGE_SIZE, 2 * PAGE_SIZE), RamError::FileTooShort { found: Bytes(8192), .. }));
        assert!(matches!(map(1, PAGE_SIZE), RamError::FileOffset(1)));
        assert!(matches!(map(u64::MAX - 4095, PAGE_SIZE), RamError::FileOffset(_)));
        assert!(matches!(map(1 << 63, PAGE_SIZE), RamError::FileOffset(_)));
        assert!(matches!(map(0, 0), RamError::Size(_)));
        assert!(matches!(map(0, 1 << 62), RamError::Size(_)));
    }

    #[test]
    fn an_overlay_replaces_pages_and_no_others() {
        let [below, above] = [b'b', b'a'].map(|byte| {
            let file = tempfile::tempfile().unwrap();
            file.write_all_at(&[byte; 4 * PAGE_SIZE as usize], 0).unwrap();
            file
        });
        let mut ram = GuestRam::from_file(&below, 0, Bytes(4 * PAGE_SIZE)).unwrap();
        ram.overlay(&above, PAGE_SIZE, Bytes(2 * PAGE_SIZE)).unwrap();
        let page = |n: u64| [ram.load(n * PAGE_SIZE), ram.load(n * PAGE_SIZE + 4095)];
        assert_eq!([0, 1, 2, 3].map(page), [b'b', b'a', b'a', b'b'].map(|byte| [Some(byte); 2]));
        for (offset, len) in [(1, 4096), (0, 1), (0, 0), (3 * 4096, 2 * 4096), (u64::MAX - 4095, 4096)] {
            assert!(ram.overlay(&above, offset, Bytes(len)).is_err(), "{offset:#x} {len:#x}");
        }
        above.set_len(PAGE_SIZE).unwrap();
        assert!(matches!(ram.overlay(&above, PAGE_SIZE, Bytes(PAGE_SIZE)), Err(RamError::FileTooShort { .. })));
    }

    #[test]
    #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
    fn written_pages_of_a_file_are_private() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[1; 8 * PAGE_SIZE as usize], 0).unwrap();
        let ram = GuestRam::from_file(&file, 0, Bytes(8 * PAGE_SIZE)).unwrap();
        let read: u32 = (0..4).map(|n| u32::from(ram.load::<u8>(n * PAGE_SIZE).unwrap())).sum();
        assert_eq!(read, 4);
        ram.store(PAGE_SIZE, 1u8).unwrap();
        ram.store(6 * PAGE_SIZE, 1u8).unwrap();
        // A host that does not tell is one too.
        if let Some(pages) = ram.private_pages() {
            let private: Vec<u64> = (0..8).filter(|n| pages.contains(n * PAGE_SIZE)).collect();
            assert_eq!(private, [1, 6]);
        }
    }

    #[test]
    fn memory_that_was_given_back_reads_as_it_began() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[b'f'; 4 * PAGE_SIZE as usize], 0).unwrap();
        let anonymous = GuestRam::new(Bytes(4 * PAGE_SIZE)).unwrap();
        let mapped = GuestRam::from_file(&file, 0, Bytes(4 * PAGE_SIZE)).unwrap();
        for (ram, began) in [(anonymous, 0), (mapped, b'f')] {
            ram.fill(0, b'w', 4 * PAGE_SIZE).unwrap();
            let watch = ram.code_pages().watch_of(0).unwrap();
            watch.watch(2 * PAGE_SIZE);
            ram.give_back(PAGE_SIZE, Bytes(2 * PAGE_SIZE)).unwrap();
            let pages = [0, 1, 2, 3].map(|n| ram.load(n * PAGE_SIZE + 7));
            assert_eq!(pages, [b'w', began, began, b'w'].map(Some));
            let mut written = Vec::new();
            watch.take_written(|page| written.push(page));
            assert_eq!(written, [2 * PAGE_SIZE], "what was decoded from it is stale");
            // Of no file is the page of zeros as well.
            if let Some(private) = ram.private_pages().filter(|_| began != 0) {
                assert!(!private.contains(PAGE_SIZE) && private.contains(0));
            }
            ram.store(PAGE_SIZE, 1u8).unwrap();
            assert_eq!(ram.load(PAGE_SIZE), Some(1u8));
        }
    }

    #[test]
    fn only_whole_pages_of_ram_are_given_back() {
        let ram = GuestRam::new(Bytes(4 * PAGE_SIZE)).unwrap();
        ram.fill(0, b'w', 4 * PAGE_SIZE).unwrap();
        let ranges = [(1, 4096), (0, 4095), (0, 0), (4096, 4 * 4096), (4 * 4096, 4096), (u64::MAX - 4095, 4096)];
        for (offset, len) in ranges {
            assert!(matches!(ram.give_back(offset, Bytes(len)), Err(RamError::Size(_))), "{offset:#x} {len:#x}");
        }
        assert!((0..4 * PAGE_SIZE).all(|at| ram.load(at) == Some(b'w')));
    }

    #[test]
    fn the_hole_splits_physical_but_not_host_memory() {
        let ram = GuestRam::new(Bytes::gib(4)).unwrap();
        assert_eq!(ram.pieces(), [(GuestAddr(0), Bytes::gib(3)), (HOLE_END, Bytes::gib(1))]);
        assert_eq!(ram.offset_of(GuestAddr(HOLE_START.0 - 1)), Some(HOLE_START.0 - 1));
        assert_eq!(ram.offset_of(HOLE_START), None);
        assert_eq!(ram.offset_of(HOLE_END), Some(HOLE_START.0));
        assert_eq!(ram.offset_of(GuestAddr(HOLE_END.0 + Bytes::gib(1).0)), None);
        ram.memory().write_obj(7u32, GuestAddress(HOLE_END.0)).unwrap();
        assert_eq!(ram.load::<u32>(HOLE_START.0), Some(7));
    }

    #[test]
    fn device_writes_to_watched_pages_are_reported_once() {
        let ram = GuestRam::new(Bytes(4 * PAGE_SIZE)).unwrap();
        let watch = ram.code_pages().watch_of(0).unwrap();
        watch.watch(PAGE_SIZE);
        ram.memory().write_obj(1u8, GuestAddress(0)).unwrap();
        assert!(!watch.any_written());
        ram.memory().write_slice(&[0; 4096], GuestAddress(PAGE_SIZE - 1)).unwrap();
        let mut seen = Vec::new();
        watch.take_written(|page| seen.push(page));
        watch.take_written(|page| seen.push(page));
        assert_eq!(seen, [PAGE_SIZE]);
    }
}
