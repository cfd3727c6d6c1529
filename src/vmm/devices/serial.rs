//! The 16550 serial port: the guest's early output. Output only; the guest's input comes by vsock.

use std::convert::Infallible;
use std::fmt;
use std::sync::Arc;

use vm_superio::Trigger;
use vm_superio::serial::NoEvents;

use crate::hv::IrqLine;
use crate::vmm::bus::BusDevice;
use crate::vmm::console::Console;

/// Ports the device occupies.
pub const PORTS: u64 = 8;

struct Line(Arc<dyn IrqLine>);

impl Trigger for Line {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.raise();
        Ok(())
    }
}

/// A serial port that writes to a [`Console`].
pub struct Serial {
    uart: vm_superio::Serial<Line, NoEvents, Console>,
}

impl Serial {
    /// A port whose transmitter-empty interrupts go to `irq`.
    #[must_use]
    pub fn new(irq: Arc<dyn IrqLine>, console: Console) -> Self {
        Self { uart: vm_superio::Serial::new(Line(irq), console) }
    }
}

impl fmt::Debug for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Serial").finish_non_exhaustive()
    }
}

/// The registers are a byte wide; wider accesses reach nothing.
impl BusDevice for Serial {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        match data {
            [byte] => *byte = self.uart.read(offset as u8),
            wide => wide.fill(0xff),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let [byte] = data {
            // Neither the console nor the interrupt line can fail.
            let _ = self.uart.write(offset as u8, *byte);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[derive(Debug, Default)]
    struct Counted(AtomicUsize);

    impl IrqLine for Counted {
        fn raise(&self) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
        fn set_level(&self, _high: bool) {}
    }

    #[test]
    fn what_the_guest_transmits_is_on_the_console_and_raises_the_line() {
        let (irq, console) = (Arc::new(Counted::default()), Console::new());
        let mut serial = Serial::new(irq.clone(), console.clone());
        serial.write(1, &[2]); // enable the transmitter-empty interrupt
        for byte in b"hi\n" {
            serial.write(0, &[*byte]);
            let mut line_status = [0];
            serial.read(5, &mut line_status);
            assert_eq!(line_status[0] & 0x60, 0x60, "the transmitter is always ready");
        }
        assert_eq!(console.text(), "hi\n");
        assert!(irq.0.load(Ordering::Relaxed) > 0);
        let mut wide = [0; 2];
        serial.read(0, &mut wide);
        assert_eq!(wide, [0xff; 2]);
    }
}
