//! Port input and output (volume 1, chapter 19; volume 2, IN, OUT, INS and OUTS).

use super::*;
use crate::bus::Access;
use crate::bus::Kind;

cases!(ports:
    every_width_and_form,
    in_keeps_the_rest_of_the_register,
    outs_of_every_width,
    ins_of_every_width,
    repeated_strings_go_down_with_df,
    a_count_of_zero_does_nothing,
    repeated_strings_cross_pages,
    a_page_fault_in_a_string_restarts_it,
    privilege_by_iopl_and_bitmap,
    the_bitmap_covers_every_byte_of_an_access,
);

fn out(at: u64, size: usize, value: u64) -> Access {
    Access { kind: Kind::Out, at, size, value }
}

fn input(at: u64, size: usize, value: u64) -> Access {
    Access { kind: Kind::In, at, size, value }
}

fn every_width_and_form(bench: &Bench) -> Outcome {
    let guest = Guest::running(|a| {
        a.mov(rax, 0x1122_3344_aabb_ccddu64)?;
        a.out(0x80, al)?;
        a.out(0x80, ax)?;
        a.out(0x80, eax)?;
        a.mov(edx, 0xabcd)?;
        a.out(dx, al)?;
        a.out(dx, ax)?;
        a.out(dx, eax)?;
        a.in_(al, 0x81)?;
        a.in_(ax, 0x81)?;
        a.in_(eax, 0x81)?;
        a.in_(al, dx)?;
        a.in_(ax, dx)?;
        a.in_(eax, dx)
    });
    let mut machine = Machine::answering(bench, &guest, &[1, 2, 3, 4, 5])?;
    machine.run()?.done();
    let expected = [
        out(0x80, 1, 0xdd),
        out(0x80, 2, 0xccdd),
        out(0x80, 4, 0xaabb_ccdd),
        out(0xabcd, 1, 0xdd),
        out(0xabcd, 2, 0xccdd),
        out(0xabcd, 4, 0xaabb_ccdd),
        input(0x81, 1, 1),
        input(0x81, 2, 2),
        input(0x81, 4, 3),
        input(0xabcd, 1, 4),
        input(0xabcd, 2, 5),
        // Nobody answers any more.
        input(0xabcd, 4, 0xffff_ffff),
    ];
    assert_eq!(machine.accesses(), expected);
    Ok(())
}

/// Volume 1, 3.4.1.1: an 8- or 16-bit result leaves the rest, a 32-bit result clears it.
fn in_keeps_the_rest_of_the_register(bench: &Bench) -> Outcome {
    let guest = Guest::running(|a| {
        for (n, width) in [(0, 1), (1, 2), (2, 4)] {
            a.mov(rax, 0x1122_3344_5566_7788u64)?;
            match width {
                1 => a.in_(al, 0x81)?,
                2 => a.in_(ax, 0x81)?,
                _ => a.in_(eax, 0x81)?,
            }
            keep(a, n, rax)?;
        }
        Ok(())
    });
    let mut machine = Machine::answering(bench, &guest, &[0xab, 0xabcd, 0xabcd_ef01])?;
    machine.run()?.done();
    assert_eq!(guest.results(), [0x1122_3344_5566_77ab, 0x1122_3344_5566_abcd, 0xabcd_ef01]);
    Ok(())
}

fn outs_of_every_width(bench: &Bench) -> Outcome {
    for width in [1, 2, 4] {
        let guest = Guest::running(|a| {
            a.mov(edx, 0x600)?;
            a.mov(esi, DATA as u32)?;
            a.mov(ecx, 4)?;
            match width {
                1 => a.rep().outsb(),
                2 => a.rep().outsw(),
                _ => a.rep().outsd(),
            }
        });
        guest.put(DATA, 0x0807_0605_0403_0201);
        guest.put(DATA + 8, 0x100f_0e0d_0c0b_0a09);
        let mut machine = Machine::new(bench, &guest)?;
        machine.run()?.done();
        let bytes = guest.bytes(DATA, 4 * width);
        let values = bytes.chunks(width).map(|c| c.iter().rev().fold(0, |v, b| v << 8 | u64::from(*b)));
        let expected: Vec<_> = values.map(|value| out(0x600, width, value)).collect();
        assert_eq!(machine.accesses(), expected);
        let state = machine.state();
        assert_eq!((state.gpr[1], state.gpr[6]), (0, DATA + 4 * width as u64));
    }
    Ok(())
}

