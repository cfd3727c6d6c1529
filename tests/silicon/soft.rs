//! Processors through the hypervisor seam: the one under test, and in kernel mode the reference too.

use std::num::NonZeroU8;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use kiln::hv::soft::Soft;
use kiln::hv::state::VcpuState;
use kiln::hv::state::x86_64::{Segment, Table};
use kiln::hv::{Exit, HvError, Hypervisor, IoHandler, Kick, Vcpu, VmSpec};
use kiln::mem::GuestRam;
use kiln::units::{Bytes, GuestAddr, VcpuId};

use crate::machine;
use crate::outcome::{Processor, Stopped};
use crate::sequence::Start;

const NO_PORT: u32 = u32::MAX;

/// Keeps the port of the last `out`, and ends the run at it.
#[derive(Debug)]
struct Ports {
    last: Arc<AtomicU32>,
    kicker: Arc<dyn Kick>,
}

impl IoHandler for Ports {
    fn mmio_read(&mut self, _: GuestAddr, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn mmio_write(&mut self, _: GuestAddr, _: &[u8]) {}

    fn pio_in(&mut self, _: u16, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn pio_out(&mut self, port: u16, _: &[u8]) {
        self.last.store(port.into(), Ordering::Relaxed);
        self.kicker.kick();
    }
}

/// A virtual machine of an engine with one vCPU.
#[derive(Debug)]
pub(crate) struct Machine {
    vcpu: Box<dyn Vcpu>,
    ram: Arc<GuestRam>,
    last: Arc<AtomicU32>,
}

impl Machine {
    pub(crate) fn new(engine: &dyn Hypervisor) -> Result<Self, String> {
        let ram = Arc::new(GuestRam::new(Bytes(machine::RAM_BYTES)).map_err(|error| error.to_string())?);
        machine::build(&ram);
        let vm = engine.create_vm(&VmSpec { vcpus: NonZeroU8::MIN }, Arc::clone(&ram)).map_err(text)?;
        let seed = vm.create_vcpu(VcpuId(0)).map_err(text)?;
        let last = Arc::new(AtomicU32::new(NO_PORT));
        let ports = Ports { last: Arc::clone(&last), kicker: seed.kicker() };
        let vcpu = seed.bind(Box::new(ports)).map_err(text)?;
        Ok(Self { vcpu, ram, last })
    }

    pub(crate) fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// Runs from `state` until an `out`; its port, and the state then. `None` when the engine lacks something of the
    /// program.
    pub(crate) fn run(&mut self, state: &VcpuState) -> Result<Option<(u16, VcpuState)>, String> {
        self.vcpu.restore(state).map_err(text)?;
        self.last.store(NO_PORT, Ordering::Relaxed);
        match self.vcpu.run() {
            Ok(Exit::Kicked) => {}
            // Also an emulator that cannot deliver an exception gives up in this way.
            Ok(Exit::Shutdown) | Err(HvError::Unimplemented { .. }) => return Ok(None),
            other => return Err(format!("unexpected exit {other:?}")),
        }
        let port = self.last.load(Ordering::Relaxed);
        let port = u16::try_from(port).map_err(|_| "kicked without an out".to_owned())?;
        Ok(Some((port, self.vcpu.save().map_err(text)?)))
    }
}

/// The soft engine's processor in user mode.
#[derive(Debug)]
pub(crate) struct SoftProcessor {
    machine: Machine,
    user: VcpuState,
}

impl SoftProcessor {
    pub(crate) fn new() -> Result<Self, String> {
        Ok(Self { machine: Machine::new(&Soft::new())?, user: user_mode(VcpuState::after_reset(0)) })
    }
}

fn text(error: HvError) -> String {
    error.to_string()
}

impl Processor for SoftProcessor {
    fn ram(&self) -> &GuestRam {
        self.machine.ram()
    }

    fn run(&mut self, start: &Start) -> Result<Stopped, String> {
        let mut state = self.user.clone();
        (state.gpr, state.rflags, state.fpu) = (start.gpr, start.rflags, start.fpu);
        let (port, state) = self.machine.run(&state)?.ok_or("the engine lacks an instruction")?;
        let vector = u8::try_from(port).map_err(|_| format!("an out to port {port:#x}"))?;
        Ok(Stopped { vector, gpr: state.gpr, cr2: state.cr2, fpu: state.fpu })
    }
}

fn segment(selector: u16, base: u64, attributes: u16) -> Segment {
    Segment { selector, base, limit: 0xffff_ffff, attributes, unusable: false }
}

fn user_mode(reset: VcpuState) -> VcpuState {
    let data = |base| segment(machine::USER_SS, base, 0xc0f3);
    let code = segment(machine::USER_CS, 0, 0xa0fb);
    let mut state = reset;
    state.segments = [data(0), code, data(0), data(0), data(machine::FS_BASE), data(machine::GS_BASE)];
    state.tr = Segment {
        selector: machine::TSS_SELECTOR,
        base: machine::TSS,
        limit: machine::TSS_LIMIT,
        attributes: 0x8b,
        unusable: false,
    };
    state.ldtr = Segment { unusable: true, ..Segment::default() };
    state.gdtr = Table { base: machine::GDT, limit: machine::GDT_LIMIT };
    state.idtr = Table { base: machine::IDT, limit: machine::IDT_LIMIT };
    (state.cr0, state.cr2, state.cr3, state.cr4) = (machine::CR0, 0, machine::PML4, machine::CR4);
    state.msrs.efer = machine::EFER;
    state.rip = machine::CODE;
    state
}
