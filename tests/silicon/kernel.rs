//! Kernel mode: short programs at privilege level 0, made of system instructions with random operands.
//!
//! There the reference is only as good as the host's KVM: with hardware extensions it is silicon, without them an
//! emulator that lacks some instructions. What it lacks is reported by name and is no difference. What KVM's emulator
//! is known to do otherwise than the manuals say is not drawn: it takes the upper half of CR0 and CR4, a data segment in CS by IRETQ, and reserved memory
//! types in the PAT, says error code 0 where LTR names the local table, looks at SS before CS in IRETQ and keeps data segments
//! when that leads to user mode, and stores a part of what crosses into a page that is not there.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use crate::machine;
use crate::rng::Rng;

/// The port that ends a program.
pub(crate) const END: u32 = 0x80;
/// Where programs keep what instructions store.
const SAVED: u64 = machine::WINDOW;
/// Where programs put what instructions load.
const LOADED: u64 = machine::WINDOW + 0x100;

/// A kind of program.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Template {
    pub(crate) name: &'static str,
    build: fn(&mut CodeAssembler, &mut Rng) -> Result<(), IcedError>,
}

impl Template {
    /// A program of this kind.
    ///
    /// # Panics
    /// When the template does not assemble: a defect of it.
    pub(crate) fn program(&self, rng: &mut Rng) -> Vec<u8> {
        let assemble = |rng: &mut Rng| {
            let mut a = CodeAssembler::new(64)?;
            (self.build)(&mut a, rng)?;
            a.out(END, al)?;
            a.hlt()?;
            a.assemble(machine::CODE)
        };
        assemble(rng).unwrap_or_else(|error| panic!("{}: {error}", self.name))
    }
}

/// Every kind.
pub(crate) const TEMPLATES: &[Template] = &[
    Template { name: "mov-cr0", build: mov_cr0 },
    Template { name: "mov-cr2", build: mov_cr2 },
    Template { name: "mov-cr3", build: mov_cr3 },
    Template { name: "mov-cr4", build: mov_cr4 },
    Template { name: "mov-cr8", build: mov_cr8 },
    Template { name: "mov-dr", build: mov_dr },
    Template { name: "clts", build: clts },
    Template { name: "lmsw", build: lmsw },
    Template { name: "smsw", build: smsw },
    Template { name: "lgdt-sgdt", build: lgdt },
    Template { name: "lidt-sidt", build: lidt },
    Template { name: "lldt-sldt", build: lldt },
    Template { name: "ltr-str", build: ltr },
    Template { name: "mov-sreg", build: mov_sreg },
    Template { name: "mov-from-sreg", build: mov_from_sreg },
    Template { name: "lss-lfs-lgs", build: far_pointer },
    Template { name: "push-pop-sreg", build: push_pop_sreg },
    Template { name: "lar-lsl", build: lar_lsl },
    Template { name: "verr-verw", build: verr_verw },
    Template { name: "wrmsr-rdmsr", build: msr },
    Template { name: "swapgs", build: swapgs },
    Template { name: "invlpg", build: invlpg },
    Template { name: "sti-cli", build: interrupt_flag },
    Template { name: "pushf-popf", build: pushf_popf },
    Template { name: "far-jump", build: far_jump },
    Template { name: "far-call-return", build: far_call },
    Template { name: "iretq", build: iretq },
    Template { name: "syscall", build: syscall },
    Template { name: "sysret", build: sysret },
    Template { name: "int-n", build: int_n },
    Template { name: "in-out", build: in_out },
    Template { name: "page-fault", build: page_fault },
    Template { name: "write-protect", build: write_protect },
    Template { name: "division", build: division },
    Template { name: "non-canonical", build: non_canonical },
    Template { name: "undefined", build: undefined },
    Template { name: "gs-base-string", build: string_moves },
];

