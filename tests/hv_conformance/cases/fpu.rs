//! x87, MMX and SSE state (volume 1, chapters 8 to 11): arithmetic at both levels, images in memory, and what is kept.

use kiln::hv::state::x86_64::Fpu;

use super::*;

cases!(fpu:
    restored_state_is_read_by_fxsave,
    fxrstor_is_saved,
    x87_arithmetic_at_both_levels,
    x87_rounding_and_precision,
    mmx_shares_the_x87_registers,
    sse_arithmetic_at_both_levels,
    mxcsr_rounds_and_notes,
    mxcsr_refuses_reserved_bits,
    interrupts_leave_registers_alone,
    fninit_resets_the_x87,
);

type Build = fn(&mut CodeAssembler) -> Assembled;

const IMAGE: u64 = DATA + 0x200;

fn restored_state_is_read_by_fxsave(bench: &Bench) -> Outcome {
    let mut guest = Guest::running(|a| a.fxsave64(ptr(IMAGE)));
    let fpu = &mut guest.state.fpu;
    (fpu.fcw, fpu.fsw, fpu.ftw, fpu.mxcsr) = (0x27f, 6 << 11 | 0x4100, 0b1100_0000, 0x1fa1);
    fpu.st[0] = (0xc90f_daa2_2168_c235, 0x4000);
    fpu.st[1] = (0x8000_0000_0000_0000, 0xbfff);
    for (n, register) in (0..).zip(&mut fpu.xmm) {
        *register = [0x0101_0101_0101_0101 * n, !n];
    }
    let expected = guest.state.fpu;
    let after = run_to_end(bench, &guest)?;
    let word = |at: u64| guest.get(IMAGE + at);
    assert_eq!(word(0) & 0xff_ffff_ffff, 0x27f | u64::from(6u16 << 11 | 0x4100) << 16 | 0b1100_0000 << 32);
    assert_eq!(word(24) as u32, 0x1fa1);
    for (n, (low, high)) in (0..).zip(expected.st) {
        assert_eq!((word(32 + n * 16), word(40 + n * 16) as u16), (low, high), "ST({n})");
    }
    for (n, [low, high]) in (0..).zip(expected.xmm) {
        assert_eq!((word(160 + n * 16), word(168 + n * 16)), (low, high), "XMM{n}");
    }
    assert_eq!((after.fpu.st, after.fpu.xmm, after.fpu.ftw), (expected.st, expected.xmm, expected.ftw));
    assert_eq!((after.fpu.fcw, after.fpu.fsw, after.fpu.mxcsr), (expected.fcw, expected.fsw, expected.mxcsr));
    Ok(())
}

fn fxrstor_is_saved(bench: &Bench) -> Outcome {
    let guest = Guest::running(|a| a.fxrstor64(ptr(IMAGE)));
    guest.put(IMAGE, 0x37f | (7 << 11) << 16 | 0b1000_0000 << 32);
    guest.put(IMAGE + 24, 0x1f80);
    guest.put(IMAGE + 32, 0xa000_0000_0000_0000);
    guest.put(IMAGE + 40, 0x4002);
    for n in 0..32 {
        guest.put(IMAGE + 160 + n * 8, 0x1111 * n);
    }
    let fpu = run_to_end(bench, &guest)?.fpu;
    assert_eq!((fpu.fsw, fpu.ftw, fpu.st[0]), (7 << 11, 0b1000_0000, (0xa000_0000_0000_0000, 0x4002)));
    assert_eq!(fpu.xmm, std::array::from_fn(|n| [0x1111 * 2 * n as u64, 0x1111 * (2 * n as u64 + 1)]));
    Ok(())
}

