//! Interrupts and exceptions: Intel SDM volume 3A, chapter 7.

use iced_x86::code_asm::*;

use crate::hv::soft::cpu::{seg, slot};
use crate::hv::soft::exec::{Shutdown, Source};
use crate::hv::soft::fault::Exception;
use crate::hv::soft::flags;

use super::{
    CODE, GDT, IDT, IST1, KERNEL_CS, KERNEL_SS, Machine, RSP0, STACK, TSS, USER_CS, USER_SS, handler, machine,
};

const INTERRUPT: Exception = Exception { vector: 0x40, error: None, cr2: None };

fn interrupt(m: &mut Machine) -> Result<(), Shutdown> {
    m.cpu.deliver(INTERRUPT, Source::External)
}

#[test]
fn sdm_7_14_2_frame_at_the_same_level_is_aligned() {
    let mut m = machine();
    m.cpu.regs[slot::RSP] = STACK - 3;
    m.cpu.set_rflags(flags::IF | flags::CF | flags::TF);
    interrupt(&mut m).unwrap();
    assert_eq!(m.cpu.rip, handler(0x40));
    assert_eq!(m.cpu.regs[slot::RSP], STACK - 16 - 40);
    assert_eq!(m.stack(), [CODE, KERNEL_CS.into(), 0x303, STACK - 3, KERNEL_SS.into()]);
    assert_eq!(m.cpu.rflags(), 2 | flags::CF);
}

#[test]
fn sdm_7_14_4_stack_switch_from_user_mode() {
    let mut m = machine();
    m.level(3);
    m.cpu.set_rflags(flags::IF);
    m.cpu.deliver(Exception::page(0x1234, 4), Source::Exception).unwrap();
    assert_eq!(m.cpu.control.cr2, 0x1234);
    assert_eq!((m.cpu.cpl(), m.cpu.segments[seg::SS].selector), (0, 0));
    assert_eq!(m.cpu.regs[slot::RSP], RSP0 - 48);
    // A fault's frame has RF set.
    assert_eq!(m.stack(), [4, CODE, USER_CS.into(), 0x1_0202, STACK, USER_SS.into()]);
}

#[test]
fn sdm_7_14_5_interrupt_stack_table() {
    let mut m = machine();
    m.gate(0x40, KERNEL_CS, 0x8e01);
    interrupt(&mut m).unwrap();
    assert_eq!(m.cpu.regs[slot::RSP], IST1 - 40);
}

#[test]
fn sdm_7_12_1_3_trap_gates_keep_if() {
    let mut m = machine();
    m.gate(0x40, KERNEL_CS, 0x8f00);
    m.cpu.set_rflags(flags::IF);
    interrupt(&mut m).unwrap();
    assert_eq!(m.cpu.rflags(), 2 | flags::IF);
}

#[test]
fn sdm_7_12_1_1_software_interrupts_check_the_gates_level() {
    let mut m = machine();
    m.level(3);
    assert_eq!(m.fault(|a| a.int(0x80)), Exception::general_protection(0x80 * 8 + 2));
    m.gate(0x80, KERNEL_CS, 0xee00);
    m.run(|a| a.int(0x80)).unwrap();
    assert_eq!(m.cpu.rip, handler(0x80));
    assert_eq!(m.stack::<2>(), [CODE + 2, USER_CS.into()]);
}

#[test]
fn sdm_7_13_error_codes_of_bad_gates() {
    for (attributes, selector, refused) in [
        (0x0e00, KERNEL_CS, Exception::not_present(0x203)),
        (0x8500, KERNEL_CS, Exception::general_protection(0x203)),
        (0x8e00, 0, Exception::general_protection(1)),
        (0x8e00, KERNEL_SS, Exception::general_protection(0x11)),
        (0x8e00, 0x48, Exception::general_protection(0x49)),
        // To user code from kernel mode.
        (0x8e00, USER_CS & !3, Exception::general_protection(0x29)),
    ] {
        let mut m = machine();
        m.gate(0x40, selector, attributes);
        interrupt(&mut m).unwrap();
        assert_eq!((m.cpu.rip, m.stack::<2>()), (handler(refused.vector), [refused.error.unwrap().into(), CODE]));
    }
    let mut m = machine();
    m.cpu.idtr.limit = 0x40 * 16 + 14;
    interrupt(&mut m).unwrap();
    assert_eq!((m.cpu.rip, m.stack::<1>()), (handler(13), [0x203]));
}

#[test]
fn sdm_7_15_double_fault_conditions() {
    let contributory = Exception::general_protection(0);
    let page = Exception::page(0x99, 0);
    let benign = Exception::INVALID_OPCODE;
    // The first exception's gate is missing, which is a contributory fault (#NP).
    for (first, served) in [(contributory, 8), (page, 8), (Exception::DIVIDE, 8), (benign, 11)] {
        let mut m = machine();
        m.gate(first.vector, KERNEL_CS, 0x0e00);
        m.cpu.deliver(first, Source::Exception).unwrap();
        assert_eq!(m.cpu.rip, handler(served), "{first:?}");
        if served == 8 {
            assert_eq!(m.stack::<2>(), [0, CODE]);
        }
    }
    // A page fault that meets a page fault (its gate's page is not mapped) is one too, ...
    let mut m = machine();
    m.gate(8, KERNEL_CS, 0x8e01);
    m.cpu.regs[slot::RSP] = 0x7000_0000;
    m.cpu.deliver(page, Source::Exception).unwrap();
    assert_eq!(m.cpu.rip, handler(8));
    assert_eq!(m.cpu.control.cr2, 0x7000_0000 - 8);
    // ... but after a contributory exception a page fault is just served.
    let mut m = machine();
    m.gate(14, KERNEL_CS, 0x8e01);
    m.cpu.regs[slot::RSP] = 0x7000_0000;
    m.cpu.deliver(contributory, Source::Exception).unwrap();
    assert_eq!(m.cpu.rip, handler(14));
}

