//! Locked operations of two vCPUs on one place (9.1.2): not one of them is lost.

use super::apic::await_result;
use super::*;

cases!(locked:
    increments_and_decrements,
    additions,
    exchange_and_add,
    compare_and_exchange,
    compare_and_exchange_16_bytes,
    bit_operations,
    logic,
    a_spin_lock_by_exchange,
    a_spin_lock_by_bit_test,
    operands_that_are_not_aligned,
    level_3,
);

/// Rounds a vCPU.
const ROUNDS: u32 = 20_000;
/// Result that counts the vCPUs that are done.
const DONE: u64 = 30;

/// Runs `round` [`ROUNDS`] times on both vCPUs; `round` has RDI at [`DATA`], and may use all but RCX.
fn both(bench: &Bench, round: impl Fn(&mut CodeAssembler) -> Assembled) -> Result<Guest, Skip> {
    let body = |a: &mut CodeAssembler| {
        let mut again = a.create_label();
        a.mov(edi, DATA as u32)?;
        a.mov(ecx, ROUNDS)?;
        a.set_label(&mut again)?;
        round(a)?;
        a.dec(ecx)?;
        a.jne(again)?;
        a.lock().inc(qword_ptr(RESULTS + DONE * 8))
    };
    let guest = Guest::running(|a| {
        body(a)?;
        await_result(a, DONE, 2)
    });
    guest.code_at(SECOND_CODE, |a| {
        body(a)?;
        let mut here = a.create_label();
        a.set_label(&mut here)?;
        a.pause()?;
        a.jmp(here)
    });
    run_both(bench, guest)
}

fn run_both(bench: &Bench, guest: Guest) -> Result<Guest, Skip> {
    let states = [Some(guest.state.clone()), Some(initial_state(1))];
    let mut ended = run_together(bench, &guest, &states)?;
    assert_eq!(ended.pop().expect("two").end?, End::Kicked, "vCPU 1");
    ended.pop().expect("two").end?.done();
    Ok(guest)
}

const BOTH: u64 = 2 * ROUNDS as u64;

fn words<const N: usize>(guest: &Guest) -> [u64; N] {
    std::array::from_fn(|n| guest.get(DATA + n as u64 * 8))
}

fn increments_and_decrements(bench: &Bench) -> Outcome {
    let guest = both(bench, |a| {
        a.lock().inc(byte_ptr(rdi))?;
        a.lock().inc(word_ptr(rdi + 8))?;
        a.lock().inc(dword_ptr(rdi + 16))?;
        a.lock().inc(qword_ptr(rdi + 24))?;
        a.lock().dec(byte_ptr(rdi + 32))?;
        a.lock().dec(word_ptr(rdi + 40))?;
        a.lock().dec(dword_ptr(rdi + 48))?;
        a.lock().dec(qword_ptr(rdi + 56))
    })?;
    let down = BOTH.wrapping_neg();
    let expected = [BOTH & 0xff, BOTH & 0xffff, BOTH, BOTH, down & 0xff, down & 0xffff, down & 0xffff_ffff, down];
    assert_eq!(words(&guest), expected);
    Ok(())
}

fn additions(bench: &Bench) -> Outcome {
    let guest = both(bench, |a| {
        a.mov(eax, 3)?;
        a.lock().add(byte_ptr(rdi), al)?;
        a.lock().add(word_ptr(rdi + 8), ax)?;
        a.lock().add(dword_ptr(rdi + 16), eax)?;
        a.lock().add(qword_ptr(rdi + 24), rax)?;
        a.lock().sub(dword_ptr(rdi + 32), 5)
    })?;
    let three = 3 * BOTH;
    let five = (5 * BOTH).wrapping_neg() & 0xffff_ffff;
    assert_eq!(words(&guest), [three & 0xff, three & 0xffff, three, three, five]);
    Ok(())
}

