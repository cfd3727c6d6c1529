//! Exceptions (chapter 7): every vector that software can raise, its error code and frame, stacks and gates.

use super::*;

cases!(exceptions:
    divide_error,
    debug_by_int1,
    breakpoint,
    overflow_by_int_4,
    invalid_opcode,
    device_not_available,
    double_fault,
    invalid_tss,
    segment_not_present,
    stack_fault,
    general_protection,
    x87_floating_point_error,
    no_alignment_check,
    simd_floating_point_error,
    every_software_vector,
    faults_save_rf_and_traps_do_not,
    interrupt_gates_clear_if_and_trap_gates_do_not,
    software_interrupts_check_the_gates_level,
    error_codes_name_the_gate,
    frames_are_aligned,
    interrupt_stack_table,
    a_level_change_switches_to_rsp0,
    nested_exceptions_return_in_order,
    a_fault_in_a_handlers_return,
    triple_fault,
);

/// In an error code: raised while an earlier exception was delivered (7.13).
const EXT: u64 = 1;

type Build = fn(&mut CodeAssembler) -> Assembled;

/// Runs `build` at level 3 and at level 0; both must trap so, `at` bytes into the code.
fn traps(bench: &Bench, build: Build, vector: u8, error: u64, at: u64) -> Outcome {
    let mut guest = Guest::new();
    guest.user(build);
    let trap = run_once(bench, &guest)?.trap();
    assert_eq!(
        (trap.vector, trap.error, trap.rip, trap.cs),
        (vector, error, USER_CODE + at, USER_CS.into()),
        "level 3"
    );
    assert_eq!((trap.rsp, trap.ss), (USER_STACK, USER_SS.into()));
    // Last, as a host may lack the instruction there.
    let guest = Guest::running(build);
    let trap = run_once(bench, &guest)?.trap();
    assert_eq!((trap.vector, trap.error, trap.rip, trap.cs), (vector, error, CODE + at, KERNEL_CS.into()), "level 0");
    assert_eq!((trap.rsp, trap.ss), (STACK, KERNEL_SS.into()));
    Ok(())
}

/// 7.15, interrupt 0.
fn divide_error(bench: &Bench) -> Outcome {
    traps(bench, |a| a.xor(ecx, ecx).and_then(|()| a.div(ecx)), 0, 0, 2)?;
    // The quotient does not fit.
    traps(bench, |a| a.mov(edx, 1).and_then(|()| a.div(edx)), 0, 0, 5)?;
    let overflow: Build = |a| {
        a.mov(rax, 1u64 << 63)?;
        a.cqo()?;
        a.or(rcx, -1)?;
        a.idiv(rcx)
    };
    traps(bench, overflow, 0, 0, 10 + 2 + 4)
}

/// 7.15, interrupt 1: INT1 is a trap whatever the gate's level, and no software interrupt.
fn debug_by_int1(bench: &Bench) -> Outcome {
    bench.needs(&crate::abilities::USER_INT1)?;
    traps(bench, |a| a.db(&[0xf1]), 1, 0, 1)
}

/// 7.15, interrupt 3.
fn breakpoint(bench: &Bench) -> Outcome {
    let guest = Guest::new();
    guest.gate(3, Guest::stub(3), USER_GATE);
    let mut user = guest;
    user.user(|a| a.int3());
    let trap = run_once(bench, &user)?.trap();
    assert_eq!((trap.vector, trap.rip, trap.cs), (3, USER_CODE + 1, USER_CS.into()));
    let kernel = Guest::running(|a| a.int3());
    bench.needs(&crate::abilities::INT3)?;
    let trap = run_once(bench, &kernel)?.trap();
    assert_eq!((trap.vector, trap.rip, trap.cs), (3, CODE + 1, KERNEL_CS.into()));
    Ok(())
}

