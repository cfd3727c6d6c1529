//! The local APIC (chapter 12): registers, priorities, interrupts to itself, errors, and its x2APIC form.

use super::apic::*;
use super::*;

cases!(lapic:
    registers_read_back,
    an_interrupt_to_itself,
    the_highest_vector_comes_first,
    a_higher_class_interrupts_a_handler,
    the_task_priority_holds_back,
    cr8_is_the_task_priority,
    the_processor_priority_follows_what_is_in_service,
    an_eoi_ends_the_highest,
    a_disabled_apic_masks_its_entries,
    illegal_vectors_are_errors,
    x2apic_registers,
    x2apic_interrupt_to_itself,
    x2apic_refuses_what_is_not_there,
    x2apic_refuses_reserved_bits,
    forms_change_only_as_allowed,
    an_nmi_to_itself,
    nmis_wait_for_iret,
);

/// Keeps the order in which handlers ran: result 0 counts them, results from 1 on are their vectors.
fn noting_handler(guest: &mut Guest, vector: u8) {
    guest.handler(vector, |a| {
        a.push(rax)?;
        note(a, vector)?;
        end_of_interrupt(a)?;
        a.pop(rax)?;
        a.iretq()
    });
}

fn note(a: &mut CodeAssembler, vector: u8) -> Assembled {
    count(a, 0)?;
    a.mov(rax, qword_ptr(RESULTS))?;
    a.mov(qword_ptr(rax * 8 + RESULTS), i32::from(vector))
}

/// 12.4.1: what is kept of what is written.
fn registers_read_back(bench: &Bench) -> Outcome {
    let guest = Guest::running(|a| {
        enable(a)?;
        let written: [(u64, u32); 8] = [
            (TPR, 0x35),
            (LDR, 0x8112_3456),
            (DFR, 0x0fff_ffff),
            (LVT_TIMER, 0x3_0044),
            (LVT_LINT0, 0x1_0700),
            (LVT_ERROR, 0x1_0045),
            (DIVIDE, 0xf),
            (ICR_HIGH, 0x0512_3456),
        ];
        for (n, (register, value)) in (0..).zip(written) {
            lapic_write(a, register, value)?;
            lapic_read(a, register)?;
            keep(a, n, rax)?;
        }
        lapic_read(a, ID)?;
        keep(a, 8, rax)?;
        lapic_read(a, VERSION)?;
        keep(a, 9, rax)?;
        lapic_read(a, SVR)?;
        keep(a, 10, rax)
    });
    let state = run_to_end(bench, &guest)?;
    assert_eq!(
        guest.results::<9>(),
        [0x35, 0x8100_0000, 0x0fff_ffff, 0x3_0044, 0x1_0700, 0x1_0045, 0b1011, 0x0500_0000, 0]
    );
    let version = guest.result(9);
    assert!(version & 0xff >= 0x10 && version >> 16 & 0xff >= 5, "an integrated APIC: {version:#x}");
    assert_eq!(guest.result(10), 0x1ff);
    let lapic = state.lapic;
    assert_eq!((lapic.tpr, lapic.ldr, lapic.dfr, lapic.svr), (0x35, 0x8100_0000, 0x0fff_ffff, 0x1ff));
    assert_eq!((lapic.lvt[0], lapic.lvt[3], lapic.lvt[5]), (0x3_0044, 0x1_0700, 0x1_0045));
    assert_eq!((lapic.timer_divide, state.cr8), (0b1011, 3));
    Ok(())
}

/// 12.6.1, the destination shorthand.
fn an_interrupt_to_itself(bench: &Bench) -> Outcome {
    let mut guest = Guest::running(|a| {
        enable(a)?;
        a.sti()?;
        for n in 1..=3 {
            lapic_write(a, ICR, TO_SELF | ASSERT | 0x61)?;
            await_result(a, 0, n)?;
        }
        // By its own id, and to everybody.
        send(a, 0, ASSERT | 0x61)?;
        await_result(a, 0, 4)?;
        send(a, 0, TO_ALL | ASSERT | 0x61)?;
        await_result(a, 0, 5)?;
        send(a, 0xff, ASSERT | 0x61)?;
        await_result(a, 0, 6)?;
        // To all others: nobody.
        send(a, 0, TO_OTHERS | ASSERT | 0x61)?;
        give_time(a)
    });
    counting_handler(&mut guest, 0x61, 0);
    run_to_end(bench, &guest)?;
    assert_eq!(guest.result(0), 6);
    Ok(())
}

