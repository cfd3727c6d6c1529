//! General instructions: Intel SDM volume 2. Flags that it leaves undefined are compared with what an AMD Zen 4
//! processor was seen to give.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use crate::hv::soft::cpu::slot::{R11, RAX, RBX, RCX, RDX, RSP};
use crate::hv::soft::exec::general;
use crate::hv::soft::exec::system;
use crate::hv::soft::fault::{Exception, Flow};
use crate::hv::soft::flags::{AF, ARITHMETIC, CF, OF, PF, SF, ZF};
use crate::hv::soft::step::decode;

use super::{CODE, DATA, STACK, machine};

type Write = fn(&mut CodeAssembler) -> Result<(), IcedError>;

/// RAX, RDX and the arithmetic flags after an instruction, from RAX, RDX, RBX and RCX.
fn outcome(write: Write, rflags: u64, [a, d, b, c]: [u64; 4]) -> (u64, u64, u64) {
    let mut m = machine();
    for (register, value) in [(RAX, a), (RDX, d), (RBX, b), (RCX, c)] {
        m.cpu.regs[register] = value;
    }
    m.cpu.set_rflags(rflags);
    assert_eq!(m.run(write), Ok(Flow::Next));
    (m.cpu.regs[RAX], m.cpu.regs[RDX], m.cpu.rflags() & ARITHMETIC)
}

/// As silicon: results and flags both from all flags clear and from all set.
fn check(name: &str, write: Write, input: [u64; 4], result: (u64, u64), from_clear: u64, from_set: u64) {
    for (before, after) in [(0, from_clear), (ARITHMETIC, from_set)] {
        let expected = (result.0, result.1, after);
        assert_eq!(outcome(write, before, input), expected, "{name} of {input:x?} from flags {before:#x}");
    }
}

/// For instructions that read no flag and write all.
fn check_all(name: &str, write: Write, input: [u64; 3], result: u64, flags: u64) {
    check(name, write, [input[0], input[1], input[2], 0], (result, input[1]), flags, flags);
}

#[test]
fn silicon_shifts() {
    check_all("shl 1", |a| a.shl(eax, 1), [0x4000_0008, 0, 0], 0x8000_0010, OF | SF | AF);
    check_all("shl 4", |a| a.shl(eax, 4), [0x0c00_0008, 0, 0], 0xc000_0080, OF | SF | AF);
    check_all("shl 5", |a| a.shl(eax, 5), [0x0800_0008, 0, 0], 0x100, OF | AF | PF | CF);
    check_all("shl 8 of 8", |a| a.shl(al, 8), [0xff, 0, 0], 0, OF | ZF | AF | PF | CF);
    check_all("shl 9 of 8", |a| a.shl(al, 9), [0xff, 0, 0], 0, ZF | AF | PF);
    check_all("shr 1", |a| a.shr(eax, 1), [0x8000_0018, 0, 0], 0x4000_000c, OF | AF | PF);
    check_all("shr 4", |a| a.shr(eax, 4), [0x8000_0018, 0, 0], 0x0800_0001, AF | CF);
    check_all("shr 8 of 8", |a| a.shr(al, 8), [0xff, 0, 0], 0, ZF | AF | PF | CF);
    check_all("sar 4", |a| a.sar(eax, 4), [0x8000_0018, 0, 0], 0xf800_0001, SF | AF | CF);
    check_all("sar 12 of 8", |a| a.sar(al, 12), [0x80, 0, 0], 0xff, SF | AF | PF | CF);
    // A count of zero changes no flag, but clears the upper half.
    check("shl 0", |a| a.shl(eax, cl), [0xffff_ffff_0000_0001, 0, 0, 32], (1, 0), 0, ARITHMETIC);
}