/// 7.15, interrupt 4: INTO does not exist in 64-bit mode, INT 4 does.
fn overflow_by_int_4(bench: &Bench) -> Outcome {
    let guest = Guest::running(|a| a.int(4));
    assert_eq!(run_once(bench, &guest)?.trap().rip, CODE + 2);
    traps(bench, |a| a.db(&[0xce]), 6, 0, 0)
}

/// 7.15, interrupt 6, and volume 2: UD2, what 64-bit mode dropped, and LOCK where it may not be.
fn invalid_opcode(bench: &Bench) -> Outcome {
    for build in [
        |a: &mut CodeAssembler| a.ud2(),
        // PUSH ES, DAA, LOCK NOP, LOCK ADD to a register, MOV to CS.
        |a| a.db(&[0x06]),
        |a| a.db(&[0x27]),
        |a| a.db(&[0xf0, 0x90]),
        |a| a.db(&[0xf0, 0x01, 0xc8]),
        |a| a.db(&[0x8e, 0xc8]),
    ] as [Build; 6]
    {
        traps(bench, build, 6, 0, 0)?;
    }
    Ok(())
}

/// 7.15, interrupt 7: CR0.TS for x87 and SSE, CR0.EM for x87.
fn device_not_available(bench: &Bench) -> Outcome {
    const TS: u64 = 8;
    const EM: u64 = 4;
    let rows: [(u64, Build); 4] = [
        (CR0 | TS, |a| a.fninit()),
        (CR0 | TS, |a| a.movaps(xmm0, xmm1)),
        (CR0 | TS, |a| a.wait()),
        (CR0 | EM, |a| a.fninit()),
    ];
    let unavailable = |user: bool| {
        for (control, build) in rows {
            let mut guest = Guest::running(build);
            if user {
                guest.user(build);
            }
            guest.state.cr0 = control;
            let trap = run_once(bench, &guest)?.trap();
            assert_eq!((trap.vector, trap.rip), (7, guest.state.rip), "CR0 {control:#x}, user {user}");
        }
        Ok(())
    };
    unavailable(false)?;
    bench.needs(&crate::abilities::USER_TS)?;
    unavailable(true)
}

/// 7.15, interrupt 8 and table 7-5: a contributory exception while another is delivered.
fn double_fault(bench: &Bench) -> Outcome {
    // #GP's gate is not present, which is #NP.
    let guest = Guest::running(|a| a.mov(eax, u32::from(BEYOND_GDT)).and_then(|()| a.mov(ds, eax)));
    guest.gate(13, Guest::stub(13), 0x0e00);
    let trap = run_once(bench, &guest)?.trap();
    assert_eq!((trap.vector, trap.error), (8, 0));
    // A page fault on a stack that is not there.
    let mut guest = Guest::running(|a| a.push(rax));
    guest.state.gpr[4] = WINDOW + 0x1000;
    guest.gate(8, Guest::stub(8), INTERRUPT_GATE | 1);
    let trap = run_once(bench, &guest)?.trap();
    assert_eq!((trap.vector, trap.error, trap.rsp, trap.cr2), (8, 0, WINDOW + 0x1000, WINDOW + 0xff8));
    assert_eq!(trap.frame, IST1 - 40);
    // A benign exception whose delivery fails is only the second one.
    bench.needs(&crate::abilities::BENIGN_EXCEPTIONS)?;
    let guest = Guest::running(|a| a.ud2());
    guest.gate(6, Guest::stub(6), 0x0e00);
    let trap = run_once(bench, &guest)?.trap();
    assert_eq!((trap.vector, trap.error, trap.rip), (11, 6 * 8 + 2 + EXT, CODE));
    Ok(())
}

/// 7.15, interrupt 10: the TSS ends before the stack pointer that a gate asks for.
fn invalid_tss(bench: &Bench) -> Outcome {
    bench.needs(&crate::abilities::TSS_LIMITS)?;
    let mut guest = Guest::running(|a| a.ud2());
    guest.gate(6, Guest::stub(6), INTERRUPT_GATE | 1);
    guest.state.tr.limit = 0x23;
    let trap = run_once(bench, &guest)?.trap();
    assert_eq!((trap.vector, trap.error, trap.rip), (10, u64::from(TSS_SELECTOR) + EXT, CODE));
    Ok(())
}

