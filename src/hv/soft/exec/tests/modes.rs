//! Real mode, 16- and 32-bit protected mode and compatibility mode: Intel SDM volume 3A, chapters 3, 5 to 7 and 22.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use crate::hv::soft::cpu::slot::{PAGE, RAX, RBP, RBX, RCX, RDI, RDX, RSI, RSP};
use crate::hv::soft::cpu::{cr0, cr4, efer, seg, slot};
use crate::hv::soft::exec::Source;
use crate::hv::soft::fault::{Exception, Flow, Stop};
use crate::hv::soft::flags;
use crate::hv::state::x86_64::{Segment, Table};

use super::{CODE, DATA, GDT, IDT, KERNEL_CS, Machine, RSP0, STACK, TSS, TSS_SELECTOR, USER_CS, USER_SS, machine};

const GP0: Exception = Exception::general_protection(0);
const SS0: Exception = Exception::stack(0);

const CODE_32: u16 = 0x08;
const DATA_32: u16 = 0x10;
const CODE_16: u16 = 0x18;
const USER_DATA_32: u16 = 0x23;
const USER_CODE_32: u16 = 0x2b;
/// A page of read-only data at [`DATA`], a page to grow down into below it, and data that is not there.
const READ_ONLY: u16 = 0x38;
const EXPAND_DOWN: u16 = 0x40;
const ABSENT: u16 = 0x48;

fn flat(selector: u16, attributes: u16) -> Segment {
    Segment { selector, base: 0, limit: u32::MAX, attributes, unusable: false }
}

/// 32-bit protected mode without paging, at level 0, in flat segments, with a gate for each vector.
fn protected() -> Machine {
    let mut m = machine();
    m.poke(GDT + u64::from(CODE_32), 0x00cf_9b00_0000_ffff);
    m.poke(GDT + u64::from(CODE_16), 0x0000_9b02_0000_ffff);
    m.poke(GDT + u64::from(USER_CODE_32 & !3), 0x00cf_fb00_0000_ffff);
    m.poke(GDT + u64::from(READ_ONLY), 0x0040_9104_0000_0fff);
    m.poke(GDT + u64::from(EXPAND_DOWN), 0x0040_9700_0000_0fff | DATA << 16);
    m.poke(GDT + u64::from(ABSENT), 0x00cf_1300_0000_ffff);
    m.poke(TSS + 4, RSP0 | u64::from(DATA_32) << 32);
    for vector in 0..=255 {
        legacy_gate(&mut m, vector, CODE_32, 0x8e00);
    }
    let cpu = &mut m.cpu;
    cpu.control.cr0 = cr0::PE | cr0::ET | cr0::NE;
    (cpu.control.cr4, cpu.control.efer) = (0, 0);
    cpu.gdtr.limit = 0x4f;
    cpu.idtr.limit = 0x7ff;
    cpu.segments = [flat(DATA_32, 0xc093); 6];
    cpu.segments[seg::CS] = flat(CODE_32, 0xc09b);
    cpu.flush_tlb();
    cpu.mode_changed();
    m
}

fn legacy_gate(m: &mut Machine, vector: u8, selector: u16, attributes: u64) {
    let handler = super::handler(vector);
    let low = handler & 0xffff | u64::from(selector) << 16 | attributes << 32 | (handler >> 16) << 48;
    m.poke(IDT + u64::from(vector) * 8, low);
}

/// Real mode with code at [`CODE`], data at [`DATA`] and the stack from RSP0's paragraph on.
fn real() -> Machine {
    let mut m = machine();
    let at = |base: u64, attributes| Segment {
        selector: (base >> 4) as u16,
        base,
        limit: 0xffff,
        attributes,
        unusable: false,
    };
    let cpu = &mut m.cpu;
    cpu.control.cr0 = cr0::ET;
    (cpu.control.cr4, cpu.control.efer) = (0, 0);
    cpu.segments = [at(DATA, 0x93); 6];
    cpu.segments[seg::CS] = at(CODE, 0x9b);
    cpu.segments[seg::SS] = at(RSP0, 0x93);
    (cpu.rip, cpu.regs[RSP]) = (0, 0x1000);
    cpu.idtr = Table { base: 0, limit: 0x3ff };
    cpu.flush_tlb();
    cpu.mode_changed();
    m
}

/// Compatibility mode at level 3.
fn compatibility() -> Machine {
    let mut m = machine();
    m.poke(GDT + 0x38, 0x00cf_fb00_0000_ffff);
    m.level(3);
    m.cpu.segments[seg::CS] = flat(0x3b, 0xc0fb);
    for index in [seg::DS, seg::ES] {
        m.cpu.segments[index] = flat(USER_SS, 0xc0f3);
    }
    m
}

impl Machine {
    /// Executes bytes placed where the processor is.
    fn here(&mut self, bytes: &[u8]) -> Result<Flow, Stop> {
        let base = if self.cpu.is_64bit() { 0 } else { self.cpu.segments[seg::CS].base };
        for (at, byte) in (base + self.cpu.rip..).zip(bytes) {
            self.cpu.ram.store(at, *byte).unwrap();
        }
        self.cpu.step()
    }