#[test]
fn silicon_rotates() {
    let kept = SF | ZF | AF | PF;
    for (name, write, input, clear, set) in [
        ("rol", (|a| a.rol(eax, 4)) as Write, 0x0800_0001, (0x8000_0010, OF), (0x8000_0010, OF)),
        ("rol", |a| a.rol(eax, 4), 0x1800_0001, (0x8000_0011, CF), (0x8000_0011, CF)),
        ("rol 8 of 8", |a| a.rol(al, 8), 0x81, (0x81, CF), (0x81, CF)),
        ("ror", |a| a.ror(eax, 4), 0x8000_000c, (0xc800_0000, CF), (0xc800_0000, CF)),
        ("ror", |a| a.ror(eax, 4), 0x8000_0004, (0x4800_0000, OF), (0x4800_0000, OF)),
        ("rcl", |a| a.rcl(eax, 4), 0x9000_0001, (0x14, OF | CF), (0x1c, OF | CF)),
        ("rcl 9 of 8", |a| a.rcl(al, 9), 0x81, (0x81, OF), (0x81, CF)),
        ("rcl 17 of 16", |a| a.rcl(ax, 17), 0x8001, (0x8001, OF), (0x8001, CF)),
        ("rcr", |a| a.rcr(eax, 4), 0x8000_000c, (0x8800_0000, OF | CF), (0x9800_0000, OF | CF)),
        ("rcr", |a| a.rcr(eax, 4), 6, (0xc000_0000, 0), (0xd000_0000, 0)),
        ("rcr 9 of 8", |a| a.rcr(al, 9), 0x41, (0x41, OF), (0x41, OF | CF)),
    ] {
        assert_eq!(outcome(write, 0, [input, 0, 0, 0]), (clear.0, 0, clear.1), "{name}");
        assert_eq!(outcome(write, ARITHMETIC, [input, 0, 0, 0]), (set.0, 0, set.1 | kept), "{name}");
    }
}

#[test]
fn silicon_double_shifts() {
    let high = 0x8000_0000;
    check_all("shld 1", |a| a.shld(eax, ebx, 1), [0x4000_0001, 0, high], 0x8000_0003, OF | SF | AF | PF);
    check_all("shld 4", |a| a.shld(eax, ebx, 4), [0x1800_0001, 0, high], 0x8000_0018, SF | AF | PF | CF);
    check_all("shld 4", |a| a.shld(eax, ebx, 4), [0x8800_0001, 0, high], 0x8000_0018, OF | SF | AF | PF);
    check_all("shrd 1", |a| a.shrd(eax, ebx, 1), [0x4000_0001, 0, 1], 0xa000_0000, OF | SF | AF | PF | CF);
    check_all("shrd 4", |a| a.shrd(eax, ebx, 4), [0x8000_0001, 0, 4], 0x4800_0000, OF | AF | PF);
    check_all("shrd 4", |a| a.shrd(eax, ebx, 4), [0x8000_0001, 0, 12], 0xc800_0000, SF | AF | PF);
    check_all("shld 16 of 16", |a| a.shld(ax, bx, 16), [0x1234, 0, 0x5678], 0x5678, AF | PF);
    check_all("shrd 16 of 16", |a| a.shrd(ax, bx, 16), [0x1234, 0, 0x5678], 0x5678, OF | AF | PF);
    check_all("shld 20 of 16", |a| a.shld(ax, bx, 20), [0x1234, 0, 0x5678], 0x6785, AF);
    check_all("shrd 20 of 16", |a| a.shrd(ax, bx, 20), [0x1234, 0, 0x5678], 0x8567, OF | SF | AF);
    check_all("shld 31 of 16", |a| a.shld(ax, bx, 31), [0x1235, 0, 0x5679], 0xab3c, SF | AF | PF);
    check_all("shrd 31 of 16", |a| a.shrd(ax, bx, 31), [0x9235, 0, 0xd679], 0xacf3, OF | SF | AF | PF);
    check_all("shld 24 of 16", |a| a.shld(ax, bx, 24), [0, 0, 0xaaaa], 0xaaaa, SF | AF | PF);
}