fn ins_of_every_width(bench: &Bench) -> Outcome {
    for width in [1usize, 2, 4] {
        let guest = Guest::running(|a| {
            a.mov(edx, 0x600)?;
            a.mov(edi, DATA as u32)?;
            a.mov(ecx, 4)?;
            match width {
                1 => a.rep().insb(),
                2 => a.rep().insw(),
                _ => a.rep().insd(),
            }
        });
        let answers = [0x8182_8384, 0x9192_9394, 0xa1a2_a3a4, 0xb1b2_b3b4];
        let mut machine = Machine::answering(bench, &guest, &answers)?;
        machine.run()?.done();
        let expected: Vec<u8> =
            answers.iter().flat_map(|answer: &u64| answer.to_le_bytes()[..width].to_vec()).collect();
        assert_eq!(guest.bytes(DATA, 4 * width), expected);
        assert_eq!(guest.bytes(DATA + 4 * width as u64, 4), [0; 4]);
        let state = machine.state();
        assert_eq!((state.gpr[1], state.gpr[7]), (0, DATA + 4 * width as u64));
    }
    Ok(())
}

fn repeated_strings_go_down_with_df(bench: &Bench) -> Outcome {
    let guest = Guest::running(|a| {
        a.std()?;
        a.mov(edx, 0x600)?;
        a.mov(esi, DATA as u32 + 3)?;
        a.mov(ecx, 4)?;
        a.rep().outsb()?;
        a.mov(edi, DATA as u32 + 0x46)?;
        a.mov(ecx, 4)?;
        a.rep().insw()?;
        a.cld()
    });
    guest.put(DATA, 0x0403_0201);
    let mut machine = Machine::answering(bench, &guest, &[0x11, 0x22, 0x33, 0x44])?;
    machine.run()?.done();
    let outs: Vec<_> = machine.accesses().iter().filter(|access| access.kind == Kind::Out).map(|o| o.value).collect();
    assert_eq!(outs, [4, 3, 2, 1]);
    assert_eq!(guest.get(DATA + 0x40), 0x0011_0022_0033_0044);
    let state = machine.state();
    assert_eq!((state.gpr[6], state.gpr[7]), (DATA - 1, DATA + 0x3e));
    Ok(())
}

fn a_count_of_zero_does_nothing(bench: &Bench) -> Outcome {
    let guest = Guest::running(|a| {
        a.mov(edx, 0x600)?;
        // Not even an address is looked at.
        a.mov(rsi, WINDOW)?;
        a.mov(rdi, WINDOW)?;
        a.xor(ecx, ecx)?;
        a.rep().outsb()?;
        a.rep().insd()
    });
    let mut machine = Machine::new(bench, &guest)?;
    machine.run()?.done();
    assert_eq!(machine.accesses(), []);
    let state = machine.state();
    assert_eq!((state.gpr[6], state.gpr[7]), (WINDOW, WINDOW));
    Ok(())
}

fn repeated_strings_cross_pages(bench: &Bench) -> Outcome {
    const COUNT: u64 = 3000;
    let guest = Guest::running(|a| {
        a.mov(edx, 0x600)?;
        a.mov(edi, (WINDOW + 0x801) as u32)?;
        a.mov(ecx, COUNT as u32)?;
        a.rep().insd()?;
        a.mov(esi, (WINDOW + 0x801) as u32)?;
        a.mov(ecx, COUNT as u32)?;
        a.rep().outsd()
    });
    // Frames in another order than pages.
    for n in 0..4 {
        guest.map(WINDOW + n * 0x1000, (FRAMES + (3 - n) * 0x1000) | RW | P);
    }
    let answers: Vec<u64> = (0..COUNT).map(|n| (n * 0x0101_0101) & 0xffff_ffff).collect();
    let mut machine = Machine::answering(bench, &guest, &answers)?;
    machine.run()?.done();
    let accesses = machine.accesses();
    assert_eq!(accesses.len() as u64, 2 * COUNT);
    let written: Vec<u64> = accesses[COUNT as usize..].iter().map(|access| access.value).collect();
    assert_eq!(written, answers);
    Ok(())
}

