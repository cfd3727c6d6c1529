//! A virtio device and the guest's driver: no access to registers and memory makes a device panic, hang or grow, and after a
//! reset it serves a driver that behaves.
//!
//! The input is a choice of device, and then steps of ten bytes: what to do, a register or a place, three parameters. Everything
//! happens on one thread, so that an input always does the same.
#![no_main]

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Context;
use std::task::Waker;

use kiln::block::BlockBackend;
use kiln::hv::IrqLine;
use kiln::mem::GuestRam;
use kiln::transport::Connector;
use kiln::transport::GuestStream;
use kiln::units::Bytes;
use kiln::vmm::bus::BusDevice;
use kiln::vmm::devices::virtio::Doorbell;
use kiln::vmm::devices::virtio::Progress;
use kiln::vmm::devices::virtio::VirtioDevice;
use kiln::vmm::devices::virtio::Work;
use kiln::vmm::devices::virtio::balloon::Balloon;
use kiln::vmm::devices::virtio::blk::Blk;
use kiln::vmm::devices::virtio::mmio::Transport;
use kiln::vmm::devices::virtio::rng::Rng;
use kiln::vmm::devices::virtio::vsock::Vsock;
use kiln::vmm::devices::virtio::vsock::VsockConnector;
use libfuzzer_sys::fuzz_target;
use tokio::io::AsyncRead;
use tokio::io::AsyncWrite;
use tokio::io::ReadBuf;

const MEMORY: Bytes = Bytes(256 << 10);
/// Registers that matter, so that a byte finds them: all but those of the configuration space, and some of no meaning.
const REGISTERS: [u64; 32] = [
    0x00, 0x08, 0x10, 0x14, 0x20, 0x24, 0x30, 0x34, 0x38, 0x44, 0x50, 0x60, 0x64, 0x70, 0x80, 0x84, 0x90, 0x94, 0xa0, 0xa4, 0xb0,
    0xbc, 0xfc, 0x100, 0x104, 0x106, 0x108, 0x13c, 0x02, 0x71, 0xffc, 0xff8,
];
const STATUS: u64 = 0x70;
/// Where a driver that behaves has its first queue; the others follow.
const RINGS: u64 = 0x1000;
const QUEUE_BYTES: u64 = 0x1000;
const QUEUE_SIZE: u64 = 16;
const BUFFERS: u64 = 0x8000;
/// Work done between two steps at most: a driver that feeds its device for ever is not what is looked for.
const WORK_MAX: usize = 64;
/// Streams that this side has open at most.
const STREAMS_MAX: usize = 4;

fuzz_target!(|input: &[u8]| {
    let Some((choice, steps)) = input.split_first() else { return };
    let mut rig = Rig::new(*choice);
    if choice & 0x10 == 0 {
        rig.set_up();
    }
    steps.chunks_exact(10).for_each(|step| rig.step(step));
    rig.check();
});

#[derive(Debug)]
struct Line;

impl IrqLine for Line {
    fn raise(&self) {}
    fn set_level(&self, _high: bool) {}
}

#[derive(Debug)]
struct Disk;

impl BlockBackend for Disk {
    fn size(&self) -> Bytes {
        Bytes(0x8000)
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let end = offset.checked_add(buf.len() as u64);
        if end.is_none_or(|end| end > self.size().0) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        buf.fill(offset as u8);
        Ok(())
    }
}

/// A device, the memory of its guest, and this side of it.
struct Rig {
    ram: Arc<GuestRam>,
    device: Transport,
    work: Work,
    queues: usize,
    kind: u8,
    connector: Option<VsockConnector>,
    streams: Vec<Box<dyn GuestStream>>,
}

