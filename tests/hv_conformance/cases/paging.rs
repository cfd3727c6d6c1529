//! Paging (chapter 5): permissions, fault codes and CR2, accessed and dirty bits, page sizes, invalidation.

use super::*;

cases!(paging:
    every_permission_bit,
    permissions_combine_over_levels,
    supervisor_writes_obey_write_protect,
    reserved_bits_fault,
    accessed_and_dirty_bits,
    pages_of_2_mib,
    pages_of_1_gib,
    a_fault_names_the_second_page,
    non_canonical_addresses,
    a_handler_maps_the_missing_page,
    invlpg_drops_a_translation,
    loading_cr3_switches_address_spaces,
    loading_cr3_drops_translations,
    toggling_pge_drops_global_translations,
    a_table_seen_through_an_alias,
);

const PRESENT: u64 = 1;
const WRITE: u64 = 2;
const USER: u64 = 4;
const RESERVED: u64 = 8;
const FETCH: u64 = 16;

const READ: u64 = 0;
const PROTECTION: [u64; 3] = [READ, WRITE, FETCH];

/// Code that touches the address in RBX once: reads it, writes it, or calls it.
fn touch(a: &mut CodeAssembler, access: u64) -> Assembled {
    match access {
        READ => a.mov(rax, qword_ptr(rbx)),
        WRITE => a.mov(qword_ptr(rbx), rax),
        _ => a.call(rbx),
    }
}

/// Where the code that touches lies: one program a kind and level.
fn toucher(access: u64, user: bool) -> u64 {
    let base = if user { USER_CODE } else { CODE };
    base + 0x1000 + access * 0x40
}

/// A guest with a program for each kind of access and level.
fn guest() -> Guest {
    let guest = Guest::new();
    for access in PROTECTION {
        for user in [false, true] {
            if user {
                guest.user_at(toucher(access, user), |a| touch(a, access));
            } else {
                guest.code_at(toucher(access, user), |a| touch(a, access));
            }
        }
    }
    // What a call finds: RET.
    for frame in (FRAMES..FRAMES + 0x2_0000).step_by(0x1000) {
        guest.put(frame, 0xc3);
    }
    guest
}

/// Touches `address` once.
fn access(machine: &mut Machine, address: u64, access: u64, user: bool) -> Result<End, Skip> {
    let mut guest = Guest::new();
    if user {
        guest.enter_user();
    }
    guest.state.rip = toucher(access, user);
    (guest.state.gpr[0], guest.state.gpr[3]) = (0xc3, address);
    machine.restore(&guest.state);
    machine.run()
}

/// 5.6.1, as a formula: the error code of an access through an entry, if it faults.
fn expected(entry: u64, access: u64, user: bool, write_protect: bool) -> Option<u64> {
    let allowed = match access {
        READ => true,
        WRITE => entry & RW != 0 || (!user && !write_protect),
        _ => entry & NX == 0,
    };
    let code = access | if user { USER } else { 0 };
    match (entry & P != 0, allowed && (!user || entry & US != 0)) {
        (false, _) => Some(code),
        (true, false) => Some(code | PRESENT),
        (true, true) => None,
    }
}

#[track_caller]
fn check(end: End, expected: Option<u64>, address: u64, what: &str) {
    match expected {
        None => assert_eq!(end, End::Done, "{what}"),
        Some(code) => {
            let trap = end.trap();
            assert_eq!((trap.vector, trap.error, trap.cr2), (14, code, address), "{what}: (vector, error, CR2)");
        }
    }
}

/// 5.6, 5.7: every combination of P, R/W, U/S and XD in an entry, for every access at both levels.
fn every_permission_bit(bench: &Bench) -> Outcome {
    let guest = guest();
    let entry = |n: u64| {
        let frame = FRAMES + n * 0x1000;
        frame | n & (P | RW | US) | if n & 8 != 0 { NX } else { 0 }
    };
    for n in 0..16 {
        guest.map(WINDOW + n * 0x1000, entry(n));
    }
    let mut machine = Machine::new(bench, &guest)?;
    for n in 0..16 {
        let page = WINDOW + n * 0x1000;
        for kind in PROTECTION {
            for user in [false, true] {
                let end = access(&mut machine, page, kind, user)?;
                let what = format!("entry {:#x}, access {kind}, user {user}", entry(n));
                check(end, expected(entry(n), kind, user, true), page, &what);
            }
        }
    }
    Ok(())
}

