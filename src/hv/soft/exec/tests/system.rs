//! System instructions: privilege, segments, fast system calls, MSRs, saved state.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use crate::hv::HvError;
use crate::hv::soft::cpu::slot::{FS_BASE, GS_BASE, R11, RAX, RBX, RCX, RDX, RSP};
use crate::hv::soft::cpu::{cr0, efer, seg};
use crate::hv::soft::fault::{Exception, Flow};
use crate::hv::soft::flags;
use crate::hv::state::VcpuState;
use crate::hv::state::x86_64::{Activity, Delivery, DeliverySource, Events};

use super::{CODE, DATA, GDT, KERNEL_CS, KERNEL_SS, Machine, STACK, TSS, TSS_SELECTOR, USER_CS, USER_SS, machine};

const GP0: Exception = Exception::general_protection(0);

type Write = fn(&mut CodeAssembler) -> Result<(), IcedError>;

#[test]
fn sdm_privileged_instructions_fault_in_user_mode() {
    let privileged: [Write; 20] = [
        |a| a.hlt(),
        |a| a.clts(),
        |a| a.wbinvd(),
        |a| a.invd(),
        |a| a.invlpg(ptr(rbx)),
        |a| a.lgdt(ptr(rbx)),
        |a| a.lidt(ptr(rbx)),
        |a| a.lldt(ax),
        |a| a.ltr(ax),
        |a| a.lmsw(ax),
        |a| a.mov(rax, cr0),
        |a| a.mov(cr3, rax),
        |a| a.mov(rax, dr6),
        |a| a.rdmsr(),
        |a| a.wrmsr(),
        |a| a.swapgs(),
        |a| a.sysretq(),
        |a| a.cli(),
        |a| a.sti(),
        |a| a.rdpmc(),
    ];
    for (n, write) in privileged.into_iter().enumerate() {
        let mut m = machine();
        m.level(3);
        m.cpu.regs[RBX] = DATA;
        assert_eq!(m.fault(write), GP0, "number {n}");
    }
}

#[test]
fn sdm_popf_and_iopl() {
    let all = flags::IF | flags::IOPL | flags::AC;
    for (cpl, iopl, changed) in [(0, 0, all), (3, 0, flags::AC | flags::IF), (3, 3, flags::AC | flags::IOPL)] {
        let mut m = machine();
        m.level(cpl);
        // Level 3 starts with IF set and tries to clear it.
        let before = if cpl == 3 { flags::IF | iopl << 12 } else { 0 };
        m.cpu.set_rflags(before);
        m.poke(STACK, if cpl == 3 { flags::IOPL & !(iopl << 12) | flags::AC } else { all });
        m.run(|a| a.popfq()).unwrap();
        assert_eq!(m.cpu.rflags(), 2 | changed, "level {cpl}, IOPL {iopl}");
    }
}

#[test]
fn sdm_syscall_and_sysret() {
    let mut m = machine();
    m.level(3);
    m.cpu.msrs.star = 0x0018_0008 << 32;
    m.cpu.msrs.lstar = 0x5_0000;
    m.cpu.msrs.sfmask = flags::IF | flags::DF;
    m.cpu.set_rflags(flags::IF | flags::DF | flags::CF);
    m.run(|a| a.syscall()).unwrap();
    assert_eq!((m.cpu.rip, m.cpu.cpl(), m.cpu.rflags()), (0x5_0000, 0, 2 | flags::CF));
    assert_eq!((m.cpu.regs[RCX], m.cpu.regs[R11]), (CODE + 2, 0x603));
    assert_eq!((m.cpu.segments[seg::CS].selector, m.cpu.segments[seg::SS].selector), (KERNEL_CS, KERNEL_SS));
    m.run(|a| a.sysretq()).unwrap();
    assert_eq!((m.cpu.rip, m.cpu.cpl(), m.cpu.rflags()), (CODE + 2, 3, 0x603));
    assert_eq!((m.cpu.segments[seg::CS].selector, m.cpu.segments[seg::SS].selector), (USER_CS, USER_SS));
    m.cpu.control.efer &= !1;
    assert_eq!(m.fault(|a| a.syscall()), Exception::INVALID_OPCODE);
    let mut m = machine();
    m.cpu.regs[RCX] = 1 << 47;
    assert_eq!(m.fault(|a| a.sysretq()), GP0);
}

