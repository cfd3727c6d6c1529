//! Instructions as memory: code that changes (12.3, and 9.1.3 of older editions), and code that crosses pages.

use super::*;

cases!(code:
    the_next_instruction_is_rewritten,
    a_loop_rewrites_itself,
    another_page_is_rewritten,
    code_changes_through_an_alias,
    a_string_writes_code,
    a_device_writes_code,
    a_page_of_code_is_exchanged,
    level_3_rewrites_its_own_code,
    instructions_cross_pages,
    the_second_page_is_missing,
    the_second_page_may_not_be_executed,
    execution_runs_into_a_missing_page,
    the_longest_instruction_and_one_byte_more,
);

/// `mov eax, imm32` at RBX, and a return after it.
fn plant(guest: &Guest, at: u64, value: u32) {
    guest.put_bytes(at, &[0xb8]);
    guest.put_bytes(at + 1, &value.to_le_bytes());
    guest.put_bytes(at + 5, &[0xc3]);
}

/// With the same linear address no serialising instruction is needed on any processor of this family.
fn the_next_instruction_is_rewritten(bench: &Bench) -> Outcome {
    let guest = Guest::running(|a| {
        let mut target = a.create_label();
        a.lea(rbx, ptr(target))?;
        a.mov(dword_ptr(rbx + 1), 0x55)?;
        a.set_label(&mut target)?;
        a.mov(eax, 0x11)?;
        keep(a, 0, rax)
    });
    run_to_end(bench, &guest)?;
    assert_eq!(guest.result(0), 0x55);
    Ok(())
}

fn a_loop_rewrites_itself(bench: &Bench) -> Outcome {
    let guest = Guest::running(|a| {
        let mut again = a.create_label();
        a.xor(edx, edx)?;
        a.mov(ecx, 300)?;
        a.lea(rbx, ptr(again))?;
        a.set_label(&mut again)?;
        a.mov(eax, 0)?;
        a.add(rdx, rax)?;
        a.inc(dword_ptr(rbx + 1))?;
        a.dec(ecx)?;
        a.jne(again)?;
        keep(a, 0, rdx)
    });
    run_to_end(bench, &guest)?;
    assert_eq!(guest.result(0), 299 * 300 / 2);
    Ok(())
}

fn another_page_is_rewritten(bench: &Bench) -> Outcome {
    let guest = Guest::running(|a| {
        let mut again = a.create_label();
        a.mov(ebx, SECOND_CODE as u32)?;
        a.mov(ecx, 100)?;
        a.xor(edx, edx)?;
        a.set_label(&mut again)?;
        a.call(rbx)?;
        a.add(rdx, rax)?;
        a.mov(dword_ptr(rbx + 1), ecx)?;
        a.dec(ecx)?;
        a.jne(again)?;
        keep(a, 0, rdx)
    });
    plant(&guest, SECOND_CODE, 1000);
    run_to_end(bench, &guest)?;
    assert_eq!(guest.result(0), 1000 + (2..=100).sum::<u64>());
    Ok(())
}

/// Through another linear address, which wants a serialising instruction: CPUID, or IRETQ.
fn code_changes_through_an_alias(bench: &Bench) -> Outcome {
    let guest = Guest::running(|a| {
        let mut again = a.create_label();
        a.mov(r8d, SECOND_CODE as u32)?;
        a.mov(r9d, WINDOW as u32)?;
        a.mov(r10d, 50)?;
        a.xor(r11d, r11d)?;
        a.set_label(&mut again)?;
        a.call(r8)?;
        a.add(r11, rax)?;
        a.mov(dword_ptr(r9 + 1), r10d)?;
        a.xor(eax, eax)?;
        a.cpuid()?;
        a.dec(r10d)?;
        a.jne(again)?;
        keep(a, 0, r11)
    });
    plant(&guest, SECOND_CODE, 1000);
    guest.map(WINDOW, SECOND_CODE | RW | P);
    run_to_end(bench, &guest)?;
    assert_eq!(guest.result(0), 1000 + (2..=50).sum::<u64>());
    Ok(())
}

fn a_string_writes_code(bench: &Bench) -> Outcome {
    let guest = Guest::running(|a| {
        for n in 0..3 {
            a.mov(esi, DATA as u32 + n * 0x10)?;
            a.mov(edi, SECOND_CODE as u32)?;
            a.mov(ecx, 6)?;
            a.rep().movsb()?;
            a.mov(ebx, SECOND_CODE as u32)?;
            a.call(rbx)?;
            keep(a, n.into(), rax)?;
        }
        Ok(())
    });
    (0..3).for_each(|n| plant(&guest, DATA + n * 0x10, 7 + n as u32));
    run_to_end(bench, &guest)?;
    assert_eq!(guest.results(), [7, 8, 9]);
    Ok(())
}

fn a_device_writes_code(bench: &Bench) -> Outcome {
    let guest = Guest::running(|a| {
        for n in 0..3 {
            a.mov(edx, 0x600)?;
            a.mov(edi, SECOND_CODE as u32 + 1)?;
            a.insd()?;
            a.mov(ebx, SECOND_CODE as u32)?;
            a.call(rbx)?;
            keep(a, n, rax)?;
        }
        Ok(())
    });
    plant(&guest, SECOND_CODE, 0);
    let mut machine = Machine::answering(bench, &guest, &[11, 12, 13])?;
    machine.run()?.done();
    assert_eq!(guest.results(), [11, 12, 13]);
    Ok(())
}