/// 12.8.4.
fn the_highest_vector_comes_first(bench: &Bench) -> Outcome {
    let order = [0xe1, 0x91, 0x90, 0x52, 0x31];
    let mut guest = Guest::running(|a| {
        enable(a)?;
        for vector in [0x52, 0xe1, 0x31, 0x90, 0x91] {
            lapic_write(a, ICR, TO_SELF | ASSERT | vector)?;
        }
        a.sti()?;
        await_result(a, 0, 5)
    });
    order.iter().for_each(|vector| noting_handler(&mut guest, *vector));
    run_to_end(bench, &guest)?;
    assert_eq!(guest.results(), [5, 0xe1, 0x91, 0x90, 0x52, 0x31]);
    Ok(())
}

/// 12.8.3.1: a handler that allows interrupts is interrupted by a higher class, and not by its own.
fn a_higher_class_interrupts_a_handler(bench: &Bench) -> Outcome {
    bench.needs(&crate::abilities::IN_SERVICE)?;
    let mut guest = Guest::running(|a| {
        enable(a)?;
        a.sti()?;
        lapic_write(a, ICR, TO_SELF | ASSERT | 0x55)?;
        await_result(a, 0, 4)
    });
    guest.handler(0x55, |a| {
        note(a, 0x55)?;
        a.sti()?;
        lapic_write(a, ICR, TO_SELF | ASSERT | 0x5f)?;
        lapic_write(a, ICR, TO_SELF | ASSERT | 0x60)?;
        give_time(a)?;
        a.cli()?;
        note(a, 0x56)?;
        end_of_interrupt(a)?;
        a.iretq()
    });
    [0x5f, 0x60].into_iter().for_each(|vector| noting_handler(&mut guest, vector));
    run_to_end(bench, &guest)?;
    assert_eq!(guest.results(), [4, 0x55, 0x60, 0x56, 0x5f]);
    Ok(())
}

/// 12.8.3.1.
fn the_task_priority_holds_back(bench: &Bench) -> Outcome {
    let mut guest = Guest::running(|a| {
        enable(a)?;
        lapic_write(a, TPR, 0x50)?;
        a.sti()?;
        lapic_write(a, ICR, TO_SELF | ASSERT | 0x5e)?;
        give_time(a)?;
        a.mov(rax, qword_ptr(RESULTS))?;
        keep(a, 8, rax)?;
        lapic_read(a, IRR + 0x20)?;
        keep(a, 9, rax)?;
        lapic_write(a, ICR, TO_SELF | ASSERT | 0x61)?;
        await_result(a, 0, 1)?;
        lapic_write(a, TPR, 0x40)?;
        await_result(a, 0, 2)
    });
    [0x5e, 0x61].into_iter().for_each(|vector| noting_handler(&mut guest, vector));
    run_to_end(bench, &guest)?;
    assert_eq!(guest.results(), [2, 0x61, 0x5e]);
    assert_eq!((guest.result(8), guest.result(9)), (0, 1 << 30));
    Ok(())
}

/// 12.8.6.
fn cr8_is_the_task_priority(bench: &Bench) -> Outcome {
    let mut guest = Guest::running(|a| {
        enable(a)?;
        a.mov(eax, 6)?;
        a.mov(cr8, rax)?;
        lapic_read(a, TPR)?;
        keep(a, 8, rax)?;
        lapic_write(a, TPR, 0x7c)?;
        a.mov(rax, cr8)?;
        keep(a, 9, rax)?;
        a.sti()?;
        lapic_write(a, ICR, TO_SELF | ASSERT | 0x71)?;
        give_time(a)?;
        a.mov(rax, qword_ptr(RESULTS))?;
        keep(a, 10, rax)?;
        a.mov(eax, 6)?;
        a.mov(cr8, rax)?;
        await_result(a, 0, 1)
    });
    noting_handler(&mut guest, 0x71);
    let state = run_to_end(bench, &guest)?;
    assert_eq!([8, 9, 10].map(|n| guest.result(n)), [0x60, 7, 0]);
    assert_eq!((state.cr8, state.lapic.tpr, guest.result(0)), (6, 0x60, 1));
    Ok(())
}

