//! The general executor against the manuals, one instruction at a time on a small machine: identity page tables,
//! flat segments, a handler address a vector. (The assembler is a dependency of tests on Linux on x86-64 only.)

mod events;
mod instructions;
mod modes;
mod paging;
mod strings;
mod system;

use std::sync::Arc;

use iced_x86::IcedError;
use iced_x86::code_asm::CodeAssembler;

use crate::hv::IoHandler;
use crate::hv::soft::apic::{Bus, IoApic, Lapic};
use crate::hv::soft::clock::Clock;
use crate::hv::soft::cpu::{Cpu, cr0, cr4, efer, seg, slot};
use crate::hv::soft::fault::{Exception, Flow, Stop};
use crate::hv::soft::peers::{Peers, Sharing};
use crate::hv::state::x86_64::{Segment, Table};
use crate::mem::GuestRam;
use crate::units::{Bytes, GuestAddr};

pub(super) const PAGE_TABLE: u64 = 0x4000;
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
pub(super) const DIRECTORY: u64 = 0x3000;
pub(super) const GDT: u64 = 0x5000;
pub(super) const IDT: u64 = 0x6000;
pub(super) const TSS: u64 = 0x7000;
pub(super) const HANDLERS: u64 = 0x1_0000;
pub(super) const CODE: u64 = 0x2_0000;
pub(super) const RSP0: u64 = 0x3_0000;
pub(super) const IST1: u64 = 0x3_4000;
pub(super) const STACK: u64 = 0x3_8000;
pub(super) const DATA: u64 = 0x4_0000;
/// Mapped by a 2 MiB page.
pub(super) const LARGE: u64 = 0x40_0000;

pub(super) const KERNEL_CS: u16 = 0x08;
pub(super) const KERNEL_SS: u16 = 0x10;
pub(super) const USER_SS: u16 = 0x23;
pub(super) const USER_CS: u16 = 0x2b;
pub(super) const TSS_SELECTOR: u16 = 0x30;

/// Ports answer with their own number.
#[derive(Debug)]
struct Ports;

impl IoHandler for Ports {
    fn mmio_read(&mut self, _: GuestAddr, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&mut self, _: GuestAddr, _: &[u8]) {}
    fn pio_in(&mut self, port: u16, data: &mut [u8]) {
        data.fill(port as u8);
    }
    fn pio_out(&mut self, _: u16, _: &[u8]) {}
}

pub(super) struct Machine {
    pub(super) cpu: Cpu,
}

pub(super) fn machine() -> Machine {
    let ram = Arc::new(GuestRam::new(Bytes::mib(8)).unwrap());
    let ioapic = Arc::new(IoApic::new(Bus::new(1)));
    let clock = Clock::manual();
    let peers = Arc::new(Peers::new(Arc::clone(&ram), ioapic.bus().clone()));
    let sharing = Sharing::new(peers, 0).unwrap();
    let mailbox = Arc::clone(ioapic.bus().mailbox(0).unwrap());
    let lapic = Lapic::new(0, mailbox, clock.clone(), Arc::clone(&ioapic));
    let mut machine = Machine { cpu: Cpu::new(ram, Box::new(Ports), lapic, ioapic, clock, sharing) };
    machine.tables();
    machine.registers();
    machine
}

impl Machine {
    fn tables(&mut self) {
        self.poke(PML4, PDPT | 7);
        self.poke(PDPT, DIRECTORY | 7);
        self.poke(DIRECTORY, PAGE_TABLE | 7);
        for n in 1..4 {
            self.poke(DIRECTORY + n * 8, n << 21 | 0x87);
        }
        for n in 0..512 {
            self.poke(PAGE_TABLE + n * 8, n << 12 | 7);
        }
        let descriptors = [0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0, 0x00cf_f300_0000_ffff];
        for (n, descriptor) in (0..).zip(descriptors.into_iter().chain([0x00af_fb00_0000_ffff])) {
            self.poke(GDT + n * 8, descriptor);
        }
        self.poke(GDT + u64::from(TSS_SELECTOR), 0x0000_8900_0000_0067 | TSS << 16);
        self.poke(TSS + 4, RSP0);
        self.poke(TSS + 0x24, IST1);
        // The I/O bitmap lies beyond the limit: there is none.
        self.poke(TSS + 0x66, 0x68);
        for vector in 0..=255 {
            self.gate(vector, KERNEL_CS, 0x8e00);
        }
    }

