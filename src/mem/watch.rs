//! Which pages of RAM are written from now on, by whom ever: what the host's kernel notes while it lets every write pass.
//!
//! `userfaultfd` in its asynchronous write-protecting form (Linux 6.7): a page is made read-only, the first write to it
//! costs a fault in which the kernel makes it writable again, and that it is writable says that it was written. Nobody
//! need read the descriptor, no signal is sent, no privilege is needed, and it holds for this mapping alone. `PAGEMAP_SCAN`
//! on `/proc/self/pagemap` says which pages were written and protects them again, each in one step. See Linux,
//! `Documentation/admin-guide/mm/userfaultfd.rst` and `pagemap.rst`; the structures are those of `linux/userfaultfd.h`
//! and `linux/fs.h`.
#![allow(unsafe_code, reason = "unsafe fence: the requests by which the kernel watches and tells the pages of RAM")]

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, Setter, Updater, ioctl, opcode};
use rustix::mm::{UserfaultfdFlags, userfaultfd};

use super::Extent;
use super::GuestRam;
use super::PageSet;

/// `struct uffdio_api`.
#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct uffdio_range`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Range {
    start: u64,
    len: u64,
}

/// `struct uffdio_register`.
#[repr(C)]
struct Register {
    range: Range,
    mode: u64,
    ioctls: u64,
}

/// `struct pm_scan_arg`.
#[repr(C)]
struct ScanRequest {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    regions: u64,
    regions_len: u64,
    max_pages: u64,
    inverted: u64,
    all_of: u64,
    any_of: u64,
    returned: u64,
}

/// `struct page_region`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Region {
    start: u64,
    end: u64,
    categories: u64,
}

const _: () = assert!(size_of::<Api>() == 24 && size_of::<Range>() == 16 && size_of::<Register>() == 32);
const _: () = assert!(size_of::<ScanRequest>() == 96 && size_of::<Region>() == 24);

/// `UFFD_USER_MODE_ONLY`: the kernel itself never waits for the descriptor's reader. What makes it need no privilege.
const USER_MODE_ONLY: u32 = 1;
const UFFD_API: u64 = 0xaa;
const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
const FEATURE_WP_ASYNC: u64 = 1 << 15;
const REGISTER_MODE_WP: u64 = 1 << 1;

const UFFDIO_API: Opcode = opcode::read_write::<Api>(0xaa, 0x3f);
const UFFDIO_REGISTER: Opcode = opcode::read_write::<Register>(0xaa, 0);
/// Declared as one that reads, as the kernel has it; it is given the range all the same.
const UFFDIO_UNREGISTER: Opcode = opcode::read::<Range>(0xaa, 1);
const PAGEMAP_SCAN: Opcode = opcode::read_write::<ScanRequest>(b'f', 16);

/// Protects again what is found, in one step with finding it.
const SCAN_WP_MATCHING: u64 = 1 << 0;
/// Fails at memory that is not watched.
const SCAN_CHECK_WPASYNC: u64 = 1 << 1;

const PAGE_IS_WRITTEN: u64 = 1 << 1;
const PAGE_IS_FILE: u64 = 1 << 2;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;
const PAGE_IS_PFNZERO: u64 = 1 << 5;

/// Ranges that the kernel tells at once.
const REGIONS: usize = 512;

/// RAM whose writes are noted. Ends when it is dropped, and costs nothing afterwards.
#[derive(Debug)]
pub(super) struct WriteWatch {
    uffd: OwnedFd,
    pagemap: File,
    ram: Arc<GuestRam>,
}

impl WriteWatch {
    /// Watches all of `ram`.
    pub(super) fn new(ram: Arc<GuestRam>) -> io::Result<Self> {
        let pagemap = File::open("/proc/self/pagemap")?;
        let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::from_bits_retain(USER_MODE_ONLY);
        // SAFETY: the descriptor can change what memory holds only by requests that are not made here.
        let uffd = unsafe { userfaultfd(flags) }?;
        let mut api = Api { api: UFFD_API, features: FEATURE_WP_ASYNC | FEATURE_WP_UNPOPULATED, ioctls: 0 };
        // SAFETY: UFFDIO_API takes a `struct uffdio_api`, which `Api` is, and writes nothing beyond it.
        unsafe { ioctl(&uffd, Updater::<UFFDIO_API, Api>::new(&mut api)) }?;
        let mut register = Register { range: range(&ram), mode: REGISTER_MODE_WP, ioctls: 0 };
        // SAFETY: UFFDIO_REGISTER takes a `struct uffdio_register`, which `Register` is. The range is RAM's mapping, which
        // stays mapped for as long as `ram` is held; in asynchronous form a write to it is never stopped, only noted.
        unsafe { ioctl(&uffd, Updater::<UFFDIO_REGISTER, Register>::new(&mut register)) }?;
        Ok(Self { uffd, pagemap, ram })
    }

