//! Drivers that do anything to their devices, in any order. A failure says which seed to put into [`SEEDS`] to see it again.
#![allow(clippy::print_stdout, reason = "the seed, in the output of a test that fails")]

#[path = "support/bare.rs"]
mod bare;
#[path = "support/bare_machine.rs"]
mod bare_machine;
#[path = "support/observed.rs"]
mod observed;
#[path = "support/puppet.rs"]
mod puppet;
#[path = "support/virtio_driver.rs"]
mod virtio_driver;

use std::time::{Duration, SystemTime};

use kiln::transport::Connector;
use observed::Observed;
use puppet::Script;
use virtio_driver::*;

/// Always tried, beside one that differs each time.
const SEEDS: [u64; 2] = [1, 0x6b69_6c6e];
/// Scripts of a seed.
const ROUNDS: u32 = 150;
/// Where the drivers put indirect tables.
const TABLE: u64 = BUFFERS + 0x2_0000;

/// A driver of no principles (splitmix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len() as u64) as usize]
    }

    /// An address that is not in memory, or the last bytes of it.
    fn outside(&mut self) -> u64 {
        let anywhere = self.next() | 1 << 40;
        self.of(&[
            RAM_END,
            RAM_END - 1,
            RAM_END - 16,
            0xbfff_fff0,
            0xc000_0000,
            0xd000_0000,
            0xffff_fff0,
            1 << 32,
            u64::MAX - 15,
            u64::MAX,
            anywhere,
        ])
    }

    /// In the drivers' buffers. Balloons read their lists from the first page, which names no page of anybody else's.
    fn buffer(&mut self, device: Device) -> u64 {
        if device == Device::Balloon {
            BUFFERS + self.below(0x200) * 4
        } else {
            BUFFERS + self.below(PLAY.end - BUFFERS - 0x2000)
        }
    }

    fn descriptor(&mut self, device: Device) -> Descriptor {
        let flags = if self.one_in(16) { self.next() as u16 } else { self.below(4) as u16 };
        let next = if self.one_in(8) { self.next() as u16 } else { self.below(QUEUE_SIZE.into()) as u16 };
        if self.one_in(6) {
            let len = self.of(&[0, 16, 32, 48, 256, 0x1000, 17, 0xf_fff0, 0xffff_fff0]);
            let addr = if self.one_in(8) { self.outside() } else { TABLE + self.below(8) * 16 };
            return Descriptor { addr, len, flags: flags | INDIRECT, next };
        }
        let len = match self.below(8) {
            0 => self.of(&[RAM_END as u32, 0x7fff_ffff, u32::MAX]),
            1 => 0,
            2 => self.below(64) as u32,
            _ => self.of(&[1, 4, 16, 44, 64, 512, 0x400, 0x800]),
        };
        let addr = if self.one_in(10) { self.outside() } else { self.buffer(device) };
        Descriptor { addr, len, flags: flags & !INDIRECT, next }
    }

    /// Rings of a kind lie where such rings lie, or nowhere: what one kind makes of another's bytes may name any memory.
    fn rings(&mut self, n: usize) -> Rings {
        let mut chosen = rings(n);
        if self.one_in(6) {
            let other = rings(self.below(3) as usize);
            match self.below(7) {
                0 => chosen.size = self.of(&[0, 1, 2, 3, 8, 64, 256, 512, 0xffff, 0x1_0000, 0xffff_ffff]),
                1 => chosen.descriptors = self.outside(),
                2 => chosen.available = self.outside(),
                3 => chosen.used = self.outside(),
                4 => chosen.descriptors = other.descriptors,
                5 => chosen.available = other.available,
                _ => chosen.used = other.used + self.below(4),
            }
        }
        chosen
    }
}

