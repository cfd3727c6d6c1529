//! Interrupts between two vCPUs (12.6), and how the second one is started (9.4).

use iced_x86::code_asm::CodeAssembler as Assembler;
use kiln::hv::state::VcpuState;
use kiln::hv::state::x86_64::Activity;

use super::apic::*;
use super::lapic::enable_x2apic;
use super::lapic::write_msr;
use super::lapic::x2apic;
use super::*;

cases!(ipi:
    both_run_with_ids_of_their_own,
    a_fixed_interrupt_by_id,
    a_fixed_interrupt_by_logical_address,
    shorthands,
    lowest_priority_reaches_one,
    an_nmi_by_id,
    a_halted_vcpu_wakes,
    a_line_to_the_other_vcpu,
    ping_pong,
    x2apic_ping_pong,
    stores_are_seen_in_order,
    init_and_start_up,
    init_resets_a_running_vcpu,
    a_vcpu_that_is_not_started_does_nothing,
);

const VECTOR: u8 = 0x61;
/// Results: vCPU 1 is ready; and what interrupts are counted in.
const READY: u64 = 20;
const FIRST: u64 = 0;
const SECOND: u64 = 1;

/// A guest with code for both, and a handler that counts by vCPU.
fn pair(
    first: impl FnOnce(&mut CodeAssembler) -> Assembled,
    second: impl FnOnce(&mut CodeAssembler) -> Assembled,
) -> Guest {
    let mut guest = Guest::running(|a| {
        enable(a)?;
        first(a)
    });
    guest.code_at(SECOND_CODE, |a| {
        enable(a)?;
        second(a)
    });
    guest.handler(VECTOR, |a| {
        a.push(rax)?;
        count_by_vcpu(a)?;
        end_of_interrupt(a)?;
        a.pop(rax)?;
        a.iretq()
    });
    guest
}

/// Counts in result 0 or 1, by the local APIC's id.
fn count_by_vcpu(a: &mut CodeAssembler) -> Assembled {
    lapic_read(a, ID)?;
    a.shr(eax, 24)?;
    a.lock().inc(qword_ptr(rax * 8 + RESULTS))
}

/// vCPU 1: says that it is ready, and executes for ever with interrupts on.
fn ready_and_spin(a: &mut CodeAssembler) -> Assembled {
    a.sti()?;
    count(a, READY)?;
    forever(a)
}

fn forever(a: &mut CodeAssembler) -> Assembled {
    let mut again = a.create_label();
    a.set_label(&mut again)?;
    a.pause()?;
    a.jmp(again)
}

/// vCPU 1: says that it is ready, and halts for ever with interrupts on.
fn ready_and_halt(a: &mut CodeAssembler) -> Assembled {
    count(a, READY)?;
    let mut again = a.create_label();
    a.set_label(&mut again)?;
    a.sti()?;
    a.hlt()?;
    a.jmp(again)
}

/// Runs both, vCPU 1 from [`initial_state`] on; vCPU 0 must come to its end.
fn run_pair(bench: &Bench, guest: &Guest) -> Result<VcpuState, Skip> {
    run_from(bench, guest, Some(initial_state(1)))
}

fn run_from(bench: &Bench, guest: &Guest, second: Option<VcpuState>) -> Result<VcpuState, Skip> {
    let mut ended = run_together(bench, guest, &[Some(guest.state.clone()), second])?;
    let second = ended.pop().expect("two");
    let first = ended.pop().expect("two");
    assert_eq!(second.end?, End::Kicked, "vCPU 1");
    first.end?.done();
    Ok(second.state)
}

fn both_run_with_ids_of_their_own(bench: &Bench) -> Outcome {
    let keep_id = |a: &mut CodeAssembler, n: u64| {
        lapic_read(a, ID)?;
        keep(a, n, rax)
    };
    let guest = pair(
        |a| {
            keep_id(a, 2)?;
            await_result(a, READY, 1)
        },
        |a| {
            keep_id(a, 3)?;
            ready_and_spin(a)
        },
    );
    let second = run_pair(bench, &guest)?;
    assert_eq!((guest.result(2), guest.result(3)), (0, 1 << 24));
    assert_eq!(second.lapic.id, 1);
    Ok(())
}

