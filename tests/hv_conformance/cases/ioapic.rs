//! Interrupts through the IOAPIC (Intel 82093AA, section 3; SDM 12.8).

use super::apic::*;
use super::*;
use crate::bus::EDGE_PORT;
use crate::bus::HIGH_PORT;
use crate::bus::LOW_PORT;

cases!(ioapic:
    registers_read_back,
    an_edge_interrupts_once,
    every_pin_has_its_vector,
    edges_join_while_one_waits,
    a_masked_edge_is_lost,
    interrupts_wait_for_if,
    a_level_interrupts_until_it_falls,
    remote_irr_lasts_until_the_eoi,
    a_masked_level_waits,
    a_level_that_falls_in_service_is_over,
    a_pulse_on_a_level_line_interrupts_once,
    a_logical_destination,
    a_lowest_priority_destination,
    a_destination_that_is_not_there,
    a_line_can_send_nmis,
);

const VECTOR: u8 = 0x51;
const PIN: u8 = 5;

fn registers_read_back(bench: &Bench) -> Outcome {
    let guest = Guest::running(|a| {
        ioapic_read(a, 1)?;
        keep(a, 0, rax)?;
        for pin in 0..24 {
            redirect(a, pin, 0x0100_0000_0001_a900 | (0x30 + u64::from(pin)))?;
        }
        for pin in 0..24 {
            ioapic_read(a, 0x10 + pin * 2)?;
            keep(a, 1 + u64::from(pin) * 2, rax)?;
            ioapic_read(a, 0x11 + pin * 2)?;
            keep(a, 2 + u64::from(pin) * 2, rax)?;
        }
        // The register that the index selects reads back too.
        a.mov(rax, IOAPIC)?;
        a.mov(eax, dword_ptr(rax))?;
        keep(a, 60, rax)
    });
    let mut machine = Machine::new(bench, &guest)?;
    machine.run()?.done();
    assert_eq!(guest.result(0) & 0xff, 0x11, "version");
    assert_eq!(guest.result(0) >> 16 & 0xff, 23, "the last entry");
    for pin in 0..24 {
        assert_eq!(guest.result(1 + pin * 2), 0x1_a900 | (0x30 + pin), "pin {pin}");
        assert_eq!(guest.result(2 + pin * 2), 0x0100_0000, "pin {pin}");
    }
    assert_eq!(guest.result(60), 0x10 + 47);
    let saved = machine.vm.save_irqchip().expect("saves").ioapic;
    assert_eq!(saved.redirections[7], 0x0100_0000_0001_a937);
    Ok(())
}

fn an_edge_interrupts_once(bench: &Bench) -> Outcome {
    let mut guest = Guest::running(|a| {
        enable(a)?;
        redirect(a, PIN.into(), VECTOR.into())?;
        a.sti()?;
        for n in 1..=3 {
            line(a, EDGE_PORT, PIN)?;
            await_result(a, 0, n)?;
        }
        // A rising edge by level, and none while it stays.
        line(a, HIGH_PORT, PIN)?;
        await_result(a, 0, 4)?;
        line(a, HIGH_PORT, PIN)?;
        line(a, LOW_PORT, PIN)?;
        give_time(a)?;
        line(a, HIGH_PORT, PIN)?;
        await_result(a, 0, 5)?;
        give_time(a)
    });
    counting_handler(&mut guest, VECTOR, 0);
    run_to_end(bench, &guest)?;
    assert_eq!(guest.result(0), 5);
    Ok(())
}

fn every_pin_has_its_vector(bench: &Bench) -> Outcome {
    let mut guest = Guest::running(|a| {
        enable(a)?;
        a.sti()?;
        // Pin 0 is the timer's on some engines' boards, and pin 2 its output: they work as all others do.
        for pin in 0..24 {
            redirect(a, pin, 0x40 + u64::from(pin))?;
            line(a, EDGE_PORT, pin as u8)?;
            await_result(a, pin.into(), 1)?;
        }
        Ok(())
    });
    for pin in 0..24 {
        counting_handler(&mut guest, 0x40 + pin, pin.into());
    }
    run_to_end(bench, &guest)?;
    assert_eq!(guest.results::<24>(), [1; 24]);
    Ok(())
}

/// 12.8.4: one bit a vector in the IRR.
fn edges_join_while_one_waits(bench: &Bench) -> Outcome {
    let mut guest = Guest::running(|a| {
        enable(a)?;
        redirect(a, PIN.into(), VECTOR.into())?;
        for _ in 0..3 {
            line(a, EDGE_PORT, PIN)?;
        }
        a.sti()?;
        await_result(a, 0, 1)?;
        give_time(a)
    });
    counting_handler(&mut guest, VECTOR, 0);
    run_to_end(bench, &guest)?;
    assert_eq!(guest.result(0), 1);
    Ok(())
}