#[test]
fn sdm_7_15_a_fault_in_the_double_fault_is_shutdown() {
    let mut m = machine();
    m.cpu.idtr.limit = 0;
    let before = (m.cpu.regs, m.cpu.rflags(), m.cpu.rip);
    assert_eq!(m.cpu.deliver(INTERRUPT, Source::External), Err(Shutdown::TripleFault));
    assert_eq!((m.cpu.regs, m.cpu.rflags(), m.cpu.rip), before);
}

#[test]
fn sdm_7_7_tss_limit_and_stack_pointers_are_checked() {
    let mut m = machine();
    m.level(3);
    m.cpu.tr.limit = 10;
    m.cpu.idtr.limit = 0x40 * 16 + 15;
    assert_eq!(interrupt(&mut m), Err(Shutdown::TripleFault));
    let mut m = machine();
    m.level(3);
    m.gate(12, KERNEL_CS, 0x8e01);
    m.poke(TSS + 4, 1 << 47);
    interrupt(&mut m).unwrap();
    assert_eq!((m.cpu.rip, m.stack::<1>()), (handler(12), [1]));
}

fn iret_frame(m: &mut Machine, frame: [u64; 5]) {
    for (n, value) in (0..).zip(frame) {
        m.poke(STACK + n * 8, value);
    }
}

#[test]
fn sdm_iret_to_the_same_and_an_outer_level() {
    let mut m = machine();
    iret_frame(&mut m, [0x1234, KERNEL_CS.into(), flags::IF | flags::NT, 0x9990, KERNEL_SS.into()]);
    m.run(|a| a.iretq()).unwrap();
    assert_eq!((m.cpu.rip, m.cpu.regs[slot::RSP], m.cpu.rflags()), (0x1234, 0x9990, 2 | flags::IF | flags::NT));
    let mut m = machine();
    m.cpu.segments[seg::DS] = m.cpu.segments[seg::SS];
    iret_frame(&mut m, [0x1234, USER_CS.into(), flags::IF, 0x9990, USER_SS.into()]);
    m.run(|a| a.iretq()).unwrap();
    assert_eq!((m.cpu.cpl(), m.cpu.segments[seg::SS].selector), (3, USER_SS));
    // A kernel data segment does not survive.
    assert_eq!((m.cpu.segments[seg::DS].selector, m.cpu.segments[seg::DS].unusable), (0, true));
}

#[test]
fn sdm_iret_in_user_mode_cannot_raise_privilege() {
    let mut m = machine();
    m.level(3);
    iret_frame(&mut m, [0x1234, USER_CS.into(), u64::MAX, 0x9990, USER_SS.into()]);
    m.run(|a| a.iretq()).unwrap();
    assert_eq!(m.cpu.rflags() & (flags::IF | flags::IOPL), 0);
    let mut m = machine();
    m.level(3);
    iret_frame(&mut m, [0x1234, KERNEL_CS.into(), 2, 0x9990, KERNEL_SS.into()]);
    assert_eq!(m.fault(|a| a.iretq()), Exception::general_protection(KERNEL_CS.into()));
}

#[test]
fn sdm_iret_refuses_bad_frames() {
    let (code, stack) = (u64::from(KERNEL_CS), u64::from(KERNEL_SS));
    for (frame, refused) in [
        ([0, 0, 2, 0, stack], Exception::general_protection(0)),
        ([1 << 47, code, 2, 0, stack], Exception::general_protection(0)),
        ([0, stack, 2, 0, stack], Exception::general_protection(0x10)),
        ([0, code, 2, 0, USER_SS.into()], Exception::general_protection(0x20)),
        // A null stack segment does for the kernel, but not for user mode.
        ([0, USER_CS.into(), 2, 0, 3], Exception::general_protection(0)),
        ([0, code, 2, 0, 0x200], Exception::general_protection(0x200)),
    ] {
        let mut m = machine();
        iret_frame(&mut m, frame);
        assert_eq!(m.fault(|a| a.iretq()), refused, "{frame:x?}");
    }
    let mut m = machine();
    iret_frame(&mut m, [0, code, 2, 0, 0]);
    m.run(|a| a.iretq()).unwrap();
    assert_eq!(m.cpu.segments[seg::SS].selector, 0);
    let mut m = machine();
    m.cpu.set_rflags(flags::NT);
    assert_eq!(m.fault(|a| a.iretq()), Exception::general_protection(0));
}

#[test]
fn sdm_6_8_interrupt_shadow_of_sti_and_mov_ss() {
    let mut m = machine();
    m.run(|a| a.sti()).unwrap();
    assert!(m.cpu.interrupt_shadow);
    m.cpu.interrupt_shadow = false;
    m.run(|a| a.sti()).unwrap();
    assert!(!m.cpu.interrupt_shadow, "interrupts were on already");
    m.cpu.regs[slot::RAX] = KERNEL_SS.into();
    m.run(|a| a.mov(ss, eax)).unwrap();
    assert!(m.cpu.interrupt_shadow);
}

#[test]
fn sdm_3_4_5_descriptors_are_marked_accessed() {
    let mut m = machine();
    let descriptor = m.peek(GDT + 8) & !(1 << 40);
    m.poke(GDT + 8, descriptor);
    interrupt(&mut m).unwrap();
    assert_eq!(m.peek(GDT + 8), descriptor | 1 << 40);
    assert_eq!(m.peek(IDT + 0x40 * 16 + 8), 0);
}