#[test]
fn sdm_swapgs() {
    let mut m = machine();
    (m.cpu.regs[GS_BASE], m.cpu.msrs.kernel_gs_base) = (1, 2);
    m.run(|a| a.swapgs()).unwrap();
    assert_eq!((m.cpu.regs[GS_BASE], m.cpu.msrs.kernel_gs_base), (2, 1));
}

fn load_ds(m: &mut Machine, selector: u16) -> Result<(), Exception> {
    m.cpu.regs[RAX] = selector.into();
    match m.run(|a| a.mov(ds, eax)) {
        Ok(_) => Ok(()),
        Err(crate::hv::soft::fault::Stop::Fault(exception)) => Err(exception),
        Err(other) => panic!("{other:?}"),
    }
}

#[test]
fn sdm_3_4_3_segment_register_loads() {
    for (cpl, selector, outcome) in [
        (0, KERNEL_SS, Ok(())),
        (0, 0, Ok(())),
        (3, 3, Ok(())),
        (3, USER_SS, Ok(())),
        (0, USER_SS, Ok(())),
        (3, KERNEL_SS, Err(Exception::general_protection(KERNEL_SS.into()))),
        (0, KERNEL_SS | 3, Err(Exception::general_protection(KERNEL_SS.into()))),
        (0, TSS_SELECTOR, Err(Exception::general_protection(TSS_SELECTOR.into()))),
        (0, 0x40, Err(Exception::general_protection(0x40))),
        (0, 0x14, Err(Exception::general_protection(0x14))),
    ] {
        let mut m = machine();
        m.level(cpl);
        assert_eq!(load_ds(&mut m, selector), outcome, "{selector:#x} at level {cpl}");
    }
    let mut m = machine();
    m.poke(GDT + 0x10, m.peek(GDT + 0x10) & !(1 << 47));
    assert_eq!(load_ds(&mut m, KERNEL_SS), Err(Exception::not_present(KERNEL_SS.into())));
    assert_eq!(m.fault(|a| a.mov(ss, eax)), Exception::stack(KERNEL_SS.into()));
}

#[test]
fn sdm_fs_loads_take_the_descriptors_base() {
    let mut m = machine();
    m.poke(GDT + 0x10, 0x12cf_9334_5678_ffff);
    m.cpu.regs[RAX] = KERNEL_SS.into();
    m.run(|a| a.mov(fs, eax)).unwrap();
    assert_eq!(m.cpu.regs[FS_BASE], 0x1234_5678);
    m.run(|a| a.push(fs)).unwrap();
    assert_eq!(m.stack(), [u64::from(KERNEL_SS)]);
    m.poke(STACK - 8, 0);
    m.run(|a| a.pop(fs)).unwrap();
    assert_eq!((m.cpu.regs[FS_BASE], m.cpu.regs[RSP]), (0, STACK));
}

