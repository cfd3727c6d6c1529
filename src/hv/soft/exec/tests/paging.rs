//! Intel SDM volume 3A, chapter 5.

use iced_x86::code_asm::*;

use crate::hv::soft::cpu::{cr0, slot};
use crate::hv::soft::fault::{Exception, Stop};

use super::{DATA, DIRECTORY, LARGE, Machine, PAGE_TABLE, machine};

const P: u64 = 1;
const W: u64 = 2;
const U: u64 = 4;
const A: u64 = 0x20;
const D: u64 = 0x40;
const G: u64 = 0x100;
const NX: u64 = 1 << 63;

fn load(m: &mut Machine) -> Result<(), Stop> {
    m.cpu.regs[slot::RBX] = DATA;
    m.run(|a| a.mov(rax, ptr(rbx))).map(drop)
}

fn save(m: &mut Machine) -> Result<(), Stop> {
    m.cpu.regs[slot::RBX] = DATA;
    m.run(|a| a.mov(ptr(rbx), rax)).map(drop)
}

fn pf(code: u32) -> Result<(), Stop> {
    Err(Exception::page(DATA, code).into())
}

#[test]
fn sdm_5_6_access_rights_and_5_7_error_codes() {
    // Entry, level, WP, and the outcome of a read and a write.
    let ok = Ok(());
    for (entry, cpl, wp, read, write) in [
        (0, 0, true, pf(0), pf(2)),
        (0, 3, true, pf(4), pf(6)),
        (P | W | U, 3, true, ok, ok),
        (P | U, 3, true, ok, pf(7)),
        (P | W, 3, true, pf(5), pf(7)),
        (P | U, 0, true, ok, pf(3)),
        (P, 0, false, ok, ok),
        (P | U, 3, false, ok, pf(7)),
        (P | W | 1 << 51, 0, true, pf(9), pf(11)),
    ] {
        let mut m = machine();
        m.map(DATA, if entry == 0 { 0 } else { DATA | entry });
        if !wp {
            m.cpu.control.cr0 &= !cr0::WP;
        }
        m.level(cpl);
        assert_eq!(load(&mut m), read, "read {entry:#x} at level {cpl}");
        assert_eq!(save(&mut m), write, "write {entry:#x} at level {cpl}");
    }
}

#[test]
fn sdm_5_6_rights_are_those_of_all_levels() {
    let mut m = machine();
    m.poke(DIRECTORY, PAGE_TABLE | P | U);
    assert_eq!(save(&mut m), pf(3));
    m.poke(DIRECTORY, PAGE_TABLE | P | W);
    m.level(3);
    m.cpu.flush_tlb();
    m.map(super::CODE, super::CODE | P | W | U);
    assert!(matches!(m.cpu.step(), Err(Stop::Fault(Exception { error: Some(0x15), .. }))));
}

#[test]
fn sdm_5_6_no_execute_faults_on_fetch_alone() {
    let mut m = machine();
    m.map(DATA, DATA | P | W | NX);
    assert_eq!(load(&mut m), Ok(()));
    m.cpu.rip = DATA;
    assert_eq!(m.cpu.step(), Err(Exception::page(DATA, 0x11).into()));
    // Without NXE the bit is reserved.
    m.cpu.control.efer &= !crate::hv::soft::cpu::efer::NXE;
    m.cpu.flush_tlb();
    m.cpu.rip = super::CODE;
    assert_eq!(load(&mut m), pf(9));
}

#[test]
fn sdm_5_8_accessed_and_dirty() {
    let mut m = machine();
    let entry = |m: &Machine| m.peek(PAGE_TABLE + (DATA >> 12) * 8) & (A | D);
    assert_eq!(entry(&m), 0);
    load(&mut m).unwrap();
    assert_eq!(entry(&m), A);
    save(&mut m).unwrap();
    assert_eq!(entry(&m), A | D);
    assert_eq!(m.peek(DIRECTORY) & (A | D), A);
    // A fault sets neither.
    let mut m = machine();
    m.map(DATA, DATA | P);
    assert_eq!(save(&mut m), pf(3));
    assert_eq!(entry(&m), 0);
}

#[test]
fn sdm_5_5_4_large_pages() {
    let mut m = machine();
    m.poke(LARGE + 0x12_3458, 77);
    m.cpu.regs[slot::RBX] = LARGE + 0x12_3458;
    m.run(|a| a.mov(rax, ptr(rbx))).unwrap();
    assert_eq!(m.cpu.regs[slot::RAX], 77);
    // Address bits below the page size are reserved.
    m.poke(DIRECTORY + 16, LARGE | 1 << 13 | 0x87);
    m.cpu.flush_tlb();
    assert_eq!(m.fault(|a| a.mov(rax, ptr(rbx))), Exception::page(LARGE + 0x12_3458, 9));
}

#[test]
fn sdm_5_10_4_translations_live_until_invalidated() {
    for (global, reload_enough) in [(0, true), (G, false)] {
        let mut m = machine();
        m.poke(DATA, 1);
        m.poke(DATA + 0x1000, 2);
        m.map(DATA, DATA | P | W | global);
        load(&mut m).unwrap();
        m.poke(PAGE_TABLE + (DATA >> 12) * 8, (DATA + 0x1000) | P | W | global);
        m.cpu.regs[slot::RCX] = m.cpu.control.cr3;
        m.run(|a| a.mov(cr3, rcx)).unwrap();
        load(&mut m).unwrap();
        assert_eq!(m.cpu.regs[slot::RAX], if reload_enough { 2 } else { 1 });
        m.run(|a| a.invlpg(ptr(rbx))).unwrap();
        load(&mut m).unwrap();
        assert_eq!(m.cpu.regs[slot::RAX], 2);
    }
}

#[test]
fn sdm_5_7_a_write_across_pages_is_all_or_nothing() {
    let mut m = machine();
    let end = DATA + 0xffc;
    m.poke(end, u64::MAX);
    m.map(DATA + 0x1000, 0);
    m.cpu.regs[slot::RBX] = end;
    assert_eq!(m.fault(|a| a.mov(ptr(rbx), rax)), Exception::page(DATA + 0x1000, 2));
    assert_eq!(m.peek(end), u64::MAX);
}

#[test]
fn sdm_3_3_7_1_canonical_addresses() {
    let mut m = machine();
    m.cpu.regs[slot::RBX] = 1 << 47;
    m.cpu.regs[slot::RBP] = 1 << 47;
    assert_eq!(m.fault(|a| a.mov(rax, ptr(rbx))), Exception::general_protection(0));
    assert_eq!(m.fault(|a| a.mov(rax, ptr(rbp))), Exception::stack(0));
    m.cpu.regs[slot::RSP] = (1 << 47) + 8;
    assert_eq!(m.fault(|a| a.push(rax)), Exception::stack(0));
    assert_eq!(m.fault(|a| a.jmp(rbx)), Exception::general_protection(0));
}