/// Writes that set the driver's buffers up for its kind of device.
fn prepare(random: &mut Random, device: Device, script: &mut Script) {
    match device {
        Device::Blk => {
            for n in 0..8 {
                let kind = random.of(&[0, 0, 0, 1, 4, 8, 11, 13, 0xffff_ffff]);
                let sector = random.of(&[0, 1, 127, 128, u64::MAX, 1 << 55]);
                script.write(8, BUFFERS + n * 16, kind).write(8, BUFFERS + n * 16 + 8, sector);
            }
        }
        Device::Vsock => {
            for n in 0..8 {
                let packet = Packet {
                    cids: random.of(&[(3, 2), (3, 2), (3, 2), (2, 3), (3, u64::MAX)]),
                    from: random.of(&[1028, 7, 0, u32::MAX]),
                    to: 1024 + random.below(64) as u32,
                    len: random.of(&[0, 0, 1, 20, 0x1_0000, u32::MAX]),
                    kind: random.of(&[1, 1, 1, 2, 0]),
                    op: random.below(9) as u16,
                    flags: random.below(4) as u32,
                    buf_alloc: random.of(&[0, 0x1_0000, u32::MAX]),
                    fwd_cnt: random.of(&[0, 1, u32::MAX]),
                };
                script.packet(BUFFERS + n * 64, &packet);
            }
        }
        Device::Rng => {}
        Device::Balloon => {
            for n in 0..0x400 {
                let own = (PLAY.start >> 12) + random.below((PLAY.end - PLAY.start) >> 12);
                let page = random.of(&[own, own, RAM_END >> 12, 0xc_0000, 0xf_ffff, 0xffff_ffff]);
                script.write(4, BUFFERS + n * 4, page);
            }
        }
    }
}

fn step(random: &mut Random, device: Device, script: &mut Script) {
    let queue = random.below(device.queues().len() as u64) as usize;
    match random.below(20) {
        0..6 => {
            let table = if random.one_in(3) { TABLE } else { rings(queue).descriptors };
            let descriptor = random.descriptor(device);
            script.descriptor(table, random.below(QUEUE_SIZE.into()), &descriptor);
        }
        6..12 => {
            let head = if random.one_in(12) { random.next() as u16 } else { random.below(QUEUE_SIZE.into()) as u16 };
            let entry = if random.one_in(12) { random.next() as u16 } else { random.below(40) as u16 };
            script.offer(device, queue, entry, head);
        }
        12 => {
            script.notify(device, random.next() as usize);
        }
        13 => {
            // Any register but those that say where a ring is.
            let register = random.of(&[
                0, 0x10, 0x14, 0x20, 0x24, 0x30, 0x34, 0x38, 0x44, 0x60, 0x64, 0xb0, 0xfc, 0x100, 0x104, 0x107, 0x13c,
                0xfff,
            ]);
            let width = random.of(&[1, 2, 4, 8]);
            script.write(width, device.base() + register, random.next() >> random.below(64));
        }
        14 => {
            script.register(device, STATUS, random.next() >> random.below(64));
        }
        15 => {
            script.read(random.of(&[1, 2, 4, 8]), device.base() + random.below(0x1000));
        }
        16..19 => {
            script.spin(random.below(400));
        }
        _ => {
            script.reset(device);
        }
    }
}

fn round(random: &mut Random) -> (Device, Script) {
    let device = random.of(&DEVICES);
    let mut script = Script::default();
    prepare(random, device, &mut script);
    if !random.one_in(4) {
        let unknown = random.next();
        let features = random.of(&[VERSION_1, VERSION_1, VERSION_1 | EVENT_IDX, VERSION_1 | 1 << 28, 0, unknown]);
        script.negotiate(device, features);
        for n in 0..device.queues().len() {
            if !random.one_in(12) {
                let chosen = random.rings(n);
                script.set_queue(device, n, &chosen).write(4, rings(n).available, 0);
            }
        }
        script.register(device, STATUS, 15);
    }
    for _ in 0..20 + random.below(60) {
        step(random, device, &mut script);
    }
    (device, script)
}

/// Says which seed was at work when a test fails.
struct Seed(u64);

impl Drop for Seed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("the seed was {:#x}", self.0);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_driver_harms_more_than_its_device() {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("a clock").as_nanos() as u64;
    for seed in SEEDS.into_iter().chain([now]) {
        let (_said, mut random) = (Seed(seed), Random(seed));
        let mut observed = Observed::start().await;
        for n in 1..=ROUNDS {
            let (_, script) = round(&mut random);
            // The host wants something meanwhile, and does not get it.
            let connector = observed.puppet.machine.connector().clone();
            let attempt = tokio::spawn(async move { connector.connect(1028).await.map(drop) });
            observed.puppet.run(&script).await;
            attempt.abort();
            let _ = attempt.await;
            observed.check(true).await;
            if random.one_in(4) {
                let _ = observed.puppet.machine.give_memory_back(kiln::units::Bytes::mib(4), Duration::ZERO).await;
            }
            if n % 10 == 0 {
                observed.puppet.check_devices().await;
            }
        }
        observed.end().await;
    }
}
