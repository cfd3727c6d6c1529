//! RAM at one instant as an image that other guests are made from, while this one goes on.
//!
//! Only what belongs to no file yet is copied: into memory that has no name and goes with the last who maps it. Most of it
//! is copied while the guest runs; what it writes in the meantime is copied again, and only the last of that while it stands
//! still.
//!
//! ```text
//!   begin    runs    all that was written, then what was written while that was copied, then again, while it gets less
//!   finish   stands  what was written since; which pages belong to no file
//!   image    runs    what lies between the ranges that are mapped, from the image below
//! ```
//!
//! A host that does not tell what is written gets by without the first step.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::Extent;
use super::GuestRam;
use super::MemoryImage;
use super::PageSet;
use super::RamError;
use super::watch::WriteWatch;
use crate::units::PAGE_SIZE;

/// Most ranges that a frozen image is mapped in. The host allows a process some 65,000 mappings, and there may be
/// hundreds of guests.
const PIECES_MAX: usize = 128;
/// Bytes copied at once: what stays in the processor's cache between being read and being written.
const PIECE: u64 = 256 << 10;
/// So few pages are copied in a fraction of a millisecond; to do it once more before the guest stands still gains nothing.
const FEW_PAGES: u64 = 128;

impl GuestRam {
    /// What RAM holds now. The caller sees to it that nobody writes meanwhile; see [`MemoryCopy`] for most of the work done
    /// while the guest runs.
    ///
    /// Blocks for as long as copying takes what was written since RAM was mapped, or since it was made.
    ///
    /// # Errors
    /// [`RamError::Freeze`] with the host's reason, as when it has no memory left.
    pub fn freeze(self: &Arc<Self>) -> Result<MemoryImage, RamError> {
        MemoryCopy::of_still(Arc::clone(self))?.finish()?.into_image()
    }
}

/// A copy of a guest's RAM that is being made while the guest runs. Dropped, nothing of it is left.
///
/// # Examples
/// ```
/// # use std::sync::Arc;
/// use kiln::mem::{GuestRam, MemoryCopy};
/// # let ram = Arc::new(GuestRam::new(kiln::units::Bytes::mib(4))?);
/// ram.store(0x1000, 1u32);
/// let copy = MemoryCopy::begin(Arc::clone(&ram), &|| true)?;
/// ram.store(0x2000, 2u32); // by the guest, which runs
/// let copied = copy.finish()?; // while it stands still
/// ram.store(0x2000, 3u32); // it runs again
/// let clone = copied.into_image()?.map()?;
/// assert_eq!((clone.load::<u32>(0x1000), clone.load::<u32>(0x2000)), (Some(1), Some(2)));
/// # Ok::<(), kiln::mem::RamError>(())
/// ```
#[derive(Debug)]
pub struct MemoryCopy {
    ram: Arc<GuestRam>,
    file: File,
    /// The pages that `file` holds as they were, unless they are found written again.
    copied: PageSet,
    /// Of what is written after it was copied; without it, nothing is copied yet.
    watch: Option<WriteWatch>,
}

impl MemoryCopy {
    /// Copies what `ram` holds, while the guest and its devices go on, for as long as `wanted` says so: until so little is
    /// written while it copies that the rest is left for [`finish`](Self::finish). Where the host does not tell what is
    /// written, all of it is.
    ///
    /// The first write to each page that was copied costs the guest a fault in the host's kernel, until the copy is an image.
    ///
    /// Blocks for as long as that takes.
    ///
    /// # Errors
    /// [`RamError::Freeze`] with the host's reason, as when it has no memory left, or because it is not wanted any longer.
    pub fn begin(ram: Arc<GuestRam>, wanted: &dyn Fn() -> bool) -> Result<Self, RamError> {
        let watch = WriteWatch::new(Arc::clone(&ram));
        Self::begin_with(ram, watch, wanted)
    }

