//! The log of pages that vCPUs write (KVM_MEM_LOG_DIRTY_PAGES, KVM_GET_DIRTY_LOG).

use super::failed;
use super::machine::Shared;
use super::memory::Logging;
use crate::hv::HvError;
use crate::mem::PageSet;
use crate::units::PAGE_SIZE;

impl Shared {
    /// The pages written since the log was begun or last taken.
    pub(super) fn take_dirty_pages(&self) -> Result<PageSet, HvError> {
        if *self.logging() == Logging::Off {
            return Err(HvError::Unsupported("taking a log of written pages that was not begun"));
        }
        let mut pages = PageSet::none(self.ram().size().0);
        let mut base = 0;
        for (slot, (_, size)) in (0..).zip(self.ram().pieces()) {
            let size_in_memory = usize::try_from(size.0).map_err(|_| HvError::Unsupported("so much memory"))?;
            let log = self.vm().get_dirty_log(slot, size_in_memory).map_err(failed("KVM_GET_DIRTY_LOG"))?;
            for (n, word) in (0u64..).zip(log).filter(|(_, word)| *word != 0) {
                for bit in (0..64).filter(|bit| word >> bit & 1 != 0) {
                    pages.insert(base + (n * 64 + bit) * PAGE_SIZE);
                }
            }
            base += size.0;
        }
        Ok(pages)
    }
}