impl Rig {
    fn new(choice: u8) -> Self {
        let ram = Arc::new(GuestRam::new(MEMORY).expect("memory"));
        let kind = choice % 4;
        let mut connector = None;
        let (device, doorbell): (Box<dyn VirtioDevice>, Arc<Doorbell>) = match kind {
            0 => (Box::new(Blk::new(Arc::new(Disk), "disk")), Arc::default()),
            1 => (Box::new(Rng), Arc::default()),
            2 => {
                let (device, _, doorbell) = Balloon::new(Arc::clone(&ram));
                (Box::new(device), doorbell)
            }
            _ => {
                let (device, host, doorbell) = Vsock::new();
                connector = Some(host);
                (Box::new(device), doorbell)
            }
        };
        let queues = device.queue_sizes().len();
        let (device, work) = Transport::new(device, Arc::clone(&ram), Arc::new(Line), doorbell);
        Self { ram, device, work, queues, kind, connector, streams: Vec::new() }
    }

    fn set(&mut self, register: u64, value: u32) {
        self.device.write(register, &value.to_le_bytes());
    }

    fn get(&mut self, register: u64) -> u32 {
        let mut value = [0; 4];
        self.device.read(register, &mut value);
        u32::from_le_bytes(value)
    }

    /// What a driver that behaves does before its first request, with rings as new.
    fn set_up(&mut self) {
        for value in [0, 1, 3] {
            self.set(STATUS, value);
        }
        self.set(0x24, 1);
        self.set(0x20, 1);
        self.set(STATUS, 11);
        for n in 0..self.queues {
            let at = rings(n);
            self.store(at + 0x400, 0u32);
            self.store(at + 0x800, 0u32);
            self.set(0x30, n as u32);
            self.set(0x38, QUEUE_SIZE as u32);
            for (register, part) in [(0x80, at), (0x90, at + 0x400), (0xa0, at + 0x800)] {
                self.set(register, part as u32);
                self.set(register + 4, 0);
            }
            self.set(0x44, 1);
        }
        self.set(STATUS, 15);
    }

    /// Out of memory is nowhere.
    fn store<T: kiln::mem::Scalar>(&self, at: u64, value: T) {
        let _ = self.ram.store(at, value);
    }

    fn descriptor(&self, table: u64, n: u64, addr: u64, len: u32, flags: u16, next: u16) {
        let at = table.wrapping_add(n * 16);
        self.store(at, addr);
        self.store(at.wrapping_add(8), u64::from(len) | u64::from(flags) << 32 | u64::from(next) << 48);
    }

    /// Makes `head` available on a queue, and has the device look at it.
    fn offer(&mut self, queue: usize, head: u16) {
        let available = rings(queue) + 0x400;
        let index: u16 = self.ram.load(available + 2).unwrap_or_default();
        self.store(available + 4 + u64::from(index) % QUEUE_SIZE * 2, head);
        self.store(available + 2, index.wrapping_add(1));
        self.set(0x50, queue as u32);
        self.work();
    }

    fn work(&mut self) {
        for _ in 0..WORK_MAX {
            if self.work.step() == Progress::Idle {
                return;
            }
        }
    }

    fn step(&mut self, step: &[u8]) {
        let [what, place, a, b, c, d, e, f, g, h] = *step else { return };
        let value = u32::from_le_bytes([a, b, c, d]);
        let wide = u64::from(value) | u64::from(u32::from_le_bytes([e, f, g, h])) << 32;
        let register = REGISTERS[usize::from(place) % REGISTERS.len()];
        let queue = usize::from(place) % self.queues;
        match what % 12 {
            0 => self.set(register, value),
            1 => self.device.write(register, &wide.to_le_bytes()[..1 << (place >> 6)]),
            2 => self.device.read(register, &mut [0; 8][..1 << (place >> 6)]),
            // An address near something, or any.
            3 => self.descriptor(rings(queue), u64::from(a) % QUEUE_SIZE, near(u16::from_le_bytes([b, c])), len(d, e), u16::from(f), g.into()),
            4 => self.descriptor(rings(queue), u64::from(place) / 16, wide, len(a, b), u16::from(c), d.into()),
            5 => self.descriptor(near(u16::from_le_bytes([a, b])) & !15, u64::from(place), near(u16::from_le_bytes([c, d])), len(e, f), u16::from(g), h.into()),
            6 => self.offer(queue, u16::from_le_bytes([a, b & 0x1f])),
            7 => self.store(rings(queue) + 0x400 + u64::from(place / 16) * 2, u16::from_le_bytes([a, b])),
            8 => self.store(BUFFERS + u64::from(place) * 8, wide),
            9 => self.set_up(),
            10 => self.host(place, value),
            _ => self.work(),
        }
    }

