//! The mux against a model of the guest, without queues, threads or time.

use std::io;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use tokio::io::{AsyncReadExt as _, ReadBuf};

use super::Vsock;
use super::connection::BUF_ALLOC;
use super::connection::OUTGOING_MAX;
use super::mux::GUEST_CID;
use super::mux::HOST_CID;
use super::mux::Key;
use super::mux::Mux;
use super::packet::Header;
use super::packet::TYPE_STREAM;
use super::packet::op;
use super::packet::shutdown;
use crate::transport::Connector as _;

const PORT: u32 = 1028;
const GUEST_BUF: u32 = 100_000;
/// As a Linux guest's receive buffers: a page with the header outside.
const PACKET: usize = 4096;

fn cx() -> Context<'static> {
    Context::from_waker(Waker::noop())
}

/// A guest with one connection, keeping its own account of credit.
struct Guest {
    mux: Mux,
    key: Key,
    received: Vec<u8>,
    taken: u32,
    sent: u32,
    host_alloc: u32,
    host_fwd: u32,
    heard: Vec<u16>,
}

impl Guest {
    /// Connected, with the handshake done.
    fn connected() -> Self {
        let mut guest = Self::asked();
        assert_eq!(guest.heard, [op::REQUEST]);
        guest.say(op::RESPONSE, 0, &[]);
        assert!(matches!(guest.mux.poll_connected(guest.key, &cx()), Poll::Ready(Ok(()))));
        guest
    }

    /// The host has asked, the guest not answered yet.
    fn asked() -> Self {
        let mut mux = Mux::new();
        let key = mux.connect(PORT).unwrap();
        assert!(mux.poll_connected(key, &cx()).is_pending());
        let mut guest =
            Self { mux, key, received: Vec::new(), taken: 0, sent: 0, host_alloc: 0, host_fwd: 0, heard: Vec::new() };
        guest.listen();
        guest
    }

    fn say(&mut self, op: u16, flags: u32, payload: &[u8]) {
        let header = Header {
            src_cid: GUEST_CID,
            dst_cid: HOST_CID,
            src_port: PORT,
            dst_port: self.key.host,
            len: payload.len() as u32,
            kind: TYPE_STREAM,
            op,
            flags,
            buf_alloc: GUEST_BUF,
            fwd_cnt: self.taken,
        };
        self.mux.handle_packet(&header, payload);
    }

    /// Takes every packet the host has, checking it against the guest's credit.
    fn listen(&mut self) {
        let mut payload = Vec::new();
        while let Some(header) = self.mux.poll_packet(PACKET, &mut payload) {
            assert_eq!((header.src_cid, header.dst_cid), (HOST_CID, GUEST_CID));
            assert_eq!(header.len as usize, payload.len());
            self.received.extend(&payload);
            assert!(self.received.len() as u32 - self.taken <= GUEST_BUF, "the host overran the guest's buffer");
            (self.host_alloc, self.host_fwd) = (header.buf_alloc, header.fwd_cnt);
            self.heard.push(header.op);
        }
    }

    fn credit(&self) -> usize {
        (self.host_alloc - (self.sent - self.host_fwd)) as usize
    }

    fn send(&mut self, bytes: &[u8]) {
        self.sent += bytes.len() as u32;
        self.say(op::RW, 0, bytes);
    }

    fn host_reads(&mut self, max: usize) -> Poll<io::Result<Vec<u8>>> {
        let mut buffer = vec![0; max];
        let mut into = ReadBuf::new(&mut buffer);
        let poll = self.mux.poll_read(self.key, &cx(), &mut into);
        poll.map_ok(|()| into.filled().to_vec())
    }

    fn host_writes(&mut self, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.mux.poll_write(self.key, &cx(), bytes)
    }
}

fn kind<T>(poll: Poll<io::Result<T>>) -> Option<io::ErrorKind> {
    match poll {
        Poll::Ready(Err(error)) => Some(error.kind()),
        _ => None,
    }
}

#[test]
fn nobody_listening_is_refused() {
    let mut guest = Guest::asked();
    guest.say(op::RST, 0, &[]);
    assert_eq!(kind(guest.mux.poll_connected(guest.key, &cx())), Some(io::ErrorKind::ConnectionRefused));
}

