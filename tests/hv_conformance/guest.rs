//! A guest: its memory and the state that its first vCPU begins in.
//!
//! Every vector leads to a stub that reports it to the bus and, if the run goes on, returns to where it came from; a
//! case puts handlers of its own in place of some. Code is assembled by a closure, and ends the run where it ends.

use std::sync::Arc;
use std::sync::OnceLock;

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use kiln::hv::state::VcpuState;
use kiln::hv::state::x86_64::Activity;
use kiln::hv::state::x86_64::Events;
use kiln::hv::state::x86_64::Fpu;
use kiln::hv::state::x86_64::Lapic;
use kiln::hv::state::x86_64::Msrs;
use kiln::hv::state::x86_64::Segment;
use kiln::hv::state::x86_64::Table;
use kiln::mem::GuestRam;

use crate::bus::EXIT_PORT;
use crate::bus::POINT_PORT;
use crate::bus::TRAP_PORT;
use crate::layout::*;

/// What assembling code returns.
pub(crate) type Assembled = Result<(), IcedError>;

/// Flat segments, as the descriptors in [`descriptors`] say.
const KERNEL_CODE: u16 = 0xa09b;
const DATA_SEGMENT: u16 = 0xc093;
const DPL3: u16 = 0x60;

/// IF, and the bit that is always set.
pub(crate) const RFLAGS: u64 = 2;
pub(crate) const IF: u64 = 1 << 9;
/// Privilege level 3 may use ports.
pub(crate) const IOPL3: u64 = 3 << 12;

pub(crate) const CR0: u64 = 0x8001_0033;
pub(crate) const CR4: u64 = 0x6a0;
pub(crate) const EFER: u64 = 0xd01;

/// A guest in the making.
#[derive(Debug)]
pub(crate) struct Guest {
    pub(crate) ram: Arc<GuestRam>,
    /// What vCPU 0 begins with.
    pub(crate) state: VcpuState,
    handlers: u64,
}

impl Guest {
    /// At privilege level 0 at [`CODE`], interrupts off.
    pub(crate) fn new() -> Self {
        let ram = Arc::new(GuestRam::new(RAM).expect("guest memory"));
        let guest = Self { ram, state: initial_state(0), handlers: HANDLERS };
        guest.paging();
        guest.descriptors();
        guest.traps();
        guest
    }

    /// A guest that executes `build`.
    pub(crate) fn running(build: impl FnOnce(&mut CodeAssembler) -> Assembled) -> Self {
        let guest = Self::new();
        guest.code(build);
        guest
    }

    fn paging(&self) {
        let table = P | RW | US;
        self.put(PML4, PDPT | table);
        self.put(PDPT, DIRECTORY | table);
        self.put(PDPT + 3 * 8, HIGH_DIRECTORY | table);
        self.put(DIRECTORY, LOW_TABLE | table);
        self.put(DIRECTORY + 8, WINDOW_TABLE | table);
        for n in 2..16 {
            self.put(DIRECTORY + n * 8, n << 21 | PS | RW | P);
        }
        for page in (0..WINDOW).step_by(0x1000) {
            let user = if (USER_CODE..USER_STACK).contains(&page) { US } else { 0 };
            self.put(LOW_TABLE + page / 0x1000 * 8, page | user | RW | P);
        }
        for large in [DEVICE, IOAPIC, LAPIC] {
            self.put(HIGH_DIRECTORY + (large >> 21 & 0x1ff) * 8, large & !0x1f_ffff | PS | PCD | RW | P);
        }
    }

    fn descriptors(&self) {
        for (at, descriptor) in [
            (KERNEL_CS, 0x00af_9b00_0000_ffff),
            (KERNEL_SS, 0x00cf_9300_0000_ffff),
            (0x18, 0x00cf_fb00_0000_ffff),
            (USER_SS & !3, 0x00cf_f300_0000_ffff),
            (USER_CS & !3, 0x00af_fb00_0000_ffff),
            (ABSENT, 0x00cf_1300_0000_ffff),
            (OTHER_CS, 0x00af_9b00_0000_ffff),
            (READ_ONLY, 0x00cf_9100_0000_ffff),
        ] {
            self.put(GDT + u64::from(at), descriptor);
        }
        for vcpu in 0..2 {
            let (tss, stacks) = (TSS + vcpu * 0x80, vcpu * PER_VCPU);
            let at = GDT + u64::from(TSS_SELECTOR) + vcpu * 16;
            self.put(at, u64::from(TSS_LIMIT) | tss << 16 | 0x8b << 40);
            self.put(at + 8, 0);
            for (field, stack) in [(0x04, RSP0), (0x24, IST1), (0x2c, IST2)] {
                self.put(tss + field, stack + stacks);
            }
            // The I/O bitmap lies beyond the limit: there is none.
            self.put(tss + 0x64, u64::from(TSS_LIMIT + 1) << 16);
        }
    }

    fn traps(&self) {
        static STUBS_CODE: OnceLock<Vec<u8>> = OnceLock::new();
        self.put_bytes(STUBS, STUBS_CODE.get_or_init(stubs));
        for vector in 0..=255 {
            self.gate(vector, STUBS + u64::from(vector) * STUB_BYTES, INTERRUPT_GATE);
        }
    }

