//! The run loop: what happens between chains of operations.
//!
//! ```text
//!          +--> mail? kick, interrupts --> written code? drop it --> time? timer --> deliver an interrupt
//!          |                                                                            |
//!          |                                              halted: sleep until mail or timer
//!          |                                                                            |
//!          +---- budget spent, Sync, Halt, fault (delivered) <---- find block, run chain
//! ```
//!
//! A slice of [`SLICE`] instructions takes some ten microseconds: that is how late a kick, an interrupt or a timer
//! can be noticed, and how rarely the clock is read.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::hv::state::VcpuState;
use crate::hv::state::x86_64::Activity;
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
    halted: bool,
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
        Ok(Self { cpu, code, mailbox, halted: false, slice: 0, executed: 0, retired })
    }

    fn advance(&mut self) -> Result<Option<Exit>, HvError> {
        if self.mailbox.any() {
            if self.mailbox.take_kick() {
                return Ok(Some(Exit::Kicked));
            }
            self.poll()?;
            self.cpu.sharing.answer(&mut self.cpu.tlb);
        }
        if !self.cpu.code_writes.is_empty() {
            self.code.drop_written(&mut self.cpu);
        }
        if self.slice <= 0 {
            self.poll()?;
            self.slice = SLICE;
            self.retired.fetch_add(self.executed.max(0) as u64, Ordering::Relaxed);
            self.executed = 0;
        }
        if self.take_interrupt()? {
            return Ok(Some(Exit::Shutdown));
        }
        if self.halted {
            self.sleep();
            return Ok(None);
        }
        let outcome = if self.cpu.interrupt_shadow || self.cpu.system_flags & TF != 0 {
            self.one_instruction()
        } else {
            self.chain()
        };
        match outcome {
            Ok(Leave::Halt) => self.halted = true,
            Ok(Leave::Sync) => self.cpu.sharing.serialise(),
            Ok(_) => {}
            Err(stop) => return self.stopped(stop),
        }
        self.slice -= RETURN_COST;
        Ok(None)
    }

    /// Takes in what was sent and what the timer owes.
    fn poll(&mut self) -> Result<(), HvError> {
        self.cpu.lapic.poll();
        if self.cpu.lapic.take_signals() != Signals::default() {
            return Err(self.unimplemented("an NMI, INIT or start-up message"));
        }
        Ok(())
    }

    /// Delivers the highest interrupt if the processor accepts one now; true when that ended in shutdown.
    fn take_interrupt(&mut self) -> Result<bool, HvError> {
        if self.cpu.system_flags & IF == 0 || self.cpu.interrupt_shadow {
            return Ok(false);
        }
        let Some(vector) = self.cpu.lapic.deliverable() else { return Ok(false) };
        self.cpu.lapic.accept(vector);
        self.halted = false;
        match self.cpu.deliver(Exception { vector, error: None, cr2: None }, Source::External) {
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
            Flow::Halt => Some(Leave::Halt),
            _ => Some(Leave::Sync),
        })
    }

    /// The block at `rip`, and what remembers it by its address; `None` while its page's writes would go unnoticed.
    fn find(&mut self, patch: Option<Patch>) -> Result<Option<u32>, Stop> {
        let rip = self.cpu.rip;
        if !self.cpu.is_64bit() {
            return Err(Stop::Unimplemented("code outside 64-bit mode"));
        }
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
        let trap = self.cpu.system_flags & TF != 0;
        if !self.cpu.is_64bit() {
            return Err(Stop::Unimplemented("code outside 64-bit mode"));
        }
        self.cpu.interrupt_shadow = false;
        let flow = self.cpu.step()?;
        if trap {
            // Single-step trap, DR6.BS (SDM 19.3.1.4).
            self.cpu.dr[4] |= 1 << 14;
            return Err(Stop::Fault(Exception::DEBUG));
        }
        Ok(if flow == Flow::Halt { Leave::Halt } else { Leave::Sync })
    }

    /// Delivers what stopped an instruction, or reports what the engine cannot do.
    fn stopped(&mut self, stop: Stop) -> Result<Option<Exit>, HvError> {
        let exception = match stop {
            Stop::Fault(exception) => exception,
            Stop::Unimplemented(what) => return Err(self.unimplemented(what)),
        };
        self.slice -= RETURN_COST;
        match self.cpu.deliver(exception, Source::Exception) {
            Ok(()) => Ok(None),
            Err(Shutdown::TripleFault) => Ok(Some(Exit::Shutdown)),
            Err(Shutdown::Unimplemented(what)) => Err(self.unimplemented(what)),
        }
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
        let mut state = self.cpu.save();
        if self.halted {
            state.activity = Activity::Halted;
        }
        Ok(state)
    }

    fn restore(&mut self, state: &VcpuState) -> Result<(), HvError> {
        self.cpu.restore(state)?;
        self.code.clear(&mut self.cpu);
        self.halted = state.activity == Activity::Halted;
        self.slice = 0;
        Ok(())
    }
}
