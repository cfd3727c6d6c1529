//! The state of one x86-64 vCPU (Intel SDM volume 3A, chapters 2, 3 and 11; AMD APM volume 2).

use serde::{Deserialize, Serialize};

/// Everything a vCPU is, between two instructions.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VcpuState {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15: the order of instruction encoding.
    pub gpr: [u64; 16],
    /// Address of the next instruction.
    pub rip: u64,
    /// RFLAGS.
    pub rflags: u64,
    /// CR0.
    pub cr0: u64,
    /// CR2: the last page fault's address.
    pub cr2: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// CR8: the task priority.
    pub cr8: u64,
    /// DR0 to DR3, DR6 and DR7.
    pub dr: [u64; 6],
    /// ES, CS, SS, DS, FS, GS: the order of instruction encoding.
    pub segments: [Segment; 6],
    /// The local descriptor table.
    pub ldtr: Segment,
    /// The task register.
    pub tr: Segment,
    /// The global descriptor table.
    pub gdtr: Table,
    /// The interrupt descriptor table.
    pub idtr: Table,
    /// Model-specific registers.
    pub msrs: Msrs,
    /// x87, MMX and SSE state.
    pub fpu: Fpu,
    /// The local APIC.
    pub lapic: Lapic,
    /// An interrupt may not be taken before one more instruction (after STI and MOV SS).
    pub interrupt_shadow: bool,
    /// Whether it executes instructions, or what it waits for.
    pub activity: Activity,
    /// What it has been told and not acted on yet, beside the interrupts in its local APIC.
    pub events: Events,
}

impl VcpuState {
    /// Processor number `id` after reset (Intel SDM volume 3A, table 10-1). The first one is the boot processor and runs; the
    /// others wait to be called.
    ///
    /// ```
    /// use kiln::hv::state::VcpuState;
    /// use kiln::hv::state::x86_64::Activity;
    ///
    /// assert_eq!(VcpuState::after_reset(0).rip, 0xfff0);
    /// assert_eq!(VcpuState::after_reset(1).activity, Activity::WaitsForInit);
    /// ```
    #[must_use]
    pub fn after_reset(id: u8) -> Self {
        const CACHES_OFF: u64 = 0x6000_0010;
        const BOOT_PROCESSOR: u64 = 1 << 8;
        let data = Segment { limit: 0xffff, attributes: 0x93, ..Segment::default() };
        let table = Table { base: 0, limit: 0xffff };
        let (boot, lapic) = (id == 0, Lapic::default());
        let apic_base = if boot { lapic.apic_base } else { lapic.apic_base & !BOOT_PROCESSOR };
        Self {
            gpr: [0; 16],
            rip: 0xfff0,
            rflags: 1 << 1,
            cr0: CACHES_OFF,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            cr8: 0,
            dr: [0, 0, 0, 0, 0xffff_0ff0, 0x400],
            segments: [
                data,
                Segment { selector: 0xf000, base: 0xffff_0000, attributes: 0x9b, ..data },
                data,
                data,
                data,
                data,
            ],
            ldtr: Segment { attributes: 0x82, ..data },
            tr: Segment { attributes: 0x8b, ..data },
            gdtr: table,
            idtr: table,
            msrs: Msrs { pat: 0x0007_0406_0007_0406, ..Msrs::default() },
            fpu: Fpu::default(),
            lapic: Lapic { id: id.into(), apic_base, ..lapic },
            interrupt_shadow: false,
            activity: if boot { Activity::Running } else { Activity::WaitsForInit },
            events: Events::default(),
        }
    }
}

/// Whether a vCPU executes instructions (Intel SDM volume 3C, 25.4.2, and volume 3A, 9.4 for the last two).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Activity {
    /// It does.
    #[default]
    Running,
    /// In HLT, until an interrupt.
    Halted,
    /// Reset, and waits for INIT: a processor that is not the boot processor, before anybody has called for it.
    WaitsForInit,
    /// After INIT: waits for a start-up message.
    WaitsForStartUp,
}

/// Events that are under way to a vCPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Events {
    /// A non-maskable interrupt waits.
    pub nmi_pending: bool,
    /// Non-maskable interrupts are held back until the next IRET: one is being handled.
    pub nmi_masked: bool,
    /// A start-up message that has come and has not been acted on: its vector.
    pub start_up: Option<u8>,
    /// An exception or interrupt that has been decided on, and whose delivery has not begun: it comes before anything
    /// else. An engine that stops between instructions only never leaves one.
    pub delivering: Option<Delivery>,
}

/// An event whose handler is to be entered next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Delivery {
    /// Its vector.
    pub vector: u8,
    /// The error code that it pushes, if it pushes one.
    pub error: Option<u32>,
    /// Where it comes from.
    pub source: DeliverySource,
}

/// Where an event comes from, which decides what its delivery checks and what a fault in it means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DeliverySource {
    /// A local APIC, or another controller.
    External,
    /// An NMI.
    Nmi,
    /// An exception.
    Exception,
    /// INT n, INT3 or INTO.
    Software,
}