/// Every value is handed out once: their sum says so.
fn exchange_and_add(bench: &Bench) -> Outcome {
    let guest = both(bench, |a| {
        a.mov(eax, 1)?;
        a.lock().xadd(byte_ptr(rdi), al)?;
        a.mov(eax, 1)?;
        a.lock().xadd(word_ptr(rdi + 8), ax)?;
        a.mov(eax, 1)?;
        a.lock().xadd(dword_ptr(rdi + 16), eax)?;
        a.mov(eax, 1)?;
        a.lock().xadd(qword_ptr(rdi + 24), rax)?;
        a.lock().add(qword_ptr(rdi + 32), rax)
    })?;
    assert_eq!(words(&guest), [BOTH & 0xff, BOTH & 0xffff, BOTH, BOTH, BOTH * (BOTH - 1) / 2]);
    Ok(())
}

fn compare_and_exchange(bench: &Bench) -> Outcome {
    let guest = both(bench, |a| {
        for (width, at) in [(1, 0), (2, 8), (4, 16), (8, 24)] {
            let mut again = a.create_label();
            a.mov(rax, qword_ptr(rdi + at))?;
            a.set_label(&mut again)?;
            a.lea(rdx, ptr(rax + 1))?;
            match width {
                1 => a.lock().cmpxchg(byte_ptr(rdi + at), dl)?,
                2 => a.lock().cmpxchg(word_ptr(rdi + at), dx)?,
                4 => a.lock().cmpxchg(dword_ptr(rdi + at), edx)?,
                _ => a.lock().cmpxchg(qword_ptr(rdi + at), rdx)?,
            }
            a.jne(again)?;
        }
        // CMPXCHG8B adds one to each half.
        let mut again = a.create_label();
        a.mov(r8, rcx)?;
        a.mov(eax, dword_ptr(rdi + 32))?;
        a.mov(edx, dword_ptr(rdi + 36))?;
        a.set_label(&mut again)?;
        a.lea(ebx, ptr(rax + 1))?;
        a.lea(ecx, ptr(rdx + 1))?;
        a.lock().cmpxchg8b(qword_ptr(rdi + 32))?;
        a.jne(again)?;
        a.mov(rcx, r8)
    })?;
    assert_eq!(words(&guest), [BOTH & 0xff, BOTH & 0xffff, BOTH, BOTH, BOTH << 32 | BOTH]);
    Ok(())
}

fn compare_and_exchange_16_bytes(bench: &Bench) -> Outcome {
    let guest = both(bench, |a| {
        let mut again = a.create_label();
        a.mov(r8, rcx)?;
        a.mov(rax, qword_ptr(rdi))?;
        a.mov(rdx, qword_ptr(rdi + 8))?;
        a.set_label(&mut again)?;
        a.lea(rbx, ptr(rax + 1))?;
        a.lea(rcx, ptr(rdx + 3))?;
        a.lock().cmpxchg16b(xmmword_ptr(rdi))?;
        a.jne(again)?;
        a.mov(rcx, r8)
    })?;
    assert_eq!(words(&guest), [BOTH, 3 * BOTH]);
    Ok(())
}

/// Each complements one bit an even number of times, and both set bits that nobody clears.
fn bit_operations(bench: &Bench) -> Outcome {
    let guest = both(bench, |a| {
        a.lock().btc(dword_ptr(rdi), 5)?;
        a.lock().btc(qword_ptr(rdi + 8), 40)?;
        a.mov(eax, ecx)?;
        a.and(eax, 63)?;
        a.lock().bts(qword_ptr(rdi + 16), rax)?;
        a.lock().btr(qword_ptr(rdi + 24), rax)
    })?;
    assert_eq!(words(&guest), [0, 0, u64::MAX, 0]);
    Ok(())
}

fn logic(bench: &Bench) -> Outcome {
    let guest = both(bench, |a| {
        a.mov(rax, 0x5555_5555_5555_5555u64)?;
        a.lock().xor(byte_ptr(rdi), al)?;
        a.lock().xor(word_ptr(rdi + 8), ax)?;
        a.lock().xor(dword_ptr(rdi + 16), eax)?;
        a.lock().xor(qword_ptr(rdi + 24), rax)?;
        a.lock().or(dword_ptr(rdi + 32), ecx)?;
        a.lock().not(qword_ptr(rdi + 40))?;
        a.lock().neg(qword_ptr(rdi + 48))
    })?;
    let or = (1..=ROUNDS).fold(0, |all, n| all | n);
    assert_eq!(words(&guest), [0, 0, 0, 0, or.into(), 0, 0]);
    Ok(())
}

