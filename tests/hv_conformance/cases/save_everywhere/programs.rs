//! The programs that are saved everywhere: each has another part of the state alive at its points.

use super::super::apic::*;
use super::super::lapic::keep_msr;
use super::super::lapic::write_msr;
use super::super::*;
use super::Program;
use crate::abilities;
use crate::bus::EDGE_PORT;
use crate::bus::HIGH_PORT;
use crate::bus::LOW_PORT;
use crate::bus::POINT_REGISTER;

/// A point that leaves all registers as they are.
fn quiet_point(a: &mut CodeAssembler) -> Assembled {
    stop(a, crate::bus::POINT_PORT)
}

/// Arithmetic whose flags are live across points.
pub(super) fn arithmetic() -> Program {
    let guest = Guest::running(|a| {
        let mut again = a.create_label();
        a.mov(rax, 0x9e37_79b9_7f4a_7c15u64)?;
        a.mov(ecx, 12)?;
        a.set_label(&mut again)?;
        a.add(rbx, rax)?;
        quiet_point(a)?;
        a.adc(rdx, rbx)?;
        a.rcl(rsi, 7)?;
        quiet_point(a)?;
        a.sbb(rdi, rdx)?;
        a.imul_2(r8, rdi)?;
        a.xor(r9, r8)?;
        quiet_point(a)?;
        a.cmovs(r10, r9)?;
        a.bt(r9, 17)?;
        a.rcr(r11, 1)?;
        a.shld(r12, r11, 5)?;
        a.lea(r13, ptr(r12 + r11 * 2))?;
        a.dec(ecx)?;
        quiet_point(a)?;
        a.jne(again)?;
        a.pushfq()?;
        a.pop(r15)
    });
    guest.into()
}

/// Control and debug registers, MSRs, descriptor tables and bases.
pub(super) fn controls() -> Program {
    let mut guest = Guest::running(|a| {
        a.mov(rax, CR0 | 8)?;
        a.mov(cr0, rax)?;
        quiet_point(a)?;
        a.clts()?;
        quiet_point(a)?;
        a.mov(rax, CR4 | 4)?;
        a.mov(cr4, rax)?;
        quiet_point(a)?;
        a.mov(eax, 5)?;
        a.mov(cr8, rax)?;
        a.mov(rax, 0x7fff_0000_1000u64)?;
        a.mov(cr2, rax)?;
        a.mov(dr0, rax)?;
        a.mov(dr3, rax)?;
        quiet_point(a)?;
        for (n, msr) in (1..).zip([0x175, 0x176, 0xc000_0082, 0xc000_0083, 0xc000_0100, 0xc000_0101, 0xc000_0102]) {
            write_msr(a, msr, 0xffff_8000_0000_0000 | n << 12)?;
            quiet_point(a)?;
        }
        write_msr(a, 0x277, 0x0001_0506_0007_0406)?;
        write_msr(a, 0xc000_0103, 77)?;
        a.mov(eax, u32::from(READ_ONLY))?;
        a.mov(ds, eax)?;
        a.xor(eax, eax)?;
        a.mov(es, eax)?;
        quiet_point(a)?;
        a.lidt(ptr(DATA))?;
        a.btr(dword_ptr(GDT + u64::from(TSS_SELECTOR) + 20), 9)?;
        a.mov(eax, u32::from(TSS_SELECTOR) + 16)?;
        a.ltr(ax)?;
        quiet_point(a)?;
        for (n, control) in (0..).zip([cr0, cr2, cr4, cr8]) {
            a.mov(rax, control)?;
            keep(a, n, rax)?;
        }
        for (n, debug) in (4..).zip([dr0, dr3, dr6, dr7]) {
            a.mov(rax, debug)?;
            keep(a, n, rax)?;
        }
        for (n, msr) in (8..).zip([0x175, 0x277, 0xc000_0082, 0xc000_0100, 0xc000_0102, 0xc000_0103]) {
            keep_msr(a, n, msr)?;
        }
        a.sidt(ptr(RESULTS + 20 * 8))
    });
    guest.state.msrs.star = 0x001b_0008_0000_0000;
    guest.ram.store(DATA, IDT_LIMIT - 16).expect("in memory");
    guest.put(DATA + 2, IDT);
    Program { needs: &[&abilities::TSC_AUX], ..guest.into() }
}

