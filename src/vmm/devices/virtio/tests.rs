//! Devices behind their registers, driven as a guest's driver would: through RAM and MMIO.

mod balloon;
mod complaints;
mod defects;
mod restore;

use std::io::Write;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes as _, GuestAddress};

use super::DeviceQueue;
use super::Doorbell;
use super::Interrupt;
use super::Progress;
use super::VirtioDevice;
use super::Worker;
use super::balloon::Balloon;
use super::blk::Blk;
use super::mmio::Transport;
use super::rng::Rng;
use super::vsock::Vsock;
use crate::block::FileBackend;
use crate::hv::IrqLine;
use crate::mem::GuestRam;
use crate::transport::Connector;
use crate::units::Bytes;
use crate::vmm::bus::BusDevice;

const STATUS: u64 = 0x70;
const INTERRUPT_STATUS: u64 = 0x60;
const INTERRUPT_ACK: u64 = 0x64;
const NEEDS_RESET: u32 = 64;
/// The driver's buffers begin here; the rings lie below, 64 KiB a queue.
const BUFFERS: u64 = 0x10_0000;
const QUEUE_SIZE: u16 = 16;
/// Far beyond what a device needs; only a broken one lets it pass.
const PATIENCE: Duration = Duration::from_secs(20);

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

#[derive(Debug)]
struct Line(Mutex<Sender<()>>);

impl IrqLine for Line {
    fn raise(&self) {
        let _ = self.0.lock().unwrap().send(());
    }
    fn set_level(&self, _high: bool) {}
}

/// A driver, with its device and the machine around it.
struct Driver {
    ram: Arc<GuestRam>,
    device: Transport,
    interrupts: Receiver<()>,
    avail: Vec<u16>,
    used: Vec<u16>,
    _worker: Worker,
}

/// One descriptor: address, length, flags without NEXT.
type Part = (u64, u32, u16);

impl Driver {
    fn new(device: impl VirtioDevice + 'static, doorbell: Arc<Doorbell>) -> Self {
        Self::over(Arc::new(GuestRam::new(Bytes::mib(4)).unwrap()), device, doorbell)
    }

    /// The same in memory that there is already.
    fn over(ram: Arc<GuestRam>, device: impl VirtioDevice + 'static, doorbell: Arc<Doorbell>) -> Self {
        let (raised, interrupts) = channel();
        let queues = device.queue_sizes().len();
        let line = Arc::new(Line(Mutex::new(raised)));
        let (device, worker) = Transport::start("test", Box::new(device), Arc::clone(&ram), line, doorbell).unwrap();
        Self { ram, device, interrupts, avail: vec![0; queues], used: vec![0; queues], _worker: worker }
    }

    fn get(&mut self, register: u64) -> u32 {
        let mut value = [0; 4];
        self.device.read(register, &mut value);
        u32::from_le_bytes(value)
    }

    fn set(&mut self, register: u64, value: u32) {
        self.device.write(register, &value.to_le_bytes());
    }

    /// Everything up to DRIVER_OK, as section 3.1 has it.
    fn start(mut self) -> Self {
        self.set(STATUS, 0);
        self.set(STATUS, 1);
        self.set(STATUS, 3);
        self.set(0x24, 1);
        self.set(0x20, 1); // VERSION_1
        self.set(STATUS, 11);
        assert_eq!(self.get(STATUS), 11);
        for queue in 0..self.avail.len() as u32 {
            self.set(0x30, queue);
            assert!(self.get(0x34) >= u32::from(QUEUE_SIZE));
            self.set(0x38, u32::from(QUEUE_SIZE));
            for (register, at) in [(0x80, 0x0), (0x90, 0x1000), (0xa0, 0x2000)] {
                self.set(register, ring(queue as usize) as u32 + at);
                self.set(register + 4, 0);
            }
            self.set(0x44, 1);
        }
        self.set(STATUS, 15);
        assert_eq!(self.get(STATUS), 15);
        self
    }

    fn write<T: vm_memory::ByteValued>(&self, at: u64, value: T) {
        self.ram.memory().write_obj(value, GuestAddress(at)).unwrap();
    }

    fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.ram.memory().read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    fn descriptor(&self, table: u64, n: u16, (addr, len, flags): Part, next: u16) {
        let at = table + u64::from(n) * 16;
        self.write(at, addr);
        self.write(at + 8, len);
        self.write(at + 12, flags);
        self.write(at + 14, next);
    }

    /// Makes a chain of `parts` available, from descriptor `first` on.
    fn offer(&mut self, queue: usize, first: u16, parts: &[Part]) {
        for (n, part) in (first..).zip(parts) {
            let more = usize::from(n - first) + 1 < parts.len();
            let flags = part.2 | if more { NEXT } else { 0 };
            self.descriptor(ring(queue), n, (part.0, part.1, flags), n + 1);
        }
        self.offer_head(queue, first);
    }

