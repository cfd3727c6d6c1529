//! The local APIC's timer (12.5.4), the time stamp counter (19.17), and HLT with everything that ends it.

use super::apic::*;
use super::lapic::keep_msr;
use super::lapic::write_msr;
use super::*;
use crate::bus::LATER_PORT;

cases!(timers:
    one_shot_fires_once,
    periodic_fires_again,
    the_count_goes_down,
    a_masked_timer_is_silent,
    a_zero_count_stops,
    the_divisor_stretches_the_count,
    tsc_deadline_fires_once,
    a_deadline_in_the_past_fires_at_once,
    a_zero_deadline_disarms,
    modes_ignore_each_others_registers,
    the_tsc_goes_on_and_can_be_set,
    time_stands_still_between_stop_and_start,
    halt_ends_by_the_timer,
    halt_ends_by_the_deadline,
    halt_ends_by_a_line,
    halt_ends_by_what_already_waits,
    halt_without_interrupts_stays,
    halt_ends_by_an_nmi_without_if,
);

const VECTOR: u8 = 0x46;
/// Input ticks: a millisecond, at the 1 GHz that every engine has.
const MILLISECOND: u32 = 1_000_000;
const DEADLINE: u32 = 0x6e0;
const TSC: u32 = 0x10;

fn arm(a: &mut CodeAssembler, mode: u32, count: u32) -> Assembled {
    lapic_write(a, DIVIDE, DIVIDE_BY_1)?;
    lapic_write(a, LVT_TIMER, mode | u32::from(VECTOR))?;
    lapic_write(a, INITIAL_COUNT, count)
}

/// RDTSC as one value in RAX; RDX is lost.
fn read_tsc(a: &mut CodeAssembler) -> Assembled {
    a.rdtsc()?;
    a.shl(rdx, 32)?;
    a.or(rax, rdx)
}

/// Spins until `ticks` of the TSC have gone by; RAX, RDX and RBX are lost.
fn wait_ticks(a: &mut CodeAssembler, ticks: u64) -> Assembled {
    let mut wait = a.create_label();
    read_tsc(a)?;
    a.mov(rbx, ticks)?;
    a.add(rbx, rax)?;
    a.set_label(&mut wait)?;
    read_tsc(a)?;
    a.cmp(rax, rbx)?;
    a.jb(wait)
}

/// How fast the time stamp counter runs.
fn hz(machine: &Machine) -> u64 {
    machine.vm.time_stamp().map_or(1_000_000_000, |now| now.hz)
}

fn counted(build: impl FnOnce(&mut CodeAssembler) -> Assembled) -> Guest {
    let mut guest = Guest::running(|a| {
        enable(a)?;
        build(a)
    });
    counting_handler(&mut guest, VECTOR, 0);
    guest
}

fn one_shot_fires_once(bench: &Bench) -> Outcome {
    let guest = counted(|a| {
        a.sti()?;
        arm(a, 0, MILLISECOND)?;
        await_result(a, 0, 1)?;
        lapic_read(a, CURRENT_COUNT)?;
        keep(a, 1, rax)?;
        lapic_read(a, INITIAL_COUNT)?;
        keep(a, 2, rax)?;
        wait_ticks(a, 3 * u64::from(MILLISECOND))
    });
    run_to_end(bench, &guest)?;
    assert_eq!(guest.results(), [1, 0, MILLISECOND.into()]);
    Ok(())
}

fn periodic_fires_again(bench: &Bench) -> Outcome {
    let guest = counted(|a| {
        a.sti()?;
        arm(a, PERIODIC, MILLISECOND)?;
        await_result(a, 0, 4)?;
        // Stopped, it stays so; one may have been under way.
        lapic_write(a, INITIAL_COUNT, 0)?;
        give_time(a)?;
        a.mov(rax, qword_ptr(RESULTS))?;
        keep(a, 1, rax)?;
        wait_ticks(a, 3 * u64::from(MILLISECOND))
    });
    run_to_end(bench, &guest)?;
    assert!(guest.result(0) >= 4);
    assert_eq!(guest.result(0), guest.result(1));
    Ok(())
}

