//! Guest RAM: the only owner of guest mappings, and four of the unsafe fences: the mapping itself, the
//! accesses to it, what the host's kernel is asked about its pages, and arrays that are shared as guests' memory is.
//!
//! RAM is one host mapping, anonymous or a private one of a saved guest's memory. Guest-physically it lies in at most two pieces: from 0 up to
//! [`HOLE_START`], and what does not fit from [`HOLE_END`] on; the hole between them belongs to MMIO.
//!
//! ```text
//!   GPA   0 ........ HOLE_START (3 GiB) | MMIO hole | HOLE_END (4 GiB) ........
//!   host  [ low part                   ][ high part                           ]   one mapping
//! ```
//!
//! Two kinds of user, two views. **Devices** go through [`GuestRam::memory`], a
//! [`vm_memory::GuestMemory`], in guest-physical addresses; every write of theirs is noted in
//! [`CodePages`] so that the processors that keep decoded instructions learn of it. **The soft
//! processor** resolves an address once to a *RAM offset* and then uses [`GuestRam::load`] and
//! [`GuestRam::store`], which cost one compare and one move, and [`GuestRam::compare_exchange`] for all read-modify-writes.

mod atomic;
mod cell;
mod code_pages;
mod cow_array;
mod extent;
mod freeze;
mod host;
mod image;
mod page_set;
mod ram;
#[cfg_attr(not(all(target_os = "linux", target_arch = "x86_64")), path = "watch_none.rs")]
mod watch;

pub use cell::TOTAL_STORE_ORDER;
pub use code_pages::{CodePages, CodePagesSlice, CodeWatch, MAX_WATCHERS};
pub(crate) use cow_array::{ArrayImage, CowArray};
pub use extent::Extent;
pub use freeze::{CopiedMemory, MemoryCopy};
pub(crate) use freeze::{is_zero, write_data};
pub use host::{can_scan_pages, can_watch_writes};
pub use image::{MemoryId, MemoryImage};
pub(crate) use page_set::AtomicPageSet;
pub use page_set::PageSet;
pub use ram::{GuestMemory, GuestRam, HOLE_END, HOLE_START, RamError, RamOffset, Scalar};
