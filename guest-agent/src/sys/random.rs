//! The kernel's random number generator (random(4)).

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::fs::OpenOptionsExt;

/// `_IOW('R', 0x03, int[2])`: mixes bytes in and counts them as random.
const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
/// `_IO('R', 0x07)`: makes a new key from what was mixed in.
const RNDRESEEDCRNG: libc::c_ulong = 0x5207;

/// Most bytes that [`add_entropy`] takes.
pub(crate) const ENTROPY_MAX: usize = 512;

/// `struct rand_pool_info` with room for [`ENTROPY_MAX`] bytes.
#[repr(C)]
struct PoolInfo {
    bits: libc::c_int,
    size: libc::c_int,
    bytes: [u8; ENTROPY_MAX],
}

/// The generator's device, and nothing that somebody may have put in its place: a FIFO would not be waited for.
fn open() -> io::Result<File> {
    let device = File::options().read(true).custom_flags(libc::O_NONBLOCK).open("/dev/urandom")?;
    let meta = device.metadata()?;
    if meta.file_type().is_char_device() && meta.rdev() == libc::makedev(1, 9) {
        return Ok(device);
    }
    Err(io::Error::from_raw_os_error(libc::ENODEV))
}

/// Mixes `entropy`, at most [`ENTROPY_MAX`] bytes, in and has everything that is drawn from now on depend on it.
pub(crate) fn add_entropy(entropy: &[u8]) -> io::Result<()> {
    let mut info = PoolInfo { bits: 0, size: 0, bytes: [0; ENTROPY_MAX] };
    info.bytes.get_mut(..entropy.len()).ok_or(io::ErrorKind::InvalidInput)?.copy_from_slice(entropy);
    // Both fit: there are at most 512 bytes.
    (info.size, info.bits) = (entropy.len() as libc::c_int, entropy.len() as libc::c_int * 8);
    let device = open()?;
    // SAFETY: the request reads a rand_pool_info, which `info` is, and no more bytes behind it than its size says.
    if unsafe { libc::ioctl(device.as_raw_fd(), RNDADDENTROPY as _, &raw const info) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the request takes no argument.
    if unsafe { libc::ioctl(device.as_raw_fd(), RNDRESEEDCRNG as _) } != 0 {
        let error = io::Error::last_os_error();
        // Not seeded before: then what was added has been the seed.
        if error.raw_os_error() != Some(libc::ENODATA) {
            return Err(error);
        }
    }
    Ok(())
}
