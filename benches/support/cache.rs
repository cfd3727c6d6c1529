//! Files out of the page cache.

use std::fs::File;
use std::io::IoSliceMut;
use std::path::Path;

use rustix::fs::Advice;
use rustix::fs::SeekFrom;
use rustix::io::Errno;
use rustix::io::ReadWriteFlags;

/// Far more than the kernel reads ahead of a look.
const STRIDE: u64 = 4 << 20;

/// Puts a file's pages out of the page cache, and says whether those looked at are gone. Pages that somebody maps stay.
pub(crate) fn evict(path: &Path) -> bool {
    let file = File::open(path).expect("the file is there");
    file.sync_all().expect("written");
    drop_pages(&file);
    let gone = is_cold(&file);
    // A look may have the kernel read that page.
    drop_pages(&file);
    gone
}

fn drop_pages(file: &File) {
    rustix::fs::fadvise(file, 0, None, Advice::DontNeed).expect("a regular file");
}

/// Reads a byte here and there, without waiting: only what is in the cache comes.
fn is_cold(file: &File) -> bool {
    let size = file.metadata().expect("its size").len();
    (0..size).step_by(STRIDE as usize).all(|from| {
        // A hole says nothing.
        let Ok(at) = rustix::fs::seek(file, SeekFrom::Data(from)) else { return true };
        let mut byte = [0];
        let read = rustix::io::preadv2(file, &mut [IoSliceMut::new(&mut byte)], at, ReadWriteFlags::NOWAIT);
        read == Err(Errno::AGAIN)
    })
}
