//! All of a guest's vsock connections, without I/O and without a clock.
//!
//! ```text
//!   guest --handle_packet--> Mux <--connect, poll_read, poll_write, shut_down_write, release-- streams
//!   guest <--poll_packet---- Mux                            <--handle_timeout(now)------------- thread
//! ```
//!
//! Connections only go from host to guest; a request from the guest is refused. Those with something to
//! send take turns, a packet each. Bounds: connections, bytes a connection in each direction, and
//! refusals that wait to be told.

use std::collections::BTreeMap;
use std::collections::VecDeque;
use std::io;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tokio::io::ReadBuf;

use super::connection::BUF_ALLOC;
use super::connection::Closed;
use super::connection::Connection;
use super::connection::Phase;
use super::packet::Header;
use super::packet::TYPE_STREAM;
use super::packet::op;
use super::packet::shutdown;

/// The host's address, fixed by the specification.
pub(super) const HOST_CID: u64 = 2;
/// The guest's address: it is alone on its bus, so all have the same.
pub(super) const GUEST_CID: u64 = 3;
/// Most connections at once; each may hold 320 KiB when both sides stall.
const MAX_CONNECTIONS: usize = 1024;
/// Most refusals kept for the guest before it must make room to hear them.
const MAX_REFUSALS: usize = 256;
/// How long a dropped stream's last bytes may take to reach the guest.
const LINGER: Duration = Duration::from_secs(5);
/// Where our ports begin: below are those that sockets reserve for the privileged.
const FIRST_PORT: u32 = 1024;

/// A connection's name: the ports at both ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Key {
    pub(super) host: u32,
    pub(super) guest: u32,
}

#[derive(Debug)]
pub(super) struct Mux {
    connections: BTreeMap<Key, Connection>,
    /// Those that may have something to send, in turn.
    ready: VecDeque<Key>,
    refusals: VecDeque<Key>,
    next_port: u32,
    /// The guest is gone for good.
    gone: bool,
}

impl Mux {
    pub(super) fn new() -> Self {
        Self {
            connections: BTreeMap::new(),
            ready: VecDeque::new(),
            refusals: VecDeque::new(),
            next_port: FIRST_PORT,
            gone: false,
        }
    }

    // ---- the guest's side ---------------------------------------------------------------------

    /// May another packet be handled? No while too many refusals wait.
    pub(super) fn has_room(&self) -> bool {
        self.refusals.len() < MAX_REFUSALS
    }

    /// Is there something for `poll_packet`?
    pub(super) fn has_packets(&self) -> bool {
        !self.refusals.is_empty() || !self.ready.is_empty()
    }

    /// Takes a packet from the guest; its header's length is that of `payload`.
    pub(super) fn handle_packet(&mut self, header: &Header, payload: &[u8]) {
        if header.dst_cid != HOST_CID || header.src_cid != GUEST_CID {
            return;
        }
        let key = Key { host: header.dst_port, guest: header.src_port };
        let known = self.connections.get_mut(&key).filter(|connection| !connection.is_closed());
        let Some(connection) = known.filter(|_| header.kind == TYPE_STREAM) else {
            if header.op != op::RST {
                self.refusals.push_back(key);
            }
            return;
        };
        connection.update_credit(header.buf_alloc, header.fwd_cnt);
        match (header.op, connection.phase) {
            (op::RST, _) => connection.on_reset(),
            (op::RESPONSE, Phase::Requested { sent: true }) => {
                connection.phase = Phase::Open;
                connection.wake();
            }
            (op::RW, Phase::Open) => on_data(connection, payload),
            (op::SHUTDOWN, Phase::Open) => on_shutdown(connection, header.flags),
            (op::CREDIT_UPDATE, Phase::Open) => {}
            (op::CREDIT_REQUEST, Phase::Open) => connection.owe_credit(),
            // Everything else is out of turn.
            _ => connection.break_off(Closed::Reset),
        }
        self.settle(key);
    }

