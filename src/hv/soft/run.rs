//! The run loop: what happens between chains of operations.
//!
//! ```text
//!          +--> mail? kick, INIT, NMI, interrupts --> written code? drop it --> time? timer --> deliver an event
//!          |                                                                                      |
//!          |                                          not started, or halted: sleep until mail or timer
//!          |                                                                                      |
//!          +---- budget spent, Sync, Halt, fault (delivered) <---- find block, run chain; outside 64-bit mode
//!                                                                  one instruction after the other
//! ```
//!
//! A slice of [`SLICE`] instructions takes some ten microseconds: that is how late a kick, an interrupt or a timer
//! can be noticed, and how rarely the clock is read.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::hv::state::VcpuState;
use crate::hv::state::x86_64::{Activity, Delivery, DeliverySource, Events};
use crate::hv::{Exit, HvError, Vcpu};

use super::code::CodeCache;
use super::cpu::{Cpu, slot};
use super::exec::{Shutdown, Source};
use super::fast::{Leave, Patch};
use super::fault::{Exception, Flow, Stop};
use super::flags::{IF, TF};
use super::mailbox::{Mailbox, Signals};
use super::shared_code::Blocks;
use crate::units::PAGE_SIZE;

/// Instructions between two looks at the clock. Also bounds how deep handlers may call one another where the
/// optimiser does not turn their last call into a jump.
const SLICE: i32 = 2048;

/// What a return to the run loop is charged, so that code which always returns still lets time pass.
const RETURN_COST: i32 = 8;

/// A vCPU on its thread.
#[derive(Debug)]
pub(super) struct SoftVcpu {
    cpu: Cpu,
    code: CodeCache,
    mailbox: Arc<Mailbox>,
    activity: Activity,
    nmi_pending: bool,
    delivering: Option<Delivery>,
    /// Instructions left of the slice.
    slice: i32,
    /// Instructions executed since they were last added to the engine's count.
    executed: i32,
    retired: Arc<AtomicU64>,
}

impl SoftVcpu {
    /// # Errors
    /// [`HvError::Call`] when the host has no memory.
    pub(super) fn new(
        mut cpu: Cpu,
        mailbox: Arc<Mailbox>,
        retired: Arc<AtomicU64>,
        shared: Option<Arc<Blocks>>,
    ) -> Result<Self, HvError> {
        let code = CodeCache::new(shared, &mut cpu)?;
        let boot = cpu.lapic.is_boot_processor();
        let activity = if boot { Activity::Running } else { Activity::WaitsForInit };
        Ok(Self { cpu, code, mailbox, activity, nmi_pending: false, delivering: None, slice: 0, executed: 0, retired })
    }

    fn advance(&mut self) -> Result<Option<Exit>, HvError> {
        if self.mailbox.any() {
            if self.mailbox.take_kick() {
                return Ok(Some(Exit::Kicked));
            }
            self.poll();
            self.cpu.sharing.answer(&mut self.cpu.tlb);
        } else if self.cpu.lapic.has_signals() {
            // Sent by itself, and received at once: a halt must not miss it.
            self.poll();
        }
        if !self.cpu.code_writes.is_empty() {
            self.code.drop_written(&mut self.cpu);
        }
        if self.slice <= 0 {
            self.poll();
            self.slice = SLICE;
            self.retired.fetch_add(self.executed.max(0) as u64, Ordering::Relaxed);
            self.executed = 0;
        }
        if self.waits() {
            self.sleep();
            return Ok(None);
        }
        if self.take_event()? {
            return Ok(Some(Exit::Shutdown));
        }
        if self.activity == Activity::Halted {
            self.sleep();
            return Ok(None);
        }
        let outcome = if self.cpu.interrupt_shadow || self.cpu.system_flags & TF != 0 {
            self.one_instruction()
        } else if self.cpu.is_64bit() {
            self.chain()
        } else {
            self.one_by_one()
        };
        match outcome {
            Ok(Leave::Halt) => self.activity = Activity::Halted,
            Ok(Leave::Budget) => self.slice = 0,
            Ok(Leave::Sync) => self.cpu.sharing.serialise(),
            Ok(_) => {}
            Err(stop) => return self.stopped(stop),
        }
        self.slice -= RETURN_COST;
        Ok(None)
    }

    /// Whether nobody has started this processor.
    fn waits(&self) -> bool {
        matches!(self.activity, Activity::WaitsForInit | Activity::WaitsForStartUp)
    }

