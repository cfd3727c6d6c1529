//! Arrays in memory that many share until they write: what [`GuestRam`](super::GuestRam) is for a guest's memory, for
//! values of the host's own that are large, mostly read, and the same for many guests.
#![allow(unsafe_code, reason = "unsafe fence: host memory as arrays of values, shared copy-on-write")]

use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::ptr::NonNull;

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};

use crate::units::PAGE_SIZE;

/// Values that any number of [`CowArray`]s may begin with.
#[derive(Debug)]
pub(crate) struct ArrayImage<T> {
    file: File,
    len: usize,
    of: PhantomData<fn() -> T>,
}

impl<T: Copy + Send + Sync + 'static> ArrayImage<T> {
    /// Keeps a copy of `values`, in memory that has no name and that nobody can change any more.
    ///
    /// # Errors
    /// What the host refuses; on hosts other than Linux always.
    pub(crate) fn new(values: &[T]) -> io::Result<Self> {
        let file = nameless()?;
        let bytes = size_of_val(values);
        file.set_len(bytes.max(1) as u64)?;
        let mapping = Mapping::of(&file, bytes.max(1), MapFlags::SHARED)?;
        // SAFETY: the mapping is at least as long as `values`, page-aligned (so aligned for `T`, see `Mapping::at`), and
        // not older than this call, so that nothing overlaps it.
        unsafe { mapping.at::<T>().copy_from_nonoverlapping(NonNull::from(values).cast(), values.len()) };
        drop(mapping);
        seal(&file)?;
        Ok(Self { file, len: values.len(), of: PhantomData })
    }

    /// How many values.
    pub(crate) fn len(&self) -> usize {
        self.len
    }
}

/// An array that grows up to a size that is set when it is made, and never moves. Takes host memory for what is written
/// only: pages of an image that nobody writes to are shared.
#[derive(Debug)]
pub(crate) struct CowArray<T> {
    mapping: Mapping,
    /// Values in the image that it began with, and in the array now.
    image: usize,
    len: usize,
    capacity: usize,
    of: PhantomData<T>,
}

impl<T: Copy + Send + Sync + 'static> CowArray<T> {
    /// An array with the values of `image`, if there is one, and room for `more`.
    ///
    /// # Errors
    /// What the host refuses.
    pub(crate) fn new(image: Option<&ArrayImage<T>>, more: usize) -> io::Result<Self> {
        let len = image.map_or(0, ArrayImage::len);
        let too_large = || io::Error::from(io::ErrorKind::OutOfMemory);
        let capacity = len.checked_add(more).ok_or_else(too_large)?;
        let bytes = capacity.checked_mul(size_of::<T>()).ok_or_else(too_large)?.max(1);
        let mut mapping = Mapping::anonymous(bytes)?;
        if let Some(image) = image.filter(|image| image.len > 0) {
            mapping.overlay(&image.file, image.len * size_of::<T>())?;
        }
        Ok(Self { mapping, image: len, len, capacity, of: PhantomData })
    }

    /// The values.
    pub(crate) fn as_slice(&self) -> &[T] {
        // SAFETY: the mapping holds `capacity` values and `len` is no more, of which the first `image` are the image's
        // (written whole by `ArrayImage::new`, sealed since) or what this array has made of them, and the others were
        // written by `extend`. It is page-aligned and changed through `&mut self` only.
        unsafe { std::slice::from_raw_parts(self.mapping.at::<T>().as_ptr(), self.len) }
    }

    /// A value.
    pub(crate) fn get_mut(&mut self, index: usize) -> Option<&mut T> {
        // SAFETY: as for `as_slice`, and borrowed mutably; the mapping is private to this array and writable.
        let values = unsafe { std::slice::from_raw_parts_mut(self.mapping.at::<T>().as_ptr(), self.len) };
        values.get_mut(index)
    }

    /// Appends `values`; false, with nothing done, when there is no room.
    #[must_use]
    pub(crate) fn extend(&mut self, values: &[T]) -> bool {
        if values.len() > self.capacity - self.len {
            return false;
        }
        // SAFETY: there is room in the mapping for as many values from `len` on (just checked), and `values` is borrowed
        // from elsewhere: nobody has a reference to what lies beyond `len`.
        unsafe {
            self.mapping.at::<T>().add(self.len).copy_from_nonoverlapping(NonNull::from(values).cast(), values.len());
        }
        self.len += values.len();
        true
    }

    /// Makes it what it was in the beginning, and gives the memory that it took back to the host.
    ///
    /// # Errors
    /// What the host refuses; the array is empty then.
    pub(crate) fn reset(&mut self) -> io::Result<()> {
        let image = std::mem::take(&mut self.image);
        self.len = 0;
        self.mapping.forget_writes()?;
        (self.image, self.len) = (image, image);
        Ok(())
    }
}

/// Memory of this process's own.
#[derive(Debug)]
struct Mapping {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: plain memory that only its owner has the address of; who may reach it is decided by the borrow of the owner.
unsafe impl Send for Mapping {}
// SAFETY: as for Send.
unsafe impl Sync for Mapping {}

impl Mapping {
    const ACCESS: ProtFlags = ProtFlags::READ.union(ProtFlags::WRITE);

