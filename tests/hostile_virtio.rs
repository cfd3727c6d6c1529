//! Drivers that do to their devices what no driver may: the host goes on, the machine answers, no memory that was not
//! offered changes, and after a reset the device serves a driver that behaves.
#![allow(clippy::print_stdout, reason = "what was tried last, in the output of a test that fails")]

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

use std::io::ErrorKind;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bare_machine::fresh;
use bare_machine::transport;
use futures::FutureExt;
use kiln::hv::soft::Soft;
use kiln::transport::Connector;
use kiln::vmm::Machine;
use kiln::vmm::MachineEnd;
use kiln::vmm::devices::virtio::DeviceState;
use observed::Observed;
use puppet::PATIENCE;
use puppet::Puppet;
use puppet::Script;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use virtio_driver::*;

/// Where chains in the tests below have an indirect table.
const TABLE: u64 = BUFFERS + 0x2_0000;

/// Chains that no driver may make, each with a name. `flags` are those of a buffer as the device wants it.
fn chains(flags: u16) -> Vec<(&'static str, Vec<Descriptor>)> {
    let at = |addr, len, flags, next| Descriptor { addr, len, flags, next };
    let other = flags ^ WRITE;
    vec![
        ("a loop to itself", vec![at(BUFFERS, 64, flags | NEXT, 0)]),
        ("a loop of two", vec![at(BUFFERS, 64, flags | NEXT, 1), at(BUFFERS, 64, flags | NEXT, 0)]),
        ("a loop of both directions", vec![at(BUFFERS, 64, flags | NEXT, 1), at(BUFFERS, 64, other | NEXT, 0)]),
        ("a next descriptor past the table", vec![at(BUFFERS, 64, flags | NEXT, QUEUE_SIZE)]),
        ("a next descriptor far past the table", vec![at(BUFFERS, 64, flags | NEXT, u16::MAX)]),
        ("the other direction", vec![at(BUFFERS, 4096, other, 0)]),
        (
            "directions in turns",
            vec![at(BUFFERS, 64, WRITE | NEXT, 1), at(BUFFERS + 64, 64, NEXT, 2), at(BUFFERS, 64, WRITE, 0)],
        ),
        ("no byte", vec![at(BUFFERS, 0, flags, 0)]),
        ("one byte", vec![at(BUFFERS, 1, flags, 0)]),
        ("no bytes for ever", vec![at(BUFFERS, 0, flags | NEXT, 0)]),
        ("all bytes there are", vec![at(BUFFERS, u32::MAX, flags, 0)]),
        ("four gigabytes in two", vec![at(BUFFERS, 1 << 31, flags | NEXT, 1), at(BUFFERS, 1 << 31, flags, 0)]),
        ("across the end of memory", vec![at(RAM_END - 16, 4096, flags, 0)]),
        ("the last byte of memory", vec![at(RAM_END - 1, 1, flags, 0)]),
        ("just past memory", vec![at(RAM_END, 64, flags, 0)]),
        ("the devices' registers", vec![at(0xd000_0000, 4096, flags, 0)]),
        ("the last address", vec![at(u64::MAX, 1, flags, 0)]),
        ("around the last address", vec![at(u64::MAX - 8, 64, flags, 0)]),
        ("around the last address to memory", vec![at(u64::MAX - 15, 16 + 4096, flags, 0)]),
        ("unknown flags", vec![at(BUFFERS, 64, 0xfff8 | flags, 0)]),
        ("an indirect table of nothing", vec![at(TABLE, 0, INDIRECT, 0)]),
        ("an indirect table that ends within one", vec![at(TABLE, 17, INDIRECT, 0)]),
        ("an indirect table of all there is", vec![at(TABLE, 0xffff_fff0, INDIRECT, 0)]),
        ("an indirect table of all that is allowed", vec![at(TABLE, 0xf_fff0, INDIRECT, 0)]),
        ("an indirect table past memory", vec![at(RAM_END, 64, INDIRECT, 0)]),
        ("an indirect table across the end of memory", vec![at(RAM_END - 24, 160, INDIRECT, 0)]),
        ("an indirect table at the last address", vec![at(u64::MAX - 7, 160, INDIRECT, 0)]),
        ("an indirect table at no boundary", vec![at(TABLE + 3, 160, INDIRECT, 0)]),
        ("an indirect table that goes on", vec![at(TABLE, 32, INDIRECT | NEXT, 1), at(BUFFERS, 64, flags, 0)]),
        ("an indirect table to write to", vec![at(TABLE, 32, INDIRECT | WRITE, 0)]),
        ("a queue's own table as an indirect one", vec![at(rings(0).descriptors, 256, INDIRECT, 0)]),
    ]
}

