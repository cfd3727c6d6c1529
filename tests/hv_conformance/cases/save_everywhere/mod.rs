//! A machine saved at every point of a program and gone on with elsewhere ends as one that was never saved.
//!
//! A program stops at its points: writes to a port, and accesses that its handler answers. At each of them the whole
//! machine but its memory is saved, a fresh one is made over the same memory by the next engine of a round, and goes on.
//! One engine alone is a round, and an engine and the software one in turn (`across_…`) are another.

mod programs;

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use kiln::hv::state::IrqChipState;
use kiln::hv::state::VcpuState;
use kiln::hv::state::x86_64::Activity;

use super::apic::*;
use super::*;
use crate::abilities::Ability;
use crate::bus::Access;

cases!(save_everywhere:
    registers_and_flags,
    control_state,
    pending_interrupts,
    interrupts_in_service,
    interrupt_shadows,
    an_armed_timer,
    an_armed_deadline,
    masked_nmis,
    strings_of_ports,
    strings_of_registers,
    floating_point,
    level_3,
    system_calls,
    exceptions,
    paging,
    single_steps,
    code_that_changes,
    a_halted_machine,
    across_registers_and_flags,
    across_control_state,
    across_pending_interrupts,
    across_interrupts_in_service,
    across_interrupt_shadows,
    across_an_armed_timer,
    across_an_armed_deadline,
    across_masked_nmis,
    across_strings_of_ports,
    across_strings_of_registers,
    across_floating_point,
    across_level_3,
    across_system_calls,
    across_exceptions,
    across_paging,
    across_single_steps,
    across_code_that_changes,
    across_a_halted_machine,
);

/// A program: the guest, what its reads are answered, whether every access is a point, and what it needs of engines.
struct Program {
    guest: Guest,
    answers: Vec<u64>,
    every_access: bool,
    needs: &'static [&'static Ability],
    /// Whether it looks at the time stamp counter, whose rate is part of a profile.
    tells_time: bool,
}

impl From<Guest> for Program {
    fn from(guest: Guest) -> Self {
        Self { guest, answers: Vec::new(), every_access: false, needs: &[], tells_time: false }
    }
}

/// What must be the same at the end, however often the machine was saved.
#[derive(Debug, PartialEq)]
struct Outcomes {
    state: VcpuState,
    irqchip: IrqChipState,
    accesses: Vec<Access>,
    results: Vec<u8>,
    data: Vec<u8>,
}

impl Outcomes {
    fn of(machine: &mut Machine, mut accesses: Vec<Access>, guest: &Guest) -> Self {
        accesses.extend(machine.accesses());
        Self {
            state: timeless(machine.state()),
            irqchip: machine.vm.save_irqchip().expect("saves"),
            accesses,
            results: guest.bytes(RESULTS, 0x1000),
            data: guest.bytes(DATA, 0x1_0000),
        }
    }
}

/// A state without what time alone changes, and without the x87 pointers, which processors may drop (volume 1, 8.1.8).
/// A timer that has expired may read as one that was never started. RF ends with the next instruction, and an engine
/// without instruction breakpoints need not know it.
fn timeless(mut state: VcpuState) -> VcpuState {
    const RF: u64 = 1 << 16;
    state.msrs.tsc = 0;
    state.rflags &= !RF;
    if state.lapic.timer_left_ns.is_none() {
        state.lapic.timer_initial = 0;
    }
    (state.lapic.timer_left_ns, state.lapic.tsc_deadline) = (None, 0);
    (state.fpu.fip, state.fpu.fdp, state.fpu.fop) = (0, 0, 0);
    state
}

/// Runs the program without saving it, past all of its points.
fn uninterrupted(bench: &Bench, program: &Program) -> Result<(Outcomes, u64), Skip> {
    let mut machine = Machine::answering(bench, &program.guest, &program.answers)?;
    let mut points = 0;
    while let End::Point(_) = expected(machine.run()?) {
        points += 1;
    }
    Ok((Outcomes::of(&mut machine, Vec::new(), &program.guest), points))
}

/// Runs the program on the engines of `round` in turn, changing at every point.
fn saved(round: &[&Bench], program: &Program) -> Result<(Outcomes, u64), Skip> {
    let mut engines = round.iter().cycle();
    let mut next = || *engines.next().expect("a round has an engine");
    let mut machine = Machine::answering(next(), &program.guest, &program.answers)?;
    let mut accesses = Vec::new();
    let mut points = 0;
    loop {
        if program.every_access {
            machine.bus.stop_at_every_access();
        }
        if expected(machine.run()?) == End::Done {
            return Ok((Outcomes::of(&mut machine, accesses, &program.guest), points));
        }
        points += 1;
        machine = moved(machine, next(), &program.guest, &mut accesses)?;
    }
}

