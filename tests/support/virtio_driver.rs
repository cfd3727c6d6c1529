//! What a virtio driver does, as steps of a [`Script`]; and checks that a device serves a driver that behaves.
//!
//! Everything that a driver offers lies in [`PLAY`] or in the last page, so that all other memory must stay as it is.
#![allow(dead_code, reason = "each test binary includes this file and uses its part")]

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use kiln::block::BlockBackend;
use kiln::hv::soft::Soft;
use kiln::transport::Connector;
use kiln::units::Bytes;
use kiln::vmm::Machine;
use kiln::vmm::devices::virtio::DeviceState;

use crate::bare_machine::fresh;
use crate::bare_machine::transport;
use crate::puppet;
use crate::puppet::PATIENCE;
use crate::puppet::Puppet;
use crate::puppet::Script;

/// What drivers offer.
pub(crate) const PLAY: Range<u64> = 0x28_0000..0x38_0000;
/// The driver's buffers; its rings lie below.
pub(crate) const BUFFERS: u64 = PLAY.start + 0x4_0000;
/// The last page of memory is offered too.
pub(crate) const RAM_END: u64 = 0x40_0000;
/// Nothing of a driver's, and not used by the guest's program.
pub(crate) const CANARIES: [Range<u64>; 3] = [0x1_0000..0x10_0000, 0x11_0000..0x1f_0000, 0x38_0000..0x3f_f000];

pub(crate) const STATUS: u64 = 0x70;
pub(crate) const QUEUE_NOTIFY: u64 = 0x50;
pub(crate) const NEEDS_RESET: u32 = 64;
pub(crate) const VERSION_1: u64 = 1 << 32;
pub(crate) const EVENT_IDX: u64 = 1 << 29;

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

/// How many entries a driver that behaves gives its queues.
pub(crate) const QUEUE_SIZE: u16 = 16;
/// Where a guest's program would listen.
const PORT: u32 = 1028;

/// A device of the machine that [`start`] makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Device {
    Blk,
    Vsock,
    Rng,
    Balloon,
}

pub(crate) const DEVICES: [Device; 4] = [Device::Blk, Device::Vsock, Device::Rng, Device::Balloon];

impl Device {
    /// Where its registers are.
    pub(crate) fn base(self) -> u64 {
        0xd000_0000 + 0x1000 * self as u64
    }

    /// The largest sizes of its queues.
    pub(crate) fn queues(self) -> &'static [u16] {
        match self {
            Self::Blk => &[256],
            Self::Vsock => &[256, 256, 16],
            Self::Rng => &[64],
            Self::Balloon => &[64, 64],
        }
    }
}

/// Where a queue's parts are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rings {
    pub(crate) size: u64,
    pub(crate) descriptors: u64,
    pub(crate) available: u64,
    pub(crate) used: u64,
}

/// Where a driver that behaves has queue `n`.
pub(crate) fn rings(n: usize) -> Rings {
    let at = PLAY.start + 0x4000 * n as u64;
    Rings { size: u64::from(QUEUE_SIZE), descriptors: at, available: at + 0x1000, used: at + 0x2000 }
}

impl Script {
    pub(crate) fn register(&mut self, device: Device, register: u64, value: u64) -> &mut Self {
        self.write(4, device.base() + register, value)
    }

    pub(crate) fn reset(&mut self, device: Device) -> &mut Self {
        self.register(device, STATUS, 0)
    }

    /// Everything up to FEATURES_OK, from the reset on.
    pub(crate) fn negotiate(&mut self, device: Device, features: u64) -> &mut Self {
        self.reset(device).register(device, STATUS, 1).register(device, STATUS, 3);
        for (word, bits) in [(0, features & 0xffff_ffff), (1, features >> 32)] {
            self.register(device, 0x24, word).register(device, 0x20, bits);
        }
        self.register(device, STATUS, 11)
    }

    pub(crate) fn set_queue(&mut self, device: Device, n: usize, rings: &Rings) -> &mut Self {
        self.register(device, 0x30, n as u64).register(device, 0x38, rings.size);
        for (register, at) in [(0x80, rings.descriptors), (0x90, rings.available), (0xa0, rings.used)] {
            self.register(device, register, at & 0xffff_ffff).register(device, register + 4, at >> 32);
        }
        self.register(device, 0x44, 1)
    }

    /// All that a driver that behaves does before its first request.
    pub(crate) fn set_up(&mut self, device: Device, features: u64) -> &mut Self {
        self.negotiate(device, features);
        for n in 0..device.queues().len() {
            self.set_queue(device, n, &rings(n));
            self.write(4, rings(n).available, 0).write(4, rings(n).used, 0);
        }
        self.register(device, STATUS, 15)
    }