    /// Of RAM that nobody writes: there is nothing to be done before [`finish`](Self::finish).
    ///
    /// # Errors
    /// [`RamError::Freeze`] with the host's reason, as when it has no memory left.
    pub fn of_still(ram: Arc<GuestRam>) -> Result<Self, RamError> {
        let (file, copied) = (nameless_file(&ram).map_err(RamError::Freeze)?, PageSet::none(ram.size().0));
        Ok(Self { ram, file, copied, watch: None })
    }

    fn begin_with(
        ram: Arc<GuestRam>,
        watch: io::Result<WriteWatch>,
        wanted: &dyn Fn() -> bool,
    ) -> Result<Self, RamError> {
        let mut copy = Self::of_still(ram)?;
        match watch {
            Ok(_) if !copy.ram.began_known() => {}
            Ok(watch) => copy.copy_ahead(watch, wanted).map_err(RamError::Freeze)?,
            Err(error) => untold(&error),
        }
        Ok(copy)
    }

    /// Every round but the last is of less than half as many pages as the one before it.
    fn copy_ahead(&mut self, watch: WriteWatch, wanted: &dyn Fn() -> bool) -> io::Result<()> {
        let mut before = u64::MAX;
        loop {
            let written = match watch.take_written() {
                Ok(written) => written,
                Err(error) => return self.start_anew(&error),
            };
            self.copy_again(&written, wanted)?;
            let count = written.count();
            if count <= FEW_PAGES || count > before / 2 {
                self.watch = Some(watch);
                return Ok(());
            }
            before = count;
        }
    }

    /// What RAM holds now. The caller sees to it that nobody writes meanwhile.
    ///
    /// Blocks for as long as copying takes what was written since the last look.
    ///
    /// # Errors
    /// [`RamError::Freeze`] with the host's reason, as when it has no memory left.
    pub fn finish(mut self) -> Result<CopiedMemory, RamError> {
        let private = self.copy_rest().map_err(RamError::Freeze)?;
        let Self { ram, file, copied, watch } = self;
        Ok(CopiedMemory { ram, file, copied, private, watch })
    }

    /// Copies what has not been copied, and says what belongs to no file.
    fn copy_rest(&mut self) -> io::Result<Option<PageSet>> {
        let known = self.ram.began_known();
        let private = match self.watch.as_ref().map(WriteWatch::last_look) {
            Some(Ok((private, written))) => {
                self.copy_again(&written, &|| true)?;
                Some(private)
            }
            Some(Err(error)) => {
                self.start_anew(&error)?;
                self.ram.private_pages()
            }
            None if known => self.ram.private_pages(),
            None => None,
        };
        let missing = match &private {
            Some(private) => Extent::runs(private.without(&self.copied).iter()),
            None => vec![Extent { offset: 0, len: self.ram.size().0 }],
        };
        self.copy(&missing, &|| true, write_data)?;
        Ok(private)
    }

    /// Copies `pages`, of which there may be an older copy.
    fn copy_again(&mut self, pages: &PageSet, wanted: &dyn Fn() -> bool) -> io::Result<()> {
        let fresh = pages.without(&self.copied);
        self.copy(&Extent::runs(fresh.iter()), wanted, write_data)?;
        self.copy(&Extent::runs(pages.without(&fresh).iter()), wanted, replace_data)?;
        self.copied.unite(&fresh);
        Ok(())
    }

    /// Forgets what was copied, when it is not known what has been written since.
    fn start_anew(&mut self, error: &io::Error) -> io::Result<()> {
        untold(error);
        self.watch = None;
        (self.file, self.copied) = (nameless_file(&self.ram)?, PageSet::none(self.ram.size().0));
        Ok(())
    }

