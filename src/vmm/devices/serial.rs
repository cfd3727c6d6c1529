//! The 16550 serial port: the guest's early output. Output only; the guest's input comes by vsock.

use std::convert::Infallible;
use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
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

/// The registers of a serial port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs, reason = "the fields are the data sheet's registers")]
pub struct SerialState {
    pub divisor_low: u8,
    pub divisor_high: u8,
    pub interrupt_enable: u8,
    pub interrupt_identification: u8,
    pub line_control: u8,
    pub line_status: u8,
    pub modem_control: u8,
    pub modem_status: u8,
    pub scratch: u8,
    /// The receiver's bytes, which only the loopback mode gives any.
    pub received: Vec<u8>,
}

impl Default for SerialState {
    /// The state after reset.
    fn default() -> Self {
        Self::from(vm_superio::SerialState::default())
    }
}

impl From<vm_superio::SerialState> for SerialState {
    fn from(state: vm_superio::SerialState) -> Self {
        Self {
            divisor_low: state.baud_divisor_low,
            divisor_high: state.baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            received: state.in_buffer,
        }
    }
}

impl From<&SerialState> for vm_superio::SerialState {
    fn from(state: &SerialState) -> Self {
        Self {
            baud_divisor_low: state.divisor_low,
            baud_divisor_high: state.divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.received.clone(),
        }
    }
}

/// A serial port that writes to a [`Console`].
pub struct Serial {
    uart: vm_superio::Serial<Line, NoEvents, Console>,
    irq: Arc<dyn IrqLine>,
    console: Console,
}

impl Serial {
    /// A port whose transmitter-empty interrupts go to `irq`.
    #[must_use]
    pub fn new(irq: Arc<dyn IrqLine>, console: Console) -> Self {
        Self { uart: vm_superio::Serial::new(Line(Arc::clone(&irq)), console.clone()), irq, console }
    }

    /// The registers now.
    #[must_use]
    pub fn save(&self) -> SerialState {
        self.uart.state().into()
    }

    /// Goes on from saved registers, before any access and before the interrupt controller is restored: an interrupt
    /// that is pending in them raises the line, and the controller was saved with it. `None`, with nothing changed,
    /// for a receiver that holds more than it has room for.
    pub(in crate::vmm) fn restore(&mut self, state: &SerialState) -> Option<()> {
        let (line, console) = (Line(Arc::clone(&self.irq)), self.console.clone());
        self.uart = vm_superio::Serial::from_state(&state.into(), line, NoEvents, console).ok()?;
        Some(())
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
