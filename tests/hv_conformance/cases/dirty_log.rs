//! The log of pages that vCPUs write: all of them and no other, the tables' accessed and dirty bits among them.

use std::collections::BTreeSet;

use super::*;

cases!(dirty_log:
    exactly_the_written_pages,
    taking_begins_anew,
    strings_devices_and_locked_operations,
    accessed_and_dirty_bits_are_writes,
    frames_of_exceptions_are_writes,
    a_stopped_log_tells_nothing,
    starting_forgets,
    level_3_writes_are_logged,
);

type Pages = BTreeSet<u64>;

fn take(machine: &Machine, bench: &Bench) -> Result<Pages, Skip> {
    let log = machine.vm.take_dirty_log().map_err(|error| bench.refused("taking the log", &error))?;
    Ok(log.iter().collect())
}

fn start(machine: &Machine, bench: &Bench) -> Outcome {
    machine.vm.start_dirty_log().map_err(|error| bench.refused("starting the log", &error))
}

/// Runs once without a log, so that all accessed and dirty bits are set; then once with it, and what it tells.
fn logged(bench: &Bench, guest: &Guest) -> Result<Pages, Skip> {
    let mut machine = Machine::new(bench, guest)?;
    machine.run()?.done();
    machine.restore(&guest.state);
    start(&machine, bench)?;
    machine.run()?.done();
    take(&machine, bench)
}

fn pages<const N: usize>(pages: [u64; N]) -> Pages {
    pages.into_iter().collect()
}

fn exactly_the_written_pages(bench: &Bench) -> Outcome {
    let guest = Guest::running(|a| {
        a.mov(byte_ptr(DATA + 5), 1)?;
        // Across a border, both.
        a.mov(qword_ptr(DATA + 0x1ffc), 7)?;
        a.mov(ebx, LARGE as u32 + 0x12_3000)?;
        a.mov(qword_ptr(rbx), 1)?;
        // The last page of memory. What was there already is written all the same.
        a.mov(ebx, RAM.0 as u32 - 8)?;
        a.mov(qword_ptr(rbx), 0)?;
        // Reads are not writes, and a write to a device is none of memory.
        a.mov(rax, qword_ptr(DATA + 0x4000))?;
        a.mov(rbx, DEVICE)?;
        a.mov(dword_ptr(rbx), eax)
    });
    let expected = pages([DATA, DATA + 0x1000, DATA + 0x2000, LARGE + 0x12_3000, RAM.0 - 0x1000]);
    assert_eq!(logged(bench, &guest)?, expected);
    Ok(())
}

fn taking_begins_anew(bench: &Bench) -> Outcome {
    let guest = Guest::running(|a| {
        for n in 0..4 {
            a.mov(qword_ptr(DATA + n * 0x1000), n as i32)?;
            point(a, n as u32)?;
        }
        // A page that was told before.
        a.mov(qword_ptr(DATA), 9)
    });
    let mut machine = Machine::new(bench, &guest)?;
    for _ in 0..4 {
        machine.run()?.point();
    }
    machine.run()?.done();
    machine.restore(&guest.state);
    start(&machine, bench)?;
    for n in 0..4 {
        assert_eq!(machine.run()?.point(), n);
        assert_eq!(take(&machine, bench)?, pages([DATA + n * 0x1000]), "step {n}");
    }
    machine.run()?.done();
    assert_eq!(take(&machine, bench)?, pages([DATA]));
    assert_eq!(take(&machine, bench)?, Pages::new());
    Ok(())
}

fn strings_devices_and_locked_operations(bench: &Bench) -> Outcome {
    let guest = Guest::running(|a| {
        a.mov(edi, DATA as u32 + 0xff0)?;
        a.mov(ecx, 0x1020)?;
        a.rep().stosb()?;
        a.mov(edx, 0x600)?;
        a.mov(edi, DATA as u32 + 0x4000)?;
        a.insd()?;
        a.lock().inc(qword_ptr(DATA + 0x6000))?;
        a.mov(eax, 1)?;
        a.xchg(dword_ptr(DATA + 0x7000), eax)?;
        a.fxsave64(ptr(DATA + 0x8000))?;
        a.movups(xmmword_ptr(DATA + 0x8ff8), xmm0)?;
        // A comparison that fails may be a write of what was there; one that succeeds is one.
        a.xor(eax, eax)?;
        a.cmpxchg(dword_ptr(DATA + 0xb000), eax)
    });
    let expected = pages([
        DATA,
        DATA + 0x1000,
        DATA + 0x2000,
        DATA + 0x4000,
        DATA + 0x6000,
        DATA + 0x7000,
        DATA + 0x8000,
        DATA + 0x9000,
        DATA + 0xb000,
    ]);
    assert_eq!(logged(bench, &guest)?, expected);
    Ok(())
}