/// Selectors of every kind: null, good, of the wrong type or level, not present, past the table.
const SELECTORS: [u16; 16] = [0, 1, 2, 3, 0x08, 0x0b, 0x10, 0x13, 0x18, 0x20, 0x23, 0x28, 0x2b, 0x30, 0x48, 0xfff8];

fn selector(rng: &mut Rng) -> u32 {
    // Bit 2 asks the local table, which the machine does not have.
    let local = if rng.one_in(8) { 4 } else { 0 };
    (rng.pick(&SELECTORS) | local).into()
}

/// An address: canonical mostly.
fn address(rng: &mut Rng) -> u64 {
    match rng.below(6) {
        0 => 0x0000_7fff_ffff_ffff,
        1 => 0x0000_8000_0000_0000,
        2 => 0xffff_8000_0000_0000,
        3 => 0xffff_7fff_ffff_ffff,
        4 => rng.next() >> 17,
        _ => rng.next(),
    }
}

fn mov_cr0(a: &mut CodeAssembler, rng: &mut Rng) -> Result<(), IcedError> {
    // MP, EM, TS, NE, WP, AM; at times one that must not change alone.
    let mut value = machine::CR0 ^ rng.next() & 0x5_002e;
    match rng.below(8) {
        0 => value ^= 1 << 29,
        1 => value ^= 1 << 31,
        2 => value ^= 1,
        _ => {}
    }
    a.mov(rax, value)?;
    a.mov(cr0, rax)?;
    a.mov(rbx, cr0)
}

fn mov_cr2(a: &mut CodeAssembler, rng: &mut Rng) -> Result<(), IcedError> {
    a.mov(rax, rng.integer())?;
    a.mov(cr2, rax)?;
    a.mov(rbx, cr2)
}

fn mov_cr3(a: &mut CodeAssembler, rng: &mut Rng) -> Result<(), IcedError> {
    // PWT and PCD; at times reserved bits beyond the physical address width.
    let value = machine::PML4 | rng.next() & 0x18 | if rng.one_in(4) { 1 << 60 } else { 0 };
    a.mov(rax, value)?;
    a.mov(cr3, rax)?;
    a.mov(rbx, cr3)
}

fn mov_cr4(a: &mut CodeAssembler, rng: &mut Rng) -> Result<(), IcedError> {
    // TSD, DE, PSE, MCE, PGE, PCE, OSFXSR, OSXMMEXCPT; at times PAE.
    let value = machine::CR4 ^ rng.next() & 0x7dc ^ if rng.one_in(6) { 1 << 5 } else { 0 };
    a.mov(rax, value)?;
    a.mov(cr4, rax)?;
    a.mov(rbx, cr4)
}

fn mov_cr8(a: &mut CodeAssembler, rng: &mut Rng) -> Result<(), IcedError> {
    a.mov(rax, if rng.one_in(4) { rng.integer() } else { rng.below(16) })?;
    a.mov(cr8, rax)?;
    a.mov(rbx, cr8)
}

fn mov_dr(a: &mut CodeAssembler, rng: &mut Rng) -> Result<(), IcedError> {
    let value = if rng.one_in(2) { rng.integer() & 0xffff_ffff } else { rng.integer() };
    a.mov(rax, value)?;
    match rng.below(6) {
        0 => a.mov(dr0, rax)?,
        1 => a.mov(dr1, rax)?,
        2 => a.mov(dr2, rax)?,
        3 => a.mov(dr3, rax)?,
        4 => a.mov(dr6, rax)?,
        _ => {
            // Nothing enabled: what a breakpoint does is another matter.
            a.mov(rax, value & !0xff & !(1 << 13))?;
            a.mov(dr7, rax)?;
        }
    }
    a.mov(rbx, dr6)?;
    a.mov(rcx, dr7)?;
    a.mov(rdx, dr3)
}

fn clts(a: &mut CodeAssembler, rng: &mut Rng) -> Result<(), IcedError> {
    a.mov(rax, machine::CR0 | rng.next() & 8)?;
    a.mov(cr0, rax)?;
    a.clts()?;
    a.mov(rbx, cr0)
}