/// XCHG locks without a prefix; the counter inside is not locked.
fn a_spin_lock_by_exchange(bench: &Bench) -> Outcome {
    let guest = both(bench, |a| {
        let mut taken = a.create_label();
        a.nop()?;
        a.set_label(&mut taken)?;
        a.mov(eax, 1)?;
        a.xchg(dword_ptr(rdi), eax)?;
        a.test(eax, eax)?;
        a.jne(taken)?;
        a.inc(qword_ptr(rdi + 0x80))?;
        a.mov(dword_ptr(rdi), 0)
    })?;
    assert_eq!((guest.get(DATA), guest.get(DATA + 0x80)), (0, BOTH));
    Ok(())
}

fn a_spin_lock_by_bit_test(bench: &Bench) -> Outcome {
    let guest = both(bench, |a| {
        let mut taken = a.create_label();
        a.nop()?;
        a.set_label(&mut taken)?;
        a.lock().bts(word_ptr(rdi), 3)?;
        a.jb(taken)?;
        a.inc(qword_ptr(rdi + 0x80))?;
        a.lock().btr(word_ptr(rdi), 3)
    })?;
    assert_eq!((guest.get(DATA), guest.get(DATA + 0x80)), (0, BOTH));
    Ok(())
}

/// 9.1.2.2: within a cache line alignment does not matter.
fn operands_that_are_not_aligned(bench: &Bench) -> Outcome {
    let guest = both(bench, |a| {
        a.lock().inc(word_ptr(rdi + 1))?;
        a.lock().inc(dword_ptr(rdi + 9))?;
        a.lock().inc(qword_ptr(rdi + 19))
    })?;
    assert_eq!(guest.bytes(DATA + 1, 2), (BOTH as u16).to_le_bytes());
    assert_eq!((guest.get(DATA + 9) & 0xffff_ffff, guest.get(DATA + 19)), (BOTH, BOTH));
    Ok(())
}

fn level_3(bench: &Bench) -> Outcome {
    let body = |a: &mut CodeAssembler| {
        let mut again = a.create_label();
        a.mov(ecx, ROUNDS)?;
        a.set_label(&mut again)?;
        a.lock().inc(qword_ptr(USER_DATA))?;
        a.mov(eax, 1)?;
        a.lock().xadd(dword_ptr(USER_DATA + 8), eax)?;
        a.stc()?;
        // With carry: six each.
        a.lock().adc(qword_ptr(USER_DATA + 24), 5)?;
        a.dec(ecx)?;
        a.jne(again)?;
        a.lock().inc(qword_ptr(USER_DATA + 16))?;
        let mut wait = a.create_label();
        a.set_label(&mut wait)?;
        a.cmp(qword_ptr(USER_DATA + 16), 2)?;
        a.jb(wait)
    };
    let mut guest = Guest::new();
    guest.user(body);
    let mut second = Guest::new();
    second.enter_user();
    // The same program on a stack of its own; only vCPU 0 ends the run.
    let own = initial_state(1);
    let mut state = second.state.clone();
    (state.tr, state.lapic, state.gpr[4]) = (own.tr, own.lapic, USER_STACK - 0x800);
    guest.user_at(USER_CODE + 0x1000, |a| {
        body(a)?;
        let mut here = a.create_label();
        a.set_label(&mut here)?;
        a.jmp(here)
    });
    state.rip = USER_CODE + 0x1000;
    let mut ended = run_together(bench, &guest, &[Some(guest.state.clone()), Some(state)])?;
    assert_eq!(ended.pop().expect("two").end?, End::Kicked, "vCPU 1");
    ended.pop().expect("two").end?.done();
    assert_eq!([0, 8, 24].map(|at| guest.get(USER_DATA + at)), [BOTH, BOTH, 6 * BOTH]);
    Ok(())
}
