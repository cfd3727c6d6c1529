//! What the vCPUs of a machine owe each other about memory: nobody writes decoded code unnoticed, and no write is missing
//! from the log.
//!
//! A vCPU writes unnoticed through its TLB, to pages that it has a *grant* for. So a vCPU that wants to decode a page asks
//! the others to give up their grants for it, and until they have it executes from the page one instruction at a time,
//! which is right whoever writes there.
//!
//! ```text
//!   decoder   watches the page, asks ........ one at a time from its bytes ........ decodes
//!   other                            \-- between two slices: no grant any more --/  writes by the slow path: notes it
//! ```
//!
//! No vCPU waits for another, so a wedged one stops nobody. One that is not awake (halted, paused, not started) need not
//! answer: it does before its next instruction. Both rules are pairs of a write and a look at what the other side writes,
//! in opposite order, with a sequentially consistent fence between (Dekker's pattern): a grant is announced before the
//! watchers are looked at, and a page is watched before the grants are; an ask is left before it is looked who is awake, and
//! a vCPU says that it is awake before it looks for asks.
//!
//! The log of written pages is made of the same grants. A page that was written by the slow path is in it, and one for
//! which there is a grant counts as written, until the vCPU has given the grant up.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicU8;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::sync::atomic::fence;
use std::thread;

use super::apic::Bus;
use super::tlb::Tlb;
use crate::mem::AtomicPageSet;
use crate::mem::CodeWatch;
use crate::mem::GuestRam;
use crate::mem::MAX_WATCHERS;
use crate::mem::PageSet;
use crate::units::PAGE_SIZE;

/// Most vCPUs of a machine.
pub(super) const MAX_VCPUS: u8 = MAX_WATCHERS as u8;

/// No ask.
const NONE: u64 = u64::MAX;
/// An ask for the grants of all pages.
const ALL: u64 = u64::MAX - 1;

/// After so many PAUSE instructions a vCPU's thread lets another have its host processor: some microseconds of spinning,
/// as long as a lock is held as a rule.
const PATIENCE: u32 = 256;

/// What one vCPU shows to the others.
#[derive(Debug)]
struct Peer {
    /// In guest code, or about to be.
    awake: AtomicBool,
    /// The pages that it may have grants for, as far as grants are counted.
    granted: AtomicPageSet,
    /// By who asks: the page, by its RAM offset, that it shall give its grants up for.
    asks: [AtomicU64; MAX_WATCHERS],
    /// Whether all grants shall go, for the log: one of the following.
    revoke: AtomicU8,
}

/// They may stay.
const KEEP: u8 = 0;
/// They shall go.
const REVOKE: u8 = 1;
/// They shall go, and all that there were when this was set are in a log already.
const LOGGED: u8 = 2;

/// The vCPUs of a machine.
#[derive(Debug)]
pub(super) struct Peers {
    ram: Arc<GuestRam>,
    bus: Bus,
    vcpus: Box<[Peer]>,
    /// Whether there is a log, and what the vCPUs have written by the slow path or have given their grants up for.
    logging: AtomicBool,
    written: AtomicPageSet,
}

impl Peers {
    /// For the vCPUs of `bus`, none of them awake.
    pub(super) fn new(ram: Arc<GuestRam>, bus: Bus) -> Self {
        let none = || AtomicPageSet::none(ram.size().0);
        let peer = |_| Peer {
            awake: AtomicBool::new(false),
            granted: none(),
            asks: [const { AtomicU64::new(NONE) }; MAX_WATCHERS],
            revoke: AtomicU8::new(KEEP),
        };
        let vcpus = (0..bus.len()).map(peer).collect();
        Self { vcpus, logging: AtomicBool::new(false), written: none(), bus, ram }
    }

    /// How many vCPUs there are.
    pub(super) fn count(&self) -> usize {
        self.vcpus.len()
    }