/// A handler that notes its vector: result 0 counts, results from 1 on are vectors.
pub(super) fn noting(guest: &mut Guest, vector: u8, points: bool) {
    guest.handler(vector, |a| {
        a.push(rax)?;
        if points {
            quiet_point(a)?;
        }
        count(a, 0)?;
        a.mov(rax, qword_ptr(RESULTS))?;
        a.mov(qword_ptr(rax * 8 + RESULTS), i32::from(vector))?;
        end_of_interrupt(a)?;
        if points {
            quiet_point(a)?;
        }
        a.pop(rax)?;
        a.iretq()
    });
}

/// Edge, level and interprocessor interrupts that wait for IF.
pub(super) fn waiting() -> Program {
    let mut guest = Guest::running(|a| {
        enable(a)?;
        redirect(a, 4, 0x44)?;
        redirect(a, 6, PIN_LEVEL | 0x76)?;
        redirect(a, 7, PIN_MASKED | PIN_LEVEL | 0x77)?;
        for vector in [0x31, 0xe2, 0x45] {
            lapic_write(a, ICR, TO_SELF | ASSERT | vector)?;
            quiet_point(a)?;
        }
        line(a, EDGE_PORT, 4)?;
        quiet_point(a)?;
        line(a, HIGH_PORT, 6)?;
        quiet_point(a)?;
        line(a, HIGH_PORT, 7)?;
        quiet_point(a)?;
        line(a, LOW_PORT, 6)?;
        quiet_point(a)?;
        line(a, LOW_PORT, 7)?;
        quiet_point(a)?;
        lapic_write(a, TPR, 0x50)?;
        a.sti()?;
        await_result(a, 0, 2)?;
        quiet_point(a)?;
        lapic_write(a, TPR, 0)?;
        await_result(a, 0, 5)?;
        give_time(a)
    });
    [0x31, 0xe2, 0x45, 0x44, 0x76, 0x77].into_iter().for_each(|vector| noting(&mut guest, vector, false));
    guest.into()
}

/// Points in handlers, one inside the other, and with the level of a line high.
pub(super) fn in_service() -> Program {
    let mut guest = Guest::running(|a| {
        enable(a)?;
        redirect(a, 6, PIN_LEVEL | 0x46)?;
        a.sti()?;
        line(a, HIGH_PORT, 6)?;
        await_result(a, 0, 3)?;
        keep_redirection(a, 10, 6)
    });
    guest.handler(0x46, |a| {
        a.push(rax)?;
        quiet_point(a)?;
        keep_redirection(a, 11, 6)?;
        a.sti()?;
        lapic_write(a, ICR, TO_SELF | ASSERT | 0x91)?;
        lapic_write(a, ICR, TO_SELF | ASSERT | 0x42)?;
        give_time(a)?;
        a.cli()?;
        line(a, LOW_PORT, 6)?;
        quiet_point(a)?;
        count(a, 0)?;
        end_of_interrupt(a)?;
        quiet_point(a)?;
        a.pop(rax)?;
        a.iretq()
    });
    [0x91, 0x42].into_iter().for_each(|vector| noting(&mut guest, vector, true));
    Program { needs: &[&abilities::IN_SERVICE], ..guest.into() }
}

/// MOV SS from a register of a device: the run stops in its shadow, or soon after it, with an interrupt waiting.
pub(super) fn shadows() -> Program {
    let mut guest = Guest::running(|a| {
        enable(a)?;
        a.mov(rbx, POINT_REGISTER)?;
        for _ in 0..4 {
            let mut wait = a.create_label();
            a.cli()?;
            lapic_write(a, ICR, TO_SELF | ASSERT | 0x61)?;
            a.mov(rdx, qword_ptr(RESULTS))?;
            a.sti()?;
            // STI's shadow covers this, and its own the next.
            a.mov(ss, word_ptr(rbx))?;
            a.inc(ecx)?;
            a.inc(ecx)?;
            a.set_label(&mut wait)?;
            a.cmp(rdx, qword_ptr(RESULTS))?;
            a.je(wait)?;
        }
        a.cli()
    });
    noting(&mut guest, 0x61, false);
    Program { answers: vec![KERNEL_SS.into(); 4], ..guest.into() }
}