    /// Copies `extents` to the same offsets of the file.
    fn copy(
        &self,
        extents: &[Extent],
        wanted: &dyn Fn() -> bool,
        write: fn(&File, u64, &[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let longest = extents.iter().map(|extent| extent.len).max().unwrap_or(0);
        let mut buffer = vec![0; PIECE.min(longest) as usize];
        for extent in extents {
            for offset in (extent.offset..extent.end()).step_by(PIECE as usize) {
                if !wanted() {
                    return Err(io::ErrorKind::Interrupted.into());
                }
                let bytes = &mut buffer[..PIECE.min(extent.end() - offset) as usize];
                self.ram.read_bytes(offset, bytes).ok_or(io::ErrorKind::UnexpectedEof)?;
                write(&self.file, offset, bytes)?;
            }
        }
        Ok(())
    }
}

fn untold(error: &io::Error) {
    tracing::debug!(%error, "the host does not tell what is written: memory is copied while the guest stands still");
}

/// What a guest's RAM held at one instant, as far as that belongs to no file.
#[derive(Debug)]
pub struct CopiedMemory {
    ram: Arc<GuestRam>,
    file: File,
    /// What was copied before the instant, and may be something else by then.
    copied: PageSet,
    /// All that belonged to no file at the instant; `None` if that is unknown, and then the file has all of RAM.
    private: Option<PageSet>,
    /// Ends when the guest runs again, so that it need not wait for that.
    watch: Option<WriteWatch>,
}

impl CopiedMemory {
    /// The image of it. The guest may go on meanwhile.
    ///
    /// Blocks for as long as it takes to stop noting what is written, and to copy what lies between the ranges in which the
    /// image is mapped.
    ///
    /// # Errors
    /// [`RamError::Freeze`] with the host's reason, as when it has no memory left.
    pub fn into_image(mut self) -> Result<MemoryImage, RamError> {
        drop(self.watch.take());
        self.build().map_err(RamError::Freeze)
    }

    fn build(self) -> io::Result<MemoryImage> {
        let mut id = [0; 32];
        getrandom::fill(&mut id).map_err(io::Error::other)?;
        let size = self.ram.size();
        let Some(private) = &self.private else {
            return Ok(MemoryImage::new(self.file, size, id));
        };
        let Some(below) = self.ram.source() else {
            // What was not written reads as zeros, as it does from the file unless it was copied and then given back.
            for gone in Extent::runs(self.copied.without(private).iter()) {
                punch(&self.file, gone.offset, gone.len)?;
            }
            return Ok(MemoryImage::new(self.file, size, id));
        };
        match PIECES_MAX.saturating_sub(below.pieces()) {
            0 => {
                self.fill_from(below, private, &[Extent { offset: 0, len: size.0 }])?;
                Ok(MemoryImage::new(self.file, size, id))
            }
            room => {
                let extents = Extent::join(Extent::runs(private.iter()), room);
                self.fill_from(below, private, &extents)?;
                Ok(below.with(self.file, extents, id))
            }
        }
    }

    /// Copies what `below` has to those pages of `extents` that were not written.
    fn fill_from(&self, below: &MemoryImage, private: &PageSet, extents: &[Extent]) -> io::Result<()> {
        let mut page = vec![0; PAGE_SIZE as usize];
        for extent in extents {
            let offsets = (extent.offset..extent.end()).step_by(PAGE_SIZE as usize);
            for offset in offsets.filter(|offset| !private.contains(*offset)) {
                below.read_page(offset, &mut page)?;
                let write = if self.copied.contains(offset) { replace_data } else { write_data };
                write(&self.file, offset, &page)?;
            }
        }
        Ok(())
    }
}

/// Writes `bytes` to `offset` of `file`, of which pages of zeros become holes.
fn replace_data(file: &File, offset: u64, bytes: &[u8]) -> io::Result<()> {
    let pages = (0u64..).step_by(PAGE_SIZE as usize).zip(bytes.chunks(PAGE_SIZE as usize));
    for zeros in Extent::runs(pages.filter(|(_, page)| is_zero(page)).map(|(at, _)| at)) {
        punch(file, offset + zeros.offset, zeros.len)?;
    }
    write_data(file, offset, bytes)
}

/// Writes the pages of `bytes` that are not zeros to `offset` of `file`, a run at a time.
pub(crate) fn write_data(file: &File, offset: u64, bytes: &[u8]) -> io::Result<()> {
    let page = |n: usize| &bytes[n * PAGE_SIZE as usize..bytes.len().min((n + 1) * PAGE_SIZE as usize)];
    let pages = 0..bytes.len().div_ceil(PAGE_SIZE as usize);
    let data = pages.filter(|n| !is_zero(page(*n))).map(|n| n as u64 * PAGE_SIZE);
    for run in Extent::runs(data) {
        let end = bytes.len().min(run.end() as usize);
        file.write_all_at(&bytes[run.offset as usize..end], offset + run.offset)?;
    }
    Ok(())
}

/// Whether there are zeros only.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    const ZEROS: [u8; PAGE_SIZE as usize] = [0; PAGE_SIZE as usize];
    bytes.chunks(ZEROS.len()).all(|page| page == &ZEROS[..page.len()])
}

/// As much memory as `ram` is, as a file of zeros.
#[cfg(target_os = "linux")]
fn nameless_file(ram: &GuestRam) -> io::Result<File> {
    let file: File = rustix::fs::memfd_create("kiln-memory", rustix::fs::MemfdFlags::CLOEXEC)?.into();
    file.set_len(ram.size().0)?;
    Ok(file)
}

#[cfg(not(target_os = "linux"))]
fn nameless_file(_ram: &GuestRam) -> io::Result<File> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Makes `len` bytes of `file` from `offset` on a hole.
#[cfg(target_os = "linux")]
fn punch(file: &File, offset: u64, len: u64) -> io::Result<()> {
    use rustix::fs::FallocateFlags;
    Ok(rustix::fs::fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, len)?)
}

