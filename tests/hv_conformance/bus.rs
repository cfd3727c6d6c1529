//! What is around the processors: ports and registers that record and answer, and ports by which a guest moves its own
//! interrupt lines, so that a case is one program and needs no second thread of its own.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::thread;
use std::thread::JoinHandle;
use std::time::Duration;

use kiln::hv::HvVm;
use kiln::hv::IoHandler;
use kiln::hv::IrqLine;
use kiln::hv::Kick;
use kiln::units::Gsi;
use kiln::units::GuestAddr;

/// Ends the run.
pub(crate) const EXIT_PORT: u16 = 0xf4;
/// A trap stub's vector: ends the run.
pub(crate) const TRAP_PORT: u16 = 0xf0;
/// A point of a program: stops the run, which can go on.
pub(crate) const POINT_PORT: u16 = 0xf5;
/// `al` is a line's number: an edge on it, its level set high and low, an edge when the vCPU has had time to halt.
pub(crate) const EDGE_PORT: u16 = 0xf8;
pub(crate) const HIGH_PORT: u16 = 0xf9;
pub(crate) const LOW_PORT: u16 = 0xfa;
pub(crate) const LATER_PORT: u16 = 0xfb;

/// Reads here stop the run as [`POINT_PORT`] does: what an instruction that reads memory can do.
pub(crate) const POINT_REGISTER: u64 = crate::layout::DEVICE + 0x1000;

/// Long enough for a vCPU to reach HLT. Nothing depends on it but which path of the engine is taken.
const TIME_TO_HALT: Duration = Duration::from_millis(20);

const LINES: u32 = 24;

/// An access of the guest's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Access {
    pub(crate) kind: Kind,
    /// Port or guest-physical address.
    pub(crate) at: u64,
    pub(crate) size: usize,
    /// What was written, or answered.
    pub(crate) value: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    In,
    Out,
    Read,
    Write,
}

/// Why a handler ended a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    Exit,
    Trap(u8),
    Point(u64),
}

#[derive(Debug, Default)]
struct Recorded {
    accesses: Vec<Access>,
    answers: VecDeque<u64>,
    stop: Option<Stop>,
    /// Every access to a port or register stops the run.
    every_access: bool,
    devices: Vec<JoinHandle<()>>,
}

/// What the vCPUs' handlers share with the case.
#[derive(Clone, Debug)]
pub(crate) struct Bus {
    lines: Arc<[Arc<dyn IrqLine>]>,
    recorded: Arc<Mutex<Recorded>>,
}

impl Bus {
    /// A bus around `vm`'s vCPUs whose reads are answered by `answers` in order, and by ones after those.
    pub(crate) fn new(vm: &dyn HvVm, answers: &[u64]) -> Self {
        let line = |gsi| vm.irq_line(Gsi(gsi)).expect("the IOAPIC has 24 lines");
        let mut recorded = Recorded::default();
        recorded.answers.extend(answers);
        Self { lines: (0..LINES).map(line).collect(), recorded: Arc::new(Mutex::new(recorded)) }
    }

    /// The handler of the vCPU that `kick` stops.
    pub(crate) fn handler(&self, kick: Arc<dyn Kick>) -> Box<dyn IoHandler> {
        Box::new(Handler { bus: self.clone(), kick })
    }

    /// Why the last run ended, once.
    pub(crate) fn take_stop(&self) -> Option<Stop> {
        self.lock().stop.take()
    }

    /// Makes every access to a port or register stop the run, as a point does.
    pub(crate) fn stop_at_every_access(&self) {
        self.lock().every_access = true;
    }

    /// All accesses so far.
    pub(crate) fn accesses(&self) -> Vec<Access> {
        self.lock().accesses.clone()
    }

    /// What is left of the answers.
    pub(crate) fn answers(&self) -> Vec<u64> {
        self.lock().answers.iter().copied().collect()
    }

    pub(crate) fn line(&self, gsi: u64) -> &Arc<dyn IrqLine> {
        &self.lines[gsi as usize]
    }

    fn lock(&self) -> MutexGuard<'_, Recorded> {
        // Every change is one step.
        self.recorded.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug)]
struct Handler {
    bus: Bus,
    kick: Arc<dyn Kick>,
}

impl Handler {
    fn stop(&self, stop: Stop) {
        self.bus.lock().stop = Some(stop);
        self.kick.kick();
    }

    fn read(&self, kind: Kind, at: u64, data: &mut [u8]) {
        data.fill(0xff);
        let every_access = {
            let mut recorded = self.bus.lock();
            if let Some(answer) = recorded.answers.pop_front() {
                let len = data.len();
                data.copy_from_slice(&answer.to_le_bytes()[..len]);
            }
            recorded.accesses.push(Access { kind, at, size: data.len(), value: value(data) });
            recorded.every_access
        };
        if every_access || at == POINT_REGISTER {
            self.stop(Stop::Point(at));
        }
    }

    fn write(&self, kind: Kind, at: u64, data: &[u8]) {
        let every_access = {
            let mut recorded = self.bus.lock();
            recorded.accesses.push(Access { kind, at, size: data.len(), value: value(data) });
            recorded.every_access
        };
        if every_access {
            self.stop(Stop::Point(at));
        }
    }

    /// A device that raises its line in its own time.
    fn raise_later(&self, line: &Arc<dyn IrqLine>) {
        let line = Arc::clone(line);
        let device = thread::spawn(move || {
            thread::sleep(TIME_TO_HALT);
            line.raise();
        });
        self.bus.lock().devices.push(device);
    }
}

fn value(data: &[u8]) -> u64 {
    data.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

impl IoHandler for Handler {
    fn mmio_read(&mut self, addr: GuestAddr, data: &mut [u8]) {
        self.read(Kind::Read, addr.0, data);
    }

    fn mmio_write(&mut self, addr: GuestAddr, data: &[u8]) {
        self.write(Kind::Write, addr.0, data);
    }

    fn pio_in(&mut self, port: u16, data: &mut [u8]) {
        self.read(Kind::In, port.into(), data);
    }

    fn pio_out(&mut self, port: u16, data: &[u8]) {
        let written = value(data);
        match port {
            EXIT_PORT => self.stop(Stop::Exit),
            TRAP_PORT => self.stop(Stop::Trap(written as u8)),
            POINT_PORT => self.stop(Stop::Point(written)),
            EDGE_PORT => self.bus.line(written).raise(),
            HIGH_PORT => self.bus.line(written).set_level(true),
            LOW_PORT => self.bus.line(written).set_level(false),
            LATER_PORT => self.raise_later(self.bus.line(written)),
            _ => self.write(Kind::Out, port.into(), data),
        }
    }
}

impl Drop for Recorded {
    fn drop(&mut self) {
        for device in self.devices.drain(..) {
            // A device that panicked has failed no case: its line did not come, which the case sees.
            let _ = device.join();
        }
    }
}