#[track_caller]
fn expected(end: End) -> End {
    assert!(matches!(end, End::Done | End::Point(_)), "{end:x?}");
    end
}

/// Saves the machine, drops it, and goes on under another.
fn moved(mut from: Machine, to: &Bench, guest: &Guest, accesses: &mut Vec<Access>) -> Result<Machine, Skip> {
    from.vm.stop_time();
    let mut state = from.state();
    pass_stop(&mut state, &guest.ram);
    let irqchip = from.vm.save_irqchip().expect("saves");
    // After the state: an engine may have to complete an access for it.
    accesses.extend(from.accesses());
    let answers = from.bus.answers();
    drop(from);
    let mut into = Machine::over(to, &guest.ram, &answers)?;
    into.vm.stop_time();
    into.restore(&state);
    into.vm.restore_irqchip(&irqchip).expect("a valid state");
    let again = (timeless(into.state()), into.vm.save_irqchip().expect("saves"));
    assert_eq!(again, (timeless(state), irqchip), "restored under {}", to.engine_name());
    into.vm.start_time();
    Ok(into)
}

/// Under one engine.
fn same(bench: &Bench, program: fn() -> Program) -> Outcome {
    compare(bench, &[bench], program)
}

/// Under this engine and a software engine of its own in turn. No program asks CPUID, so that those which tell no time go
/// on under another profile too.
fn across(bench: &Bench, program: fn() -> Program) -> Outcome {
    let soft = if program().tells_time { soft_of_same_profile(bench)? } else { bench.beside() };
    compare(bench, &[bench, &soft], program)
}

fn compare(bench: &Bench, round: &[&Bench], program: fn() -> Program) -> Outcome {
    for ability in program().needs {
        round.iter().try_for_each(|bench| bench.needs(ability))?;
    }
    let (reference, _) = uninterrupted(bench, &program())?;
    let (outcomes, points) = saved(round, &program())?;
    assert!(points > 0, "nothing was saved");
    assert_eq!(outcomes.accesses, reference.accesses, "accesses");
    assert_eq!(outcomes.results, reference.results, "results");
    assert_eq!(outcomes.state, reference.state, "state");
    assert_eq!(outcomes, reference);
    Ok(())
}

macro_rules! programs {
    ($($name:ident, $across:ident: $program:path;)+) => {$(
        fn $name(bench: &Bench) -> Outcome {
            same(bench, $program)
        }

        fn $across(bench: &Bench) -> Outcome {
            across(bench, $program)
        }
    )+};
}

programs! {
    registers_and_flags, across_registers_and_flags: programs::arithmetic;
    control_state, across_control_state: programs::controls;
    pending_interrupts, across_pending_interrupts: programs::waiting;
    interrupts_in_service, across_interrupts_in_service: programs::in_service;
    interrupt_shadows, across_interrupt_shadows: programs::shadows;
    an_armed_timer, across_an_armed_timer: programs::timer;
    an_armed_deadline, across_an_armed_deadline: programs::deadline;
    masked_nmis, across_masked_nmis: programs::nmis;
    strings_of_ports, across_strings_of_ports: programs::port_strings;
    strings_of_registers, across_strings_of_registers: programs::register_strings;
    floating_point, across_floating_point: programs::fpu;
    level_3, across_level_3: programs::user;
    system_calls, across_system_calls: programs::calls;
    exceptions, across_exceptions: programs::faults;
    paging, across_paging: programs::tables;
    single_steps, across_single_steps: programs::steps;
    code_that_changes, across_code_that_changes: programs::changing_code;
}

/// Kicks the machine until it is found in HLT, moves it, and ends the halt by a line of the new one.
fn halted(bench: &Bench, to: &Bench) -> Outcome {
    let mut guest = Guest::running(|a| {
        enable(a)?;
        redirect(a, 4, 0x44)?;
        point(a, 1)?;
        halt_until(a, 0, 1)
    });
    programs::noting(&mut guest, 0x44, false);
    let mut machine = Machine::new(bench, &guest)?;
    machine.run()?.point();
    loop {
        let kick = Arc::clone(&machine.kick);
        let kicker = thread::spawn(move || {
            thread::sleep(Duration::from_millis(5));
            kick.kick();
        });
        let end = machine.run()?;
        kicker.join().expect("no panic");
        assert_eq!(end, End::Kicked);
        if machine.state().activity == Activity::Halted {
            break;
        }
    }
    let mut machine = moved(machine, to, &guest, &mut Vec::new())?;
    machine.bus.line(4).raise();
    machine.run()?.done();
    assert_eq!((guest.result(0), guest.result(1)), (1, 0x44));
    Ok(())
}

fn a_halted_machine(bench: &Bench) -> Outcome {
    halted(bench, bench)
}

fn across_a_halted_machine(bench: &Bench) -> Outcome {
    let soft = bench.beside();
    halted(bench, &soft)?;
    halted(&soft, bench)
}
