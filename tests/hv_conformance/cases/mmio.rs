//! Accesses to what is not memory: every width, read-modify-write, strings, and operands that straddle the end of RAM.

use super::*;
use crate::bus::Access;
use crate::bus::Kind;

cases!(mmio:
    every_width,
    extensions_and_immediates,
    read_modify_write,
    exchange_and_compare,
    string_moves_from_and_to_registers,
    string_stores_and_loads,
    compares_and_tests_only_read,
    push_and_pop_through_registers,
    sse_moves,
    unaligned_accesses_reach_every_byte,
    operands_that_straddle_the_end_of_memory,
    memory_after_the_end_reads_as_ones,
    user_mode_registers,
);

fn read(at: u64, size: usize, value: u64) -> Access {
    Access { kind: Kind::Read, at, size, value }
}

fn write(at: u64, size: usize, value: u64) -> Access {
    Access { kind: Kind::Write, at, size, value }
}

/// Runs `build` with RBX at the device's registers, and gives the machine back after it.
fn device(
    bench: &Bench,
    answers: &[u64],
    build: impl FnOnce(&mut CodeAssembler) -> Assembled,
) -> Result<(Guest, Machine), Skip> {
    let guest = Guest::running(|a| {
        a.mov(rbx, DEVICE)?;
        build(a)
    });
    let mut machine = Machine::answering(bench, &guest, answers)?;
    machine.run()?.done();
    Ok((guest, machine))
}

fn every_width(bench: &Bench) -> Outcome {
    let (_, mut machine) = device(bench, &[0x91, 0x9192, 0x9192_9394, 0x9192_9394_9596_9798], |a| {
        a.mov(rax, 0x1122_3344_5566_7788u64)?;
        a.mov(byte_ptr(rbx + 1), al)?;
        a.mov(word_ptr(rbx + 2), ax)?;
        a.mov(dword_ptr(rbx + 4), eax)?;
        a.mov(qword_ptr(rbx + 8), rax)?;
        a.mov(rcx, rax)?;
        a.mov(rsi, rax)?;
        a.mov(rdi, rax)?;
        a.mov(cl, byte_ptr(rbx + 0x11))?;
        a.mov(si, word_ptr(rbx + 0x12))?;
        a.mov(edi, dword_ptr(rbx + 0x14))?;
        a.mov(rbp, qword_ptr(rbx + 0x18))
    })?;
    let expected = [
        write(DEVICE + 1, 1, 0x88),
        write(DEVICE + 2, 2, 0x7788),
        write(DEVICE + 4, 4, 0x5566_7788),
        write(DEVICE + 8, 8, 0x1122_3344_5566_7788),
        read(DEVICE + 0x11, 1, 0x91),
        read(DEVICE + 0x12, 2, 0x9192),
        read(DEVICE + 0x14, 4, 0x9192_9394),
        read(DEVICE + 0x18, 8, 0x9192_9394_9596_9798),
    ];
    assert_eq!(machine.accesses(), expected);
    let gpr = machine.state().gpr;
    assert_eq!(
        [gpr[1], gpr[6], gpr[7], gpr[5]],
        [0x1122_3344_5566_7791, 0x1122_3344_5566_9192, 0x9192_9394, 0x9192_9394_9596_9798]
    );
    Ok(())
}

fn extensions_and_immediates(bench: &Bench) -> Outcome {
    let (_, mut machine) = device(bench, &[0x80, 0x8001, 0x8000_0002, 0xff], |a| {
        a.movzx(rcx, byte_ptr(rbx))?;
        a.movsx(rdx, word_ptr(rbx + 2))?;
        a.movsxd(rsi, dword_ptr(rbx + 4))?;
        a.movsx(edi, byte_ptr(rbx))?;
        a.mov(byte_ptr(rbx), 0x12)?;
        a.mov(word_ptr(rbx + 2), 0x1234)?;
        a.mov(dword_ptr(rbx + 4), 0x1234_5678)?;
        // Sign-extended to eight bytes.
        a.mov(qword_ptr(rbx + 8), -2)
    })?;
    let gpr = machine.state().gpr;
    assert_eq!([gpr[1], gpr[2], gpr[6], gpr[7]], [0x80, 0xffff_ffff_ffff_8001, 0xffff_ffff_8000_0002, 0xffff_ffff]);
    let written: Vec<_> = machine.accesses().into_iter().filter(|access| access.kind == Kind::Write).collect();
    let expected = [
        write(DEVICE, 1, 0x12),
        write(DEVICE + 2, 2, 0x1234),
        write(DEVICE + 4, 4, 0x1234_5678),
        write(DEVICE + 8, 8, -2i64 as u64),
    ];
    assert_eq!(written, expected);
    Ok(())
}

