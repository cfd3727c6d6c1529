//! Several vCPUs of the soft engine over one memory: locks, the order of loads and stores, and interrupts between them.

#[path = "support/bare.rs"]
mod bare;
#[path = "support/bare_smp.rs"]
mod bare_smp;

use std::num::NonZeroU8;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use bare_smp::*;
use iced_x86::code_asm::*;
use kiln::hv::HvError;
use kiln::hv::Hypervisor;
use kiln::hv::VmSpec;
use kiln::hv::soft::Soft;
use kiln::mem::GuestRam;
use kiln::units::Bytes;
use kiln::units::VcpuId;

#[test]
fn locked_additions_of_every_width_and_alignment_lose_nothing() {
    const VCPUS: usize = 3;
    const TIMES: u32 = 3000;
    // In one word, from word to word, from line to line, from page to page.
    let places = |size: u64| [0x100, 0x201, 0x308 - size + 1, 0x440 - size + 1, 0x2000 - size + 1];
    let base = DATA + 0x1000;
    let cells = |size: u64| places(size).map(|place| base + place + 0x1_0000 * size);
    let programs: Vec<_> = (0..VCPUS)
        .map(|id| {
            program(id, |a| {
                begin_together(a, VCPUS)?;
                for at in cells(1) {
                    repeat(a, TIMES, |a| {
                        a.lock().add(byte_ptr(at), 1)?;
                        a.lock().inc(byte_ptr(at))?;
                        a.mov(bl, 1i32)?;
                        a.lock().xadd(byte_ptr(at), bl)
                    })?;
                }
                for at in cells(2) {
                    repeat(a, TIMES, |a| {
                        a.lock().add(word_ptr(at), 1)?;
                        a.lock().sub(word_ptr(at), -1)?;
                        a.mov(bx, 1i32)?;
                        a.lock().xadd(word_ptr(at), bx)
                    })?;
                }
                for at in cells(4) {
                    repeat(a, TIMES, |a| {
                        let mut again = a.create_label();
                        a.lock().add(dword_ptr(at), 1)?;
                        a.lock().inc(dword_ptr(at))?;
                        a.mov(eax, dword_ptr(at))?;
                        a.set_label(&mut again)?;
                        a.lea(ecx, ptr(rax + 1))?;
                        a.lock().cmpxchg(dword_ptr(at), ecx)?;
                        a.jne(again)
                    })?;
                }
                for at in cells(8) {
                    repeat(a, TIMES, |a| {
                        let mut again = a.create_label();
                        a.mov(rbx, 0x0101_0101_0101_0101u64)?;
                        a.lock().add(qword_ptr(at), rbx)?;
                        a.lock().xadd(qword_ptr(at), rbx)?;
                        a.mov(rbx, 0x0101_0101_0101_0101u64)?;
                        a.mov(rax, qword_ptr(at))?;
                        a.set_label(&mut again)?;
                        a.lea(rcx, ptr(rax + rbx))?;
                        a.lock().cmpxchg(qword_ptr(at), rcx)?;
                        a.jne(again)
                    })?;
                }
                // 16 bytes must be aligned.
                repeat(a, TIMES, |a| {
                    let mut again = a.create_label();
                    a.mov(rax, qword_ptr(DATA + 0x200))?;
                    a.mov(rdx, qword_ptr(DATA + 0x208))?;
                    a.set_label(&mut again)?;
                    a.lea(rbx, ptr(rax + 1))?;
                    a.lea(rcx, ptr(rdx + 3))?;
                    a.lock().cmpxchg16b(xmmword_ptr(DATA + 0x200))?;
                    a.jne(again)
                })
            })
        })
        .collect();
    let smp = Smp::new(&programs);
    smp.run();
    let times = u64::from(3 * TIMES) * VCPUS as u64;
    for size in [1, 2, 4, 8] {
        let (step, mask) = if size == 8 { (0x0101_0101_0101_0101u64, u64::MAX) } else { (1, (1u64 << (8 * size)) - 1) };
        for at in cells(size) {
            assert_eq!(smp.number(at) & mask, step.wrapping_mul(times) & mask, "{size} bytes at {at:#x}");
        }
    }
    let pair = (smp.number(DATA + 0x200), smp.number(DATA + 0x208));
    assert_eq!(pair, (times / 3, times));
}