/// Where a path of tables of a case's own leads, apart from that of code and stacks.
const PATH: u64 = 1 << 39;
/// Its PDPT, directory and table; PML4 entry 1 leads there.
const PATH_TABLES: [u64; 3] = [FRAMES + 0x1_0000, FRAMES + 0x1_1000, FRAMES + 0x1_2000];

/// Lays the path to the page at [`FRAMES`]; `flags` are those of the four levels, from the PML4 down.
fn lay_path(guest: &Guest, flags: [u64; 4]) {
    let [pdpt, directory, table] = PATH_TABLES;
    let entries = [(PML4 + 8, pdpt), (pdpt, directory), (directory, table), (table, FRAMES)];
    for ((at, target), flags) in entries.into_iter().zip(flags) {
        guest.put(at, target | flags);
    }
}

/// 5.6.1: an access needs the right at every level.
fn permissions_combine_over_levels(bench: &Bench) -> Outcome {
    let all = P | RW | US;
    for level in 0..4 {
        for changed in [RW, US, NX] {
            let guest = guest();
            let mut flags = [all; 4];
            flags[level] ^= changed;
            lay_path(&guest, flags);
            let mut machine = Machine::new(bench, &guest)?;
            for kind in PROTECTION {
                for user in [false, true] {
                    let end = access(&mut machine, PATH, kind, user)?;
                    let what = format!("{changed:#x} changed at level {level}, access {kind}, user {user}");
                    check(end, expected(all ^ changed, kind, user, true), PATH, &what);
                }
            }
        }
    }
    Ok(())
}

/// 2.5, CR0.WP: without it, level 0 writes to read-only pages, and level 3 does not.
fn supervisor_writes_obey_write_protect(bench: &Bench) -> Outcome {
    const WP: u64 = 1 << 16;
    for write_protect in [false, true] {
        for (entry, user) in [(P, false), (P | US, false), (P | US, true), (P | RW | US, true)] {
            let mut guest = guest();
            guest.map(WINDOW, FRAMES | entry);
            if user {
                guest.enter_user();
            }
            guest.state.rip = toucher(WRITE, user);
            (guest.state.gpr[0], guest.state.gpr[3]) = (0x77, WINDOW);
            guest.state.cr0 = if write_protect { CR0 | WP } else { CR0 & !WP };
            let end = run_once(bench, &guest)?;
            let expected = expected(entry, WRITE, user, write_protect);
            check(end, expected, WINDOW, &format!("WP {write_protect}, entry {entry:#x}, user {user}"));
            assert_eq!(guest.get(FRAMES), if expected.is_none() { 0x77 } else { 0xc3 });
        }
    }
    Ok(())
}

/// 5.6.2, table 5-14 and following: bits that are reserved whatever the address width is.
fn reserved_bits_fault(bench: &Bench) -> Outcome {
    const NXE: u64 = 1 << 11;
    type Lay = fn(&mut Guest);
    const PDPT_OF_PATH: u64 = PATH_TABLES[0];
    const DIRECTORY_OF_PATH: u64 = PATH_TABLES[1];
    let layouts: [(&str, Lay); 4] = [
        ("PS in a PML4 entry", |guest| lay_path(guest, [PS | RW | P, RW | P, RW | P, RW | P])),
        ("a 1 GiB page at 2 MiB", |guest| {
            lay_path(guest, [RW | P; 4]);
            guest.put(PDPT_OF_PATH, 1 << 21 | PS | RW | P);
        }),
        ("a 2 MiB page at 8 KiB", |guest| {
            lay_path(guest, [RW | P; 4]);
            guest.put(DIRECTORY_OF_PATH, LARGE | 1 << 13 | PS | RW | P);
        }),
        ("XD without EFER.NXE", |guest| {
            lay_path(guest, [RW | P, RW | P, RW | P, NX | RW | P]);
            guest.state.msrs.efer &= !NXE;
        }),
    ];
    for (what, lay) in layouts {
        let mut guest = guest();
        lay(&mut guest);
        for kind in [READ, WRITE] {
            guest.state.rip = toucher(kind, false);
            guest.state.gpr[3] = PATH;
            let end = run_once(bench, &guest)?;
            check(end, Some(kind | PRESENT | RESERVED), PATH, what);
        }
    }
    Ok(())
}