/// A one-shot timer that is armed at some of the points and fires once, and a periodic one that goes on.
pub(super) fn timer() -> Program {
    let mut guest = Guest::running(|a| {
        enable(a)?;
        lapic_write(a, DIVIDE, DIVIDE_BY_1)?;
        lapic_write(a, LVT_TIMER, 0x46)?;
        a.sti()?;
        lapic_write(a, INITIAL_COUNT, 30_000_000)?;
        (0..6).try_for_each(|_| quiet_point(a))?;
        halt_until(a, 0, 1)?;
        quiet_point(a)?;
        a.sti()?;
        lapic_write(a, LVT_TIMER, PERIODIC | 0x46)?;
        lapic_write(a, INITIAL_COUNT, 3_000_000)?;
        for n in 2..6 {
            quiet_point(a)?;
            halt_until(a, 0, n)?;
        }
        lapic_write(a, INITIAL_COUNT, 0)?;
        lapic_write(a, LVT_TIMER, MASKED)?;
        // How many came while it was moved is a matter of time.
        a.mov(qword_ptr(RESULTS), 5)
    });
    counting_handler(&mut guest, 0x46, 0);
    guest.into()
}

pub(super) fn deadline() -> Program {
    let mut guest = Guest::running(|a| {
        enable(a)?;
        lapic_write(a, LVT_TIMER, TSC_DEADLINE | 0x46)?;
        a.rdtsc()?;
        a.shl(rdx, 32)?;
        a.or(rax, rdx)?;
        a.add(rax, 40_000_000)?;
        a.mov(rbx, rax)?;
        a.mov(rdx, rax)?;
        a.shr(rdx, 32)?;
        a.mov(ecx, 0x6e0)?;
        a.wrmsr()?;
        (0..6).try_for_each(|_| quiet_point(a))?;
        halt_until(a, 0, 1)?;
        // Not before its time: result 1 says so.
        a.rdtsc()?;
        a.shl(rdx, 32)?;
        a.or(rax, rdx)?;
        a.cmp(rax, rbx)?;
        a.setae(cl)?;
        a.movzx(rcx, cl)?;
        keep(a, 1, rcx)?;
        a.xor(eax, eax)?;
        a.xor(ebx, ebx)?;
        a.xor(edx, edx)
    });
    counting_handler(&mut guest, 0x46, 0);
    Program { tells_time: true, ..guest.into() }
}

/// Points in an NMI's handler, with another one waiting.
pub(super) fn nmis() -> Program {
    let mut guest = Guest::running(|a| {
        enable(a)?;
        send(a, 0, ASSERT | NMI)?;
        await_result(a, 0, 2)?;
        quiet_point(a)?;
        send(a, 0, ASSERT | NMI)?;
        await_result(a, 0, 3)
    });
    guest.handler(2, |a| {
        let mut once = a.create_label();
        a.push(rax)?;
        count(a, 0)?;
        quiet_point(a)?;
        a.cmp(qword_ptr(RESULTS), 1)?;
        a.jne(once)?;
        send(a, 0, ASSERT | NMI)?;
        give_time(a)?;
        a.mov(rax, qword_ptr(RESULTS))?;
        keep(a, 1, rax)?;
        quiet_point(a)?;
        a.set_label(&mut once)?;
        a.pop(rax)?;
        a.iretq()
    });
    guest.into()
}

/// INS and OUTS, up and down: in the middle, where the engine stops there, and after them.
pub(super) fn port_strings() -> Program {
    let guest = Guest::running(|a| {
        a.mov(edx, 0x600)?;
        a.mov(edi, DATA as u32 + 0xfe1)?;
        a.mov(ecx, 24)?;
        a.rep().insd()?;
        quiet_point(a)?;
        a.std()?;
        a.mov(esi, DATA as u32 + 0x1010)?;
        a.mov(ecx, 24)?;
        a.rep().outsw()?;
        quiet_point(a)?;
        a.cld()
    });
    Program { answers: (1..=24).map(|n| n * 0x0103_0507).collect(), every_access: true, ..guest.into() }
}