#[test]
fn locked_bit_operations_of_one_word_do_not_disturb_each_other() {
    // Each vCPU has a bit of its own, and sees it as it left it.
    let programs: Vec<_> = (0..3)
        .map(|id| {
            program(id, |a| {
                begin_together(a, 3)?;
                a.xor(r12d, r12d)?;
                repeat(a, 10_000, |a| {
                    let [mut one, mut two] = [a.create_label(), a.create_label()];
                    a.lock().bts(dword_ptr(DATA + 0x40), 5 + id as i32)?;
                    a.jnc(one)?;
                    a.inc(r12d)?;
                    a.set_label(&mut one)?;
                    a.mov(ecx, 32 + 5 + id as u32)?;
                    // Past the word, by a register's index.
                    a.lock().btr(dword_ptr(DATA + 0x3c), ecx)?;
                    a.jc(two)?;
                    a.inc(r12d)?;
                    a.set_label(&mut two)?;
                    a.lock().not(byte_ptr(DATA + 0x48 + id as u64))?;
                    a.lock().xor(dword_ptr(DATA + 0x44), 1 << id)
                })
            })
        })
        .collect();
    let smp = Smp::new(&programs);
    assert!(smp.run().iter().all(|state| state.gpr[R12] == 0));
    assert_eq!((smp.number(DATA + 0x40), smp.number(DATA + 0x48)), (0, 0));
}

#[test]
fn a_lock_of_xchg_protects_plain_accesses() {
    const VCPUS: usize = 4;
    let programs: Vec<_> = (0..VCPUS)
        .map(|id| {
            program(id, |a| {
                begin_together(a, VCPUS)?;
                repeat(a, 5000, |a| {
                    let [mut take, mut taken, mut wait] = [a.create_label(), a.create_label(), a.create_label()];
                    a.set_label(&mut take)?;
                    a.mov(eax, 1)?;
                    a.xchg(dword_ptr(DATA + 0x40), eax)?;
                    a.test(eax, eax)?;
                    a.je(taken)?;
                    a.set_label(&mut wait)?;
                    a.pause()?;
                    a.cmp(dword_ptr(DATA + 0x40), 0)?;
                    a.jne(wait)?;
                    a.jmp(take)?;
                    a.set_label(&mut taken)?;
                    // Two counters on different pages, which only the lock keeps equal.
                    a.mov(rax, qword_ptr(DATA + 0x1000))?;
                    a.cmp(rax, qword_ptr(DATA + 0x2000))?;
                    a.setne(bl)?;
                    a.movzx(ebx, bl)?;
                    a.add(r12, rbx)?;
                    a.inc(rax)?;
                    a.mov(qword_ptr(DATA + 0x1000), rax)?;
                    a.mov(qword_ptr(DATA + 0x2000), rax)?;
                    // A plain store releases.
                    a.mov(dword_ptr(DATA + 0x40), 0)
                })
            })
        })
        .collect();
    let smp = Smp::new(&programs);
    assert!(smp.run().iter().all(|state| state.gpr[R12] == 0), "the counters differed under the lock");
    assert_eq!(smp.number(DATA + 0x1000), 5000 * VCPUS as u64);
    assert_eq!(smp.number(DATA + 0x2000), 5000 * VCPUS as u64);
}