/// 5.8: a walk sets accessed bits on its path, and a write the dirty bit of the last entry only.
fn accessed_and_dirty_bits(bench: &Bench) -> Outcome {
    for (kind, set) in [(READ, A), (WRITE, A | D), (FETCH, A)] {
        let mut guest = guest();
        guest.map(WINDOW, FRAMES | RW | P);
        guest.map(WINDOW + 0x1000, (FRAMES + 0x1000) | RW | P);
        guest.state.rip = toucher(kind, false);
        (guest.state.gpr[0], guest.state.gpr[3]) = (0xc3, WINDOW);
        run_once(bench, &guest)?.done();
        let bits = |at: u64| guest.get(at) & (A | D);
        assert_eq!(bits(entry_of(WINDOW)), set, "access {kind}");
        assert_eq!(bits(entry_of(WINDOW + 0x1000)), 0, "a page that nobody touched");
        // Bit 6 of an entry that leads to a table is ignored and left alone.
        assert_eq!([PML4, PDPT, DIRECTORY + 8].map(bits), [A; 3], "access {kind}");
        assert_eq!(bits(entry_of(CODE + 0x1000)), A, "the code's page");
        assert_eq!(bits(entry_of(RSP0)), 0, "a stack that was not used");
    }
    Ok(())
}

/// 5.5.4: a directory entry with PS, and its accessed and dirty bits.
fn pages_of_2_mib(bench: &Bench) -> Outcome {
    let guest = Guest::running(|a| {
        a.mov(rbx, LARGE + 0x12_3458)?;
        a.mov(rax, qword_ptr(rbx))?;
        keep(a, 0, rax)?;
        a.mov(rax, qword_ptr(DIRECTORY + 3 * 8))?;
        keep(a, 1, rax)?;
        a.mov(rbx, LARGE + 0x20_0008)?;
        a.mov(qword_ptr(rbx), rbx)
    });
    guest.put(LARGE + 0x12_3458, 0x5566);
    run_to_end(bench, &guest)?;
    let bits = |at: u64| guest.get(at) & (A | D);
    assert_eq!(guest.results::<2>(), [0x5566, 3 << 21 | PS | RW | P]);
    assert_eq!((bits(DIRECTORY + 2 * 8), bits(DIRECTORY + 3 * 8)), (A, A | D));
    assert_eq!(guest.get(LARGE + 0x20_0008), LARGE + 0x20_0008);
    Ok(())
}

/// 5.5.4: a PDPT entry with PS.
fn pages_of_1_gib(bench: &Bench) -> Outcome {
    bench.needs(&crate::abilities::GIGABYTE_PAGES)?;
    let guest = Guest::running(|a| {
        a.mov(rbx, (1u64 << 30) + FRAMES)?;
        a.mov(rax, qword_ptr(rbx))?;
        keep(a, 0, rax)?;
        a.mov(qword_ptr(rbx + 0x40_0000), rbx)
    });
    guest.put(PDPT + 8, PS | RW | P);
    guest.put(FRAMES, 0x1234);
    run_to_end(bench, &guest)?;
    assert_eq!((guest.result(0), guest.get(FRAMES + 0x40_0000)), (0x1234, (1 << 30) + FRAMES));
    assert_eq!(guest.get(PDPT + 8), PS | RW | P | A | D);
    Ok(())
}

/// 7.15, interrupt 14: CR2 is the byte that faulted, not where the operand begins; nothing is written before that is known.
fn a_fault_names_the_second_page(bench: &Bench) -> Outcome {
    for kind in [READ, WRITE] {
        for into in 1..8 {
            let mut guest = guest();
            guest.map(WINDOW, FRAMES | RW | P);
            guest.put(FRAMES + 0xff8, 0x1111_1111_1111_1111);
            guest.state.rip = toucher(kind, false);
            guest.state.gpr[3] = WINDOW + 0x1000 - into;
            let end = run_once(bench, &guest)?;
            check(end, Some(kind), WINDOW + 0x1000, &format!("{into} bytes in the first page"));
            if guest.get(FRAMES + 0xff8) != 0x1111_1111_1111_1111 {
                bench.needs(&crate::abilities::WHOLE_WRITES)?;
                panic!("half written");
            }
        }
    }
    Ok(())
}

