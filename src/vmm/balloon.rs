//! Memory that a guest has used and freed goes back to the host, so that a snapshot holds what is used.
//!
//! A freed page keeps its content, and the host cannot tell it from one in use. The guest tells by putting it into its
//! balloon; it gets the page back at once, and finds it empty.
//!
//! **How much.** The balloon can ask for all of memory, and a guest then drops what it has cached, file by file, before
//! it says no. So the caller says how much is free, which the guest's agent knows ([`MemFree`] of `/proc/meminfo`, that
//! its protocol reads as any file), and somewhat less is asked for: the guest must not come to the point at which it
//! begins to look for memory. Linux does not count what its processors keep for themselves, up to an eighth of memory
//! after much was freed; having it drop its caches first empties these too.
//!
//! [`MemFree`]: https://docs.kernel.org/filesystems/proc.html#meminfo

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;
use tokio::time::timeout;

use super::Machine;
use super::devices::virtio::balloon::Balance;
use super::devices::virtio::balloon::BalloonControl;
use crate::units::{Bytes, PAGE_SIZE};

/// Left to the guest of what is free: what Linux keeps in reserve grows with memory, but slower than this.
const MARGIN: Bytes = Bytes::mib(4);
/// One part in so many of all memory is left beside that.
const MARGIN_PART: u64 = 128;
/// A guest that has put nothing into the balloon for so long has nothing more to put there. Linux pauses for 200 ms
/// when it finds no page.
const STALL: Duration = Duration::from_secs(1);

/// Why memory was not given back, or not all of it returned to the guest.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GiveBackError {
    /// The machine is paused: its guest does nothing.
    #[error("the machine is paused")]
    Paused,
    /// The machine has ended.
    #[error("the machine has ended")]
    Ended,
    /// The guest has no driver for the balloon at work: it has not booted so far, or its kernel has none.
    #[error("the guest has no driver for the balloon")]
    NoDriver,
    /// The guest has not taken its memory back; it goes on to do so.
    #[error("after {after:?} {} bytes are still in the balloon", left.0)]
    TimedOut {
        /// How long it was waited for.
        after: Duration,
        /// What the guest says is in the balloon.
        left: Bytes,
    },
}

impl Machine {
    /// Has the guest give memory back that is free, which then takes no room in the host nor in a snapshot; to be
    /// called before [`pause`](Self::pause). `free` is what the guest has free. Returns how much was given back, which
    /// is somewhat less, and may be nothing; all of it is the guest's again.
    ///
    /// Memory of a machine that was restored reads as its snapshot's when it is given back, so that a difference to
    /// that snapshot becomes smaller, and a whole new one does not.
    ///
    /// Half of `deadline` is for the guest to give, and it may give less in it; the rest is for it to take its memory
    /// back.
    ///
    /// # Errors
    /// [`GiveBackError`]. After [`GiveBackError::TimedOut`] memory was given back all the same, and the guest is only late.
    ///
    /// # Cancel safety
    /// Cancelled, the guest is told to take its memory back, and nobody waits until it has.
    ///
    /// # Examples
    /// ```no_run
    /// # async fn f(mut machine: kiln::vmm::Machine, free: kiln::units::Bytes) -> Result<(), Box<dyn std::error::Error>> {
    /// let given = machine.give_memory_back(free, std::time::Duration::from_secs(10)).await?;
    /// println!("{} bytes less", given.0);
    /// machine.pause().await?;
    /// # Ok(()) }
    /// ```
    // Exclusive, as pausing is: two callers would each tell the guest to stop what the other has begun.
    pub async fn give_memory_back(&mut self, free: Bytes, deadline: Duration) -> Result<Bytes, GiveBackError> {
        if self.paused {
            return Err(GiveBackError::Paused);
        }
        let size = self.ram.size();
        let wanted = free.0.min(size.0).saturating_sub(MARGIN.0 + size.0 / MARGIN_PART);
        tokio::select! {
            biased;
            _ = self.ended() => Err(GiveBackError::Ended),
            given = exchange(&self.balloon, wanted / PAGE_SIZE, deadline) => Ok(Bytes(given?.0.min(size.0))),
        }
    }
}

/// Fills the balloon with `pages` or what the guest has, and empties it. Returns what was given back.
async fn exchange(control: &BalloonControl, pages: u64, deadline: Duration) -> Result<Bytes, GiveBackError> {
    let started = Instant::now();
    let mut balance = control.balance();
    let before = balance.borrow().given_back;
    let pages = u32::try_from(pages).unwrap_or(u32::MAX);
    let asked = Asked::new(control, pages);
    fill(&mut balance, pages, started, deadline / 2).await?;
    drop(asked);
    let left = deadline.saturating_sub(started.elapsed());
    let emptied = timeout(left, reach(&mut balance, |balance| balance.actual == 0)).await;
    let now = *balance.borrow();
    match emptied {
        Ok(reached) => reached.map(|()| Bytes((now.given_back - before).saturating_mul(PAGE_SIZE))),
        Err(_) => Err(GiveBackError::TimedOut { after: deadline, left: Bytes(u64::from(now.actual) * PAGE_SIZE) }),
    }
}

/// Waits until `pages` are in the balloon, or no more come.
async fn fill(
    balance: &mut watch::Receiver<Balance>,
    pages: u32,
    started: Instant,
    within: Duration,
) -> Result<(), GiveBackError> {
    loop {
        let actual = balance.borrow().actual;
        let left = within.saturating_sub(started.elapsed()).min(STALL);
        if actual >= pages || left.is_zero() {
            return Ok(());
        }
        match timeout(left, reach(balance, |balance| balance.actual > actual)).await {
            Ok(grown) => grown?,
            Err(_) => return Ok(()),
        }
    }
}

