//! The state that a vCPU begins in, control registers and descriptor tables (2.4, 2.5, 3.5, 10.8).

use super::*;

cases!(entry:
    all_registers_arrive_and_are_saved,
    saved_state_is_what_was_restored,
    a_restored_state_can_be_restored_again,
    control_registers_read_back,
    reserved_control_bits_fault,
    task_switched_flag,
    descriptor_tables_read_back,
    segment_loads_check_descriptors,
    far_transfers_load_cs,
    system_instructions_need_level_0,
    cli_and_sti_go_by_iopl,
    a_kick_in_the_handler_ends_the_run_after_the_access,
    an_early_kick_ends_the_first_run,
);

const GENERAL: [AsmRegister64; 16] = [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15];

/// Volume 1, 3.4.1: sixteen registers and RIP.
fn all_registers_arrive_and_are_saved(bench: &Bench) -> Outcome {
    let mut guest = Guest::running(|a| {
        for (n, register) in (0..).zip(GENERAL) {
            keep(a, n, register)?;
        }
        for register in GENERAL {
            a.not(register)?;
        }
        a.not(rsp)?;
        Ok(())
    });
    for (n, register) in (0u64..).zip(&mut guest.state.gpr) {
        if n != 4 {
            *register = 0x0101_0101_0101_0101 * n + 0x8000_0000_0000_0000;
        }
    }
    let before = guest.state.gpr;
    let after = run_to_end(bench, &guest)?;
    assert_eq!(guest.results::<16>(), before);
    let mut expected = before.map(|value| !value);
    expected[4] = before[4];
    assert_eq!(after.gpr, expected);
    assert_eq!(after.rflags, RFLAGS);
    Ok(())
}

/// A state with something in every field that a running processor at level 0 can have.
fn full_state() -> Guest {
    let mut guest = Guest::running(|a| a.nop());
    let state = &mut guest.state;
    for (n, register) in (1..).zip(&mut state.gpr) {
        *register = 0x1122_3344_5566_0000 + n;
    }
    state.gpr[4] = STACK;
    state.rflags = RFLAGS | 0x8d5;
    state.cr2 = 0x0000_7fff_1234_5678;
    state.cr8 = 3;
    state.lapic.tpr = 0x30;
    state.dr[..4].copy_from_slice(&[0x1000, 0x2000, 0x3000, 0x4000]);
    (state.segments[4].base, state.segments[5].base) = (0x1_2345, 0x7fff_ffff_f000);
    let msrs = &mut state.msrs;
    msrs.star = 0x001b_0008_0000_0000;
    (msrs.lstar, msrs.cstar, msrs.sfmask) = (0xffff_8000_0000_1000, 0x2000, 0x4_7700);
    msrs.kernel_gs_base = 0xffff_8000_0000_3000;
    (msrs.sysenter_cs, msrs.sysenter_esp, msrs.sysenter_eip) = (8, 0x5000, 0x6000);
    msrs.pat = 0x0007_0406_0007_0406;
    msrs.tsc_aux = 7;
    let fpu = &mut state.fpu;
    (fpu.fcw, fpu.mxcsr) = (0x27f, 0x1fa0);
    // Physical registers 5 to 7 hold values, TOP is 5.
    (fpu.fsw, fpu.ftw) = (5 << 11, 0b1110_0000);
    fpu.st[0] = (0x8000_0000_0000_0000, 0x3fff);
    fpu.st[1] = (0xc000_0000_0000_0000, 0x4000);
    fpu.st[2] = (0xffff_0000_0000_0001, 0xbfff);
    for (n, register) in (1..).zip(&mut fpu.xmm) {
        *register = [n, n << 32 | 0x5a];
    }
    state.lapic.svr = 0x1ff;
    state.lapic.ldr = 0x0100_0000;
    state.lapic.lvt[3] = 0x1_0700;
    state.lapic.timer_divide = 0b1011;
    // Something requested that the priority holds back, and something in service.
    state.lapic.irr[1] = 1 << 3;
    state.lapic.isr[1] = 1 << 1;
    guest
}

fn saved_state_is_what_was_restored(bench: &Bench) -> Outcome {
    let guest = full_state();
    let mut machine = Machine::new(bench, &guest)?;
    let mut saved = machine.state();
    assert!(saved.msrs.tsc >= guest.state.msrs.tsc, "time goes on");
    saved.msrs.tsc = guest.state.msrs.tsc;
    assert_eq!(saved, guest.state);
    Ok(())
}

