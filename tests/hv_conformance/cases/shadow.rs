//! Between instructions: interrupt shadows (7.8.3) and single-stepping (19.3.1.4).

use super::apic::*;
use super::*;

cases!(shadow:
    sti_lets_one_instruction_run,
    cli_right_after_sti,
    sti_without_effect_has_no_shadow,
    a_restored_shadow_holds_an_interrupt_back,
    without_a_shadow_an_interrupt_comes_first,
    single_steps_name_every_instruction,
    a_single_step_of_each_repetition,
    handlers_are_not_stepped,
    level_3_is_stepped,
);

const VECTOR: u8 = 0x61;

/// A handler that keeps the RIP it interrupts as result 0, and ends the run.
fn reporting(guest: &mut Guest) {
    guest.handler(VECTOR, |a| {
        a.mov(rax, qword_ptr(rsp))?;
        keep(a, 0, rax)?;
        end_of_interrupt(a)?;
        finish(a)
    });
}

/// A guest to which an interrupt is pending when it comes to [`SECOND_CODE`], interrupts off.
fn pending(build: impl FnOnce(&mut CodeAssembler) -> Assembled) -> Guest {
    let mut guest = Guest::running(|a| {
        enable(a)?;
        lapic_write(a, ICR, TO_SELF | ASSERT | u32::from(VECTOR))?;
        a.mov(rbx, SECOND_CODE)?;
        a.jmp(rbx)
    });
    guest.code_at(SECOND_CODE, build);
    reporting(&mut guest);
    guest
}

fn sti_lets_one_instruction_run(bench: &Bench) -> Outcome {
    bench.needs(&crate::abilities::PROMPT_INTERRUPTS)?;
    let guest = pending(|a| {
        a.sti()?;
        a.inc(ecx)?;
        a.inc(ecx)?;
        a.inc(ecx)
    });
    let state = run_to_end(bench, &guest)?;
    assert_eq!((guest.result(0), state.gpr[1]), (SECOND_CODE + 3, 1));
    Ok(())
}

fn cli_right_after_sti(bench: &Bench) -> Outcome {
    let guest = pending(|a| {
        a.sti()?;
        a.cli()?;
        give_time(a)?;
        a.mov(ecx, 5)
    });
    let state = run_to_end(bench, &guest)?;
    assert_eq!((guest.result(0), state.gpr[1]), (0, 5));
    Ok(())
}

/// With IF set already, STI delays nothing: the interrupt comes at the first boundary.
fn sti_without_effect_has_no_shadow(bench: &Bench) -> Outcome {
    bench.needs(&crate::abilities::PROMPT_INTERRUPTS)?;
    let guest = pending(|a| {
        a.pushfq()?;
        a.or(dword_ptr(rsp), IF as i32)?;
        a.popfq()?;
        a.sti()?;
        a.inc(ecx)
    });
    run_to_end(bench, &guest)?;
    // PUSHFQ, OR with an immediate of four bytes, POPFQ.
    assert_eq!(guest.result(0), SECOND_CODE + 1 + 7 + 1);
    Ok(())
}

/// A state in which an interrupt waits and is allowed.
fn restored(shadow: bool) -> Guest {
    let mut guest = Guest::running(|a| {
        a.inc(ecx)?;
        a.inc(ecx)
    });
    reporting(&mut guest);
    guest.state.rflags |= IF;
    guest.state.lapic.svr = 0x1ff;
    guest.state.lapic.irr[usize::from(VECTOR / 32)] = 1 << (VECTOR % 32);
    guest.state.interrupt_shadow = shadow;
    guest
}

fn a_restored_shadow_holds_an_interrupt_back(bench: &Bench) -> Outcome {
    bench.needs(&crate::abilities::PROMPT_INTERRUPTS)?;
    let guest = restored(true);
    let state = run_to_end(bench, &guest)?;
    assert_eq!((guest.result(0), state.gpr[1]), (CODE + 2, 1));
    Ok(())
}

fn without_a_shadow_an_interrupt_comes_first(bench: &Bench) -> Outcome {
    let guest = restored(false);
    let state = run_to_end(bench, &guest)?;
    assert_eq!((guest.result(0), state.gpr[1]), (CODE, 0));
    Ok(())
}

