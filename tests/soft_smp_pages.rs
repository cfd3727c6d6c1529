//! Several vCPUs of the soft engine and the pages of their memory: code that one changes and another runs, and the log of
//! what they write.

#[path = "support/bare.rs"]
mod bare;
#[path = "support/bare_smp.rs"]
mod bare_smp;

use std::time::Duration;
use std::time::Instant;

use bare::EXIT_PORT;
use bare_smp::*;
use iced_x86::code_asm::*;
use kiln::hv::Exit;
use kiln::hv::HvError;

/// Where the code is that one vCPU changes and another runs.
const SHARED_CODE: u64 = DATA + 0x8000;

/// `mov eax, 0; ret`, without its immediate.
fn shared_code(smp: &Smp) {
    for (at, byte) in (SHARED_CODE..).zip([0xb8u8, 0, 0, 0, 0, 0xc3]) {
        smp.ram.store(at, byte).expect("in memory");
    }
}

/// One vCPU changes a function's result again and again, and tells the other, which calls it and tells back.
fn cross_modified(serialise: fn(&mut CodeAssembler) -> Assembled, call: fn(&mut CodeAssembler) -> Assembled) {
    const ROUNDS: i32 = 300;
    let modifier = program(0, |a| {
        begin_together(a, 2)?;
        let mut top = a.create_label();
        a.xor(r14d, r14d)?;
        a.set_label(&mut top)?;
        a.inc(r14)?;
        a.mov(dword_ptr(SHARED_CODE + 1), r14d)?;
        a.mov(qword_ptr(DATA + 0x1000), r14)?;
        await_value(a, DATA + 0x2000, r14)?;
        a.cmp(r14, ROUNDS)?;
        a.jb(top)
    });
    let caller = program(1, |a| {
        begin_together(a, 2)?;
        let [mut top, mut right] = [a.create_label(), a.create_label()];
        a.xor(r14d, r14d)?;
        a.set_label(&mut top)?;
        a.inc(r14)?;
        await_value(a, DATA + 0x1000, r14)?;
        serialise(a)?;
        call(a)?;
        a.cmp(rax, r14)?;
        a.je(right)?;
        a.inc(r12)?;
        a.set_label(&mut right)?;
        a.mov(qword_ptr(DATA + 0x2000), r14)?;
        a.cmp(r14, ROUNDS)?;
        a.jb(top)
    });
    let smp = Smp::new(&[modifier, caller]);
    shared_code(&smp);
    let states = smp.run();
    assert_eq!(states[1].gpr[R12], 0, "so many calls ran code of before");
}

#[test]
fn sdm_9_1_3_code_that_another_vcpu_changed_is_run_after_a_serialising_instruction() {
    let serialise = |a: &mut CodeAssembler| {
        a.xor(eax, eax)?;
        a.cpuid()
    };
    let call = |a: &mut CodeAssembler| {
        a.mov(rbx, SHARED_CODE)?;
        a.call(rbx)
    };
    cross_modified(serialise, call);
}

#[test]
fn a_pointer_to_code_that_another_vcpu_has_just_written_may_be_followed() {
    // No serialising instruction: what programs that compile at run time rely on, and hardware in fact gives.
    cross_modified(
        |_| Ok(()),
        |a| {
            a.mov(rbx, SHARED_CODE)?;
            a.call(rbx)
        },
    );
    cross_modified(
        |_| Ok(()),
        |a| {
            a.mov(rbx, DATA + 0x3000)?;
            a.mov(rcx, SHARED_CODE)?;
            a.mov(qword_ptr(rbx), rcx)?;
            a.call(qword_ptr(rbx))
        },
    );
}

#[test]
fn code_that_changes_in_the_midst_of_a_loop_is_run_before_long() {
    // A loop within one page, by links alone, that only another vCPU's change ends.
    let modifier = program(0, |a| {
        begin_together(a, 2)?;
        repeat(a, 100_000, |a| a.nop())?;
        // JMP to itself becomes two NOPs.
        a.mov(word_ptr(SHARED_CODE + 6), 0x9090u32)
    });
    let looping = program(1, |a| {
        begin_together(a, 2)?;
        a.mov(rbx, SHARED_CODE + 6)?;
        a.call(rbx)
    });
    let smp = Smp::new(&[modifier, looping]);
    for (at, byte) in (SHARED_CODE + 6..).zip([0xebu8, 0xfe, 0xc3]) {
        smp.ram.store(at, byte).expect("in memory");
    }
    smp.run();
}

fn logged(smp: &Smp) -> Vec<u64> {
    smp.vm.take_dirty_log().expect("a log").iter().collect()
}