    fn anonymous(len: usize) -> io::Result<Self> {
        // SAFETY: a fresh mapping at an address of the kernel's choice aliases nothing.
        let base = unsafe {
            mmap_anonymous(std::ptr::null_mut(), len, Self::ACCESS, MapFlags::PRIVATE | MapFlags::NORESERVE)
        }?;
        Self::new(base, len)
    }

    fn of(file: &File, len: usize, flags: MapFlags) -> io::Result<Self> {
        // SAFETY: as for `anonymous`.
        let base = unsafe { mmap(std::ptr::null_mut(), len, Self::ACCESS, flags, file, 0) }?;
        Self::new(base, len)
    }

    fn new(base: *mut std::ffi::c_void, len: usize) -> io::Result<Self> {
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { base, len })
    }

    /// Replaces the beginning by `len` bytes of `file`, copy-on-write.
    fn overlay(&mut self, file: &File, len: usize) -> io::Result<()> {
        assert!(len <= self.len, "an image longer than the array that begins with it");
        // SAFETY: the range is this mapping's (just checked; the kernel rounds up to its page, as it did when the
        // mapping was made), which nobody uses meanwhile. The file is at least as long, and sealed against shrinking.
        unsafe { mmap(self.base.as_ptr().cast(), len, Self::ACCESS, MapFlags::PRIVATE | MapFlags::FIXED, file, 0) }?;
        Ok(())
    }

    /// Makes anonymous memory zeros again, and mapped pages what the file holds.
    fn forget_writes(&mut self) -> io::Result<()> {
        // SAFETY: the range is this mapping's, which nobody uses meanwhile; whatever it reads as is valid memory.
        Ok(unsafe { madvise(self.base.as_ptr().cast(), self.len, Advice::LinuxDontNeed) }?)
    }

    /// The address as that of values; a mapping begins on a page.
    fn at<T>(&self) -> NonNull<T> {
        const { assert!(align_of::<T>() <= PAGE_SIZE as usize && size_of::<T>() > 0) };
        self.base.cast()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: what was mapped, by its owner, at the end of its life. A failure leaves the mapping, harmlessly.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), self.len) };
    }
}

#[cfg(target_os = "linux")]
fn nameless() -> io::Result<File> {
    use rustix::fs::MemfdFlags;
    Ok(rustix::fs::memfd_create("kiln-array", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?.into())
}

#[cfg(not(target_os = "linux"))]
fn nameless() -> io::Result<File> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Neither content nor size can change after this.
#[cfg(target_os = "linux")]
fn seal(file: &File) -> io::Result<()> {
    use rustix::fs::SealFlags;
    let all = SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE;
    Ok(rustix::fs::fcntl_add_seals(file, all)?)
}

#[cfg(not(target_os = "linux"))]
fn seal(_file: &File) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Three pages and a bit of values that are no power of two long.
    fn values() -> Vec<[u32; 3]> {
        (0..1100).map(|n| [n, n + 1, n + 2]).collect()
    }

    #[test]
    fn an_array_without_image_grows_to_its_capacity_and_stays_where_it_is() {
        let mut array = CowArray::new(None, 1000).unwrap();
        assert_eq!(array.as_slice(), &[] as &[u64]);
        assert!(array.extend(&[1, 2, 3]));
        let at = array.as_slice().as_ptr();
        assert!(array.extend(&[7; 997]));
        assert!(!array.extend(&[8]), "it is full");
        assert!(array.extend(&[]));
        assert_eq!((array.as_slice().as_ptr(), array.as_slice().len()), (at, 1000));
        assert_eq!(array.as_slice()[..4], [1, 2, 3, 7]);
        assert!(array.get_mut(1000).is_none());
        array.reset().unwrap();
        assert!(array.as_slice().is_empty());
        assert!(array.extend(&[9]));
        assert_eq!(array.as_slice(), [9]);
    }

    #[test]
    fn arrays_of_one_image_do_not_see_each_others_writes() {
        let image = ArrayImage::new(&values()).unwrap();
        let mut arrays = [(); 2].map(|()| CowArray::new(Some(&image), 10).unwrap());
        drop(image);
        *arrays[0].get_mut(500).unwrap() = [0; 3];
        assert!(arrays[0].extend(&[[5; 3]]));
        assert_eq!(arrays[1].as_slice(), values());
        assert_eq!((arrays[0].as_slice()[499], arrays[0].as_slice()[500]), ([499, 500, 501], [0; 3]));
        arrays[0].reset().unwrap();
        assert_eq!(arrays[0].as_slice(), values());
        assert!(arrays[0].extend(&[[6; 3]]));
        assert_eq!(arrays[0].as_slice().last(), Some(&[6; 3]));
        let third = CowArray::<[u32; 3]>::new(Some(&ArrayImage::new(&[]).unwrap()), 0).unwrap();
        assert!(third.as_slice().is_empty());
    }

    #[test]
    fn an_image_cannot_be_changed() {
        use std::io::Write as _;
        let mut image = ArrayImage::new(&values()).unwrap();
        assert!(image.file.write_all(&[1]).is_err());
        assert!(image.file.set_len(0).is_err());
    }

    #[test]
    fn impossible_sizes_are_errors() {
        assert!(CowArray::<u64>::new(None, usize::MAX).is_err());
        assert!(CowArray::<u64>::new(None, usize::MAX / 8 / 2).is_err());
    }
}