fn read_modify_write(bench: &Bench) -> Outcome {
    let (_, mut machine) = device(bench, &[1, 0xff0f, 5, 0x8000_0000_0000_0000, 0x10, 0x0f], |a| {
        a.mov(eax, 0x10)?;
        a.add(dword_ptr(rbx), eax)?;
        a.and(word_ptr(rbx + 4), 0x0ff0)?;
        a.dec(byte_ptr(rbx + 6))?;
        a.neg(qword_ptr(rbx + 8))?;
        a.shl(dword_ptr(rbx + 0x10), 4)?;
        a.not(byte_ptr(rbx + 0x14))?;
        a.pushfq()?;
        a.pop(rcx)
    })?;
    let expected = [
        read(DEVICE, 4, 1),
        write(DEVICE, 4, 0x11),
        read(DEVICE + 4, 2, 0xff0f),
        write(DEVICE + 4, 2, 0x0f00),
        read(DEVICE + 6, 1, 5),
        write(DEVICE + 6, 1, 4),
        read(DEVICE + 8, 8, 1 << 63),
        write(DEVICE + 8, 8, 1 << 63),
        read(DEVICE + 0x10, 4, 0x10),
        write(DEVICE + 0x10, 4, 0x100),
        read(DEVICE + 0x14, 1, 0x0f),
        write(DEVICE + 0x14, 1, 0xf0),
    ];
    assert_eq!(machine.accesses(), expected);
    // SHL 0x10 by 4: no carry, not zero; NOT changes no flags.
    assert_eq!(machine.state().gpr[1] & 0x41, 0);
    Ok(())
}

fn exchange_and_compare(bench: &Bench) -> Outcome {
    let (_, mut machine) = device(bench, &[0x55, 7, 9], |a| {
        a.mov(ecx, 0x66)?;
        a.xchg(dword_ptr(rbx), ecx)?;
        a.mov(eax, 7)?;
        a.mov(edx, 8)?;
        a.cmpxchg(dword_ptr(rbx + 4), edx)?;
        a.sete(sil)?;
        a.cmpxchg(dword_ptr(rbx + 8), edx)?;
        a.sete(dil)
    })?;
    let accesses = machine.accesses();
    assert_eq!(
        accesses[..4],
        [read(DEVICE, 4, 0x55), write(DEVICE, 4, 0x66), read(DEVICE + 4, 4, 7), write(DEVICE + 4, 4, 8),]
    );
    // A comparison that fails may write back what it read (volume 2, CMPXCHG).
    assert_eq!(accesses[4], read(DEVICE + 8, 4, 9));
    assert!(accesses.len() == 5 || accesses[5..] == [write(DEVICE + 8, 4, 9)], "{accesses:x?}");
    let gpr = machine.state().gpr;
    assert_eq!([gpr[0], gpr[1], gpr[6] & 0xff, gpr[7] & 0xff], [9, 0x55, 1, 0]);
    Ok(())
}

