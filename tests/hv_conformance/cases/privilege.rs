//! Between privilege levels: SYSCALL and SYSRET, SYSENTER, SWAPGS, IRETQ (6.8.8, volume 2).

use super::lapic::write_msr;
use super::*;

cases!(privilege:
    syscall_and_sysret,
    syscall_masks_flags,
    sysret_loads_its_flags,
    syscall_needs_efer_sce,
    iretq_to_level_3_and_back,
    iretq_restores_every_flag,
    popf_obeys_level_and_iopl,
    swapgs_exchanges_the_bases,
    segment_bases_by_msr,
    segment_bases_survive_null_selectors_of_others,
    a_stack_of_its_own_for_each_level,
);

const FS_BASE: u32 = 0xc000_0100;
const GS_BASE: u32 = 0xc000_0101;
const KERNEL_GS_BASE: u32 = 0xc000_0102;

/// Where system calls arrive.
const ENTRY: u64 = CODE + 0x1000;

/// A guest of level 3 whose system calls arrive at `entry`.
fn calling(
    user: impl FnOnce(&mut CodeAssembler) -> Assembled,
    entry: impl FnOnce(&mut CodeAssembler) -> Assembled,
) -> Guest {
    let mut guest = Guest::new();
    guest.user(user);
    guest.code_at(ENTRY, entry);
    let msrs = &mut guest.state.msrs;
    msrs.star = u64::from(SYSRET_BASE) << 48 | u64::from(KERNEL_CS) << 32;
    (msrs.lstar, msrs.sfmask) = (ENTRY, IF | 1 << 10);
    guest
}

fn syscall_and_sysret(bench: &Bench) -> Outcome {
    bench.needs(&crate::abilities::SYSCALL)?;
    let guest = calling(
        |a| {
            a.mov(eax, 41)?;
            a.syscall()?;
            keep_user(a, 1)
        },
        |a| {
            keep(a, 2, rcx)?;
            keep(a, 3, rsp)?;
            a.mov(dx, cs)?;
            a.movzx(rdx, dx)?;
            keep(a, 4, rdx)?;
            a.mov(dx, ss)?;
            a.movzx(rdx, dx)?;
            keep(a, 5, rdx)?;
            a.inc(rax)?;
            a.sysretq()
        },
    );
    let state = run_to_end(bench, &guest)?;
    assert_eq!(guest.get(USER_DATA + 8), 42);
    assert_eq!([2, 3, 4, 5].map(|n| guest.result(n)), [USER_CODE + 7, USER_STACK, KERNEL_CS.into(), KERNEL_SS.into()]);
    assert_eq!((state.segments[1].selector, state.segments[2].selector), (USER_CS, USER_SS));
    Ok(())
}

/// RAX into the user data's quadword `n`.
fn keep_user(a: &mut CodeAssembler, n: u64) -> Assembled {
    a.mov(qword_ptr(USER_DATA + n * 8), rax)
}

fn syscall_masks_flags(bench: &Bench) -> Outcome {
    bench.needs(&crate::abilities::SYSCALL)?;
    let mut guest = calling(
        |a| a.syscall(),
        |a| {
            keep(a, 0, r11)?;
            a.pushfq()?;
            a.pop(rax)?;
            keep(a, 1, rax)?;
            a.sysretq()
        },
    );
    // The kernel's stack is the user's here, so it must be writable to both.
    guest.state.rflags |= 1 << 10 | 0x8d5;
    let before = guest.state.rflags;
    let state = run_to_end(bench, &guest)?;
    assert_eq!(guest.results(), [before, before & !(IF | 1 << 10)]);
    assert_eq!(state.rflags, before);
    Ok(())
}

