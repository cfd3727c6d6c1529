//! A vCPU: making it, running it, and serving what it asks for.

use std::io;
use std::marker::PhantomData;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

use kvm_bindings::{KVM_CAP_ENFORCE_PV_FEATURE_CPUID, kvm_enable_cap};
use kvm_ioctls::VcpuFd;

use super::clock::Clock;
use super::engine::Profile;
use super::failed;
use super::kick::{Binding, Kicker};
use super::lapic::{Page, TimerMode};
use super::machine::Shared;
use super::registers;
use super::run::{Left, Run};
use super::signal::Signal;
use super::state::Native;
use super::tsc;
use crate::hv::state::VcpuState;
use crate::hv::{Exit, HvError, IoHandler, Kick, Vcpu, VcpuSeed};
use crate::units::GuestAddr;

const IA32_BIOS_SIGN_ID: u32 = 0x8b;
const IA32_MISC_ENABLE: u32 = 0x1a0;
/// Fast strings, and branch trace storage and precise event sampling unavailable.
const MISC_ENABLE: u64 = 1 << 0 | 1 << 11 | 1 << 12;
const LONGEST_INSTRUCTION: usize = 15;

/// A vCPU as its machine and its thread share it.
#[derive(Debug)]
pub(super) struct Slot {
    id: u8,
    kicker: Arc<Kicker>,
    /// Held over a run. Others want it only while none runs.
    cell: Mutex<Cell>,
}

impl Slot {
    pub(super) fn new(shared: &Shared, id: u8, signal: Signal, run_size: usize) -> Result<Self, HvError> {
        let run = Run::new(shared.guest().vcpu(id)?, run_size)?;
        let (fd, shown, clock) = (run.fd(), shared.shown(), shared.clock());
        if clock.scales() {
            fd.set_tsc_khz(shown.tsc_khz()).map_err(failed("KVM_SET_TSC_KHZ"))?;
        }
        fd.set_cpuid2(&shown.table(id, shared.vcpus())?).map_err(failed("KVM_SET_CPUID2"))?;
        let enforce =
            kvm_enable_cap { cap: KVM_CAP_ENFORCE_PV_FEATURE_CPUID, args: [1, 0, 0, 0], ..Default::default() };
        fd.enable_cap(&enforce).map_err(failed("KVM_ENABLE_CAP"))?;
        if shown.kind() == Profile::Baseline {
            registers::write_msrs(fd, &[(IA32_BIOS_SIGN_ID, 0), (IA32_MISC_ENABLE, MISC_ENABLE)])?;
        }
        let offset = clock.offset(fd)?;
        tsc::set_offset(fd, offset)?;
        let cell = Cell { run, offset, drift: 0, counted: false, paused: None, owes: false };
        Ok(Self { id, kicker: Arc::new(Kicker::new(signal)), cell: Mutex::new(cell) })
    }

    pub(super) fn id(&self) -> u8 {
        self.id
    }