#[cfg(not(target_os = "linux"))]
fn punch(_file: &File, _offset: u64, _len: u64) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use std::os::unix::fs::MetadataExt as _;
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

    use super::*;
    use crate::units::Bytes;

    const SIZE: Bytes = Bytes(600 * PAGE_SIZE);

    fn all(ram: &GuestRam) -> Vec<u8> {
        let mut bytes = vec![0; ram.size().0 as usize];
        ram.read_bytes(0, &mut bytes).unwrap();
        bytes
    }

    fn scatter(ram: &GuestRam, step: u64, value: u8) {
        for page in (0..ram.size().0 / PAGE_SIZE).step_by(step as usize) {
            ram.store(page * PAGE_SIZE + u64::from(value), value).unwrap();
        }
    }

    /// RAM of each kind that a guest may have, and that is not all zeros: of no file, of memory, of memory in as many
    /// pieces as there may be, and of a file on disk.
    fn kinds() -> Vec<(&'static str, Arc<GuestRam>)> {
        let anonymous = Arc::new(GuestRam::new(SIZE).unwrap());
        scatter(&anonymous, 2, b'z');
        let memory = anonymous.freeze().unwrap();
        let file = || {
            let file = tempfile::tempfile().unwrap();
            file.write_all_at(&all(&anonymous), 0).unwrap();
            file
        };
        let disk = MemoryImage::new(file(), SIZE, [1; 32]);
        let pieces = (1..PIECES_MAX as u64).map(|n| Extent { offset: n * 4 * PAGE_SIZE, len: PAGE_SIZE }).collect();
        let full = memory.with(file(), pieces, [2; 32]);
        assert_eq!(full.pieces(), PIECES_MAX);
        let map = |image: &MemoryImage| Arc::new(image.map().unwrap());
        vec![("memory", map(&memory)), ("pieces", map(&full)), ("disk", map(&disk)), ("anonymous", anonymous)]
    }

    /// With a host that tells what is written, as this one should, and with one that does not.
    const TOLD: [bool; 2] = [true, false];

    fn watch_if(told: bool, ram: &Arc<GuestRam>) -> io::Result<WriteWatch> {
        if told { WriteWatch::new(Arc::clone(ram)) } else { Err(io::ErrorKind::Unsupported.into()) }
    }

    fn begin(told: bool, ram: &Arc<GuestRam>) -> MemoryCopy {
        let watch = watch_if(told, ram);
        let expected = watch.is_ok();
        let copy = MemoryCopy::begin_with(Arc::clone(ram), watch, &|| true).unwrap();
        assert_eq!((copy.watch.is_some(), copy.copied.count() > 0), (expected, expected));
        copy
    }

    /// Writes and gives back pages in no order, until it is told to stop.
    fn scribble(ram: &GuestRam, seed: u64, stop: &AtomicBool, did: &AtomicU64) {
        let mut random = seed | 1;
        while !stop.load(Ordering::Acquire) {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            let offset = random % (SIZE.0 / PAGE_SIZE) * PAGE_SIZE;
            match random >> 40 & 63 {
                0 => ram.give_back(offset, Bytes(PAGE_SIZE)).unwrap(),
                1 => ram.fill(offset, 0, PAGE_SIZE).unwrap(),
                _ => ram.store(offset + (random >> 48 & 0xff8), random).unwrap(),
            }
            did.fetch_add(1, Ordering::Release);
        }
    }

    /// Runs `meanwhile` while another thread scribbles, which has begun before and is done afterwards.
    fn while_scribbling<T>(ram: &GuestRam, seed: u64, meanwhile: impl FnOnce() -> T) -> T {
        let (stop, did) = (AtomicBool::new(false), AtomicU64::new(0));
        let wait_until = |count: u64| {
            while did.load(Ordering::Acquire) < count {
                std::thread::yield_now();
            }
        };
        std::thread::scope(|scope| {
            scope.spawn(|| scribble(ram, seed, &stop, &did));
            wait_until(100);
            let result = meanwhile();
            wait_until(did.load(Ordering::Acquire) + seed % 1000);
            stop.store(true, Ordering::Release);
            result
        })
    }

    #[test]
    fn an_image_is_what_ram_held_when_its_writer_stood_still() {
        for (told, seed) in TOLD.into_iter().flat_map(|told| (0..30).map(move |n| (told, n * 0x9e37_79b9))) {
            for (kind, ram) in kinds() {
                let copy = while_scribbling(&ram, seed, || begin(told, &ram));
                let then = all(&ram);
                let copied = copy.finish().unwrap();
                let image = while_scribbling(&ram, seed + 1, || copied.into_image().unwrap());
                assert!(all(&image.map().unwrap()) == then, "{kind}, {seed}");
                assert!(image.pieces() <= PIECES_MAX, "{kind}: {} pieces", image.pieces());
            }
        }
    }

    #[test]
    fn ram_of_a_file_that_is_no_image_is_copied_whole() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[b'f'; SIZE.0 as usize], 0).unwrap();
        let mapped = GuestRam::from_file(&file, 0, SIZE).unwrap();
        let mut covered = GuestRam::new(SIZE).unwrap();
        covered.overlay(&file, PAGE_SIZE, Bytes(PAGE_SIZE)).unwrap();
        for ram in [mapped, covered].map(Arc::new) {
            scatter(&ram, 7, b'w');
            let image = MemoryCopy::begin(Arc::clone(&ram), &|| true).unwrap().finish().unwrap().into_image().unwrap();
            assert!(all(&image.map().unwrap()) == all(&ram));
        }
    }

    #[test]
    fn what_is_given_back_after_it_was_copied_is_not_in_the_image() {
        for told in TOLD {
            for (kind, ram) in kinds() {
                ram.fill(0, b'w', SIZE.0).unwrap();
                let copy = begin(told, &ram);
                for page in (0..SIZE.0 / PAGE_SIZE).filter(|page| page % 5 < 2) {
                    ram.give_back(page * PAGE_SIZE, Bytes(PAGE_SIZE)).unwrap();
                    // Reading is what shows the old page again.
                    assert!(page % 5 == 0 || ram.load::<u8>(page * PAGE_SIZE) != Some(b'w'));
                }
                let image = copy.finish().unwrap().into_image().unwrap();
                assert!(all(&image.map().unwrap()) == all(&ram), "{kind}");
            }
        }
    }

    #[test]
    fn a_copy_that_is_dropped_or_not_wanted_leaves_no_watch() {
        for (kind, ram) in kinds() {
            scatter(&ram, 1, 1);
            let expected = WriteWatch::new(Arc::clone(&ram)).is_ok();
            drop(begin(true, &ram));
            let unwanted = MemoryCopy::begin_with(Arc::clone(&ram), watch_if(true, &ram), &|| false);
            assert_eq!(matches!(unwanted, Err(RamError::Freeze(_))), expected, "{kind}");
            drop(begin(true, &ram).finish().unwrap());
            // One that is still there would not let another come.
            assert_eq!(WriteWatch::new(Arc::clone(&ram)).is_ok(), expected, "{kind}");
        }
    }

    #[test]
    fn two_copies_at_once_are_both_right() {
        for (kind, ram) in kinds() {
            let (one, other) = while_scribbling(&ram, 7, || {
                let one = begin(true, &ram);
                (one, MemoryCopy::begin(Arc::clone(&ram), &|| true).unwrap())
            });
            let then = all(&ram);
            for copy in [one, other] {
                let image = copy.finish().unwrap().into_image().unwrap();
                assert!(all(&image.map().unwrap()) == then, "{kind}");
            }
        }
    }

    #[test]
    fn a_frozen_image_keeps_what_ram_was_while_that_goes_on() {
        let ram = Arc::new(GuestRam::new(SIZE).unwrap());
        scatter(&ram, 7, 1);
        let (then, image) = (all(&ram), ram.freeze().unwrap());
        scatter(&ram, 1, 2);
        let [one, other] = [(); 2].map(|()| image.map().unwrap());
        assert!(all(&one) == then);
        scatter(&one, 3, 9);
        assert!(all(&other) == then);
    }

    #[test]
    fn images_of_clones_of_clones_hold_only_what_each_wrote() {
        let ram = Arc::new(GuestRam::new(SIZE).unwrap());
        scatter(&ram, 1, 1);
        let mut image = ram.freeze().unwrap();
        for depth in 2..20 {
            let clone = Arc::new(image.map().unwrap());
            scatter(&clone, u64::from(depth) * 10, depth);
            let (expected, next) = (all(&clone), clone.freeze().unwrap());
            assert!(next.pieces() <= PIECES_MAX, "{} pieces", next.pieces());
            assert!(all(&next.map().unwrap()) == expected, "depth {depth}");
            image = next;
        }
    }

    #[test]
    fn pages_of_zeros_replace_others() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[1; 6 * PAGE_SIZE as usize], 0).unwrap();
        let mut bytes = vec![0; 4 * PAGE_SIZE as usize];
        bytes[PAGE_SIZE as usize..][..PAGE_SIZE as usize].fill(2);
        replace_data(&file, PAGE_SIZE, &bytes).unwrap();
        let mut found = vec![9; 6 * PAGE_SIZE as usize];
        file.read_exact_at(&mut found, 0).unwrap();
        let firsts: Vec<u8> = found.chunks(PAGE_SIZE as usize).map(|page| page[77]).collect();
        assert_eq!(firsts, [1, 0, 2, 0, 0, 1]);
    }

    #[test]
    fn pages_of_zeros_are_not_kept() {
        let file = tempfile::tempfile().unwrap();
        let mut bytes = vec![0; 5 * PAGE_SIZE as usize];
        bytes[2 * PAGE_SIZE as usize] = 1;
        file.set_len(8 * PAGE_SIZE).unwrap();
        write_data(&file, PAGE_SIZE, &bytes).unwrap();
        assert_eq!(file.metadata().unwrap().blocks() * 512, PAGE_SIZE);
        let mut byte = [0];
        file.read_exact_at(&mut byte, 3 * PAGE_SIZE).unwrap();
        assert_eq!(byte, [1]);
    }
}
