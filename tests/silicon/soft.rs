//! The processor under test, through the hypervisor seam.

use std::num::NonZeroU8;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use kiln::hv::soft::Soft;
use kiln::hv::state::VcpuState;
use kiln::hv::state::x86_64::{Activity, Segment, Table};
use kiln::hv::{Exit, Hypervisor, IoHandler, Kick, Vcpu, VmSpec};
use kiln::mem::GuestRam;
use kiln::units::{Bytes, GuestAddr, VcpuId};

use crate::machine;
use crate::outcome::{Processor, Stopped};
use crate::sequence::Start;
use crate::system::System;

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

/// A virtual machine of the soft engine with one vCPU.
#[derive(Debug)]
pub(crate) struct SoftProcessor {
    vcpu: Box<dyn Vcpu>,
    ram: Arc<GuestRam>,
    last: Arc<AtomicU32>,
    user: VcpuState,
}

impl SoftProcessor {
    pub(crate) fn new() -> Result<Self, String> {
        let ram = Arc::new(GuestRam::new(Bytes(machine::RAM_BYTES)).map_err(|error| error.to_string())?);
        machine::build(&ram);
        let vm = Soft::new().create_vm(&VmSpec { vcpus: NonZeroU8::MIN }, Arc::clone(&ram)).map_err(text)?;
        let seed = vm.create_vcpu(VcpuId(0)).map_err(text)?;
        let last = Arc::new(AtomicU32::new(NO_PORT));
        let ports = Ports { last: Arc::clone(&last), kicker: seed.kicker() };
        let mut vcpu = seed.bind(Box::new(ports)).map_err(text)?;
        let user = user_mode(vcpu.save().map_err(text)?);
        Ok(Self { vcpu, ram, last, user })
    }
}

fn text(error: kiln::hv::HvError) -> String {
    error.to_string()
}

impl Processor for SoftProcessor {
    fn ram(&self) -> &GuestRam {
        &self.ram
    }

    fn run(&mut self, start: &Start) -> Result<Stopped, String> {
        let mut state = self.user.clone();
        (state.gpr, state.rflags, state.fpu) = (start.gpr, start.rflags, start.fpu);
        self.vcpu.restore(&state).map_err(text)?;
        self.last.store(NO_PORT, Ordering::Relaxed);
        match self.vcpu.run().map_err(text)? {
            Exit::Kicked => {}
            other => return Err(format!("unexpected exit {other:?}")),
        }
        let port = self.last.load(Ordering::Relaxed);
        let vector = u8::try_from(port).map_err(|_| "kicked without an out".to_owned())?;
        let state = self.vcpu.save().map_err(text)?;
        Ok(Stopped { vector, gpr: state.gpr, cr2: state.cr2, fpu: state.fpu })
    }
}

impl System for SoftProcessor {
    fn memory(&self) -> &GuestRam {
        &self.ram
    }

    fn run_system(&mut self, state: &VcpuState) -> Result<Option<(u16, VcpuState)>, String> {
        self.vcpu.restore(state).map_err(text)?;
        self.last.store(NO_PORT, Ordering::Relaxed);
        match self.vcpu.run().map_err(text)? {
            Exit::Kicked => {}
            other => return Err(format!("unexpected exit {other:?}")),
        }
        let port = self.last.load(Ordering::Relaxed);
        let port = u16::try_from(port).map_err(|_| "kicked without an out".to_owned())?;
        Ok(Some((port, self.vcpu.save().map_err(text)?)))
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
    (state.activity, state.interrupt_shadow) = (Activity::Running, false);
    state
}