    pub(super) fn try_lock(&self) -> Option<MutexGuard<'_, Cell>> {
        match self.cell.try_lock() {
            Ok(cell) => Some(cell),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Cell> {
        // Nothing in it is half done when a handler of the machine's panics: the kernel's state is the kernel's.
        self.cell.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What an armed timer has left.
#[derive(Clone, Copy, Debug)]
enum Timer {
    /// Of counting, in nanoseconds.
    Count(u64),
    /// Until its deadline, in ticks of the guest's counter.
    Deadline(u64),
}

/// What whoever holds the vCPU may do with it.
#[derive(Debug)]
pub(super) struct Cell {
    run: Run,
    /// The machine's offset of the time stamp counter when it was last set.
    offset: u64,
    /// What the guest has added to its own since.
    drift: u64,
    /// The timer counted when the last run ended.
    counted: bool,
    /// While time stands still: what the timer had left then.
    paused: Option<Timer>,
    /// The kernel waits for the answer to an access.
    owes: bool,
}

impl Cell {
    /// The vCPU's descriptor.
    pub(super) fn fd(&self) -> &VcpuFd {
        self.run.fd()
    }

    /// Shows the machine's time from now on.
    pub(super) fn follow(&mut self, clock: &Clock) -> Result<(), HvError> {
        let offset = clock.offset(self.run.fd())?;
        if offset != self.offset {
            tsc::set_offset(self.run.fd(), offset.wrapping_add(self.drift))?;
            self.offset = offset;
        }
        Ok(())
    }

    /// Notes what goes on with time: the guest may have changed its counter, and a timer may count.
    pub(super) fn time_stops(&mut self) -> Result<(), HvError> {
        let fd = self.run.fd();
        self.drift = tsc::offset(fd)?.wrapping_sub(self.offset);
        self.paused = match registers::tsc_deadline(fd)? {
            0 => self.count_left(&registers::lapic(fd)?).map(Timer::Count),
            deadline => Some(Timer::Deadline(deadline.saturating_sub(super::clock::read(fd)?))),
        };
        Ok(())
    }

    /// What a timer that counts has left. One that counted when the run ended, and does not any more, has expired since:
    /// its interrupt is still to come, and nowhere to be seen.
    fn count_left(&self, page: &Page) -> Option<u64> {
        page.count_left_ns().or_else(|| (self.counted && page.was_started()).then_some(0))
    }

    /// Notes what [`count_left`](Self::count_left) wants to know.
    fn run_ends(&mut self) -> Result<(), HvError> {
        self.counted = registers::lapic(self.run.fd())?.count_left_ns().is_some();
        Ok(())
    }

    /// Goes on from there: the kernel's timers have run on, and begin anew with what was left.
    pub(super) fn time_starts(&mut self, clock: &Clock) -> Result<(), HvError> {
        self.follow(clock)?;
        let fd = self.run.fd();
        match self.paused.take() {
            None => Ok(()),
            Some(Timer::Count(left)) => {
                let mut page = registers::lapic(fd)?;
                page.set_count_left_ns(left);
                registers::set_lapic(fd, &page)
            }
            Some(Timer::Deadline(left)) => {
                let now = clock.now().ticks.wrapping_add(self.drift);
                registers::set_tsc_deadline(fd, now.saturating_add(left))
            }
        }
    }

    /// Runs until the guest leaves, and serves what it left for. `None`: it is to go on.
    fn advance(&mut self, shared: &Shared, devices: &mut dyn IoHandler) -> Result<Option<Exit>, HvError> {
        self.owes = false;
        match self.run.enter()? {
            Left::Interrupted => {}
            Left::In { port, size, data } => {
                data.chunks_exact_mut(size).for_each(|data| devices.pio_in(port, data));
                self.owes = true;
            }
            Left::Out { port, size, data } => {
                data.chunks_exact(size).for_each(|data| devices.pio_out(port, data));
                self.owes = true;
            }
            Left::Read { addr, data } => {
                if !shared.ioapic().mmio_read(addr, data) {
                    read(devices, addr, data);
                }
                self.owes = true;
            }
            Left::Write { addr, data } => {
                if !shared.ioapic().mmio_write(addr, data) {
                    write(devices, addr, data);
                }
                self.owes = true;
            }
            Left::Ended { vector } => shared.ioapic().eoi(vector),
            Left::Shutdown => return Ok(Some(Exit::Shutdown)),
            Left::Refused(reason) => return Err(HvError::Entry { reason }),
            Left::Unimplemented(bytes) => {
                return Err(self.unimplemented(shared, bytes, "the kernel's emulator lacks it"));
            }
            Left::GaveUp(error) => {
                tracing::warn!(error, "KVM gave up");
                return Err(self.unimplemented(shared, Vec::new(), "the kernel gave up on it"));
            }
            Left::Unknown(reason) => {
                let source = io::Error::other(format!("an exit of unknown reason {reason}"));
                return Err(HvError::Call { call: "KVM_RUN", source });
            }
        }
        Ok(None)
    }

    /// Lets the kernel finish an instruction that it has been answered: its registers are not all written before.
    fn settle(&mut self, shared: &Shared, io: &mut dyn IoHandler) -> Result<(), HvError> {
        while self.owes {
            self.run.page().set_immediate_exit(true);
            // The instruction may have more accesses; nothing else can come of it.
            self.advance(shared, io)?;
        }
        Ok(())
    }

    fn unimplemented(&self, shared: &Shared, mut bytes: Vec<u8>, what: &'static str) -> HvError {
        let rip = match self.run.fd().get_regs() {
            Ok(regs) => regs.rip,
            Err(error) => return failed("KVM_GET_REGS")(error),
        };
        if bytes.is_empty() {
            bytes = self.bytes_at(shared, rip);
        }
        HvError::Unimplemented { rip, bytes, what }
    }

    /// The bytes at a virtual address, up to the end of its page.
    fn bytes_at(&self, shared: &Shared, va: u64) -> Vec<u8> {
        let translated = self.run.fd().translate_gva(va).ok().filter(|found| found.valid != 0);
        let Some(gpa) = translated.map(|found| found.physical_address) else { return Vec::new() };
        let on_page = (crate::units::PAGE_SIZE - gpa % crate::units::PAGE_SIZE) as usize;
        let mut bytes = vec![0; LONGEST_INSTRUCTION.min(on_page)];
        let read = shared.ram().offset_of(GuestAddr(gpa)).and_then(|at| shared.ram().read_bytes(at, &mut bytes));
        read.map_or_else(Vec::new, |()| bytes)
    }

    fn save(&mut self, shared: &Shared, id: u8) -> Result<VcpuState, HvError> {
        let clock = shared.clock();
        let native = registers::read(self.run.fd())?;
        let mut state = native.to_neutral(id);
        let still = clock.still();
        state.msrs.tsc = match still {
            Some(tsc) => tsc.wrapping_add(self.drift),
            None => super::clock::read(self.run.fd())?,
        };
        let timer = if still.is_some() {
            self.paused
        } else if native.lapic.timer_mode().counts() {
            self.count_left(&native.lapic).map(Timer::Count)
        } else {
            let deadline = registers::tsc_deadline(self.run.fd())?;
            (deadline != 0).then(|| Timer::Deadline(deadline.saturating_sub(state.msrs.tsc)))
        };
        (state.lapic.timer_left_ns, state.lapic.tsc_deadline) = match timer {
            None => (None, 0),
            Some(Timer::Count(ns)) => (Some(ns), 0),
            Some(Timer::Deadline(ticks)) => (Some(clock.ns(ticks)), state.msrs.tsc.saturating_add(ticks)),
        };
        Ok(state)
    }

    fn restore(&mut self, shared: &Shared, id: u8, state: &VcpuState) -> Result<(), HvError> {
        let native = Native::from_neutral(state, id)?;
        let before = registers::read(self.run.fd())?;
        let fd = self.run.fd();
        if let Err(error) = registers::write(fd, shared.ram(), &native) {
            registers::write(fd, shared.ram(), &before)?;
            return Err(error);
        }
        (self.drift, self.counted) = (0, false);
        if id == 0 {
            shared.set_time(state.msrs.tsc);
        }
        // Also when the offset is the one that it had: the guest may have changed its own.
        self.offset = shared.clock().offset(self.run.fd())?;
        tsc::set_offset(self.run.fd(), self.offset)?;
        self.restore_timer(shared.clock(), &native.lapic, state)
    }

    /// A timer that counts runs since its page was given to the kernel; one with a deadline is armed here. While time
    /// stands still, what either has left is noted for when it goes on.
    fn restore_timer(&mut self, clock: &Clock, page: &Page, state: &VcpuState) -> Result<(), HvError> {
        let armed = page.timer_mode() == TimerMode::TscDeadline && state.lapic.tsc_deadline != 0;
        let ticks = state.lapic.tsc_deadline.saturating_sub(state.msrs.tsc);
        let timer = if armed { Some(Timer::Deadline(ticks)) } else { page.count_left_ns().map(Timer::Count) };
        if clock.still().is_some() {
            self.paused = timer;
            return Ok(());
        }
        match timer {
            Some(Timer::Deadline(left)) => {
                registers::set_tsc_deadline(self.run.fd(), clock.now().ticks.saturating_add(left))
            }
            _ => Ok(()),
        }
    }
}

/// Instructions that move more than eight bytes come in pieces, which are whole words of a device only where they are
/// aligned; what is of another length comes byte by byte.
fn read(io: &mut dyn IoHandler, addr: u64, data: &mut [u8]) {
    if matches!(data.len(), 1 | 2 | 4 | 8) {
        return io.mmio_read(GuestAddr(addr), data);
    }
    for (addr, byte) in (addr..).zip(data.chunks_exact_mut(1)) {
        io.mmio_read(GuestAddr(addr), byte);
    }
}

fn write(io: &mut dyn IoHandler, addr: u64, data: &[u8]) {
    if matches!(data.len(), 1 | 2 | 4 | 8) {
        return io.mmio_write(GuestAddr(addr), data);
    }
    for (addr, byte) in (addr..).zip(data.chunks_exact(1)) {
        io.mmio_write(GuestAddr(addr), byte);
    }
}

/// A vCPU that has not met its thread yet.
#[derive(Debug)]
pub(super) struct Seed {
    slot: Arc<Slot>,
    shared: Arc<Shared>,
}

impl Seed {
    pub(super) fn new(slot: Arc<Slot>, shared: Arc<Shared>) -> Self {
        Self { slot, shared }
    }
}

impl VcpuSeed for Seed {
    fn kicker(&self) -> Arc<dyn Kick> {
        Arc::clone(&self.slot.kicker) as Arc<dyn Kick>
    }

    fn bind(self: Box<Self>, io: Box<dyn IoHandler>) -> Result<Box<dyn Vcpu>, HvError> {
        let Self { slot, shared } = *self;
        let page = Arc::clone(slot.lock().run.page());
        let binding = slot.kicker.bind(page);
        Ok(Box::new(KvmVcpu { _binding: binding, slot, shared, io, _thread: PhantomData }))
    }
}

/// A vCPU on its thread.
#[derive(Debug)]
struct KvmVcpu {
    _binding: Binding,
    slot: Arc<Slot>,
    shared: Arc<Shared>,
    io: Box<dyn IoHandler>,
    /// The thread that binding kicks.
    _thread: PhantomData<*const ()>,
}

impl Vcpu for KvmVcpu {
    fn run(&mut self) -> Result<Exit, HvError> {
        let mut cell = self.slot.lock();
        cell.follow(self.shared.clock())?;
        loop {
            if self.slot.kicker.take(cell.run.page()) {
                return cell.run_ends().map(|()| Exit::Kicked);
            }
            if let Some(exit) = cell.advance(&self.shared, &mut *self.io)? {
                return Ok(exit);
            }
        }
    }

    fn save(&mut self) -> Result<VcpuState, HvError> {
        let mut cell = self.slot.lock();
        cell.settle(&self.shared, &mut *self.io)?;
        cell.save(&self.shared, self.slot.id)
    }

    fn restore(&mut self, state: &VcpuState) -> Result<(), HvError> {
        let mut cell = self.slot.lock();
        cell.settle(&self.shared, &mut *self.io)?;
        cell.restore(&self.shared, self.slot.id, state)
    }
}