#[test]
fn sdm_9_2_3_2_stores_and_loads_are_seen_in_order() {
    // Message passing: who has seen the flag sees the data.
    const ROUNDS: u32 = 200_000;
    let writer = program(0, |a| {
        begin_together(a, 2)?;
        a.xor(eax, eax)?;
        repeat(a, ROUNDS, |a| {
            a.inc(rax)?;
            a.mov(qword_ptr(DATA + 0x100), rax)?;
            a.mov(qword_ptr(DATA + 0x1100), rax)
        })
    });
    let reader = program(1, |a| {
        begin_together(a, 2)?;
        let mut top = a.create_label();
        a.set_label(&mut top)?;
        a.mov(rax, qword_ptr(DATA + 0x1100))?;
        a.mov(rbx, qword_ptr(DATA + 0x100))?;
        a.cmp(rbx, rax)?;
        a.setb(cl)?;
        a.movzx(ecx, cl)?;
        a.add(r12, rcx)?;
        a.inc(r13)?;
        a.cmp(rax, ROUNDS as i32)?;
        a.jb(top)
    });
    let states = Smp::new(&[writer, reader]).run();
    assert_eq!(states[1].gpr[R12], 0, "the flag was seen before the data, of {} looks", states[1].gpr[R13]);
}

#[test]
fn sdm_9_2_3_4_a_fence_orders_a_store_before_a_load() {
    // Store buffering: each stores its round and reads the other's. Without the fence both may read the past.
    const ROUNDS: u32 = 50_000;
    let notes = [DATA + 0x10_0000, DATA + 0x20_0000];
    let cells = [DATA + 0x100, DATA + 0x1100];
    let programs = [0, 1].map(|id| {
        program(id, |a| {
            begin_together(a, 2)?;
            a.xor(eax, eax)?;
            a.mov(rdi, notes[id])?;
            repeat(a, ROUNDS, |a| {
                a.inc(rax)?;
                a.mov(qword_ptr(cells[id]), rax)?;
                a.mfence()?;
                a.mov(rbx, qword_ptr(cells[1 - id]))?;
                a.mov(qword_ptr(rdi + rax * 8), rbx)
            })
        })
    });
    // On a host that is busy, the one may be done before the other begins.
    let mut overlaps = 0;
    for _ in 0..200 {
        let smp = Smp::new(&programs);
        smp.run();
        let note = |id: usize, round: u64| smp.number(notes[id] + round * 8);
        for round in 1..=u64::from(ROUNDS) {
            // The first of the other's rounds that this one has not seen...
            let unseen = note(0, round) + 1;
            if unseen <= u64::from(ROUNDS) {
                // ...was stored after this one's load, so its load comes after this one's store.
                assert!(note(1, unseen) >= round, "rounds {round} and {unseen} have not seen each other");
                overlaps += u64::from(note(1, unseen) < u64::from(ROUNDS) && note(0, round) > 0);
            }
        }
        if overlaps > 1000 {
            return;
        }
    }
    panic!("the two ran at once for {overlaps} rounds only");
}

#[test]
fn an_aligned_value_is_never_seen_half_written() {
    // One vCPU stores zeros and ones in turn; whoever reads sees one or the other.
    let writer = program(0, |a| {
        begin_together(a, 2)?;
        repeat(a, 100_000, |a| {
            a.not(rax)?;
            a.mov(qword_ptr(DATA + 0x100), rax)?;
            a.mov(dword_ptr(DATA + 0x110), eax)?;
            a.mov(word_ptr(DATA + 0x120), ax)?;
            // Within a cache line any place will do.
            a.mov(qword_ptr(DATA + 0x183), rax)
        })?;
        a.mov(dword_ptr(DATA + 0x200), 1)
    });
    let reader = program(1, |a| {
        begin_together(a, 2)?;
        let mut top = a.create_label();
        a.set_label(&mut top)?;
        let check = |a: &mut CodeAssembler| {
            let mut whole = a.create_label();
            // 0 and -1 are the values whose successors are at most 1.
            a.inc(rax)?;
            a.cmp(rax, 1)?;
            a.jbe(whole)?;
            a.inc(r12)?;
            a.set_label(&mut whole)
        };
        a.mov(rax, qword_ptr(DATA + 0x100))?;
        check(a)?;
        a.movsxd(rax, dword_ptr(DATA + 0x110))?;
        check(a)?;
        a.movsx(rax, word_ptr(DATA + 0x120))?;
        check(a)?;
        a.mov(rax, qword_ptr(DATA + 0x183))?;
        check(a)?;
        a.cmp(dword_ptr(DATA + 0x200), 0)?;
        a.je(top)
    });
    assert_eq!(Smp::new(&[writer, reader]).run()[1].gpr[R12], 0);
}