/// One linear address, other physical pages.
fn a_page_of_code_is_exchanged(bench: &Bench) -> Outcome {
    let guest = Guest::running(|a| {
        a.mov(ebx, WINDOW as u32)?;
        for n in 0..20 {
            a.call(rbx)?;
            keep(a, n, rax)?;
            a.mov(eax, (FRAMES + (n + 1) % 2 * 0x1000 + (RW | P)) as u32)?;
            a.mov(qword_ptr(entry_of(WINDOW)), rax)?;
            a.invlpg(ptr(rbx))?;
        }
        Ok(())
    });
    plant(&guest, FRAMES, 0x11);
    plant(&guest, FRAMES + 0x1000, 0x22);
    guest.map(WINDOW, FRAMES | RW | P);
    run_to_end(bench, &guest)?;
    let seen: Vec<_> = (0..20).map(|n| guest.result(n)).collect();
    assert_eq!(seen, [0x11, 0x22].repeat(10));
    Ok(())
}

fn level_3_rewrites_its_own_code(bench: &Bench) -> Outcome {
    let mut guest = Guest::new();
    guest.user(|a| {
        let mut again = a.create_label();
        let mut target = a.create_label();
        a.mov(ecx, 200)?;
        a.lea(rbx, ptr(target))?;
        a.set_label(&mut again)?;
        a.inc(dword_ptr(rbx + 1))?;
        a.set_label(&mut target)?;
        a.mov(eax, 5)?;
        a.add(qword_ptr(USER_DATA), rax)?;
        a.dec(ecx)?;
        a.jne(again)
    });
    run_to_end(bench, &guest)?;
    assert_eq!(guest.get(USER_DATA), (6..206).sum::<u64>());
    Ok(())
}

/// `mov rax, imm64`, ten bytes, and a jump back to the code.
const LONG: [u8; 10] = [0x48, 0xb8, 1, 2, 3, 4, 5, 6, 7, 8];
const LOADED: u64 = 0x0807_0605_0403_0201;

/// A guest that jumps to `LONG`, which begins `inside` bytes before the end of the window's first page, and goes on
/// after it at [`SECOND_CODE`].
fn crossing(inside: u64) -> (Guest, u64) {
    let at = WINDOW + 0x1000 - inside;
    let guest = Guest::running(|a| {
        a.mov(rbx, at)?;
        a.mov(ecx, SECOND_CODE as u32)?;
        a.jmp(rbx)
    });
    guest.code_at(SECOND_CODE, |a| keep(a, 0, rax));
    // jmp rcx
    let code = [&LONG[..], &[0xff, 0xe1]].concat();
    let (first, second) = code.split_at(inside as usize);
    // The second page lies before the first one in memory.
    guest.put_bytes(FRAMES + 0x2000 - inside, first);
    guest.put_bytes(FRAMES, second);
    guest.map(WINDOW, (FRAMES + 0x1000) | RW | P);
    guest.map(WINDOW + 0x1000, FRAMES | RW | P);
    (guest, at)
}

fn instructions_cross_pages(bench: &Bench) -> Outcome {
    for inside in 1..10 {
        let (guest, _) = crossing(inside);
        run_to_end(bench, &guest)?;
        assert_eq!(guest.result(0), LOADED, "{inside} bytes in the first page");
    }
    Ok(())
}

/// The fault's address is in the page that is missing; RIP is where the instruction begins, and it restarts.
fn the_second_page_is_missing(bench: &Bench) -> Outcome {
    for inside in 1..10 {
        let (guest, at) = crossing(inside);
        guest.map(WINDOW + 0x1000, 0);
        let mut machine = Machine::new(bench, &guest)?;
        let trap = machine.run()?.trap();
        assert_eq!((trap.vector, trap.error, trap.cr2, trap.rip), (14, 0x10, WINDOW + 0x1000, at), "{inside} inside");
        guest.map(WINDOW + 0x1000, FRAMES | RW | P);
        machine.run()?.done();
        assert_eq!(guest.result(0), LOADED);
    }
    Ok(())
}

fn the_second_page_may_not_be_executed(bench: &Bench) -> Outcome {
    let (guest, at) = crossing(3);
    guest.map(WINDOW + 0x1000, NX | FRAMES | RW | P);
    let trap = run_once(bench, &guest)?.trap();
    assert_eq!((trap.vector, trap.error, trap.cr2, trap.rip), (14, 0x11, WINDOW + 0x1000, at));
    // And one that ends at the border does not look beyond it.
    let (guest, _) = crossing(12);
    guest.map(WINDOW + 0x1000, 0);
    run_to_end(bench, &guest)?;
    assert_eq!(guest.result(0), LOADED);
    Ok(())
}

fn execution_runs_into_a_missing_page(bench: &Bench) -> Outcome {
    let (guest, _) = crossing(10);
    guest.map(WINDOW + 0x1000, 0);
    let trap = run_once(bench, &guest)?.trap();
    let next = WINDOW + 0x1000;
    assert_eq!((trap.vector, trap.error, trap.cr2, trap.rip, trap.gpr[0]), (14, 0x10, next, next, LOADED));
    Ok(())
}

/// Volume 2, 2.3.11: fifteen bytes are an instruction, sixteen raise #GP(0).
fn the_longest_instruction_and_one_byte_more(bench: &Bench) -> Outcome {
    let prefixed = |prefixes: usize| [&vec![0x2e; prefixes][..], &[0x90]].concat();
    let guest = Guest::running(|a| a.db(&prefixed(14)));
    let state = run_to_end(bench, &guest)?;
    assert_eq!(state.rip, CODE + 15 + 2);
    let guest = Guest::running(|a| a.db(&prefixed(15)));
    let trap = run_once(bench, &guest)?.trap();
    assert_eq!((trap.vector, trap.error, trap.rip), (13, 0, CODE));
    Ok(())
}