    /// Begins a log, while no vCPU is awake.
    pub(super) fn start_log(&self) {
        self.written.drain(|_| ());
        // Those that exist were perhaps not counted.
        self.vcpus.iter().for_each(|peer| peer.revoke.store(LOGGED, Ordering::SeqCst));
        self.logging.store(true, Ordering::SeqCst);
    }

    /// Ends the log, while no vCPU is awake.
    pub(super) fn stop_log(&self) {
        self.logging.store(false, Ordering::SeqCst);
    }

    /// The pages written since the log was begun or last taken; `None` without a log.
    pub(super) fn take_log(&self) -> Option<PageSet> {
        if !self.logging.load(Ordering::SeqCst) {
            return None;
        }
        let mut pages = PageSet::none(self.ram.size().0);
        for (id, peer) in self.vcpus.iter().enumerate() {
            // Before the slow writes are looked at: a grant that is given up after this goes into the next log.
            let before = peer.revoke.swap(REVOKE, Ordering::SeqCst);
            fence(Ordering::SeqCst);
            let awake = peer.awake.load(Ordering::SeqCst);
            // One that has slept since then has written nothing since.
            if awake || before != LOGGED {
                pages.unite(&peer.granted.snapshot());
            }
            // Unless it has answered meanwhile.
            let _ = peer.revoke.compare_exchange(REVOKE, LOGGED, Ordering::SeqCst, Ordering::SeqCst);
            if awake {
                self.nudge(id);
            }
        }
        self.written.drain(|page| pages.insert(page));
        Some(pages)
    }

    fn nudge(&self, id: usize) {
        if let Some(mailbox) = self.bus.mailbox(id as u32) {
            mailbox.nudge();
        }
    }
}

/// A vCPU's own side.
#[derive(Debug)]
pub(super) struct Sharing {
    peers: Arc<Peers>,
    id: usize,
    watch: Arc<CodeWatch>,
    /// Whether grants are counted: others decode too, or there is a log.
    counted: bool,
    /// The page that it watches and has asked the others about.
    asked: Option<u64>,
    /// PAUSE instructions executed.
    pauses: u32,
}

impl Sharing {
    /// That of vCPU number `id`; `None` for one that the machine does not have.
    pub(super) fn new(peers: Arc<Peers>, id: usize) -> Option<Self> {
        let watch = peers.ram.code_pages().watch_of(id)?;
        let counted = peers.vcpus.len() > 1;
        (id < peers.vcpus.len()).then_some(Self { peers, id, watch, counted, asked: None, pauses: 0 })
    }

    fn own(&self) -> &Peer {
        &self.peers.vcpus[self.id]
    }

    fn others(&self) -> impl Iterator<Item = (usize, &Peer)> {
        self.peers.vcpus.iter().enumerate().filter(|(id, _)| *id != self.id)
    }

    /// How many vCPUs the machine has.
    pub(super) fn vcpus(&self) -> usize {
        self.peers.count()
    }