/// Writes an MSR; uses RAX, RCX and RDX.
fn write_msr(a: &mut CodeAssembler, msr: u32, high: u32, low: u32) -> Assembled {
    a.mov(ecx, msr)?;
    a.mov(eax, low)?;
    a.mov(edx, high)?;
    a.wrmsr()
}

/// Switches the local APIC to x2APIC form and enables it.
fn enable_x2apic(a: &mut CodeAssembler, id: usize) -> Assembled {
    let boot_processor = if id == 0 { 1 << 8 } else { 0 };
    write_msr(a, 0x1b, 0, 0xfee0_0c00 | boot_processor)?;
    write_msr(a, 0x80f, 0, 0x1ff)
}

/// Makes `vector` lead to `handler`; uses RAX and RDI. Vectors of different vCPUs differ, for the table is one.
fn set_gate(a: &mut CodeAssembler, vector: u64, handler: CodeLabel) -> Assembled {
    a.lea(rax, ptr(handler))?;
    a.mov(rdi, IDT + vector * 16)?;
    a.mov(word_ptr(rdi), ax)?;
    a.mov(word_ptr(rdi + 2), 0x10)?;
    a.mov(word_ptr(rdi + 4), 0x8e00u32)?;
    a.shr(rax, 16)?;
    a.mov(word_ptr(rdi + 6), ax)?;
    a.mov(qword_ptr(rdi + 8), 0)
}

/// Where interrupts are counted, those of all vCPUs together.
const COUNTED: u64 = DATA + 0x80;

/// A program with an interrupt handler that counts in R12 and at [`COUNTED`], and ends the interrupt.
fn with_handler(id: usize, vector: u64, vcpus: usize, body: impl FnOnce(&mut CodeAssembler) -> Assembled) -> Vec<u8> {
    program(id, |a| {
        let [mut handler, mut main] = [a.create_label(), a.create_label()];
        a.jmp(main)?;
        a.set_label(&mut handler)?;
        a.push(rax)?;
        a.push(rcx)?;
        a.push(rdx)?;
        a.inc(r12)?;
        a.lock().inc(qword_ptr(COUNTED))?;
        write_msr(a, 0x80b, 0, 0)?;
        a.pop(rdx)?;
        a.pop(rcx)?;
        a.pop(rax)?;
        a.iretq()?;
        a.set_label(&mut main)?;
        set_gate(a, vector, handler)?;
        enable_x2apic(a, id)?;
        begin_together(a, vcpus)?;
        body(a)
    })
}

/// Sleeps until R12 has come to R15.
fn sleep_until_counted(a: &mut CodeAssembler) -> Assembled {
    let [mut top, mut done] = [a.create_label(), a.create_label()];
    a.set_label(&mut top)?;
    a.cli()?;
    a.cmp(r12, r15)?;
    a.jae(done)?;
    a.sti()?;
    a.hlt()?;
    a.jmp(top)?;
    a.set_label(&mut done)?;
    a.sti()
}

#[test]
fn two_vcpus_wake_each_other_from_their_halts() {
    const ROUNDS: u32 = 500;
    let ball = |id: usize| {
        let (own, others) = (0x40 + id as u64, 0x41 - id as u32);
        with_handler(id, own, 2, |a| {
            let mut top = a.create_label();
            a.xor(r15, r15)?;
            a.set_label(&mut top)?;
            a.inc(r15)?;
            if id == 0 {
                write_msr(a, 0x830, 1, others)?;
            }
            sleep_until_counted(a)?;
            if id == 1 {
                write_msr(a, 0x830, 0, others)?;
            }
            a.cmp(r15, ROUNDS as i32)?;
            a.jb(top)
        })
    };
    let states = Smp::new(&[ball(0), ball(1)]).run();
    assert_eq!([states[0].gpr[R12], states[1].gpr[R12]], [u64::from(ROUNDS); 2]);
}