/// 7.15, interrupt 11.
fn segment_not_present(bench: &Bench) -> Outcome {
    for build in [
        |a: &mut CodeAssembler| a.mov(eax, u32::from(ABSENT)).and_then(|()| a.mov(es, eax)),
        |a| a.mov(eax, u32::from(ABSENT)).and_then(|()| a.mov(gs, eax)),
    ] as [Build; 2]
    {
        let guest = Guest::running(build);
        let trap = run_once(bench, &guest)?.trap();
        assert_eq!((trap.vector, trap.error, trap.rip), (11, ABSENT.into(), CODE + 5));
    }
    Ok(())
}

/// 7.15, interrupt 12: the stack pointer or RBP is not canonical.
fn stack_fault(bench: &Bench) -> Outcome {
    for build in [(|a: &mut CodeAssembler| a.push(rax)) as Build, |a| a.pop(rax), |a| a.mov(rax, qword_ptr(rbp))] {
        let mut guest = Guest::running(build);
        guest.gate(12, Guest::stub(12), INTERRUPT_GATE | 1);
        (guest.state.gpr[4], guest.state.gpr[5]) = (1 << 63, 1 << 63);
        let trap = run_once(bench, &guest)?.trap();
        assert_eq!((trap.vector, trap.error, trap.rip, trap.rsp), (12, 0, CODE, 1 << 63));
    }
    Ok(())
}

/// 7.15, interrupt 13: a privileged instruction, a null stack segment, an unaligned SSE operand.
fn general_protection(bench: &Bench) -> Outcome {
    let mut guest = Guest::new();
    guest.user(|a| a.hlt());
    let trap = run_once(bench, &guest)?.trap();
    assert_eq!((trap.vector, trap.error, trap.rip), (13, 0, USER_CODE));
    guest.user(|a| a.xor(eax, eax).and_then(|()| a.mov(ss, eax)));
    let trap = run_once(bench, &guest)?.trap();
    assert_eq!((trap.vector, trap.error, trap.rip), (13, 0, USER_CODE + 2));
    guest.user(|a| a.movaps(xmm0, xmmword_ptr(USER_DATA + 8)));
    let trap = run_once(bench, &guest)?.trap();
    assert_eq!((trap.vector, trap.error, trap.rip), (13, 0, USER_CODE));
    Ok(())
}

/// 7.15, interrupt 16: an unmasked x87 exception is taken by the next waiting instruction.
fn x87_floating_point_error(bench: &Bench) -> Outcome {
    let build: Build = |a| {
        // Division by zero is unmasked.
        a.push(0x37b)?;
        a.fldcw(word_ptr(rsp))?;
        a.pop(rax)?;
        a.fldz()?;
        a.fld1()?;
        a.fdiv_2(st0, st1)?;
        a.nop()?;
        a.wait()
    };
    traps(bench, build, 16, 0, 5 + 3 + 1 + 2 + 2 + 2 + 1)
}

/// 7.15, interrupt 17: only with CR0.AM, EFLAGS.AC and level 3 together. (No engine is asked for the exception itself: the
/// software engine does not raise it.)
fn no_alignment_check(bench: &Bench) -> Outcome {
    const AM: u64 = 1 << 18;
    const AC: u64 = 1 << 18;
    let build: Build = |a| a.mov(eax, dword_ptr(USER_DATA + 1));
    bench.needs(&crate::abilities::UNCHECKED_ALIGNMENT)?;
    for (control, rflags, user) in [(CR0, AC, true), (CR0 | AM, 0, true), (CR0 | AM, AC, false)] {
        let mut guest = Guest::running(build);
        if user {
            guest.user(build);
        }
        guest.state.cr0 = control;
        guest.state.rflags |= rflags;
        run_to_end(bench, &guest)?;
    }
    Ok(())
}