    /// An IDT entry to the vector's handler; `attributes` are bits 32 to 47.
    pub(super) fn gate(&mut self, vector: u8, selector: u16, attributes: u64) {
        let (at, handler) = (IDT + u64::from(vector) * 16, handler(vector));
        self.poke(at, handler & 0xffff | u64::from(selector) << 16 | attributes << 32 | (handler >> 16) << 48);
        self.poke(at + 8, 0);
    }

    fn registers(&mut self) {
        let cpu = &mut self.cpu;
        cpu.regs[slot::RDX] = 0;
        cpu.control.cr0 = cr0::PE | cr0::PG | cr0::WP | cr0::ET | cr0::NE;
        cpu.control.cr3 = PML4;
        cpu.control.cr4 = cr4::PAE | cr4::PGE;
        cpu.control.efer = efer::LME | efer::LMA | efer::NXE | efer::SCE;
        cpu.gdtr = Table { base: GDT, limit: 0x3f };
        cpu.idtr = Table { base: IDT, limit: 0xfff };
        cpu.tr = Segment { selector: TSS_SELECTOR, base: TSS, limit: 0x67, attributes: 0x8b, unusable: false };
        cpu.rip = CODE;
        cpu.regs[slot::RSP] = STACK;
        self.level(0);
    }

    /// Puts the processor at privilege level 0 or 3, in flat segments.
    pub(super) fn level(&mut self, cpl: u16) {
        let (code, stack) = if cpl == 0 { (KERNEL_CS, KERNEL_SS) } else { (USER_CS, USER_SS) };
        let flat = |selector, attributes: u16| Segment {
            selector,
            base: 0,
            limit: u32::MAX,
            attributes: attributes | cpl << 5,
            unusable: false,
        };
        self.cpu.segments[seg::CS] = flat(code, 0xa09b);
        self.cpu.segments[seg::SS] = flat(stack, 0xc093);
        self.cpu.mode_changed();
    }

    pub(super) fn poke(&mut self, address: u64, value: u64) {
        self.cpu.ram.store(address, value).unwrap();
    }

    pub(super) fn peek(&self, address: u64) -> u64 {
        self.cpu.ram.load(address).unwrap()
    }

    /// Rewrites the page-table entry of a low page and forgets its translation.
    pub(super) fn map(&mut self, address: u64, entry: u64) {
        self.poke(PAGE_TABLE + (address >> 12) * 8, entry);
        self.cpu.flush_tlb();
    }

    /// Executes one instruction placed at `rip`.
    pub(super) fn bytes(&mut self, bytes: &[u8]) -> Result<Flow, Stop> {
        for (at, byte) in (self.cpu.rip..).zip(bytes) {
            self.cpu.ram.store(at, *byte).unwrap();
        }
        self.cpu.step()
    }

    /// Assembles one instruction and executes it.
    pub(super) fn run(
        &mut self,
        write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
    ) -> Result<Flow, Stop> {
        let mut assembler = CodeAssembler::new(64).unwrap();
        write(&mut assembler).unwrap();
        let code = assembler.assemble(self.cpu.rip).unwrap();
        self.bytes(&code)
    }

    /// The exception that one instruction raises, with nothing changed.
    pub(super) fn fault(&mut self, write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Exception {
        let before = (self.cpu.regs, self.cpu.rflags(), self.cpu.rip, self.cpu.cpl());
        let outcome = self.run(write);
        // The page slot is set by fetching.
        self.cpu.regs[slot::PAGE] = before.0[slot::PAGE];
        assert_eq!((self.cpu.regs, self.cpu.rflags(), self.cpu.rip, self.cpu.cpl()), before);
        match outcome {
            Err(Stop::Fault(exception)) => exception,
            other => panic!("expected an exception, got {other:?}"),
        }
    }

    /// The quadwords on the stack, lowest first.
    pub(super) fn stack<const N: usize>(&self) -> [u64; N] {
        std::array::from_fn(|n| self.peek(self.cpu.regs[slot::RSP] + n as u64 * 8))
    }
}

pub(super) fn handler(vector: u8) -> u64 {
    HANDLERS + u64::from(vector) * 16
}
