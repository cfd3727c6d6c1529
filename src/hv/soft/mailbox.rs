//! The only part of a vCPU that other threads touch: posted interrupts, signals, kicks, and its sleep.
//!
//! A sender sets its bits (Release) and then raises `attention`; the vCPU looks at `attention` between
//! slices with one relaxed load ([`Mailbox::any`]), clears it first and collects the bits after. As both
//! sides change `attention` with a read-modify-write, either the vCPU's clearing comes later and it
//! sees the bits, or the sender's raising comes later and `attention` is up again: nothing is lost.
//!
//! Sleep is a mutex and a condition variable. Whoever turns `attention` from down to up takes the
//! mutex before it notifies, and the vCPU checks `attention` under the mutex before it waits, so a
//! wake-up cannot fall between the check and the wait.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crate::hv::Kick;

const SIGNAL_NMI: u32 = 1 << 8;
const SIGNAL_INIT: u32 = 1 << 9;
const SIGNAL_SIPI: u32 = 1 << 10;

/// What a vCPU was sent besides interrupt vectors. With an INIT, the others came after it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Signals {
    /// A non-maskable interrupt.
    pub(crate) nmi: bool,
    /// A reset to the wait-for-SIPI state.
    pub(crate) init: bool,
    /// A start-up message with its vector; only the last one sent is kept.
    pub(crate) sipi: Option<u8>,
}

/// Interrupt vectors collected from a mailbox: one bit each, as in the IRR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Mail {
    /// Requested vectors.
    pub(crate) vectors: [u32; 8],
    /// Which of them are level-triggered.
    pub(crate) level: [u32; 8],
    /// Everything else.
    pub(crate) signals: Signals,
}

/// A vCPU's mailbox.
#[derive(Debug, Default)]
pub(crate) struct Mailbox {
    attention: AtomicBool,
    kick: AtomicBool,
    vectors: [AtomicU32; 8],
    level: [AtomicU32; 8],
    /// `SIGNAL_*`, with the SIPI vector in bits 0 to 7.
    signals: AtomicU32,
    /// Under which logical addresses the local APIC answers; opaque here.
    address: AtomicU64,
    sleep: Mutex<()>,
    wake: Condvar,
}

impl Mailbox {
    /// An empty mailbox.
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// Requests an interrupt; `level` says that its source is level-triggered.
    pub(crate) fn post(&self, vector: u8, level: bool) {
        let (word, bit) = (usize::from(vector / 32), 1 << (vector % 32));
        if level {
            self.level[word].fetch_or(bit, Ordering::Release);
        }
        self.vectors[word].fetch_or(bit, Ordering::Release);
        self.raise_attention();
    }

    /// Sends a non-maskable interrupt.
    pub(crate) fn post_nmi(&self) {
        self.signals.fetch_or(SIGNAL_NMI, Ordering::Release);
        self.raise_attention();
    }

    /// Sends INIT, which also cancels an NMI and a start-up message that have not been looked at: they came before it.
    pub(crate) fn post_init(&self) {
        self.signals.swap(SIGNAL_INIT, Ordering::AcqRel);
        self.raise_attention();
    }

    /// Sends a start-up message: begin at page `vector`.
    pub(crate) fn post_sipi(&self, vector: u8) {
        let set = |old: u32| Some((old & !0xff) | SIGNAL_SIPI | u32::from(vector));
        let _ = self.signals.fetch_update(Ordering::Release, Ordering::Relaxed, set);
        self.raise_attention();
    }

    /// Has the vCPU look up soon, also from its sleep, for what is not in the mailbox.
    pub(super) fn nudge(&self) {
        self.raise_attention();
    }

    /// Whether anything may have arrived: interrupts, signals or a kick. For the hot path.
    #[inline(always)]
    pub(crate) fn any(&self) -> bool {
        self.attention.load(Ordering::Relaxed)
    }

    /// Collects what has arrived. A kick stays, and keeps [`any`](Self::any) true, until it is taken.
    pub(crate) fn collect(&self) -> Mail {
        self.attention.swap(false, Ordering::AcqRel);
        let mut mail = Mail::default();
        for word in 0..8 {
            // Vectors first: a level bit is set before its vector, so none can be missing here.
            mail.vectors[word] = self.vectors[word].swap(0, Ordering::Acquire);
            mail.level[word] = self.level[word].fetch_and(!mail.vectors[word], Ordering::Acquire) & mail.vectors[word];
        }
        let signals = self.signals.swap(0, Ordering::Acquire);
        mail.signals = Signals {
            nmi: signals & SIGNAL_NMI != 0,
            init: signals & SIGNAL_INIT != 0,
            sipi: (signals & SIGNAL_SIPI != 0).then_some(signals as u8),
        };
        if self.kick.load(Ordering::Acquire) {
            // Not a store: that would hide a sender's release behind ours.
            self.attention.swap(true, Ordering::AcqRel);
        }
        mail
    }

