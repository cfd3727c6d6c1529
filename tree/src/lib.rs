//! A folder tree as a tar stream, and back.
//!
//! [`pack`] writes POSIX pax archives; [`unpack_into`] and [`unpack_as`] read those, and ustar, GNU and v7 ones. The agent uses
//! them inside a guest and the SDK outside, where the archive comes from a guest that may be hostile: unpacking never
//! leaves the destination, never follows a symbolic link inside it, and holds no more than a bounded amount in memory.
//!
//! [`reader`] is what both stand on, for those who want the entries of a hostile archive without a folder to put them in.
//!
//! Blocking, on plain [`std::io`]. Kept are permission bits, times of modification to the nanosecond, symbolic and hard links, fifos and
//! device nodes; owners are recorded but not applied, and extended attributes are neither.
#![forbid(unsafe_code)]

mod error;
mod pack;
pub mod pax;
mod place;
pub mod reader;
mod sparse;
mod stat;
mod unpack;
mod writer;

pub use crate::error::ArchiveError;
pub use crate::error::PackError;
pub use crate::error::UnpackError;
pub use crate::pack::pack;
pub use crate::unpack::UnpackOptions;
pub use crate::unpack::Unpacked;
pub use crate::unpack::unpack_as;
pub use crate::unpack::unpack_into;

/// Folders inside folders, at most: [`pack`] holds one descriptor for each, and [`unpack_into`] opens each for every entry.
const MAX_DEPTH: usize = 512;
