//! String instructions with REP (volume 2, REP; volume 1, 7.3.9.2).

use super::*;

cases!(strings:
    every_width_up_and_down,
    overlapping_moves_go_element_by_element,
    a_count_of_zero_does_nothing,
    a_count_uses_the_address_size,
    moves_cross_pages,
    compares_and_scans_stop,
    a_fault_in_the_source_restarts,
    a_fault_in_the_destination_restarts,
    a_fault_going_down_restarts,
    segment_bases_apply_to_the_source_only,
    an_interrupt_between_two_steps,
);

type Build = fn(&mut CodeAssembler) -> Assembled;

fn every_width_up_and_down(bench: &Bench) -> Outcome {
    const MOVES: [(u64, Build); 4] =
        [(1, |a| a.rep().movsb()), (2, |a| a.rep().movsw()), (4, |a| a.rep().movsd()), (8, |a| a.rep().movsq())];
    const STORES: [(u64, Build); 4] =
        [(1, |a| a.rep().stosb()), (2, |a| a.rep().stosw()), (4, |a| a.rep().stosd()), (8, |a| a.rep().stosq())];
    const COUNT: u64 = 37;
    let text: Vec<u8> = (0..512).map(|n| (n * 7 + n / 256) as u8).collect();
    for (moves, table) in [(true, MOVES), (false, STORES)] {
        for (width, build) in table {
            for down in [false, true] {
                let mut guest = Guest::running(build);
                guest.put_bytes(DATA, &text);
                let last = if down { (COUNT - 1) * width } else { 0 };
                let gpr = &mut guest.state.gpr;
                (gpr[0], gpr[1], gpr[6], gpr[7]) = (0xa1a2_a3a4_a5a6_a7a8, COUNT, DATA + last, DATA + 0x1001 + last);
                guest.state.rflags |= if down { 1 << 10 } else { 0 };
                let state = run_to_end(bench, &guest)?;
                let len = (COUNT * width) as usize;
                let stored: Vec<u8> =
                    (0..len).map(|n| 0xa1a2_a3a4_a5a6_a7a8u64.to_le_bytes()[n % width as usize]).collect();
                let expected = if moves { &text[..len] } else { &stored };
                let what = format!("moves {moves}, width {width}, down {down}");
                assert_eq!(guest.bytes(DATA + 0x1001, len), expected, "{what}");
                assert_eq!(
                    (guest.bytes(DATA + 0x1000, 1), guest.bytes(DATA + 0x1001 + len as u64, 1)),
                    (vec![0], vec![0])
                );
                let moved = |from: u64| if down { from + last - COUNT * width } else { from + COUNT * width };
                assert_eq!((state.gpr[1], state.gpr[7]), (0, moved(DATA + 0x1001)), "{what}");
                assert_eq!(state.gpr[6], if moves { moved(DATA) } else { DATA + last }, "{what}");
            }
        }
    }
    Ok(())
}

/// A byte further each: the first byte fills everything.
fn overlapping_moves_go_element_by_element(bench: &Bench) -> Outcome {
    let mut guest = Guest::running(|a| a.rep().movsb());
    guest.put_bytes(DATA, b"xyz");
    let gpr = &mut guest.state.gpr;
    (gpr[1], gpr[6], gpr[7]) = (100, DATA, DATA + 1);
    run_to_end(bench, &guest)?;
    assert_eq!(guest.bytes(DATA, 102), [vec![b'x'; 101], vec![0]].concat());
    // By eights three apart.
    let mut guest = Guest::running(|a| a.rep().movsq());
    guest.put_bytes(DATA, b"abcdefgh");
    let gpr = &mut guest.state.gpr;
    (gpr[1], gpr[6], gpr[7]) = (4, DATA, DATA + 3);
    let mut expected = [b"abcdefgh".to_vec(), vec![0; 40]].concat();
    for step in 0..4 {
        let element = expected[step * 8..step * 8 + 8].to_vec();
        expected[step * 8 + 3..step * 8 + 11].copy_from_slice(&element);
    }
    run_to_end(bench, &guest)?;
    assert_eq!(guest.bytes(DATA, 48), expected);
    Ok(())
}