fn lmsw(a: &mut CodeAssembler, rng: &mut Rng) -> Result<(), IcedError> {
    a.mov(eax, rng.next() as u32)?;
    if rng.one_in(2) {
        a.lmsw(ax)?;
    } else {
        a.mov(word_ptr(LOADED), ax)?;
        a.lmsw(word_ptr(LOADED))?;
    }
    a.mov(rbx, cr0)
}

fn smsw(a: &mut CodeAssembler, rng: &mut Rng) -> Result<(), IcedError> {
    match rng.below(4) {
        0 => a.smsw(bx),
        1 => a.smsw(ebx),
        2 => a.smsw(rbx),
        _ => a.smsw(word_ptr(SAVED)),
    }
}

/// A table register's operand at [`LOADED`].
fn table(a: &mut CodeAssembler, rng: &mut Rng, base: u64, limit: u16) -> Result<(), IcedError> {
    let base = if rng.one_in(4) { address(rng) } else { base };
    a.mov(rax, base)?;
    a.mov(word_ptr(LOADED), i32::from(limit) as u32)?;
    a.mov(qword_ptr(LOADED + 2), rax)
}

fn lgdt(a: &mut CodeAssembler, rng: &mut Rng) -> Result<(), IcedError> {
    table(a, rng, machine::GDT, rng.clone().next() as u16)?;
    a.lgdt(ptr(LOADED))?;
    a.sgdt(ptr(SAVED))
}

fn lidt(a: &mut CodeAssembler, rng: &mut Rng) -> Result<(), IcedError> {
    table(a, rng, machine::IDT, machine::IDT_LIMIT)?;
    a.lidt(ptr(LOADED))?;
    a.sidt(ptr(SAVED))
}

fn lldt(a: &mut CodeAssembler, rng: &mut Rng) -> Result<(), IcedError> {
    a.mov(eax, selector(rng))?;
    a.lldt(ax)?;
    a.sldt(ebx)?;
    a.sldt(word_ptr(SAVED))
}

fn ltr(a: &mut CodeAssembler, rng: &mut Rng) -> Result<(), IcedError> {
    if rng.one_in(2) {
        // Available, so that it can be loaded once more.
        a.mov(byte_ptr(machine::GDT + u64::from(machine::TSS_SELECTOR) + 5), 0x89u32)?;
        a.mov(eax, u32::from(machine::TSS_SELECTOR))?;
    } else {
        a.mov(eax, selector(rng) & !4)?;
    }
    a.ltr(ax)?;
    a.str(ebx)?;
    a.mov(rcx, qword_ptr(machine::GDT + u64::from(machine::TSS_SELECTOR)))
}

fn mov_sreg(a: &mut CodeAssembler, rng: &mut Rng) -> Result<(), IcedError> {
    a.mov(eax, selector(rng))?;
    match rng.below(5) {
        0 => a.mov(ds, eax)?,
        1 => a.mov(es, eax)?,
        2 => a.mov(fs, eax)?,
        3 => a.mov(gs, eax)?,
        _ => a.mov(ss, eax)?,
    }
    a.nop()
}

fn mov_from_sreg(a: &mut CodeAssembler, rng: &mut Rng) -> Result<(), IcedError> {
    a.mov(rbx, u64::MAX)?;
    match rng.below(4) {
        0 => a.mov(bx, cs),
        1 => a.mov(ebx, ss),
        2 => a.mov(rbx, fs),
        _ => a.mov(word_ptr(SAVED), gs),
    }
}

fn far_pointer(a: &mut CodeAssembler, rng: &mut Rng) -> Result<(), IcedError> {
    a.mov(rax, rng.integer())?;
    a.mov(qword_ptr(LOADED), rax)?;
    a.mov(word_ptr(LOADED + 4), selector(rng))?;
    match rng.below(3) {
        0 => a.lss(ebx, fword_ptr(LOADED))?,
        1 => a.lfs(ebx, fword_ptr(LOADED))?,
        _ => a.lgs(ebx, fword_ptr(LOADED))?,
    }
    a.nop()
}

