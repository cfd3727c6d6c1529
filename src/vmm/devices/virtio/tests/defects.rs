//! Devices with defects: they cost the guest a device, and nobody else anything.

use super::*;
use crate::mem::GuestMemory;
use crate::vmm::devices::virtio::QueueError;

/// Panics at each second request.
#[derive(Debug, Default)]
struct Defective {
    served: u32,
}

impl VirtioDevice for Defective {
    fn device_type(&self) -> u32 {
        4
    }
    fn features(&self) -> u64 {
        0
    }
    fn queue_sizes(&self) -> &[u16] {
        &[16]
    }
    fn config(&self) -> Vec<u8> {
        Vec::new()
    }
    fn process(&mut self, queues: &mut [DeviceQueue], memory: &GuestMemory) -> Result<Progress, QueueError> {
        let [queue] = queues else { return Ok(Progress::Idle) };
        let Some(chain) = queue.pop(memory)? else { return Ok(Progress::Idle) };
        self.served += 1;
        assert!(self.served % 2 == 1, "the defect");
        queue.complete(&chain, 0)?;
        queue.notify(memory)?;
        Ok(Progress::More)
    }
}

#[tokio::test]
async fn a_device_that_panics_needs_a_reset_and_its_thread_lives_on() {
    let mut driver = Driver::new(Defective::default(), Arc::default()).start();
    for _ in 0..3 {
        driver.offer(0, 0, &[(BUFFERS, 64, WRITE)]);
        driver.ring(0);
        driver.wait_used(0);
        driver.offer(0, 0, &[(BUFFERS, 64, WRITE)]);
        driver.ring(0);
        driver.wait_needs_reset();
        // As a machine that is paused does.
        driver._worker.hold();
        tokio::time::timeout(PATIENCE, driver._worker.quiet()).await.expect("the thread answers");
        driver._worker.release();
        driver.forget_rings();
        driver = driver.start();
    }
}