#[test]
fn the_log_has_the_pages_that_were_written_and_no_others() {
    let page = |n: u64| DATA + 0x1000 * n;
    // Each way to write, each on a page of its own; one page is only read.
    let one = program(0, |a| {
        a.mov(byte_ptr(page(1)), 1)?;
        a.lock().inc(qword_ptr(page(2)))?;
        a.mov(rsp, page(3) + 0x100)?;
        a.push(rax)?;
        a.mov(rdi, page(4))?;
        a.mov(ecx, 0x1800)?;
        a.mov(al, 7i32)?;
        a.rep().stosb()?;
        a.mov(rax, qword_ptr(page(7)))?;
        a.mov(qword_ptr(page(9) - 3), rax)?;
        a.movups(xmmword_ptr(page(10)), xmm0)?;
        // Within its own code's page.
        a.mov(byte_ptr(CODE + 0xff0), 1)
    });
    let other = program(1, |a| {
        let mut top = a.create_label();
        a.mov(rax, qword_ptr(page(20)))?;
        a.mov(qword_ptr(page(21)), rax)?;
        a.mov(edx, u32::from(EXIT_PORT))?;
        a.out(dx, al)?;
        // It runs on for a moment.
        a.set_label(&mut top)?;
        a.cmp(byte_ptr(page(20)), 0)?;
        a.je(top)?;
        a.mov(qword_ptr(page(22)), rax)
    });
    let smp = Smp::new(&[one, other]);
    assert!(matches!(smp.vm.take_dirty_log(), Err(HvError::Unsupported(_))));
    let (mut one, mut other) = (smp.vcpu(0), smp.vcpu(1));
    smp.vm.start_dirty_log().expect("begun");
    assert_eq!(logged(&smp), [0; 0]);
    assert_eq!(one.run().expect("runs"), Exit::Kicked);
    // The page tables' accessed and dirty bits count: they are in memory.
    let written = [1, 2, 3, 4, 5, 8, 9, 10].map(page);
    let tables = [0x1000, 0x2000, 0x3000];
    let expected: Vec<u64> = tables.into_iter().chain([CODE]).chain(written).collect();
    assert_eq!(logged(&smp), expected);
    assert_eq!(logged(&smp), [0; 0], "nobody has run since");
    assert_eq!(other.run().expect("runs"), Exit::Kicked);
    assert_eq!(logged(&smp), [page(21)]);
    smp.ram.store(page(20), 1u8).expect("in memory");
    assert_eq!(other.run().expect("runs"), Exit::Kicked);
    assert_eq!(logged(&smp), [page(22)]);
    smp.vm.stop_dirty_log().expect("ended");
    assert!(smp.vm.take_dirty_log().is_err());
}

#[test]
fn the_log_of_running_vcpus_misses_nothing() {
    // Two vCPUs write their rounds all over; a copy that follows the log has all of it in the end.
    const PAGES: u64 = 64;
    let area = |id: usize| DATA + 0x10_0000 * (id as u64 + 1);
    let programs: Vec<_> = (0..2)
        .map(|id| {
            program(id, |a| {
                let mut top = a.create_label();
                begin_together(a, 2)?;
                a.set_label(&mut top)?;
                a.inc(r13)?;
                a.imul_3(rax, r13, 7)?;
                a.and(eax, PAGES as i32 - 1)?;
                a.shl(eax, 12)?;
                a.mov(qword_ptr(rax + area(id) as i32), r13)?;
                a.cmp(dword_ptr(DATA + 0x40), 0)?;
                a.je(top)
            })
        })
        .collect();
    let smp = Smp::new(&programs);
    let mut copy = vec![0u8; 8 << 20];
    let update = |copy: &mut Vec<u8>| {
        for at in logged(&smp) {
            let page = at as usize..at as usize + 0x1000;
            smp.ram.read_bytes(at, &mut copy[page]).expect("in memory");
        }
    };
    smp.vm.start_dirty_log().expect("begun");
    smp.ram.read_bytes(0, &mut copy).expect("in memory");
    let running = smp.start();
    let until = Instant::now() + Duration::from_millis(300);
    let mut takes = 0;
    while Instant::now() < until {
        update(&mut copy);
        takes += 1;
    }
    smp.ram.store(DATA + 0x40, 1u32).expect("in memory");
    assert_eq!(running.count(), 2);
    update(&mut copy);
    copy[(DATA + 0x40) as usize] = 1;
    let mut memory = vec![0; 8 << 20];
    smp.ram.read_bytes(0, &mut memory).expect("in memory");
    let differs: Vec<_> =
        (0..memory.len()).step_by(0x1000).filter(|at| memory[*at..at + 0x1000] != copy[*at..at + 0x1000]).collect();
    assert!(differs.is_empty(), "after {takes} looks these pages differ: {differs:x?}");
}

#[test]
fn a_vcpu_that_is_stuck_holds_nobody_up() {
    // It has written where the other's code lies, so the other has to ask it to notice writes; and it never answers.
    let stuck = program(0, |a| {
        a.mov(dword_ptr(SHARED_CODE + 1), 0x1234)?;
        a.mov(edx, u32::from(WAIT_PORT))?;
        a.out(dx, al)?;
        // Now it writes there again, through what it still has in its TLB.
        a.mov(dword_ptr(SHARED_CODE + 1), 0x5678)?;
        a.mov(qword_ptr(DATA + 0x1000), 1)
    });
    let free = program(1, |a| {
        let mut top = a.create_label();
        a.mov(r14d, 10_000)?;
        a.mov(rbx, SHARED_CODE)?;
        a.set_label(&mut top)?;
        a.call(rbx)?;
        a.add(r13, rax)?;
        a.dec(r14)?;
        a.jne(top)?;
        a.mov(edx, u32::from(WAIT_PORT))?;
        a.out(dx, al)?;
        a.mov(r14d, 1)?;
        await_value(a, DATA + 0x1000, r14)?;
        a.call(rbx)
    });
    let smp = Smp::new(&[stuck, free]);
    shared_code(&smp);
    // The other is not to begin before the first is stuck: a jump to itself.
    let begin = smp.ram.load::<u16>(code_of(1)).expect("in memory");
    smp.ram.store(code_of(1), 0xfeebu16).expect("in memory");
    let running = smp.start();
    running.waits[0].0.recv_timeout(LONG).expect("it comes there");
    smp.device_writes(code_of(1), &begin.to_le_bytes());
    running.waits[1].0.recv_timeout(LONG).expect("it comes there although the first is stuck");
    running.waits[0].1.send(()).expect("it waits");
    running.waits[1].1.send(()).expect("it waits");
    let states = running.finish();
    assert_eq!(states[1].gpr[R13], 10_000 * 0x1234);
    assert_eq!(states[1].gpr[RAX] & 0xffff_ffff, 0x5678, "the write that it was not asked about is seen all the same");
}