fn push_pop_sreg(a: &mut CodeAssembler, rng: &mut Rng) -> Result<(), IcedError> {
    a.push(selector(rng) as i32)?;
    if rng.one_in(2) {
        a.pop(fs)?
    } else {
        a.pop(gs)?
    }
    a.push(gs)?;
    a.pop(rbx)?;
    a.push(fs)?;
    a.pop(rcx)
}

fn lar_lsl(a: &mut CodeAssembler, rng: &mut Rng) -> Result<(), IcedError> {
    a.mov(eax, selector(rng))?;
    a.mov(rbx, u64::MAX)?;
    if rng.one_in(2) { a.lar(ebx, eax) } else { a.lsl(ebx, eax) }
}

fn verr_verw(a: &mut CodeAssembler, rng: &mut Rng) -> Result<(), IcedError> {
    a.mov(eax, selector(rng))?;
    if rng.one_in(2) { a.verr(ax) } else { a.verw(ax) }
}

fn msr(a: &mut CodeAssembler, rng: &mut Rng) -> Result<(), IcedError> {
    const ADDRESSES: [u32; 5] = [0xc000_0082, 0xc000_0083, 0xc000_0100, 0xc000_0101, 0xc000_0102];
    let (number, value) = match rng.below(6) {
        0 => (0xc000_0081, rng.integer()),
        1 => (0x174, rng.integer() & 0xffff_ffff),
        2 => (0xc000_0084, rng.integer() & 0xffff_ffff),
        3 => (0x277, if rng.one_in(2) { 0x0007_0406_0007_0406 } else { rng.next() & 0x0505_0505_0505_0505 }),
        // Not canonical is #GP by Intel's manual and fine by AMD's.
        4 if rng.one_in(2) => (rng.pick(&[0x175, 0x176]), rng.next() >> 17),
        4 => (rng.pick(&[0x1234_5678, 0xc000_1fff, 0x4fff]), rng.integer()),
        _ => (rng.pick(&ADDRESSES), address(rng)),
    };
    a.mov(ecx, number)?;
    a.mov(eax, value as u32)?;
    a.mov(edx, (value >> 32) as u32)?;
    a.wrmsr()?;
    a.xor(eax, eax)?;
    a.xor(edx, edx)?;
    a.rdmsr()
}

fn swapgs(a: &mut CodeAssembler, rng: &mut Rng) -> Result<(), IcedError> {
    let value = rng.next() >> 17;
    a.mov(ecx, 0xc000_0102u32)?;
    a.mov(eax, value as u32)?;
    a.mov(edx, (value >> 32) as u32)?;
    a.wrmsr()?;
    a.swapgs()
}

fn invlpg(a: &mut CodeAssembler, rng: &mut Rng) -> Result<(), IcedError> {
    // A page's frame changes; after INVLPG the new one must show.
    const PAGE_TABLE: u64 = 0x4000;
    let page = machine::WINDOW + 0x1000;
    let entry = PAGE_TABLE + page / 0x1000 * 8;
    a.mov(rbx, qword_ptr(page))?;
    a.mov(rsi, qword_ptr(entry))?;
    a.mov(rax, (machine::WINDOW + 0x2000) | 0x67)?;
    a.mov(qword_ptr(entry), rax)?;
    a.invlpg(byte_ptr(page + rng.below(0x1000)))?;
    a.mov(rcx, qword_ptr(page))?;
    a.mov(qword_ptr(entry), rsi)?;
    a.invlpg(byte_ptr(page))?;
    a.invlpg(byte_ptr(0x7000_0000u64))?;
    a.mov(rdx, qword_ptr(page))
}