    /// The pages that belong to no file and were written since this was asked last; the first time, all that belong to
    /// none. What is written from now on is told the next time.
    ///
    /// A page that was given back meanwhile is not among them.
    pub(super) fn take_written(&self) -> io::Result<PageSet> {
        let mut written = PageSet::none(self.ram.size().0);
        let query = Query { all_of: PAGE_IS_WRITTEN, returned: 0, flags: SCAN_WP_MATCHING | SCAN_CHECK_WPASYNC };
        scan(&self.pagemap, range(&self.ram), query, |pages, _| written.add(pages))?;
        Ok(written)
    }

    /// In one look at memory that nobody writes meanwhile: all pages that belong to no file, perhaps with some that were
    /// given back; and those of them that may have been written since they were taken last.
    pub(super) fn last_look(&self) -> io::Result<(PageSet, PageSet)> {
        let (mut private, mut written) = (PageSet::none(self.ram.size().0), PageSet::none(self.ram.size().0));
        let query = Query { all_of: 0, returned: PAGE_IS_WRITTEN | PAGE_IS_SWAPPED, flags: SCAN_CHECK_WPASYNC };
        scan(&self.pagemap, range(&self.ram), query, |pages, categories| {
            private.add(pages);
            // A page of a file that was given back leaves a mark of its protection, which looks like a page that is
            // swapped out. What it holds now has to be read.
            if categories != 0 {
                written.add(pages);
            }
        })?;
        Ok((private, written))
    }
}

impl Drop for WriteWatch {
    fn drop(&mut self) {
        // Closing the descriptor ends the registration as well, but not on every kernel the pages' protection, which the
        // next watch would take for its own.
        // SAFETY: UFFDIO_UNREGISTER takes a `struct uffdio_range`, which `Range` is. It makes writable what the process
        // may write, and touches no mapping that this descriptor has not registered.
        let _ = unsafe { ioctl(&self.uffd, Setter::<UFFDIO_UNREGISTER, Range>::new(range(&self.ram))) };
    }
}

/// The pages of `len` bytes of this process's memory from `address` on that belong to no file and hold something.
pub(super) fn private(address: u64, len: u64) -> io::Result<PageSet> {
    let mut private = PageSet::none(len);
    let query = Query { all_of: 0, returned: 0, flags: 0 };
    scan(&File::open("/proc/self/pagemap")?, Range { start: address, len }, query, |pages, _| private.add(pages))?;
    Ok(private)
}

fn range(ram: &GuestRam) -> Range {
    Range { start: ram.address(), len: ram.size().0 }
}

/// What is asked of the kernel.
struct Query {
    /// Categories that a private page is to have in order to be told.
    all_of: u64,
    /// Categories that are told of it.
    returned: u64,
    flags: u64,
}

/// Tells `each` private page of `range`, as extents from its start with what was asked about them.
fn scan(pagemap: &File, range: Range, query: Query, mut each: impl FnMut(Extent, u64)) -> io::Result<()> {
    let mut regions = vec![Region::default(); REGIONS];
    let (mut start, end) = (range.start, range.start + range.len);
    while start < end {
        let mut request = ScanRequest {
            size: size_of::<ScanRequest>() as u64,
            flags: query.flags,
            start,
            end,
            walk_end: 0,
            regions: regions.as_mut_ptr() as u64,
            regions_len: regions.len() as u64,
            max_pages: 0,
            inverted: PAGE_IS_FILE | PAGE_IS_PFNZERO,
            all_of: PAGE_IS_FILE | PAGE_IS_PFNZERO | query.all_of,
            any_of: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
            returned: query.returned,
        };
        // SAFETY: `request` names `regions`, which is as long as it says and is not touched until the call is over.
        let found = unsafe { ioctl(pagemap, Scan { request: &mut request }) }?;
        for region in regions.iter().take(found) {
            let offset = region.start.checked_sub(range.start).ok_or(io::ErrorKind::InvalidData)?;
            each(Extent { offset, len: region.end.saturating_sub(region.start) }, region.categories);
        }
        if request.walk_end <= start {
            return Err(io::ErrorKind::InvalidData.into());
        }
        start = request.walk_end;
    }
    Ok(())
}

/// A `PAGEMAP_SCAN`, which answers how many regions it has filled.
struct Scan<'a> {
    request: &'a mut ScanRequest,
}