fn string_moves_from_and_to_registers(bench: &Bench) -> Outcome {
    let (guest, mut machine) = device(bench, &[1, 2, 3, 0xaabb], |a| {
        a.mov(rsi, DEVICE)?;
        a.mov(edi, DATA as u32)?;
        a.mov(ecx, 3)?;
        a.rep().movsd()?;
        a.movsw()?;
        a.mov(esi, DATA as u32)?;
        a.mov(rdi, DEVICE + 0x100)?;
        a.mov(ecx, 3)?;
        a.rep().movsb()?;
        a.movsq()
    })?;
    assert_eq!(guest.bytes(DATA, 14), [1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 0xbb, 0xaa]);
    let expected = [
        read(DEVICE, 4, 1),
        read(DEVICE + 4, 4, 2),
        read(DEVICE + 8, 4, 3),
        read(DEVICE + 12, 2, 0xaabb),
        write(DEVICE + 0x100, 1, 1),
        write(DEVICE + 0x101, 1, 0),
        write(DEVICE + 0x102, 1, 0),
        write(DEVICE + 0x103, 8, 0x0000_0300_0000_0200),
    ];
    assert_eq!(bytewise(&machine.accesses()), bytewise(&expected));
    let gpr = machine.state().gpr;
    assert_eq!((gpr[1], gpr[6], gpr[7]), (0, DATA + 11, DEVICE + 0x10b));
    Ok(())
}

/// Accesses as single bytes, for where it is the engine's choice how a large or unaligned one is cut.
fn bytewise(accesses: &[Access]) -> Vec<Access> {
    let bytes = |access: &Access| {
        let access = *access;
        (0..access.size).map(move |n| Access {
            at: access.at + n as u64,
            size: 1,
            value: access.value >> (8 * n) & 0xff,
            ..access
        })
    };
    accesses.iter().flat_map(bytes).collect()
}

fn string_stores_and_loads(bench: &Bench) -> Outcome {
    let (_, mut machine) = device(bench, &[0x77, 0x78, 0x79], |a| {
        a.mov(rdi, DEVICE)?;
        a.mov(eax, 0x1122_3344)?;
        a.mov(ecx, 2)?;
        a.rep().stosd()?;
        a.mov(rsi, DEVICE + 0x10)?;
        a.lodsb()?;
        // Scans two, the second is the one.
        a.mov(rdi, DEVICE + 0x20)?;
        a.mov(ecx, 5)?;
        a.mov(al, 0x79)?;
        a.repne().scasb()
    })?;
    let expected = [
        write(DEVICE, 4, 0x1122_3344),
        write(DEVICE + 4, 4, 0x1122_3344),
        read(DEVICE + 0x10, 1, 0x77),
        read(DEVICE + 0x20, 1, 0x78),
        read(DEVICE + 0x21, 1, 0x79),
    ];
    assert_eq!(machine.accesses(), expected);
    let gpr = machine.state().gpr;
    assert_eq!((gpr[1], gpr[7]), (3, DEVICE + 0x22));
    Ok(())
}

fn compares_and_tests_only_read(bench: &Bench) -> Outcome {
    let (_, mut machine) = device(bench, &[5, 0xf0, 0x8000_0000], |a| {
        a.cmp(dword_ptr(rbx), 5)?;
        a.sete(cl)?;
        a.test(byte_ptr(rbx + 4), 0x0f)?;
        a.sete(ch)?;
        a.bt(dword_ptr(rbx + 8), 31)?;
        a.setb(dl)
    })?;
    assert!(machine.accesses().iter().all(|access| access.kind == Kind::Read));
    let gpr = machine.state().gpr;
    assert_eq!((gpr[1] & 0xffff, gpr[2] & 0xff), (0x101, 1));
    Ok(())
}

fn push_and_pop_through_registers(bench: &Bench) -> Outcome {
    let (_, mut machine) = device(bench, &[0x1234_5678_9abc_def0], |a| {
        a.push(qword_ptr(rbx))?;
        a.pop(qword_ptr(rbx + 8))
    })?;
    let value = 0x1234_5678_9abc_def0;
    assert_eq!(machine.accesses(), [read(DEVICE, 8, value), write(DEVICE + 8, 8, value)]);
    assert_eq!(machine.state().gpr[4], STACK);
    Ok(())
}

fn sse_moves(bench: &Bench) -> Outcome {
    bench.needs(&crate::abilities::SSE_MMIO)?;
    let (_, mut machine) = device(bench, &[0x1111, 0x2222], |a| {
        a.movups(xmm3, xmmword_ptr(rbx))?;
        a.movups(xmmword_ptr(rbx + 0x10), xmm3)
    })?;
    let expected = [
        read(DEVICE, 8, 0x1111),
        read(DEVICE + 8, 8, 0x2222),
        write(DEVICE + 16, 8, 0x1111),
        write(DEVICE + 24, 8, 0x2222),
    ];
    assert_eq!(bytewise(&machine.accesses()), bytewise(&expected));
    assert_eq!(machine.state().fpu.xmm[3], [0x1111, 0x2222]);
    Ok(())
}