    /// Assembles one instruction for the current code size and executes it.
    fn go(&mut self, write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Result<Flow, Stop> {
        let mut assembler = CodeAssembler::new(self.cpu.code_bits()).unwrap();
        write(&mut assembler).unwrap();
        let code = assembler.assemble(self.cpu.rip).unwrap();
        self.here(&code)
    }

    /// The exception that bytes raise, with nothing changed.
    fn refused(&mut self, bytes: &[u8]) -> Exception {
        let before = (self.cpu.regs, self.cpu.rflags(), self.cpu.rip, self.cpu.segments);
        let outcome = self.here(bytes);
        self.cpu.regs[PAGE] = before.0[PAGE];
        assert_eq!((self.cpu.regs, self.cpu.rflags(), self.cpu.rip, self.cpu.segments), before);
        match outcome {
            Err(Stop::Fault(exception)) => exception,
            other => panic!("expected an exception, got {other:?}"),
        }
    }

    fn peek16(&self, address: u64) -> u16 {
        self.cpu.ram.load(address).unwrap()
    }

    fn peek32(&self, address: u64) -> u32 {
        self.cpu.ram.load(address).unwrap()
    }

    /// The doublewords on a 32-bit stack, lowest first.
    fn stack32<const N: usize>(&self) -> [u32; N] {
        std::array::from_fn(|n| self.peek32(self.cpu.regs[RSP] + n as u64 * 4))
    }
}

#[test]
fn sdm_22_1_1_real_mode_addresses_are_paragraphs() {
    let mut m = real();
    m.cpu.regs[RAX] = 0x1234;
    m.go(|a| a.mov(ds, ax)).unwrap();
    assert_eq!((m.cpu.segments[seg::DS].selector, m.cpu.segments[seg::DS].base), (0x1234, 0x12340));
    m.cpu.regs[RBX] = 0xffff_0010;
    m.cpu.regs[RSI] = 0xf;
    m.go(|a| a.mov(word_ptr(bx + si + 1), ax)).unwrap();
    assert_eq!(m.peek16(0x12340 + 0x20), 0x1234);
    // Offsets wrap at 64 KiB.
    m.cpu.regs[RBX] = 0xffff;
    m.go(|a| a.mov(byte_ptr(bx + 2), al)).unwrap();
    assert_eq!(m.peek16(0x12341) & 0xff, 0x34);
    // 32-bit operands and addresses by prefix.
    m.cpu.regs[RBX] = 0x40;
    m.cpu.regs[RAX] = 0x89ab_cdef;
    m.go(|a| a.mov(dword_ptr(ebx * 2 + 4), eax)).unwrap();
    assert_eq!(m.peek32(0x12340 + 0x84), 0x89ab_cdef);
    m.go(|a| a.mov(ax, cs)).unwrap();
    assert_eq!(m.cpu.regs[RAX], 0x89ab_2000);
}

#[test]
fn sdm_22_1_4_real_mode_checks_limits() {
    let mut m = real();
    m.cpu.regs[RBX] = 0xffff;
    assert_eq!(m.refused(&[0x89, 0x07]), GP0);
    // By BP, through the stack segment.
    m.cpu.regs[RBP] = 0xffff;
    assert_eq!(m.refused(&[0x89, 0x46, 0x00]), SS0);
    m.cpu.regs[RBX] = 0x1_0000;
    assert_eq!(m.refused(&[0x67, 0x88, 0x03]), GP0);
    // A limit that protected mode has left.
    m.cpu.segments[seg::DS].limit = u32::MAX;
    m.cpu.regs[RAX] = 0x77;
    m.here(&[0x67, 0x88, 0x03]).unwrap();
    assert_eq!(m.peek16(DATA + 0x1_0000) & 0xff, 0x77);
    // Code does not go on past its segment.
    m.cpu.rip = 0xffff;
    m.cpu.ram.store(CODE + 0xffff, 0x90u8).unwrap();
    assert_eq!(m.cpu.step(), Ok(Flow::Next));
    assert_eq!(m.cpu.rip, 0x1_0000);
    assert_eq!(m.cpu.step(), Err(GP0.into()));
    m.cpu.rip = 0xffff;
    m.cpu.ram.store(CODE + 0xffff, 0xb8u8).unwrap();
    assert_eq!(m.cpu.step(), Err(GP0.into()));
}

#[test]
fn sdm_22_1_4_real_mode_interrupts_go_through_the_vector_table() {
    let mut m = real();
    m.cpu.ram.store(0x21 * 4, 0x5678u16).unwrap();
    m.cpu.ram.store(0x21 * 4 + 2, 0x0123u16).unwrap();
    m.cpu.set_rflags(flags::IF | flags::TF | flags::CF | flags::AC);
    m.here(&[0xcd, 0x21]).unwrap();
    assert_eq!((m.cpu.rip, m.cpu.segments[seg::CS].selector, m.cpu.segments[seg::CS].base), (0x5678, 0x123, 0x1230));
    assert_eq!(m.cpu.rflags(), 2 | flags::CF);
    assert_eq!(m.cpu.regs[RSP], 0x1000 - 6);
    let at = RSP0 + 0x1000;
    assert_eq!([m.peek16(at - 6), m.peek16(at - 4), m.peek16(at - 2)], [2, 0x2000, 0x303]);
    m.here(&[0xcf]).unwrap();
    assert_eq!((m.cpu.rip, m.cpu.segments[seg::CS].base, m.cpu.regs[RSP]), (2, CODE, 0x1000));
    assert_eq!(m.cpu.rflags() & 0xffff, 0x303);
    // No error codes; and a table that is too short is a #GP of its own, which has no place either.
    let mut m = real();
    m.cpu.ram.store(13 * 4, 0x0042_0042u32).unwrap();
    m.cpu.deliver(GP0, Source::Exception).unwrap();
    assert_eq!((m.cpu.rip, m.cpu.regs[RSP]), (0x42, 0x1000 - 6));
    m.cpu.idtr.limit = 8;
    assert!(m.cpu.deliver(GP0, Source::Exception).is_err());
}

#[test]
fn sdm_far_transfers_in_real_mode() {
    let mut m = real();
    // CALL 0x3000:0x0010, 16 bits; then RETF 2.
    m.here(&[0x9a, 0x10, 0x00, 0x00, 0x30]).unwrap();
    assert_eq!((m.cpu.rip, m.cpu.segments[seg::CS].base, m.cpu.regs[RSP]), (0x10, 0x3_0000, 0xffc));
    assert_eq!(m.peek32(RSP0 + 0xffc), 0x2000_0005);
    m.here(&[0xca, 0x02, 0x00]).unwrap();
    assert_eq!((m.cpu.rip, m.cpu.segments[seg::CS].base, m.cpu.regs[RSP]), (5, CODE, 0x1002));
    // JMP m16:32 with an operand-size prefix, past the limit and within.
    m.poke(DATA, 0x3000_0001_0000);
    assert_eq!(m.refused(&[0x66, 0xff, 0x2e, 0x00, 0x00]), GP0);
    m.poke(DATA, 0x3000_0000_8000);
    m.here(&[0x66, 0xff, 0x2e, 0x00, 0x00]).unwrap();
    assert_eq!((m.cpu.rip, m.cpu.segments[seg::CS].selector), (0x8000, 0x3000));
    // LES BX, [4].
    m.cpu.rip = 0;
    m.poke(DATA + 4, 0x4321_1111);
    m.here(&[0xc4, 0x1e, 0x04, 0x00]).unwrap();
    assert_eq!((m.cpu.regs[RBX], m.cpu.segments[seg::ES].base), (0x1111, 0x43210));
}

#[test]
fn sdm_22_1_3_real_mode_lacks_some_system_instructions() {
    for bytes in [&[0x0f, 0x00, 0xd8][..], &[0x0f, 0x00, 0xd0], &[0x0f, 0x00, 0xc0], &[0x0f, 0x02, 0xc0]] {
        assert_eq!(real().refused(bytes), Exception::INVALID_OPCODE, "{bytes:x?}");
    }
    // ARPL, and what is not there outside 64-bit mode.
    for bytes in [&[0x63, 0xc0][..], &[0x0f, 0x05], &[0x0f, 0x01, 0xf8], &[0x0f, 0x34]] {
        assert_eq!(real().refused(bytes), Exception::INVALID_OPCODE, "{bytes:x?}");
    }
}

#[test]
fn sdm_table_loads_have_24_or_32_bits_of_base() {
    let mut m = real();
    m.poke(DATA, 0x8765_4321_0123);
    m.here(&[0x0f, 0x01, 0x16, 0x00, 0x00]).unwrap();
    assert_eq!((m.cpu.gdtr.base, m.cpu.gdtr.limit), (0x65_4321, 0x123));
    m.here(&[0x66, 0x0f, 0x01, 0x1e, 0x00, 0x00]).unwrap();
    assert_eq!((m.cpu.idtr.base, m.cpu.idtr.limit), (0x8765_4321, 0x123));
    m.here(&[0x0f, 0x01, 0x0e, 0x10, 0x00]).unwrap();
    assert_eq!(m.peek(DATA + 0x10) & 0xffff_ffff_ffff, 0x8765_4321_0123);
}

#[test]
fn sdm_6_2_2_the_stack_pointer_has_the_stacks_size() {
    let mut m = real();
    m.cpu.regs[RSP] = 0xabcd_0002;
    m.cpu.regs[RAX] = 0x5555;
    m.go(|a| a.push(ax)).unwrap();
    m.go(|a| a.push(ax)).unwrap();
    assert_eq!((m.cpu.regs[RSP], m.peek16(RSP0 + 0xfffe)), (0xabcd_fffe, 0x5555));
    // Four bytes across the top: one at 0xfffe lies across the limit.
    m.cpu.regs[RSP] = 2;
    assert_eq!(m.refused(&[0x66, 0x50]), SS0);
    m.cpu.regs[RSP] = 0xffff_0010;
    m.here(&[0x60]).unwrap();
    assert_eq!((m.cpu.regs[RSP], m.peek16(RSP0), m.peek16(RSP0 + 6)), (0xffff_0000, m.cpu.regs[RDI] as u16, 0x10));
    m.cpu.regs[RSP] = 0x10;
    m.here(&[0x61]).unwrap();
    assert_eq!(m.cpu.regs[RSP], 0x20);
    // A 32-bit stack of protected mode.
    let mut m = protected();
    m.cpu.regs[RSP] = 0xffff_ffff_0003_0000;
    m.cpu.regs[RBP] = 0x77;
    m.go(|a| a.enter(0x20, 0)).unwrap();
    assert_eq!((m.cpu.regs[RSP], m.cpu.regs[RBP], m.peek32(0x2_fffc)), (0x2_ffdc, 0x2_fffc, 0x77));
    m.go(|a| a.leave()).unwrap();
    assert_eq!((m.cpu.regs[RSP], m.cpu.regs[RBP]), (0x3_0000, 0x77));
}

#[test]
fn sdm_near_branches_wrap_at_their_operand_size() {
    let mut m = real();
    m.cpu.rip = 0xfff0;
    m.here(&[0xeb, 0x20]).unwrap();
    assert_eq!(m.cpu.rip, 0x12);
    m.here(&[0xe8, 0x00, 0x10]).unwrap();
    assert_eq!((m.cpu.rip, m.cpu.regs[RSP], m.peek16(RSP0 + 0xffe)), (0x1015, 0xffe, 0x15));
    m.here(&[0xc3]).unwrap();
    assert_eq!((m.cpu.rip, m.cpu.regs[RSP]), (0x15, 0x1000));
    m.cpu.regs[RAX] = 0x1234_9999;
    m.here(&[0xff, 0xe0]).unwrap();
    assert_eq!(m.cpu.rip, 0x9999);
    assert_eq!(m.refused(&[0x66, 0xff, 0xe0]), GP0);
    m.cpu.regs[RCX] = 0x1_0001;
    m.here(&[0xe2, 0x10]).unwrap();
    assert_eq!((m.cpu.rip, m.cpu.regs[RCX]), (0x999b, 0x1_0000));
    m.here(&[0xe3, 0x10]).unwrap();
    assert_eq!(m.cpu.rip, 0x99ad);
    let mut m = protected();
    m.here(&[0xe8, 0x00, 0x00, 0xff, 0xff]).unwrap();
    assert_eq!((m.cpu.rip, m.peek32(STACK - 4)), (CODE + 5 - 0x1_0000, CODE as u32 + 5));
    m.here(&[0xc2, 0x08, 0x00]).unwrap();
    assert_eq!((m.cpu.rip, m.cpu.regs[RSP]), (CODE + 5, STACK + 8));
    // At a code segment's base, branch targets count from there.
    m.cpu.segments[seg::CS].base = 0x1_0000;
    m.cpu.rip = 0x2_0ffd;
    m.here(&[0xe9, 0xf8, 0xff, 0xff, 0xff]).unwrap();
    assert_eq!(m.cpu.rip, 0x2_0ffa);
}

#[test]
fn sdm_6_3_and_6_5_limits_and_types_are_checked() {
    let mut m = protected();
    for (selector, offset, read, write) in [
        (DATA_32, 0x1000, Ok(()), Ok(())),
        (READ_ONLY, 0xffc, Ok(()), Err(GP0)),
        (READ_ONLY, 0xffd, Err(GP0), Err(GP0)),
        (EXPAND_DOWN, 0xfff, Err(GP0), Err(GP0)),
        (EXPAND_DOWN, 0x1000, Ok(()), Ok(())),
        (0, 0, Err(GP0), Err(GP0)),
    ] {
        m.cpu.regs[RAX] = selector.into();
        m.go(|a| a.mov(ds, ax)).unwrap();
        m.cpu.regs[RBX] = offset;
        for (bytes, outcome) in [([0x8b, 0x0b], read), ([0x89, 0x0b], write)] {
            match outcome {
                Ok(()) => assert_eq!(m.here(&bytes), Ok(Flow::Next), "{selector:#x}:{offset:#x}"),
                Err(fault) => assert_eq!(m.refused(&bytes), fault, "{selector:#x}:{offset:#x}"),
            }
        }
    }
    m.cpu.regs[RAX] = ABSENT.into();
    assert_eq!(m.refused(&[0x8e, 0xd8]), Exception::not_present(ABSENT.into()));
    assert_eq!(m.refused(&[0x8e, 0xd0]), Exception::stack(ABSENT.into()));
    m.cpu.regs[RAX] = 0;
    assert_eq!(m.refused(&[0x8e, 0xd0]), GP0, "no null stack");
    // Through CS: readable here, never writable.
    m.cpu.regs[RBX] = DATA;
    m.here(&[0x2e, 0x8b, 0x0b]).unwrap();
    assert_eq!(m.refused(&[0x2e, 0x89, 0x0b]), GP0);
    m.cpu.segments[seg::CS].attributes &= !2;
    assert_eq!(m.refused(&[0x2e, 0x8b, 0x0b]), GP0);
    // A base beyond, so that linear addresses wrap.
    m.cpu.regs[slot::FS_BASE] = 0xffff_0000;
    m.cpu.segments[seg::FS] = flat(DATA_32, 0xc093);
    m.cpu.regs[RBX] = 0x1_0000 + DATA;
    m.poke(DATA, 0x1357);
    m.here(&[0x64, 0x8b, 0x0b]).unwrap();
    assert_eq!(m.cpu.regs[RCX], 0x1357);
    m.cpu.regs[RBX] = 0xfffe;
    assert!(matches!(m.here(&[0x64, 0x8b, 0x0b]), Err(Stop::Unimplemented(_))));
}

#[test]
fn sdm_7_12_1_gates_of_protected_mode() {
    let mut m = protected();
    m.cpu.set_rflags(flags::IF | flags::CF);
    m.cpu.deliver(GP0, Source::Exception).unwrap();
    assert_eq!((m.cpu.rip, m.cpu.rflags()), (super::handler(13), 2 | flags::CF));
    assert_eq!(m.stack32(), [0, CODE as u32, CODE_32.into(), 0x1_0203]);
    m.cpu.regs[RSP] += 4;
    m.here(&[0xcf]).unwrap();
    assert_eq!((m.cpu.rip, m.cpu.regs[RSP], m.cpu.rflags() & 0xfffff), (CODE, STACK, 0x203));
    // A trap gate of the 286: 16-bit pushes, and IF stays.
    legacy_gate(&mut m, 0x40, CODE_32, 0x8700);
    m.here(&[0xcd, 0x40]).unwrap();
    assert_eq!((m.cpu.rip, m.cpu.regs[RSP]), (super::handler(0x40) & 0xffff, STACK - 6));
    assert_eq!(m.cpu.rflags(), 0x203);
    // Errors of gates.
    for (attributes, selector, refused) in [
        (0x0e00, CODE_32, Exception::not_present(0x202)),
        (0x8c00, CODE_32, Exception::general_protection(0x202)),
        (0x8e00, 0, GP0),
        (0x8e00, DATA_32, Exception::general_protection(DATA_32.into())),
        (0x8e00, 0x50, Exception::general_protection(0x50)),
    ] {
        let mut m = protected();
        legacy_gate(&mut m, 0x40, selector, attributes);
        assert_eq!(m.refused(&[0xcd, 0x40]), refused, "{attributes:#x} {selector:#x}");
    }
    let mut m = protected();
    legacy_gate(&mut m, 0x40, 0x30, 0x8500);
    assert_eq!(m.here(&[0xcd, 0x40]), Err(Stop::Unimplemented("task gate")));
}

#[test]
fn sdm_7_12_1_stack_switch_in_protected_mode() {
    let user = || {
        let mut m = protected();
        m.cpu.segments = [flat(USER_DATA_32, 0xc0f3); 6];
        m.cpu.segments[seg::CS] = flat(USER_CODE_32, 0xc0fb);
        m.cpu.mode_changed();
        m
    };
    let mut m = user();
    assert_eq!(m.refused(&[0xcd, 0x80]), Exception::general_protection(0x402));
    legacy_gate(&mut m, 0x80, CODE_32, 0xee00);
    m.cpu.set_rflags(flags::IF);
    m.here(&[0xcd, 0x80]).unwrap();
    assert_eq!((m.cpu.cpl(), m.cpu.regs[RSP], m.cpu.segments[seg::SS].selector), (0, RSP0 - 20, DATA_32));
    let frame = [CODE as u32 + 2, USER_CODE_32.into(), 0x202, STACK as u32, USER_DATA_32.into()];
    assert_eq!(m.stack32(), frame);
    // A segment that level 3 may not use becomes null on the way back.
    m.cpu.segments[seg::ES] = flat(DATA_32, 0xc093);
    m.here(&[0xcf]).unwrap();
    assert_eq!((m.cpu.cpl(), m.cpu.regs[RSP], m.cpu.rip), (3, STACK, CODE + 2));
    assert!(m.cpu.segments[seg::ES].unusable && !m.cpu.segments[seg::DS].unusable);
    // What is wrong with the inner stack.
    let mut m = user();
    m.poke(TSS + 4, RSP0 | u64::from(USER_DATA_32) << 32);
    legacy_gate(&mut m, 0x80, CODE_32, 0xee00);
    assert_eq!(m.refused(&[0xcd, 0x80]), Exception::invalid_tss(u32::from(USER_DATA_32) & !3));
    m.cpu.tr.limit = 8;
    assert_eq!(m.refused(&[0xcd, 0x80]), Exception::invalid_tss(TSS_SELECTOR.into()));
}

#[test]
fn sdm_far_transfers_in_protected_mode() {
    let mut m = protected();
    // JMP 0x18:0x10, 32 bits, to 16-bit code at 0x20000.
    m.here(&[0xea, 0x10, 0x00, 0x00, 0x00, 0x18, 0x00]).unwrap();
    assert_eq!((m.cpu.rip, m.cpu.segments[seg::CS].base, m.cpu.code_bits()), (0x10, 0x2_0000, 16));
    // There the operand-size prefix makes 32 bits of it.
    m.here(&[0x66, 0x9a, 0x00, 0x00, 0x02, 0x00, 0x08, 0x00]).unwrap();
    assert_eq!((m.cpu.rip, m.cpu.code_bits(), m.stack32()), (0x2_0000, 32, [0x18, 0x18]));
    m.here(&[0xcb]).unwrap();
    assert_eq!((m.cpu.rip, m.cpu.code_bits(), m.cpu.regs[RSP]), (0x18, 16, STACK));
    assert_eq!(m.refused(&[0xea, 0x00, 0x00, 0x10, 0x00]), Exception::general_protection(0x10));
    assert_eq!(m.refused(&[0x66, 0xea, 0x00, 0x00, 0x01, 0x00, 0x18, 0x00]), GP0);
    assert_eq!(m.here(&[0xea, 0x00, 0x00, 0x30, 0x00]), Err(Stop::Unimplemented("task switch")));
    m.cpu.set_rflags(flags::NT);
    assert_eq!(m.here(&[0xcf]), Err(Stop::Unimplemented("task switch")));
    // To user mode by RETF.
    let mut m = protected();
    for (n, value) in (0..).zip([0x6_0000u32, USER_CODE_32.into(), 0x9990, USER_DATA_32.into()]) {
        m.cpu.ram.store(STACK + n * 4, value).unwrap();
    }
    m.here(&[0xcb]).unwrap();
    assert_eq!((m.cpu.rip, m.cpu.regs[RSP], m.cpu.cpl()), (0x6_0000, 0x9990, 3));
}

#[test]
fn sdm_strings_with_16_and_32_bit_addresses() {
    let mut m = real();
    m.cpu.segments[seg::ES].base = 0x5_0000;
    for n in 0..8 {
        m.poke(DATA + 0xffc0 + n * 8, 0x0101_0101_0101_0101 * (n + 1));
    }
    // The source index wraps in the midst of it.
    (m.cpu.regs[RSI], m.cpu.regs[RDI], m.cpu.regs[RCX]) = (0xabcd_fff0, 0, 0x1_0010);
    m.poke(DATA, 0xeeee_eeee_eeee_eeee);
    m.here(&[0xf3, 0xa5]).unwrap();
    assert_eq!(m.peek(0x5_0000 + 8), 0x0808_0808_0808_0808);
    assert_eq!(m.peek(0x5_0000 + 16), 0xeeee_eeee_eeee_eeee);
    assert_eq!((m.cpu.regs[RSI], m.cpu.regs[RDI], m.cpu.regs[RCX]), (0xabcd_0010, 0x20, 0x1_0000));
    // A fault at the limit, after what lay within it.
    let mut m = protected();
    m.cpu.segments[seg::ES] = Segment { base: DATA, limit: 0x17, ..flat(DATA_32, 0x4093) };
    (m.cpu.regs[RAX], m.cpu.regs[RDI], m.cpu.regs[RCX]) = (0x7777_7777, 0, 10);
    assert_eq!(m.here(&[0xf3, 0xab]), Err(GP0.into()));
    assert_eq!((m.cpu.regs[RDI], m.cpu.regs[RCX], m.cpu.rip), (0x18, 4, CODE));
    assert_eq!((m.peek(DATA + 0x10), m.peek(DATA + 0x18)), (0x7777_7777_7777_7777, 0));
}

#[test]
fn sdm_decimal_arithmetic() {
    // The manual's own examples.
    let mut m = protected();
    for (bytes, before, cf_af, after, cf) in [
        (&[0x27][..], 0xae, 0, 0x14, true),
        (&[0x2f], 0x4e, 0, 0x48, false),
        (&[0x37], 0x000a, 0, 0x0100, true),
        (&[0x3f], 0x02ff, flags::AF, 0x0109, true),
        (&[0xd4, 0x0a], 0x0053, 0, 0x0803, false),
        (&[0xd5, 0x0a], 0x0803, 0, 0x0053, false),
        (&[0xd6], 0x0000, flags::CF, 0x00ff, true),
    ] {
        m.cpu.regs[RAX] = before;
        m.cpu.set_rflags(cf_af);
        m.here(bytes).unwrap();
        assert_eq!((m.cpu.regs[RAX], m.cpu.flags.cf()), (after, cf), "{bytes:x?}");
    }
    assert_eq!(m.refused(&[0xd4, 0x00]), Exception::DIVIDE);
    // What the manual leaves undefined, as found on silicon.
    for (bytes, word, before, after) in [
        (&[0x27][..], 0x034d, flags::CF | flags::AF, 0x891),
        (&[0x2f], 0x0380, flags::CF, 0x801),
        (&[0x37], 0xff05, 0, 0x084),
        (&[0x3f], 0x0300, flags::AF, 0x015),
        (&[0xd5, 0xd1], 0xff71, 0, 0x894),
    ] {
        m.cpu.regs[RAX] = word;
        m.cpu.set_rflags(before);
        m.here(bytes).unwrap();
        assert_eq!(m.cpu.rflags() & flags::ARITHMETIC, after, "{bytes:x?}");
    }
}

#[test]
fn sdm_bound_and_into() {
    let mut m = protected();
    m.cpu.regs[RBX] = DATA;
    m.poke(DATA, 0x0000_0005_ffff_fffe);
    for (index, within) in [(5, true), (0xffff_fffe, true), (6, false), (0xffff_fffd, false)] {
        m.cpu.regs[RAX] = index;
        if within {
            m.here(&[0x62, 0x03]).unwrap();
        } else {
            assert_eq!(m.refused(&[0x62, 0x03]), Exception::BOUND);
        }
    }
    m.here(&[0xce]).unwrap();
    m.cpu.set_rflags(flags::OF);
    let next = m.cpu.rip as u32 + 1;
    m.here(&[0xce]).unwrap();
    assert_eq!((m.cpu.rip, m.stack32()), (super::handler(4), [next]));
}

#[test]
fn sdm_5_3_paging_with_32_bits() {
    let mut m = protected();
    m.poke(0x5_1000 + 4, 0x5_2007);
    m.cpu.ram.store(0x5_1000, 0x87u32).unwrap();
    m.cpu.ram.store(0x5_1000 + 4, 0x5_2007u32).unwrap();
    m.cpu.ram.store(0x5_2000 + 4 * 5, (DATA as u32) | 5).unwrap();
    m.cpu.control.cr3 = 0x5_1000;
    m.cpu.control.cr4 = cr4::PSE;
    m.cpu.control.cr0 |= cr0::PG;
    m.cpu.flush_tlb();
    m.poke(DATA, 0xfeed);
    let page = 0x40_0000 + 5 * 4096;
    assert_eq!(m.cpu.read::<u32>(page), Ok(0xfeed));
    assert_eq!((m.peek32(0x5_1004), m.peek32(0x5_2014)), (0x5_2027, DATA as u32 | 0x25));
    m.cpu.write(page, 0xbeefu32).unwrap();
    assert_eq!(m.peek32(0x5_2014), DATA as u32 | 0x65);
    m.cpu.control.cr0 |= cr0::WP;
    m.cpu.flush_tlb();
    assert_eq!(m.cpu.write(page, 1u32), Err(Exception::page(page, 3).into()));
    assert_eq!(m.cpu.read::<u32>(page + 4096), Err(Exception::page(page + 4096, 0).into()));
    assert_eq!(m.cpu.read::<u32>(DATA), Ok(0xbeef), "by a large page");
    assert_eq!(m.peek32(0x5_1000), 0xa7);
    m.cpu.ram.store(0x5_1000, 0x2087u32).unwrap();
    m.cpu.flush_tlb();
    assert_eq!(m.cpu.read::<u32>(DATA), Err(Exception::page(DATA, 9).into()));
}

#[test]
fn sdm_5_4_paging_with_pae() {
    let mut m = protected();
    // CR3 names 32 bytes.
    m.poke(0x5_0020 + 3 * 8, 0x5_1001);
    m.poke(0x5_1000 + 8, 0x5_2003 | 1 << 63);
    m.poke(0x5_1000 + 16, 0x85);
    m.poke(0x5_2000, DATA | 7);
    (m.cpu.control.cr3, m.cpu.control.cr4, m.cpu.control.efer) = (0x5_0020, cr4::PAE, efer::NXE);
    m.cpu.control.cr0 |= cr0::PG;
    m.cpu.flush_tlb();
    m.poke(DATA, 0xcafe);
    let page = 0xc020_0000;
    assert_eq!(m.cpu.read::<u32>(page), Ok(0xcafe));
    assert_eq!((m.peek(0x5_1008), m.peek(0x5_2000)), (0x5_2023 | 1 << 63, DATA | 0x27));
    assert_eq!(m.cpu.fetch_offset(page), Err(Exception::page(page, 0x11).into()));
    assert_eq!(m.cpu.read::<u32>(0xc040_0000 + DATA), Ok(0xcafe), "by a large page");
    assert_eq!(m.cpu.read::<u32>(0x1000), Err(Exception::page(0x1000, 0).into()));
    m.poke(0x5_0020 + 3 * 8, 0x5_1003);
    m.cpu.flush_tlb();
    assert_eq!(m.cpu.read::<u32>(page), Err(Exception::page(page, 9).into()));
}

#[test]
fn sdm_11_8_5_long_mode_is_entered_and_left_by_paging() {
    let mut m = protected();
    // The page tables of the 64-bit tests are still there.
    m.cpu.control.efer = efer::LME;
    m.cpu.regs[RAX] = 0x8000_0011;
    assert_eq!(m.refused(&[0x0f, 0x22, 0xc0]), GP0, "without PAE");
    m.cpu.control.cr4 = cr4::PAE;
    m.cpu.segments[seg::CS].attributes |= 1 << 13;
    assert_eq!(m.refused(&[0x0f, 0x22, 0xc0]), GP0, "from what would be 64-bit code");
    m.cpu.segments[seg::CS].attributes &= !(1 << 13);
    m.here(&[0x0f, 0x22, 0xc0]).unwrap();
    assert_eq!((m.cpu.control.efer, m.cpu.code_bits()), (efer::LME | efer::LMA, 32));
    // Into 64-bit code and back.
    m.poke(GDT + 0x38, 0x00af_9b00_0000_ffff);
    m.here(&[0xea, 0x00, 0x00, 0x02, 0x00, 0x38, 0x00]).unwrap();
    assert_eq!((m.cpu.rip, m.cpu.code_bits()), (CODE, 64));
    m.cpu.regs[RAX] = 0x11;
    assert_eq!(m.refused(&[0x0f, 0x22, 0xc0]), GP0, "not from 64-bit code");
    m.cpu.regs[RBX] = DATA;
    m.poke(DATA, CODE | u64::from(KERNEL_CS) << 32);
    m.here(&[0xff, 0x2b]).unwrap();
    assert_eq!(m.cpu.code_bits(), 32);
    m.cpu.regs[RDX] = 0;
    m.here(&[0x0f, 0x22, 0xe2]).expect_err("long mode needs PAE");
    m.here(&[0x0f, 0x22, 0xc0]).unwrap();
    assert_eq!((m.cpu.control.efer, m.cpu.control.cr0), (efer::LME, 0x11));
    // To real mode; LMSW does not lead there.
    m.cpu.regs[RAX] = 0;
    m.here(&[0x0f, 0x01, 0xf0]).unwrap();
    assert!(m.cpu.is_protected());
    m.here(&[0x0f, 0x22, 0xc0]).unwrap();
    assert!(!m.cpu.is_protected());
}

#[test]
fn sdm_7_14_interrupts_out_of_compatibility_mode() {
    let mut m = compatibility();
    m.gate(0x80, KERNEL_CS, 0xee00);
    m.cpu.set_rflags(flags::IF);
    m.cpu.regs[RSP] = STACK;
    m.here(&[0xcd, 0x80]).unwrap();
    assert_eq!((m.cpu.code_bits(), m.cpu.cpl(), m.cpu.rip), (64, 0, super::handler(0x80)));
    assert_eq!(m.stack(), [CODE + 2, 0x3b, 0x202, STACK, USER_SS.into()]);
    m.here(&[0x48, 0xcf]).unwrap();
    assert_eq!((m.cpu.code_bits(), m.cpu.cpl(), m.cpu.rip, m.cpu.regs[RSP]), (32, 3, CODE + 2, STACK));
}

#[test]
fn compatibility_mode_checks_its_segments_and_has_no_64_bit_instructions() {
    let mut m = compatibility();
    m.cpu.regs[RBX] = 0xffff_ffff_0000_0000 | DATA;
    m.poke(DATA, 0x1234_5678);
    // Addresses have 32 bits; INC has a short form where REX prefixes are in 64-bit mode.
    m.here(&[0x8b, 0x03]).unwrap();
    m.here(&[0x40]).unwrap();
    assert_eq!(m.cpu.regs[RAX], 0x1234_5679);
    assert_eq!(m.refused(&[0x0f, 0x05]), Exception::INVALID_OPCODE);
    m.cpu.segments[seg::DS].unusable = true;
    assert_eq!(m.refused(&[0x8b, 0x03]), GP0);
    m.here(&[0x36, 0x8b, 0x03]).unwrap();
    // To 64-bit code at the same level.
    m.here(&[0xea, 0x00, 0x10, 0x02, 0x00, USER_CS as u8, 0x00]).unwrap();
    assert_eq!((m.cpu.code_bits(), m.cpu.rip, m.cpu.cpl()), (64, 0x2_1000, 3));
    m.here(&[0x48, 0x8b, 0x03]).expect_err("the upper half counts there");
}

#[test]
fn sdm_fxsave_outside_64_bit_mode_has_eight_registers() {
    let mut m = protected();
    m.cpu.control.cr4 = cr4::OSFXSR;
    m.cpu.regs[RBX] = DATA;
    m.cpu.fpu.xmm = std::array::from_fn(|n| n as u128 + 1);
    m.here(&[0x0f, 0xae, 0x03]).unwrap();
    assert_eq!((m.peek(DATA + 160 + 7 * 16), m.peek(DATA + 160 + 8 * 16)), (8, 0));
    m.cpu.fpu.xmm = [99; 16];
    m.here(&[0x0f, 0xae, 0x0b]).unwrap();
    assert_eq!((m.cpu.fpu.xmm[7], m.cpu.fpu.xmm[8]), (8, 99));
}

/// Numbers that look random, the same in every run.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Small, at a border of 16 or 32 bits, or anything.
    fn value(&mut self) -> u64 {
        match self.next() % 5 {
            0 => self.next() % 64,
            1 => 0x1_0000u64.wrapping_sub(self.next() % 32),
            2 => 0x1_0000_0000u64.wrapping_sub(self.next() % 32),
            3 => DATA + self.next() % 4096,
            _ => self.next(),
        }
    }
}