    /// To be called before the first instruction of a run, and after each sleep.
    pub(super) fn wake(&mut self, tlb: &mut Tlb) {
        let own = self.own();
        own.awake.store(true, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        let logging = self.peers.logging.load(Ordering::SeqCst);
        // In its sleep it has written nothing that is not in that log.
        if own.revoke.compare_exchange(LOGGED, KEEP, Ordering::SeqCst, Ordering::SeqCst).is_ok() {
            tlb.revoke_writes();
            own.granted.drain(|_| ());
        }
        self.answer(tlb);
        self.counted = self.peers.vcpus.len() > 1 || logging;
    }

    /// To be called before a sleep and at the end of a run.
    pub(super) fn rest(&self, tlb: &mut Tlb) {
        self.answer(tlb);
        self.own().awake.store(false, Ordering::SeqCst);
    }

    /// Gives up the grants that others want to be gone. To be called between two instructions, and often.
    pub(super) fn answer(&self, tlb: &mut Tlb) {
        let own = self.own();
        if own.revoke.load(Ordering::SeqCst) != KEEP && own.revoke.swap(KEEP, Ordering::SeqCst) != KEEP {
            self.give_up_all(tlb);
        }
        for (asker, _) in self.others() {
            let ask = &own.asks[asker];
            // A new ask may come while the one before it is answered.
            loop {
                let page = ask.load(Ordering::SeqCst);
                match page {
                    NONE => break,
                    ALL => self.give_up_all(tlb),
                    page => {
                        tlb.guard_writes(page);
                        self.given_up(page);
                        own.granted.remove(page);
                    }
                }
                if ask.compare_exchange(page, NONE, Ordering::SeqCst, Ordering::SeqCst).is_ok() {
                    break;
                }
            }
        }
    }

    fn give_up_all(&self, tlb: &mut Tlb) {
        tlb.revoke_writes();
        let granted = &self.own().granted;
        granted.snapshot().iter().for_each(|page| self.given_up(page));
        granted.drain(|_| ());
    }

    /// The page may have been written through a grant; called before it stops to count as granted.
    fn given_up(&self, page: u64) {
        if self.peers.logging.load(Ordering::Relaxed) && self.own().granted.contains(page) {
            self.peers.written.insert(page);
        }
    }

    /// Whether writes to the page of a RAM offset may go unnoticed from now on.
    #[inline]
    pub(super) fn may_grant(&self, offset: u64) -> bool {
        if self.watch.watches(offset) {
            return false;
        }
        if !self.counted {
            return true;
        }
        self.own().granted.insert(offset);
        !self.peers.ram.code_pages().others_care(self.id, offset)
    }

    /// Whether a grant is for pages only that are about to be written.
    #[inline]
    pub(super) fn counts_grants(&self) -> bool {
        self.counted
    }

    /// Tells that RAM was written without a grant, or with one for all that is known.
    #[inline]
    pub(super) fn wrote(&self, offset: u64, len: u64) {
        if self.counted {
            self.tell(offset, len);
        }
    }

    #[cold]
    fn tell(&self, offset: u64, len: u64) {
        if self.vcpus() > 1 {
            self.peers.ram.code_pages().note_write_by(self.id, offset, len);
        }
        if self.peers.logging.load(Ordering::Relaxed) {
            let first = offset & !(PAGE_SIZE - 1);
            (first..offset + len).step_by(PAGE_SIZE as usize).for_each(|page| self.peers.written.insert(page));
        }
    }

    /// Makes sure that all writes to the page of a RAM offset are noticed from now on, so that what is decoded from it can
    /// be kept; false while another vCPU has not answered, and then it is to be called again.
    pub(super) fn guard(&mut self, tlb: &mut Tlb, offset: u64) -> bool {
        let page = offset & !(PAGE_SIZE - 1);
        if self.asked.is_some() && !self.is_answered() {
            return self.watch.watches(page) && self.asked != Some(page);
        }
        self.asked = None;
        if self.watch.watches(page) {
            return true;
        }
        tlb.guard_writes(page);
        self.watch.watch(page);
        let mut asked = false;
        for (id, peer) in self.others().filter(|(_, peer)| peer.granted.contains(page)) {
            // What was asked before and found it asleep is not answered yet.
            let more = |before| Some(if before == NONE || before == page { page } else { ALL });
            let _ = peer.asks[self.id].fetch_update(Ordering::SeqCst, Ordering::SeqCst, more);
            if peer.awake.load(Ordering::SeqCst) {
                self.peers.nudge(id);
                asked = true;
            }
        }
        self.asked = asked.then_some(page);
        !asked
    }

    fn is_answered(&self) -> bool {
        self.others()
            .all(|(_, peer)| peer.asks[self.id].load(Ordering::SeqCst) == NONE || !peer.awake.load(Ordering::SeqCst))
    }

    /// Nothing that was decoded from the page of a RAM offset is kept any more.
    pub(super) fn unguard(&mut self, offset: u64) {
        self.watch.unwatch(offset);
        if self.asked == Some(offset & !(PAGE_SIZE - 1)) {
            self.asked = None;
        }
    }

    /// Nothing decoded is kept any more.
    pub(super) fn unguard_all(&mut self) {
        self.watch.unwatch_all();
        self.asked = None;
    }

    /// The guest spins: lets other threads run now and then, one of which may be what it waits for.
    pub(super) fn pause(&mut self) {
        self.pauses = self.pauses.wrapping_add(1);
        if self.vcpus() > 1 && self.pauses.is_multiple_of(PATIENCE) {
            thread::yield_now();
        }
    }

    /// What was stored is seen by others before what comes next is done: a serialising instruction.
    pub(super) fn serialise(&self) {
        if self.vcpus() > 1 {
            fence(Ordering::SeqCst);
        }
    }

    /// Whether others have written to pages that are guarded.
    #[inline(always)]
    pub(super) fn any_written(&self) -> bool {
        self.watch.any_written()
    }

    /// The pages that others have written while they were guarded.
    pub(super) fn take_written(&self) -> Vec<u64> {
        let mut pages = Vec::new();
        self.watch.take_written(|page| pages.push(page));
        pages
    }
}

#[cfg(test)]
mod tests {
    use super::super::tlb::Grant;
    use super::*;
    use crate::units::Bytes;

