//! The balloon: what a driver is told, what it gives, and what it may not.

use super::restore::saved;
use super::restore::with_device;
use super::*;
use crate::mem::{HOLE_END, HOLE_START};
use crate::units::PAGE_SIZE;
use crate::vmm::devices::virtio::DeviceState;
use crate::vmm::devices::virtio::balloon::BalloonControl;

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const GENERATION: u64 = 0xfc;
const NUM_PAGES: u64 = 0x100;
const ACTUAL: u64 = 0x104;
const CONFIG_CHANGE: u32 = 2;
/// Pages with content; none of the rings' or of a list.
const FIRST: u32 = 0x200;

fn driver_with(memory: Bytes) -> (Driver, BalloonControl) {
    let ram = Arc::new(GuestRam::new(memory).unwrap());
    let (device, control, doorbell) = Balloon::new(Arc::clone(&ram));
    (Driver::over(ram, device, doorbell).start(), control)
}

/// A driver in 4 MiB, of which the pages from `FIRST` on hold something.
fn driver() -> (Driver, BalloonControl) {
    let (driver, control) = driver_with(Bytes::mib(4));
    driver.ram.fill(u64::from(FIRST) * PAGE_SIZE, b'w', Bytes::mib(2).0).unwrap();
    (driver, control)
}

/// Writes a list of pages; returns the descriptor for it.
fn list(driver: &Driver, pages: &[u32]) -> Part {
    let bytes: Vec<u8> = pages.iter().flat_map(|page| page.to_le_bytes()).collect();
    driver.ram.memory().write_slice(&bytes, GuestAddress(BUFFERS)).unwrap();
    (BUFFERS, bytes.len() as u32, 0)
}

/// Puts pages into the balloon.
fn inflate(driver: &mut Driver, pages: &[u32]) {
    let part = list(driver, pages);
    driver.offer(INFLATE, 0, &[part]);
    driver.ring(INFLATE);
    assert_eq!(driver.wait_used(INFLATE), (0, 0));
}

fn is_empty(driver: &Driver, page: u32) -> bool {
    let bytes = driver.bytes(u64::from(page) * PAGE_SIZE, PAGE_SIZE as usize);
    assert!(bytes.iter().all(|byte| *byte == bytes[0]), "half a page");
    bytes[0] == 0
}

/// Waits for a change of the configuration, and acknowledges it.
fn wait_config_change(driver: &mut Driver) {
    loop {
        let pending = driver.get(INTERRUPT_STATUS);
        driver.set(INTERRUPT_ACK, pending);
        if pending & CONFIG_CHANGE != 0 {
            return;
        }
        driver.interrupts.recv_timeout(PATIENCE).expect("the driver is told");
    }
}

#[test]
fn the_driver_is_told_of_a_target_and_says_what_it_has_done() {
    let (mut driver, control) = driver();
    assert_eq!(driver.get(0x8), 5);
    assert_eq!((driver.get(NUM_PAGES), driver.get(ACTUAL), driver.get(ACTUAL + 4)), (0, 0, 0));
    let generation = driver.get(GENERATION);
    control.set_target(300);
    wait_config_change(&mut driver);
    assert_eq!(driver.get(NUM_PAGES), 300);
    assert_ne!(driver.get(GENERATION), generation);
    // The same again is no news.
    let generation = driver.get(GENERATION);
    control.set_target(300);
    assert_eq!((driver.get(GENERATION), driver.get(INTERRUPT_STATUS)), (generation, 0));
    // The driver writes `actual`, whole, and nothing else.
    driver.set(ACTUAL, 256);
    driver.set(NUM_PAGES, 7);
    driver.set(ACTUAL + 4, 7);
    driver.device.write(ACTUAL, &[1]);
    driver.device.write(ACTUAL - 2, &[1; 4]);
    assert_eq!((driver.get(NUM_PAGES), driver.get(ACTUAL), driver.get(GENERATION)), (300, 256, generation));
    assert_eq!(control.balance().borrow().actual, 256);
    // A driver that begins anew has all its pages.
    driver.set(STATUS, 0);
    assert_eq!((driver.get(NUM_PAGES), driver.get(ACTUAL)), (300, 0));
}

#[test]
fn pages_in_the_balloon_are_the_hosts_and_no_others() {
    let (mut driver, control) = driver();
    let outside = [1024, 0xc_0000, 0xf_ffff, 0x10_0000, u32::MAX];
    let pages = [FIRST + 5, FIRST, FIRST + 1, FIRST + 5, FIRST + 1].into_iter().chain(outside).collect::<Vec<_>>();
    inflate(&mut driver, &pages);
    let empty: Vec<_> = (FIRST..FIRST + 8).filter(|page| is_empty(&driver, *page)).map(|page| page - FIRST).collect();
    assert_eq!(empty, [0, 1, 5]);
    assert_eq!(control.balance().borrow().given_back, 3);
    // They are the guest's again with or without a word.
    driver.write(u64::from(FIRST) * PAGE_SIZE, 1u8);
    let part = list(&driver, &[FIRST, FIRST + 1, FIRST + 5, u32::MAX]);
    driver.offer(DEFLATE, 0, &[part]);
    driver.ring(DEFLATE);
    assert_eq!(driver.wait_used(DEFLATE), (0, 0));
    assert_eq!(driver.bytes(u64::from(FIRST) * PAGE_SIZE, 1), [1]);
}