#[test]
fn sdm_far_transfers() {
    let mut m = machine();
    m.cpu.regs[RBX] = DATA;
    // CALL m16:32: the 64-bit form is not AMD's.
    m.poke(DATA, 0x5_0000 | u64::from(KERNEL_CS) << 32);
    m.bytes(&[0xff, 0x1b]).unwrap();
    assert_eq!((m.cpu.rip, m.stack()), (0x5_0000, [(u64::from(KERNEL_CS) << 32) + CODE + 2]));
    m.bytes(&[0xcb]).unwrap();
    assert_eq!((m.cpu.rip, m.cpu.regs[RSP]), (CODE + 2, STACK));
    for (n, value) in (0..).zip([0x6_0000, USER_CS.into(), 0x9990, u64::from(USER_SS)]) {
        m.poke(STACK + n * 8, value);
    }
    m.bytes(&[0x48, 0xcb]).unwrap();
    assert_eq!((m.cpu.rip, m.cpu.regs[RSP], m.cpu.cpl()), (0x6_0000, 0x9990, 3));
    m.cpu.rip = CODE;
    assert_eq!(m.bytes(&[0xff, 0x2b]), Err(Exception::general_protection(KERNEL_CS.into()).into()));
}

#[test]
fn sdm_task_register_and_descriptor_tables() {
    let mut m = machine();
    m.cpu.tr.base = 0;
    m.cpu.regs[RAX] = TSS_SELECTOR.into();
    m.run(|a| a.ltr(ax)).unwrap();
    assert_eq!((m.cpu.tr.base, m.peek(GDT + 0x30) >> 40 & 0x1f), (TSS, 11));
    // It is busy now.
    assert_eq!(m.fault(|a| a.ltr(ax)), Exception::general_protection(TSS_SELECTOR.into()));
    m.cpu.regs[RBX] = DATA;
    m.run(|a| a.sgdt(ptr(rbx))).unwrap();
    assert_eq!(m.peek(DATA) & 0xffff | m.peek(DATA + 2) << 16, 0x3f | GDT << 16);
    m.poke(DATA + 2, 1 << 47);
    assert_eq!(m.fault(|a| a.lidt(ptr(rbx))), GP0);
    m.cpu.regs[RAX] = u64::from(USER_CS);
    m.run(|a| a.lar(ecx, eax)).unwrap();
    assert_eq!((m.cpu.regs[RCX], m.cpu.flags.zf()), (0xaf_fb00, true));
    m.run(|a| a.verw(ax)).unwrap();
    assert!(!m.cpu.flags.zf());
}

#[test]
fn sdm_2_5_control_registers_refuse_what_they_must() {
    let refused: [(Write, u64); 8] = [
        (|a| a.mov(cr0, rax), 0x8000_0000),
        (|a| a.mov(cr0, rax), 1),
        (|a| a.mov(cr0, rax), 0xa000_0001),
        (|a| a.mov(cr0, rax), 1 << 32 | 0x8000_0001),
        (|a| a.mov(cr3, rax), 1 << 40),
        (|a| a.mov(cr4, rax), 0),
        (|a| a.mov(cr4, rax), 0x20 | 1 << 20),
        (|a| a.mov(cr8, rax), 16),
    ];
    for (n, (write, value)) in refused.into_iter().enumerate() {
        let mut m = machine();
        m.cpu.regs[RAX] = value;
        assert_eq!(m.fault(write), GP0, "number {n}");
    }
    let mut m = machine();
    m.cpu.regs[RAX] = 0x8000_0001 | cr0::TS;
    assert_eq!(m.run(|a| a.mov(cr0, rax)), Ok(Flow::Sync));
    assert_eq!(m.cpu.control.cr0, 0x8000_0011 | cr0::TS);
    m.run(|a| a.clts()).unwrap();
    assert_eq!(m.cpu.control.cr0, 0x8000_0011);
    m.cpu.regs[RAX] = 9;
    m.run(|a| a.mov(cr8, rax)).unwrap();
    m.run(|a| a.mov(rbx, cr8)).unwrap();
    assert_eq!(m.cpu.regs[RBX], 9);
}