/// Waits for what only a driver brings about.
async fn reach(
    balance: &mut watch::Receiver<Balance>,
    reached: impl Fn(&Balance) -> bool,
) -> Result<(), GiveBackError> {
    let seen = balance.wait_for(|balance| reached(balance) || !balance.at_work).await;
    // The sender lives in the control, so waiting cannot fail.
    if seen.is_ok_and(|balance| balance.at_work) { Ok(()) } else { Err(GiveBackError::NoDriver) }
}

/// A target that is taken back when this is dropped.
struct Asked<'a>(&'a BalloonControl);

impl<'a> Asked<'a> {
    fn new(control: &'a BalloonControl, pages: u32) -> Self {
        control.set_target(pages);
        Self(control)
    }
}

impl Drop for Asked<'_> {
    fn drop(&mut self) {
        self.0.set_target(0);
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::sync::Arc;

    use futures::poll;

    use super::*;
    use crate::mem::GuestRam;
    use crate::vmm::devices::virtio::balloon::Balloon;
    use crate::vmm::devices::virtio::{DeviceState, LiveConfig, VirtioDevice};

    const DEADLINE: Duration = Duration::from_secs(60);

    /// A balloon with a driver that has `actual` pages in it, as its registers show it.
    fn balloon(actual: u32, at_work: bool) -> (Balloon, BalloonControl, Arc<dyn LiveConfig>) {
        let (mut device, control, _) = Balloon::new(Arc::new(GuestRam::new(Bytes::mib(4)).unwrap()));
        let state = DeviceState::Balloon { target: 0, actual, generation: 0, untold: false };
        assert!(device.restore(&state, at_work));
        let config = device.live_config().expect("it changes");
        (device, control, config)
    }

    fn target(config: &Arc<dyn LiveConfig>) -> u32 {
        let mut target = [0; 4];
        config.read(0, &mut target);
        u32::from_le_bytes(target)
    }

    fn set_actual(config: &Arc<dyn LiveConfig>, actual: u32) {
        config.write(4, &actual.to_le_bytes());
    }

    #[tokio::test(start_paused = true)]
    async fn the_balloon_is_filled_and_emptied() {
        let (_device, control, config) = balloon(0, true);
        let mut given = pin!(exchange(&control, 300, DEADLINE));
        assert!(poll!(&mut given).is_pending());
        assert_eq!(target(&config), 300);
        set_actual(&config, 256);
        assert!(poll!(&mut given).is_pending());
        assert_eq!(target(&config), 300);
        set_actual(&config, 300);
        assert!(poll!(&mut given).is_pending(), "not before the guest has its pages back");
        assert_eq!(target(&config), 0);
        set_actual(&config, 44);
        assert!(poll!(&mut given).is_pending());
        set_actual(&config, 0);
        assert_eq!(given.await, Ok(Bytes(0)), "it named no page");
    }

    #[tokio::test(start_paused = true)]
    async fn a_guest_that_gives_less_is_not_waited_for() {
        let (_device, control, config) = balloon(0, true);
        let began = Instant::now();
        let mut given = pin!(exchange(&control, 300, DEADLINE));
        assert!(poll!(&mut given).is_pending());
        set_actual(&config, 10);
        let timer = tokio::time::sleep(2 * STALL);
        tokio::select! { () = timer => {}, _ = &mut given => panic!("the guest has its pages in the balloon") }
        assert_eq!(target(&config), 0);
        set_actual(&config, 0);
        assert_eq!(given.await, Ok(Bytes(0)));
        assert!(began.elapsed() < DEADLINE / 2);
    }

    #[tokio::test(start_paused = true)]
    async fn a_guest_that_keeps_its_pages_in_the_balloon_is_late() {
        let (_device, control, _config) = balloon(7, true);
        let began = Instant::now();
        let error = exchange(&control, 0, DEADLINE).await.expect_err("it never empties it");
        assert_eq!(error, GiveBackError::TimedOut { after: DEADLINE, left: Bytes(7 * PAGE_SIZE) });
        assert_eq!(error.to_string(), "after 60s 28672 bytes are still in the balloon");
        assert_eq!(began.elapsed().as_secs(), DEADLINE.as_secs());
    }

    #[tokio::test(start_paused = true)]
    async fn a_guest_that_goes_up_and_down_for_ever_is_left() {
        let (_device, control, config) = balloon(0, true);
        let began = Instant::now();
        let restless = async {
            for n in 1.. {
                set_actual(&config, n % 2 + 1);
                tokio::time::sleep(STALL / 2).await;
            }
        };
        tokio::select! {
            given = exchange(&control, 300, DEADLINE) => assert!(matches!(given, Err(GiveBackError::TimedOut { .. }))),
            () = restless => {}
        }
        assert!(began.elapsed() < DEADLINE + STALL);
    }

    #[tokio::test(start_paused = true)]
    async fn without_a_driver_nothing_is_waited_for() {
        let (_device, control, _config) = balloon(0, false);
        assert_eq!(exchange(&control, 300, DEADLINE).await, Err(GiveBackError::NoDriver));
        // One that goes away in the middle of it.
        let (mut device, control, config) = balloon(0, true);
        let mut given = pin!(exchange(&control, 300, DEADLINE));
        assert!(poll!(&mut given).is_pending());
        device.reset();
        assert_eq!(given.await, Err(GiveBackError::NoDriver));
        assert_eq!(target(&config), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn dropped_at_any_point_the_guest_is_told_to_take_its_pages_back() {
        let (_device, control, config) = balloon(0, true);
        {
            let mut given = pin!(exchange(&control, 300, DEADLINE));
            assert!(poll!(&mut given).is_pending());
            assert_eq!(target(&config), 300);
        }
        assert_eq!(target(&config), 0);
    }
}
