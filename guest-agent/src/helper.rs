//! Packing and unpacking trees, in a process of the same program: `--pack PATH` and `--unpack PATH`.
//!
//! The archive is the process's standard output or input. What goes wrong is printed on its standard error in the words of
//! an ERROR frame, and the server passes that on; [`explain`] reads it there.

use std::error::Error;
use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;

use kiln_tree::UnpackOptions;
use kiln_wire::failure::Failure;
use rustix::fs::Mode;

use crate::launch::reason;

pub(crate) const PACK: &str = "--pack";
pub(crate) const UNPACK: &str = "--unpack";

/// Packs `path` to standard output; the exit status.
pub(crate) fn pack(path: &Path) -> i32 {
    let packed = own_copy(rustix::stdio::stdout())
        .map_err(|error| failure(&error, error.raw_os_error()))
        .and_then(|out| kiln_tree::pack(path, None, out).map_err(|error| failure(&error, error.raw_os_error())));
    conclude(packed)
}

/// Unpacks standard input into `path`; the exit status.
pub(crate) fn unpack(path: &Path) -> i32 {
    // The archive says which mode a fifo or a device node has.
    rustix::process::umask(Mode::empty());
    let unpacked = own_copy(rustix::stdio::stdin()).map_err(|error| failure(&error, error.raw_os_error())).and_then(
        |mut archive| {
            kiln_tree::unpack_into(&mut archive, path, &UnpackOptions::guest())
                .map_err(|error| failure(&error, error.raw_os_error()))?;
            // The host's end-of-file is the end, however much a writer fills its last record up with.
            io::copy(&mut archive, &mut io::sink()).map_err(|error| failure(&error, error.raw_os_error()))
        },
    );
    conclude(unpacked.map(|_| ()))
}

/// Standard streams as files, without std's buffers and locks.
fn own_copy(stream: BorrowedFd<'_>) -> io::Result<File> {
    stream.try_clone_to_owned().map(File::from)
}

/// An error with those that it came from.
fn failure(error: &(dyn Error + 'static), errno: Option<i32>) -> Failure {
    let mut detail = error.downcast_ref().map_or_else(|| error.to_string(), reason);
    let mut source = error.source();
    while let Some(cause) = source {
        detail.push_str(": ");
        detail.push_str(&cause.downcast_ref().map_or_else(|| cause.to_string(), reason));
        source = cause.source();
    }
    match errno {
        Some(errno) => Failure::System { errno, detail },
        None => Failure::Other(detail),
    }
}

fn conclude(result: Result<(), Failure>) -> i32 {
    match result {
        Ok(()) => 0,
        Err(failure) => {
            eprint!("{failure}");
            1
        }
    }
}

/// What a helper that ended with `code` said on its standard error.
pub(crate) fn explain(complaint: &[u8], code: u32) -> Failure {
    match complaint {
        [] => Failure::Other(format!("the helper process ended with code {code}")),
        said => Failure::decode(said),
    }
}