    fn offer_head(&mut self, queue: usize, head: u16) {
        let avail = ring(queue) + 0x1000;
        self.write(avail + 4 + u64::from(self.avail[queue] % QUEUE_SIZE) * 2, head);
        self.avail[queue] = self.avail[queue].wrapping_add(1);
        self.write(avail + 2, self.avail[queue]);
    }

    fn ring(&mut self, queue: usize) {
        self.set(0x50, queue as u32);
    }

    /// Waits for the next used chain: its head, and how many bytes the device wrote.
    fn wait_used(&mut self, queue: usize) -> (u16, u32) {
        let used = ring(queue) + 0x2000;
        loop {
            let index: u16 = self.ram.memory().read_obj(GuestAddress(used + 2)).unwrap();
            if index != self.used[queue] {
                let element = used + 4 + u64::from(self.used[queue] % QUEUE_SIZE) * 8;
                self.used[queue] = self.used[queue].wrapping_add(1);
                let [head, len]: [u32; 2] = self.ram.memory().read_obj(GuestAddress(element)).unwrap();
                return (head as u16, len);
            }
            self.interrupts.recv_timeout(PATIENCE).expect("the device answers");
            let pending = self.get(INTERRUPT_STATUS);
            self.set(INTERRUPT_ACK, pending);
        }
    }

    /// Makes the rings as new, for a driver that begins anew.
    fn forget_rings(&mut self) {
        for queue in 0..self.avail.len() {
            (self.avail[queue], self.used[queue]) = (0, 0);
            self.write(ring(queue) + 0x1002, 0u16);
            self.write(ring(queue) + 0x2002, 0u16);
        }
    }

    fn wait_needs_reset(&mut self) {
        while self.get(STATUS) & NEEDS_RESET == 0 {
            self.interrupts.recv_timeout(PATIENCE).expect("the device says that it needs a reset");
        }
    }

    /// A block request: status byte, and what the device wrote to `len` bytes.
    fn request(&mut self, kind: u32, sector: u64, len: u32) -> (u8, Vec<u8>) {
        self.write(BUFFERS, kind);
        self.write(BUFFERS + 8, sector);
        let (data, status) = (BUFFERS + 0x1000, BUFFERS + 0x800);
        self.write(status, 0xaau8);
        self.offer(0, 0, &[(BUFFERS, 16, 0), (data, len, WRITE), (status, 1, WRITE)]);
        self.ring(0);
        assert_eq!(self.wait_used(0).0, 0);
        (self.bytes(status, 1)[0], self.bytes(data, len as usize))
    }
}

fn ring(queue: usize) -> u64 {
    0x1_0000 * (queue as u64 + 1)
}

fn content(len: usize) -> Vec<u8> {
    (0..len).map(|n| (n / 512 * 31 + n) as u8).collect()
}

fn disk_device(len: usize) -> Blk {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&content(len)).unwrap();
    Blk::new(Arc::new(FileBackend::new(file).unwrap()), "disk-0")
}

fn disk(len: usize) -> Driver {
    Driver::new(disk_device(len), Arc::default())
}

#[test]
fn registers_identify_the_device() {
    let mut driver = disk(10_000);
    assert_eq!(driver.get(0x0), 0x7472_6976);
    assert_eq!(driver.get(0x4), 2);
    assert_eq!(driver.get(0x8), 2);
    let mut capacity = [0; 8];
    driver.device.read(0x100, &mut capacity);
    assert_eq!(u64::from_le_bytes(capacity), 20, "the last sector is not whole");
    let mut past = [1; 4];
    driver.device.read(0xffc, &mut past);
    assert_eq!(past, [0; 4]);
}

#[test]
fn features_the_device_did_not_offer_are_not_agreed_to() {
    let mut driver = disk(512);
    driver.set(STATUS, 3);
    driver.set(0x24, 0);
    driver.set(0x20, 1 << 24);
    driver.set(0x24, 1);
    driver.set(0x20, 1);
    driver.set(STATUS, 11);
    assert_eq!(driver.get(STATUS), 3);
    driver.set(STATUS, 15);
    assert_eq!(driver.get(STATUS), 3, "without agreement there is no start");
}

#[test]
fn a_legacy_driver_is_not_agreed_to() {
    let mut driver = disk(512);
    driver.set(STATUS, 3);
    driver.set(STATUS, 11);
    assert_eq!(driver.get(STATUS), 3);
}