    /// The next packet for the guest: its header, and at most `max` bytes into `payload`.
    pub(super) fn poll_packet(&mut self, max: usize, payload: &mut Vec<u8>) -> Option<Header> {
        payload.clear();
        if let Some(key) = self.refusals.pop_front() {
            return Some(header(key, op::RST));
        }
        while let Some(key) = self.ready.pop_front() {
            let Some(connection) = self.connections.get_mut(&key) else { continue };
            connection.queued = false;
            let packet = connection.next_packet(max, payload);
            self.settle(key);
            if let Some(packet) = packet {
                return Some(Header {
                    len: payload.len() as u32,
                    flags: packet.flags,
                    fwd_cnt: packet.fwd_cnt,
                    ..header(key, packet.op)
                });
            }
        }
        None
    }

    /// When `handle_timeout` has something to do.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.connections.values().filter_map(|connection| connection.linger_until).min()
    }

    /// Breaks off what has lingered too long.
    pub(super) fn handle_timeout(&mut self, now: Instant) {
        let late: Vec<Key> = self
            .connections
            .iter()
            .filter(|(_, connection)| connection.linger_until.is_some_and(|at| at <= now))
            .map(|(key, _)| *key)
            .collect();
        for key in late {
            if let Some(connection) = self.connections.get_mut(&key) {
                connection.linger_until = None;
                connection.break_off(Closed::Reset);
            }
            self.settle(key);
        }
    }

    /// The guest's driver has forgotten all connections; it may come back.
    pub(super) fn reset(&mut self) {
        self.forget_all(Closed::Reset);
    }

    /// The guest is gone for good.
    pub(super) fn guest_gone(&mut self) {
        self.gone = true;
        self.forget_all(Closed::Gone);
    }

    /// The host's port for the next connection.
    pub(super) fn next_port(&self) -> u32 {
        self.next_port
    }

    /// Goes on with the ports of another mux, so that the guest meets none that it may remember. Any number will do.
    pub(super) fn continue_ports(&mut self, next: u32) {
        self.next_port = if next < FIRST_PORT { FIRST_PORT } else { next_port(next - 1) };
    }

    fn forget_all(&mut self, why: Closed) {
        self.ready.clear();
        self.refusals.clear();
        // A connection that no packet was sent for yet is unknown to the guest, and still wanted.
        let wanted = |c: &Connection| why == Closed::Reset && c.phase == Phase::Requested { sent: false };
        for connection in self.connections.values_mut() {
            connection.queued = false;
            if !wanted(connection) {
                connection.drop_silently(why);
            }
        }
        self.connections.retain(|_, connection| !connection.is_over());
        let keys: Vec<Key> = self.connections.keys().copied().collect();
        keys.into_iter().for_each(|key| self.settle(key));
    }

    // ---- the streams' side --------------------------------------------------------------------

    /// Begins a connection to `port`.
    pub(super) fn connect(&mut self, port: u32) -> io::Result<Key> {
        if self.gone {
            return Err(closed_error(Closed::Gone));
        }
        if self.connections.len() >= MAX_CONNECTIONS {
            return Err(io::Error::new(io::ErrorKind::QuotaExceeded, "too many connections to the guest"));
        }
        let mut key = Key { host: self.next_port, guest: port };
        // Ends: there are more ports than connections.
        while self.connections.contains_key(&key) {
            key.host = next_port(key.host);
        }
        self.next_port = next_port(key.host);
        self.connections.insert(key, Connection::new());
        self.settle(key);
        Ok(key)
    }

    /// Has the guest answered?
    pub(super) fn poll_connected(&mut self, key: Key, cx: &Context<'_>) -> Poll<io::Result<()>> {
        let connection = self.held(key)?;
        match connection.phase {
            Phase::Open => Poll::Ready(Ok(())),
            Phase::Closed(why) => Poll::Ready(Err(closed_error(why))),
            Phase::Requested { .. } => {
                connection.writer = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }

    pub(super) fn poll_read(&mut self, key: Key, cx: &Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let connection = self.held(key)?;
        if into.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        if connection.received.is_empty() {
            return match connection.phase {
                _ if connection.peer_shut & shutdown::SEND != 0 => Poll::Ready(Ok(())),
                Phase::Closed(Closed::Finished) => Poll::Ready(Ok(())),
                Phase::Closed(why) => Poll::Ready(Err(closed_error(why))),
                _ => {
                    connection.reader = Some(cx.waker().clone());
                    Poll::Pending
                }
            };
        }
        let (front, _) = connection.received.as_slices();
        let n = front.len().min(into.remaining());
        into.put_slice(&front[..n]);
        connection.received.drain(..n);
        connection.consumed(n);
        self.settle(key);
        Poll::Ready(Ok(()))
    }

    pub(super) fn poll_write(&mut self, key: Key, cx: &Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let connection = self.held(key)?;
        match connection.phase {
            Phase::Closed(Closed::Finished) => return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
            Phase::Closed(why) => return Poll::Ready(Err(closed_error(why))),
            _ if connection.shut & shutdown::SEND != 0 || connection.peer_shut & shutdown::RECEIVE != 0 => {
                return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
            }
            _ => {}
        }
        let n = bytes.len().min(connection.writable());
        if n == 0 && !bytes.is_empty() {
            connection.writer = Some(cx.waker().clone());
            return Poll::Pending;
        }
        connection.outgoing.extend(&bytes[..n]);
        self.settle(key);
        Poll::Ready(Ok(n))
    }

    /// No more writes; the guest learns after the last byte.
    pub(super) fn shut_down_write(&mut self, key: Key) {
        if let Some(connection) = self.connections.get_mut(&key) {
            connection.shut |= shutdown::SEND;
        }
        self.settle(key);
    }

    /// The stream is dropped: what was written is still delivered, within a time limit, to a guest that takes it.
    pub(super) fn release(&mut self, key: Key, now: Instant) {
        let Some(connection) = self.connections.get_mut(&key) else { return };
        connection.held = false;
        if !connection.received.is_empty() || connection.phase != Phase::Open || connection.is_stuck() {
            // Bytes that nobody will read, on either side: a reset tells the guest so at once, as TCP does.
            connection.break_off(Closed::Reset);
            connection.received = VecDeque::new();
        } else {
            connection.shut = shutdown::BOTH;
            connection.linger_until = Some(now + LINGER);
        }
        self.settle(key);
    }

    fn held(&mut self, key: Key) -> io::Result<&mut Connection> {
        self.connections.get_mut(&key).ok_or_else(|| closed_error(Closed::Reset))
    }

    /// After any change: queues the connection if it wants to send, forgets it if it is over.
    fn settle(&mut self, key: Key) {
        let Some(connection) = self.connections.get_mut(&key) else { return };
        if connection.is_over() {
            // Or each attempt on a guest that takes no packets would leave its key behind.
            if connection.queued {
                self.ready.retain(|queued| *queued != key);
            }
            self.connections.remove(&key);
        } else if !connection.queued && connection.wants_to_send() {
            connection.queued = true;
            self.ready.push_back(key);
        }
    }
}

fn on_data(connection: &mut Connection, payload: &[u8]) {
    let unwanted = !connection.held || connection.peer_shut & shutdown::SEND != 0;
    if unwanted || !connection.receive(payload) {
        connection.break_off(Closed::Reset);
    }
}

fn on_shutdown(connection: &mut Connection, flags: u32) {
    connection.peer_shut |= flags & shutdown::BOTH;
    if connection.peer_shut == shutdown::BOTH {
        // The guest waits for our agreement to forget the connection.
        connection.break_off(Closed::Finished);
    } else {
        connection.wake();
    }
}

fn header(key: Key, op: u16) -> Header {
    Header {
        src_cid: HOST_CID,
        dst_cid: GUEST_CID,
        src_port: key.host,
        dst_port: key.guest,
        kind: TYPE_STREAM,
        op,
        buf_alloc: BUF_ALLOC,
        ..Header::default()
    }
}

fn next_port(port: u32) -> u32 {
    // The highest number means "any port" in the socket interface.
    if port >= u32::MAX - 1 { FIRST_PORT } else { port + 1 }
}

fn closed_error(why: Closed) -> io::Error {
    match why {
        Closed::Refused => io::Error::new(io::ErrorKind::ConnectionRefused, "nothing listens at the guest's port"),
        Closed::Reset | Closed::Finished => {
            io::Error::new(io::ErrorKind::ConnectionReset, "the guest closed the connection")
        }
        Closed::Gone => io::Error::new(io::ErrorKind::NotConnected, "the guest is gone"),
    }
}
