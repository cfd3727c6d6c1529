//! Machines that are paused, saved and restored, with guests that notice everything: machine code without a kernel.

#[path = "support/bare.rs"]
mod bare;
#[path = "support/bare_machine.rs"]
mod bare_machine;

use std::time::Duration;

use bare_machine::MEMORY;
use bare_machine::await_flag;
use bare_machine::copy;
use bare_machine::enable_x2apic;
use bare_machine::fresh;
use bare_machine::fresh_with;
use bare_machine::heard;
use bare_machine::program;
use bare_machine::program_of;
use bare_machine::resumed;
use bare_machine::resumed_on;
use bare_machine::say;
use bare_machine::set_flag;
use bare_machine::set_gate;
use bare_machine::start;
use bare_machine::start_with;
use bare_machine::write_msr;
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use kiln::hv::Hypervisor;
use kiln::hv::soft::Soft;
use kiln::hv::state::VcpuState;
use kiln::hv::state::x86_64::Activity;
use kiln::units::Bytes;
use kiln::vmm::{GiveBackError, Machine, MachineEnd, MachineState, PauseError, RestoreError, SaveError};

const RBX: usize = 3;
const R12: usize = 12;
const R13: usize = 13;
const DONE: u8 = b'!';
const ROUNDS: u64 = 0x1_1000;

/// A loop that counts, mixes, computes in x87 and SSE, and rewrites one of its own instructions each round.
fn busy(rounds: u32) -> Vec<u8> {
    busy_of(0, rounds)
}

/// As [`busy`], for vCPU number `id`; the vCPUs count their rounds together at [`ROUNDS`].
fn busy_of(id: usize, rounds: u32) -> Vec<u8> {
    program_of(id, |a| {
        let (mut top, mut patched) = (a.create_label(), a.create_label());
        a.mov(r12d, rounds)?;
        a.mov(rbx, 0x9e37_79b9_7f4a_7c15u64)?;
        a.fld1()?;
        a.fldpi()?;
        a.mov(eax, 3)?;
        a.cvtsi2sd(xmm1, eax)?;
        a.lea(rsi, ptr(patched))?;
        a.set_label(&mut top)?;
        for _ in 0..8 {
            a.mov(rax, rbx)?;
            a.shl(rax, 13)?;
            a.xor(rbx, rax)?;
            a.mov(rax, rbx)?;
            a.shr(rax, 7)?;
            a.xor(rbx, rax)?;
        }
        a.movq(xmm2, rbx)?;
        a.paddq(xmm3, xmm2)?;
        a.addsd(xmm0, xmm1)?;
        a.fadd_2(st1, st0)?;
        // The immediate of the ADD below, past its two bytes of opcode and ModRM.
        a.mov(dword_ptr(rsi + 2), ebx)?;
        a.set_label(&mut patched)?;
        a.add(ebp, 0x1111_1111)?;
        a.mov(r13d, ebp)?;
        a.push(rbx)?;
        a.pop(qword_ptr(0x1_0000 + 8 * id as u64))?;
        a.lock().inc(qword_ptr(ROUNDS))?;
        a.dec(r12d)?;
        a.jne(top)?;
        say(a, DONE)
    })
}

/// The state of a machine that has come to its end, without what is the time's.
fn timeless(mut state: MachineState) -> MachineState {
    for vcpu in &mut state.vcpus {
        vcpu.msrs.tsc = 0;
    }
    state
}

fn vcpu(state: &MachineState) -> &VcpuState {
    &state.vcpus[0]
}

fn all_halted(state: &MachineState) -> bool {
    state.vcpus.iter().all(|vcpu| vcpu.activity == Activity::Halted)
}