#[test]
fn each_side_closes_its_own_half() {
    let mut guest = Guest::connected();
    assert!(matches!(guest.host_writes(b"question"), Poll::Ready(Ok(8))));
    guest.mux.shut_down_write(guest.key);
    guest.listen();
    assert_eq!(guest.received, b"question");
    assert_eq!(guest.heard, [op::REQUEST, op::RW, op::SHUTDOWN]);
    assert_eq!(kind(guest.host_writes(b"more")), Some(io::ErrorKind::BrokenPipe));

    guest.send(b"answer");
    guest.say(op::SHUTDOWN, shutdown::SEND, &[]);
    assert!(matches!(guest.host_reads(99), Poll::Ready(Ok(bytes)) if bytes == b"answer"));
    assert!(matches!(guest.host_reads(99), Poll::Ready(Ok(bytes)) if bytes.is_empty()));
}

#[test]
fn a_guest_that_closes_is_answered_and_its_bytes_are_still_readable() {
    let mut guest = Guest::connected();
    guest.send(b"last words");
    guest.say(op::SHUTDOWN, shutdown::BOTH, &[]);
    guest.listen();
    assert_eq!(guest.heard.last(), Some(&op::RST));
    assert!(matches!(guest.host_reads(99), Poll::Ready(Ok(bytes)) if bytes == b"last words"));
    assert!(matches!(guest.host_reads(99), Poll::Ready(Ok(bytes)) if bytes.is_empty()));
    assert_eq!(kind(guest.host_writes(b"x")), Some(io::ErrorKind::BrokenPipe));
}

#[test]
fn a_reset_is_an_error_after_the_bytes_before_it() {
    let mut guest = Guest::connected();
    guest.send(b"abc");
    guest.say(op::RST, 0, &[]);
    assert!(matches!(guest.host_reads(99), Poll::Ready(Ok(bytes)) if bytes == b"abc"));
    assert_eq!(kind(guest.host_reads(99)), Some(io::ErrorKind::ConnectionReset));
}

#[test]
fn a_dropped_stream_delivers_what_was_written_then_says_goodbye() {
    let mut guest = Guest::connected();
    assert!(guest.host_writes(b"goodbye").is_ready());
    guest.mux.release(guest.key, Instant::now());
    guest.listen();
    assert_eq!(guest.received, b"goodbye");
    assert_eq!(guest.heard.last(), Some(&op::SHUTDOWN));
    guest.say(op::RST, 0, &[]);
    assert!(guest.mux.deadline().is_none(), "nothing is left of the connection");
}

#[test]
fn a_guest_that_never_agrees_to_the_end_is_reset_in_time() {
    let mut guest = Guest::connected();
    let now = Instant::now();
    guest.mux.release(guest.key, now);
    guest.listen();
    let deadline = guest.mux.deadline().unwrap();
    guest.mux.handle_timeout(deadline - Duration::from_millis(1));
    guest.listen();
    assert_eq!(guest.heard.last(), Some(&op::SHUTDOWN));
    guest.mux.handle_timeout(deadline);
    guest.listen();
    assert_eq!(guest.heard.last(), Some(&op::RST));
    assert!(guest.mux.deadline().is_none());
}

#[test]
fn a_goodbye_that_the_guest_has_not_heard_yet_outlives_the_time_limit() {
    let mut guest = Guest::connected();
    let now = Instant::now();
    guest.mux.release(guest.key, now);
    guest.say(op::SHUTDOWN, shutdown::BOTH, &[]);
    guest.mux.handle_timeout(now + Duration::from_secs(60));
    guest.listen();
    assert_eq!(guest.heard.last(), Some(&op::RST));
}

#[test]
fn dropping_a_stream_with_unread_bytes_resets_it() {
    let mut guest = Guest::connected();
    guest.send(b"unread");
    guest.mux.release(guest.key, Instant::now());
    guest.listen();
    assert_eq!(guest.heard.last(), Some(&op::RST));
}

#[test]
fn dropping_a_stream_that_the_guest_does_not_read_resets_it_at_once() {
    let mut guest = Guest::connected();
    while guest.host_writes(&[7; 10_000]).is_ready() {
        guest.listen();
    }
    guest.mux.release(guest.key, Instant::now());
    guest.listen();
    assert_eq!(guest.heard.last(), Some(&op::RST));
}

#[test]
fn a_writer_waits_for_the_guests_credit_and_asks_for_it_once() {
    let mut guest = Guest::connected();
    let mut written = 0;
    while let Poll::Ready(n) = guest.host_writes(&[7; 10_000]) {
        written += n.unwrap();
        guest.listen();
    }
    assert_eq!(guest.received.len() as u32, GUEST_BUF);
    assert_eq!(written, GUEST_BUF as usize + OUTGOING_MAX);
    guest.listen();
    assert_eq!(guest.heard.iter().filter(|op| **op == op::CREDIT_REQUEST).count(), 1);

    guest.taken = GUEST_BUF;
    guest.say(op::CREDIT_UPDATE, 0, &[]);
    guest.listen();
    assert_eq!(guest.received.len(), written);
}