fn a_restored_state_can_be_restored_again(bench: &Bench) -> Outcome {
    let guest = full_state();
    let mut machine = Machine::new(bench, &guest)?;
    machine.run()?.done();
    let mut first = machine.state();
    machine.restore(&first);
    let mut second = machine.state();
    assert_eq!(first.rip, CODE + 3, "after a NOP and an OUT");
    (first.msrs.tsc, second.msrs.tsc) = (0, 0);
    assert_eq!(first, second);
    Ok(())
}

/// 2.5: what MOV to and from control registers changes.
fn control_registers_read_back(bench: &Bench) -> Outcome {
    const MP_WP_AM: u64 = 1 << 1 | 1 << 16 | 1 << 18;
    let guest = Guest::running(|a| {
        a.mov(rax, cr0)?;
        keep(a, 0, rax)?;
        a.mov(rax, cr3)?;
        keep(a, 1, rax)?;
        a.mov(rax, cr4)?;
        keep(a, 2, rax)?;
        a.mov(rax, CR0 ^ MP_WP_AM)?;
        a.mov(cr0, rax)?;
        a.mov(rbx, cr0)?;
        keep(a, 3, rbx)?;
        // CR4.TSD, PCE and DE come and go.
        a.mov(rax, CR4 ^ 0x10c)?;
        a.mov(cr4, rax)?;
        a.mov(rbx, cr4)?;
        keep(a, 4, rbx)?;
        a.mov(eax, 9)?;
        a.mov(cr8, rax)?;
        a.mov(rbx, cr8)?;
        keep(a, 5, rbx)?;
        a.mov(rax, 0xdead_b000u64)?;
        a.mov(cr2, rax)?;
        a.mov(rbx, cr2)?;
        keep(a, 6, rbx)
    });
    let state = run_to_end(bench, &guest)?;
    let changed = (CR0 ^ MP_WP_AM, CR4 ^ 0x10c);
    assert_eq!(guest.results(), [CR0, PML4, CR4, changed.0, changed.1, 9, 0xdead_b000]);
    assert_eq!(
        (state.cr0, state.cr4, state.cr8, state.cr2, state.lapic.tpr),
        (changed.0, changed.1, 9, 0xdead_b000, 0x90)
    );
    Ok(())
}

/// 2.5 and volume 2, MOV to control registers: #GP(0), and the register keeps its value.
fn reserved_control_bits_fault(bench: &Bench) -> Outcome {
    const PG: u64 = 1 << 31;
    const NW: u64 = 1 << 29;
    const PE: u64 = 1;
    const PAE: u64 = 1 << 5;
    const HIGH_BIT: u64 = 1 << 32;
    for (register, value) in [
        (cr0, CR0 & !PE),
        // Leaving paging is not possible in 64-bit mode.
        (cr0, CR0 & !PG),
        (cr0, CR0 | NW),
        (cr4, CR4 & !PAE),
        (cr4, CR4 | 1 << 15),
        (cr3, PML4 | 1 << 60),
        (cr8, 0x10),
        (cr8, 1 << 63),
        (cr0, CR0 | HIGH_BIT),
        (cr4, CR4 | HIGH_BIT),
    ] {
        if value & HIGH_BIT != 0 {
            bench.needs(&crate::abilities::HIGH_BITS)?;
        }
        let guest = Guest::running(|a| {
            a.mov(rax, value)?;
            a.mov(register, rax)
        });
        let mut machine = Machine::new(bench, &guest)?;
        let trap = machine.run()?.trap_of(|| format!("{register:?} {value:#x}"));
        assert_eq!((trap.vector, trap.error), (13, 0), "{register:?} {value:#x}");
        let state = machine.state();
        assert_eq!((state.cr0, state.cr3, state.cr4, state.cr8), (CR0, PML4, CR4, 0), "{register:?} {value:#x}");
    }
    Ok(())
}

/// 2.5 and table 2-2: CR0.TS, CLTS and #NM.
fn task_switched_flag(bench: &Bench) -> Outcome {
    let mut guest = Guest::running(|a| {
        a.mov(rax, cr0)?;
        a.or(rax, 8)?;
        a.mov(cr0, rax)?;
        a.fninit()?;
        a.mov(rbx, cr0)?;
        keep(a, 1, rbx)
    });
    guest.handler(7, |a| {
        count(a, 0)?;
        a.clts()?;
        a.iretq()
    });
    guest.state.fpu.fcw = 0x27f;
    let state = run_to_end(bench, &guest)?;
    assert_eq!(guest.results(), [1, CR0]);
    assert_eq!((state.cr0, state.fpu.fcw), (CR0, 0x37f));
    Ok(())
}

