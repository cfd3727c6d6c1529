//! A guest that has gone wrong can always be stopped, soon: on every engine of the host.
//!
//! How soon is a promise, 100 ms from the request to the end. The host of a test can be as busy as it likes, so each
//! guest has some attempts and the fastest counts.

use std::sync::Arc;
use std::time::Duration;
use std::time::Instant;

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use kiln::hv::Hypervisor;
use kiln::hv::soft::Soft;
use kiln::vmm::Machine;
use kiln::vmm::MachineEnd;

#[path = "support/bare.rs"]
mod bare;
#[path = "support/bare_machine.rs"]
mod bare_machine;

use bare_machine::SERIAL;
use bare_machine::engine::kvm;
use bare_machine::fresh;
use bare_machine::program;
use bare_machine::say;

const SOON: Duration = Duration::from_millis(100);
const ATTEMPTS: usize = 5;
/// For a host that hangs.
const DEADLINE: Duration = Duration::from_secs(20);

type Build = fn(&mut CodeAssembler) -> Result<(), IcedError>;

/// The engines of this host; says why one is not here.
#[allow(clippy::print_stderr, reason = "what was not run is to be seen")]
fn engines(test: &str) -> Vec<Arc<dyn Hypervisor>> {
    let soft: Arc<dyn Hypervisor> = Arc::new(Soft::new());
    let kvm = kvm().inspect_err(|error| eprintln!("{test}: not run under kvm: {error}"));
    std::iter::once(soft).chain(kvm).collect()
}

async fn start(engine: &dyn Hypervisor, build: Build) -> Machine {
    let (mut state, ram) = fresh(&program(build));
    state.cpu_profile = engine.cpu_profile().to_owned();
    let mut machine = Machine::restore(engine, &state, ram, &[]).await.expect("a valid state");
    machine.resume();
    machine
}

async fn end(engine: &dyn Hypervisor, machine: &Machine) -> MachineEnd {
    let end = tokio::time::timeout(DEADLINE, machine.ended()).await;
    end.unwrap_or_else(|_| panic!("{}: the machine does not end", engine.cpu_profile()))
}

/// Starts the guest, lets it run into its trouble, and stops it: the fastest of some times.
async fn stopped_in(engine: &dyn Hypervisor, build: Build) -> Duration {
    let mut fastest = Duration::MAX;
    for _ in 0..ATTEMPTS {
        let machine = start(engine, build).await;
        bare_machine::heard(&machine, "!").await;
        let asked = Instant::now();
        machine.stop();
        let end = end(engine, &machine).await;
        assert!(matches!(end, MachineEnd::Stopped), "{}: it ended by itself: {end:?}", engine.cpu_profile());
        fastest = fastest.min(asked.elapsed());
    }
    fastest
}

/// The same with a pause, after which the machine is stopped where it stands.
async fn paused_in(engine: &dyn Hypervisor, build: Build) -> Duration {
    let mut fastest = Duration::MAX;
    for _ in 0..ATTEMPTS {
        let mut machine = start(engine, build).await;
        bare_machine::heard(&machine, "!").await;
        let asked = Instant::now();
        machine.pause().await.expect("it pauses");
        fastest = fastest.min(asked.elapsed());
        machine.stop();
        assert!(matches!(end(engine, &machine).await, MachineEnd::Stopped));
    }
    fastest
}

async fn can_be_stopped(test: &str, build: Build) {
    for engine in engines(test) {
        let took = stopped_in(&*engine, build).await;
        assert!(took < SOON, "{}: stopped after {took:?}", engine.cpu_profile());
        let took = paused_in(&*engine, build).await;
        assert!(took < SOON, "{}: paused after {took:?}", engine.cpu_profile());
    }
}

#[tokio::test]
async fn one_that_spins_with_interrupts_off() {
    can_be_stopped("one_that_spins_with_interrupts_off", |a| {
        let mut spin = a.create_label();
        a.cli()?;
        say(a, b'!')?;
        a.set_label(&mut spin)?;
        a.jmp(spin)
    })
    .await;
}