#[test]
fn silicon_multiplication() {
    let kept = SF | ZF | AF | PF;
    let over = OF | CF;
    check("mul", |a| a.mul(ebx), [5, 9, 7, 0], (35, 0), 0, kept);
    check("mul", |a| a.mul(ebx), [0x8000_0000, 0, 3, 0], (0x8000_0000, 1), over, kept | over);
    check("mul 8", |a| a.mul(bl), [0x81, 0, 3, 0], (0x183, 0), over, kept | over);
    check("imul 64", |a| a.imul_2(rax, rbx), [5, 0, 7u64.wrapping_neg(), 0], (35u64.wrapping_neg(), 0), 0, kept);
    check("imul 1", |a| a.imul(ebx), [5, 0, 0xffff_fff9, 0], (0xffff_ffdd, 0xffff_ffff), 0, kept);
    check("imul 3", |a| a.imul_3(eax, ebx, 3), [5, 0, 0xffff_fff9, 0], (0xffff_ffeb, 0), 0, kept);
    let most = i64::MIN as u64;
    check("imul 64", |a| a.imul(rbx), [most, 0, most, 0], (0, 1 << 62), over, kept | over);
}

#[test]
fn silicon_division() {
    let kept = OF | CF | AF;
    let five = 5u64;
    check("div 32", |a| a.div(ebx), [100, 5, 7, 0], (0xb6db_6dc5, 1), AF, kept);
    check("div 64", |a| a.div(rbx), [100, five, 7, 0], (0xb6db_6db6_db6d_b6e9, 5), AF, kept);
    check("div 8", |a| a.div(bl), [100, 0, 7, 0], (0x20e, 0), AF, kept);
    check("idiv 8", |a| a.idiv(bl), [100, 0, 0xf9, 0], (0x2f2, 0), AF, kept);
    let minus = u64::MAX;
    check(
        "idiv 64",
        |a| a.idiv(rbx),
        [100u64.wrapping_neg(), minus, 7, 0],
        (14u64.wrapping_neg(), minus - 1),
        AF,
        kept,
    );
}

#[test]
fn sdm_div_and_idiv_raise_divide_errors() {
    let most = i64::MIN as u64;
    for (write, input) in [
        ((|a| a.div(ebx)) as Write, [1, 0, 0]),
        (|a| a.div(ebx), [0, 1, 1]),
        (|a| a.div(rbx), [0, 7, 7]),
        (|a| a.div(bl), [0x100, 0, 1]),
        (|a| a.idiv(bl), [0x80, 0, 1]),
        (|a| a.idiv(rbx), [most, u64::MAX, u64::MAX]),
        (|a| a.idiv(rbx), [0, most, u64::MAX]),
        (|a| a.idiv(ebx), [0x8000_0000, 0xffff_ffff, 0xffff_ffff]),
    ] {
        let mut m = machine();
        [m.cpu.regs[RAX], m.cpu.regs[RDX], m.cpu.regs[RBX]] = input;
        assert_eq!(m.fault(write), Exception::DIVIDE, "{input:x?}");
    }
}

#[test]
fn silicon_bit_scans_and_swaps() {
    let ones = u64::MAX;
    check_all("bsf 0", |a| a.bsf(eax, ebx), [ones, 0, 0], ones, ZF | PF);
    check_all("bsf", |a| a.bsf(eax, ebx), [ones, 0, 8], 3, PF);
    check_all("bsf", |a| a.bsf(ax, bx), [ones, 0, 2], 0xffff_ffff_ffff_0001, 0);
    check_all("bsr", |a| a.bsr(rax, rbx), [ones, 0, 0x80], 7, 0);
    // Their newer forms are the same instructions without BMI1 and LZCNT.
    check_all("tzcnt", |a| a.tzcnt(rax, rbx), [ones, 0, 0], ones, ZF | PF);
    check_all("lzcnt", |a| a.lzcnt(rax, rbx), [ones, 0, 0x30], 5, PF);
    check("bswap", |a| a.bswap(eax), [0xffff_ffff_1234_5678, 0, 0, 0], (0x7856_3412, 0), 0, ARITHMETIC);
}