fn the_count_goes_down(bench: &Bench) -> Outcome {
    let guest = counted(|a| {
        arm(a, MASKED, u32::MAX)?;
        for n in 1..=4 {
            lapic_read(a, CURRENT_COUNT)?;
            keep(a, n, rax)?;
            wait_ticks(a, 100_000)?;
        }
        Ok(())
    });
    let mut machine = Machine::new(bench, &guest)?;
    machine.run()?.done();
    let counts = [1, 2, 3, 4].map(|n| guest.result(n));
    // No less than the time that passed, but for the clocks' rounding.
    let least = 90_000 * 1_000_000 / (hz(&machine) / 1000);
    assert!(counts.windows(2).all(|pair| pair[0] - pair[1] >= least), "{counts:?}, {least} a step");
    Ok(())
}

/// Whether what expired while it was masked comes when it no longer is, engines do not agree on, and nobody may rely on.
fn a_masked_timer_is_silent(bench: &Bench) -> Outcome {
    let guest = counted(|a| {
        a.sti()?;
        arm(a, MASKED, MILLISECOND / 10)?;
        wait_ticks(a, u64::from(MILLISECOND))?;
        lapic_read(a, CURRENT_COUNT)?;
        keep(a, 1, rax)
    });
    run_to_end(bench, &guest)?;
    assert_eq!(guest.results(), [0, 0]);
    Ok(())
}

fn a_zero_count_stops(bench: &Bench) -> Outcome {
    let guest = counted(|a| {
        arm(a, 0, MILLISECOND)?;
        lapic_write(a, INITIAL_COUNT, 0)?;
        lapic_read(a, CURRENT_COUNT)?;
        keep(a, 1, rax)?;
        a.sti()?;
        wait_ticks(a, 2 * u64::from(MILLISECOND))
    });
    run_to_end(bench, &guest)?;
    assert_eq!(guest.results(), [0, 0]);
    Ok(())
}

/// The time stamp before the timer is armed and after it fired, for a divisor of 1 and of 16.
fn the_divisor_stretches_the_count(bench: &Bench) -> Outcome {
    let guest = counted(|a| {
        a.sti()?;
        for (n, divide) in [(1, DIVIDE_BY_1), (2, 0b0011)] {
            // Nothing to count: Linux's KVM lets a timer that has expired expire again when its divisor changes.
            lapic_write(a, INITIAL_COUNT, 0)?;
            lapic_write(a, LVT_TIMER, VECTOR.into())?;
            lapic_write(a, DIVIDE, divide)?;
            read_tsc(a)?;
            a.mov(rbx, rax)?;
            lapic_write(a, INITIAL_COUNT, MILLISECOND / 4)?;
            await_result(a, 0, n)?;
            read_tsc(a)?;
            a.sub(rax, rbx)?;
            keep(a, n as u64, rax)?;
        }
        Ok(())
    });
    let mut machine = Machine::new(bench, &guest)?;
    machine.run()?.done();
    let least = |nanoseconds: u64| nanoseconds * (hz(&machine) / 1_000_000) / 1000 * 95 / 100;
    let quarter = u64::from(MILLISECOND / 4);
    assert!(guest.result(1) >= least(quarter), "{} ticks", guest.result(1));
    assert!(guest.result(2) >= least(quarter * 16), "{} ticks", guest.result(2));
    Ok(())
}

/// Arms the deadline `ticks` from now.
fn arm_deadline(a: &mut CodeAssembler, ticks: i32) -> Assembled {
    read_tsc(a)?;
    a.add(rax, ticks)?;
    a.mov(rdx, rax)?;
    a.shr(rdx, 32)?;
    a.mov(ecx, DEADLINE)?;
    a.wrmsr()
}

/// 12.5.4.1.
fn tsc_deadline_fires_once(bench: &Bench) -> Outcome {
    let guest = counted(|a| {
        lapic_write(a, LVT_TIMER, TSC_DEADLINE | u32::from(VECTOR))?;
        a.sti()?;
        arm_deadline(a, 2_000_000)?;
        keep_msr(a, 1, DEADLINE)?;
        await_result(a, 0, 1)?;
        read_tsc(a)?;
        keep(a, 2, rax)?;
        keep_msr(a, 3, DEADLINE)?;
        wait_ticks(a, 3_000_000)
    });
    run_to_end(bench, &guest)?;
    let [fired, deadline, then, after] = guest.results();
    assert_eq!((fired, after), (1, 0));
    assert!(deadline != 0 && then >= deadline, "{deadline} {then}");
    Ok(())
}