/// RFLAGS from R11, without RF and VM.
fn sysret_loads_its_flags(bench: &Bench) -> Outcome {
    bench.needs(&crate::abilities::SYSCALL)?;
    let guest = calling(
        |a| a.syscall(),
        |a| {
            a.mov(r11, IF | 1 << 16 | 1 << 17 | 1 << 21 | 0x8d5)?;
            a.sysretq()
        },
    );
    let state = run_to_end(bench, &guest)?;
    assert_eq!(state.rflags & !(1 << 16), RFLAGS | IF | 1 << 21 | 0x8d5);
    Ok(())
}

fn syscall_needs_efer_sce(bench: &Bench) -> Outcome {
    bench.needs(&crate::abilities::SYSCALL)?;
    let mut guest = calling(|a| a.syscall(), |a| a.sysretq());
    guest.state.msrs.efer &= !1;
    let trap = run_once(bench, &guest)?.trap();
    assert_eq!((trap.vector, trap.rip), (6, USER_CODE));
    Ok(())
}

/// Pushes what IRETQ takes.
fn frame(a: &mut CodeAssembler, target: u64, code: u16, flags: u64, stack: u64, data: u16) -> Assembled {
    a.push(i32::from(data))?;
    for value in [stack, flags] {
        a.mov(rax, value)?;
        a.push(rax)?;
    }
    a.push(i32::from(code))?;
    a.mov(rax, target)?;
    a.push(rax)
}

fn iretq_to_level_3_and_back(bench: &Bench) -> Outcome {
    let mut guest = Guest::running(|a| {
        frame(a, USER_CODE, USER_CS, RFLAGS | IF, USER_STACK - 0x10, USER_SS)?;
        a.iretq()
    });
    guest.user_at(USER_CODE, |a| {
        a.mov(eax, 0x77)?;
        keep_user(a, 0)?;
        a.int3()
    });
    guest.call_handler(|a| {
        a.mov(rax, qword_ptr(rsp + 24))?;
        keep(a, 0, rax)?;
        a.mov(rax, qword_ptr(rsp + 8))?;
        keep(a, 1, rax)?;
        finish(a)
    });
    let state = run_to_end(bench, &guest)?;
    assert_eq!((guest.get(USER_DATA), guest.results()), (0x77, [USER_STACK - 0x10, USER_CS.into()]));
    assert_eq!((state.segments[1].selector, state.gpr[4]), (KERNEL_CS, RSP0 - 40));
    Ok(())
}

fn iretq_restores_every_flag(bench: &Bench) -> Outcome {
    bench.needs(&crate::abilities::IOPL)?;
    // CF PF AF ZF SF IF DF OF IOPL AC ID, without TF and NT, which would have more to them.
    const FLAGS: u64 = 0x8d5 | IF | 1 << 10 | IOPL3 | 1 << 18 | 1 << 21;
    let guest = Guest::running(|a| {
        frame(a, SECOND_CODE, KERNEL_CS, RFLAGS | FLAGS, STACK - 0x100, KERNEL_SS)?;
        a.iretq()
    });
    guest.code_at(SECOND_CODE, |a| {
        a.pushfq()?;
        a.pop(rax)?;
        keep(a, 0, rax)
    });
    let state = run_to_end(bench, &guest)?;
    assert_eq!(guest.result(0), RFLAGS | FLAGS);
    assert_eq!((state.rflags, state.gpr[4]), (RFLAGS | FLAGS, STACK - 0x100));
    Ok(())
}

/// Volume 2, POPF: level 3 changes IOPL never and IF only with IOPL 3, silently.
fn popf_obeys_level_and_iopl(bench: &Bench) -> Outcome {
    for (iopl, expected) in [(0, IF), (3, 0)] {
        let mut guest = Guest::new();
        guest.user(|a| {
            a.push(0x8d7 & !0x200)?;
            a.popfq()?;
            a.pushfq()?;
            a.pop(rax)?;
            keep_user(a, 0)
        });
        if iopl != 0 {
            bench.needs(&crate::abilities::IOPL)?;
        }
        guest.state.rflags = RFLAGS | IF | iopl << 12;
        run_to_end(bench, &guest)?;
        assert_eq!(guest.get(USER_DATA), 0x8d7 | expected | iopl << 12, "IOPL {iopl}");
    }
    Ok(())
}