// SAFETY: the opcode is PAGEMAP_SCAN's, which takes a `struct pm_scan_arg` and writes to it: `ScanRequest`, borrowed for as
// long as this lives. That the regions it names may be written is the caller's matter.
unsafe impl Ioctl for Scan<'_> {
    type Output = usize;

    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        PAGEMAP_SCAN
    }

    fn as_ptr(&mut self) -> *mut std::ffi::c_void {
        std::ptr::from_mut(self.request).cast()
    }

    unsafe fn output_from_ptr(found: IoctlOutput, _request: *mut std::ffi::c_void) -> rustix::io::Result<usize> {
        Ok(found as usize)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;

    use super::*;
    use crate::units::{Bytes, PAGE_SIZE};

    const PAGES: u64 = 2000;
    const SIZE: Bytes = Bytes(PAGES * PAGE_SIZE);

    fn pages(set: &PageSet) -> Vec<u64> {
        set.iter().map(|offset| offset / PAGE_SIZE).collect()
    }

    /// RAM of each kind that a guest may have.
    fn kinds() -> [(&'static str, GuestRam); 3] {
        let memfd: File = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap().into();
        let disk = tempfile::tempfile().unwrap();
        for file in [&memfd, &disk] {
            file.set_len(SIZE.0).unwrap();
            file.write_all_at(&vec![b'f'; (SIZE.0 / 2) as usize], 0).unwrap();
        }
        let [memfd, disk] = [memfd, disk].map(|file| GuestRam::from_file(&file, 0, SIZE).unwrap());
        [("anonymous", GuestRam::new(SIZE).unwrap()), ("memfd", memfd), ("file", disk)]
    }

    /// A host that is too old or does not permit it is one too.
    fn watch(ram: &Arc<GuestRam>) -> Option<WriteWatch> {
        let watch = WriteWatch::new(Arc::clone(ram));
        assert!(watch.as_ref().err().is_none_or(refuses), "{watch:?}");
        watch.ok()
    }

    fn refuses(error: &io::Error) -> bool {
        let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
        let mut numbers = release.split('.').map_while(|part| part.parse::<u32>().ok());
        (numbers.next(), numbers.next()) < (Some(6), Some(7)) || error.kind() == io::ErrorKind::PermissionDenied
    }

    #[test]
    fn what_is_written_is_told_once_in_memory_of_every_kind() {
        for (kind, ram) in kinds() {
            let ram = Arc::new(ram);
            for page in [3, 4, 1500] {
                ram.store(page * PAGE_SIZE, 1u8).unwrap();
            }
            let Some(watch) = watch(&ram) else { return };
            assert_eq!(pages(&watch.take_written().unwrap()), [3, 4, 1500], "{kind}: all that is private");
            let read: u64 = (0..PAGES).filter_map(|page| ram.load::<u8>(page * PAGE_SIZE)).map(u64::from).sum();
            assert!(read > 0);
            assert_eq!(pages(&watch.take_written().unwrap()), [0; 0], "{kind}: reading is not writing");
            for page in [4, 7, 1999] {
                ram.store(page * PAGE_SIZE + 5, 2u8).unwrap();
            }
            let (private, written) = watch.last_look().unwrap();
            assert_eq!((pages(&private), pages(&written)), (vec![3, 4, 7, 1500, 1999], vec![4, 7, 1999]), "{kind}");
            assert_eq!(pages(&watch.take_written().unwrap()), [4, 7, 1999], "{kind}");
            ram.give_back(3 * PAGE_SIZE, Bytes(2 * PAGE_SIZE)).unwrap();
            let (private, written) = watch.last_look().unwrap();
            let stale = pages(&private.without(&written));
            assert_eq!(stale, [7, 1500, 1999], "{kind}: what was given back holds nothing or has to be read");
            assert_eq!(pages(&watch.take_written().unwrap()), [0; 0], "{kind}");
            ram.store(4 * PAGE_SIZE, 3u8).unwrap();
            assert_eq!(pages(&watch.take_written().unwrap()), [4], "{kind}");
            drop(watch);
            assert_eq!(pages(&ram.private_pages().unwrap()), [4, 7, 1500, 1999], "{kind}");
        }
    }

    #[test]
    fn a_watch_that_is_dropped_leaves_nothing() {
        for (kind, ram) in kinds() {
            let ram = Arc::new(ram);
            ram.fill(0, 1, SIZE.0).unwrap();
            for _ in 0..3 {
                let Some(watch) = watch(&ram) else { return };
                assert!(WriteWatch::new(Arc::clone(&ram)).is_err(), "{kind}: one at a time");
                assert_eq!(watch.take_written().unwrap().iter().count() as u64, PAGES, "{kind}");
            }
        }
    }

    #[test]
    fn a_scan_finds_the_private_pages_that_the_entries_tell() {
        for (kind, ram) in kinds() {
            for page in (0..PAGES).filter(|page| page % 3 == 0 || page % 7 < 2) {
                ram.store(page * PAGE_SIZE, 1u8).unwrap();
            }
            let scanned = match private(ram.address(), SIZE.0) {
                Ok(scanned) => scanned,
                Err(error) => return assert!(refuses(&error), "{error}"),
            };
            let read = PageSet::read_private(ram.address(), SIZE.0).unwrap();
            assert_eq!(pages(&scanned), pages(&read), "{kind}");
        }
    }
}