#[test]
fn pages_above_the_hole_are_found_and_the_hole_is_not() {
    let (mut driver, control) = driver_with(Bytes(HOLE_START.0 + 2 * PAGE_SIZE));
    let page = |gpa: u64| (gpa / PAGE_SIZE) as u32;
    let (below, above) = (HOLE_START.0 - PAGE_SIZE, HOLE_END.0);
    for at in [below, above, above + PAGE_SIZE] {
        driver.write(at, 7u64);
    }
    inflate(&mut driver, &[page(above), page(below), page(HOLE_START.0), page(HOLE_END.0) - 1, page(above) + 2]);
    let left = [below, above, above + PAGE_SIZE].map(|at| driver.bytes(at, 1)[0]);
    assert_eq!(left, [0, 0, 7]);
    assert_eq!(control.balance().borrow().given_back, 2);
}

#[test]
fn a_list_may_lie_in_pieces_and_must_be_whole() {
    let (mut driver, _control) = driver();
    list(&driver, &[FIRST, FIRST + 2]);
    driver.offer(INFLATE, 0, &[(BUFFERS, 3, 0), (BUFFERS + 3, 4, 0), (BUFFERS + 7, 1, 0)]);
    driver.ring(INFLATE);
    driver.wait_used(INFLATE);
    assert!(is_empty(&driver, FIRST) && !is_empty(&driver, FIRST + 1) && is_empty(&driver, FIRST + 2));
    // A list of nothing is one.
    driver.offer(INFLATE, 0, &[(BUFFERS, 16, WRITE)]);
    driver.ring(INFLATE);
    driver.wait_used(INFLATE);
    driver.offer(INFLATE, 0, &[(BUFFERS, 7, 0)]);
    driver.ring(INFLATE);
    driver.wait_needs_reset();
    driver.forget_rings();
    let mut driver = driver.start();
    inflate(&mut driver, &[FIRST + 1]);
    assert!(is_empty(&driver, FIRST + 1));
}

#[test]
fn of_a_long_list_a_part_is_taken() {
    let (mut driver, control) = driver();
    let mut pages = vec![FIRST; 1023];
    pages.extend([FIRST + 1, FIRST + 2]);
    inflate(&mut driver, &pages);
    assert!(is_empty(&driver, FIRST) && is_empty(&driver, FIRST + 1) && !is_empty(&driver, FIRST + 2));
    // Megabytes of the same list, by a table that names it over and over.
    let table = BUFFERS + 0x1_0000;
    for n in 0..1000 {
        driver.descriptor(table, n, (BUFFERS, 4096, if n < 999 { NEXT } else { 0 }), n + 1);
    }
    driver.offer(INFLATE, 0, &[(table, 16_000, INDIRECT)]);
    driver.ring(INFLATE);
    driver.wait_used(INFLATE);
    assert_eq!(control.balance().borrow().given_back, 4);
}

#[test]
fn a_driver_that_gives_its_own_queue_away_loses_it() {
    let (mut driver, _control) = driver();
    let part = list(&driver, &(0..1024).collect::<Vec<_>>());
    driver.offer(INFLATE, 0, &[part]);
    driver.ring(INFLATE);
    driver.wait_needs_reset();
    driver.forget_rings();
    driver.ram.fill(u64::from(FIRST) * PAGE_SIZE, b'w', PAGE_SIZE).unwrap();
    let mut driver = driver.start();
    inflate(&mut driver, &[FIRST]);
    assert!(is_empty(&driver, FIRST));
}

#[tokio::test]
async fn a_balloon_goes_on_with_what_is_in_it_and_tells_what_was_not_told() {
    let (mut driver, control) = driver();
    driver.set(ACTUAL, 128);
    driver._worker.hold();
    driver._worker.quiet().await;
    control.set_target(300);
    let state = saved(&driver).await;
    assert_eq!(state.device, DeviceState::Balloon { target: 300, actual: 128, generation: 1, untold: true });
    assert!(state.config.is_empty());

    let (device, control, doorbell) = Balloon::new(Arc::clone(&driver.ram));
    let mut driver = with_device(driver, device, doorbell);
    driver.device.restore(&state).unwrap();
    assert_eq!(driver.device.save(), state);
    assert_eq!(driver.get(INTERRUPT_STATUS), 0);
    driver._worker.release();
    wait_config_change(&mut driver);
    assert_eq!((driver.get(NUM_PAGES), driver.get(ACTUAL), driver.get(GENERATION)), (300, 128, 1));
    inflate(&mut driver, &[FIRST]);
    assert!(is_empty(&driver, FIRST));
    let seen = *control.balance().borrow();
    assert_eq!((seen.actual, seen.given_back, seen.at_work), (128, 1, true));
}

#[tokio::test]
async fn the_state_of_another_device_is_refused() {
    let (driver, _control) = driver();
    let mut state = saved(&driver).await;
    state.device = DeviceState::Stateless;
    let (device, _control, doorbell) = Balloon::new(Arc::clone(&driver.ram));
    let mut driver = with_device(driver, device, doorbell);
    driver.device.restore(&state).unwrap_err();
}