/// However an engine cuts them, every byte is accessed once, at its place.
fn unaligned_accesses_reach_every_byte(bench: &Bench) -> Outcome {
    for off in [1, 3, 5, 7, 0xffd] {
        let (_, machine) = device(bench, &[], |a| {
            a.mov(rax, 0x1122_3344_5566_7788u64)?;
            a.mov(qword_ptr(rbx + off), rax)?;
            a.mov(dword_ptr(rbx + off + 0x20), eax)
        })?;
        let off = off as u64;
        let expected = [write(DEVICE + off, 8, 0x1122_3344_5566_7788), write(DEVICE + off + 0x20, 4, 0x5566_7788)];
        assert_eq!(bytewise(&machine.accesses()), bytewise(&expected), "offset {off:#x}");
    }
    Ok(())
}

/// The first part is memory and the second is not.
fn operands_that_straddle_the_end_of_memory(bench: &Bench) -> Outcome {
    bench.needs(&crate::abilities::STRADDLING)?;
    for inside in 1..8 {
        let at = HOLE - inside;
        let outside = 8 - inside;
        // Read answers by the byte, so that any cut of the part outside gives the same.
        let guest = Guest::running(|a| {
            a.mov(rbx, at)?;
            a.mov(rax, 0x8877_6655_4433_2211u64)?;
            a.mov(qword_ptr(rbx), rax)?;
            a.mov(rcx, qword_ptr(rbx))
        });
        let mut machine = Machine::new(bench, &guest)?;
        machine.run()?.done();
        let bytes = 0x8877_6655_4433_2211u64.to_le_bytes();
        assert_eq!(guest.bytes(at, inside as usize), bytes[..inside as usize], "{inside} bytes inside");
        let outer: Vec<_> =
            bytewise(&machine.accesses()).iter().map(|access| (access.kind, access.at, access.value)).collect();
        let written = (0..outside).map(|n| (Kind::Write, HOLE + n, bytes[(inside + n) as usize].into()));
        let expected: Vec<_> = written.chain((0..outside).map(|n| (Kind::Read, HOLE + n, 0xff))).collect();
        assert_eq!(outer, expected, "{inside} bytes inside");
        let ones = u64::MAX << (8 * inside);
        assert_eq!(machine.state().gpr[1], 0x8877_6655_4433_2211 & !ones | ones);
    }
    Ok(())
}

fn memory_after_the_end_reads_as_ones(bench: &Bench) -> Outcome {
    let guest = Guest::running(|a| {
        a.mov(rbx, HOLE + 0x1000)?;
        a.mov(qword_ptr(rbx), 5)?;
        a.mov(rax, qword_ptr(rbx))
    });
    let mut machine = Machine::new(bench, &guest)?;
    machine.run()?.done();
    assert_eq!(machine.state().gpr[0], u64::MAX);
    assert_eq!(machine.accesses(), [write(HOLE + 0x1000, 8, 5), read(HOLE + 0x1000, 8, u64::MAX)]);
    Ok(())
}

/// A process may be given registers.
fn user_mode_registers(bench: &Bench) -> Outcome {
    let mut guest = Guest::new();
    guest.user(|a| {
        a.mov(rbx, WINDOW)?;
        a.mov(eax, dword_ptr(rbx + 0x10))?;
        a.add(dword_ptr(rbx + 0x14), eax)?;
        a.mov(byte_ptr(rbx + 0x18), al)
    });
    guest.map(WINDOW, DEVICE | PCD | US | RW | P);
    let mut machine = Machine::answering(bench, &guest, &[3, 4])?;
    machine.run()?.done();
    let expected =
        [read(DEVICE + 0x10, 4, 3), read(DEVICE + 0x14, 4, 4), write(DEVICE + 0x14, 4, 7), write(DEVICE + 0x18, 1, 3)];
    assert_eq!(machine.accesses(), expected);
    Ok(())
}