/// Volume 1, 3.3.7.1: #GP(0), and #SS(0) through RSP or RBP.
fn non_canonical_addresses(bench: &Bench) -> Outcome {
    const HOLE_START: u64 = 1 << 47;
    type Build = fn(&mut CodeAssembler) -> Assembled;
    let builds: [(u8, Build); 6] = [
        (13, |a| a.mov(rax, qword_ptr(rbx))),
        (13, |a| a.mov(qword_ptr(rbx), rax)),
        (12, |a| a.mov(rax, qword_ptr(rbp))),
        (13, |a| a.mov(rax, qword_ptr(rbp).ds())),
        (13, |a| a.jmp(rbx)),
        (13, |a| a.invlpg(ptr(rbx)).and_then(|()| a.mov(rax, qword_ptr(rbx)))),
    ];
    for (n, (vector, build)) in builds.into_iter().enumerate() {
        for address in [HOLE_START, !HOLE_START, 0x1234_5678_9abc_def0] {
            let mut guest = Guest::running(build);
            (guest.state.gpr[3], guest.state.gpr[5]) = (address, address);
            let trap = run_once(bench, &guest)?.trap();
            assert_eq!((trap.vector, trap.error), (vector, 0), "{n}: {address:#x}");
        }
    }
    // The last canonical address is an ordinary one: a page fault.
    let mut guest = Guest::running(|a| a.mov(al, byte_ptr(rbx)));
    guest.state.gpr[3] = HOLE_START - 1;
    let trap = run_once(bench, &guest)?.trap();
    assert_eq!((trap.vector, trap.cr2), (14, HOLE_START - 1));
    Ok(())
}

/// 5.10.4.3: an entry that becomes present needs no invalidation, and IRETQ restarts the access.
fn a_handler_maps_the_missing_page(bench: &Bench) -> Outcome {
    const PAGES: u64 = 16;
    let mut guest = Guest::running(|a| {
        let mut again = a.create_label();
        a.mov(rbx, WINDOW)?;
        a.mov(ecx, PAGES as u32)?;
        a.set_label(&mut again)?;
        a.add(qword_ptr(rbx), rcx)?;
        a.add(rbx, 0x1000)?;
        a.dec(ecx)?;
        a.jne(again)
    });
    guest.handler(14, |a| {
        a.push(rax)?;
        a.push(rdx)?;
        count(a, 0)?;
        a.mov(rax, cr2)?;
        a.mov(rdx, rax)?;
        a.sub(rdx, WINDOW as i32)?;
        a.add(rdx, (FRAMES | RW | P) as i32)?;
        a.shr(rax, 12)?;
        a.mov(qword_ptr(rax * 8 + LOW_TABLE), rdx)?;
        a.pop(rdx)?;
        a.pop(rax)?;
        a.add(rsp, 8)?;
        a.iretq()
    });
    run_to_end(bench, &guest)?;
    assert_eq!(guest.result(0), PAGES);
    for n in 0..PAGES {
        assert_eq!(guest.get(FRAMES + n * 0x1000), PAGES - n);
    }
    Ok(())
}

/// Reads the window's first quadword into result `n`.
fn look(a: &mut CodeAssembler, n: u64) -> Assembled {
    a.mov(rbx, WINDOW)?;
    a.mov(rax, qword_ptr(rbx))?;
    keep(a, n, rax)
}

/// Makes the window's first page lead to another frame.
fn remap(a: &mut CodeAssembler, frame: u64, flags: u64) -> Assembled {
    a.mov(rax, frame | flags)?;
    a.mov(qword_ptr(entry_of(WINDOW)), rax)
}

fn two_frames(build: impl FnOnce(&mut CodeAssembler) -> Assembled) -> Guest {
    let guest = Guest::running(build);
    guest.put(FRAMES, 0x11);
    guest.put(FRAMES + 0x1000, 0x22);
    guest
}