fn swapgs_exchanges_the_bases(bench: &Bench) -> Outcome {
    let mut guest = Guest::running(|a| {
        a.mov(rax, qword_ptr(0).gs())?;
        keep(a, 0, rax)?;
        a.swapgs()?;
        a.mov(rax, qword_ptr(0).gs())?;
        keep(a, 1, rax)
    });
    guest.put(DATA, 1);
    guest.put(DATA + 0x100, 2);
    guest.state.segments[5].base = DATA;
    guest.state.msrs.kernel_gs_base = DATA + 0x100;
    let state = run_to_end(bench, &guest)?;
    assert_eq!(guest.results(), [1, 2]);
    assert_eq!((state.segments[5].base, state.msrs.kernel_gs_base), (DATA + 0x100, DATA));
    Ok(())
}

fn segment_bases_by_msr(bench: &Bench) -> Outcome {
    let guest = Guest::running(|a| {
        write_msr(a, FS_BASE, DATA)?;
        write_msr(a, GS_BASE, DATA + 0x100)?;
        write_msr(a, KERNEL_GS_BASE, DATA + 0x200)?;
        for (n, value) in [(0, qword_ptr(8).fs()), (1, qword_ptr(8).gs())] {
            a.mov(rax, value)?;
            keep(a, n, rax)?;
        }
        a.swapgs()?;
        a.mov(rax, qword_ptr(8).gs())?;
        keep(a, 2, rax)
    });
    for n in 0..3 {
        guest.put(DATA + n * 0x100 + 8, 10 + n);
    }
    let state = run_to_end(bench, &guest)?;
    assert_eq!(guest.results(), [10, 11, 12]);
    assert_eq!((state.segments[4].base, state.segments[5].base), (DATA, DATA + 0x200));
    Ok(())
}

/// 3.4.4: DS and ES have no base in 64-bit mode, whatever is loaded.
fn segment_bases_survive_null_selectors_of_others(bench: &Bench) -> Outcome {
    let mut guest = Guest::running(|a| {
        a.xor(eax, eax)?;
        a.mov(ds, eax)?;
        a.mov(es, eax)?;
        a.mov(rax, qword_ptr(DATA))?;
        keep(a, 0, rax)?;
        a.mov(rax, qword_ptr(0).fs())?;
        keep(a, 1, rax)
    });
    guest.put(DATA, 5);
    guest.state.segments[4].base = DATA;
    run_to_end(bench, &guest)?;
    assert_eq!(guest.results(), [5, 5]);
    Ok(())
}

/// Calls from level 3 by every way, many times, with both stacks in use.
fn a_stack_of_its_own_for_each_level(bench: &Bench) -> Outcome {
    bench.needs(&crate::abilities::SYSCALL)?;
    let mut guest = calling(
        |a| {
            let mut again = a.create_label();
            a.mov(ebx, 200)?;
            a.set_label(&mut again)?;
            a.push(rbx)?;
            a.syscall()?;
            a.int3()?;
            a.pop(rax)?;
            a.add(qword_ptr(USER_DATA), rax)?;
            a.dec(ebx)?;
            a.jne(again)
        },
        |a| {
            a.mov(r12, rsp)?;
            a.mov(rsp, STACK)?;
            a.push(rcx)?;
            count(a, 0)?;
            a.pop(rcx)?;
            a.mov(rsp, r12)?;
            a.sysretq()
        },
    );
    guest.call_handler(|a| {
        a.push(rbx)?;
        count(a, 1)?;
        a.pop(rbx)?;
        a.iretq()
    });
    let state = run_to_end(bench, &guest)?;
    assert_eq!(guest.results(), [200, 200]);
    assert_eq!((guest.get(USER_DATA), state.gpr[4]), (200 * 201 / 2, USER_STACK));
    Ok(())
}