/// Runs `build` at level 3 and at level 0, with RBX at `data` of eight quadwords; `check` looks at what each leaves.
fn at_both_levels(bench: &Bench, data: &[u64], build: Build, check: impl Fn(&Fpu, &[u64])) -> Outcome {
    let mut user = Guest::new();
    user.user(build);
    // Level 0 last: a host that lacks the instructions there has been asked about level 3.
    for (mut guest, at) in [(user, USER_DATA), (Guest::running(build), DATA)] {
        guest.state.gpr[3] = at;
        for (n, word) in (0..).zip(data) {
            guest.put(at + n * 8, *word);
        }
        let fpu = run_to_end(bench, &guest)?.fpu;
        check(&fpu, &std::array::from_fn::<u64, 8, _>(|n| guest.get(at + n as u64 * 8)));
    }
    Ok(())
}

fn x87_arithmetic_at_both_levels(bench: &Bench) -> Outcome {
    let check = |_: &Fpu, words: &[u64]| {
        assert_eq!(words[2..5], [2.0f64.sqrt().to_bits(), 0.2f64.to_bits(), 22]);
    };
    at_both_levels(
        bench,
        &[2.0f64.to_bits(), 10.0f64.to_bits(), 0, 0, 0, 7, 0, 0],
        |a| {
            a.fld(qword_ptr(rbx))?;
            a.fsqrt()?;
            a.fstp(qword_ptr(rbx + 16))?;
            a.fld(qword_ptr(rbx + 8))?;
            a.fdivr(qword_ptr(rbx))?;
            a.fstp(qword_ptr(rbx + 24))?;
            a.fild(qword_ptr(rbx + 40))?;
            a.fldpi()?;
            a.fmulp(st1, st0)?;
            a.fistp(qword_ptr(rbx + 32))
        },
        check,
    )
}

/// Volume 1, 8.1.5: rounding up and down, to 24 bits.
fn x87_rounding_and_precision(bench: &Bench) -> Outcome {
    const ROUND_DOWN_24: u64 = 0x47f & !0x300;
    const ROUND_UP_64: u64 = 0xb7f;
    let data = [1.0f64.to_bits(), 3.0f64.to_bits(), ROUND_DOWN_24, ROUND_UP_64, 0, 0, 0, 0];
    let check = |_: &Fpu, words: &[u64]| {
        assert_eq!((words[4], words[5] as u16), (0xaaaa_aa00_0000_0000, 0x3ffd));
        assert_eq!((words[6], words[7] as u16), (0xaaaa_aaaa_aaaa_aaab, 0x3ffd));
    };
    at_both_levels(
        bench,
        &data,
        |a| {
            for control in [16, 24] {
                a.fldcw(word_ptr(rbx + control))?;
                a.fld(qword_ptr(rbx))?;
                a.fdiv(qword_ptr(rbx + 8))?;
                a.fstp(tbyte_ptr(rbx + control * 2))?;
            }
            a.fninit()
        },
        check,
    )
}

fn mmx_shares_the_x87_registers(bench: &Bench) -> Outcome {
    let check = |fpu: &Fpu, _: &[u64]| {
        // Any MMX instruction but EMMS marks all registers as in use, and TOP as 0.
        assert_eq!((fpu.st[3], fpu.fsw >> 11 & 7, fpu.ftw), ((0x1112_1314_1516_1707, 0xffff), 0, 0xff));
    };
    at_both_levels(
        bench,
        &[0x0102_0304_0506_0708, 0x1010_1010_1010_10ff],
        |a| {
            a.movq(mm3, qword_ptr(rbx))?;
            a.paddb(mm3, qword_ptr(rbx + 8))
        },
        check,
    )
}