#[test]
fn sectors_are_read_and_the_padding_is_zero() {
    let mut driver = disk(300_000).start();
    let (status, data) = driver.request(0, 3, 200 * 1024);
    assert_eq!(status, 0);
    assert_eq!(data, content(300_000)[3 * 512..3 * 512 + 200 * 1024]);
    let (status, data) = driver.request(0, 585, 512);
    assert_eq!(status, 0);
    assert_eq!(data[..480], content(300_000)[585 * 512..]);
    assert_eq!(data[480..], [0; 32]);
}

#[test]
fn what_a_read_only_disk_cannot_do_is_answered() {
    let mut driver = disk(5120).start();
    assert_eq!(driver.request(0, 10, 512).0, 1, "past the end");
    assert_eq!(driver.request(0, u64::MAX, 512).0, 1, "past every end");
    assert_eq!(driver.request(0, 0, 100).0, 1, "not whole sectors");
    assert_eq!(driver.request(1, 0, 512).0, 1, "a write");
    assert_eq!(driver.request(4, 0, 0).0, 0, "a flush");
    assert_eq!(driver.request(11, 0, 512).0, 2, "a discard");
    let (status, id) = driver.request(8, 0, 20);
    assert_eq!((status, &id[..7]), (0, &b"disk-0\0"[..]));
    assert_eq!(driver.request(0, 0, 512).0, 0, "and it still works");
}

#[test]
fn a_request_without_room_for_the_answer_stops_the_device_until_reset() {
    let mut driver = disk(5120).start();
    driver.offer(0, 0, &[(BUFFERS, 16, 0)]);
    driver.ring(0);
    driver.wait_needs_reset();
    driver.forget_rings();
    let mut driver = driver.start();
    assert_eq!(driver.request(0, 0, 512).0, 0);
}

#[test]
fn queues_outside_ram_stop_the_device() {
    let mut driver = disk(512);
    driver.set(STATUS, 3);
    driver.set(0x24, 1);
    driver.set(0x20, 1);
    driver.set(STATUS, 11);
    driver.set(0x30, 0);
    driver.set(0x84, 0xffff_ffff);
    driver.set(0x44, 1);
    driver.set(STATUS, 15);
    driver.wait_needs_reset();
}

#[test]
fn entropy_fills_the_buffer_and_differs() {
    let mut driver = Driver::new(Rng, Arc::default()).start();
    driver.offer(0, 0, &[(BUFFERS, 64, WRITE)]);
    driver.offer(0, 1, &[(BUFFERS + 64, 64, WRITE)]);
    driver.ring(0);
    assert_eq!(driver.wait_used(0), (0, 64));
    assert_eq!(driver.wait_used(0), (1, 64));
    assert_ne!(driver.bytes(BUFFERS, 64), driver.bytes(BUFFERS + 64, 64));
    assert_ne!(driver.bytes(BUFFERS, 64), [0; 64]);
}