/// 2.4: LGDT, LIDT, LLDT, LTR and what reads them.
fn descriptor_tables_read_back(bench: &Bench) -> Outcome {
    const TABLE: u64 = DATA + 0x100;
    let guest = Guest::running(|a| {
        a.sgdt(ptr(RESULTS))?;
        a.sidt(ptr(RESULTS + 16))?;
        a.str(rax)?;
        keep(a, 4, rax)?;
        a.sldt(rax)?;
        keep(a, 5, rax)?;
        a.lgdt(ptr(TABLE))?;
        a.lidt(ptr(TABLE + 16))?;
        // Not busy any more, so that it can be loaded.
        a.btr(dword_ptr(GDT + u64::from(TSS_SELECTOR) + 20), 9)?;
        a.mov(eax, u32::from(TSS_SELECTOR) + 16)?;
        a.ltr(ax)?;
        a.str(rax)?;
        keep(a, 6, rax)?;
        a.sgdt(ptr(RESULTS + 64))?;
        a.sidt(ptr(RESULTS + 80))
    });
    // The same tables with other limits.
    guest.ram.store(TABLE, GDT_LIMIT - 8).expect("in memory");
    guest.put(TABLE + 2, GDT);
    guest.ram.store(TABLE + 16, IDT_LIMIT - 16).expect("in memory");
    guest.put(TABLE + 18, IDT);
    let state = run_to_end(bench, &guest)?;
    let table = |at: u64| {
        let bytes = guest.bytes(at, 10);
        let (limit, base) = bytes.split_at(2);
        (u16::from_le_bytes(limit.try_into().expect("two")), u64::from_le_bytes(base.try_into().expect("eight")))
    };
    assert_eq!((table(RESULTS), table(RESULTS + 16)), ((GDT_LIMIT, GDT), (IDT_LIMIT, IDT)));
    assert_eq!((table(RESULTS + 64), table(RESULTS + 80)), ((GDT_LIMIT - 8, GDT), (IDT_LIMIT - 16, IDT)));
    assert_eq!([4, 5, 6].map(|n| guest.result(n)), [TSS_SELECTOR.into(), 0, u64::from(TSS_SELECTOR) + 16]);
    assert_eq!((state.tr.base, state.tr.limit, state.tr.attributes), (TSS + 0x80, TSS_LIMIT.into(), 0x8b));
    assert_eq!((state.gdtr.limit, state.idtr.limit), (GDT_LIMIT - 8, IDT_LIMIT - 16));
    // LTR marks the descriptor busy.
    assert_eq!(guest.get(GDT + u64::from(TSS_SELECTOR) + 16) >> 40 & 0xff, 0x8b);
    Ok(())
}

/// 5.6 to 5.8, volume 2 MOV: which descriptors a data segment or the stack segment takes.
fn segment_loads_check_descriptors(bench: &Bench) -> Outcome {
    for (register, selector, expected) in [
        (ds, 0, None),
        (ds, READ_ONLY, None),
        (es, KERNEL_CS, None),
        (fs, USER_SS, None),
        (ds, ABSENT, Some((11, ABSENT))),
        (ds, BEYOND_GDT, Some((13, BEYOND_GDT))),
        (ds, TSS_SELECTOR, Some((13, TSS_SELECTOR))),
        (ss, ABSENT, Some((12, ABSENT))),
        (ss, READ_ONLY, Some((13, READ_ONLY))),
        (ss, USER_SS, Some((13, USER_SS & !3))),
        (ss, KERNEL_CS, Some((13, KERNEL_CS))),
        (ss, 0, None),
    ] {
        let guest = Guest::running(|a| {
            a.mov(eax, u32::from(selector))?;
            a.mov(register, eax)
        });
        let end = run_once(bench, &guest)?;
        match expected {
            None => assert_eq!(end, End::Done, "{register:?} {selector:#x}"),
            Some((vector, error)) => {
                let trap = end.trap();
                assert_eq!((trap.vector, trap.error), (vector, error.into()), "{register:?} {selector:#x}");
                assert_eq!(trap.rip, CODE + 5, "{register:?} {selector:#x}");
            }
        }
    }
    Ok(())
}