#[test]
fn sdm_bit_tests_reach_beyond_the_operand() {
    for (index, at, bit) in [(0i64, 0i64, 0), (64, 8, 0), (-1, -8, 63), (1_000_003, 125_000, 3)] {
        let mut m = machine();
        let base = DATA + 0x8000;
        m.cpu.regs[RBX] = base;
        m.cpu.regs[RCX] = index as u64;
        m.run(|a| a.lock().bts(qword_ptr(rbx), rcx)).unwrap();
        assert!(!m.cpu.flags.cf());
        assert_eq!(m.peek(base.wrapping_add_signed(at)), 1 << bit);
        m.run(|a| a.bt(qword_ptr(rbx), rcx)).unwrap();
        assert!(m.cpu.flags.cf());
        m.run(|a| a.btr(qword_ptr(rbx), rcx)).unwrap();
        assert_eq!(m.peek(base.wrapping_add_signed(at)), 0);
    }
    // A 16-bit index is signed as such; an immediate one stays in the operand.
    let mut m = machine();
    m.cpu.regs[RBX] = DATA + 0x4000;
    m.cpu.regs[RCX] = 0x8000;
    m.run(|a| a.btc(word_ptr(rbx), cx)).unwrap();
    assert_eq!(m.peek(DATA + 0x3000), 1);
    m.run(|a| a.btc(word_ptr(rbx), 17)).unwrap();
    assert_eq!(m.peek(DATA + 0x4000), 2);
}

#[test]
fn sdm_compare_and_exchange() {
    // A register destination keeps its upper half when the comparison fails.
    let (old, other) = (0xffff_ffff_0000_0001, 0xffff_ffff_0000_0002);
    let differs = SF | AF | PF | CF;
    check("cmpxchg", |a| a.cmpxchg(edx, ebx), [old, other, 3, 0], (2, other), differs, differs);
    check("cmpxchg", |a| a.cmpxchg(edx, ebx), [old, old, 3, 0], (old, 3), ZF | PF, ZF | PF);
    let mut m = machine();
    m.poke(DATA, 1);
    m.poke(DATA + 8, 2);
    for (register, value) in [(RAX, 1), (RDX, 3), (RBX, 10), (RCX, 11), (R11, DATA)] {
        m.cpu.regs[register] = value;
    }
    m.cpu.set_rflags(ARITHMETIC);
    m.run(|a| a.lock().cmpxchg16b(ptr(r11))).unwrap();
    assert_eq!((m.cpu.regs[RAX], m.cpu.regs[RDX], m.cpu.rflags()), (1, 2, 2 | ARITHMETIC & !ZF));
    m.run(|a| a.cmpxchg16b(ptr(r11))).unwrap();
    assert_eq!((m.peek(DATA), m.peek(DATA + 8), m.cpu.rflags()), (10, 11, 2 | ARITHMETIC));
    assert_eq!(m.fault(|a| a.cmpxchg16b(ptr(r11 + 8))), Exception::general_protection(0));
    m.cpu.regs[RAX] = 0xffff_ffff_0000_000a;
    m.cpu.regs[RDX] = 0;
    m.cpu.regs[RBX] = 7;
    m.cpu.regs[RCX] = 8;
    m.run(|a| a.cmpxchg8b(ptr(r11))).unwrap();
    assert_eq!(m.peek(DATA), 8 << 32 | 7);
}

#[test]
fn sdm_exchange_and_add() {
    check("xadd", |a| a.xadd(eax, edx), [1, 2, 0, 0], (3, 1), PF, PF);
    check("xadd with itself", |a| a.xadd(eax, eax), [3, 0, 0, 0], (6, 0), PF, PF);
    check("xchg", |a| a.xchg(eax, edx), [1 << 32 | 1, 1 << 32 | 2, 0, 0], (2, 1), 0, ARITHMETIC);
    check("xchg high", |a| a.xchg(ah, dl), [0x100, 2, 0, 0], (0x200, 1), 0, ARITHMETIC);
}