    /// Takes in what was sent and what the timer owes.
    fn poll(&mut self) {
        self.cpu.lapic.poll();
        let Signals { nmi, init, sipi } = self.cpu.lapic.take_signals();
        if init {
            self.init();
        }
        self.nmi_pending |= nmi;
        if let Some(vector) = sipi {
            self.start_up(vector);
        }
    }

    /// INIT: forgets all that was under way. The boot processor begins at the reset vector, the others wait (SDM 9.4.3).
    fn init(&mut self) {
        self.cpu.init();
        (self.nmi_pending, self.delivering) = (false, None);
        let boot = self.cpu.lapic.is_boot_processor();
        self.activity = if boot { Activity::Running } else { Activity::WaitsForStartUp };
    }

    /// A start-up message, which only a processor after INIT heeds.
    fn start_up(&mut self, vector: u8) {
        if self.activity == Activity::WaitsForStartUp {
            self.cpu.start_up(vector);
            self.activity = Activity::Running;
        }
    }

    /// Delivers what comes before the next instruction, if the processor accepts it now: what had been decided on, an
    /// NMI, the highest interrupt (SDM 7.9). True when that ended in shutdown.
    fn take_event(&mut self) -> Result<bool, HvError> {
        if let Some(delivery) = self.delivering {
            return self.resume_delivery(delivery);
        }
        if self.cpu.interrupt_shadow {
            return Ok(false);
        }
        if self.nmi_pending && !self.cpu.nmi_masked {
            self.nmi_pending = false;
            return self.deliver_nmi();
        }
        if self.cpu.system_flags & IF == 0 {
            return Ok(false);
        }
        let Some(vector) = self.cpu.lapic.deliverable() else { return Ok(false) };
        self.cpu.lapic.accept(vector);
        self.deliver(Exception { vector, error: None, cr2: None }, Source::External)
    }

    fn deliver_nmi(&mut self) -> Result<bool, HvError> {
        self.cpu.nmi_masked = true;
        self.deliver(Exception::NMI, Source::External)
    }

    /// Delivers what a saved state had under way. A page fault has CR2 set already.
    fn resume_delivery(&mut self, delivery: Delivery) -> Result<bool, HvError> {
        let event = Exception { vector: delivery.vector, error: delivery.error, cr2: None };
        let shutdown = match delivery.source {
            DeliverySource::Nmi => self.deliver_nmi(),
            DeliverySource::External => self.deliver(event, Source::External),
            DeliverySource::Exception => self.deliver(event, Source::Exception),
            DeliverySource::Software => self.deliver(event, Source::Software),
        }?;
        self.delivering = None;
        Ok(shutdown)
    }

    /// Enters an event's handler; true when that ended in shutdown.
    fn deliver(&mut self, event: Exception, source: Source) -> Result<bool, HvError> {
        self.activity = Activity::Running;
        match self.cpu.deliver(event, source) {
            Ok(()) => Ok(false),
            Err(Shutdown::TripleFault) => Ok(true),
            Err(Shutdown::Unimplemented(what)) => Err(self.unimplemented(what)),
        }
    }

    /// Sleeps until mail arrives or the timer is due.
    fn sleep(&mut self) {
        let deadline = self.cpu.lapic.next_deadline_ns().and_then(|ns| self.cpu.clock.instant_at(ns));
        self.cpu.sharing.rest(&mut self.cpu.tlb);
        self.mailbox.park_until(deadline);
        self.cpu.sharing.wake(&mut self.cpu.tlb);
        self.slice = 0;
    }

    /// A slice of code outside 64-bit mode, for which nothing is decoded in advance.
    fn one_by_one(&mut self) -> Result<Leave, Stop> {
        loop {
            let flow = self.cpu.step()?;
            self.executed += 1;
            self.slice -= 1;
            match flow {
                Flow::Next | Flow::Jump if self.slice > 0 && self.cpu.code_writes.is_empty() => {}
                flow => return Ok(flow.into()),
            }
        }
    }