fn a_fixed_interrupt_by_id(bench: &Bench) -> Outcome {
    let guest = pair(
        |a| {
            await_result(a, READY, 1)?;
            for n in 1..=5 {
                send(a, 1, ASSERT | u32::from(VECTOR))?;
                await_result(a, SECOND, n)?;
            }
            Ok(())
        },
        ready_and_spin,
    );
    run_pair(bench, &guest)?;
    assert_eq!((guest.result(FIRST), guest.result(SECOND)), (0, 5));
    Ok(())
}

/// 12.6.2.2: the flat model, an address a vCPU.
fn a_fixed_interrupt_by_logical_address(bench: &Bench) -> Outcome {
    let address = |a: &mut CodeAssembler, own: u32| {
        lapic_write(a, DFR, u32::MAX)?;
        lapic_write(a, LDR, own << 24)
    };
    let guest = pair(
        |a| {
            address(a, 0x10)?;
            a.sti()?;
            await_result(a, READY, 1)?;
            send(a, 0x20, LOGICAL | ASSERT | u32::from(VECTOR))?;
            await_result(a, SECOND, 1)?;
            send(a, 0x30, LOGICAL | ASSERT | u32::from(VECTOR))?;
            await_result(a, SECOND, 2)?;
            await_result(a, FIRST, 1)?;
            send(a, 0x40, LOGICAL | ASSERT | u32::from(VECTOR))?;
            give_time(a)
        },
        |a| {
            address(a, 0x20)?;
            ready_and_spin(a)
        },
    );
    run_pair(bench, &guest)?;
    assert_eq!((guest.result(FIRST), guest.result(SECOND)), (1, 2));
    Ok(())
}

fn shorthands(bench: &Bench) -> Outcome {
    let vector = u32::from(VECTOR);
    let guest = pair(
        |a| {
            a.sti()?;
            await_result(a, READY, 1)?;
            send(a, 0, TO_OTHERS | ASSERT | vector)?;
            await_result(a, SECOND, 1)?;
            send(a, 0, TO_ALL | ASSERT | vector)?;
            await_result(a, SECOND, 2)?;
            await_result(a, FIRST, 1)?;
            send(a, 1, TO_SELF | ASSERT | vector)?;
            await_result(a, FIRST, 2)?;
            // The broadcast id.
            send(a, 0xff, ASSERT | vector)?;
            await_result(a, SECOND, 3)?;
            await_result(a, FIRST, 3)
        },
        ready_and_spin,
    );
    run_pair(bench, &guest)?;
    assert_eq!((guest.result(FIRST), guest.result(SECOND)), (3, 3));
    Ok(())
}

/// 12.6.2.4: exactly one of the two.
fn lowest_priority_reaches_one(bench: &Bench) -> Outcome {
    const LOWEST: u64 = 0x0300_0000_0000_0900;
    let address = |a: &mut CodeAssembler, own: u32| {
        lapic_write(a, DFR, u32::MAX)?;
        lapic_write(a, LDR, own << 24)
    };
    let guest = pair(
        |a| {
            address(a, 1)?;
            a.sti()?;
            await_result(a, READY, 1)?;
            redirect(a, 5, LOWEST | u64::from(VECTOR))?;
            for n in 1..=6 {
                let mut wait = a.create_label();
                line(a, crate::bus::EDGE_PORT, 5)?;
                a.set_label(&mut wait)?;
                a.mov(rax, qword_ptr(RESULTS))?;
                a.add(rax, qword_ptr(RESULTS + 8))?;
                a.cmp(rax, n)?;
                a.jb(wait)?;
            }
            give_time(a)
        },
        |a| {
            address(a, 2)?;
            ready_and_spin(a)
        },
    );
    run_pair(bench, &guest)?;
    assert_eq!(guest.result(FIRST) + guest.result(SECOND), 6);
    Ok(())
}