/// 12.8.3.1: PPR.
fn the_processor_priority_follows_what_is_in_service(bench: &Bench) -> Outcome {
    bench.needs(&crate::abilities::IN_SERVICE)?;
    let mut guest = Guest::running(|a| {
        enable(a)?;
        lapic_write(a, TPR, 0x23)?;
        lapic_read(a, PPR)?;
        keep(a, 1, rax)?;
        a.sti()?;
        lapic_write(a, ICR, TO_SELF | ASSERT | 0x8a)?;
        await_result(a, 0, 1)?;
        lapic_read(a, PPR)?;
        keep(a, 4, rax)
    });
    guest.handler(0x8a, |a| {
        count(a, 0)?;
        lapic_read(a, PPR)?;
        keep(a, 2, rax)?;
        lapic_read(a, ISR + 0x40)?;
        keep(a, 3, rax)?;
        end_of_interrupt(a)?;
        a.iretq()
    });
    run_to_end(bench, &guest)?;
    assert_eq!(guest.results(), [1, 0x23, 0x80, 1 << 10, 0x23]);
    Ok(())
}

/// 12.8.5: and one without anything in service does nothing.
fn an_eoi_ends_the_highest(bench: &Bench) -> Outcome {
    bench.needs(&crate::abilities::IN_SERVICE)?;
    let mut guest = Guest::running(|a| {
        enable(a)?;
        end_of_interrupt(a)?;
        a.sti()?;
        lapic_write(a, ICR, TO_SELF | ASSERT | 0x41)?;
        await_result(a, 0, 1)
    });
    guest.handler(0x41, |a| {
        count(a, 0)?;
        a.sti()?;
        lapic_write(a, ICR, TO_SELF | ASSERT | 0x82)?;
        await_result(a, 1, 1)?;
        a.cli()?;
        lapic_read(a, ISR + 0x20)?;
        keep(a, 4, rax)?;
        end_of_interrupt(a)?;
        lapic_read(a, ISR + 0x20)?;
        keep(a, 5, rax)?;
        a.iretq()
    });
    guest.handler(0x82, |a| {
        count(a, 1)?;
        lapic_read(a, ISR + 0x20)?;
        keep(a, 2, rax)?;
        end_of_interrupt(a)?;
        lapic_read(a, ISR + 0x40)?;
        keep(a, 3, rax)?;
        a.iretq()
    });
    run_to_end(bench, &guest)?;
    assert_eq!(guest.results(), [1, 1, 2, 0, 2, 0]);
    Ok(())
}

/// 12.4.7.2: the entries' mask bits are set, and stay so.
fn a_disabled_apic_masks_its_entries(bench: &Bench) -> Outcome {
    let guest = Guest::running(|a| {
        enable(a)?;
        lapic_write(a, LVT_TIMER, 0x44)?;
        lapic_write(a, SVR, 0xff)?;
        lapic_read(a, LVT_TIMER)?;
        keep(a, 0, rax)?;
        lapic_write(a, LVT_TIMER, 0x45)?;
        lapic_read(a, LVT_TIMER)?;
        keep(a, 1, rax)?;
        enable(a)?;
        lapic_read(a, LVT_TIMER)?;
        keep(a, 2, rax)?;
        lapic_write(a, LVT_TIMER, 0x46)?;
        lapic_read(a, LVT_TIMER)?;
        keep(a, 3, rax)
    });
    run_to_end(bench, &guest)?;
    assert_eq!(guest.results(), [0x1_0044, 0x1_0045, 0x1_0045, 0x46]);
    Ok(())
}

/// 12.5.3: the error status register, latched by a write, and the error interrupt.
fn illegal_vectors_are_errors(bench: &Bench) -> Outcome {
    const SEND_ILLEGAL: u64 = 1 << 5;
    const RECEIVE_ILLEGAL: u64 = 1 << 6;
    bench.needs(&crate::abilities::APIC_ERRORS)?;
    let mut guest = Guest::running(|a| {
        enable(a)?;
        lapic_write(a, LVT_ERROR, 0x46)?;
        a.sti()?;
        lapic_write(a, ICR, TO_SELF | ASSERT | 0x0f)?;
        await_result(a, 0, 1)?;
        lapic_write(a, ESR, 0)?;
        lapic_read(a, ESR)?;
        keep(a, 1, rax)?;
        lapic_write(a, ESR, 0)?;
        lapic_read(a, ESR)?;
        keep(a, 2, rax)
    });
    counting_handler(&mut guest, 0x46, 0);
    run_to_end(bench, &guest)?;
    assert_ne!(guest.result(1) & (SEND_ILLEGAL | RECEIVE_ILLEGAL), 0);
    assert_eq!((guest.result(0), guest.result(2)), (1, 0));
    Ok(())
}