fn a_count_of_zero_does_nothing(bench: &Bench) -> Outcome {
    let builds: [Build; 5] =
        [|a| a.rep().movsb(), |a| a.rep().stosq(), |a| a.rep().lodsb(), |a| a.repe().cmpsb(), |a| a.repne().scasb()];
    for build in builds {
        let mut guest = Guest::running(build);
        let gpr = &mut guest.state.gpr;
        // Nothing is mapped there.
        (gpr[0], gpr[1], gpr[6], gpr[7]) = (0x1234, 0, WINDOW, WINDOW);
        guest.state.rflags |= 0x8d5;
        let state = run_to_end(bench, &guest)?;
        assert_eq!((state.gpr[0], state.gpr[1], state.gpr[6], state.gpr[7]), (0x1234, 0, WINDOW, WINDOW));
        assert_eq!(state.rflags, RFLAGS | 0x8d5, "no flag changes");
    }
    Ok(())
}

/// Volume 1, 3.7.5.1: with a 32-bit address size ECX, ESI and EDI count, and the upper halves become zero.
fn a_count_uses_the_address_size(bench: &Bench) -> Outcome {
    // addr32 rep movsb
    let mut guest = Guest::running(|a| a.db(&[0x67, 0xf3, 0xa4]));
    guest.put_bytes(DATA, b"12345");
    let gpr = &mut guest.state.gpr;
    let high = 0x5_0000_0000;
    (gpr[1], gpr[6], gpr[7]) = (high | 3, high | DATA, high | (DATA + 0x100));
    let state = run_to_end(bench, &guest)?;
    assert_eq!(guest.bytes(DATA + 0x100, 4), b"123\0");
    assert_eq!((state.gpr[1], state.gpr[6], state.gpr[7]), (0, DATA + 3, DATA + 0x103));
    Ok(())
}

fn moves_cross_pages(bench: &Bench) -> Outcome {
    const LEN: u64 = 0x2800;
    let mut guest = Guest::running(|a| a.rep().movsb());
    // The pages of the window lie in memory in another order.
    for n in 0..8 {
        guest.map(WINDOW + n * 0x1000, (FRAMES + (n * 3 % 8) * 0x1000) | RW | P);
    }
    for n in 0..4 {
        let page: Vec<u8> = (0..0x1000).map(|byte| (byte / 3 + n) as u8).collect();
        guest.put_bytes(FRAMES + n * 3 % 8 * 0x1000, &page);
    }
    let gpr = &mut guest.state.gpr;
    (gpr[1], gpr[6], gpr[7]) = (LEN, WINDOW + 0x123, WINDOW + 0x4c01);
    let state = run_to_end(bench, &guest)?;
    let byte = |va: u64| guest.bytes(FRAMES + ((va - WINDOW) / 0x1000 * 3 % 8) * 0x1000 + va % 0x1000, 1)[0];
    for n in 0..LEN {
        assert_eq!(byte(WINDOW + 0x4c01 + n), byte(WINDOW + 0x123 + n), "byte {n:#x}");
    }
    assert_eq!((state.gpr[1], state.gpr[6], state.gpr[7]), (0, WINDOW + 0x123 + LEN, WINDOW + 0x4c01 + LEN));
    Ok(())
}

fn compares_and_scans_stop(bench: &Bench) -> Outcome {
    for (build, count, moved) in [
        // The fifth byte differs.
        ((|a| a.repe().cmpsb()) as Build, 10, 5),
        // The first byte differs already.
        (|a| a.repne().cmpsb(), 10, 1),
        // The first zero is the ninth byte.
        (|a| a.repne().scasb(), 20, 9),
        (|a| a.repe().scasb(), 20, 1),
    ] {
        let mut guest = Guest::running(build);
        guest.put_bytes(DATA, b"same-one");
        guest.put_bytes(DATA + 0x100, b"same+one");
        let gpr = &mut guest.state.gpr;
        (gpr[0], gpr[1], gpr[6], gpr[7]) = (0, count, DATA, DATA + 0x100);
        let state = run_to_end(bench, &guest)?;
        assert_eq!((state.gpr[1], state.gpr[7]), (count - moved, DATA + 0x100 + moved));
    }
    Ok(())
}