fn an_nmi_by_id(bench: &Bench) -> Outcome {
    let mut guest = pair(
        |a| {
            await_result(a, READY, 1)?;
            for n in 1..=3 {
                send(a, 1, ASSERT | NMI)?;
                await_result(a, SECOND, n)?;
            }
            Ok(())
        },
        |a| {
            // Interrupts are off.
            count(a, READY)?;
            forever(a)
        },
    );
    guest.handler(2, |a| {
        a.push(rax)?;
        count_by_vcpu(a)?;
        a.pop(rax)?;
        a.iretq()
    });
    run_pair(bench, &guest)?;
    assert_eq!((guest.result(FIRST), guest.result(SECOND)), (0, 3));
    Ok(())
}

fn a_halted_vcpu_wakes(bench: &Bench) -> Outcome {
    let guest = pair(
        |a| {
            await_result(a, READY, 1)?;
            for n in 1..=20 {
                send(a, 1, ASSERT | u32::from(VECTOR))?;
                await_result(a, SECOND, n)?;
            }
            Ok(())
        },
        ready_and_halt,
    );
    run_pair(bench, &guest)?;
    assert_eq!(guest.result(SECOND), 20);
    Ok(())
}

/// The EOI of the other vCPU's local APIC reaches the IOAPIC.
fn a_line_to_the_other_vcpu(bench: &Bench) -> Outcome {
    bench.needs(&crate::abilities::IN_SERVICE)?;
    let mut guest = pair(
        |a| {
            await_result(a, READY, 1)?;
            redirect(a, 6, 1 << 56 | PIN_LEVEL | u64::from(VECTOR))?;
            for n in 1..=3 {
                line(a, crate::bus::HIGH_PORT, 6)?;
                await_result(a, SECOND, n)?;
            }
            Ok(())
        },
        ready_and_halt,
    );
    guest.handler(VECTOR, |a| {
        a.push(rax)?;
        line(a, crate::bus::LOW_PORT, 6)?;
        end_of_interrupt(a)?;
        count_by_vcpu(a)?;
        a.pop(rax)?;
        a.iretq()
    });
    run_pair(bench, &guest)?;
    assert_eq!((guest.result(FIRST), guest.result(SECOND)), (0, 3));
    Ok(())
}

const ROUNDS: i32 = 300;

/// Each wakes the other, both asleep between: one lost wake-up would end it.
fn ping_pong(bench: &Bench) -> Outcome {
    let vector = u32::from(VECTOR);
    let guest = pair(
        |a| {
            await_result(a, READY, 1)?;
            a.xor(ebx, ebx)?;
            exchange(a, FIRST, |a| send(a, 1, ASSERT | vector), true)
        },
        |a| {
            a.xor(ebx, ebx)?;
            count(a, READY)?;
            exchange(a, SECOND, |a| send(a, 0, ASSERT | vector), false)?;
            forever(a)
        },
    );
    run_pair(bench, &guest)?;
    assert_eq!((guest.result(FIRST), guest.result(SECOND)), (ROUNDS as u64, ROUNDS as u64));
    Ok(())
}

/// Sends and waits for an answer, [`ROUNDS`] times; or waits first. The count is in EBX.
fn exchange(
    a: &mut CodeAssembler,
    own: u64,
    send: impl Fn(&mut CodeAssembler) -> Assembled,
    begins: bool,
) -> Assembled {
    let mut round = a.create_label();
    let mut wait = a.create_label();
    let mut come = a.create_label();
    a.set_label(&mut round)?;
    a.inc(ebx)?;
    if begins {
        send(a)?;
    }
    a.set_label(&mut wait)?;
    a.cli()?;
    a.cmp(qword_ptr(RESULTS + own * 8), rbx)?;
    a.jae(come)?;
    a.sti()?;
    a.hlt()?;
    a.jmp(wait)?;
    a.set_label(&mut come)?;
    if !begins {
        send(a)?;
    }
    a.cmp(ebx, ROUNDS)?;
    a.jb(round)
}