    /// Descriptor `n` of the table at `table`.
    pub(crate) fn descriptor(&mut self, table: u64, n: u64, d: &Descriptor) -> &mut Self {
        let rest = u64::from(d.len) | u64::from(d.flags) << 32 | u64::from(d.next) << 48;
        self.write(8, table + n * 16, d.addr).write(8, table + n * 16 + 8, rest)
    }

    /// Makes the chain that begins at `head` available as entry `entry`, and rings.
    pub(crate) fn offer(&mut self, device: Device, queue: usize, entry: u16, head: u16) -> &mut Self {
        let ring = rings(queue);
        self.write(2, ring.available + 4 + u64::from(entry % QUEUE_SIZE) * 2, u64::from(head));
        self.write(2, ring.available + 2, u64::from(entry.wrapping_add(1)));
        self.notify(device, queue)
    }

    pub(crate) fn notify(&mut self, device: Device, queue: usize) -> &mut Self {
        self.register(device, QUEUE_NOTIFY, queue as u64)
    }

    /// A chain of descriptors from 0 on, as entry `entry`.
    pub(crate) fn chain(&mut self, device: Device, queue: usize, entry: u16, parts: &[Descriptor]) -> &mut Self {
        for (n, part) in (0..).zip(parts) {
            let more = usize::from(n) + 1 < parts.len();
            let flags = if more { part.flags | NEXT } else { part.flags };
            self.descriptor(rings(queue).descriptors, u64::from(n), &Descriptor { flags, next: n + 1, ..*part });
        }
        self.offer(device, queue, entry, 0)
    }