    /// Code of vCPU 0 at privilege level 0; the run ends where it ends.
    pub(crate) fn code(&self, build: impl FnOnce(&mut CodeAssembler) -> Assembled) {
        self.code_at(CODE, build);
    }

    /// Code at `at`; the run ends where it ends.
    pub(crate) fn code_at(&self, at: u64, build: impl FnOnce(&mut CodeAssembler) -> Assembled) {
        self.put_bytes(at, &assemble(at, |a| build(a).and_then(|()| finish(a))));
    }

    /// Code of vCPU 0 at privilege level 3; the run ends where it ends. INT3 is its way into the kernel.
    pub(crate) fn user(&mut self, build: impl FnOnce(&mut CodeAssembler) -> Assembled) {
        self.user_at(USER_CODE, build);
        self.enter_user();
    }

    /// Code of privilege level 3 at `at`.
    pub(crate) fn user_at(&self, at: u64, build: impl FnOnce(&mut CodeAssembler) -> Assembled) {
        self.put_bytes(at, &assemble(at, |a| build(a).and_then(|()| finish_user(a))));
    }

    /// A handler for INT3 of level 3.
    pub(crate) fn call_handler(&mut self, build: impl FnOnce(&mut CodeAssembler) -> Assembled) {
        let handler = self.handler(3, build);
        self.gate(3, handler, USER_GATE);
    }

    /// Makes vCPU 0 begin at privilege level 3, at [`USER_CODE`].
    pub(crate) fn enter_user(&mut self) {
        let data = flat(USER_SS, DATA_SEGMENT | DPL3);
        self.state.segments = [data, flat(USER_CS, KERNEL_CODE | DPL3), data, data, data, data];
        self.state.rip = USER_CODE;
        self.state.gpr[4] = USER_STACK;
    }

    /// A handler of the case's own for `vector`, entered through an interrupt gate of level 0. It returns by itself.
    pub(crate) fn handler(&mut self, vector: u8, build: impl FnOnce(&mut CodeAssembler) -> Assembled) -> u64 {
        let at = self.handlers;
        self.handlers += HANDLER_BYTES;
        assert!(self.handlers <= CODE, "room for handlers");
        let code = assemble(at, build);
        assert!(code.len() as u64 <= HANDLER_BYTES, "room for a handler");
        self.put_bytes(at, &code);
        self.gate(vector, at, INTERRUPT_GATE);
        at
    }

    /// An entry of the interrupt descriptor table; `attributes` are its bits 32 to 47.
    pub(crate) fn gate(&self, vector: u8, handler: u64, attributes: u64) {
        self.gate_through(vector, KERNEL_CS, handler, attributes);
    }

    pub(crate) fn gate_through(&self, vector: u8, selector: u16, handler: u64, attributes: u64) {
        let at = IDT + u64::from(vector) * 16;
        let low = handler & 0xffff | u64::from(selector) << 16;
        self.put(at, low | attributes << 32 | (handler >> 16 & 0xffff) << 48);
        self.put(at + 8, handler >> 32);
    }

    /// Where the stub of `vector` begins.
    pub(crate) fn stub(vector: u8) -> u64 {
        STUBS + u64::from(vector) * STUB_BYTES
    }

    /// Sets the page-table entry of a 4 KiB page of the window.
    pub(crate) fn map(&self, page: u64, entry: u64) {
        self.put(entry_of(page), entry);
    }

    pub(crate) fn put(&self, at: u64, value: u64) {
        self.ram.store(at, value).expect("in memory");
    }

    pub(crate) fn put_bytes(&self, at: u64, bytes: &[u8]) {
        for (at, byte) in (at..).zip(bytes) {
            self.ram.store(at, *byte).expect("in memory");
        }
    }

    pub(crate) fn get(&self, at: u64) -> u64 {
        self.ram.load(at).expect("in memory")
    }

    pub(crate) fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.ram.read_bytes(at, &mut bytes).expect("in memory");
        bytes
    }

    /// Quadword `n` of the results.
    pub(crate) fn result(&self, n: u64) -> u64 {
        self.get(RESULTS + n * 8)
    }

    pub(crate) fn results<const N: usize>(&self) -> [u64; N] {
        std::array::from_fn(|n| self.result(n as u64))
    }
}

/// A 64-bit interrupt gate of level 0, and of level 3, and a trap gate (SDM volume 3A, 7.14.1).
pub(crate) const INTERRUPT_GATE: u64 = 0x8e00;
pub(crate) const USER_GATE: u64 = 0xee00;
pub(crate) const TRAP_GATE: u64 = 0x8f00;

/// Where the entry of a page of the low 4 MiB lies.
pub(crate) fn entry_of(page: u64) -> u64 {
    assert!(page < LARGE, "mapped by 4 KiB pages");
    LOW_TABLE + page / 0x1000 * 8
}