    /// This side of the sockets does something.
    fn host(&mut self, what: u8, value: u32) {
        if self.connector.is_none() {
            return;
        }
        let cx = &mut Context::from_waker(Waker::noop());
        let which = usize::from(what >> 4) % STREAMS_MAX;
        let size = value as usize % 0x2_0000;
        if what % 4 == 0 && self.streams.len() < STREAMS_MAX {
            self.connect();
        } else if let Some(stream) = self.streams.get_mut(which) {
            match what % 4 {
                1 => drop(Pin::new(stream).poll_write(cx, &vec![7; size])),
                2 => drop(Pin::new(stream).poll_read(cx, &mut ReadBuf::new(&mut vec![0; size]))),
                _ => drop(self.streams.swap_remove(which)),
            }
        }
        self.work();
    }

    /// Asks for a connection, and answers as the guest would if it has a buffer for the request.
    fn connect(&mut self) {
        let Some(connector) = self.connector.clone() else { return };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
        let stream = runtime.block_on(async {
            let mut connecting = connector.connect(1028);
            let cx = &mut Context::from_waker(Waker::noop());
            let _ = connecting.as_mut().poll(cx);
            self.answer();
            match connecting.as_mut().poll(cx) {
                std::task::Poll::Ready(Ok(stream)) => Some(stream),
                _ => None,
            }
        });
        self.streams.extend(stream);
    }

    /// The guest takes one packet, and responds to its port.
    fn answer(&mut self) {
        let (request, response) = (BUFFERS + 0x1000, BUFFERS + 0x1800);
        self.descriptor(rings(0), 15, request, 0x800, 2, 0);
        self.offer(0, 15);
        let port: u32 = self.ram.load(request + 16).unwrap_or_default();
        for (at, value) in [(0, 3u64), (8, 2), (16, 1028 | u64::from(port) << 32), (24, 1 << 32 | 2 << 48), (32, 0xffff << 32), (40, 0)] {
            self.store(response + at, value);
        }
        self.descriptor(rings(1), 15, response, 44, 0, 0);
        self.offer(1, 15);
    }

    /// A driver that begins anew and behaves is served.
    fn check(&mut self) {
        self.set(STATUS, 0);
        assert_eq!(self.get(STATUS), 0);
        self.set_up();
        assert_eq!(self.get(STATUS), 15);
        let queue = if self.kind == 3 { 1 } else { 0 };
        let flags = if self.kind == 1 { 2 } else { 0 };
        let len = match self.kind {
            2 => 0,
            3 => 44,
            _ => 16,
        };
        for word in 0..6 {
            self.store(BUFFERS + word * 8, 0u64);
        }
        if self.kind == 0 {
            self.descriptor(rings(0), 1, BUFFERS + 0x800, 513, 2, 0);
            self.descriptor(rings(0), 0, BUFFERS, len, 1, 1);
        } else {
            self.descriptor(rings(queue), 0, BUFFERS, len, flags, 0);
        }
        self.offer(queue, 0);
        let used: u16 = self.ram.load(rings(queue) + 0x802).unwrap_or_default();
        assert_eq!((used, self.get(STATUS)), (1, 15), "the device serves a driver that behaves");
    }
}

fn rings(queue: usize) -> u64 {
    RINGS + QUEUE_BYTES * queue as u64
}

/// An address in memory, about its end, or far away.
fn near(choice: u16) -> u64 {
    match choice >> 14 {
        0 | 1 => u64::from(choice) * 8,
        2 => MEMORY.0 - 0x1000 + u64::from(choice & 0x3fff),
        _ => u64::MAX - u64::from(choice & 0x3fff),
    }
}

/// Short, or of any order of magnitude.
fn len(a: u8, b: u8) -> u32 {
    u32::from(a).wrapping_shl(u32::from(b))
}