/// 3.2.4, interrupt mask: edges on a masked pin are not remembered.
fn a_masked_edge_is_lost(bench: &Bench) -> Outcome {
    let mut guest = Guest::running(|a| {
        enable(a)?;
        redirect(a, PIN.into(), PIN_MASKED | u64::from(VECTOR))?;
        a.sti()?;
        line(a, EDGE_PORT, PIN)?;
        redirect(a, PIN.into(), VECTOR.into())?;
        give_time(a)?;
        a.mov(rax, qword_ptr(RESULTS))?;
        keep(a, 1, rax)?;
        line(a, EDGE_PORT, PIN)?;
        await_result(a, 0, 1)
    });
    counting_handler(&mut guest, VECTOR, 0);
    run_to_end(bench, &guest)?;
    assert_eq!(guest.results(), [1, 0]);
    Ok(())
}

/// 7.8.1.
fn interrupts_wait_for_if(bench: &Bench) -> Outcome {
    let mut guest = Guest::running(|a| {
        enable(a)?;
        redirect(a, PIN.into(), VECTOR.into())?;
        line(a, EDGE_PORT, PIN)?;
        give_time(a)?;
        a.mov(rax, qword_ptr(RESULTS))?;
        keep(a, 1, rax)?;
        lapic_read(a, IRR + u64::from(VECTOR / 32) * 0x10)?;
        keep(a, 2, rax)?;
        a.sti()?;
        await_result(a, 0, 1)?;
        lapic_read(a, IRR + u64::from(VECTOR / 32) * 0x10)?;
        keep(a, 3, rax)
    });
    counting_handler(&mut guest, VECTOR, 0);
    run_to_end(bench, &guest)?;
    assert_eq!(guest.results(), [1, 0, 1 << (VECTOR % 32), 0]);
    Ok(())
}

/// 3.2.4, trigger mode: as long as the line is active, its EOI begins the next one.
fn a_level_interrupts_until_it_falls(bench: &Bench) -> Outcome {
    bench.needs(&crate::abilities::IN_SERVICE)?;
    let mut guest = Guest::running(|a| {
        enable(a)?;
        redirect(a, PIN.into(), PIN_LEVEL | u64::from(VECTOR))?;
        a.sti()?;
        line(a, HIGH_PORT, PIN)?;
        await_result(a, 0, 3)?;
        give_time(a)
    });
    guest.handler(VECTOR, |a| {
        let mut active = a.create_label();
        a.push(rax)?;
        count(a, 0)?;
        a.cmp(qword_ptr(RESULTS), 3)?;
        a.jb(active)?;
        line(a, LOW_PORT, PIN)?;
        a.set_label(&mut active)?;
        end_of_interrupt(a)?;
        a.pop(rax)?;
        a.iretq()
    });
    run_to_end(bench, &guest)?;
    assert_eq!(guest.result(0), 3);
    Ok(())
}

/// 3.2.4, remote IRR; 12.8.4, TMR.
fn remote_irr_lasts_until_the_eoi(bench: &Bench) -> Outcome {
    bench.needs(&crate::abilities::IN_SERVICE)?;
    let word = u64::from(VECTOR / 32) * 0x10;
    let mut guest = Guest::running(|a| {
        enable(a)?;
        redirect(a, PIN.into(), PIN_LEVEL | u64::from(VECTOR))?;
        keep_redirection(a, 1, PIN.into())?;
        a.sti()?;
        line(a, HIGH_PORT, PIN)?;
        await_result(a, 0, 1)?;
        keep_redirection(a, 4, PIN.into())
    });
    guest.handler(VECTOR, |a| {
        count(a, 0)?;
        keep_redirection(a, 2, PIN.into())?;
        lapic_read(a, TMR + word)?;
        keep(a, 5, rax)?;
        lapic_read(a, ISR + word)?;
        keep(a, 6, rax)?;
        line(a, LOW_PORT, PIN)?;
        end_of_interrupt(a)?;
        keep_redirection(a, 3, PIN.into())?;
        a.iretq()
    });
    run_to_end(bench, &guest)?;
    let idle = PIN_LEVEL | u64::from(VECTOR);
    let bit = 1 << (VECTOR % 32);
    assert_eq!(guest.results(), [1, idle, idle | REMOTE_IRR, idle, idle, bit, bit]);
    Ok(())
}

fn a_masked_level_waits(bench: &Bench) -> Outcome {
    bench.needs(&crate::abilities::IN_SERVICE)?;
    let entry = PIN_LEVEL | u64::from(VECTOR);
    let mut guest = Guest::running(|a| {
        enable(a)?;
        redirect(a, PIN.into(), PIN_MASKED | entry)?;
        a.sti()?;
        line(a, HIGH_PORT, PIN)?;
        give_time(a)?;
        a.mov(rax, qword_ptr(RESULTS))?;
        keep(a, 1, rax)?;
        redirect(a, PIN.into(), entry)?;
        await_result(a, 0, 1)?;
        // And one that fell while it was masked does not come.
        redirect(a, PIN.into(), PIN_MASKED | entry)?;
        line(a, HIGH_PORT, PIN)?;
        line(a, LOW_PORT, PIN)?;
        redirect(a, PIN.into(), entry)?;
        give_time(a)
    });
    guest.handler(VECTOR, |a| {
        a.push(rax)?;
        count(a, 0)?;
        line(a, LOW_PORT, PIN)?;
        end_of_interrupt(a)?;
        a.pop(rax)?;
        a.iretq()
    });
    run_to_end(bench, &guest)?;
    assert_eq!(guest.results(), [1, 0]);
    Ok(())
}

