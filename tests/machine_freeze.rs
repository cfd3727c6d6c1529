//! Machines that are kept while they run, with a guest that never stops writing: every image is of one instant.

#[path = "support/bare.rs"]
mod bare;
#[path = "support/bare_machine.rs"]
mod bare_machine;

use std::time::{Duration, Instant};

use bare_machine::copy;
use bare_machine::program;
use bare_machine::program_of;
use bare_machine::resumed;
use bare_machine::start;
use bare_machine::start_with;
use iced_x86::code_asm::{qword_ptr, r15, rdi};
use kiln::mem::GuestRam;
use kiln::vmm::{Frozen, Machine};

/// Where a round's number is written first...
const FIRST: u64 = 0x21_0000;
/// ...then to each of these pages, ascending...
const PAGES: std::ops::Range<u64> = 0x22_0000..0x3e_0000;
/// ...and last here.
const LAST: u64 = 0x3f_f000;
const PAGE: u64 = 0x1000;

const R15: usize = 15;
const RDI: usize = 7;
/// For a guest whose rounds take microseconds.
const LONG: Duration = Duration::from_secs(60);

/// Writes the number of its round to one page after another, for ever.
fn writer() -> Vec<u8> {
    program(|a| {
        let (mut round, mut page) = (a.create_label(), a.create_label());
        a.set_label(&mut round)?;
        a.inc(r15)?;
        a.mov(qword_ptr(FIRST), r15)?;
        a.mov(rdi, PAGES.start)?;
        a.set_label(&mut page)?;
        a.mov(qword_ptr(rdi), r15)?;
        a.add(rdi, PAGE as i32)?;
        a.cmp(rdi, PAGES.end as i32)?;
        a.jb(page)?;
        a.mov(qword_ptr(LAST), r15)?;
        a.jmp(round)
    })
}

fn number(ram: &GuestRam, at: u64) -> u64 {
    ram.load(at).expect("in memory")
}