#[tokio::test]
async fn one_that_halts_for_ever() {
    can_be_stopped("one_that_halts_for_ever", |a| {
        a.cli()?;
        say(a, b'!')?;
        a.hlt()
    })
    .await;
}

#[tokio::test]
async fn one_that_floods_the_console() {
    can_be_stopped("one_that_floods_the_console", |a| {
        let mut again = a.create_label();
        a.mov(edx, SERIAL)?;
        a.mov(eax, u32::from(b'!'))?;
        a.set_label(&mut again)?;
        a.out(dx, al)?;
        a.jmp(again)
    })
    .await;
}

#[tokio::test]
async fn one_that_floods_the_console_with_strings() {
    can_be_stopped("one_that_floods_the_console_with_strings", |a| {
        let mut again = a.create_label();
        say(a, b'!')?;
        a.set_label(&mut again)?;
        a.mov(rsi, bare::CODE)?;
        a.mov(rcx, 0x10_0000u64)?;
        a.mov(edx, SERIAL)?;
        a.rep().outsb()?;
        a.jmp(again)
    })
    .await;
}

#[tokio::test]
async fn one_that_copies_without_end_in_one_instruction() {
    can_be_stopped("one_that_copies_without_end_in_one_instruction", |a| {
        say(a, b'!')?;
        // The same byte over and over would need a loop; this count never ends on pages that are there again and again.
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.mov(rsi, bare::CODE)?;
        a.mov(rdi, 0x20_0000u64)?;
        a.mov(rcx, 0x10_0000u64)?;
        a.rep().movsb()?;
        a.jmp(again)
    })
    .await;
}

#[tokio::test]
async fn one_whose_fault_handler_faults_without_end() {
    can_be_stopped("one_whose_fault_handler_faults_without_end", |a| {
        let mut handler = a.create_label();
        bare_machine::set_gate(a, 6, handler)?;
        say(a, b'!')?;
        a.set_label(&mut handler)?;
        // Always from the same stack, which would otherwise run out.
        a.mov(rsp, bare::STACK)?;
        a.ud2()
    })
    .await;
}

#[tokio::test]
async fn one_that_rewrites_its_own_code() {
    can_be_stopped("one_that_rewrites_its_own_code", |a| {
        let (mut again, mut changed) = (a.create_label(), a.create_label());
        say(a, b'!')?;
        a.lea(rbx, ptr(changed))?;
        a.set_label(&mut again)?;
        a.inc(byte_ptr(rbx + 1))?;
        a.set_label(&mut changed)?;
        a.mov(al, 0)?;
        a.jmp(again)
    })
    .await;
}

#[tokio::test]
async fn one_that_rings_doorbells_without_end() {
    can_be_stopped("one_that_rings_doorbells_without_end", |a| {
        let mut again = a.create_label();
        say(a, b'!')?;
        // QueueNotify of the first device, in the hole below 4 GiB.
        a.mov(rbx, kiln::mem::HOLE_START.0 + 0x1000_0000 + 0x50)?;
        a.set_label(&mut again)?;
        a.mov(dword_ptr(rbx), 0u32)?;
        a.jmp(again)
    })
    .await;
}

#[tokio::test]
async fn a_triple_fault_ends_the_machine_at_once() {
    for engine in engines("a_triple_fault_ends_the_machine_at_once") {
        let mut fastest = Duration::MAX;
        for _ in 0..ATTEMPTS {
            let machine = start(&*engine, |a| {
                let table = qword_ptr(0x8100u64);
                a.mov(table, 0)?;
                a.lidt(ptr(0x8100u64))?;
                a.ud2()
            })
            .await;
            let began = Instant::now();
            let end = end(&*engine, &machine).await;
            assert!(matches!(end, MachineEnd::Shutdown), "{end:?}");
            fastest = fastest.min(began.elapsed());
        }
        assert!(fastest < SOON, "{}: over after {fastest:?}", engine.cpu_profile());
    }
}