fn interrupt_flag(a: &mut CodeAssembler, rng: &mut Rng) -> Result<(), IcedError> {
    for _ in 0..4 {
        if rng.one_in(2) {
            a.sti()?
        } else {
            a.cli()?
        }
        a.nop()?;
        a.pushfq()?;
        a.pop(rbx)?;
    }
    Ok(())
}

fn pushf_popf(a: &mut CodeAssembler, rng: &mut Rng) -> Result<(), IcedError> {
    // Everything but TF.
    a.mov(rax, rng.integer() & !0x100)?;
    a.push(rax)?;
    if rng.one_in(4) {
        a.popf()?
    } else {
        a.popfq()?
    }
    a.pushfq()?;
    a.pop(rbx)?;
    a.push(2)?;
    a.popfq()
}

fn far_jump(a: &mut CodeAssembler, rng: &mut Rng) -> Result<(), IcedError> {
    let mut target = a.create_label();
    a.lea(rax, ptr(target))?;
    a.mov(dword_ptr(LOADED), eax)?;
    a.mov(word_ptr(LOADED + 4), if rng.one_in(2) { 0x08 } else { selector(rng) })?;
    a.jmp(fword_ptr(LOADED))?;
    a.mov(ebx, 1)?;
    a.set_label(&mut target)?;
    a.mov(rcx, cs)
}

fn far_call(a: &mut CodeAssembler, rng: &mut Rng) -> Result<(), IcedError> {
    let (mut target, mut end) = (a.create_label(), a.create_label());
    a.lea(rax, ptr(target))?;
    a.mov(dword_ptr(LOADED), eax)?;
    a.mov(word_ptr(LOADED + 4), if rng.one_in(2) { 0x08 } else { selector(rng) })?;
    a.call(fword_ptr(LOADED))?;
    a.mov(ebx, 1)?;
    a.jmp(end)?;
    a.set_label(&mut target)?;
    a.mov(rcx, cs)?;
    a.retf()?;
    a.set_label(&mut end)?;
    a.nop()
}

fn iretq(a: &mut CodeAssembler, rng: &mut Rng) -> Result<(), IcedError> {
    let mut target = a.create_label();
    let (code, stack) = rng.pick(&[(0x08, 0x10), (0x08, 0), (0, 0x10), (0x48, 0x10)]);
    a.push(stack)?;
    a.push((machine::STACK + 0x800) as i32)?;
    a.push((rng.next() & 0xcd5 | 2) as i32)?;
    a.push(code)?;
    a.lea(rax, ptr(target))?;
    a.push(rax)?;
    a.iretq()?;
    a.mov(ebx, 1)?;
    a.set_label(&mut target)?;
    a.mov(rcx, cs)?;
    a.mov(rdx, ss)
}

/// STAR with the machine's segments, for SYSCALL and SYSRET.
fn set_star(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(ecx, 0xc000_0081u32)?;
    a.xor(eax, eax)?;
    a.mov(edx, 0x001b_0008u32)?;
    a.wrmsr()
}

fn syscall(a: &mut CodeAssembler, rng: &mut Rng) -> Result<(), IcedError> {
    let mut target = a.create_label();
    set_star(a)?;
    a.lea(rax, ptr(target))?;
    a.mov(rdx, rax)?;
    a.shr(rdx, 32)?;
    a.mov(ecx, 0xc000_0082u32)?;
    a.wrmsr()?;
    a.mov(ecx, 0xc000_0084u32)?;
    a.mov(eax, rng.next() as u32)?;
    a.xor(edx, edx)?;
    a.wrmsr()?;
    a.syscall()?;
    a.mov(ebx, 1)?;
    a.set_label(&mut target)?;
    a.mov(rdx, cs)?;
    a.mov(rsi, ss)
}

fn sysret(a: &mut CodeAssembler, rng: &mut Rng) -> Result<(), IcedError> {
    let mut target = a.create_label();
    set_star(a)?;
    a.lea(rcx, ptr(target))?;
    a.mov(r11, rng.next() & 0xcd5 | 2)?;
    a.sysretq()?;
    a.mov(ebx, 1)?;
    a.set_label(&mut target)?;
    // In user mode now, where this does not fault and INT3 leads back.
    a.lea(rdi, ptr(rsp - 8))?;
    a.int3()
}

