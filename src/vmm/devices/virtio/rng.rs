//! The entropy device (section 5.4): fills what the driver offers from the host's generator.

use std::io::Write;

use super::DeviceQueue;
use super::Progress;
use super::QueueError;
use super::VirtioDevice;
use crate::mem::GuestMemory;

const DEVICE_TYPE: u32 = 4;
const QUEUE_SIZE: u16 = 64;
/// Most bytes a request gets; a driver that wants more asks again.
const MAX_REQUEST: usize = 4096;

/// The device.
#[derive(Debug, Default)]
pub struct Rng;

impl VirtioDevice for Rng {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn process(&mut self, queues: &mut [DeviceQueue], memory: &GuestMemory) -> Result<Progress, QueueError> {
        let [queue] = queues else { return Ok(Progress::Idle) };
        let Some(chain) = queue.pop(memory)? else { return Ok(Progress::Idle) };
        let mut writer = chain.writer()?;
        let mut bytes = [0; MAX_REQUEST];
        let wanted = &mut bytes[..writer.available_bytes().min(MAX_REQUEST)];
        // Without host entropy the request is answered with nothing, which the driver sees as such.
        let written = match getrandom::fill(wanted) {
            Ok(()) => writer.write(wanted).map_err(|_| QueueError::Chain("entropy buffer"))?,
            Err(_) => 0,
        };
        queue.complete(&chain, written as u32)?;
        queue.notify(memory)?;
        Ok(Progress::More)
    }
}