/// Indirect tables that no driver may make, at `TABLE`.
fn tables(flags: u16) -> Vec<(&'static str, Vec<Descriptor>)> {
    let at = |addr, len, flags, next| Descriptor { addr, len, flags, next };
    vec![
        ("zeros", vec![at(0, 0, 0, 0), at(0, 0, 0, 0)]),
        ("a loop", vec![at(BUFFERS, 16, flags | NEXT, 1), at(BUFFERS, 16, flags | NEXT, 0)]),
        ("a table in a table", vec![at(TABLE, 32, INDIRECT, 0), at(BUFFERS, 16, flags, 0)]),
        ("a table after a buffer", vec![at(BUFFERS, 16, flags | NEXT, 1), at(TABLE, 32, INDIRECT, 0)]),
        ("one buffer for ever", vec![at(BUFFERS, 0x1_0000, flags | NEXT, 0)]),
    ]
}

/// Puts into the driver's buffers what the device can make the most of.
fn fill(puppet: &Puppet, device: Device) {
    let word = match device {
        // A page that is not memory: whatever part of the buffers is taken for a list, it names none of the guest's.
        Device::Balloon => RAM_END >> 12 | (RAM_END >> 12) << 32,
        _ => 0,
    };
    for at in (BUFFERS..BUFFERS + 0x4_0000).step_by(8) {
        puppet.ram().store(at, word).expect("in memory");
    }
}

/// A chain that the device serves and gives back.
fn good_chain(device: Device, queue: usize) -> Vec<Descriptor> {
    match device {
        Device::Blk => vec![part(BUFFERS, 16, 0), part(BUFFERS + 0x1000, 512, WRITE), part(BUFFERS + 0x800, 1, WRITE)],
        _ => vec![part(BUFFERS, 0x800, direction(device, queue))],
    }
}