#[test]
fn sdm_msrs_check_their_values() {
    for (msr, value, good) in [
        (0xc000_0082u64, 1 << 47, false),
        (0xc000_0100, 0x7fff_ffff_ffff, true),
        (0x277, 0x0007_0406_0007_0406, true),
        (0x277, 2, false),
        (0xc000_0080, 0x500, true),
        (0xc000_0080, 0x100, true),
        (0xc000_0080, 0, false),
        (0xc000_0080, 0x1500, false),
        (0x8b, 0, true),
        (0xc001_0015, 0, false),
        (0x1234, 0, false),
    ] {
        let mut m = machine();
        (m.cpu.regs[RCX], m.cpu.regs[RAX], m.cpu.regs[RDX]) = (msr, value & 0xffff_ffff, value >> 32);
        if good {
            assert_eq!(m.run(|a| a.wrmsr()), Ok(Flow::Sync), "{msr:#x}");
        } else {
            assert_eq!(m.fault(|a| a.wrmsr()), GP0, "{msr:#x}");
        }
    }
}

#[test]
fn kvm_clock_is_published_on_request() {
    let mut m = machine();
    (m.cpu.regs[RCX], m.cpu.regs[RAX]) = (0x4b56_4d01, DATA | 1);
    m.run(|a| a.wrmsr()).unwrap();
    let scale = m.peek(DATA + 24);
    assert_eq!((scale as u32, scale >> 32 & 0xff, scale >> 40 & 1), (0x8000_0000, 1, 1));
    m.run(|a| a.rdmsr()).unwrap();
    assert_eq!(m.cpu.regs[RAX], DATA | 1);
}

#[test]
fn sdm_19_5_2_io_permission_bitmap() {
    let mut m = machine();
    m.level(3);
    assert_eq!(m.fault(|a| a.in_(al, 0x60)), GP0);
    // A bitmap from 0x68 on that frees ports 0x60 and 0x61.
    m.cpu.tr.limit = 0x68 + 0x1f;
    m.cpu.ram.store(TSS + 0x68 + 0xc, 0xfcu8).unwrap();
    m.run(|a| a.in_(al, 0x60)).unwrap();
    assert_eq!(m.cpu.regs[RAX], 0x60);
    m.run(|a| a.in_(ax, 0x60)).unwrap();
    assert_eq!(m.fault(|a| a.in_(eax, 0x60)), GP0);
    assert_eq!(m.fault(|a| a.in_(al, 0xff)), GP0);
    m.cpu.set_rflags(flags::IOPL);
    m.run(|a| a.in_(eax, 0xff)).unwrap();
    assert_eq!(m.cpu.regs[RAX], 0xffff_ffff);
}

#[test]
fn state_survives_saving_and_restoring() {
    let mut m = machine();
    m.cpu.regs[RBX] = 0x1234;
    m.cpu.regs[FS_BASE] = 0x7f00_0000_0000;
    m.cpu.set_rflags(flags::IF | flags::PF);
    let saved = m.cpu.save();
    let mut other = machine();
    other.cpu.restore(&saved).unwrap();
    assert_eq!(other.cpu.save(), saved);
    assert_eq!((other.cpu.regs[RBX], other.cpu.regs[FS_BASE]), (0x1234, 0x7f00_0000_0000));
}

#[test]
fn sdm_table_10_1_reset_leaves_the_signature_in_edx() {
    let mut m = machine();
    m.cpu.regs[RAX] = 1;
    m.run(|a| a.cpuid()).unwrap();
    let signature = m.cpu.regs[RAX];
    m.cpu.init();
    assert_eq!((m.cpu.regs[RDX], m.cpu.regs[RAX], m.cpu.control.cr0), (signature, 0, cr0::ET));
}