#[test]
fn sdm_conditional_moves_read_and_clear_whatever_the_condition() {
    let input = [u64::MAX, 0, 0x40, 0];
    assert_eq!(outcome(|a| a.cmovb(eax, ebx), 0, input), (0xffff_ffff, 0, 0));
    assert_eq!(outcome(|a| a.cmovb(eax, ebx), ARITHMETIC, input), (0x40, 0, ARITHMETIC));
    let mut m = machine();
    m.cpu.regs[RBX] = 0x7000_0000;
    assert_eq!(m.fault(|a| a.cmovb(eax, ptr(rbx))), Exception::page(0x7000_0000, 0));
}

#[test]
fn sdm_lock_is_undefined_where_it_makes_no_sense() {
    for bytes in
        [&[0xf0, 0x01, 0xc0][..], &[0xf0, 0x39, 0x03], &[0xf0, 0x90], &[0xf0, 0x8b, 0x03], &[0xf0, 0x0f, 0xa3, 3]]
    {
        let mut m = machine();
        m.cpu.regs[RBX] = DATA;
        assert_eq!(m.bytes(bytes), Err(Exception::INVALID_OPCODE.into()), "{bytes:x?}");
        assert_eq!(m.cpu.rip, CODE);
    }
}

#[test]
fn what_cpuid_does_not_show_has_no_executor() {
    for (name, bytes) in [
        ("popcnt", &[0xf3, 0x0f, 0xb8, 0xc0][..]),
        ("movbe", &[0x0f, 0x38, 0xf0, 0x03]),
        ("crc32", &[0xf2, 0x0f, 0x38, 0xf1, 0xc0]),
        ("rdfsbase", &[0xf3, 0x0f, 0xae, 0xc0]),
        ("xgetbv", &[0x0f, 0x01, 0xd0]),
        ("xsave", &[0x0f, 0xae, 0x23]),
        ("rdrand", &[0x0f, 0xc7, 0xf0]),
        ("monitor", &[0x0f, 0x01, 0xc8]),
        ("mwait", &[0x0f, 0x01, 0xc9]),
        ("invpcid", &[0x66, 0x0f, 0x38, 0x82, 0x03]),
        ("stac", &[0x0f, 0x01, 0xcb]),
        ("sysenter", &[0x0f, 0x34]),
        ("vmcall", &[0x0f, 0x01, 0xc1]),
        ("ud2", &[0x0f, 0x0b]),
        ("mov cs", &[0x8e, 0xc8]),
        ("mov cr1", &[0x0f, 0x20, 0xc8]),
        ("adcx", &[0x66, 0x0f, 0x38, 0xf6, 0xc0]),
        ("clwb", &[0x66, 0x0f, 0xae, 0x33]),
        ("rdpid", &[0xf3, 0x0f, 0xc7, 0xf8]),
    ] {
        let known = decode(64, bytes, 0).ok().and_then(|insn| general(&insn).or_else(|| system(&insn)));
        assert!(known.is_none(), "{name}");
    }
}

#[test]
fn sdm_push_and_pop_of_the_stack_pointer() {
    let mut m = machine();
    m.run(|a| a.push(rsp)).unwrap();
    assert_eq!((m.cpu.regs[RSP], m.stack()), (STACK - 8, [STACK]));
    m.run(|a| a.pop(qword_ptr(rsp))).unwrap();
    assert_eq!((m.cpu.regs[RSP], m.peek(STACK)), (STACK, STACK));
    m.run(|a| a.push(0x1234_i32)).unwrap();
    m.run(|a| a.pop(rsp)).unwrap();
    assert_eq!(m.cpu.regs[RSP], 0x1234);
    // A destination that faults leaves the stack pointer.
    m.cpu.regs[RSP] = STACK;
    m.cpu.regs[RBX] = 0x7000_0000;
    assert_eq!(m.fault(|a| a.pop(qword_ptr(rbx))), Exception::page(0x7000_0000, 2));
}