/// 5.8: the processor's own writes to tables.
fn accessed_and_dirty_bits_are_writes(bench: &Bench) -> Outcome {
    let guest = Guest::running(|a| {
        a.mov(ebx, WINDOW as u32)?;
        a.mov(rax, qword_ptr(rbx))?;
        point(a, 1)?;
        a.mov(ebx, WINDOW as u32)?;
        a.mov(qword_ptr(rbx), rax)?;
        point(a, 2)?;
        a.mov(ebx, WINDOW as u32)?;
        a.mov(qword_ptr(rbx), rax)
    });
    // Everything but the window's page has been touched before, and its table's entry too.
    guest.map(WINDOW, FRAMES | RW | P);
    guest.map(WINDOW + 0x1000, (FRAMES + 0x1000) | D | A | RW | P);
    for at in (PML4..DIRECTORY + 0x1000).chain(LOW_TABLE..LOW_TABLE + 0x1000).step_by(8) {
        let entry = guest.get(at);
        let leaf = at >= LOW_TABLE || entry & PS != 0;
        guest.put(
            at,
            entry
                | if entry & P == 0 {
                    0
                } else if leaf {
                    A | D
                } else {
                    A
                },
        );
    }
    let mut machine = Machine::new(bench, &guest)?;
    start(&machine, bench)?;
    machine.run()?.point();
    assert_eq!(take(&machine, bench)?, pages([WINDOW_TABLE]), "the first read");
    machine.run()?.point();
    assert_eq!(take(&machine, bench)?, pages([WINDOW_TABLE, FRAMES]), "the first write");
    machine.run()?.done();
    assert_eq!(take(&machine, bench)?, pages([FRAMES]), "the second write");
    Ok(())
}

fn frames_of_exceptions_are_writes(bench: &Bench) -> Outcome {
    let mut guest = Guest::running(|a| a.ud2());
    let handler = guest.handler(6, |a| {
        a.add(qword_ptr(rsp), 2)?;
        a.iretq()
    });
    guest.gate(6, handler, INTERRUPT_GATE | 2);
    assert_eq!(logged(bench, &guest)?, pages([IST2 - 0x1000]));
    Ok(())
}

fn a_stopped_log_tells_nothing(bench: &Bench) -> Outcome {
    let guest = Guest::running(|a| a.mov(qword_ptr(DATA), 1));
    let mut machine = Machine::new(bench, &guest)?;
    start(&machine, bench)?;
    machine.run()?.done();
    machine.vm.stop_dirty_log().expect("stops");
    machine.vm.stop_dirty_log().expect("is idempotent");
    assert!(machine.vm.take_dirty_log().is_err(), "there is no log");
    // And the machine goes on.
    machine.restore(&guest.state);
    machine.run()?.done();
    assert!(machine.vm.take_dirty_log().is_err());
    Ok(())
}

fn starting_forgets(bench: &Bench) -> Outcome {
    let guest = Guest::running(|a| a.mov(qword_ptr(DATA), 1));
    let mut machine = Machine::new(bench, &guest)?;
    start(&machine, bench)?;
    machine.run()?.done();
    start(&machine, bench)?;
    assert_eq!(take(&machine, bench)?, Pages::new());
    machine.restore(&guest.state);
    machine.run()?.done();
    assert_eq!(take(&machine, bench)?, pages([DATA]));
    Ok(())
}

fn level_3_writes_are_logged(bench: &Bench) -> Outcome {
    let mut guest = Guest::new();
    guest.user(|a| {
        a.mov(qword_ptr(USER_DATA), 1)?;
        a.mov(rax, qword_ptr(USER_DATA + 0x1000))?;
        a.push(rax)
    });
    assert_eq!(
        logged(bench, &guest)?,
        pages([USER_DATA, USER_STACK - 0x1000, RSP0 - 0x1000]),
        "and the frame of the end"
    );
    Ok(())
}