fn x2apic_ping_pong(bench: &Bench) -> Outcome {
    let to = |id: u64| {
        move |a: &mut CodeAssembler| write_msr(a, x2apic(ICR), id << 32 | u64::from(ASSERT) | u64::from(VECTOR))
    };
    let mut guest = Guest::running(|a| {
        enable_x2apic(a)?;
        await_result(a, READY, 1)?;
        a.xor(ebx, ebx)?;
        exchange(a, FIRST, to(1), true)
    });
    guest.code_at(SECOND_CODE, |a| {
        // As `enable_x2apic`, for one that is not the boot processor.
        write_msr(a, 0x1b, 0xfee0_0c00)?;
        write_msr(a, x2apic(SVR), 0x1ff)?;
        a.xor(ebx, ebx)?;
        count(a, READY)?;
        exchange(a, SECOND, to(0), false)?;
        forever(a)
    });
    guest.handler(VECTOR, |a| {
        a.push(rax)?;
        a.push(rcx)?;
        a.push(rdx)?;
        a.mov(ecx, x2apic(ID))?;
        a.rdmsr()?;
        a.lock().inc(qword_ptr(rax * 8 + RESULTS))?;
        write_msr(a, x2apic(EOI), 0)?;
        a.pop(rdx)?;
        a.pop(rcx)?;
        a.pop(rax)?;
        a.iretq()
    });
    run_pair(bench, &guest)?;
    assert_eq!((guest.result(FIRST), guest.result(SECOND)), (ROUNDS as u64, ROUNDS as u64));
    Ok(())
}

/// 9.2.3: a vCPU's stores are seen in their order.
fn stores_are_seen_in_order(bench: &Bench) -> Outcome {
    const COUNT: u32 = 20_000;
    let guest = pair(
        |a| {
            let mut again = a.create_label();
            let mut fine = a.create_label();
            await_result(a, READY, 1)?;
            a.set_label(&mut again)?;
            // Written second, so what was written first is at least as new.
            a.mov(rax, qword_ptr(DATA + 0x100))?;
            a.mov(rdx, qword_ptr(DATA))?;
            a.cmp(rdx, rax)?;
            a.jae(fine)?;
            count(a, 5)?;
            a.set_label(&mut fine)?;
            a.cmp(rax, COUNT as i32)?;
            a.jb(again)
        },
        |a| {
            let mut again = a.create_label();
            count(a, READY)?;
            a.xor(eax, eax)?;
            a.set_label(&mut again)?;
            a.inc(rax)?;
            a.mov(qword_ptr(DATA), rax)?;
            a.mov(qword_ptr(DATA + 0x100), rax)?;
            a.cmp(eax, COUNT)?;
            a.jb(again)?;
            forever(a)
        },
    );
    run_pair(bench, &guest)?;
    assert_eq!(guest.result(5), 0, "stores seen out of order");
    Ok(())
}