/// 7.15, interrupt 19: an unmasked SSE exception, with CR4.OSXMMEXCPT; without it #UD.
fn simd_floating_point_error(bench: &Bench) -> Outcome {
    const OSXMMEXCPT: u64 = 1 << 10;
    let build: Build = |a| a.divss(xmm0, xmm1);
    for user in [true, false] {
        for (control, vector) in [(CR4, 19), (CR4 & !OSXMMEXCPT, 6)] {
            let mut guest = Guest::running(build);
            if user {
                guest.user(build);
            }
            if user && control & OSXMMEXCPT == 0 {
                bench.needs(&crate::abilities::USER_OSXMMEXCPT)?;
            }
            guest.state.cr4 = control;
            // Division by zero is unmasked, and 1.0 is divided by 0.0.
            guest.state.fpu.mxcsr = 0x1d80;
            guest.state.fpu.xmm[0] = [0x3f80_0000, 0];
            let mut machine = Machine::new(bench, &guest)?;
            let trap = machine.run()?.trap();
            assert_eq!((trap.vector, trap.error, trap.rip), (vector, 0, guest.state.rip), "user {user}");
            assert_eq!(machine.state().fpu.xmm[0], [0x3f80_0000, 0], "not written");
        }
    }
    Ok(())
}

/// 7.4.4: INT n for every n, without an error code even where the exception has one.
fn every_software_vector(bench: &Bench) -> Outcome {
    let mut guest = Guest::running(|a| {
        for vector in 0..=255 {
            a.int(vector)?;
        }
        Ok(())
    });
    // One handler for all: the stubs would expect error codes.
    let counter = guest.handler(0, |a| {
        count(a, 0)?;
        a.iretq()
    });
    (0..=255).for_each(|vector| guest.gate(vector, counter, INTERRUPT_GATE));
    run_to_end(bench, &guest)?;
    assert_eq!(guest.result(0), 256);
    Ok(())
}

/// 18.3.1.1: RF in the frame's flags, so that a restarted instruction breaks no second time.
fn faults_save_rf_and_traps_do_not(bench: &Bench) -> Outcome {
    const RF: u64 = 1 << 16;
    for (name, build, rf) in [
        ("ud2", (|a| a.ud2()) as Build, RF),
        ("page fault", |a| a.mov(rax, qword_ptr(WINDOW)), RF),
        ("int 0x40", |a| a.int(0x40), 0),
    ] {
        let trap = run_once(bench, &Guest::running(build))?.trap();
        assert_eq!(trap.rflags & RF, rf, "{name}");
    }
    Ok(())
}

/// 7.12.1.3; and NT, TF and RF are cleared for the handler, AC and the rest are not.
fn interrupt_gates_clear_if_and_trap_gates_do_not(bench: &Bench) -> Outcome {
    const DF: u64 = 1 << 10;
    for (gate, expected) in [(INTERRUPT_GATE, 0), (TRAP_GATE, IF)] {
        let mut guest = Guest::running(|a| a.ud2());
        let handler = guest.handler(6, |a| {
            a.pushfq()?;
            a.pop(rax)?;
            keep(a, 0, rax)?;
            // Over the two bytes of UD2, with the flags as they are.
            a.mov(rax, qword_ptr(rsp))?;
            a.lea(rax, ptr(rax + 2))?;
            a.mov(qword_ptr(rsp), rax)?;
            a.iretq()
        });
        guest.gate(6, handler, gate);
        guest.state.rflags = RFLAGS | IF | DF | 0x8d5;
        let state = run_to_end(bench, &guest)?;
        assert_eq!(guest.result(0), RFLAGS | expected | DF | 0x8d5);
        assert_eq!(state.rflags, RFLAGS | IF | DF | 0x8d5, "IRETQ brings them back");
    }
    Ok(())
}

