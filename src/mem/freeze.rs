//! RAM at one instant as an image that other guests are made from, while this one goes on.
//!
//! Only what belongs to no file yet is copied: into memory that has no name and goes with the last who maps it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::Extent;
use super::GuestRam;
use super::MemoryImage;
use super::RamError;
use crate::units::PAGE_SIZE;

/// Most ranges that a frozen image is mapped in. The host allows a process some 65,000 mappings, and there may be
/// hundreds of guests.
const PIECES_MAX: usize = 128;
/// Bytes copied at once: what stays in the processor's cache between being read and being written.
const PIECE: u64 = 256 << 10;

impl GuestRam {
    /// What RAM holds now. The caller sees to it that nobody writes meanwhile.
    ///
    /// Blocks for as long as copying takes what was written since RAM was mapped, or since it was made.
    ///
    /// # Errors
    /// [`RamError::Freeze`] with the host's reason, as when it has no memory left.
    pub fn freeze(&self) -> Result<MemoryImage, RamError> {
        self.copy_written().map_err(RamError::Freeze)
    }

    fn copy_written(&self) -> io::Result<MemoryImage> {
        let file = nameless_file()?;
        file.set_len(self.size().0)?;
        let mut id = [0; 32];
        getrandom::fill(&mut id).map_err(io::Error::other)?;
        let written = self.private_pages().map(|pages| Extent::runs(pages.iter()));
        let below = self.source().map(|image| (image, PIECES_MAX.saturating_sub(image.pieces())));
        match (below, written) {
            (Some((image, room @ 1..)), Some(written)) => {
                let written = Extent::join(written, room);
                self.copy_to(&file, &written)?;
                Ok(image.with(file, written, id))
            }
            (below, written) => {
                let whole = vec![Extent { offset: 0, len: self.size().0 }];
                // Without an image below, what was not written reads as zeros, as it does from the file.
                let written = written.filter(|_| below.is_none()).unwrap_or(whole);
                self.copy_to(&file, &written)?;
                Ok(MemoryImage::new(file, self.size(), id))
            }
        }
    }

    /// Copies `extents` to the same offsets of `file`, which reads as zeros: pages of zeros stay holes.
    fn copy_to(&self, file: &File, extents: &[Extent]) -> io::Result<()> {
        let mut buffer = vec![0; PIECE as usize];
        for extent in extents {
            for offset in (extent.offset..extent.end()).step_by(PIECE as usize) {
                let bytes = &mut buffer[..PIECE.min(extent.end() - offset) as usize];
                self.read_bytes(offset, bytes).ok_or(io::ErrorKind::UnexpectedEof)?;
                write_data(file, offset, bytes)?;
            }
        }
        Ok(())
    }
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

/// Memory that is a file.
#[cfg(target_os = "linux")]
fn nameless_file() -> io::Result<File> {
    Ok(rustix::fs::memfd_create("kiln-memory", rustix::fs::MemfdFlags::CLOEXEC)?.into())
}

#[cfg(not(target_os = "linux"))]
fn nameless_file() -> io::Result<File> {
    Err(io::ErrorKind::Unsupported.into())
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

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

    #[test]
    fn a_frozen_image_keeps_what_ram_was_while_that_goes_on() {
        let ram = GuestRam::new(SIZE).unwrap();
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
        let ram = GuestRam::new(SIZE).unwrap();
        scatter(&ram, 1, 1);
        let mut image = ram.freeze().unwrap();
        for depth in 2..20 {
            let clone = image.map().unwrap();
            scatter(&clone, u64::from(depth) * 10, depth);
            let (expected, next) = (all(&clone), clone.freeze().unwrap());
            assert!(next.pieces() <= PIECES_MAX, "{} pieces", next.pieces());
            assert!(all(&next.map().unwrap()) == expected, "depth {depth}");
            image = next;
        }
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