fn a_deadline_in_the_past_fires_at_once(bench: &Bench) -> Outcome {
    let guest = counted(|a| {
        lapic_write(a, LVT_TIMER, TSC_DEADLINE | u32::from(VECTOR))?;
        a.sti()?;
        wait_ticks(a, 1000)?;
        write_msr(a, DEADLINE, 1)?;
        await_result(a, 0, 1)
    });
    run_to_end(bench, &guest)?;
    assert_eq!(guest.result(0), 1);
    Ok(())
}

fn a_zero_deadline_disarms(bench: &Bench) -> Outcome {
    let guest = counted(|a| {
        lapic_write(a, LVT_TIMER, TSC_DEADLINE | u32::from(VECTOR))?;
        arm_deadline(a, 2_000_000)?;
        write_msr(a, DEADLINE, 0)?;
        a.sti()?;
        wait_ticks(a, 4_000_000)?;
        keep_msr(a, 1, DEADLINE)
    });
    run_to_end(bench, &guest)?;
    assert_eq!(guest.results(), [0, 0]);
    Ok(())
}

/// 12.5.4.1: the count does nothing in deadline mode, and the deadline nothing in the others.
fn modes_ignore_each_others_registers(bench: &Bench) -> Outcome {
    let guest = counted(|a| {
        lapic_write(a, DIVIDE, DIVIDE_BY_1)?;
        lapic_write(a, LVT_TIMER, TSC_DEADLINE | u32::from(VECTOR))?;
        lapic_write(a, INITIAL_COUNT, 1000)?;
        lapic_read(a, CURRENT_COUNT)?;
        keep(a, 1, rax)?;
        a.sti()?;
        wait_ticks(a, u64::from(MILLISECOND))?;
        lapic_write(a, LVT_TIMER, VECTOR.into())?;
        arm_deadline(a, 1000)?;
        keep_msr(a, 2, DEADLINE)?;
        wait_ticks(a, u64::from(MILLISECOND))
    });
    run_to_end(bench, &guest)?;
    assert_eq!(guest.results(), [0, 0, 0]);
    Ok(())
}

/// 19.17.1, 19.17.3: RDTSC, RDTSCP and the MSR are one counter.
fn the_tsc_goes_on_and_can_be_set(bench: &Bench) -> Outcome {
    const SET: u64 = 0x1234_0000_0000;
    let mut guest = Guest::running(|a| {
        read_tsc(a)?;
        keep(a, 0, rax)?;
        keep_msr(a, 1, TSC)?;
        a.rdtscp()?;
        a.shl(rdx, 32)?;
        a.or(rax, rdx)?;
        keep(a, 2, rax)?;
        a.mov(ecx, ecx)?;
        keep(a, 3, rcx)?;
        write_msr(a, TSC, SET)?;
        read_tsc(a)?;
        keep(a, 4, rax)
    });
    guest.state.msrs.tsc_aux = 0x55;
    guest.state.msrs.tsc = 0x10_0000_0000;
    run_to_end(bench, &guest)?;
    let [first, second, third, aux, set] = guest.results();
    assert!(0x10_0000_0000 <= first && first <= second && second <= third, "{first:#x} {second:#x} {third:#x}");
    assert!(third < SET && (SET..SET + 60_000_000_000).contains(&set), "{set:#x}");
    assert_eq!(aux, 0x55);
    Ok(())
}

/// The seam's `stop_time` and `start_time`: a pause is no time to the guest.
fn time_stands_still_between_stop_and_start(bench: &Bench) -> Outcome {
    let guest = Guest::running(|a| {
        read_tsc(a)?;
        keep(a, 0, rax)?;
        point(a, 1)?;
        read_tsc(a)?;
        keep(a, 1, rax)
    });
    let mut machine = Machine::new(bench, &guest)?;
    machine.run()?;
    machine.vm.stop_time();
    let stopped = machine.state().msrs.tsc;
    std::thread::sleep(std::time::Duration::from_millis(50));
    let still = machine.state().msrs.tsc;
    bench.needs(&crate::abilities::STOPPED_TIME)?;
    assert_eq!(stopped, still);
    machine.vm.start_time();
    machine.run()?.done();
    assert!(guest.result(0) <= stopped && still <= guest.result(1));
    Ok(())
}