/// Waits until the guest is `rounds` further.
async fn go_on(machine: &Machine, rounds: u64) {
    let wanted = number(machine.memory(), FIRST) + rounds;
    let there = async {
        while number(machine.memory(), FIRST) < wanted {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(LONG, there).await.expect("the guest goes on");
}

/// Checks that processor and memory are of one instant; the round.
fn check(frozen: &Frozen) -> u64 {
    let ram = frozen.map_memory().expect("mapped");
    let cpu = &frozen.state().vcpus[0];
    let [round, first, last] = [cpu.gpr[R15], number(&ram, FIRST), number(&ram, LAST)];
    // Between the first instruction of a round and the second, all of memory is of the round before.
    let begun = first == round;
    assert!(begun || first + 1 == round, "round {round}, {first} in memory");
    assert!(last == first || last + 1 == first, "{first} was written first, {last} last");
    let numbers: Vec<u64> = PAGES.step_by(PAGE as usize).map(|page| number(&ram, page)).collect();
    let done = numbers.iter().take_while(|number| **number == first).count();
    assert!(numbers[done..].iter().all(|number| number + 1 == first), "{first}, then {done} pages, then {numbers:?}");
    if last == first {
        assert_eq!(done, numbers.len(), "the last is not written before the others");
    }
    // The processor's pointer is at the next page to be written, or still at the one just written.
    if begun && (1..numbers.len()).contains(&done) {
        let next = PAGES.start + done as u64 * PAGE;
        let at = cpu.gpr[RDI];
        assert!(at == next || at + PAGE == next, "{done} pages are written, the pointer is at {at:#x}");
    }
    first
}

/// Numbers in no order.
fn random(seed: u64) -> impl Iterator<Item = u64> {
    std::iter::successors(Some(seed), |n| {
        Some(n.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f))
    })
    .map(|n| n >> 33)
}

async fn freeze_often(machine: &mut Machine, seed: u64) -> Frozen {
    let (mut before, mut last) = (0, None);
    for moment in random(seed).take(50) {
        go_on(machine, moment % 300).await;
        let began = Instant::now();
        let frozen = machine.freeze().await.expect("kept");
        assert!(!machine.is_paused());
        assert!((Duration::from_nanos(1)..began.elapsed()).contains(&frozen.paused()), "{:?}", frozen.paused());
        let round = check(&frozen);
        assert!(round >= before, "round {round} after {before}");
        (before, last) = (round, Some(frozen));
    }
    last.expect("kept at least once")
}

#[tokio::test]
async fn images_of_a_writing_guest_and_of_its_clones_are_of_one_instant() {
    let mut machine = start(&writer()).await;
    let frozen = freeze_often(&mut machine, 1).await;
    let mut clone = frozen.restore(bare_machine::engine().as_ref(), &[]).await.expect("restored");
    clone.resume();
    let frozen = freeze_often(&mut clone, 2).await;
    let mut third = frozen.restore(bare_machine::engine().as_ref(), &[]).await.expect("restored");
    third.resume();
    go_on(&third, 100).await;
    check(&third.freeze().await.expect("kept"));
}

#[tokio::test]
async fn so_are_those_of_memory_from_a_file_that_is_no_image() {
    let mut machine = start(&writer()).await;
    go_on(&machine, 10).await;
    machine.pause().await.expect("paused");
    let state = machine.save().await.expect("saved");
    let mut other = resumed(&state, copy(&machine)).await;
    go_on(&other, 10).await;
    check(&other.freeze().await.expect("kept"));
}

#[tokio::test]
async fn a_paused_machine_stays_so() {
    let mut machine = start(&writer()).await;
    go_on(&machine, 10).await;
    machine.pause().await.expect("paused");
    let rounds = [(); 2].map(|()| number(machine.memory(), FIRST));
    let frozen = machine.freeze().await.expect("kept");
    assert!(machine.is_paused());
    assert_eq!(frozen.paused(), Duration::ZERO);
    assert_eq!([check(&frozen); 2], rounds);
}

#[tokio::test]
async fn a_freeze_that_is_cancelled_at_any_moment_leaves_the_machine_running() {
    let mut machine = start(&writer()).await;
    let mut done = 0;
    for moment in random(3).take(200) {
        let moment = async {
            for _ in 0..moment % 200 {
                tokio::task::yield_now().await;
            }
        };
        tokio::select! {
            biased;
            frozen = machine.freeze() => {
                check(&frozen.expect("kept"));
                done += 1;
            }
            () = moment => {}
        }
        assert!(!machine.is_paused());
        go_on(&machine, 2).await;
    }
    assert!(done < 200, "some are cancelled");
    check(&machine.freeze().await.expect("kept"));
}

/// A number that goes from one of two vCPUs to the other and back, by memory.
fn ball() -> Vec<Vec<u8>> {
    let (one, other) = (FIRST, LAST);
    let throwing = program(|a| {
        let (mut round, mut wait) = (a.create_label(), a.create_label());
        a.set_label(&mut round)?;
        a.inc(r15)?;
        a.mov(qword_ptr(one), r15)?;
        a.set_label(&mut wait)?;
        a.pause()?;
        a.cmp(qword_ptr(other), r15)?;
        a.jb(wait)?;
        a.jmp(round)
    });
    let catching = program_of(1, |a| {
        let (mut round, mut wait) = (a.create_label(), a.create_label());
        a.set_label(&mut round)?;
        a.inc(r15)?;
        a.set_label(&mut wait)?;
        a.pause()?;
        a.cmp(qword_ptr(one), r15)?;
        a.jb(wait)?;
        a.mov(qword_ptr(other), r15)?;
        a.jmp(round)
    });
    vec![throwing, catching]
}

/// Checks that both processors and memory are of one instant; the round.
fn check_ball(frozen: &Frozen) -> u64 {
    let ram = frozen.map_memory().expect("mapped");
    let [one, other] = [FIRST, LAST].map(|at| number(&ram, at));
    assert!(one == other || one == other + 1, "{one} was thrown, {other} caught");
    let rounds: Vec<u64> = frozen.state().vcpus.iter().map(|vcpu| vcpu.gpr[R15]).collect();
    assert!(rounds[0] == one || rounds[0] == one + 1 && one == other, "{rounds:?} with {one} and {other} in memory");
    assert!(rounds[1] == other || rounds[1] == other + 1, "{rounds:?} with {one} and {other} in memory");
    one
}

#[tokio::test]
async fn images_of_two_vcpus_are_of_one_instant() {
    let mut machine = start_with(&ball()).await;
    let mut before = 0;
    for moment in random(4).take(30) {
        go_on(&machine, moment % 20).await;
        let frozen = machine.freeze().await.expect("kept");
        let round = check_ball(&frozen);
        assert!(round >= before, "round {round} after {before}");
        before = round;
        let mut clone = frozen.restore(bare_machine::engine().as_ref(), &[]).await.expect("restored");
        clone.resume();
        go_on(&clone, 2).await;
        check_ball(&clone.freeze().await.expect("kept"));
    }
}
