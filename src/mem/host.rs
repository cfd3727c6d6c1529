//! What the host's kernel can tell about the pages of RAM, found out on a page of it.

use std::io;
use std::sync::Arc;

use super::GuestRam;
use super::RamError;
use super::watch::WriteWatch;
use crate::units::{Bytes, PAGE_SIZE};

fn page() -> io::Result<GuestRam> {
    GuestRam::new(Bytes(PAGE_SIZE)).map_err(|error| match error {
        RamError::Map(_, error) => error,
        other => io::Error::other(other),
    })
}

/// Whether the host notes which pages a running guest writes (`userfaultfd` that never stops a write, `PAGEMAP_SCAN`): if not,
/// a running guest that is kept is paused for as long as copying takes.
///
/// # Errors
/// The host's reason why not.
pub fn can_watch_writes() -> io::Result<()> {
    WriteWatch::new(Arc::new(page()?)).and_then(|watch| watch.take_written()).map(drop)
}

/// Whether the host tells which pages were written since RAM was mapped: if not, all of it is read for a difference.
///
/// # Errors
/// That it does not.
pub fn can_scan_pages() -> io::Result<()> {
    page()?.private_pages().map(drop).ok_or_else(|| io::ErrorKind::Unsupported.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_that_tells_what_is_written_also_tells_what_is_private() {
        if can_watch_writes().is_ok() {
            can_scan_pages().expect("it is the same request");
        }
    }
}