/// A debug handler that notes RIPs from result 1 on, and DR6 in result 40; result 0 counts.
fn stepper(guest: &mut Guest) {
    guest.handler(1, |a| {
        a.push(rax)?;
        a.push(rbx)?;
        count(a, 0)?;
        a.mov(rax, qword_ptr(RESULTS))?;
        a.mov(rbx, qword_ptr(rsp + 16))?;
        a.mov(qword_ptr(rax * 8 + RESULTS), rbx)?;
        a.mov(rax, dr6)?;
        keep(a, 40, rax)?;
        a.pop(rbx)?;
        a.pop(rax)?;
        a.iretq()
    });
}

/// Sets TF with POPFQ and executes `build`; then clears it.
fn stepped(build: impl FnOnce(&mut CodeAssembler) -> Assembled) -> Guest {
    const TF: i32 = 1 << 8;
    let mut guest = Guest::running(|a| {
        a.pushfq()?;
        a.or(dword_ptr(rsp), TF)?;
        a.mov(rbx, SECOND_CODE)?;
        a.popfq()?;
        a.jmp(rbx)
    });
    guest.code_at(SECOND_CODE, |a| {
        build(a)?;
        a.pushfq()?;
        a.and(dword_ptr(rsp), !TF)?;
        a.popfq()
    });
    stepper(&mut guest);
    guest
}

/// The RIPs noted, from the one after the jump to the one before POPFQ takes effect, as offsets.
fn noted(guest: &Guest) -> Vec<u64> {
    let count = guest.result(0);
    (1..=count).map(|n| guest.result(n).wrapping_sub(SECOND_CODE)).collect()
}

fn single_steps_name_every_instruction(bench: &Bench) -> Outcome {
    let guest = stepped(|a| {
        a.inc(ecx)?;
        a.add(rcx, rax)?;
        a.nop()?;
        a.mov(edx, 5)
    });
    let mut machine = Machine::new(bench, &guest)?;
    machine.run()?.done();
    // After the jump; INC; ADD; NOP; MOV; then PUSHFQ, AND, POPFQ, whose own trap still comes.
    assert_eq!(noted(&guest), [0, 2, 5, 6, 11, 12, 19, 20]);
    assert_eq!(guest.result(40) & 1 << 14, 1 << 14, "DR6.BS");
    Ok(())
}

fn a_single_step_of_each_repetition(bench: &Bench) -> Outcome {
    bench.needs(&crate::abilities::STEPPED_REPETITIONS)?;
    let mut guest = stepped(|a| a.rep().stosb());
    guest.state.gpr[1] = 3;
    guest.state.gpr[7] = DATA;
    run_to_end(bench, &guest)?;
    // Twice before it is over, and once after.
    assert_eq!(noted(&guest)[..5], [0, 0, 0, 2, 3]);
    Ok(())
}

/// 7.12.1.3: TF is cleared for the handler, and IRETQ brings it back.
fn handlers_are_not_stepped(bench: &Bench) -> Outcome {
    // By INT3 of level 3 first, which every host has.
    let mut user = Guest::new();
    user.user(|a| {
        a.int3()?;
        a.nop()
    });
    stepper(&mut user);
    user.call_handler(|a| {
        a.nop()?;
        a.nop()?;
        a.iretq()
    });
    user.state.rflags |= 1 << 8;
    run_to_end(bench, &user)?;
    assert_eq!(user.results(), [1, USER_CODE + 2], "level 3");
    let mut guest = stepped(|a| {
        a.int(0x40)?;
        a.nop()
    });
    guest.handler(0x40, |a| {
        a.nop()?;
        a.nop()?;
        a.iretq()
    });
    run_to_end(bench, &guest)?;
    let noted = noted(&guest);
    assert!(noted.iter().all(|rip| *rip < 0x100), "{noted:x?}");
    // IRETQ restores TF, and the trap after it is that of the next instruction.
    assert_eq!(noted[..3], [0, 3, 4]);
    Ok(())
}

fn level_3_is_stepped(bench: &Bench) -> Outcome {
    let mut guest = Guest::new();
    guest.user(|a| {
        a.nop()?;
        a.inc(ecx)?;
        a.ud2()
    });
    stepper(&mut guest);
    guest.state.rflags |= 1 << 8;
    let trap = run_once(bench, &guest)?.trap();
    assert_eq!((trap.vector, trap.rip), (6, USER_CODE + 3));
    assert_eq!((guest.result(0), guest.result(1), guest.result(2)), (2, USER_CODE + 1, USER_CODE + 3));
    Ok(())
}