/// 7.12.1.1: a gate of level 0 is not for INT n of level 3; exceptions do not care.
fn software_interrupts_check_the_gates_level(bench: &Bench) -> Outcome {
    bench.needs(&crate::abilities::USER_INT)?;
    let mut guest = Guest::new();
    guest.user(|a| a.int(0x80));
    let trap = run_once(bench, &guest)?.trap();
    assert_eq!((trap.vector, trap.error, trap.rip), (13, 0x80 * 8 + 2, USER_CODE));
    guest.gate(0x80, Guest::stub(0x80), USER_GATE);
    let trap = run_once(bench, &guest)?.trap();
    assert_eq!((trap.vector, trap.rip, trap.cs), (0x80, USER_CODE + 2, USER_CS.into()));
    Ok(())
}

/// 7.13: selector error codes, with IDT and EXT bits.
fn error_codes_name_the_gate(bench: &Bench) -> Outcome {
    let stub = Guest::stub(0x40);
    for (what, selector, attributes, vector, error) in [
        ("a gate that is not present", KERNEL_CS, 0x0e00, 11, 0x40 * 8 + 2),
        ("a task gate", KERNEL_CS, 0x8500, 13, 0x40 * 8 + 2),
        ("a null selector", 0, INTERRUPT_GATE, 13, 0),
        ("a data segment", KERNEL_SS, INTERRUPT_GATE, 13, KERNEL_SS.into()),
        ("a selector past the GDT", BEYOND_GDT, INTERRUPT_GATE, 13, BEYOND_GDT.into()),
        ("code of level 3", USER_CS & !3, INTERRUPT_GATE, 13, u64::from(USER_CS & !3)),
    ] {
        let guest = Guest::running(|a| a.int(0x40));
        guest.gate_through(0x40, selector, stub, attributes);
        let trap = run_once(bench, &guest)?.trap();
        assert_eq!((trap.vector, trap.error, trap.rip), (vector, error, CODE), "{what}");
    }
    let mut guest = Guest::running(|a| a.int(0x40));
    guest.state.idtr.limit = 0x40 * 16 + 14;
    let trap = run_once(bench, &guest)?.trap();
    assert_eq!((trap.vector, trap.error), (13, 0x40 * 8 + 2));
    Ok(())
}

/// 7.14.2: the frame begins at a multiple of 16.
fn frames_are_aligned(bench: &Bench) -> Outcome {
    for off in 0..16 {
        let mut guest = Guest::running(|a| a.ud2());
        guest.state.gpr[4] = STACK - off;
        let trap = run_once(bench, &guest)?.trap();
        let top = (STACK - off) & !15;
        assert_eq!((trap.rsp, trap.frame), (STACK - off, top - 40));
    }
    Ok(())
}

/// 7.14.5.
fn interrupt_stack_table(bench: &Bench) -> Outcome {
    for (entry, stack) in [(1, IST1), (2, IST2)] {
        for user in [false, true] {
            let mut guest = Guest::running(|a| a.ud2());
            if user {
                guest.user(|a| a.ud2());
            }
            guest.gate(6, Guest::stub(6), INTERRUPT_GATE | entry);
            let trap = run_once(bench, &guest)?.trap();
            assert_eq!((trap.vector, trap.frame), (6, stack - 40), "user {user}");
            assert_eq!(trap.rsp, guest.state.gpr[4]);
        }
    }
    Ok(())
}