/// MOVS, STOS and LODS through a device's registers.
pub(super) fn register_strings() -> Program {
    let guest = Guest::running(|a| {
        a.mov(rsi, DEVICE)?;
        a.mov(edi, DATA as u32 + 0xffa)?;
        a.mov(ecx, 10)?;
        a.rep().movsd()?;
        quiet_point(a)?;
        a.mov(esi, DATA as u32 + 0xffa)?;
        a.mov(rdi, DEVICE + 0x100)?;
        a.mov(ecx, 10)?;
        a.rep().movsd()?;
        quiet_point(a)?;
        a.mov(rdi, DEVICE + 0x200)?;
        a.mov(eax, 0x1234)?;
        a.mov(ecx, 5)?;
        a.rep().stosw()?;
        a.mov(rbx, DEVICE + 0x300)?;
        a.add(dword_ptr(rbx), eax)
    });
    Program { answers: (1..=11).map(|n| n * 0x0103_0507).collect(), every_access: true, ..guest.into() }
}

/// A guest of level 3 whose INT3 is a point.
fn user_with_points(build: impl FnOnce(&mut CodeAssembler) -> Assembled) -> Guest {
    let mut guest = Guest::new();
    guest.user(build);
    guest.call_handler(|a| {
        quiet_point(a)?;
        a.iretq()
    });
    guest
}

/// x87, MMX and SSE registers, control words and sticky flags across points.
pub(super) fn fpu() -> Program {
    let guest = user_with_points(|a| {
        a.fninit()?;
        a.fldpi()?;
        a.int3()?;
        a.fld1()?;
        a.fldln2()?;
        a.int3()?;
        a.faddp(st1, st0)?;
        a.fdivp(st1, st0)?;
        a.mov(dword_ptr(USER_DATA), 0x5f80)?;
        a.ldmxcsr(dword_ptr(USER_DATA))?;
        a.int3()?;
        for n in 1..=7 {
            a.mov(eax, n)?;
            a.cvtsi2sd(xmm0, eax)?;
            a.sqrtsd(xmm1, xmm0)?;
            a.addsd(xmm2, xmm1)?;
            a.shufpd(xmm15, xmm2, 1)?;
            a.paddq(xmm14, xmm15)?;
            a.int3()?;
        }
        a.fld(st0)?;
        a.fsqrt()?;
        a.mov(word_ptr(USER_DATA), 0xc3f)?;
        a.fldcw(word_ptr(USER_DATA))?;
        a.int3()?;
        a.fadd_2(st0, st1)?;
        a.fstp(tbyte_ptr(USER_DATA + 16))?;
        a.int3()?;
        a.movups(xmmword_ptr(USER_DATA + 32), xmm14)?;
        a.stmxcsr(dword_ptr(USER_DATA + 48))?;
        a.emms()?;
        a.int3()?;
        a.mov(rax, 0x0102_0304_0506_0708u64)?;
        a.movq(mm2, rax)?;
        a.int3()?;
        a.paddb(mm2, mm2)?;
        a.movq(qword_ptr(USER_DATA + 56), mm2)
    });
    guest.into()
}

/// Points in the kernel that a program of level 3 calls, with the bases exchanged.
pub(super) fn user() -> Program {
    let mut guest = Guest::new();
    guest.user(|a| {
        let mut again = a.create_label();
        a.mov(ebx, 4)?;
        a.set_label(&mut again)?;
        a.push(rbx)?;
        a.int3()?;
        a.mov(rax, qword_ptr(8).gs())?;
        a.add(qword_ptr(USER_DATA + 0x20), rax)?;
        a.pop(rax)?;
        a.add(qword_ptr(USER_DATA), rax)?;
        a.dec(ebx)?;
        a.jne(again)
    });
    guest.call_handler(|a| {
        quiet_point(a)?;
        a.swapgs()?;
        a.inc(qword_ptr(8).gs())?;
        quiet_point(a)?;
        a.swapgs()?;
        quiet_point(a)?;
        a.iretq()
    });
    guest.state.msrs.kernel_gs_base = RESULTS;
    guest.state.segments[5].base = USER_DATA + 0x100;
    guest.put(USER_DATA + 0x108, 3);
    guest.into()
}