    /// Waits until the device has given back the entry `entry`.
    pub(crate) fn await_used(&mut self, queue: usize, entry: u16) -> &mut Self {
        self.await_change(rings(queue).used + 2, entry)
    }
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Descriptor {
    pub(crate) addr: u64,
    pub(crate) len: u32,
    pub(crate) flags: u16,
    pub(crate) next: u16,
}

/// One without a successor.
pub(crate) fn part(addr: u64, len: u32, flags: u16) -> Descriptor {
    Descriptor { addr, len, flags, next: 0 }
}

/// A disk of bytes that are no addresses in guest memory, however they are read.
#[derive(Debug)]
pub(crate) struct MemoryDisk {
    pub(crate) bytes: Vec<u8>,
    /// What each read takes.
    pub(crate) delay: Duration,
}

impl MemoryDisk {
    pub(crate) fn new(len: usize) -> Self {
        Self { bytes: (0..len).map(|n| 0x80 | (n / 512 * 31 + n) as u8).collect(), delay: Duration::ZERO }
    }
}

impl BlockBackend for MemoryDisk {
    fn size(&self) -> Bytes {
        Bytes(self.bytes.len() as u64)
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        std::thread::sleep(self.delay);
        let from = self.bytes.get(offset as usize..offset as usize + buf.len());
        buf.copy_from_slice(from.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

/// The configuration space of a disk of so many bytes.
pub(crate) fn blk_config(len: usize) -> Vec<u8> {
    let mut config = vec![0; 60];
    config[..8].copy_from_slice(&(len as u64).div_ceil(512).to_le_bytes());
    config[12..16].copy_from_slice(&254u32.to_le_bytes());
    config
}

/// What the canaries hold at `at`.
fn canary(at: u64) -> u8 {
    (at / 4096 * 37 + at) as u8
}

/// A machine with `disk` and all other devices, whose guest waits for scripts.
pub(crate) async fn start(disk: MemoryDisk) -> Puppet {
    let (mut state, ram) = fresh(&puppet::code());
    state.virtio.insert(0, transport(2, blk_config(disk.bytes.len()), &[256], DeviceState::Stateless));
    for at in CANARIES.into_iter().flatten() {
        ram.store(at, canary(at)).expect("in memory");
    }
    let mut machine = Machine::restore(&Soft::new(), &state, ram, &[Arc::new(disk)]).await.expect("a valid state");
    machine.resume();
    Puppet { machine }
}

impl Puppet {
    /// Fails if a byte changed that no driver has offered.
    pub(crate) fn check_canaries(&self) {
        for range in CANARIES {
            let mut found = vec![0; (range.end - range.start) as usize];
            self.ram().read_bytes(range.start, &mut found).expect("in memory");
            let wrong = range.zip(&found).find(|(at, byte)| canary(*at) != **byte);
            assert!(wrong.is_none(), "memory that was never offered was written: {wrong:x?}");
        }
    }

    pub(crate) fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.ram().read_bytes(at, &mut bytes).expect("in memory");
        bytes
    }

    /// Fails unless each device serves a driver that begins anew and behaves.
    pub(crate) async fn check_devices(&self) {
        for device in DEVICES {
            self.check_device(device).await;
        }
    }

    pub(crate) async fn check_device(&self, device: Device) {
        match device {
            Device::Blk => self.check_blk().await,
            Device::Vsock => self.check_vsock().await,
            Device::Rng => self.check_rng().await,
            Device::Balloon => self.check_balloon().await,
        }
    }

    async fn check_blk(&self) {
        let (header, data, status) = (BUFFERS, BUFFERS + 0x1000, BUFFERS + 0x800);
        let mut script = Script::default();
        script.set_up(Device::Blk, VERSION_1).write(8, header, 0).write(8, header + 8, 3).write(1, status, 0xaa);
        let parts = [part(header, 16, 0), part(data, 512, WRITE), part(status, 1, WRITE)];
        script.chain(Device::Blk, 0, 0, &parts).await_used(0, 0).read(1, status);
        assert_eq!(self.run(&script).await, [0], "the disk answers");
        assert_eq!(self.bytes(data, 512), MemoryDisk::new(2048).bytes[1536..]);
    }

    async fn check_rng(&self) {
        self.ram().fill(BUFFERS, 0, 64).expect("in memory");
        let mut script = Script::default();
        script.set_up(Device::Rng, VERSION_1 | EVENT_IDX).chain(Device::Rng, 0, 0, &[part(BUFFERS, 64, WRITE)]);
        script.await_used(0, 0).read(4, rings(0).used + 8);
        assert_eq!(self.run(&script).await, [64], "bytes of entropy");
        assert_ne!(self.bytes(BUFFERS, 64), [0; 64]);
    }

    async fn check_balloon(&self) {
        let page = BUFFERS + 0x1000;
        self.ram().fill(page, b'w', 0x2000).expect("in memory");
        let mut script = Script::default();
        script.set_up(Device::Balloon, VERSION_1).write(4, BUFFERS, page >> 12);
        script.chain(Device::Balloon, 0, 0, &[part(BUFFERS, 4, 0)]).await_used(0, 0);
        script.chain(Device::Balloon, 1, 0, &[part(BUFFERS, 4, 0)]).await_used(1, 0);
        self.run(&script).await;
        assert_eq!(self.bytes(page, 0x2000), [vec![0; 0x1000], vec![b'w'; 0x1000]].concat());
    }

    async fn check_vsock(&self) {
        let mut script = Script::default();
        script.set_up(Device::Vsock, VERSION_1).chain(Device::Vsock, 0, 0, &[part(BUFFERS, 0x1000, WRITE)]);
        self.run(&script).await;
        let connector = self.machine.connector().clone();
        let host = tokio::spawn(async move { connector.connect(PORT).await.map(drop) });
        self.run(Script::default().await_used(0, 0)).await;
        let request = self.bytes(BUFFERS, 44);
        assert_eq!(request[30], 1, "a REQUEST: {request:?}");
        let port = u32::from_le_bytes([request[16], request[17], request[18], request[19]]);
        let at = BUFFERS + 0x1000;
        let mut script = Script::default();
        script.packet(at, &Packet { to: port, from: PORT, op: 2, ..Packet::default() });
        script.chain(Device::Vsock, 1, 0, &[part(at, 44, 0)]).await_used(1, 0);
        self.run(&script).await;
        tokio::time::timeout(PATIENCE, host).await.expect("in time").expect("no panic").expect("connected");
    }
}

/// A packet from the guest, without its payload.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Packet {
    pub(crate) cids: (u64, u64),
    pub(crate) from: u32,
    pub(crate) to: u32,
    pub(crate) len: u32,
    pub(crate) kind: u16,
    pub(crate) op: u16,
    pub(crate) flags: u32,
    pub(crate) buf_alloc: u32,
    pub(crate) fwd_cnt: u32,
}

impl Default for Packet {
    fn default() -> Self {
        let nothing =
            Self { cids: (3, 2), from: PORT, to: 1024, len: 0, kind: 1, op: 0, flags: 0, buf_alloc: 0, fwd_cnt: 0 };
        Self { buf_alloc: 0x1_0000, ..nothing }
    }
}

impl Script {
    /// Puts a packet's header at `at`.
    pub(crate) fn packet(&mut self, at: u64, packet: &Packet) -> &mut Self {
        let pair = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
        self.write(8, at, packet.cids.0).write(8, at + 8, packet.cids.1).write(
            8,
            at + 16,
            pair(packet.from, packet.to),
        );
        self.write(8, at + 24, pair(packet.len, u32::from(packet.kind) | u32::from(packet.op) << 16));
        self.write(8, at + 32, pair(packet.flags, packet.buf_alloc)).write(4, at + 40, u64::from(packet.fwd_cnt))
    }
}