const APIC_BASE: u32 = 0x1b;
const ENABLED: u32 = 1 << 11;
const X2APIC: u32 = 1 << 10;
const BOOT: u32 = 1 << 8;

pub(crate) fn write_msr(a: &mut CodeAssembler, msr: u32, value: u64) -> Assembled {
    a.mov(ecx, msr)?;
    a.mov(eax, value as u32)?;
    a.mov(edx, (value >> 32) as u32)?;
    a.wrmsr()
}

/// An MSR into result `n`.
pub(crate) fn keep_msr(a: &mut CodeAssembler, n: u64, msr: u32) -> Assembled {
    a.mov(ecx, msr)?;
    a.rdmsr()?;
    a.shl(rdx, 32)?;
    a.or(rax, rdx)?;
    keep(a, n, rax)
}

/// The MSR of a register of the page.
pub(crate) const fn x2apic(register: u64) -> u32 {
    0x800 + (register >> 4) as u32
}

/// Switches to x2APIC form and enables the local APIC.
pub(crate) fn enable_x2apic(a: &mut CodeAssembler) -> Assembled {
    write_msr(a, APIC_BASE, u64::from(LAPIC as u32 | ENABLED | X2APIC | BOOT))?;
    write_msr(a, x2apic(SVR), 0x1ff)
}

/// 12.12.1.2.
fn x2apic_registers(bench: &Bench) -> Outcome {
    let guest = Guest::running(|a| {
        enable_x2apic(a)?;
        write_msr(a, x2apic(TPR), 0x42)?;
        write_msr(a, x2apic(LVT_LINT0), 0x1_0700)?;
        write_msr(a, x2apic(DIVIDE), 0b11)?;
        for (n, register) in (0..).zip([ID, SVR, TPR, LDR, LVT_LINT0, DIVIDE, PPR, CURRENT_COUNT]) {
            keep_msr(a, n, x2apic(register))?;
        }
        keep_msr(a, 8, APIC_BASE)
    });
    let state = run_to_end(bench, &guest)?;
    assert_eq!(guest.results(), [0, 0x1ff, 0x42, 1, 0x1_0700, 0b11, 0x42, 0, 0xfee0_0d00]);
    assert_eq!((state.lapic.apic_base, state.lapic.id, state.cr8), (0xfee0_0d00, 0, 4));
    Ok(())
}

/// 12.12.9 and 12.12.11: by the command register, and by SELF IPI.
fn x2apic_interrupt_to_itself(bench: &Bench) -> Outcome {
    let mut guest = Guest::running(|a| {
        enable_x2apic(a)?;
        a.sti()?;
        write_msr(a, 0x83f, 0x61)?;
        await_result(a, 0, 1)?;
        write_msr(a, x2apic(ICR), u64::from(TO_SELF | ASSERT | 0x61))?;
        await_result(a, 0, 2)?;
        // Physical destination 0, logical cluster 0 member 0, and everybody.
        write_msr(a, x2apic(ICR), u64::from(ASSERT | 0x61))?;
        await_result(a, 0, 3)?;
        write_msr(a, x2apic(ICR), 1 << 32 | u64::from(LOGICAL | ASSERT | 0x61))?;
        await_result(a, 0, 4)?;
        write_msr(a, x2apic(ICR), 0xffff_ffff << 32 | u64::from(ASSERT | 0x61))?;
        await_result(a, 0, 5)?;
        write_msr(a, x2apic(ICR), 7 << 32 | u64::from(ASSERT | 0x61))?;
        give_time(a)
    });
    guest.handler(0x61, |a| {
        a.push(rax)?;
        a.push(rcx)?;
        a.push(rdx)?;
        count(a, 0)?;
        write_msr(a, x2apic(EOI), 0)?;
        a.pop(rdx)?;
        a.pop(rcx)?;
        a.pop(rax)?;
        a.iretq()
    });
    run_to_end(bench, &guest)?;
    assert_eq!(guest.result(0), 5);
    Ok(())
}

/// 12.12.1.2, 12.12.1.3: #GP(0) for registers that are read only or not there, and for more than 32 bits.
fn x2apic_refuses_what_is_not_there(bench: &Bench) -> Outcome {
    const REFUSED: [(u64, u64); 8] =
        [(SVR, 1 << 32), (ID, 0), (VERSION, 0), (PPR, 0), (LDR, 0), (DFR, 0), (ISR, 0), (ICR_HIGH, 0)];
    x2apic_refuses(bench, &REFUSED)
}

