//! Devices that go on from a saved state, over the memory that they were saved with.

use tokio::io::AsyncWriteExt as _;

use super::*;
use crate::vmm::devices::virtio::{DeviceState, Misfit, TransportState};

const RECEIVE: usize = 0;
const EVENTS: usize = 2;
/// How long is waited for what must not happen.
const A_WHILE: Duration = Duration::from_millis(200);

/// The device has given back `used` chains of the queue, and does not give back another.
pub(super) fn stays_at(driver: &Driver, queue: usize, used: u16) {
    std::thread::sleep(A_WHILE);
    let index: u16 = driver.ram.memory().read_obj(GuestAddress(ring(queue) + 0x2002)).unwrap();
    assert_eq!(index, used, "queue {queue}");
}

/// A driver that was started, and its device's state while it is quiet.
pub(super) async fn saved(driver: &Driver) -> TransportState {
    driver._worker.hold();
    driver._worker.quiet().await;
    driver.device.save()
}

/// The driver with `device` in the stead of its own; held.
pub(super) fn with_device(driver: Driver, device: impl VirtioDevice + 'static, doorbell: Arc<Doorbell>) -> Driver {
    let (raised, interrupts) = channel();
    let line = Arc::new(Line(Mutex::new(raised)));
    doorbell.hold();
    let ram = Arc::clone(&driver.ram);
    let (device, worker) = Transport::start("test", Box::new(device), ram, line, doorbell).unwrap();
    Driver { device, interrupts, _worker: worker, ..driver }
}

#[tokio::test]
async fn a_disk_goes_on_where_it_was_and_serves_what_waited() {
    let mut driver = disk(5120).start();
    assert_eq!(driver.request(0, 0, 512).0, 0);
    driver._worker.hold();
    driver._worker.quiet().await;
    // Made available to a device that is held: it is not taken up.
    driver.write(BUFFERS, 0u32);
    driver.write(BUFFERS + 8, 2u64);
    driver.offer(0, 0, &[(BUFFERS, 16, 0), (BUFFERS + 0x1000, 512, WRITE), (BUFFERS + 0x800, 1, WRITE)]);
    driver.ring(0);
    stays_at(&driver, 0, 1);
    let state = saved(&driver).await;
    assert_eq!((state.queues[0].next_avail, state.queues[0].next_used), (1, 1));

    let mut driver = with_device(driver, disk_device(5120), Arc::default());
    driver.device.restore(&state).unwrap();
    assert_eq!(driver.device.save(), state);
    driver._worker.release();
    assert_eq!(driver.wait_used(0), (0, 513));
    assert_eq!(driver.bytes(BUFFERS + 0x1000, 512), content(5120)[1024..1536]);
    assert_eq!(driver.request(0, 1, 512).1, content(5120)[512..1024]);
}

#[tokio::test]
async fn another_disk_is_refused() {
    let driver = disk(5120).start();
    let state = saved(&driver).await;
    let mut other = with_device(driver, disk_device(10_240), Arc::default());
    let Err(Misfit(why)) = other.device.restore(&state) else { panic!("it has another size") };
    assert!(why.contains("configuration"), "{why}");
}

/// What the guest's driver does with the event queue at its start: gives it buffers.
fn offer_event_buffers(driver: &mut Driver) {
    for n in 0..4 {
        driver.offer(EVENTS, n, &[(BUFFERS + 0x100 * u64::from(n), 4, WRITE)]);
    }
}

/// A restored socket device, held; the host has a connection to make.
async fn restored_vsock() -> (Driver, tokio::task::JoinHandle<std::io::Result<()>>) {
    let (vsock, connector, doorbell) = Vsock::new();
    let mut driver = Driver::new(vsock, doorbell).start();
    offer_event_buffers(&mut driver);
    let state = saved(&driver).await;
    assert_eq!(state.device, DeviceState::Vsock { next_port: 1024, resets_heard_at: None });
    drop(connector);
    let (vsock, connector, doorbell) = Vsock::new();
    let mut driver = with_device(driver, vsock, doorbell);
    driver.device.restore(&state).unwrap();
    driver.offer(RECEIVE, 0, &[(BUFFERS + 0x1000, 4096, WRITE)]);
    let host = tokio::spawn(async move { connector.connect(1028).await?.shutdown().await });
    (driver, host)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn new_connections_wait_until_the_guest_has_heard_of_the_reset() {
    let (mut driver, host) = restored_vsock().await;
    driver._worker.release();
    assert_eq!(driver.wait_used(EVENTS), (0, 4));
    assert_eq!(driver.bytes(BUFFERS, 4), [0; 4], "a transport reset");
    stays_at(&driver, RECEIVE, 0);
    // It has once it gives the buffer back.
    driver.offer(EVENTS, 0, &[(BUFFERS, 4, WRITE)]);
    driver.ring(EVENTS);
    assert_eq!(driver.wait_used(RECEIVE), (0, 44));
    assert_eq!(driver.bytes(BUFFERS + 0x1000 + 30, 2), [1, 0], "a request");
    drop(driver);
    host.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_that_is_saved_before_the_guest_has_heard_tells_it_again_and_waits_for_both() {
    let (mut driver, host) = restored_vsock().await;
    driver._worker.release();
    assert_eq!(driver.wait_used(EVENTS), (0, 4));
    let state = saved(&driver).await;
    let DeviceState::Vsock { next_port, resets_heard_at } = state.device else { panic!("{state:?}") };
    assert_eq!(resets_heard_at, Some(5));
    host.abort();

    let (vsock, connector, doorbell) = Vsock::new();
    let mut driver = with_device(driver, vsock, doorbell);
    driver.device.restore(&state).unwrap();
    let host = tokio::spawn(async move { connector.connect(1028).await.map(drop) });
    driver._worker.release();
    assert_eq!(driver.wait_used(EVENTS), (1, 4));
    driver.offer(EVENTS, 0, &[(BUFFERS, 4, WRITE)]);
    driver.ring(EVENTS);
    stays_at(&driver, RECEIVE, 0);
    driver.offer(EVENTS, 1, &[(BUFFERS + 0x100, 4, WRITE)]);
    driver.ring(EVENTS);
    assert_eq!(driver.wait_used(RECEIVE), (0, 44));
    assert_eq!(driver.bytes(BUFFERS + 0x1000 + 20, 4), 1028u32.to_le_bytes());
    assert_eq!(driver.bytes(BUFFERS + 0x1000 + 16, 4), next_port.to_le_bytes(), "a port that the guest does not know");
    host.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_driver_that_begins_anew_needs_no_reset() {
    let (driver, host) = restored_vsock().await;
    driver._worker.release();
    let mut driver = driver;
    driver.set(STATUS, 0);
    driver.forget_rings();
    let mut driver = driver.start();
    driver.offer(RECEIVE, 0, &[(BUFFERS + 0x1000, 4096, WRITE)]);
    driver.ring(RECEIVE);
    assert_eq!(driver.wait_used(RECEIVE), (0, 44));
    host.abort();
}
