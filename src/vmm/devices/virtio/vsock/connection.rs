//! One stream's state: buffers, credit in both directions, and how far it is closed.
//!
//! Credit (section 5.10.6.3): each side says how large its receive buffer is and how much of it was
//! taken out so far; the other keeps `sent - taken` at most that large. We do, and a guest that does not
//! is reset.

use std::collections::VecDeque;
use std::task::Waker;
use std::time::Instant;

use super::packet::op;
use super::packet::shutdown;

/// Our receive buffer a connection, as announced to the guest: what Linux has by default.
pub(super) const BUF_ALLOC: u32 = 256 << 10;
/// Bytes a writer may have waiting for the guest's credit.
pub(super) const OUTGOING_MAX: usize = 64 << 10;
/// Tell the guest of room once this much is free that it does not know of.
const UPDATE_AFTER: u32 = BUF_ALLOC / 4;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// We ask, or have asked, for the connection.
    Requested { sent: bool },
    /// Bytes flow.
    Open,
    /// Over. No packet but a RST is owed.
    Closed(Closed),
}

/// Why a connection is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Closed {
    /// Nobody listens at the port.
    Refused,
    /// Both sides were done.
    Finished,
    /// The guest broke it off.
    Reset,
    /// There is no guest any more.
    Gone,
}

#[derive(Debug)]
pub(super) struct Connection {
    pub(super) phase: Phase,
    /// A stream handle exists; without one the connection goes as soon as the guest agrees.
    pub(super) held: bool,
    /// Is in the list of connections with something to send.
    pub(super) queued: bool,
    /// When to break off although the guest has not agreed to the end.
    pub(super) linger_until: Option<Instant>,
    pub(super) reader: Option<Waker>,
    pub(super) writer: Option<Waker>,

    pub(super) received: VecDeque<u8>,
    fwd_cnt: u32,
    fwd_announced: u32,

    pub(super) outgoing: VecDeque<u8>,
    sent: u32,
    peer_alloc: u32,
    peer_fwd: u32,

    /// SHUTDOWN flags: what we want to say, have said, and have heard.
    pub(super) shut: u32,
    shut_sent: u32,
    pub(super) peer_shut: u32,

    owes_reset: bool,
    owes_credit: bool,
    asked_credit: bool,
}

/// A packet to the guest, without what is the same for all of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Outgoing {
    pub(super) op: u16,
    pub(super) flags: u32,
    pub(super) fwd_cnt: u32,
}

impl Connection {
    pub(super) fn new() -> Self {
        Self {
            phase: Phase::Requested { sent: false },
            held: true,
            queued: false,
            linger_until: None,
            reader: None,
            writer: None,
            received: VecDeque::new(),
            fwd_cnt: 0,
            fwd_announced: 0,
            outgoing: VecDeque::new(),
            sent: 0,
            peer_alloc: 0,
            peer_fwd: 0,
            shut: 0,
            shut_sent: 0,
            peer_shut: 0,
            owes_reset: false,
            owes_credit: false,
            asked_credit: false,
        }
    }

    pub(super) fn is_closed(&self) -> bool {
        matches!(self.phase, Phase::Closed(_))
    }

    /// May be forgotten: neither side knows it any more.
    pub(super) fn is_over(&self) -> bool {
        self.is_closed() && !self.held && !self.owes_reset
    }

    /// Ends the connection. What was received can still be read.
    pub(super) fn close(&mut self, why: Closed) {
        if !self.is_closed() {
            self.phase = Phase::Closed(why);
            self.outgoing = VecDeque::new();
        }
        self.wake();
    }

    /// Ends it and tells the guest.
    pub(super) fn break_off(&mut self, why: Closed) {
        if !self.is_closed() {
            self.owes_reset = self.phase != Phase::Requested { sent: false };
        }
        self.close(why);
    }

    /// Ends it without a word, as when the guest is not there to hear it.
    pub(super) fn drop_silently(&mut self, why: Closed) {
        self.owes_reset = false;
        self.close(why);
    }

    pub(super) fn wake(&mut self) {
        [self.reader.take(), self.writer.take()].into_iter().flatten().for_each(Waker::wake);
    }

    /// The guest's buffer, as each of its packets says.
    pub(super) fn update_credit(&mut self, buf_alloc: u32, fwd_cnt: u32) {
        self.peer_alloc = buf_alloc;
        self.peer_fwd = fwd_cnt;
        self.asked_credit = false;
    }