/// Lets the machine come to rest in its last halt, and takes its state.
async fn at_the_end(machine: &mut kiln::vmm::Machine) -> MachineState {
    heard(machine, "!").await;
    loop {
        machine.pause().await.expect("pauses");
        let state = machine.save().await.expect("saves");
        if all_halted(&state) {
            return timeless(state);
        }
        machine.resume();
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_guest_that_is_saved_at_random_points_goes_on_exactly() {
    goes_on_exactly(&[busy(200_000)]).await;
}

#[tokio::test]
async fn so_does_one_with_several_vcpus() {
    // Of different lengths, so that some have halted while others run.
    goes_on_exactly(&[busy_of(0, 60_000), busy_of(1, 100_000), busy_of(2, 30_000)]).await;
}

async fn goes_on_exactly(programs: &[Vec<u8>]) {
    let mut undisturbed = start_with(programs).await;
    let expected = at_the_end(&mut undisturbed).await;
    let memory = |machine: &kiln::vmm::Machine| {
        let mut bytes = vec![0; MEMORY.0 as usize];
        machine.memory().read_bytes(0, &mut bytes).expect("all of it");
        bytes
    };
    let expected_memory = memory(&undisturbed);

    let (mut state, mut ram) = fresh_with(programs);
    let (mut saves, mut moved) = (0, 0);
    let machine = loop {
        let mut machine = resumed(&state, ram).await;
        // Where it is caught is the scheduler's choice, and different each time.
        tokio::time::sleep(Duration::from_millis(1)).await;
        machine.pause().await.expect("pauses");
        let before = vcpu(&state).gpr[RBX];
        state = machine.save().await.expect("saves");
        saves += 1;
        moved += u32::from(vcpu(&state).gpr[RBX] != before);
        if all_halted(&state) {
            break machine;
        }
        assert_eq!(machine.save().await.expect("saves"), state, "nothing moves in a paused machine");
        ram = copy(&machine);
    };
    assert_eq!(timeless(state), expected);
    assert!(memory(&machine) == expected_memory, "memory differs");
    assert!(moved > 3, "saved {saves} times, {moved} of them elsewhere");
    for vcpu in &expected.vcpus {
        assert_eq!((vcpu.gpr[R12], vcpu.gpr[R13] as u32), (0, vcpu.gpr[5] as u32));
    }
    machine.stop();
}

#[tokio::test]
async fn an_interrupt_from_one_vcpu_to_another_is_saved_with_the_machine() {
    let sender = program(|a| {
        enable_x2apic(a)?;
        a.mov(ecx, 0x830)?;
        a.mov(eax, 0x41)?;
        a.mov(edx, 1)?;
        a.wrmsr()?;
        say(a, b's')
    });
    let receiver = program_of(1, |a| {
        let (mut handler, mut main) = (a.create_label(), a.create_label());
        a.jmp(main)?;
        a.set_label(&mut handler)?;
        say(a, b'i')?;
        write_msr(a, 0x80b, 0)?;
        a.iretq()?;
        a.set_label(&mut main)?;
        set_gate(a, 0x41, handler)?;
        write_msr(a, 0x1b, 0xfee0_0c00)?;
        write_msr(a, 0x80f, 0x1ff)?;
        a.mov(qword_ptr(ROUNDS), 1)?;
        await_flag(a)?;
        a.sti()?;
        a.nop()?;
        a.cli()?;
        say(a, DONE)
    });
    let (state, ram) = fresh_with(&[sender, receiver]);
    let mut machine =
        kiln::vmm::Machine::restore(bare_machine::engine().as_ref(), &state, ram, &[]).await.expect("a valid state");
    // The receiver's controller must be on before anything is sent to it: the sender begins with a jump to itself.
    let begin = machine.memory().load::<u16>(bare::CODE).expect("in memory");
    vm_memory::Bytes::write_obj(machine.memory().memory(), 0xfeebu16, vm_memory::GuestAddress(bare::CODE))
        .expect("there");
    machine.resume();
    while machine.memory().load::<u64>(ROUNDS) == Some(0) {
        tokio::task::yield_now().await;
    }
    vm_memory::Bytes::write_obj(machine.memory().memory(), begin, vm_memory::GuestAddress(bare::CODE)).expect("there");
    heard(&machine, "s").await;
    machine.pause().await.expect("pauses");
    let state = machine.save().await.expect("saves");
    assert_eq!(state.vcpus[1].lapic.irr[2], 1 << 1, "vector 0x41 is requested");
    let again = resumed(&state, copy(&machine)).await;
    drop(machine);
    set_flag(&again);
    heard(&again, "i!").await;
}

#[tokio::test]
async fn the_end_of_any_vcpu_is_the_machines() {
    for wrong in [0, 1, 2] {
        let programs: Vec<_> = (0..3)
            .map(|id| {
                program_of(id, |a| {
                    if id == wrong {
                        await_flag(a)?;
                        // No gate leads anywhere.
                        return a.ud2();
                    }
                    let mut top = a.create_label();
                    a.set_label(&mut top)?;
                    if id == 0 {
                        a.hlt()?;
                    }
                    a.inc(rbx)?;
                    a.jmp(top)
                })
            })
            .collect();
        let mut machine = start_with(&programs).await;
        set_flag(&machine);
        assert!(matches!(machine.ended().await, MachineEnd::Shutdown), "of vCPU {wrong}");
        assert!(matches!(machine.pause().await, Err(PauseError::Ended)));
    }
}

#[tokio::test]
async fn states_that_no_machine_can_be_in_are_refused() {
    let programs: Vec<_> = (0..2).map(|id| busy_of(id, u32::MAX)).collect();
    let refused = |change: fn(&mut MachineState)| {
        let (mut state, ram) = fresh_with(&programs);
        change(&mut state);
        async move {
            kiln::vmm::Machine::restore(bare_machine::engine().as_ref(), &state, ram, &[]).await.expect_err("refused")
        }
    };
    assert!(matches!(refused(|state| state.vcpus.clear()).await, RestoreError::Vcpus { found: 0 }));
    let many = refused(|state| {
        let vcpu = |id| {
            let mut vcpu = bare::initial_state();
            vcpu.lapic.id = id;
            vcpu
        };
        state.vcpus = (0..9).map(vcpu).collect();
    });
    assert!(matches!(many.await, RestoreError::Vcpus { found: 9 }));
    let twice = refused(|state| state.vcpus[1].lapic.id = 0);
    assert!(matches!(twice.await, RestoreError::ApicId { vcpu: 1, found: 0 }));
    assert!(matches!(refused(|state| state.vcpus.swap(0, 1)).await, RestoreError::ApicId { vcpu: 0, found: 1 }));
    // Whichever it is of the processors; the others end too.
    assert!(matches!(refused(|state| state.vcpus[0].cr4 = 1 << 63).await, RestoreError::Vcpu(_)));
    assert!(matches!(refused(|state| state.vcpus[1].cr4 = 1 << 63).await, RestoreError::Vcpu(_)));
}

/// Sets up vector 0x40 to say `t` and note the time stamp counter in R13; R12 has it from before.
fn timer_program(arm: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Vec<u8> {
    program(|a| {
        let (mut handler, mut main, mut wait) = (a.create_label(), a.create_label(), a.create_label());
        a.jmp(main)?;
        a.set_label(&mut handler)?;
        a.rdtsc()?;
        a.shl(rdx, 32)?;
        a.lea(r13, ptr(rdx + rax))?;
        say(a, b't')?;
        write_msr(a, 0x80b, 0)?;
        a.iretq()?;
        a.set_label(&mut main)?;
        set_gate(a, 0x40, handler)?;
        enable_x2apic(a)?;
        write_msr(a, 0x83e, 0b1011)?;
        a.rdtsc()?;
        a.shl(rdx, 32)?;
        a.lea(r12, ptr(rdx + rax))?;
        arm(a)?;
        a.sti()?;
        say(a, b'a')?;
        a.set_label(&mut wait)?;
        a.hlt()?;
        a.test(r13, r13)?;
        a.je(wait)?;
        say(a, DONE)
    })
}

const SECOND: u64 = 1_000_000_000;

/// A guest of the soft engine, whatever is chosen: it counts on a counter of 1 GHz, or on a pulse that a masked
/// level-triggered pin keeps.
async fn start_on_soft(code: &[u8]) -> Machine {
    let (mut state, ram) = fresh(code);
    state.cpu_profile = Soft::new().cpu_profile().to_owned();
    resumed_on(&Soft::new(), &state, ram).await
}

#[tokio::test]
async fn a_timer_that_is_armed_across_a_save_fires() {
    let one_shot = timer_program(|a| {
        write_msr(a, 0x832, 0x40)?;
        write_msr(a, 0x838, 4_000_000_000)
    });
    let deadline = timer_program(|a| {
        write_msr(a, 0x832, 0x4_0040)?;
        a.lea(rax, ptr(r12))?;
        a.mov(rbx, 4 * SECOND)?;
        a.add(rax, rbx)?;
        a.mov(rdx, rax)?;
        a.shr(rdx, 32)?;
        a.mov(ecx, 0x6e0)?;
        a.wrmsr()
    });
    for code in [one_shot, deadline] {
        let mut machine = start_on_soft(&code).await;
        heard(&machine, "a").await;
        machine.pause().await.expect("pauses");
        let mut state = machine.save().await.expect("saves");
        let left = vcpu(&state).lapic.timer_left_ns.expect("armed");
        assert!(left <= 4 * SECOND, "{left}");
        assert_eq!(machine.save().await.expect("saves").vcpus, state.vcpus, "time stands still");
        // Nobody wants to wait that long: most of it has passed.
        let passed = left - SECOND / 1000;
        let vcpu_state = &mut state.vcpus[0];
        vcpu_state.msrs.tsc += passed;
        vcpu_state.lapic.timer_left_ns = Some(left - passed);
        let ram = copy(&machine);
        drop(machine);
        let mut again = resumed_on(&Soft::new(), &state, ram).await;
        heard(&again, "t!").await;
        let end = at_the_end(&mut again).await;
        let took = vcpu(&end).gpr[R13] - vcpu(&end).gpr[R12];
        assert!(took >= 4 * SECOND, "the timer fired after {took} ns of the guest's time");
    }
}

#[tokio::test]
async fn a_pause_is_no_time_to_the_guest() {
    // Reads the time stamp counter until it is told to stop, and keeps the longest step in R13.
    let code = program(|a| {
        let (mut top, mut less) = (a.create_label(), a.create_label());
        let read = |a: &mut CodeAssembler| {
            a.rdtsc()?;
            a.shl(rdx, 32)?;
            a.or(rax, rdx)
        };
        read(a)?;
        a.mov(r12, rax)?;
        a.set_label(&mut top)?;
        read(a)?;
        a.mov(rbx, rax)?;
        a.sub(rbx, r12)?;
        a.mov(r12, rax)?;
        a.cmp(rbx, r13)?;
        a.jbe(less)?;
        a.mov(r13, rbx)?;
        a.set_label(&mut less)?;
        a.cmp(qword_ptr(bare_machine::FLAG), 0)?;
        a.je(top)?;
        say(a, DONE)
    });
    let mut machine = start_on_soft(&code).await;
    machine.pause().await.expect("pauses");
    let before = machine.save().await.expect("saves");
    tokio::time::sleep(Duration::from_secs(2)).await;
    machine.resume();
    machine.pause().await.expect("pauses");
    let after = machine.save().await.expect("saves");
    let passed = vcpu(&after).msrs.tsc - vcpu(&before).msrs.tsc;
    assert!(passed < SECOND, "{passed} ns");
    set_flag(&machine);
    machine.resume();
    let end = at_the_end(&mut machine).await;
    // Not negative, which would be a huge number; and less than the pause, whatever the host's scheduler did.
    assert!(vcpu(&end).gpr[R13] < 2 * SECOND, "a step of {} ns", vcpu(&end).gpr[R13]);
}

#[tokio::test]
async fn a_halted_guest_is_restored_halted() {
    let code = program(|a| {
        let mut wait = a.create_label();
        say(a, b'h')?;
        a.sti()?;
        a.set_label(&mut wait)?;
        a.hlt()?;
        a.jmp(wait)
    });
    let mut machine = start(&code).await;
    heard(&machine, "h").await;
    let state = loop {
        machine.pause().await.expect("pauses");
        let state = machine.save().await.expect("saves");
        if vcpu(&state).activity == Activity::Halted {
            break state;
        }
        machine.resume();
        tokio::task::yield_now().await;
    };
    let mut again = resumed(&state, copy(&machine)).await;
    again.pause().await.expect("pauses");
    let later = again.save().await.expect("saves");
    assert_eq!((vcpu(&later).activity, vcpu(&later).rip), (Activity::Halted, vcpu(&state).rip));
}

#[tokio::test]
async fn interrupts_that_are_pending_in_the_controllers_arrive_after_a_restore() {
    let code = program(|a| {
        let (mut own, mut line, mut main) = (a.create_label(), a.create_label(), a.create_label());
        a.jmp(main)?;
        for (label, byte) in [(&mut own, b'i'), (&mut line, b'l')] {
            a.set_label(label)?;
            for register in [rax, rcx, rdx] {
                a.push(register)?;
            }
            // Or each byte that is said would be the next interrupt.
            a.mov(edx, SERIAL_INTERRUPTS)?;
            a.xor(eax, eax)?;
            a.out(dx, al)?;
            say(a, byte)?;
            write_msr(a, 0x80b, 0)?;
            for register in [rdx, rcx, rax] {
                a.pop(register)?;
            }
            a.iretq()?;
        }
        a.set_label(&mut main)?;
        set_gate(a, 0x41, own)?;
        set_gate(a, 0x42, line)?;
        enable_x2apic(a)?;
        // The serial port's pin of the IOAPIC: vector 0x42, level-triggered, masked.
        a.mov(rdi, 0xfec0_0000u64)?;
        a.mov(dword_ptr(rdi), 0x10 + 2 * 4)?;
        a.mov(dword_ptr(rdi + 0x10), 0x1_8042)?;
        // The transmitter-empty interrupt, which is due at once.
        a.mov(edx, SERIAL_INTERRUPTS)?;
        a.mov(eax, 2)?;
        a.out(dx, al)?;
        // One to itself, which it does not take.
        write_msr(a, 0x83f, 0x41)?;
        say(a, b'p')?;
        await_flag(a)?;
        a.mov(rdi, 0xfec0_0000u64)?;
        a.mov(dword_ptr(rdi + 0x10), 0x8042)?;
        a.sti()?;
        a.nop()?;
        // Handled by now, or a slice later.
        a.mov(ecx, 100_000)?;
        let mut wait = a.create_label();
        a.set_label(&mut wait)?;
        a.dec(ecx)?;
        a.jne(wait)?;
        a.cli()?;
        say(a, DONE)
    });
    let mut machine = start_on_soft(&code).await;
    heard(&machine, "p").await;
    machine.pause().await.expect("pauses");
    let state = machine.save().await.expect("saves");
    assert_eq!(vcpu(&state).lapic.irr[2], 1 << 1, "vector 0x41 is requested");
    assert_eq!(state.irqchip.ioapic.requests, 1 << 4, "the serial port's line asks");
    let ram = copy(&machine);
    drop(machine);
    let again = resumed_on(&Soft::new(), &state, ram).await;
    set_flag(&again);
    heard(&again, "!").await;
    let said = again.console().text();
    // The higher vector first.
    assert_eq!(said, "li!");
}

const SERIAL_INTERRUPTS: u32 = bare_machine::SERIAL + 1;

#[tokio::test]
async fn a_guest_that_cannot_give_memory_back_is_not_waited_for() {
    const NEVER: Duration = Duration::MAX;
    let mut machine = start(&busy(u32::MAX)).await;
    // It has no driver.
    assert_eq!(machine.give_memory_back(MEMORY, NEVER).await, Err(GiveBackError::NoDriver));
    machine.pause().await.expect("pauses");
    assert_eq!(machine.give_memory_back(MEMORY, NEVER).await, Err(GiveBackError::Paused));
    machine.resume();
    // A driver, says the state; but nothing of the guest's plays one.
    let ram = copy(&machine);
    machine.pause().await.expect("pauses");
    let mut state = machine.save().await.expect("saves");
    let balloon = state.virtio.last_mut().expect("a balloon");
    (balloon.active, balloon.status, balloon.accepted) = (true, 15, 1 << 32);
    for (queue, at) in balloon.queues.iter_mut().zip([0x30_0000, 0x31_0000]) {
        (queue.ready, queue.descriptors, queue.driver, queue.device) = (true, at, at + 0x1000, at + 0x2000);
    }
    let mut machine = resumed(&state, ram).await;
    assert_eq!(machine.give_memory_back(MEMORY, Duration::from_secs(1)).await, Ok(Bytes(0)));
    machine.stop();
    assert!(matches!(machine.ended().await, MachineEnd::Stopped));
    assert_eq!(machine.give_memory_back(MEMORY, NEVER).await, Err(GiveBackError::Ended));
}

#[tokio::test]
async fn pausing_and_resuming_are_idempotent_and_a_paused_machine_can_be_stopped() {
    let mut machine = start(&busy(u32::MAX)).await;
    machine.resume();
    assert!(matches!(machine.save().await, Err(SaveError::NotPaused)));
    for _ in 0..3 {
        machine.pause().await.expect("pauses");
        assert!(machine.is_paused());
    }
    let state = machine.save().await.expect("saves");
    machine.resume();
    machine.resume();
    assert!(!machine.is_paused());
    // It runs: sooner or later it is elsewhere.
    loop {
        machine.pause().await.expect("pauses");
        if machine.save().await.expect("saves").vcpus[0].gpr[RBX] != vcpu(&state).gpr[RBX] {
            break;
        }
        machine.resume();
        tokio::task::yield_now().await;
    }
    machine.stop();
    assert!(matches!(machine.ended().await, MachineEnd::Stopped));
    assert!(matches!(machine.save().await, Err(SaveError::Ended)));
    machine.resume();
    assert!(matches!(machine.pause().await, Err(PauseError::Ended)));
}

#[tokio::test]
async fn a_pause_that_is_given_up_lets_the_machine_run_on() {
    let mut machine = start(&program(|a| {
        await_flag(a)?;
        say(a, DONE)
    }))
    .await;
    for _ in 0..100 {
        // Polled once, so wherever it has got to.
        let _ = futures::FutureExt::now_or_never(machine.pause());
        machine.resume();
    }
    set_flag(&machine);
    heard(&machine, "!").await;
}

#[tokio::test]
async fn a_dropped_paused_machine_ends() {
    let mut machine = start(&busy(u32::MAX)).await;
    machine.pause().await.expect("pauses");
    let end = machine.ended();
    drop(machine);
    assert!(matches!(end.await, MachineEnd::Stopped));
}