/// Assembles code that lies at `at`.
pub(crate) fn assemble(at: u64, build: impl FnOnce(&mut CodeAssembler) -> Assembled) -> Vec<u8> {
    let code = || {
        let mut a = CodeAssembler::new(64)?;
        build(&mut a)?;
        a.assemble(at)
    };
    code().expect("the code assembles")
}

/// `jmp $`: where a guest waits for its run to end, as a kick is noticed soon and not at once.
pub(crate) const WAIT_HERE: u16 = 0xfeeb;

/// Stops the run by a write to `port`. A run that goes on does so after this.
pub(crate) fn stop(a: &mut CodeAssembler, port: u16) -> Assembled {
    a.out(u32::from(port), eax)?;
    let mut here = a.create_label();
    a.set_label(&mut here)?;
    a.jmp(here)
}

/// Ends the run.
pub(crate) fn finish(a: &mut CodeAssembler) -> Assembled {
    stop(a, EXIT_PORT)
}

/// What ends a run at level 3, where not every host lets a guest use ports: UD2, and a mark.
pub(crate) const USER_END: u32 = u32::from_le_bytes([0x0f, 0x0b, b'K', b'N']);

/// Ends the run at level 3.
pub(crate) fn finish_user(a: &mut CodeAssembler) -> Assembled {
    a.db(&USER_END.to_le_bytes())
}

/// A point of the program with number `n`; EAX is lost.
pub(crate) fn point(a: &mut CodeAssembler, n: u32) -> Assembled {
    a.mov(eax, n)?;
    stop(a, POINT_PORT)
}

/// Moves a state that was saved in [`stop`] past it.
pub(crate) fn pass_stop(state: &mut VcpuState, ram: &GuestRam) {
    if ram.load::<u16>(state.rip) == Some(WAIT_HERE) {
        state.rip += 2;
    }
}

/// Adds one to the results' quadword `n`.
pub(crate) fn count(a: &mut CodeAssembler, n: u64) -> Assembled {
    a.inc(qword_ptr(RESULTS + n * 8))
}

/// Keeps a register as the results' quadword `n`.
pub(crate) fn keep(a: &mut CodeAssembler, n: u64, register: AsmRegister64) -> Assembled {
    a.mov(qword_ptr(RESULTS + n * 8), register)
}

/// Whether the processor pushes an error code for a vector (SDM volume 3A, table 7-1).
pub(crate) fn has_error_code(vector: u8) -> bool {
    matches!(vector, 8 | 10..=14 | 17 | 21)
}

/// `push 0 (where the processor pushes no error code); push rax; eax = vector; stop; pop rax; drop the code; iretq`.
fn stubs() -> Vec<u8> {
    let stub = |vector: u8| {
        let at = Guest::stub(vector);
        let mut code = assemble(at, |a| {
            if !has_error_code(vector) {
                a.push(0)?;
            }
            a.push(rax)?;
            a.mov(eax, u32::from(vector))?;
            stop(a, TRAP_PORT)?;
            a.pop(rax)?;
            a.add(rsp, 8)?;
            a.iretq()
        });
        assert!(code.len() as u64 <= STUB_BYTES);
        code.resize(STUB_BYTES as usize, 0xcc);
        code
    };
    (0..=255).flat_map(stub).collect()
}

fn flat(selector: u16, attributes: u16) -> Segment {
    Segment { selector, base: 0, limit: u32::MAX, attributes, unusable: false }
}

/// 64-bit mode at privilege level 0, interrupts off: vCPU `vcpu` at its own code, stack and TSS.
pub(crate) fn initial_state(vcpu: u8) -> VcpuState {
    const BOOT_PROCESSOR: u64 = 1 << 8;
    let index = u64::from(vcpu);
    let mut gpr = [0; 16];
    gpr[4] = STACK + index * PER_VCPU;
    let data = flat(KERNEL_SS, DATA_SEGMENT);
    let lapic = Lapic::default();
    let apic_base = if vcpu == 0 { lapic.apic_base } else { lapic.apic_base & !BOOT_PROCESSOR };
    VcpuState {
        gpr,
        rip: CODE + index * (SECOND_CODE - CODE),
        rflags: RFLAGS,
        cr0: CR0,
        cr2: 0,
        cr3: PML4,
        cr4: CR4,
        cr8: 0,
        dr: [0, 0, 0, 0, 0xffff_0ff0, 0x400],
        segments: [data, flat(KERNEL_CS, KERNEL_CODE), data, data, data, data],
        ldtr: Segment { attributes: 0x82, unusable: true, ..Segment::default() },
        tr: Segment {
            selector: TSS_SELECTOR + u16::from(vcpu) * 16,
            base: TSS + index * 0x80,
            limit: TSS_LIMIT.into(),
            attributes: 0x8b,
            unusable: false,
        },
        gdtr: Table { base: GDT, limit: GDT_LIMIT },
        idtr: Table { base: IDT, limit: IDT_LIMIT },
        msrs: Msrs { efer: EFER, pat: 0x0007_0406_0007_0406, ..Msrs::default() },
        fpu: Fpu::default(),
        lapic: Lapic { id: vcpu.into(), apic_base, ..lapic },
        interrupt_shadow: false,
        activity: Activity::Running,
        events: Events::default(),
    }
}