/// Volume 2, REP: after a fault RCX, RSI and RDI say what is left.
fn a_page_fault_in_a_string_restarts_it(bench: &Bench) -> Outcome {
    let guest = Guest::running(|a| {
        a.mov(edx, 0x600)?;
        a.mov(esi, (WINDOW + 0xffd) as u32)?;
        a.mov(ecx, 6)?;
        a.rep().outsb()
    });
    guest.map(WINDOW, FRAMES | RW | P);
    guest.put_bytes(FRAMES + 0xffd, &[1, 2, 3]);
    guest.put_bytes(FRAMES + 0x1000, &[4, 5, 6]);
    let mut machine = Machine::new(bench, &guest)?;
    let trap = machine.run()?.trap();
    assert_eq!((trap.vector, trap.error, trap.cr2, trap.rip), (14, 0, WINDOW + 0x1000, CODE + 15));
    assert_eq!((trap.gpr[1], trap.gpr[6]), (3, WINDOW + 0x1000));
    // The stub returns to the instruction, which finds the page now.
    guest.map(WINDOW + 0x1000, (FRAMES + 0x1000) | RW | P);
    machine.run()?.done();
    let values: Vec<_> = machine.accesses().iter().map(|access| access.value).collect();
    assert_eq!(values, [1, 2, 3, 4, 5, 6]);
    Ok(())
}

/// Volume 1, 19.5.1 and 19.5.2.
fn privilege_by_iopl_and_bitmap(bench: &Bench) -> Outcome {
    let mut guest = Guest::new();
    guest.user(|a| {
        a.mov(edx, 0x600)?;
        a.out(dx, al)
    });
    let mut machine = Machine::new(bench, &guest)?;
    let trap = machine.run()?.trap();
    assert_eq!((trap.vector, trap.error, trap.rip), (13, 0, USER_CODE + 5));
    assert_eq!(machine.accesses(), []);
    bench.needs(&crate::abilities::IOPL)?;
    guest.state.rflags |= IOPL3;
    let mut machine = Machine::new(bench, &guest)?;
    machine.run()?.done();
    assert_eq!(machine.accesses().len(), 1);
    Ok(())
}

/// Volume 1, 19.5.2: all bits of an access's ports must be clear.
fn the_bitmap_covers_every_byte_of_an_access(bench: &Bench) -> Outcome {
    /// A TSS with a bitmap for the ports up to 0x7ff, in a page of its own.
    const WIDE_TSS: u64 = DATA + 0x1000;
    for (port, width, allowed) in [
        (0x600u64, 1, true),
        (0x600, 2, true),
        (0x600, 4, false),
        (0x602, 1, true),
        (0x603, 1, false),
        (0x9000, 1, false),
    ] {
        let mut guest = Guest::new();
        guest.user(|a| {
            a.mov(edx, port as u32)?;
            match width {
                1 => a.out(dx, al)?,
                2 => a.out(dx, ax)?,
                _ => a.out(dx, eax)?,
            }
            Ok(())
        });
        guest.put_bytes(WIDE_TSS, &guest.bytes(TSS, 0x68));
        guest.put(WIDE_TSS + 0x64, 0x68 << 16);
        guest.put_bytes(WIDE_TSS + 0x68, &[0xff; 0x101]);
        guest.put_bytes(WIDE_TSS + 0x68 + 0x600 / 8, &[0b1111_1000]);
        (guest.state.tr.base, guest.state.tr.limit) = (WIDE_TSS, 0x68 + 0x100);
        match run_once(bench, &guest)? {
            End::Done => assert!(allowed, "{port:#x}, {width} bytes"),
            end => assert_eq!((end.trap().vector, allowed), (13, false), "{port:#x}, {width} bytes"),
        }
    }
    Ok(())
}