    /// A slice of decoded code.
    fn chain(&mut self) -> Result<Leave, Stop> {
        let mut patch = None;
        self.cpu.budget = self.slice;
        loop {
            let Some(block) = self.find(patch.take())? else {
                if let Some(leave) = self.undecoded()? {
                    return Ok(leave);
                }
                continue;
            };
            let Some((op, rest)) = self.code.arena().get(block as usize..).and_then(<[_]>::split_first) else {
                return Err(Stop::Unimplemented("a block outside the arena"));
            };
            self.cpu.regs[slot::PAGE] = self.cpu.rip & !(PAGE_SIZE - 1);
            self.cpu.patch = None;
            let leave = (op.run)(&mut self.cpu, op, rest, self.code.arena());
            self.executed += self.slice - self.cpu.budget;
            self.slice = self.cpu.budget;
            match leave {
                Leave::Lookup => patch = self.cpu.patch.take(),
                Leave::Stopped => return Err(self.cpu.stop),
                other => return Ok(other),
            }
        }
    }

    /// One instruction where code cannot be kept yet; what ends the slice, if something does.
    fn undecoded(&mut self) -> Result<Option<Leave>, Stop> {
        let flow = self.cpu.step()?;
        self.slice -= RETURN_COST;
        self.executed += 1;
        self.cpu.budget = self.slice;
        Ok(match flow {
            Flow::Next | Flow::Jump if self.slice <= 0 => Some(Leave::Budget),
            Flow::Next | Flow::Jump if self.cpu.code_writes.is_empty() => None,
            flow => Some(flow.into()),
        })
    }

    /// The block at `rip`, and what remembers it by its address; `None` while its page's writes would go unnoticed.
    fn find(&mut self, patch: Option<Patch>) -> Result<Option<u32>, Stop> {
        let rip = self.cpu.rip;
        let offset = self.cpu.fetch_offset(rip)?;
        if self.cpu.sharing.any_written() {
            self.code.drop_others_written(&mut self.cpu);
        }
        let before = self.code.arena().len();
        let Some(block) = self.code.block(&mut self.cpu, offset) else { return Ok(None) };
        self.cpu.jumps.insert(rip, self.cpu.fetch_key(rip), block);
        // A shrunken arena was cleared: the branch that asked is gone.
        if let Some(patch) = patch
            && self.code.arena().len() >= before
        {
            self.code.patch(patch, block);
        }
        Ok(Some(block))
    }

    /// One instruction by the general executor: in an interrupt shadow, and when single-stepping.
    fn one_instruction(&mut self) -> Result<Leave, Stop> {
        self.cpu.single_step = self.cpu.system_flags & TF != 0;
        self.cpu.interrupt_shadow = false;
        let flow = self.cpu.step()?;
        if std::mem::take(&mut self.cpu.single_step) {
            // Single-step trap, DR6.BS (SDM 19.3.1.4).
            self.cpu.dr[4] |= 1 << 14;
            return Err(Stop::Fault(Exception::DEBUG));
        }
        Ok(flow.into())
    }

    /// Delivers what stopped an instruction, or reports what the engine cannot do.
    fn stopped(&mut self, stop: Stop) -> Result<Option<Exit>, HvError> {
        let exception = match stop {
            Stop::Fault(exception) => exception,
            Stop::Unimplemented(what) => return Err(self.unimplemented(what)),
        };
        self.slice -= RETURN_COST;
        Ok(self.deliver(exception, Source::Exception)?.then_some(Exit::Shutdown))
    }

    fn unimplemented(&mut self, what: &'static str) -> HvError {
        HvError::Unimplemented { rip: self.cpu.rip, bytes: self.cpu.bytes_at_rip(), what }
    }
}

impl Vcpu for SoftVcpu {
    fn run(&mut self) -> Result<Exit, HvError> {
        self.cpu.sharing.wake(&mut self.cpu.tlb);
        let end = loop {
            if let Some(end) = self.advance().transpose() {
                break end;
            }
        };
        self.cpu.sharing.rest(&mut self.cpu.tlb);
        end
    }

    fn save(&mut self) -> Result<VcpuState, HvError> {
        self.poll();
        let mut state = self.cpu.save();
        state.activity = self.activity;
        state.events.nmi_pending = self.nmi_pending;
        state.events.delivering = self.delivering;
        Ok(state)
    }

    fn restore(&mut self, state: &VcpuState) -> Result<(), HvError> {
        self.cpu.restore(state)?;
        self.code.clear(&mut self.cpu);
        self.activity = state.activity;
        let Events { nmi_pending, nmi_masked: _, start_up, delivering } = state.events;
        (self.nmi_pending, self.delivering) = (nmi_pending, delivering);
        // Who does not execute instructions has none left to be in the shadow of.
        self.cpu.interrupt_shadow &= self.activity == Activity::Running;
        if let Some(vector) = start_up {
            self.start_up(vector);
        }
        self.slice = 0;
        Ok(())
    }
}