#[test]
fn interrupts_by_every_kind_of_destination_arrive() {
    // Physical to 1; logical to 1 and 2; lowest priority to 1 or 2; all but self; all; self by either way.
    const SENT: [(u32, u32, [u64; 4]); 7] = [
        (1, 0x0000, [0, 1, 0, 0]),
        (0b0110, 0x0800, [0, 1, 1, 0]),
        (0b0110, 0x0900, [0, 1, 0, 0]),
        (0, 0xc_0000, [0, 1, 1, 1]),
        (0, 0x8_0000, [1, 1, 1, 1]),
        (u32::MAX, 0x0000, [1, 1, 1, 1]),
        (0, 0x4_0000, [1, 0, 0, 0]),
    ];
    // Beside the interrupt of the test: one vector leads everywhere to the handler of the vCPU that set it last, which
    // all have at the same place in code of the same shape.
    let vector = 0x50;
    let receiver = |id: usize| {
        with_handler(id, vector, 4, |a| {
            a.sti()?;
            a.mov(r15d, 1)?;
            await_value(a, DATA + 0x40, r15)?;
            // What was sent to this one as well is taken here.
            a.cpuid()
        })
    };
    for (destination, command, expected) in SENT {
        let sender = with_handler(0, vector, 4, |a| {
            a.sti()?;
            write_msr(a, 0x830, destination, command | vector as u32)?;
            a.mov(r15d, expected.iter().sum::<u64>() as u32)?;
            await_value(a, COUNTED, r15)?;
            a.mov(qword_ptr(DATA + 0x40), 1)
        });
        let states = Smp::new(&[sender, receiver(1), receiver(2), receiver(3)]).run();
        let counts: Vec<_> = states.iter().map(|state| state.gpr[R12]).collect();
        assert_eq!(counts, expected, "to {destination:#x} by {command:#x}");
    }
}

#[test]
fn accessed_and_dirty_bits_do_not_undo_another_vcpus_change_of_the_entry() {
    // A page of its own: its entry's bit 52 is software's. One vCPU flips it and clears what the other's walks set.
    let (directory, table, page) = (0x4000u64, 0x5000u64, 0x4000_0000u64);
    let entry = table;
    let flipping = program(0, |a| {
        begin_together(a, 2)?;
        a.xor(r13d, r13d)?;
        repeat(a, 30_000, |a| {
            let mut as_left = a.create_label();
            a.xor(eax, eax)?;
            a.lock().btc(qword_ptr(entry), 52)?;
            a.setc(al)?;
            a.cmp(rax, r13)?;
            a.je(as_left)?;
            a.inc(r12)?;
            a.set_label(&mut as_left)?;
            a.xor(r13, 1)?;
            a.lock().and(qword_ptr(entry), !0x60i32)
        })?;
        a.mov(dword_ptr(DATA + 0x40), 1)
    });
    let walking = program(1, |a| {
        let mut top = a.create_label();
        begin_together(a, 2)?;
        a.mov(rbx, page)?;
        a.set_label(&mut top)?;
        a.mov(qword_ptr(rbx), rbx)?;
        a.invlpg(byte_ptr(rbx))?;
        a.inc(r12)?;
        a.cmp(dword_ptr(DATA + 0x40), 0)?;
        a.je(top)?;
        a.mov(qword_ptr(rbx), rbx)
    });
    let smp = Smp::new(&[flipping, walking]);
    for (at, value) in [(0x2008, directory | 3), (directory, table | 3), (entry, (DATA + 0x4000) | 3)] {
        smp.ram.store(at, value).expect("in memory");
    }
    let states = smp.run();
    assert_eq!(states[0].gpr[R12], 0, "so many flips were undone, in {} walks", states[1].gpr[R12]);
    assert_eq!(smp.number(entry) & 0xfff, 0x63, "accessed and dirty");
}