fn sse_arithmetic_at_both_levels(bench: &Bench) -> Outcome {
    let data = [3.0f64.to_bits(), 0.1f64.to_bits(), 4.0f64.to_bits(), 0.2f64.to_bits()];
    let check = |fpu: &Fpu, _: &[u64]| {
        let pair = |low: f64, high: f64| [low.to_bits(), high.to_bits()];
        assert_eq!(fpu.xmm[3], pair(7.0, 0.1 + 0.2));
        assert_eq!(fpu.xmm[4], pair(0.75, 0.1 / 0.2));
        assert_eq!(fpu.xmm[5], pair(2.0, 0.2f64.sqrt()));
        assert_eq!(fpu.xmm[6][0], 7.0f64.to_bits());
        assert_eq!((fpu.xmm[7], fpu.xmm[8]), (pair(0.1, 3.0), pair(3.0, 0.1)));
    };
    at_both_levels(
        bench,
        &data,
        |a| {
            a.movupd(xmm1, xmmword_ptr(rbx))?;
            a.movupd(xmm2, xmmword_ptr(rbx + 16))?;
            a.movapd(xmm3, xmm1)?;
            a.addpd(xmm3, xmm2)?;
            a.movapd(xmm4, xmm1)?;
            a.divpd(xmm4, xmm2)?;
            a.sqrtpd(xmm5, xmm2)?;
            a.cvttsd2si(rax, xmm3)?;
            a.cvtsi2sd(xmm6, rax)?;
            a.pshufd(xmm7, xmm1, 0x4e)?;
            a.pxor(xmm8, xmm8)?;
            a.paddq(xmm8, xmm1)
        },
        check,
    )
}

/// Volume 1, 10.2.3: rounding control, and the sticky flags.
fn mxcsr_rounds_and_notes(bench: &Bench) -> Outcome {
    let data = [1.0f64.to_bits(), 3.0f64.to_bits(), 0x5f80 << 32 | 0x3f80];
    let check = |fpu: &Fpu, _: &[u64]| {
        let down = (1.0f64 / 3.0).to_bits();
        assert_eq!((fpu.xmm[1][0], fpu.xmm[2][0]), (down, down + 1));
        assert_eq!(fpu.mxcsr, 0x5fa0, "inexact");
    };
    at_both_levels(
        bench,
        &data,
        |a| {
            for (control, into) in [(16, xmm1), (20, xmm2)] {
                a.ldmxcsr(dword_ptr(rbx + control))?;
                a.movsd_2(into, qword_ptr(rbx))?;
                a.divsd(into, qword_ptr(rbx + 8))?;
            }
            Ok(())
        },
        check,
    )
}

fn mxcsr_refuses_reserved_bits(bench: &Bench) -> Outcome {
    let guest = Guest::running(|a| a.ldmxcsr(dword_ptr(DATA)));
    guest.put(DATA, 0x1_1f80);
    let trap = run_once(bench, &guest)?.trap();
    assert_eq!((trap.vector, trap.error, trap.rip), (13, 0, CODE));
    Ok(())
}

fn interrupts_leave_registers_alone(bench: &Bench) -> Outcome {
    let mut guest = Guest::new();
    guest.user(|a| {
        let mut again = a.create_label();
        a.fldpi()?;
        a.mov(eax, 7)?;
        a.cvtsi2sd(xmm9, eax)?;
        a.mov(ecx, 100)?;
        a.set_label(&mut again)?;
        a.int3()?;
        a.dec(ecx)?;
        a.jne(again)
    });
    guest.call_handler(|a| {
        count(a, 0)?;
        a.iretq()
    });
    let fpu = run_to_end(bench, &guest)?.fpu;
    assert_eq!((fpu.st[0], fpu.xmm[9][0]), ((0xc90f_daa2_2168_c235, 0x4000), 7.0f64.to_bits()));
    assert_eq!(guest.result(0), 100);
    Ok(())
}

fn fninit_resets_the_x87(bench: &Bench) -> Outcome {
    let mut guest = Guest::running(|a| a.fninit());
    let fpu = &mut guest.state.fpu;
    (fpu.fcw, fpu.fsw, fpu.ftw) = (0x27f, 3 << 11, 0xff);
    fpu.xmm[0] = [1, 2];
    let fpu = run_to_end(bench, &guest)?.fpu;
    assert_eq!((fpu.fcw, fpu.fsw, fpu.ftw, fpu.xmm[0]), (0x37f, 0, 0, [1, 2]));
    Ok(())
}