    pub(super) fn owe_credit(&mut self) {
        self.owes_credit = true;
    }

    /// Bytes the guest has room for. Nonsense from it makes this zero, which harms only itself.
    fn credit(&self) -> usize {
        let in_flight = self.sent.wrapping_sub(self.peer_fwd);
        self.peer_alloc.saturating_sub(in_flight) as usize
    }

    /// Has bytes for the guest, which has no room for a single one: whoever they are for does not read.
    pub(super) fn is_stuck(&self) -> bool {
        !self.outgoing.is_empty() && self.credit() == 0
    }

    /// Takes bytes from the guest; `false` when it had no credit for them.
    pub(super) fn receive(&mut self, payload: &[u8]) -> bool {
        if self.received.len() + payload.len() > BUF_ALLOC as usize {
            return false;
        }
        self.received.extend(payload);
        if let Some(reader) = self.reader.take() {
            reader.wake();
        }
        true
    }

    /// `n` bytes of `received` were taken out by the reader.
    pub(super) fn consumed(&mut self, n: usize) {
        self.fwd_cnt = self.fwd_cnt.wrapping_add(n as u32);
        if self.fwd_cnt.wrapping_sub(self.fwd_announced) >= UPDATE_AFTER {
            self.owes_credit = true;
        }
    }

    /// The writer may add bytes.
    pub(super) fn writable(&self) -> usize {
        OUTGOING_MAX - self.outgoing.len().min(OUTGOING_MAX)
    }

    /// Is there a packet to send?
    pub(super) fn wants_to_send(&self) -> bool {
        match self.phase {
            Phase::Requested { sent } => !sent,
            Phase::Closed(_) => self.owes_reset,
            Phase::Open => {
                let data = !self.outgoing.is_empty() && (self.credit() > 0 || !self.asked_credit);
                let shut = self.outgoing.is_empty() && self.shut & !self.shut_sent != 0;
                self.owes_credit || data || shut
            }
        }
    }

    /// The next packet, its bytes (at most `max`) into `payload`, which is empty.
    pub(super) fn next_packet(&mut self, max: usize, payload: &mut Vec<u8>) -> Option<Outgoing> {
        let (op, flags) = match self.phase {
            Phase::Requested { sent: true } => return None,
            Phase::Requested { sent: false } => {
                self.phase = Phase::Requested { sent: true };
                (op::REQUEST, 0)
            }
            Phase::Closed(_) if std::mem::take(&mut self.owes_reset) => (op::RST, 0),
            Phase::Closed(_) => return None,
            Phase::Open => self.next_when_open(max, payload)?,
        };
        // Each packet announces how much was taken out, not only a CREDIT_UPDATE.
        self.fwd_announced = self.fwd_cnt;
        self.owes_credit = false;
        Some(Outgoing { op, flags, fwd_cnt: self.fwd_cnt })
    }

    fn next_when_open(&mut self, max: usize, payload: &mut Vec<u8>) -> Option<(u16, u32)> {
        let n = self.outgoing.len().min(self.credit()).min(max);
        if n > 0 {
            payload.extend(self.outgoing.drain(..n));
            self.sent = self.sent.wrapping_add(n as u32);
            if let Some(writer) = self.writer.take() {
                writer.wake();
            }
            return Some((op::RW, 0));
        }
        if self.owes_credit {
            return Some((op::CREDIT_UPDATE, 0));
        }
        if !self.outgoing.is_empty() {
            if self.credit() > 0 || std::mem::replace(&mut self.asked_credit, true) {
                return None;
            }
            return Some((op::CREDIT_REQUEST, 0));
        }
        if self.shut & !self.shut_sent != 0 {
            self.shut_sent |= self.shut;
            return Some((op::SHUTDOWN, self.shut_sent));
        }
        None
    }

    /// The guest broke the connection off: was it done?
    pub(super) fn on_reset(&mut self) {
        let done = self.peer_shut & shutdown::SEND != 0 || self.shut_sent == shutdown::BOTH;
        self.drop_silently(match self.phase {
            Phase::Requested { .. } => Closed::Refused,
            _ if done => Closed::Finished,
            _ => Closed::Reset,
        });
    }
}