/// Real-mode code at [`START_UP`] that takes a vCPU to 64-bit mode and [`SECOND_CODE`].
fn lay_start_up(guest: &Guest) {
    const GDTR: u64 = 0x100;
    const LONG: u64 = 0x200;
    let code = || {
        let mut a = Assembler::new(16)?;
        a.mov(ax, cs)?;
        a.mov(ds, ax)?;
        a.lgdt(ptr(GDTR))?;
        a.mov(eax, CR4 as u32)?;
        a.mov(cr4, eax)?;
        a.mov(eax, PML4 as u32)?;
        a.mov(cr3, eax)?;
        a.mov(ecx, 0xc000_0080u32)?;
        a.mov(eax, (EFER & !(1 << 10)) as u32)?;
        a.xor(edx, edx)?;
        a.wrmsr()?;
        a.mov(eax, CR0 as u32)?;
        a.mov(cr0, eax)?;
        // jmp far ptr16:32, with an operand-size prefix
        let target = ((START_UP + LONG) as u32).to_le_bytes();
        let [low, high] = KERNEL_CS.to_le_bytes();
        a.db(&[&[0x66, 0xea], &target[..], &[low, high]].concat())?;
        a.assemble(START_UP)
    };
    guest.put_bytes(START_UP, &code().expect("the start-up code assembles"));
    guest.ram.store(START_UP + GDTR, GDT_LIMIT).expect("in memory");
    guest.ram.store(START_UP + GDTR + 2, GDT as u32).expect("in memory");
    guest.ram.store(DATA + 0x800, IDT_LIMIT).expect("in memory");
    guest.put(DATA + 0x802, IDT);
    guest.code_at(START_UP + LONG, |a| {
        a.mov(eax, u32::from(KERNEL_SS))?;
        a.mov(ds, eax)?;
        a.mov(es, eax)?;
        a.mov(ss, eax)?;
        a.mov(rsp, STACK + PER_VCPU)?;
        a.lidt(ptr(DATA + 0x800))?;
        a.mov(rax, SECOND_CODE)?;
        a.jmp(rax)
    });
}

const PAGE: u32 = (START_UP >> 12) as u32;

/// INIT and two start-up messages, as a kernel sends them.
fn start_second(a: &mut CodeAssembler) -> Assembled {
    send(a, 1, ASSERT | INIT)?;
    give_time(a)?;
    send(a, 1, ASSERT | START | PAGE)?;
    give_time(a)?;
    send(a, 1, ASSERT | START | PAGE)
}

/// 9.4.3 and 12.6.1: from reset, which the engine makes, through real mode to an interrupt in 64-bit mode.
fn init_and_start_up(bench: &Bench) -> Outcome {
    let guest = pair(
        |a| {
            start_second(a)?;
            await_result(a, READY, 1)?;
            send(a, 1, ASSERT | u32::from(VECTOR))?;
            await_result(a, SECOND, 1)
        },
        ready_and_halt,
    );
    lay_start_up(&guest);
    let second = run_from(bench, &guest, None)?;
    assert_eq!((guest.result(READY), guest.result(SECOND)), (1, 1));
    assert_eq!((second.cr0, second.cr3, second.segments[1].selector), (CR0, PML4, KERNEL_CS));
    Ok(())
}

/// 12.4.7.3 and 10.1: INIT takes a running vCPU back to where start-up messages count.
fn init_resets_a_running_vcpu(bench: &Bench) -> Outcome {
    let guest = pair(
        |a| {
            await_result(a, READY, 1)?;
            for n in 2..=4 {
                start_second(a)?;
                await_result(a, READY, n)?;
            }
            Ok(())
        },
        |a| {
            a.inc(rbx)?;
            keep(a, 5, rbx)?;
            ready_and_spin(a)
        },
    );
    lay_start_up(&guest);
    run_pair(bench, &guest)?;
    assert_eq!((guest.result(READY), guest.result(5)), (4, 1), "every time from reset, with RBX zero");
    Ok(())
}

fn a_vcpu_that_is_not_started_does_nothing(bench: &Bench) -> Outcome {
    let guest = pair(
        |a| {
            // Neither an interrupt nor an NMI starts it.
            send(a, 1, ASSERT | u32::from(VECTOR))?;
            send(a, 1, ASSERT | NMI)?;
            give_time(a)
        },
        ready_and_spin,
    );
    let second = run_from(bench, &guest, None)?;
    assert!(matches!(second.activity, Activity::WaitsForInit | Activity::WaitsForStartUp), "{:?}", second.activity);
    assert_eq!(guest.result(READY), 0);
    Ok(())
}