/// 7.14.4: RSP0, and a null SS in the handler.
fn a_level_change_switches_to_rsp0(bench: &Bench) -> Outcome {
    let mut guest = Guest::new();
    guest.user(|a| a.int3());
    guest.call_handler(|a| {
        a.mov(ax, ss)?;
        a.movzx(rax, ax)?;
        keep(a, 0, rax)?;
        keep(a, 1, rsp)?;
        a.mov(ax, cs)?;
        a.movzx(rax, ax)?;
        keep(a, 2, rax)?;
        a.iretq()
    });
    let state = run_to_end(bench, &guest)?;
    assert_eq!(guest.results(), [0, RSP0 - 40, KERNEL_CS.into()]);
    assert_eq!((state.segments[1].selector, state.segments[2].selector), (USER_CS, USER_SS));
    assert_eq!((state.rip, state.gpr[4]), (USER_CODE + 1, USER_STACK));
    Ok(())
}

/// Handlers that raise exceptions themselves, three deep.
fn nested_exceptions_return_in_order(bench: &Bench) -> Outcome {
    let mut guest = Guest::running(|a| {
        a.mov(rcx, RESULTS)?;
        a.ud2()
    });
    let step = |a: &mut CodeAssembler, value: i32| {
        a.mov(qword_ptr(rcx), value)?;
        a.add(rcx, 8)
    };
    guest.handler(6, |a| {
        step(a, 1)?;
        a.xor(edx, edx)?;
        a.div(edx)?;
        step(a, 5)?;
        // Over the two bytes of UD2.
        a.add(qword_ptr(rsp), 2)?;
        a.iretq()
    });
    guest.handler(0, |a| {
        step(a, 2)?;
        // Not canonical, four bytes: #GP(0).
        a.bts(rdx, 63)?;
        a.mov(rdx, qword_ptr(rdx + 8))?;
        step(a, 4)?;
        // Over the two bytes of DIV.
        a.add(qword_ptr(rsp), 2)?;
        a.iretq()
    });
    guest.handler(13, |a| {
        step(a, 3)?;
        a.add(rsp, 8)?;
        // Over the four bytes of the load.
        a.add(qword_ptr(rsp), 4)?;
        a.iretq()
    });
    let state = run_to_end(bench, &guest)?;
    assert_eq!(guest.results(), [1, 2, 3, 4, 5]);
    assert_eq!(state.gpr[4], STACK);
    Ok(())
}

/// 7.15 and volume 2, IRET: what it refuses, it refuses before it changes anything.
fn a_fault_in_a_handlers_return(bench: &Bench) -> Outcome {
    let frame = |a: &mut CodeAssembler, selector: u16, target: u64, stack: u16| {
        a.push(i32::from(stack))?;
        a.push(0x5000)?;
        a.pushfq()?;
        a.push(i32::from(selector))?;
        a.mov(rax, target)?;
        a.push(rax)?;
        a.iretq()
    };
    bench.needs(&crate::abilities::CHECKED_IRET)?;
    for (what, selector, target, stack, vector, error) in [
        ("a null CS", 0, CODE, KERNEL_SS, 13, 0),
        ("a data segment as CS", KERNEL_SS, CODE, KERNEL_SS, 13, u64::from(KERNEL_SS)),
        ("an RIP that is not canonical", KERNEL_CS, 1 << 63, KERNEL_SS, 13, 0),
        ("a null SS for level 3", USER_CS, USER_CODE, 0, 13, 0),
        ("an SS of level 0 for level 3", USER_CS, USER_CODE, KERNEL_SS, 13, KERNEL_SS.into()),
    ] {
        let guest = Guest::running(|a| frame(a, selector, target, stack));
        let trap = run_once(bench, &guest)?.trap();
        assert_eq!((trap.vector, trap.error, trap.cs), (vector, error, KERNEL_CS.into()), "{what}");
        assert_eq!(trap.rsp, STACK - 40, "{what}");
    }
    Ok(())
}

/// 7.15, interrupt 8: a fault while #DF is delivered shuts the processor down.
fn triple_fault(bench: &Bench) -> Outcome {
    let mut guest = Guest::running(|a| a.ud2());
    guest.state.idtr.limit = 0;
    assert_eq!(run_once(bench, &guest)?, End::Shutdown);
    Ok(())
}