#[test]
fn vcpus_that_are_stopped_anywhere_and_saved_go_on_elsewhere() {
    // Three add to one sum under a lock of theirs, and to another by LOCK; both are checked at the end.
    const ROUNDS: u32 = 400_000;
    let programs: Vec<_> = (0..3)
        .map(|id| {
            program(id, |a| {
                begin_together(a, 3)?;
                repeat(a, ROUNDS, |a| {
                    let mut take = a.create_label();
                    a.set_label(&mut take)?;
                    a.pause()?;
                    a.mov(eax, 1)?;
                    a.xchg(dword_ptr(DATA + 0x40), eax)?;
                    a.test(eax, eax)?;
                    a.jne(take)?;
                    a.inc(qword_ptr(DATA + 0x1000))?;
                    a.mov(dword_ptr(DATA + 0x40), 0)?;
                    a.lock().inc(qword_ptr(DATA + 0x2000))
                })?;
                a.lock().inc(qword_ptr(DATA + 0x3000))?;
                a.mov(r15d, 3)?;
                await_value(a, DATA + 0x3000, r15)
            })
        })
        .collect();
    let mut smp = Smp::new(&programs);
    let mut moves = 0;
    loop {
        let running = smp.start();
        thread::sleep(Duration::from_millis(5));
        running.kicks.iter().for_each(|kick| kick.kick());
        let states = running.finish();
        if smp.number(DATA + 0x3000) == 3 {
            break;
        }
        moves += 1;
        let mut bytes = vec![0; 8 << 20];
        smp.ram.read_bytes(0, &mut bytes).expect("in memory");
        let moved = Smp::over(GuestRam::new(Bytes::mib(8)).expect("guest memory"), states);
        moved.device_writes(0, &bytes);
        smp = moved;
    }
    assert!(moves > 1, "it was never moved");
    assert_eq!([0x1000, 0x2000].map(|at| smp.number(DATA + at)), [u64::from(3 * ROUNDS); 2]);
}

#[test]
fn more_vcpus_than_there_can_be_are_refused() {
    let machine = |vcpus| {
        let ram = Arc::new(GuestRam::new(Bytes::mib(1)).expect("guest memory"));
        Soft::new().create_vm(&VmSpec { vcpus: NonZeroU8::new(vcpus).expect("not zero") }, ram)
    };
    let vm = machine(8).expect("as many as there can be");
    assert!(vm.create_vcpu(VcpuId(7)).is_ok());
    assert!(matches!(vm.create_vcpu(VcpuId(7)), Err(HvError::Unsupported(_))), "twice");
    assert!(matches!(vm.create_vcpu(VcpuId(8)), Err(HvError::Unsupported(_))));
    assert!(matches!(machine(9), Err(HvError::Unsupported(_))));
}

#[test]
fn each_vcpu_knows_its_number() {
    // CPUID leaf 1 and leaf 0xb, as an operating system counts processors.
    let programs: Vec<_> = (0..3)
        .map(|id| {
            program(id, |a| {
                a.mov(eax, 1)?;
                a.cpuid()?;
                a.mov(r12d, ebx)?;
                a.mov(eax, 0xb)?;
                a.mov(ecx, 1)?;
                a.cpuid()?;
                a.mov(r13d, edx)?;
                a.mov(eax, ebx)
            })
        })
        .collect();
    for (id, state) in Smp::new(&programs).run().iter().enumerate() {
        assert_eq!((state.gpr[R12] >> 24, state.gpr[R13]), (id as u64, id as u64));
        assert_eq!(state.gpr[RAX], 3, "of so many");
        assert_eq!(state.gpr[R12] >> 16 & 0xff, 4, "ids, rounded up");
    }
}