/// A string of six words with a page that is not there `present` bytes in.
fn faulting(bench: &Bench, down: bool, source_missing: bool) -> Outcome {
    const COUNT: u64 = 6;
    let mut guest = Guest::running(|a| a.rep().movsd());
    guest.map(WINDOW, FRAMES | RW | P);
    guest.map(WINDOW + 0x1000, (FRAMES + 0x1000) | RW | P);
    let (missing, entry) = if down { (WINDOW, FRAMES) } else { (WINDOW + 0x1000, FRAMES + 0x1000) };
    guest.map(missing, 0);
    // Two elements are on this side of the border, four beyond.
    let first = if down { WINDOW + 0x1004 } else { WINDOW + 0xff8 };
    let other = DATA + 0x100;
    let text: Vec<u8> = (1..=64).collect();
    if source_missing {
        guest.put_bytes(FRAMES + 0xfe0, &text);
    } else {
        guest.put_bytes(other - 0x20, &text);
    }
    let gpr = &mut guest.state.gpr;
    (gpr[1], gpr[6], gpr[7]) = if source_missing { (COUNT, first, other) } else { (COUNT, other, first) };
    guest.state.rflags |= if down { 1 << 10 } else { 0 };
    let mut machine = Machine::new(bench, &guest)?;
    let trap = machine.run()?.trap();
    let step = |from: u64, n: u64| if down { from - n * 4 } else { from + n * 4 };
    let faulted = step(first, 2);
    assert_eq!((trap.vector, trap.rip, trap.cr2), (14, CODE, faulted));
    assert_eq!(trap.error, if source_missing { 0 } else { 2 });
    let window = if source_missing { trap.gpr[6] } else { trap.gpr[7] };
    let memory = if source_missing { trap.gpr[7] } else { trap.gpr[6] };
    assert_eq!((trap.gpr[1], window, memory), (COUNT - 2, faulted, step(other, 2)));
    // The stub returns to the instruction, which finds the page now.
    guest.map(missing, entry | RW | P);
    machine.run()?.done();
    let state = machine.state();
    assert_eq!(state.gpr[1], 0);
    let lowest = |from: u64| if down { from - (COUNT - 1) * 4 } else { from };
    let in_window = guest.bytes(FRAMES + lowest(first) - WINDOW, COUNT as usize * 4);
    let in_memory = guest.bytes(lowest(other), COUNT as usize * 4);
    assert_eq!(in_window, in_memory);
    assert!(in_window.iter().all(|byte| *byte != 0));
    Ok(())
}

fn a_fault_in_the_source_restarts(bench: &Bench) -> Outcome {
    faulting(bench, false, true)
}

fn a_fault_in_the_destination_restarts(bench: &Bench) -> Outcome {
    faulting(bench, false, false)
}

fn a_fault_going_down_restarts(bench: &Bench) -> Outcome {
    faulting(bench, true, true)?;
    faulting(bench, true, false)
}

/// Volume 1, 7.3.9: a prefix overrides DS and never ES.
fn segment_bases_apply_to_the_source_only(bench: &Bench) -> Outcome {
    // fs rep movsb
    let mut guest = Guest::running(|a| a.db(&[0x64, 0xf3, 0xa4]));
    guest.state.segments[4].base = 0x1000;
    guest.put_bytes(DATA + 0x1000, b"fs");
    let gpr = &mut guest.state.gpr;
    (gpr[1], gpr[6], gpr[7]) = (2, DATA, DATA + 0x100);
    run_to_end(bench, &guest)?;
    assert_eq!(guest.bytes(DATA + 0x100, 2), b"fs");
    Ok(())
}

/// Volume 2, REP: interrupts are taken between elements, and the string goes on after them.
fn an_interrupt_between_two_steps(bench: &Bench) -> Outcome {
    use super::apic;
    const LEN: u32 = 0x10_0000;
    let mut guest = Guest::running(|a| {
        apic::enable(a)?;
        apic::lapic_write(a, apic::DIVIDE, apic::DIVIDE_BY_1)?;
        apic::lapic_write(a, apic::LVT_TIMER, apic::PERIODIC | 0x46)?;
        apic::lapic_write(a, apic::INITIAL_COUNT, 20_000)?;
        a.sti()?;
        a.mov(edi, (LARGE + 0x40_0000) as u32)?;
        a.mov(ecx, LEN)?;
        a.mov(al, 0x5a)?;
        a.rep().stosb()?;
        a.cli()
    });
    apic::counting_handler(&mut guest, 0x46, 0);
    let state = run_to_end(bench, &guest)?;
    assert_eq!((state.gpr[1], state.gpr[7]), (0, LARGE + 0x40_0000 + u64::from(LEN)));
    assert!(guest.bytes(LARGE + 0x40_0000, LEN as usize).iter().all(|byte| *byte == 0x5a));
    Ok(())
}