fn a_level_that_falls_in_service_is_over(bench: &Bench) -> Outcome {
    bench.needs(&crate::abilities::IN_SERVICE)?;
    let mut guest = Guest::running(|a| {
        enable(a)?;
        redirect(a, PIN.into(), PIN_LEVEL | u64::from(VECTOR))?;
        a.sti()?;
        for n in 1..=2 {
            line(a, HIGH_PORT, PIN)?;
            await_result(a, 0, n)?;
            give_time(a)?;
        }
        Ok(())
    });
    guest.handler(VECTOR, |a| {
        a.push(rax)?;
        count(a, 0)?;
        // Down, up and down again: only what is there at the EOI counts.
        line(a, LOW_PORT, PIN)?;
        line(a, HIGH_PORT, PIN)?;
        line(a, LOW_PORT, PIN)?;
        end_of_interrupt(a)?;
        a.pop(rax)?;
        a.iretq()
    });
    run_to_end(bench, &guest)?;
    assert_eq!(guest.result(0), 2);
    Ok(())
}

/// `IrqLine::raise` on a line that the guest has programmed as level-triggered.
fn a_pulse_on_a_level_line_interrupts_once(bench: &Bench) -> Outcome {
    let mut guest = Guest::running(|a| {
        enable(a)?;
        redirect(a, PIN.into(), PIN_LEVEL | u64::from(VECTOR))?;
        a.sti()?;
        for n in 1..=3 {
            line(a, EDGE_PORT, PIN)?;
            await_result(a, 0, n)?;
            give_time(a)?;
        }
        Ok(())
    });
    counting_handler(&mut guest, VECTOR, 0);
    run_to_end(bench, &guest)?;
    assert_eq!(guest.result(0), 3);
    Ok(())
}

/// 12.6.2.2: the flat model.
fn a_logical_destination(bench: &Bench) -> Outcome {
    const TO_BIT_2: u64 = 0x0400_0000_0000_0800;
    const TO_BIT_0: u64 = 0x0100_0000_0000_0800;
    let mut guest = Guest::running(|a| {
        enable(a)?;
        lapic_write(a, DFR, u32::MAX)?;
        lapic_write(a, LDR, 0x0400_0000)?;
        a.sti()?;
        redirect(a, PIN.into(), TO_BIT_2 | u64::from(VECTOR))?;
        line(a, EDGE_PORT, PIN)?;
        await_result(a, 0, 1)?;
        redirect(a, PIN.into(), TO_BIT_0 | u64::from(VECTOR))?;
        line(a, EDGE_PORT, PIN)?;
        give_time(a)
    });
    counting_handler(&mut guest, VECTOR, 0);
    run_to_end(bench, &guest)?;
    assert_eq!(guest.result(0), 1);
    Ok(())
}

/// 12.6.2.4, with one candidate.
fn a_lowest_priority_destination(bench: &Bench) -> Outcome {
    let mut guest = Guest::running(|a| {
        enable(a)?;
        lapic_write(a, DFR, u32::MAX)?;
        lapic_write(a, LDR, 0x0100_0000)?;
        a.sti()?;
        redirect(a, PIN.into(), 0xff00_0000_0000_0900 | u64::from(VECTOR))?;
        line(a, EDGE_PORT, PIN)?;
        await_result(a, 0, 1)
    });
    counting_handler(&mut guest, VECTOR, 0);
    run_to_end(bench, &guest)?;
    assert_eq!(guest.result(0), 1);
    Ok(())
}

fn a_destination_that_is_not_there(bench: &Bench) -> Outcome {
    let mut guest = Guest::running(|a| {
        enable(a)?;
        a.sti()?;
        redirect(a, PIN.into(), 9 << 56 | u64::from(VECTOR))?;
        line(a, EDGE_PORT, PIN)?;
        give_time(a)?;
        a.mov(rax, qword_ptr(RESULTS))?;
        keep(a, 1, rax)?;
        redirect(a, PIN.into(), VECTOR.into())?;
        line(a, EDGE_PORT, PIN)?;
        await_result(a, 0, 1)
    });
    counting_handler(&mut guest, VECTOR, 0);
    run_to_end(bench, &guest)?;
    assert_eq!(guest.results(), [1, 0]);
    Ok(())
}

/// 3.2.4, delivery mode 100b: whatever IF says, and without an EOI.
fn a_line_can_send_nmis(bench: &Bench) -> Outcome {
    let mut guest = Guest::running(|a| {
        enable(a)?;
        redirect(a, PIN.into(), u64::from(NMI))?;
        for n in 1..=2 {
            line(a, EDGE_PORT, PIN)?;
            await_result(a, 0, n)?;
        }
        Ok(())
    });
    guest.handler(2, |a| {
        count(a, 0)?;
        a.iretq()
    });
    run_to_end(bench, &guest)?;
    assert_eq!(guest.result(0), 2);
    Ok(())
}