#[test]
fn any_bytes_in_any_state_that_is_accepted_execute_or_fault() {
    let mut numbers = Numbers(0x9e37_79b9_7f4a_7c15);
    let (mut accepted, mut executed) = (0, 0);
    for n in 0..30_000 {
        let mut m = [real, protected, compatibility][n % 3]();
        let mut state = m.cpu.save();
        state.gpr = std::array::from_fn(|_| numbers.value());
        for _ in 0..numbers.next() % 3 {
            let segment = &mut state.segments[numbers.next() as usize % 6];
            match numbers.next() % 4 {
                0 => segment.limit = numbers.value() as u32,
                1 => segment.base = numbers.value() & 0x7fff_ffff_ffff,
                2 => segment.attributes = numbers.next() as u16 & 0xf0ff,
                _ => segment.unusable = true,
            }
        }
        match numbers.next() % 8 {
            0 => state.rip = numbers.value() & 0xffff_ffff,
            1 => state.rflags = numbers.next() & 0x3f_ffff | 2,
            2 => (state.gdtr.limit, state.idtr.limit) = (numbers.next() as u16, numbers.next() as u16),
            3 => (state.gdtr.base, state.tr.limit) = (numbers.value() & 0x7fff_ffff_ffff, numbers.next() as u32),
            4 => state.cr4 ^= cr4::PAE,
            5 => state.cr0 ^= cr0::PG,
            _ => {}
        }
        if m.cpu.restore(&state).is_err() {
            continue;
        }
        accepted += 1;
        let at = m.cpu.code_address(m.cpu.rip).map_or(CODE, |(at, _)| at);
        for at in at..at.saturating_add(64) {
            // What lies in no memory stays as it is.
            let _ = m.cpu.ram.store(at, numbers.next() as u8);
        }
        for _ in 0..8 {
            match m.cpu.step() {
                Ok(_) => executed += 1,
                Err(Stop::Fault(exception)) => {
                    if m.cpu.deliver(exception, Source::Exception).is_err() {
                        break;
                    }
                }
                Err(Stop::Unimplemented(_)) => break,
            }
        }
        // What it comes to can be saved and restored.
        let after = m.cpu.save();
        m.cpu.restore(&after).unwrap_or_else(|error| panic!("number {n}: {error}: {after:x?}"));
    }
    assert!(accepted > 20_000 && executed > 20_000, "{accepted} states, {executed} instructions");
}