#[test]
fn a_reader_that_catches_up_tells_the_guest_of_the_room() {
    let mut guest = Guest::connected();
    guest.listen();
    guest.say(op::CREDIT_REQUEST, 0, &[]);
    guest.listen();
    assert_eq!(guest.host_alloc, BUF_ALLOC);
    for _ in 0..4 {
        guest.send(&[1; 65536]);
    }
    assert_eq!(guest.credit(), 0);
    while guest.host_reads(10_000).is_ready() {}
    guest.listen();
    assert_eq!(guest.heard.last(), Some(&op::CREDIT_UPDATE));
    assert!(guest.credit() >= BUF_ALLOC as usize * 3 / 4);
}

#[test]
fn a_guest_that_sends_without_credit_is_reset() {
    let mut guest = Guest::connected();
    for _ in 0..5 {
        guest.say(op::RW, 0, &[1; 65536]);
    }
    guest.listen();
    assert_eq!(guest.heard.last(), Some(&op::RST));
}

#[test]
fn what_nobody_asked_for_is_refused_and_strangers_are_ignored() {
    let mut guest = Guest::connected();
    guest.key.host += 1;
    guest.say(op::REQUEST, 0, &[]);
    guest.say(op::RST, 0, &[]);
    guest.listen();
    assert_eq!(guest.heard, [op::REQUEST, op::RST]);
    let stranger = Header { src_cid: 77, dst_cid: HOST_CID, op: op::REQUEST, kind: TYPE_STREAM, ..Header::default() };
    guest.mux.handle_packet(&stranger, &[]);
    assert!(!guest.mux.has_packets());
}

#[test]
fn streams_take_turns() {
    let mut mux = Mux::new();
    let keys: Vec<Key> = (0..3).map(|_| mux.connect(PORT).unwrap()).collect();
    let mut payload = Vec::new();
    while mux.poll_packet(PACKET, &mut payload).is_some() {}
    for key in &keys {
        let answer = Header {
            src_cid: GUEST_CID,
            dst_cid: HOST_CID,
            src_port: PORT,
            dst_port: key.host,
            kind: TYPE_STREAM,
            op: op::RESPONSE,
            buf_alloc: GUEST_BUF,
            ..Header::default()
        };
        mux.handle_packet(&answer, &[]);
        assert!(mux.poll_write(*key, &cx(), &[0; 3 * PACKET]).is_ready());
    }
    let order: Vec<u32> = std::iter::from_fn(|| mux.poll_packet(PACKET, &mut payload)).map(|h| h.src_port).collect();
    let [a, b, c] = [keys[0].host, keys[1].host, keys[2].host];
    assert_eq!(order, [a, b, c, a, b, c, a, b, c]);
}

#[test]
fn attempts_that_are_given_up_leave_nothing_for_a_guest_that_takes_nothing() {
    let mut mux = Mux::new();
    for _ in 0..10_000 {
        let key = mux.connect(PORT).unwrap();
        mux.release(key, Instant::now());
    }
    assert!(!mux.has_packets());
}

#[tokio::test]
async fn a_guest_that_always_has_more_does_not_hold_the_readers_task() {
    let (_device, connector, _doorbell) = Vsock::new();
    let mut connecting = std::pin::pin!(connector.connect(PORT));
    assert!(futures::poll!(connecting.as_mut()).is_pending());
    {
        let mut mux = connector.shared.lock();
        let asked = mux.poll_packet(PACKET, &mut Vec::new()).unwrap();
        let answer = |op| Header {
            src_cid: GUEST_CID,
            dst_cid: HOST_CID,
            src_port: asked.dst_port,
            dst_port: asked.src_port,
            kind: TYPE_STREAM,
            op,
            ..Header::default()
        };
        mux.handle_packet(&answer(op::RESPONSE), &[]);
        mux.handle_packet(&answer(op::RW), &[7; 50_000]);
    }
    let mut stream = connecting.await.unwrap();
    let mut reads = 0;
    tokio::task::yield_now().await;
    let reading = async {
        while stream.read_u8().await.is_ok() {
            reads += 1;
        }
    };
    assert!(futures::poll!(std::pin::pin!(reading)).is_pending());
    assert!((1..1000).contains(&reads), "{reads} reads in one poll");
}

