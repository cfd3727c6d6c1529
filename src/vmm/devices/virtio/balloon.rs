//! The memory balloon (section 5.5): the guest puts pages into it that it does without, and the host takes them.
//!
//! ```text
//!   host   BalloonControl --target--> config change interrupt        pages given back
//!                                              |                            ^
//!   guest                     driver allocates pages --inflateq: numbers----+
//!                             driver frees them <--deflateq-- target lower
//!                             driver writes `actual` --> whoever waits for it
//! ```
//!
//! A list of pages is the guest's word: numbers that are not RAM's are passed over, and what it loses by naming pages
//! that it uses is its own. Pages that come out of the balloon are usable at once, so that nothing is done for them.
//!
//! Not offered: statistics, free page hints and reports, and giving pages back when the guest runs out of memory. The
//! balloon is full for a moment only, before a snapshot; reports would have every guest search its free memory for ever.

use std::io::Read as _;
use std::sync::Arc;

use tokio::sync::watch;

use super::DeviceQueue;
use super::DeviceState;
use super::Doorbell;
use super::LiveConfig;
use super::Progress;
use super::QueueError;
use super::VirtioDevice;
use super::mmio::read_padded;
use crate::mem::GuestMemory;
use crate::mem::GuestRam;
use crate::units::{Bytes, GuestAddr, PAGE_SIZE};

const DEVICE_TYPE: u32 = 5;
/// Inflate, deflate (section 5.5.2).
const QUEUE_SIZES: [u16; 2] = [64, 64];
/// Most pages of a list that are given back, four times what Linux lists; the guest's others stay as they are.
const MAX_PAGES: usize = 1024;
/// Size of a page's number in a list.
const NUMBER: usize = size_of::<u32>();
/// Offset of `actual` in `struct virtio_balloon_config`, after `num_pages` (section 5.5.4).
const ACTUAL: u64 = 4;

/// What both sides know.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::vmm) struct Balance {
    /// Pages that the host wants in the balloon.
    target: u32,
    /// Pages that the guest says are in it.
    pub(in crate::vmm) actual: u32,
    generation: u32,
    /// The driver is to be told of the target.
    untold: bool,
    /// There is a driver.
    pub(in crate::vmm) at_work: bool,
    /// Pages that were given back to the host so far, each time that the guest named them.
    pub(in crate::vmm) given_back: u64,
}

#[derive(Debug)]
struct Shared {
    balance: watch::Sender<Balance>,
}

/// The device.
#[derive(Debug)]
pub struct Balloon {
    shared: Arc<Shared>,
    ram: Arc<GuestRam>,
    /// RAM offsets of the pages of one list.
    pages: Vec<u64>,
}

/// The host's end of a balloon.
#[derive(Debug)]
pub struct BalloonControl {
    shared: Arc<Shared>,
    doorbell: Arc<Doorbell>,
}

impl Balloon {
    /// A balloon for the guest with `ram`, its control, and the doorbell to start its transport with.
    #[must_use]
    pub fn new(ram: Arc<GuestRam>) -> (Self, BalloonControl, Arc<Doorbell>) {
        let shared = Arc::new(Shared { balance: watch::Sender::default() });
        let doorbell = Arc::<Doorbell>::default();
        let control = BalloonControl { shared: Arc::clone(&shared), doorbell: Arc::clone(&doorbell) };
        (Self { shared, ram, pages: Vec::with_capacity(MAX_PAGES) }, control, doorbell)
    }

    /// Takes one list of pages and gives them back to the host.
    fn inflate(&mut self, queue: &mut DeviceQueue, memory: &GuestMemory) -> Result<bool, QueueError> {
        let Some(chain) = queue.pop(memory)? else { return Ok(false) };
        let mut reader = chain.reader()?;
        if !reader.available_bytes().is_multiple_of(NUMBER) {
            return Err(QueueError::Chain("a list of pages that ends within one"));
        }
        let mut list = [0; MAX_PAGES * NUMBER];
        let listed = &mut list[..reader.available_bytes().min(MAX_PAGES * NUMBER)];
        reader.read_exact(listed).map_err(|_| QueueError::Chain("list of pages"))?;
        self.pages.clear();
        // Whatever the guest's page size is, the balloon's is 4096 (section 5.5.6).
        let numbers = listed.chunks_exact(NUMBER).map(|n| u32::from_le_bytes([n[0], n[1], n[2], n[3]]));
        let pages = numbers.filter_map(|n| self.ram.offset_of(GuestAddr(u64::from(n) * PAGE_SIZE)));
        self.pages.extend(pages);
        self.pages.sort_unstable();
        self.pages.dedup();
        let given = give_back(&self.ram, &self.pages);
        // Before the driver knows, and so before `actual` tells the host.
        self.shared.balance.send_modify(|balance| balance.given_back = balance.given_back.saturating_add(given));
        queue.complete(&chain, 0)?;
        queue.notify(memory)?;
        Ok(true)
    }
}