    /// Whether a kick had arrived; forgets it.
    pub(crate) fn take_kick(&self) -> bool {
        self.kick.swap(false, Ordering::AcqRel)
    }

    /// Blocks the vCPU's thread until something arrives or `deadline` passes; without a deadline,
    /// until something arrives.
    pub(crate) fn park_until(&self, deadline: Option<Instant>) {
        let mut sleep = self.lock();
        while !self.attention.load(Ordering::Acquire) {
            let Some(deadline) = deadline else {
                sleep = self.wake.wait(sleep).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            sleep = self.wake.wait_timeout(sleep, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Publishes under which addresses the local APIC answers, for senders on other threads.
    pub(super) fn set_address(&self, address: u64) {
        self.address.store(address, Ordering::Release);
    }

    /// What [`set_address`](Self::set_address) published; zero before.
    pub(super) fn address(&self) -> u64 {
        self.address.load(Ordering::Acquire)
    }

    fn raise_attention(&self) {
        if !self.attention.swap(true, Ordering::AcqRel) {
            drop(self.lock());
            self.wake.notify_one();
        }
    }

    fn lock(&self) -> MutexGuard<'_, ()> {
        // The mutex guards no data that a panic could leave half changed.
        self.sleep.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kick for Mailbox {
    fn kick(&self) {
        self.kick.store(true, Ordering::Release);
        self.raise_attention();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::thread;
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_posted_vector_is_collected_once_with_its_trigger_mode() {
        let mailbox = Mailbox::new();
        assert!(!mailbox.any());
        mailbox.post(0x31, false);
        mailbox.post(0xff, true);
        assert!(mailbox.any());
        let mail = mailbox.collect();
        assert_eq!(mail.vectors, [0, 1 << 17, 0, 0, 0, 0, 0, 1 << 31]);
        assert_eq!(mail.level, [0, 0, 0, 0, 0, 0, 0, 1 << 31]);
        assert!(!mailbox.any());
        assert_eq!(mailbox.collect(), Mail::default());
    }

    #[test]
    fn sdm_11_4_7_init_cancels_what_came_before_it() {
        let mailbox = Mailbox::new();
        mailbox.post_nmi();
        mailbox.post_sipi(0x12);
        mailbox.post_init();
        assert_eq!(mailbox.collect().signals, Signals { nmi: false, init: true, sipi: None });
        mailbox.post_init();
        mailbox.post_nmi();
        assert_eq!(mailbox.collect().signals, Signals { nmi: true, init: true, sipi: None });
        mailbox.post_init();
        mailbox.post_sipi(0x12);
        mailbox.post_sipi(0x9a);
        assert_eq!(mailbox.collect().signals, Signals { nmi: false, init: true, sipi: Some(0x9a) });
    }

    #[test]
    fn a_kick_survives_collecting_and_is_taken_once() {
        let mailbox = Mailbox::new();
        mailbox.kick();
        mailbox.collect();
        assert!(mailbox.any(), "the kick is still to be served");
        assert!(mailbox.take_kick());
        assert!(!mailbox.take_kick());
        mailbox.collect();
        assert!(!mailbox.any());
    }

    #[test]
    fn parking_ends_at_the_deadline_and_at_once_when_something_is_there() {
        let mailbox = Mailbox::new();
        let deadline = Instant::now() + Duration::from_millis(2);
        mailbox.park_until(Some(deadline));
        assert!(Instant::now() >= deadline);
        mailbox.kick();
        mailbox.park_until(None);
    }

    #[test]
    fn no_wake_up_is_lost_between_threads() {
        // Ping-pong: each side sleeps without a deadline until the other posts, so that one lost
        // wake-up would hang the test.
        let (a, b) = (Arc::new(Mailbox::new()), Arc::new(Mailbox::new()));
        let rounds = 20_000u32;
        let other = {
            let (a, b) = (Arc::clone(&a), Arc::clone(&b));
            thread::spawn(move || {
                for round in 0..rounds {
                    await_vector(&b, (round % 224 + 32) as u8);
                    a.post((round % 224 + 32) as u8, round % 2 == 0);
                }
            })
        };
        for round in 0..rounds {
            b.post((round % 224 + 32) as u8, round % 2 == 0);
            let level = await_vector(&a, (round % 224 + 32) as u8);
            assert_eq!(level, round % 2 == 0);
        }
        other.join().unwrap();
    }

    fn await_vector(mailbox: &Mailbox, vector: u8) -> bool {
        let (word, bit) = (usize::from(vector / 32), 1 << (vector % 32));
        loop {
            let mail = mailbox.collect();
            if mail.vectors[word] & bit != 0 {
                return mail.level[word] & bit != 0;
            }
            mailbox.park_until(None);
        }
    }
}