#[test]
fn a_guest_that_goes_ends_every_stream() {
    let mut guest = Guest::connected();
    guest.mux.guest_gone();
    assert_eq!(kind(guest.host_reads(9)), Some(io::ErrorKind::NotConnected));
    assert_eq!(guest.mux.connect(PORT).unwrap_err().kind(), io::ErrorKind::NotConnected);
    guest.mux.release(guest.key, Instant::now());
    assert!(!guest.mux.has_packets());
}

#[test]
fn a_driver_that_resets_keeps_only_requests_it_has_not_seen() {
    let mut guest = Guest::connected();
    let waiting = guest.mux.connect(PORT).unwrap();
    guest.mux.reset();
    assert_eq!(kind(guest.host_reads(9)), Some(io::ErrorKind::ConnectionReset));
    assert!(guest.mux.poll_connected(waiting, &cx()).is_pending());
    guest.heard.clear();
    guest.listen();
    assert_eq!(guest.heard, [op::REQUEST]);
}

#[derive(Clone, Debug)]
enum Step {
    HostWrites(usize),
    HostReads(usize),
    GuestSends(usize),
    GuestTakes(usize),
    GuestListens,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (1usize..50_000).prop_map(Step::HostWrites),
        (1usize..50_000).prop_map(Step::HostReads),
        (1usize..50_000).prop_map(Step::GuestSends),
        (1usize..50_000).prop_map(Step::GuestTakes),
        Just(Step::GuestListens),
    ]
}

/// The `n`th byte of a stream that never repeats within a test.
fn byte(n: usize) -> u8 {
    (n.wrapping_mul(2_654_435_761) >> 13) as u8
}

fn bytes(from: usize, len: usize) -> Vec<u8> {
    (from..from + len).map(byte).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn bytes_arrive_in_order_in_both_directions_whatever_the_pace(steps in prop::collection::vec(step(), 1..200)) {
        let mut guest = Guest::connected();
        guest.say(op::CREDIT_REQUEST, 0, &[]);
        guest.listen();
        let (mut written, mut sent, mut read) = (0, 0, 0);
        for step in steps {
            match step {
                Step::HostWrites(n) => {
                    if let Poll::Ready(n) = guest.host_writes(&bytes(written, n)) {
                        written += n.unwrap();
                    }
                }
                Step::HostReads(n) => {
                    if let Poll::Ready(got) = guest.host_reads(n) {
                        let got = got.unwrap();
                        prop_assert_eq!(&got, &bytes(read, got.len()));
                        read += got.len();
                    }
                }
                Step::GuestSends(n) => {
                    let n = n.min(guest.credit());
                    guest.send(&bytes(sent, n));
                    sent += n;
                }
                Step::GuestTakes(n) => {
                    guest.taken = (guest.taken as usize + n).min(guest.received.len()) as u32;
                    guest.say(op::CREDIT_UPDATE, 0, &[]);
                }
                Step::GuestListens => guest.listen(),
            }
        }
        // Let both run dry: nothing is lost and nothing is stuck.
        loop {
            guest.listen();
            if guest.taken as usize == guest.received.len() && guest.received.len() == written {
                break;
            }
            guest.taken = guest.received.len() as u32;
            guest.say(op::CREDIT_UPDATE, 0, &[]);
        }
        while let Poll::Ready(got) = guest.host_reads(50_000) {
            read += got.unwrap().len();
        }
        prop_assert_eq!(read, sent);
        prop_assert_eq!(&guest.received, &bytes(0, written));
    }

    #[test]
    fn no_packet_panics_or_fills_memory(
        packets in prop::collection::vec((any::<[u8; 32]>(), 0u16..9, 0usize..3, any::<bool>(), 0usize..70_000), 0..100),
    ) {
        let mut guest = Guest::connected();
        for (noise, op, ports, listen, len) in packets {
            let mut raw = [0; super::HEADER_LEN];
            raw[..32].copy_from_slice(&noise);
            let mut header = Header::parse(&raw);
            header.op = op;
            if ports > 0 {
                (header.src_cid, header.dst_cid, header.kind) = (GUEST_CID, HOST_CID, TYPE_STREAM);
            }
            if ports > 1 {
                (header.src_port, header.dst_port) = (PORT, guest.key.host);
            }
            if guest.mux.has_room() {
                guest.mux.handle_packet(&header, &vec![0; len]);
            }
            let _ = guest.host_writes(&[1; 1000]);
            if listen {
                let mut payload = Vec::new();
                // A hostile credit may let more through than the model's guest has room for; only bounds matter here.
                for _ in 0..10 {
                    if guest.mux.poll_packet(PACKET, &mut payload).is_none() {
                        break;
                    }
                    prop_assert!(payload.len() <= PACKET);
                }
            }
        }
    }
}