/// 5.10.4.1: INVLPG, of global translations too.
fn invlpg_drops_a_translation(bench: &Bench) -> Outcome {
    for flags in [RW | P, G | RW | P] {
        let guest = two_frames(|a| {
            for n in 0..20 {
                look(a, n)?;
                remap(a, FRAMES + (n + 1) % 2 * 0x1000, flags)?;
                a.invlpg(ptr(rbx))?;
            }
            Ok(())
        });
        guest.map(WINDOW, FRAMES | flags);
        run_to_end(bench, &guest)?;
        let seen: Vec<_> = (0..20).map(|n| guest.result(n)).collect();
        assert_eq!(seen, [0x11, 0x22].repeat(10));
    }
    Ok(())
}

/// 5.10.4.1: a second address space that differs in one page.
fn loading_cr3_switches_address_spaces(bench: &Bench) -> Outcome {
    // The second space: its own PML4, PDPT, directory and table, in frames.
    let tables: [u64; 4] = std::array::from_fn(|n| FRAMES + 0x1_0000 + n as u64 * 0x1000);
    let [pml4, pdpt, directory, table] = tables;
    let guest = two_frames(|a| {
        for n in 0..10 {
            look(a, n)?;
            a.mov(rax, if n % 2 == 0 { pml4 } else { PML4 })?;
            a.mov(cr3, rax)?;
        }
        a.mov(rax, cr3)?;
        keep(a, 10, rax)
    });
    guest.put(pml4, pdpt | RW | P);
    guest.put(pdpt, directory | RW | P);
    guest.put(directory, LOW_TABLE | RW | P);
    guest.put(directory + 8, table | RW | P);
    guest.put(table, (FRAMES + 0x1000) | RW | P);
    guest.map(WINDOW, FRAMES | RW | P);
    run_to_end(bench, &guest)?;
    let seen: Vec<_> = (0..11).map(|n| guest.result(n)).collect();
    assert_eq!(seen, [0x11, 0x22, 0x11, 0x22, 0x11, 0x22, 0x11, 0x22, 0x11, 0x22, PML4]);
    Ok(())
}

/// 5.10.4.1: loading CR3 with the same value drops what is not global.
fn loading_cr3_drops_translations(bench: &Bench) -> Outcome {
    let guest = two_frames(|a| {
        look(a, 0)?;
        remap(a, FRAMES + 0x1000, RW | P)?;
        a.mov(rax, cr3)?;
        a.mov(cr3, rax)?;
        look(a, 1)
    });
    guest.map(WINDOW, FRAMES | RW | P);
    run_to_end(bench, &guest)?;
    assert_eq!(guest.results(), [0x11, 0x22]);
    Ok(())
}

/// 5.10.4.1: changing CR4.PGE drops everything.
fn toggling_pge_drops_global_translations(bench: &Bench) -> Outcome {
    const PGE: u64 = 1 << 7;
    let guest = two_frames(|a| {
        look(a, 0)?;
        remap(a, FRAMES + 0x1000, G | RW | P)?;
        a.mov(rax, CR4 & !PGE)?;
        a.mov(cr4, rax)?;
        a.mov(rax, CR4)?;
        a.mov(cr4, rax)?;
        look(a, 1)
    });
    guest.map(WINDOW, FRAMES | G | RW | P);
    run_to_end(bench, &guest)?;
    assert_eq!(guest.results(), [0x11, 0x22]);
    Ok(())
}

/// A page table written through another mapping of it is written all the same.
fn a_table_seen_through_an_alias(bench: &Bench) -> Outcome {
    let guest = two_frames(|a| {
        look(a, 0)?;
        a.mov(rdx, WINDOW + 0x1000)?;
        a.mov(rax, (FRAMES + 0x1000) | RW | P)?;
        a.mov(qword_ptr(rdx), rax)?;
        a.invlpg(ptr(rbx))?;
        look(a, 1)
    });
    guest.map(WINDOW, FRAMES | RW | P);
    guest.map(WINDOW + 0x1000, WINDOW_TABLE | RW | P);
    run_to_end(bench, &guest)?;
    assert_eq!(guest.results(), [0x11, 0x22]);
    Ok(())
}