#[test]
fn states_of_every_mode_are_accepted() {
    let good = machine().cpu.save();
    let accepted: [&dyn Fn(&mut VcpuState); 10] = [
        &|s| (s.cr0, s.cr4, s.msrs.efer) = (0x10, 0, 0),
        &|s| (s.cr0, s.cr4, s.msrs.efer) = (0x6000_0010, 0, efer::LME),
        // Protected mode before its first far jump, with the segments of real mode.
        &|s| (s.cr0, s.msrs.efer, s.segments[seg::CS].attributes) = (0x11, 0, 0x93),
        &|s| (s.cr4, s.msrs.efer) = (0, 0),
        &|s| s.msrs.efer = 0,
        &|s| s.segments[seg::CS].attributes = 0xc09b,
        &|s| s.segments[seg::CS].attributes = 0x9b,
        &|s| s.activity = Activity::WaitsForInit,
        &|s| (s.activity, s.events.start_up) = (Activity::WaitsForStartUp, Some(0x9a)),
        &|s| (s.events.nmi_pending, s.events.nmi_masked) = (true, true),
    ];
    for (n, change) in accepted.into_iter().enumerate() {
        let mut state = good.clone();
        change(&mut state);
        let mut m = machine();
        m.cpu.restore(&state).unwrap_or_else(|error| panic!("number {n}: {error}"));
        let expected = VcpuState { activity: Activity::Running, events: Events::default(), ..state.clone() };
        let mut saved = m.cpu.save();
        assert_eq!(saved.events.nmi_masked, state.events.nmi_masked);
        saved.events.nmi_masked = false;
        assert_eq!(saved, expected, "number {n}");
    }
}

#[test]
fn states_no_processor_can_be_in_are_refused() {
    let mut m = machine();
    let good = m.cpu.save();
    let before = m.cpu.rip;
    let deliver = |source, vector, error| Some(Delivery { vector, error, source });
    let broken: [&dyn Fn(&mut VcpuState); 26] = [
        &|s| s.cr0 &= !cr0::PG,
        &|s| s.cr0 &= !cr0::PE,
        &|s| s.cr0 = 0x2000_0010,
        &|s| s.cr4 |= 1 << 18,
        &|s| s.cr4 = 0,
        &|s| s.msrs.efer = efer::LMA,
        &|s| s.msrs.efer = efer::LME,
        &|s| s.rip = 1 << 47,
        &|s| s.msrs.pat = 3,
        &|s| s.segments[seg::CS].attributes = 0xe09b,
        &|s| s.segments[seg::CS].attributes = 0x209b & !0x80,
        &|s| s.segments[seg::CS].attributes = 0xa093,
        &|s| (s.rip, s.segments[seg::CS].attributes) = (1 << 32, 0xc09b),
        &|s| (s.cr0, s.msrs.efer, s.segments[seg::SS].attributes) = (0x10, 0, 0x93 | 3 << 5),
        &|s| (s.cr0, s.msrs.efer, s.segments[seg::CS].attributes) = (0x10, 0, 0x97),
        &|s| s.rflags |= flags::VM,
        &|s| s.cr8 = 16,
        &|s| s.events.start_up = Some(1),
        &|s| (s.activity, s.events.start_up) = (Activity::WaitsForInit, Some(1)),
        &|s| {
            (s.activity, s.events.delivering) =
                (Activity::WaitsForStartUp, deliver(DeliverySource::External, 0x40, None))
        },
        &|s| s.events.delivering = deliver(DeliverySource::External, 0x40, Some(0)),
        &|s| s.events.delivering = deliver(DeliverySource::Nmi, 3, None),
        &|s| s.events.delivering = deliver(DeliverySource::Exception, 2, None),
        &|s| s.events.delivering = deliver(DeliverySource::Exception, 32, None),
        &|s| s.events.delivering = deliver(DeliverySource::Exception, 13, None),
        &|s| s.events.delivering = deliver(DeliverySource::Exception, 6, Some(0)),
    ];
    for (n, breaks) in broken.into_iter().enumerate() {
        let mut state = good.clone();
        state.gpr[0] = 99;
        breaks(&mut state);
        assert!(matches!(m.cpu.restore(&state), Err(HvError::State(_))), "number {n}");
        assert_eq!((m.cpu.rip, m.cpu.regs[RAX]), (before, 0));
    }
}
