//! A bare-metal guest: machine code at a fixed address in 64-bit mode under the soft engine, without a kernel.
//!
//! Memory: page tables at 0x1000 map the first GiB one to one with 2 MiB pages, code lies at [`CODE`], the stack
//! ends at [`STACK`]. A guest ends its run by `out` to [`EXIT_PORT`].
#![allow(dead_code, reason = "each test binary includes this file and uses its part")]

use std::num::NonZeroU8;
use std::sync::Arc;
use std::sync::OnceLock;

use kiln::hv::soft::Soft;
use kiln::hv::state::VcpuState;
use kiln::hv::state::x86_64::{Activity, Events, Fpu, Lapic, Msrs, Segment, Table};
use kiln::hv::{Exit, HvError, Hypervisor, IoHandler, Kick, Vcpu, VmSpec};
use kiln::mem::GuestRam;
use kiln::units::{Bytes, GuestAddr, VcpuId};

/// Where code is loaded.
pub(crate) const CODE: u64 = 0x10_0000;
/// Initial stack pointer.
pub(crate) const STACK: u64 = 0x20_0000;
/// A write to this port ends the run.
pub(crate) const EXIT_PORT: u16 = 0xf4;

#[derive(Debug)]
struct ExitOnOut {
    kick: Arc<OnceLock<Arc<dyn Kick>>>,
}

impl IoHandler for ExitOnOut {
    fn mmio_read(&mut self, _addr: GuestAddr, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&mut self, _addr: GuestAddr, _data: &[u8]) {}
    fn pio_in(&mut self, _port: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn pio_out(&mut self, port: u16, _data: &[u8]) {
        if port == EXIT_PORT
            && let Some(kick) = self.kick.get()
        {
            kick.kick();
        }
    }
}

/// A machine with one vCPU, ready to run.
#[derive(Debug)]
pub(crate) struct Bare {
    pub(crate) ram: Arc<GuestRam>,
    pub(crate) vcpu: Box<dyn Vcpu>,
    kick: Arc<dyn Kick>,
}

impl Bare {
    /// Loads `code` and enters it.
    pub(crate) fn new(code: &[u8]) -> Self {
        let ram = GuestRam::new(Bytes::mib(64)).expect("guest memory");
        map_first_gib(&ram);
        for (i, &byte) in code.iter().enumerate() {
            ram.store(CODE + i as u64, byte).expect("code in memory");
        }
        Self::enter(&Soft::new(), ram)
    }

    /// Enters the code that `ram` holds.
    pub(crate) fn enter(engine: &dyn Hypervisor, ram: GuestRam) -> Self {
        let ram = Arc::new(ram);
        let vm = engine.create_vm(&VmSpec { vcpus: NonZeroU8::MIN }, Arc::clone(&ram)).expect("machine");
        let seed = vm.create_vcpu(VcpuId(0)).expect("vcpu");
        let kick = Arc::new(OnceLock::new());
        let kicker = seed.kicker();
        kick.set(Arc::clone(&kicker)).expect("set once");
        let mut vcpu = seed.bind(Box::new(ExitOnOut { kick })).expect("bind");
        vcpu.restore(&initial_state()).expect("a valid state");
        Self { ram, vcpu, kick: kicker }
    }

    /// What ends the guest's run from another thread.
    pub(crate) fn kick(&self) -> Arc<dyn Kick> {
        Arc::clone(&self.kick)
    }

    /// Runs until the guest leaves by the exit port, and returns its state then.
    pub(crate) fn run(&mut self) -> Result<VcpuState, HvError> {
        assert_eq!(self.vcpu.run()?, Exit::Kicked, "the guest shut down");
        self.vcpu.save()
    }
}

/// Page tables at 0x1000, for CR3.
pub(crate) fn map_first_gib(ram: &GuestRam) {
    store64(ram, 0x1000, 0x2003);
    store64(ram, 0x2000, 0x3003);
    for i in 0..512 {
        store64(ram, 0x3000 + i * 8, (i << 21) | 0x83);
    }
}

fn store64(ram: &GuestRam, at: u64, value: u64) {
    ram.store(at, value).expect("in memory");
}

/// 64-bit mode at privilege level 0, interrupts off.
pub(crate) fn initial_state() -> VcpuState {
    let code = Segment { selector: 0x10, base: 0, limit: u32::MAX, attributes: 0xa09b, unusable: false };
    let data = Segment { selector: 0x18, base: 0, limit: u32::MAX, attributes: 0xc093, unusable: false };
    let mut gpr = [0; 16];
    gpr[4] = STACK;
    VcpuState {
        gpr,
        rip: CODE,
        rflags: 2,
        cr0: 0x8001_0033,
        cr2: 0,
        cr3: 0x1000,
        cr4: 0x620,
        cr8: 0,
        dr: [0, 0, 0, 0, 0xffff_0ff0, 0x400],
        segments: [data, code, data, data, data, data],
        ldtr: Segment { unusable: true, ..Segment::default() },
        tr: Segment { selector: 0, base: 0, limit: 0xffff, attributes: 0x8b, unusable: false },
        gdtr: Table::default(),
        idtr: Table::default(),
        msrs: Msrs { efer: 0xd01, pat: 0x0007_0406_0007_0406, ..Msrs::default() },
        fpu: Fpu::default(),
        lapic: Lapic::default(),
        interrupt_shadow: false,
        activity: Activity::Running,
        events: Events::default(),
    }
}