/// 5.8.1: a far return and a far jump through memory.
fn far_transfers_load_cs(bench: &Bench) -> Outcome {
    const POINTER: u64 = DATA + 0x40;
    let guest = Guest::running(|a| {
        let mut returned = a.create_label();
        a.push(i32::from(OTHER_CS))?;
        a.lea(rax, ptr(returned))?;
        a.push(rax)?;
        a.retf()?;
        a.set_label(&mut returned)?;
        a.mov(ax, cs)?;
        a.movzx(rax, ax)?;
        keep(a, 0, rax)?;
        // A far jump through m16:32. What REX.W makes of it differs between vendors.
        a.mov(rbx, POINTER)?;
        a.db(&[0xff, 0x2b])
    });
    guest.put(POINTER, u64::from(KERNEL_CS) << 32 | SECOND_CODE);
    guest.code_at(SECOND_CODE, |a| {
        a.mov(ax, cs)?;
        a.movzx(rax, ax)?;
        keep(a, 1, rax)
    });
    let state = run_to_end(bench, &guest)?;
    assert_eq!(guest.results(), [OTHER_CS.into(), u64::from(KERNEL_CS)]);
    assert_eq!((state.segments[1].selector, state.segments[1].attributes), (KERNEL_CS, 0xa09b));
    Ok(())
}

/// 6.9: what raises #GP(0) outside level 0.
fn system_instructions_need_level_0(bench: &Bench) -> Outcome {
    type Build = fn(&mut CodeAssembler) -> Assembled;
    let instructions: [(&str, Build); 16] = [
        ("hlt", |a| a.hlt()),
        ("clts", |a| a.clts()),
        ("mov cr0", |a| a.mov(cr0, rax)),
        ("mov from cr3", |a| a.mov(rax, cr3)),
        ("mov cr8", |a| a.mov(cr8, rax)),
        ("mov dr7", |a| a.mov(dr7, rax)),
        ("lgdt", |a| a.lgdt(ptr(USER_DATA))),
        ("lidt", |a| a.lidt(ptr(USER_DATA))),
        ("ltr", |a| a.ltr(ax)),
        ("lldt", |a| a.lldt(ax)),
        ("lmsw", |a| a.lmsw(ax)),
        ("invlpg", |a| a.invlpg(ptr(USER_DATA))),
        ("wbinvd", |a| a.wbinvd()),
        ("rdmsr", |a| a.rdmsr()),
        ("wrmsr", |a| a.wrmsr()),
        ("swapgs", |a| a.swapgs()),
    ];
    for (name, build) in instructions {
        let mut guest = Guest::new();
        guest.user(build);
        let trap = run_once(bench, &guest)?.trap();
        assert_eq!((trap.vector, trap.error, trap.rip, trap.cs), (13, 0, USER_CODE, USER_CS.into()), "{name}");
    }
    Ok(())
}

/// Volume 1, 19.5.
fn cli_and_sti_go_by_iopl(bench: &Bench) -> Outcome {
    let masks: [fn(&mut CodeAssembler) -> Assembled; 2] = [|a| a.cli(), |a| a.sti()];
    for build in masks {
        let mut guest = Guest::new();
        guest.user(build);
        assert_eq!(run_once(bench, &guest)?.trap().vector, 13);
        bench.needs(&crate::abilities::IOPL)?;
        guest.state.rflags |= IOPL3;
        run_to_end(bench, &guest)?;
    }
    Ok(())
}

/// What saving at every step relies on: the access has happened, the state is one between two instructions after it, and
/// going on does not repeat it.
fn a_kick_in_the_handler_ends_the_run_after_the_access(bench: &Bench) -> Outcome {
    let guest = Guest::running(|a| {
        (1..=5).try_for_each(|step| point(a, step))?;
        a.mov(rbx, DEVICE)?;
        a.mov(ecx, dword_ptr(rbx + 0x1000))?;
        let mut here = a.create_label();
        a.set_label(&mut here)?;
        a.jmp(here)
    });
    let mut machine = Machine::answering(bench, &guest, &[0x1234_5678])?;
    for step in 1..=5 {
        assert_eq!(machine.run()?.point(), step);
        assert_eq!(machine.state().rip, CODE + step * 9 - 2);
    }
    assert_eq!(machine.run()?.point(), crate::bus::POINT_REGISTER);
    let state = machine.state();
    assert_eq!((state.gpr[1], state.gpr[3]), (0x1234_5678, DEVICE));
    machine.run()?.done();
    assert_eq!(machine.accesses().len(), 1);
    Ok(())
}

fn an_early_kick_ends_the_first_run(bench: &Bench) -> Outcome {
    let guest = Guest::running(|a| count(a, 0));
    let mut machine = Machine::new(bench, &guest)?;
    machine.kick.kick();
    machine.kick.kick();
    assert_eq!(machine.run()?, End::Kicked);
    assert_eq!((machine.state().rip, guest.result(0)), (CODE, 0));
    machine.run()?.done();
    assert_eq!(guest.result(0), 1);
    Ok(())
}