/// A guest's packet, at `at`.
fn packet(driver: &Driver, at: u64, host_port: u32, op: u16, payload: &[u8]) -> Part {
    for (offset, value) in [(0, 3u64), (8, 2)] {
        driver.write(at + offset, value);
    }
    let len = payload.len() as u32;
    for (offset, value) in [(16, 1028), (20, host_port), (24, len), (32, 0), (36, 65536), (40, 0u32)] {
        driver.write(at + offset, value);
    }
    driver.write(at + 28, 1u16);
    driver.write(at + 30, op);
    driver.ram.memory().write_slice(payload, GuestAddress(at + 44)).unwrap();
    (at, 44 + len, 0)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_reaches_through_the_queues_to_the_guest() {
    let (vsock, connector, doorbell) = Vsock::new();
    let mut driver = Driver::new(vsock, doorbell).start();
    let host = tokio::spawn(async move {
        let mut stream = connector.connect(1028).await.unwrap();
        stream.write_all(b"ping").await.unwrap();
        let mut answer = [0; 4];
        stream.read_exact(&mut answer).await.unwrap();
        answer
    });
    let guest = tokio::task::spawn_blocking(move || {
        for n in 0..8 {
            driver.offer(0, n, &[(BUFFERS + u64::from(n) * 0x1000, 0x1000, WRITE)]);
        }
        driver.ring(0);
        let hear = |driver: &mut Driver| {
            let (head, len) = driver.wait_used(0);
            driver.bytes(BUFFERS + u64::from(head) * 0x1000, len as usize)
        };
        let request = hear(&mut driver);
        assert_eq!(request[30], 1, "a REQUEST");
        let port = u32::from_le_bytes([request[16], request[17], request[18], request[19]]);
        let out = BUFFERS + 0x10_0000;
        let response = packet(&driver, out, port, 2, &[]);
        driver.offer(1, 0, &[response]);
        driver.ring(1);
        assert_eq!(&hear(&mut driver)[44..], b"ping");
        let answer = packet(&driver, out + 0x1000, port, 5, b"pong");
        driver.offer(1, 1, &[answer]);
        driver.ring(1);
        driver.wait_used(1);
        assert_eq!(hear(&mut driver)[30], 4, "a SHUTDOWN, as the stream was dropped");
    });
    assert_eq!(&tokio::time::timeout(PATIENCE, host).await.unwrap().unwrap(), b"pong");
    guest.await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_end_when_the_guest_breaks_its_socket_device() {
    let (vsock, connector, doorbell) = Vsock::new();
    let mut driver = Driver::new(vsock, doorbell).start();
    let host = tokio::spawn(async move { connector.connect(1028).await.map(|_| ()) });
    tokio::task::spawn_blocking(move || {
        driver.offer(0, 0, &[(BUFFERS, 0x1000, WRITE)]);
        driver.ring(0);
        driver.wait_used(0);
        // Ten bytes are not a header.
        driver.offer(1, 0, &[(BUFFERS, 10, 0)]);
        driver.ring(1);
        driver.wait_needs_reset();
    })
    .await
    .unwrap();
    let error = tokio::time::timeout(PATIENCE, host).await.unwrap().unwrap().unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
}

/// A descriptor that is anything, though often near something.
fn wild_descriptor() -> impl Strategy<Value = (u64, u32, u16, u16)> {
    let addr = prop_oneof![any::<u64>(), 0..0x50_0000u64, Just(BUFFERS)];
    let len = prop_oneof![any::<u32>(), 0..0x2000u32, Just(16)];
    let flags = prop_oneof![any::<u16>(), 0..8u16, Just(INDIRECT)];
    (addr, len, flags, prop_oneof![any::<u16>(), 0..QUEUE_SIZE])
}

/// Has a device in the memory that `make` is given work on nonsense, on this thread so that a panic is seen; it must
/// come to an end.
fn survives<D: VirtioDevice>(
    make: impl FnOnce(Arc<GuestRam>) -> D,
    table: &[(u64, u32, u16, u16)],
    heads: &[u16],
    noise: &[u8],
) {
    let mut driver = Driver::new(Rng, Arc::default());
    driver.ram.memory().write_slice(noise, GuestAddress(BUFFERS)).unwrap();
    let mut device = make(Arc::clone(&driver.ram));
    driver.avail = vec![0; device.queue_sizes().len()];
    let interrupt = Arc::new(Interrupt::new(Arc::new(Line(Mutex::new(channel().0)))));
    let mut queues = Vec::new();
    for n in 0..driver.avail.len() {
        for (index, (addr, len, flags, next)) in (0..).zip(table) {
            driver.descriptor(ring(n), index, (*addr, *len, *flags), *next);
        }
        heads.iter().for_each(|head| driver.offer_head(n, *head));
        let mut queue = Queue::new(QUEUE_SIZE).unwrap();
        queue.set_desc_table_address(Some(ring(n) as u32), None);
        queue.set_avail_ring_address(Some(ring(n) as u32 + 0x1000), None);
        queue.set_used_ring_address(Some(ring(n) as u32 + 0x2000), None);
        queue.set_ready(true);
        assert!(queue.is_valid(driver.ram.memory()));
        queues.push(DeviceQueue::new(queue, Arc::clone(&interrupt)));
    }
    let steps =
        (0..1000).take_while(|_| device.process(&mut queues, driver.ram.memory()).is_ok_and(|p| p == Progress::More));
    assert!(steps.count() < 1000, "the device never comes to rest");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn no_descriptors_panic_a_device(
        table in prop::collection::vec(wild_descriptor(), 16),
        heads in prop::collection::vec(prop_oneof![any::<u16>(), 0..QUEUE_SIZE], 1..24),
        noise in prop::collection::vec(any::<u8>(), 256),
    ) {
        survives(|_| disk_device(10_000), &table, &heads, &noise);
        survives(|_| Rng, &table, &heads, &noise);
        survives(|_| Vsock::new().0, &table, &heads, &noise);
        survives(|ram| Balloon::new(ram).0, &table, &heads, &noise);
    }

    #[test]
    fn no_register_access_panics(accesses in prop::collection::vec((0u64..0x140, any::<u32>(), 1usize..=4, any::<bool>()), 0..200)) {
        let ram = Arc::new(GuestRam::new(Bytes::mib(4)).unwrap());
        for mut driver in [disk(10_000), Driver::over(Arc::clone(&ram), Balloon::new(ram).0, Arc::default())] {
            for (offset, value, width, write) in &accesses {
                let width = 1 << (width - 1);
                if *write {
                    driver.device.write(*offset, &u64::from(*value).to_le_bytes()[..width]);
                } else {
                    driver.device.read(*offset, &mut [0; 8][..width]);
                }
            }
            driver.set(STATUS, 0);
            prop_assert_eq!(driver.get(STATUS), 0);
        }
    }
}
