//! What the host's logs say of a driver that misbehaves.

use std::sync::atomic::{AtomicUsize, Ordering};

use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

use super::*;

/// Counts warnings and worse.
#[derive(Clone, Default)]
struct Warnings(Arc<AtomicUsize>);

impl Subscriber for Warnings {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }
    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }
    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn event(&self, event: &Event<'_>) {
        if *event.metadata().level() <= Level::WARN {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

#[test]
fn a_driver_that_breaks_its_device_over_and_over_is_warned_of_once() {
    let ram = Arc::new(GuestRam::new(Bytes::mib(4)).unwrap());
    let line = Arc::new(Line(Mutex::new(channel().0)));
    let (mut device, work) = Transport::new(Box::new(Rng), Arc::clone(&ram), line, Arc::default());
    let warnings = Warnings::default();
    tracing::subscriber::with_default(warnings.clone(), || {
        for round in 0..100 {
            let mut set = |register, value: u32| device.write(register, &value.to_le_bytes());
            for (register, value) in [(STATUS, 0), (STATUS, 3), (0x24, 1), (0x20, 1), (STATUS, 11)] {
                set(register, value);
            }
            // By turns a queue in no memory, and one whose driver is ahead of it by more than it holds.
            let at = if round % 2 == 0 { !15 } else { ring(0) as u32 };
            ram.memory().write_obj(0x7fffu16, GuestAddress(ring(0) + 0x1002)).unwrap();
            for (register, value) in
                [(0x80, at), (0x90, at.wrapping_add(0x1000)), (0xa0, at.wrapping_add(0x2000)), (0x44, 1), (STATUS, 15)]
            {
                set(register, value);
            }
            assert_eq!(work.step(), Progress::Idle);
            let mut status = [0; 4];
            device.read(STATUS, &mut status);
            assert_eq!(u32::from_le_bytes(status) & NEEDS_RESET, NEEDS_RESET);
        }
    });
    assert_eq!(warnings.0.load(Ordering::Relaxed), 1);
}