fn int_n(a: &mut CodeAssembler, rng: &mut Rng) -> Result<(), IcedError> {
    match rng.below(3) {
        0 => a.int3(),
        1 => a.int(0x20 + rng.below(0x40) as u32),
        _ => a.int1(),
    }
}

fn in_out(a: &mut CodeAssembler, rng: &mut Rng) -> Result<(), IcedError> {
    a.mov(rax, rng.integer())?;
    a.mov(edx, 0x300u32)?;
    match rng.below(6) {
        0 => a.in_(al, dx),
        1 => a.in_(ax, dx),
        2 => a.in_(eax, dx),
        3 => a.in_(al, 0x90),
        4 => a.in_(ax, 0x90),
        _ => a.in_(eax, 0x90),
    }
}

fn page_fault(a: &mut CodeAssembler, rng: &mut Rng) -> Result<(), IcedError> {
    let place = rng.pick(&[machine::WINDOW - 0x1000, machine::READ_ONLY, 0x3000_0000]);
    a.mov(rax, place)?;
    match rng.below(4) {
        0 => a.mov(rbx, qword_ptr(rax)),
        1 => a.mov(qword_ptr(rax), rbx),
        2 => a.add(qword_ptr(rax), 1),
        // The window may not be executed.
        _ => a.jmp(rax),
    }
}

fn write_protect(a: &mut CodeAssembler, rng: &mut Rng) -> Result<(), IcedError> {
    a.mov(rax, if rng.one_in(2) { machine::CR0 } else { machine::CR0 | 1 << 16 })?;
    a.mov(cr0, rax)?;
    a.mov(qword_ptr(machine::READ_ONLY + 8), rbx)?;
    a.mov(rcx, machine::CR0)?;
    a.mov(cr0, rcx)
}

fn division(a: &mut CodeAssembler, rng: &mut Rng) -> Result<(), IcedError> {
    a.mov(rax, rng.integer())?;
    a.mov(rdx, rng.below(3))?;
    a.mov(rcx, rng.below(3))?;
    a.div(rcx)?;
    // Undefined flags become defined ones.
    a.cmp(rax, rdx)
}

fn non_canonical(a: &mut CodeAssembler, rng: &mut Rng) -> Result<(), IcedError> {
    a.mov(rbp, 0x8000_0000_0000_0000u64)?;
    match rng.below(4) {
        0 => a.mov(rax, qword_ptr(rbp + 8)),
        1 => {
            a.mov(rcx, rbp)?;
            a.mov(qword_ptr(rcx), rax)
        }
        2 => {
            a.mov(rsp, rbp)?;
            a.push(rax)
        }
        _ => a.jmp(rbp),
    }
}

fn undefined(a: &mut CodeAssembler, rng: &mut Rng) -> Result<(), IcedError> {
    match rng.below(3) {
        0 => a.ud2(),
        // LOCK where none may be: lock mov [rax], al.
        1 => a.db(&[0xf0, 0x88, 0x00]),
        // An opcode that 64-bit mode does not have.
        _ => a.db(&[0x06]),
    }
}

fn string_moves(a: &mut CodeAssembler, rng: &mut Rng) -> Result<(), IcedError> {
    a.mov(rsi, machine::WINDOW + 0x400 - machine::GS_BASE)?;
    a.mov(rdi, machine::WINDOW + 0x1ff0 + rng.below(32))?;
    a.mov(rcx, rng.below(20))?;
    a.db(match rng.below(3) {
        // rep movsq gs:; rep movsb gs:; rep stosq.
        0 => &[0xf3, 0x65, 0x48, 0xa5],
        1 => &[0xf3, 0x65, 0xa4],
        _ => &[0xf3, 0x48, 0xab],
    })
}