/// A segment register with its hidden part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Segment {
    /// The visible selector.
    pub selector: u16,
    /// Base address.
    pub base: u64,
    /// Limit in bytes, granularity applied.
    pub limit: u32,
    /// Descriptor bits 40 to 55: type, S, DPL, P, (limit), AVL, L, D/B, G; bits 8 to 11 are zero.
    pub attributes: u16,
    /// A null selector was loaded: no access through it.
    pub unusable: bool,
}

/// A descriptor table register.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Table {
    /// Linear base address.
    pub base: u64,
    /// Last valid byte.
    pub limit: u16,
}

/// Model-specific registers that hold state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Msrs {
    /// EFER.
    pub efer: u64,
    /// STAR.
    pub star: u64,
    /// LSTAR.
    pub lstar: u64,
    /// CSTAR.
    pub cstar: u64,
    /// SYSCALL_MASK (SFMASK).
    pub sfmask: u64,
    /// KERNEL_GS_BASE.
    pub kernel_gs_base: u64,
    /// SYSENTER_CS.
    pub sysenter_cs: u64,
    /// SYSENTER_ESP.
    pub sysenter_esp: u64,
    /// SYSENTER_EIP.
    pub sysenter_eip: u64,
    /// PAT.
    pub pat: u64,
    /// TSC_AUX.
    pub tsc_aux: u64,
    /// The time stamp counter's value now.
    pub tsc: u64,
    /// MSR_KVM_SYSTEM_TIME_NEW.
    pub kvm_system_time: u64,
    /// MSR_KVM_WALL_CLOCK_NEW.
    pub kvm_wall_clock: u64,
}

/// x87, MMX and SSE state, as FXSAVE64 orders it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fpu {
    /// Control word.
    pub fcw: u16,
    /// Status word, with TOP in bits 11 to 13.
    pub fsw: u16,
    /// Abridged tag word: bit n set when physical register n holds a value.
    pub ftw: u8,
    /// Opcode of the last x87 instruction.
    pub fop: u16,
    /// Address of the last x87 instruction.
    pub fip: u64,
    /// Address of its operand.
    pub fdp: u64,
    /// ST(0) to ST(7): 64-bit significand, then sign and exponent.
    pub st: [(u64, u16); 8],
    /// MXCSR.
    pub mxcsr: u32,
    /// XMM0 to XMM15, low quadword first.
    pub xmm: [[u64; 2]; 16],
}

impl Default for Fpu {
    /// The state after reset: FNINIT and MXCSR 0x1f80.
    fn default() -> Self {
        Self { fcw: 0x37f, fsw: 0, ftw: 0, fop: 0, fip: 0, fdp: 0, st: [(0, 0); 8], mxcsr: 0x1f80, xmm: [[0; 2]; 16] }
    }
}

/// The local APIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lapic {
    /// IA32_APIC_BASE: base address, enable, x2APIC and BSP bits.
    pub apic_base: u64,
    /// APIC id.
    pub id: u32,
    /// Task priority register.
    pub tpr: u32,
    /// Logical destination register (xAPIC form).
    pub ldr: u32,
    /// Destination format register.
    pub dfr: u32,
    /// Spurious-interrupt vector register.
    pub svr: u32,
    /// Error status register.
    pub esr: u32,
    /// In-service register.
    pub isr: [u32; 8],
    /// Trigger mode register.
    pub tmr: [u32; 8],
    /// Interrupt request register.
    pub irr: [u32; 8],
    /// Interrupt command register.
    pub icr: u64,
    /// LVT: timer, thermal, performance, LINT0, LINT1, error.
    pub lvt: [u32; 6],
    /// Timer initial count.
    pub timer_initial: u32,
    /// Timer divide configuration.
    pub timer_divide: u32,
    /// Nanoseconds until the timer's next expiry; `None` when it is not armed.
    pub timer_left_ns: Option<u64>,
    /// IA32_TSC_DEADLINE.
    pub tsc_deadline: u64,
}

impl Default for Lapic {
    /// The state of the boot processor after reset (Intel SDM volume 3A, 11.4.7.1): all interrupts masked, the
    /// registers at their usual address.
    fn default() -> Self {
        const ADDRESS: u64 = 0xfee0_0000;
        const BOOT_PROCESSOR: u64 = 1 << 8;
        const ENABLED: u64 = 1 << 11;
        const MASKED: u32 = 1 << 16;
        Self {
            apic_base: ADDRESS | BOOT_PROCESSOR | ENABLED,
            id: 0,
            tpr: 0,
            ldr: 0,
            dfr: u32::MAX,
            svr: 0xff,
            esr: 0,
            isr: [0; 8],
            tmr: [0; 8],
            irr: [0; 8],
            icr: 0,
            lvt: [MASKED; 6],
            timer_initial: 0,
            timer_divide: 0,
            timer_left_ns: None,
            tsc_deadline: 0,
        }
    }
}