    const PAGE: u64 = 3 * PAGE_SIZE;

    struct Vcpu {
        sharing: Sharing,
        tlb: Tlb,
    }

    impl Vcpu {
        fn wake(&mut self) {
            self.sharing.wake(&mut self.tlb);
        }

        fn rest(&mut self) {
            self.sharing.rest(&mut self.tlb);
        }

        fn answer(&mut self) {
            self.sharing.answer(&mut self.tlb);
        }

        fn guard(&mut self, page: u64) -> bool {
            self.sharing.guard(&mut self.tlb, page)
        }

        /// Writes as the MMU does, by its grant or with a new one or without; whether it has one now.
        fn write(&mut self, page: u64) -> bool {
            if self.tlb.write(page, 8).is_none() {
                let write = self.sharing.may_grant(page);
                self.tlb.fill(page, page, Grant { read: true, write, fetch: false, global: false });
                self.sharing.wrote(page, 8);
            }
            self.tlb.write(page, 8).is_some()
        }
    }

    /// A machine whose vCPUs are all awake.
    fn vcpus<const N: usize>() -> (Arc<Peers>, [Vcpu; N]) {
        let ram = Arc::new(GuestRam::new(Bytes(16 * PAGE_SIZE)).unwrap());
        let peers = Arc::new(Peers::new(ram, Bus::new(N as u8)));
        let vcpu = |id| Vcpu { sharing: Sharing::new(Arc::clone(&peers), id).unwrap(), tlb: Tlb::new() };
        let mut vcpus = std::array::from_fn(vcpu);
        vcpus.iter_mut().for_each(Vcpu::wake);
        (peers, vcpus)
    }

    fn log(peers: &Peers) -> Vec<u64> {
        peers.take_log().unwrap().iter().collect()
    }

    #[test]
    fn a_page_is_decoded_once_those_who_write_it_have_answered() {
        let (_, [mut decoder, mut writer, mut other]) = vcpus();
        assert!(decoder.guard(PAGE + PAGE_SIZE), "nobody writes there");
        assert!(writer.write(PAGE));
        assert!(!decoder.guard(PAGE) && !decoder.guard(PAGE + 5));
        assert!(decoder.guard(PAGE + PAGE_SIZE) && !decoder.guard(PAGE + 2 * PAGE_SIZE), "one at a time");
        other.answer();
        assert!(!decoder.guard(PAGE), "the other had nothing to give up");
        writer.answer();
        assert!(decoder.guard(PAGE) && decoder.guard(PAGE + 2 * PAGE_SIZE));
        assert!(writer.tlb.write(PAGE, 8).is_none());
        // It writes again: the decoder is told, and the page is no code until it has been decoded anew.
        assert!(!writer.write(PAGE) && decoder.sharing.any_written());
        assert!(writer.write(PAGE), "to be told once is enough");
        assert_eq!(decoder.sharing.take_written(), [PAGE]);
        decoder.sharing.unguard(PAGE);
        assert!(!decoder.guard(PAGE));
    }