#[test]
fn sdm_16_bit_stack_operations_move_two_bytes() {
    let mut m = machine();
    m.cpu.regs[RAX] = 0xabcd;
    m.run(|a| a.push(ax)).unwrap();
    assert_eq!(m.cpu.regs[RSP], STACK - 2);
    m.cpu.regs[RBX] = u64::MAX;
    m.run(|a| a.pop(bx)).unwrap();
    assert_eq!((m.cpu.regs[RSP], m.cpu.regs[RBX]), (STACK, 0xffff_ffff_ffff_abcd));
}

#[test]
fn sdm_enter_copies_the_display() {
    let mut m = machine();
    let frame = STACK + 0x100;
    m.cpu.regs[5] = frame;
    m.poke(frame - 8, 0x11);
    m.run(|a| a.enter(0x20, 2)).unwrap();
    assert_eq!((m.cpu.regs[5], m.cpu.regs[RSP]), (STACK - 8, STACK - 24 - 0x20));
    assert_eq!([m.peek(STACK - 8), m.peek(STACK - 16), m.peek(STACK - 24)], [frame, 0x11, STACK - 8]);
    m.run(|a| a.leave()).unwrap();
    assert_eq!((m.cpu.regs[5], m.cpu.regs[RSP]), (frame, STACK));
}

#[test]
fn sdm_near_transfers() {
    let mut m = machine();
    m.cpu.regs[RAX] = 0x5_0000;
    assert_eq!(m.run(|a| a.call(rax)), Ok(Flow::Jump));
    assert_eq!((m.cpu.rip, m.stack()), (0x5_0000, [CODE + 2]));
    m.run(|a| a.ret_1(16)).unwrap();
    assert_eq!((m.cpu.rip, m.cpu.regs[RSP]), (CODE + 2, STACK + 16));
    m.cpu.regs[RCX] = 1 << 32 | 1;
    assert_eq!(m.bytes(&[0x67, 0xe2, 0x10]), Ok(Flow::Next));
    assert_eq!(m.cpu.regs[RCX], 0);
    m.cpu.rip = CODE;
    assert_eq!(m.bytes(&[0xe3, 0xf0]), Ok(Flow::Jump));
    assert_eq!(m.cpu.rip, CODE - 14);
}

#[test]
fn sdm_accumulator_extensions() {
    check("cwde", |a| a.cwde(), [0xffff_ffff_0000_8000, 0, 0, 0], (0xffff_8000, 0), 0, ARITHMETIC);
    check("cbw", |a| a.cbw(), [0x1_0080, 0, 0, 0], (0x1_ff80, 0), 0, ARITHMETIC);
    check("cqo", |a| a.cqo(), [1 << 63, 7, 0, 0], (1 << 63, u64::MAX), 0, ARITHMETIC);
    check("cdq", |a| a.cdq(), [0x8000_0000, u64::MAX, 0, 0], (0x8000_0000, 0xffff_ffff), 0, ARITHMETIC);
}

#[test]
fn sdm_reserved_no_operations_do_nothing() {
    for bytes in [
        &[0x0f, 0x1a, 0xc0][..],
        &[0x0f, 0x1b, 0xc0],
        &[0x0f, 0x1c, 0x00],
        &[0x0f, 0x1d, 0xc0],
        &[0x0f, 0x1f, 0x44, 0x00, 0x00],
        &[0x0f, 0x18, 0x38],
        &[0x0f, 0x19, 0xc0],
        &[0x0f, 0x0d, 0x08],
        // RDSSPQ without shadow stacks, ENDBR64, PAUSE.
        &[0xf3, 0x48, 0x0f, 0x1e, 0xc8],
        &[0xf3, 0x0f, 0x1e, 0xfa],
        &[0xf3, 0x90],
    ] {
        let mut m = machine();
        // Where there is an address, it is not accessed.
        m.cpu.regs[RAX] = 0x7000_0000;
        assert_eq!(m.bytes(bytes), Ok(Flow::Next), "{bytes:x?}");
        assert_eq!((m.cpu.rip, m.cpu.regs[RAX]), (CODE + bytes.len() as u64, 0x7000_0000));
    }
}