fn halt_ends_by_the_timer(bench: &Bench) -> Outcome {
    let guest = counted(|a| {
        arm(a, 0, 5 * MILLISECOND)?;
        halt_until(a, 0, 1)?;
        arm(a, PERIODIC, MILLISECOND)?;
        halt_until(a, 0, 5)
    });
    run_to_end(bench, &guest)?;
    assert_eq!(guest.result(0), 5);
    Ok(())
}

fn halt_ends_by_the_deadline(bench: &Bench) -> Outcome {
    let guest = counted(|a| {
        lapic_write(a, LVT_TIMER, TSC_DEADLINE | u32::from(VECTOR))?;
        for n in 1..=3 {
            arm_deadline(a, 3_000_000)?;
            halt_until(a, 0, n)?;
        }
        Ok(())
    });
    run_to_end(bench, &guest)?;
    assert_eq!(guest.result(0), 3);
    Ok(())
}

fn halt_ends_by_a_line(bench: &Bench) -> Outcome {
    let guest = counted(|a| {
        redirect(a, 4, VECTOR.into())?;
        for n in 1..=3 {
            line(a, LATER_PORT, 4)?;
            halt_until(a, 0, n)?;
        }
        Ok(())
    });
    run_to_end(bench, &guest)?;
    assert_eq!(guest.result(0), 3);
    Ok(())
}

/// 7.8.1 and HLT: after STI the halt begins before the interrupt, and ends at once; the frame is that after HLT.
fn halt_ends_by_what_already_waits(bench: &Bench) -> Outcome {
    let mut guest = Guest::running(|a| {
        enable(a)?;
        lapic_write(a, ICR, TO_SELF | ASSERT | u32::from(VECTOR))?;
        a.mov(rax, SECOND_CODE)?;
        a.jmp(rax)
    });
    guest.code_at(SECOND_CODE, |a| {
        a.sti()?;
        a.hlt()
    });
    guest.handler(VECTOR, |a| {
        a.mov(rax, qword_ptr(rsp))?;
        keep(a, 0, rax)?;
        end_of_interrupt(a)?;
        a.iretq()
    });
    run_to_end(bench, &guest)?;
    assert_eq!(guest.result(0), SECOND_CODE + 2);
    Ok(())
}

/// A kick ends a halt's run and not the halt.
fn halt_without_interrupts_stays(bench: &Bench) -> Outcome {
    use kiln::hv::state::x86_64::Activity;
    let guest = counted(|a| {
        redirect(a, 4, VECTOR.into())?;
        a.cli()?;
        point(a, 1)?;
        a.hlt()
    });
    let mut machine = Machine::new(bench, &guest)?;
    machine.run()?;
    let at_halt = machine.state().rip + 2;
    machine.bus.line(4).raise();
    let kick = std::sync::Arc::clone(&machine.kick);
    let device = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(30));
        kick.kick();
    });
    let end = machine.run()?;
    device.join().expect("no panic");
    assert_eq!((end, guest.result(0)), (End::Kicked, 0));
    let state = machine.state();
    // The kick may have come before the halt on a very busy host; the halt is never passed.
    if state.activity == Activity::Halted {
        assert_eq!(state.rip, at_halt + 1);
    } else {
        assert_eq!(state.rip, at_halt);
    }
    Ok(())
}

fn halt_ends_by_an_nmi_without_if(bench: &Bench) -> Outcome {
    let mut guest = Guest::running(|a| {
        enable(a)?;
        redirect(a, 4, u64::from(NMI))?;
        a.cli()?;
        line(a, LATER_PORT, 4)?;
        a.hlt()
    });
    guest.handler(2, |a| {
        count(a, 0)?;
        a.iretq()
    });
    run_to_end(bench, &guest)?;
    assert_eq!(guest.result(0), 1);
    Ok(())
}