    #[test]
    fn who_sleeps_answers_when_it_wakes() {
        let (_, [mut decoder, mut writer]) = vcpus();
        assert!(writer.write(PAGE) && writer.write(PAGE + PAGE_SIZE) && writer.write(0));
        writer.rest();
        assert!(decoder.guard(PAGE) && decoder.guard(PAGE + PAGE_SIZE));
        assert!(writer.tlb.write(PAGE, 8).is_some());
        writer.wake();
        assert!([PAGE, PAGE + PAGE_SIZE].into_iter().all(|page| writer.tlb.write(page, 8).is_none()));
        assert!(!writer.write(PAGE));
        // Or before it goes to sleep.
        assert!(writer.write(5 * PAGE_SIZE) && !decoder.guard(5 * PAGE_SIZE));
        writer.rest();
        assert!(decoder.guard(5 * PAGE_SIZE));
    }

    #[test]
    fn what_was_asked_for_and_is_no_code_after_all_is_not_waited_for() {
        let (_, [mut decoder, mut writer]) = vcpus();
        assert!(writer.write(PAGE) && !decoder.guard(PAGE));
        decoder.sharing.unguard(PAGE);
        assert!(writer.write(PAGE + PAGE_SIZE) && !decoder.guard(PAGE + PAGE_SIZE));
        writer.answer();
        assert!(decoder.guard(PAGE + PAGE_SIZE));
        assert!(writer.tlb.write(PAGE + PAGE_SIZE, 8).is_none());
    }

    #[test]
    fn own_code_is_guarded_without_asking() {
        let (_, [mut alone]) = vcpus();
        assert!(alone.write(PAGE) && alone.guard(PAGE));
        assert!(alone.tlb.write(PAGE, 8).is_none() && !alone.write(PAGE));
        alone.sharing.unguard_all();
        assert!(alone.write(PAGE));
    }

    #[test]
    fn a_grant_is_in_each_log_until_it_is_given_up() {
        let (peers, [mut one, mut other]) = vcpus();
        assert!(peers.take_log().is_none());
        assert!(one.write(0));
        one.rest();
        other.rest();
        peers.start_log();
        one.wake();
        other.wake();
        assert!(one.tlb.write(0, 8).is_none(), "not counted before the log");
        assert_eq!(log(&peers), [0; 0]);
        assert!(one.write(PAGE) && other.write(0));
        assert_eq!(log(&peers), [0, PAGE]);
        assert_eq!(log(&peers), [0, PAGE], "it may have been written since");
        one.answer();
        other.answer();
        assert_eq!(log(&peers), [0, PAGE], "until then");
        assert_eq!(log(&peers), [0; 0]);
        // Asleep, it writes nothing.
        assert!(one.write(PAGE));
        one.rest();
        assert_eq!(log(&peers), [PAGE]);
        assert_eq!(log(&peers), [0; 0]);
        one.wake();
        assert_eq!(log(&peers), [0; 0]);
        // To give up a grant for another's code is no end of what was written through it.
        assert!(one.write(PAGE) && !other.guard(PAGE));
        one.answer();
        assert_eq!(log(&peers), [PAGE]);
        assert!(!one.write(PAGE) && other.sharing.any_written());
        assert_eq!(log(&peers), [PAGE]);
        one.rest();
        other.rest();
        peers.stop_log();
        assert!(peers.take_log().is_none());
    }
}