/// Gives pages, ascending, back to the host, adjacent ones at once; returns how many.
fn give_back(ram: &GuestRam, pages: &[u64]) -> u64 {
    let mut given = 0;
    for (first, count) in runs(pages) {
        match ram.give_back(first, Bytes(count * PAGE_SIZE)) {
            Ok(()) => given += count,
            // The host keeps them, and the guest has no less than it had.
            Err(error) => tracing::warn!(pages = count, %error, "the host does not take memory back"),
        }
    }
    given
}

/// Adjacent ones of ascending pages: the first, and how many.
fn runs(pages: &[u64]) -> impl Iterator<Item = (u64, u64)> {
    let adjacent = pages.chunk_by(|one, next| one + PAGE_SIZE == *next);
    adjacent.filter_map(|run| run.first().map(|first| (*first, run.len() as u64)))
}

/// Takes one list of pages out; they are the guest's already.
fn deflate(queue: &mut DeviceQueue, memory: &GuestMemory) -> Result<bool, QueueError> {
    let Some(chain) = queue.pop(memory)? else { return Ok(false) };
    queue.complete(&chain, 0)?;
    queue.notify(memory)?;
    Ok(true)
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn live_config(&self) -> Option<Arc<dyn LiveConfig>> {
        Some(Arc::clone(&self.shared) as Arc<dyn LiveConfig>)
    }

    fn take_config_change(&mut self) -> bool {
        let mut untold = false;
        self.shared.balance.send_if_modified(|balance| {
            untold = std::mem::take(&mut balance.untold);
            false
        });
        untold
    }

    fn process(&mut self, queues: &mut [DeviceQueue], memory: &GuestMemory) -> Result<Progress, QueueError> {
        let [inflateq, deflateq] = queues else { return Ok(Progress::Idle) };
        self.shared.balance.send_if_modified(|balance| !std::mem::replace(&mut balance.at_work, true));
        let inflated = self.inflate(inflateq, memory)?;
        let deflated = deflate(deflateq, memory)?;
        Ok(if inflated || deflated { Progress::More } else { Progress::Idle })
    }

    fn reset(&mut self) {
        // A driver that begins anew has all of its pages, and reads the target as it begins.
        self.shared.balance.send_modify(|balance| (balance.actual, balance.at_work) = (0, false));
    }

    fn save(&self) -> DeviceState {
        let Balance { target, actual, generation, untold, .. } = *self.shared.balance.borrow();
        DeviceState::Balloon { target, actual, generation, untold }
    }

    fn restore(&mut self, state: &DeviceState, active: bool) -> bool {
        let DeviceState::Balloon { target, actual, generation, untold } = *state else { return false };
        let balance = Balance { target, actual, generation, untold, at_work: active, given_back: 0 };
        self.shared.balance.send_replace(balance);
        true
    }
}

impl LiveConfig for Shared {
    /// `struct virtio_balloon_config`: num_pages, actual, then what we do not offer (section 5.5.4).
    fn read(&self, offset: u64, data: &mut [u8]) {
        let Balance { target, actual, .. } = *self.balance.borrow();
        let mut config = [0; 8];
        config[..4].copy_from_slice(&target.to_le_bytes());
        config[4..].copy_from_slice(&actual.to_le_bytes());
        read_padded(&config, offset, data);
    }

    /// The driver sets `actual` (section 5.5.6), whole; everything else is the device's.
    fn write(&self, offset: u64, data: &[u8]) {
        if let (ACTUAL, Ok(actual)) = (offset, <[u8; 4]>::try_from(data)) {
            self.balance.send_modify(|balance| balance.actual = u32::from_le_bytes(actual));
        }
    }

    fn generation(&self) -> u32 {
        self.balance.borrow().generation
    }
}

impl BalloonControl {
    /// Asks the guest to have `pages` of 4096 bytes in the balloon, now or as soon as it has a driver. Never waits.
    pub(in crate::vmm) fn set_target(&self, pages: u32) {
        let changed = self.shared.balance.send_if_modified(|balance| {
            let changes = balance.target != pages;
            if changes {
                balance.target = pages;
                balance.generation = balance.generation.wrapping_add(1);
                balance.untold = true;
            }
            changes
        });
        if changed {
            // The device's thread raises the interrupt, so that none comes while the device is held.
            self.doorbell.ring();
        }
    }

    /// What both sides know now, and from now on.
    pub(in crate::vmm) fn balance(&self) -> watch::Receiver<Balance> {
        self.shared.balance.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adjacent_pages_are_one_run() {
        let found: Vec<_> = runs(&[2, 3, 4, 9, 11, 12].map(|page| page * PAGE_SIZE)).collect();
        assert_eq!(found, [(2 * PAGE_SIZE, 3), (9 * PAGE_SIZE, 1), (11 * PAGE_SIZE, 2)]);
        assert_eq!(runs(&[]).count(), 0);
    }
}