/// 12.12.1.3: #GP(0) where the page would ignore it.
fn x2apic_refuses_reserved_bits(bench: &Bench) -> Outcome {
    bench.needs(&crate::abilities::X2APIC_RESERVED_BITS)?;
    x2apic_refuses(bench, &[(TPR, 0x100), (EOI, 1), (ESR, 1), (LVT_TIMER, 1 << 20), (DIVIDE, 0b100), (0x3f0, 0x100)])
}

fn x2apic_refuses(bench: &Bench, writes: &[(u64, u64)]) -> Outcome {
    for &(register, value) in writes {
        let guest = Guest::running(|a| {
            enable_x2apic(a)?;
            count(a, 0)?;
            write_msr(a, x2apic(register), value)
        });
        let trap = run_once(bench, &guest)?.trap_of(|| format!("{register:#x} {value:#x}"));
        assert_eq!((trap.vector, trap.error, guest.result(0)), (13, 0, 1), "{register:#x} {value:#x}");
        assert_eq!(trap.gpr[1], u64::from(x2apic(register)));
    }
    Ok(())
}

/// 12.12.5: from x2APIC form only through disabled, and x2APIC form only from enabled; no registers by the other way.
fn forms_change_only_as_allowed(bench: &Bench) -> Outcome {
    let base = u64::from(LAPIC as u32 | BOOT);
    for (from, to, allowed) in [
        (ENABLED, ENABLED | X2APIC, true),
        (ENABLED, 0, true),
        (ENABLED, X2APIC, false),
        (ENABLED | X2APIC, ENABLED, false),
        (ENABLED | X2APIC, 0, true),
        (0, ENABLED | X2APIC, false),
        (0, ENABLED, true),
    ] {
        let guest = Guest::running(|a| {
            write_msr(a, APIC_BASE, base | u64::from(from))?;
            count(a, 0)?;
            write_msr(a, APIC_BASE, base | u64::from(to))?;
            keep_msr(a, 1, APIC_BASE)
        });
        let end = run_once(bench, &guest)?;
        if allowed {
            assert_eq!((end, guest.result(1)), (End::Done, base | u64::from(to)), "{from:#x} to {to:#x}");
        } else {
            let trap = end.trap();
            assert_eq!((trap.vector, trap.error, guest.result(0)), (13, 0, 1), "{from:#x} to {to:#x}");
        }
    }
    // The MSRs do not exist in xAPIC form.
    let guest = Guest::running(|a| keep_msr(a, 0, x2apic(ID)));
    assert_eq!(run_once(bench, &guest)?.trap().vector, 13);
    Ok(())
}

/// 7.7: whatever IF and the task priority say.
fn an_nmi_to_itself(bench: &Bench) -> Outcome {
    let mut guest = Guest::running(|a| {
        enable(a)?;
        lapic_write(a, TPR, 0xf0)?;
        for n in 1..=3 {
            send(a, 0, ASSERT | NMI)?;
            await_result(a, 0, n)?;
        }
        Ok(())
    });
    guest.handler(2, |a| {
        count(a, 0)?;
        a.iretq()
    });
    run_to_end(bench, &guest)?;
    assert_eq!(guest.result(0), 3);
    Ok(())
}

/// 7.7.1: one NMI waits while another is handled, and IRET lets it in.
fn nmis_wait_for_iret(bench: &Bench) -> Outcome {
    let mut guest = Guest::running(|a| {
        enable(a)?;
        send(a, 0, ASSERT | NMI)?;
        await_result(a, 0, 2)?;
        give_time(a)
    });
    guest.handler(2, |a| {
        let mut again = a.create_label();
        a.push(rax)?;
        count(a, 0)?;
        a.cmp(qword_ptr(RESULTS), 1)?;
        a.jne(again)?;
        // Three more while this one is handled: one waits.
        for _ in 0..3 {
            send(a, 0, ASSERT | NMI)?;
        }
        give_time(a)?;
        a.mov(rax, qword_ptr(RESULTS))?;
        keep(a, 1, rax)?;
        a.set_label(&mut again)?;
        a.pop(rax)?;
        a.iretq()
    });
    run_to_end(bench, &guest)?;
    assert_eq!(guest.results(), [2, 1]);
    Ok(())
}