/// The direction in which a device uses a queue's buffers.
fn direction(device: Device, queue: usize) -> u16 {
    match (device, queue) {
        (Device::Rng, _) | (Device::Vsock, 0 | 2) => WRITE,
        _ => 0,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_chain_harms_more_than_its_device() {
    let mut observed = Observed::start().await;
    for device in DEVICES {
        for (queue, _) in device.queues().iter().enumerate() {
            let flags = direction(device, queue);
            for (table_name, table) in tables(flags) {
                for (name, chain) in chains(flags) {
                    // Only indirect chains see the table.
                    if table_name != "zeros" && !chain.iter().any(|part| part.flags & INDIRECT != 0) {
                        continue;
                    }
                    println!("{device:?} {queue}: {name}, {table_name}");
                    fill(&observed.puppet, device);
                    let mut script = Script::default();
                    script.set_up(device, VERSION_1 | EVENT_IDX);
                    for (n, part) in (0..).zip(&table) {
                        script.descriptor(TABLE, n, part);
                    }
                    for (n, part) in (0..).zip(&chain) {
                        script.descriptor(rings(queue).descriptors, n, part);
                    }
                    for entry in 0..3 {
                        script.offer(device, queue, entry, 0);
                    }
                    script.spin(2000).read(4, device.base() + STATUS);
                    observed.puppet.run(&script).await;
                    observed.check(true).await;
                }
                observed.puppet.check_device(device).await;
            }
        }
    }
    observed.puppet.check_devices().await;
    observed.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn buffers_of_more_than_four_gigabytes_stop_the_count_and_not_the_host() {
    let mut observed = Observed::start().await;
    // 32767 descriptors of 256 KiB, none of them past memory. The table is written from here, because it is long.
    for (device, queue) in
        [(Device::Rng, 0), (Device::Blk, 0), (Device::Vsock, 0), (Device::Vsock, 1), (Device::Balloon, 0)]
    {
        let flags = direction(device, queue);
        fill(&observed.puppet, device);
        let mut script = Script::default();
        script.set_up(device, VERSION_1);
        let table = PLAY.end - 0x8_0000;
        for n in 0..0x7fffu64 {
            let ram = observed.puppet.ram();
            ram.store(table + n * 16, BUFFERS).expect("in memory");
            ram.store(table + n * 16 + 8, u64::from(0x4_0000u32) | u64::from(flags | NEXT) << 32 | (n + 1) << 48)
                .expect("in memory");
        }
        script.chain(device, queue, 0, &[part(table, 0x7fff0, INDIRECT)]);
        script.spin(50_000).read(4, device.base() + STATUS);
        observed.puppet.run(&script).await;
        observed.check(true).await;
        observed.puppet.check_device(device).await;
    }
    observed.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn jumps_of_the_available_index_stop_the_device() {
    let mut observed = Observed::start().await;
    for device in DEVICES {
        for (queue, _) in device.queues().iter().enumerate() {
            // One in turn, then the jump; which of them are too far follows from that.
            fill(&observed.puppet, device);
            for jump in [QUEUE_SIZE + 2, 0x7fff, 0x8000, 0xfff0, 0, 0xffff] {
                let mut script = Script::default();
                script.set_up(device, VERSION_1);
                script.chain(device, queue, 0, &good_chain(device, queue));
                // Receive and event queues are not looked at while there is nothing to say.
                let idle = device == Device::Vsock && queue != 1;
                if !idle {
                    script.await_used(queue, 0);
                }
                script.write(2, rings(queue).available + 2, u64::from(jump)).notify(device, queue);
                if !idle {
                    script.await_bits(device.base() + STATUS, NEEDS_RESET);
                }
                observed.puppet.run(&script).await;
                observed.check(true).await;
            }
            observed.puppet.check_device(device).await;
        }
    }
    observed.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn heads_that_are_no_descriptors_stop_the_device() {
    let mut observed = Observed::start().await;
    for (device, queue) in
        [(Device::Blk, 0), (Device::Vsock, 1), (Device::Rng, 0), (Device::Balloon, 0), (Device::Balloon, 1)]
    {
        for head in [QUEUE_SIZE, 255, 0x7fff, u16::MAX] {
            let mut script = Script::default();
            script.set_up(device, VERSION_1).offer(device, queue, 0, head);
            script.await_bits(device.base() + STATUS, NEEDS_RESET);
            observed.puppet.run(&script).await;
        }
        observed.check(true).await;
        observed.puppet.check_device(device).await;
    }
    observed.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn queues_where_none_can_be_need_a_reset_and_are_not_used() {
    let mut observed = Observed::start().await;
    let usual = rings(0);
    let outside = [RAM_END, RAM_END - 16, 0xc000_0000, 0xd000_0000, 0x1_0000_0000, 1 << 52, !15, u64::MAX];
    let mut bad = Vec::new();
    for at in outside {
        bad.push(Rings { descriptors: at, ..usual });
        bad.push(Rings { available: at, ..usual });
        bad.push(Rings { used: at, ..usual });
    }
    // At no boundary that virtio allows: not to be used anywhere else either.
    for offset in [1, 2, 3, 4, 8, 15] {
        bad.push(Rings { descriptors: usual.descriptors + offset, ..usual });
    }
    bad.push(Rings { available: usual.available + 1, ..usual });
    bad.extend([1, 2, 3].map(|offset| Rings { used: usual.used + offset, ..usual }));
    bad.extend([0, 3, 12, 512, 0xffff, 0x1_0000, 0x1_0010, 0xffff_ffff].map(|size| Rings { size, ..usual }));
    for device in DEVICES {
        for rings_0 in &bad {
            let mut script = Script::default();
            script.set_up(device, VERSION_1);
            script.negotiate(device, VERSION_1);
            for n in 0..device.queues().len() {
                script.set_queue(device, n, if n == 0 { rings_0 } else { &usual });
            }
            script.register(device, STATUS, 15).read(4, device.base() + STATUS);
            script.chain(device, 0, 0, &[part(BUFFERS, 64, direction(device, 0))]).spin(1000);
            script.read(2, usual.used + 2);
            let read = observed.puppet.run(&script).await;
            assert_eq!(read[0] & u64::from(NEEDS_RESET), u64::from(NEEDS_RESET), "{device:?} accepts {rings_0:x?}");
            assert_eq!(read[1], 0, "{device:?} uses a ring where none was: {rings_0:x?}");
        }
        observed.check(true).await;
        observed.puppet.check_device(device).await;
    }
    observed.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rings_that_overlap_are_the_guests_own_matter() {
    let mut observed = Observed::start().await;
    let at = rings(0).descriptors;
    for device in DEVICES {
        for (available, used) in
            [(at, at + 0x1000), (at + 0x1000, at), (at + 0x1000, at + 0x1000), (at + 0x1004, at + 0x1000), (at, at)]
        {
            fill(&observed.puppet, device);
            let mut script = Script::default();
            script.negotiate(device, VERSION_1);
            for n in 0..device.queues().len() {
                script.set_queue(device, n, &Rings { available, used, ..rings(0) });
            }
            script.register(device, STATUS, 15);
            for entry in 0..40 {
                script.write(2, available + 2, entry).descriptor(
                    at,
                    entry % 16,
                    &part(BUFFERS, 64, direction(device, 0)),
                );
                script.notify(device, 0).spin(20);
            }
            // What one ring makes of another's bytes may be anywhere, in what the guest runs by as well.
            if !survives(&mut observed, &script).await {
                abandon(observed).await;
                observed = Observed::start().await;
            }
        }
        observed.puppet.check_device(device).await;
    }
    observed.end().await;
}

/// Has the guest execute a script by which a device may overwrite the guest's program, page tables or script, or take a page
/// of them away; false if it did. Only then may the guest hang or be gone.
async fn survives(observed: &mut Observed, script: &Script) -> bool {
    observed.puppet.begin(script);
    let began = Instant::now();
    while !observed.puppet.finished(Duration::from_millis(500)).await {
        if !observed.puppet.is_intact(script) {
            return false;
        }
        assert!(began.elapsed() < PATIENCE, "the guest hangs");
        let end = observed.puppet.machine.ended().now_or_never();
        assert!(end.is_none(), "the guest is gone, and nothing has overwritten it: {end:?}");
    }
    // It pauses the machine: what the devices have begun is done.
    observed.check(false).await;
    observed.puppet.is_intact(script)
}

/// Ends a machine whose guest is in an unknown state.
async fn abandon(observed: Observed) {
    observed.puppet.machine.stop();
    let end = tokio::time::timeout(PATIENCE, observed.puppet.machine.ended()).await.expect("it stops");
    assert!(!matches!(end, MachineEnd::EnginePanicked), "{end:?}");
    Observed::check_panics();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rings_over_the_running_kernel_end_the_guest_at_most() {
    for device in DEVICES {
        let observed = Observed::start().await;
        let over = Rings { size: 16, descriptors: bare::CODE, available: BUFFERS, used: bare::CODE };
        let mut script = Script::default();
        script.negotiate(device, VERSION_1);
        for n in 0..device.queues().len() {
            script.set_queue(device, n, &over);
        }
        script.register(device, STATUS, 15).write(4, BUFFERS, 0x1_0000).notify(device, 0).spin(100_000);
        observed.puppet.begin(&script);
        // It may go on, hang or be gone.
        observed.puppet.finished(Duration::from_millis(500)).await;
        abandon(observed).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn registers_answer_in_every_width_at_every_offset() {
    let mut observed = Observed::start().await;
    for device in DEVICES {
        for value in [0, 1, 15, u64::MAX, 0x8000_0000, PLAY.start] {
            let mut script = Script::default();
            script.set_up(device, VERSION_1);
            // All of the registers and of any configuration space, and the page's end.
            for offset in (0..0x148).chain(0xff0..0x1000) {
                for width in [1, 2, 4, 8] {
                    script.read(width, device.base() + offset).write(width, device.base() + offset, value);
                }
            }
            observed.puppet.run(&script).await;
        }
        let mut script = Script::default();
        script.reset(device).read(4, device.base() + STATUS).read(4, device.base()).read(1, device.base());
        script.read(4, device.base() + 0xffc).read(8, device.base() + 0xff8).read(2, device.base() + 0xfff);
        let [status, magic, byte, past, ..] = observed.puppet.run(&script).await[..] else { panic!("four reads") };
        assert_eq!((status, magic, byte, past), (0, 0x7472_6976, 0, 0), "{device:?}");
        observed.check(true).await;
        observed.puppet.check_device(device).await;
    }
    observed.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_never_agreed_to_does_not_start_a_device() {
    let mut observed = Observed::start().await;
    for device in DEVICES {
        for features in [0, EVENT_IDX, u64::MAX, VERSION_1 | 1 << 63, VERSION_1 | 1 << 34, VERSION_1 | 1 << 40] {
            let mut script = Script::default();
            script.negotiate(device, features);
            for n in 0..device.queues().len() {
                script.set_queue(device, n, &rings(n));
            }
            script.register(device, STATUS, 15).read(4, device.base() + STATUS);
            script.chain(device, 0, 0, &[part(BUFFERS, 64, direction(device, 0))]).spin(500).read(2, rings(0).used + 2);
            observed.puppet.ram().store(rings(0).used, 0u64).expect("in memory");
            assert_eq!(observed.puppet.run(&script).await, [3, 0], "{device:?} with {features:#x}");
        }
        // Every status that there is, from every other.
        for from in 0..16 {
            let mut script = Script::default();
            for to in 0..256 {
                script.reset(device).register(device, STATUS, from).register(device, STATUS, to);
            }
            observed.puppet.run(&script).await;
        }
        observed.check(true).await;
        observed.puppet.check_device(device).await;
    }
    observed.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn queues_that_change_while_they_are_used_stay_as_they_were() {
    let mut observed = Observed::start().await;
    for device in [Device::Blk, Device::Rng, Device::Balloon] {
        fill(&observed.puppet, device);
        let mut script = Script::default();
        script.set_up(device, VERSION_1);
        script.register(device, 0x44, 0).set_queue(device, 0, &Rings { size: 2, used: RAM_END, ..rings(1) });
        script.register(device, 0x20, 0).register(device, 0x24, 1).register(device, STATUS, 15);
        script.chain(device, 0, 0, &good_chain(device, 0)).await_used(0, 0);
        observed.puppet.run(&script).await;
        observed.check(true).await;
        observed.puppet.check_device(device).await;
    }
    observed.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reset_in_the_middle_of_requests_ends_them() {
    let mut observed = Observed::start().await;
    for round in 0..60 {
        for device in DEVICES {
            fill(&observed.puppet, device);
            let mut script = Script::default();
            script.set_up(device, VERSION_1);
            if device == Device::Vsock {
                script.packet(BUFFERS, &Packet { op: 1, ..Packet::default() });
            }
            for queue in 0..device.queues().len() {
                script.chain(device, queue, 0, &good_chain(device, queue));
                for entry in 1..QUEUE_SIZE {
                    script.offer(device, queue, entry, 0);
                }
            }
            script.spin(round * 10).reset(device);
            // After the reset the rings are memory as any other.
            for queue in 0..device.queues().len() {
                script.write(8, rings(queue).used, 0).write(4, rings(queue).available, 0);
            }
            script.spin(2000);
            for queue in 0..device.queues().len() {
                script.read(8, rings(queue).used);
            }
            let used = observed.puppet.run(&script).await;
            assert!(used.iter().all(|word| *word == 0), "{device:?} writes to a ring after its reset: {used:x?}");
        }
    }
    observed.check(true).await;
    observed.puppet.check_devices().await;
    observed.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_that_a_disk_cannot_serve_are_answered_or_stop_it() {
    let mut observed = Observed::start().await;
    let (header, status, data) = (BUFFERS, BUFFERS + 0x800, BUFFERS + 0x1000);
    // The disk has 128 sectors.
    let requests = [
        (0, 127, 512, 0),
        (0, 127, 1024, 1),
        (0, 128, 512, 1),
        (0, u64::MAX, 512, 1),
        (0, u64::MAX / 512, 512, 1),
        (0, u64::MAX / 512 + 1, 512, 1),
        (0, 0, 511, 1),
        (0, 0, 0, 0),
        (0, 128, 0, 0),
        (0, 129, 0, 1),
        (0, 0, 0x1_0000, 0),
        (0, 0, 0x2_0000, 1),
        (1, 0, 512, 1),
        (4, u64::MAX, 0, 0),
        (8, u64::MAX, 0, 0),
        (8, 0, 1, 0),
        (8, 0, 4096, 0),
        (11, 0, 16, 2),
        (13, 0, 16, 2),
        (u64::from(u32::MAX), 0, 512, 2),
    ];
    for (kind, sector, len, expected) in requests {
        let mut script = Script::default();
        script
            .set_up(Device::Blk, VERSION_1)
            .write(8, header, kind)
            .write(8, header + 8, sector)
            .write(1, status, 0xaa);
        let parts = [part(header, 16, 0), part(data, len, WRITE), part(status, 1, WRITE)];
        script.chain(Device::Blk, 0, 0, &parts).await_used(0, 0).read(1, status).read(4, rings(0).used + 8);
        let [found, written] = observed.puppet.run(&script).await[..] else { panic!("two reads") };
        assert_eq!(found, expected, "request {kind} of {len} bytes at {sector:#x}");
        assert!(written <= u64::from(len) + 1, "{written} bytes written to {len}");
    }
    for parts in [
        &[part(header, 16, 0)][..],
        &[part(header, 15, 0), part(status, 1, WRITE)],
        &[part(status, 1, WRITE)],
        &[part(header, 16, 0), part(data, 512, WRITE), part(status, 1, 0), part(RAM_END, 1, WRITE)],
        &[part(header, 16, 0), part(data, 0, WRITE)],
    ] {
        let mut script = Script::default();
        script.set_up(Device::Blk, VERSION_1).chain(Device::Blk, 0, 0, parts);
        script.await_bits(Device::Blk.base() + STATUS, NEEDS_RESET);
        observed.puppet.run(&script).await;
        observed.check(true).await;
        observed.puppet.check_device(Device::Blk).await;
    }
    observed.end().await;
}

/// A transmit queue on which each packet is a chain of its own, over and over.
fn flood(script: &mut Script, packets: &[Packet], times: u16) {
    let ring = rings(1);
    for (n, packet) in (0..).zip(packets) {
        script.packet(BUFFERS + n * 64, packet);
        script.descriptor(ring.descriptors, n, &part(BUFFERS + n * 64, 44, 0));
    }
    for entry in 0..times {
        script.offer(Device::Vsock, 1, entry, entry % packets.len() as u16);
        // Or the index would be ahead by more than the queue has.
        if entry % QUEUE_SIZE == QUEUE_SIZE - 1 {
            script.spin(500);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn packets_that_no_socket_sends_are_refused_or_stop_the_device() {
    let mut observed = Observed::start().await;
    let usual = Packet { op: 1, ..Packet::default() };
    // Without a connection: refused, dropped, or answered in any number.
    let mut strange: Vec<Packet> = (0..12).map(|op| Packet { op, ..usual }).collect();
    strange.extend([0, 2, 3, u16::MAX].map(|kind| Packet { kind, ..usual }));
    strange.extend([(0, 2), (2, 3), (3, 3), (3, 0), (u64::MAX, 2), (3, u64::MAX)].map(|cids| Packet { cids, ..usual }));
    strange.extend([0, 1, u32::MAX - 1, u32::MAX].map(|port| Packet { from: port, to: port, ..usual }));
    for packets in strange.chunks(QUEUE_SIZE.into()) {
        let mut script = Script::default();
        script.set_up(Device::Vsock, VERSION_1);
        flood(&mut script, packets, 300);
        observed.puppet.run(&script).await;
        observed.check(true).await;
    }
    observed.puppet.check_device(Device::Vsock).await;
    // Lengths that the chain does not have, or that no packet may have.
    for len in [1, 45, 0x1_0000, 0x1_0001, 0x7fff_ffff, u32::MAX] {
        let mut script = Script::default();
        script.set_up(Device::Vsock, VERSION_1).packet(BUFFERS, &Packet { len, op: 5, ..usual });
        script.chain(Device::Vsock, 1, 0, &[part(BUFFERS, 44, 0)]);
        script.await_bits(Device::Vsock.base() + STATUS, NEEDS_RESET);
        observed.puppet.run(&script).await;
    }
    observed.check(true).await;
    observed.puppet.check_device(Device::Vsock).await;
    observed.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn floods_of_requests_and_resets_are_bounded() {
    let mut observed = Observed::start().await;
    for op in [1, 3] {
        for _ in 0..20 {
            // Nowhere to put a refusal: the device stops to take packets, and its queue fills.
            let mut script = Script::default();
            script.set_up(Device::Vsock, VERSION_1);
            let packets: Vec<_> =
                (0..u32::from(QUEUE_SIZE)).map(|n| Packet { op, from: n, ..Packet::default() }).collect();
            flood(&mut script, &packets, 1000);
            observed.puppet.run(&script).await;
        }
        observed.check(true).await;
        observed.puppet.check_device(Device::Vsock).await;
    }
    observed.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_connections_than_there_may_be_are_refused_on_this_side() {
    let mut observed = Observed::start().await;
    observed.puppet.run(Script::default().set_up(Device::Vsock, VERSION_1)).await;
    let attempts: Vec<_> = (0..1100)
        .map(|_| {
            let connector = observed.puppet.machine.connector().clone();
            tokio::spawn(async move { connector.connect(7).await.map(drop) })
        })
        .collect();
    // The guest has no buffer for a single request; then its driver begins anew, and forgets what it was told.
    tokio::time::sleep(Duration::from_millis(100)).await;
    let refused = attempts.iter().filter(|attempt| attempt.is_finished()).count();
    assert_eq!(refused, 1100 - 1024);
    attempts.iter().for_each(tokio::task::JoinHandle::abort);
    for attempt in attempts {
        if let Ok(connected) = attempt.await {
            connected.expect_err("nobody answers");
        }
    }
    observed.check(true).await;
    observed.puppet.check_device(Device::Vsock).await;
    observed.end().await;
}

/// A stream from the host and the host's port, to a guest that has 16 buffers for packets, of which it has used one.
async fn connected(puppet: &Puppet, answer: Packet) -> (Box<dyn kiln::transport::GuestStream>, u32) {
    let mut script = Script::default();
    script.set_up(Device::Vsock, VERSION_1);
    for n in 0..u64::from(QUEUE_SIZE) {
        script.descriptor(rings(0).descriptors, n, &part(BUFFERS + 0x1000 + n * 0x1000, 0x1000, WRITE));
        script.offer(Device::Vsock, 0, n as u16, n as u16);
    }
    puppet.run(&script).await;
    let connector = puppet.machine.connector().clone();
    let host = tokio::spawn(async move { connector.connect(1028).await });
    puppet.run(Script::default().await_used(0, 0)).await;
    let port = puppet.ram().load::<u32>(BUFFERS + 0x1000 + 16).expect("in memory");
    let mut script = Script::default();
    script.packet(BUFFERS, &Packet { to: port, op: 2, ..answer });
    script.chain(Device::Vsock, 1, 0, &[part(BUFFERS, 44, 0)]).await_used(1, 0);
    puppet.run(&script).await;
    let stream = tokio::time::timeout(PATIENCE, host).await.expect("in time").expect("no panic").expect("connected");
    (stream, port)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_that_lies_about_its_credit_harms_its_connection_only() {
    let mut observed = Observed::start().await;
    for (buf_alloc, fwd_cnt) in [(0, 0), (u32::MAX, 0), (u32::MAX, u32::MAX), (0, u32::MAX), (1, 0x8000_0000)] {
        let lie = Packet { buf_alloc, fwd_cnt, ..Packet::default() };
        let (mut stream, port) = connected(&observed.puppet, lie).await;
        // Whatever the credit, the buffers are few: what the host keeps is bounded.
        let mut taken = 0;
        while let Ok(Ok(n)) = tokio::time::timeout(Duration::from_millis(50), stream.write(&[7; 0x4000])).await {
            taken += n;
        }
        assert!(taken <= (64 << 10) + 16 * 4096, "{taken} bytes are on their way to a guest that takes none");
        // More of the lie, in each kind of packet, and then more data than it may send.
        let packets: Vec<_> = (4..8).map(|op| Packet { to: port, op, ..lie }).collect();
        let mut script = Script::default();
        for (n, packet) in (0..).zip(&packets) {
            script.packet(BUFFERS, packet).chain(Device::Vsock, 1, 1 + n, &[part(BUFFERS, 44, 0)]).await_used(1, 1 + n);
        }
        let data = Packet { to: port, op: 5, len: 0x1_0000, ..lie };
        script.packet(BUFFERS + 0x2_0000, &data);
        for n in 5..12 {
            script.chain(Device::Vsock, 1, n, &[part(BUFFERS + 0x2_0000, 44 + 0x1_0000, 0)]).await_used(1, n);
        }
        observed.puppet.run(&script).await;
        let mut all = Vec::new();
        let end = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut all)).await.expect("an end");
        assert_eq!(end.expect_err("it was broken off").kind(), ErrorKind::ConnectionReset);
        assert!(all.len() <= 256 << 10, "{} bytes were kept", all.len());
        observed.check(true).await;
        observed.puppet.check_device(Device::Vsock).await;
    }
    observed.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pages_that_are_not_the_guests_to_give_are_passed_over() {
    let mut observed = Observed::start().await;
    let ring = rings(0);
    let strange = [RAM_END >> 12, 0xc_0000, 0xd_0000, 0xf_ffff, 0x10_0000, 0xffff_ffff, 0x8000_0000];
    let own = [ring.descriptors, ring.available, ring.used, BUFFERS].map(|at| at >> 12);
    for list in [&strange[..], &own, &[own[1]], &[own[2]]] {
        let mut script = Script::default();
        script.set_up(Device::Balloon, VERSION_1);
        for (n, page) in (0..).zip(list) {
            script.write(4, BUFFERS + n * 4, *page);
        }
        let bytes = list.len() as u32 * 4;
        script.chain(Device::Balloon, 0, 0, &[part(BUFFERS, bytes, 0)]).spin(5000);
        // What it says is in it is its own matter.
        script.register(Device::Balloon, 0x104, 0xffff_ffff).read(4, Device::Balloon.base() + 0x104);
        assert_eq!(observed.puppet.run(&script).await, [0xffff_ffff]);
        observed.check(true).await;
        let given =
            observed.puppet.machine.give_memory_back(kiln::units::Bytes::mib(4), Duration::from_millis(200)).await;
        drop(given);
        observed.puppet.check_device(Device::Balloon).await;
    }
    observed.end().await;
}

/// A machine whose disk is kept busy for ever: a saved state can have the used ring one ahead of the available one, and where
/// both lie in the same place, with one entry, each answer is the next request.
async fn busy_for_ever() -> Observed {
    let disk = MemoryDisk { delay: Duration::from_millis(1), ..MemoryDisk::new(64 << 10) };
    let (mut state, ram) = fresh(&puppet::code());
    let mut blk = transport(2, blk_config(disk.bytes.len()), &[256], DeviceState::Stateless);
    (blk.status, blk.accepted, blk.active) = (15, VERSION_1, true);
    let ring = rings(0);
    let queue = &mut blk.queues[0];
    (queue.size, queue.ready, queue.next_used) = (1, true, 1);
    (queue.descriptors, queue.driver, queue.device) = (ring.descriptors, ring.used, ring.used);
    state.virtio.insert(0, blk);
    // An indirect table: a header of zeros, which is a read, then data, then the status.
    for (at, addr, len, flags, next) in [
        (ring.descriptors, TABLE, 48, INDIRECT, 0),
        (TABLE, BUFFERS, 16, NEXT, 1),
        (TABLE + 16, BUFFERS + 0x1000, 512, NEXT | WRITE, 2),
        (TABLE + 32, BUFFERS + 0x800, 1, WRITE, 0u64),
    ] {
        ram.store(at, addr).expect("in memory");
        ram.store(at + 8, len | u64::from(flags) << 32 | next << 48).expect("in memory");
    }
    ram.store(ring.used + 2, 1u16).expect("in memory");
    let mut machine = Machine::restore(&Soft::new(), &state, ram, &[Arc::new(disk)]).await.expect("a valid state");
    machine.resume();
    Observed::with(Puppet { machine })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reset_does_not_wait_for_a_device_that_is_busy_for_ever() {
    let answers = rings(0).used + 2;
    let mut passed = Vec::new();
    for _ in 0..15 {
        let mut observed = busy_for_ever().await;
        let mut script = Script::default();
        script.await_change(answers, 1).await_change(answers, 2).spin(5000);
        script.read(2, answers).reset(Device::Blk).read(2, answers);
        let [before, after] = observed.puppet.run(&script).await[..] else { panic!("two reads") };
        assert!(before > 2, "it does not keep itself busy");
        passed.push(after - before);
        observed.check(false).await;
        observed.puppet.check_device(Device::Rng).await;
        observed.end().await;
    }
    // The request that is being served is finished. Now and then the vCPU loses its processor before it comes to wait.
    passed.sort_unstable();
    assert!(passed[passed.len() / 2] <= 1, "requests that were served while the reset waited: {passed:?}");
}
