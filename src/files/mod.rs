//! Files in a running guest: whole ones, streams of any size, and trees.
//!
//! ```text
//!   write, read            ──one CONTROL action, or a stream when long──> agent
//!   GuestFileReader/Writer ──a stream of the exec protocol──────────────> agent
//!   copy_in, copy_out      ──a tar archive on such a stream─────────────> agent's helper process
//! ```
//! The guest's agent acts as root, whatever the image's USER, on paths of the image's root; a relative path starts there. A file that is
//! written appears under its name at once and whole, or not at all. Symbolic links are followed, except where a tree is unpacked.
//!
//! No single step of an operation waits longer than [`STALL`] for the guest.

mod copy;
mod error;
mod guest_files;
mod handles;

pub use error::FileError;
pub use guest_files::GuestFiles;
pub use handles::GuestFileReader;
pub use handles::GuestFileWriter;
pub use kiln_tree::PackError;
pub use kiln_tree::UnpackError;
pub use kiln_tree::UnpackOptions;
pub use kiln_tree::Unpacked;

use std::time::Duration;

/// How long a guest may take for the next piece of a file (30 s).
pub const STALL: Duration = Duration::from_secs(30);