/// The same by SYSCALL and SYSRET.
pub(super) fn calls() -> Program {
    let mut guest = Guest::new();
    guest.user(|a| {
        let mut again = a.create_label();
        a.mov(ebx, 4)?;
        a.set_label(&mut again)?;
        a.syscall()?;
        a.dec(ebx)?;
        a.jne(again)
    });
    guest.code(|a| {
        a.swapgs()?;
        a.inc(qword_ptr(8).gs())?;
        quiet_point(a)?;
        a.swapgs()?;
        a.sysretq()
    });
    let msrs = &mut guest.state.msrs;
    msrs.star = u64::from(SYSRET_BASE) << 48 | u64::from(KERNEL_CS) << 32;
    (msrs.lstar, msrs.sfmask, msrs.kernel_gs_base) = (CODE, IF, RESULTS);
    Program { needs: &[&abilities::SYSCALL], ..guest.into() }
}

/// Points in handlers of faults, whose CR2 and stacks must still be there.
pub(super) fn faults() -> Program {
    let mut guest = Guest::running(|a| {
        for n in 0..4 {
            a.mov(rbx, WINDOW + n * 0x1000)?;
            a.mov(qword_ptr(rbx), rbx)?;
        }
        a.ud2()
    });
    guest.handler(14, |a| {
        a.push(rax)?;
        a.push(rdx)?;
        quiet_point(a)?;
        a.mov(rax, cr2)?;
        a.lea(rdx, ptr(rax + (FRAMES - WINDOW + (RW | P))))?;
        a.shr(rax, 12)?;
        a.mov(qword_ptr(rax * 8 + LOW_TABLE), rdx)?;
        quiet_point(a)?;
        a.pop(rdx)?;
        a.pop(rax)?;
        a.add(rsp, 8)?;
        quiet_point(a)?;
        a.iretq()
    });
    let handler = guest.handler(6, |a| {
        quiet_point(a)?;
        count(a, 0)?;
        a.add(qword_ptr(rsp), 2)?;
        a.iretq()
    });
    guest.gate(6, handler, INTERRUPT_GATE | 1);
    guest.into()
}

/// Translations that change between points.
pub(super) fn tables() -> Program {
    let guest = Guest::running(|a| {
        a.mov(rbx, WINDOW)?;
        for n in 0..6 {
            a.mov(rax, qword_ptr(rbx))?;
            keep(a, n, rax)?;
            quiet_point(a)?;
            a.mov(eax, (FRAMES + (n + 1) % 2 * 0x1000 + (G | RW | P)) as u32)?;
            a.mov(qword_ptr(entry_of(WINDOW)), rax)?;
            a.invlpg(ptr(rbx))?;
            quiet_point(a)?;
        }
        a.mov(rax, cr3)?;
        a.mov(cr3, rax)?;
        quiet_point(a)?;
        a.inc(qword_ptr(rbx))?;
        a.mov(rax, qword_ptr(rbx))?;
        keep(a, 7, rax)
    });
    guest.put(FRAMES, 0x11);
    guest.put(FRAMES + 0x1000, 0x22);
    guest.map(WINDOW, FRAMES | G | RW | P);
    guest.into()
}

/// TF is set, and the debug handler has points.
pub(super) fn steps() -> Program {
    let mut guest = Guest::running(|a| {
        a.inc(ecx)?;
        a.inc(ecx)?;
        a.pushfq()?;
        a.and(dword_ptr(rsp), !(1 << 8))?;
        a.popfq()?;
        a.inc(ecx)
    });
    guest.handler(1, |a| {
        a.push(rax)?;
        quiet_point(a)?;
        count(a, 0)?;
        a.mov(rax, qword_ptr(rsp + 8))?;
        a.add(qword_ptr(RESULTS + 8), rax)?;
        quiet_point(a)?;
        a.pop(rax)?;
        a.iretq()
    });
    guest.state.rflags |= 1 << 8;
    guest.into()
}

pub(super) fn changing_code() -> Program {
    let guest = Guest::running(|a| {
        let mut again = a.create_label();
        a.mov(ebx, SECOND_CODE as u32)?;
        a.mov(ecx, 8)?;
        a.set_label(&mut again)?;
        a.call(rbx)?;
        a.add(rdx, rax)?;
        quiet_point(a)?;
        a.mov(dword_ptr(rbx + 1), ecx)?;
        quiet_point(a)?;
        a.dec(ecx)?;
        a.jne(again)?;
        keep(a, 0, rdx)
    });
    guest.put_bytes(SECOND_CODE, &[0xb8, 0, 1, 0, 0, 0xc3]);
    guest.into()
}
