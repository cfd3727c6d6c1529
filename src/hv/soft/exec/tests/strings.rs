//! String instructions: Intel SDM volume 2, REP.

use crate::hv::soft::cpu::slot::{RAX, RCX, RDI, RDX, RSI};
use crate::hv::soft::fault::{Exception, Flow, Stop};
use crate::hv::soft::flags;

use super::{CODE, DATA, Machine, machine};

fn strings(source: u64, destination: u64, count: u64) -> Machine {
    let mut m = machine();
    (m.cpu.regs[RSI], m.cpu.regs[RDI], m.cpu.regs[RCX]) = (source, destination, count);
    m
}

fn registers(m: &Machine) -> (u64, u64, u64) {
    (m.cpu.regs[RSI], m.cpu.regs[RDI], m.cpu.regs[RCX])
}

fn bytes_at(m: &Machine, address: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    m.cpu.ram.read_bytes(address, &mut bytes).unwrap();
    bytes
}

fn fill(m: &mut Machine, address: u64, len: u64) {
    for n in 0..len {
        m.cpu.ram.store(address + n, (n % 251) as u8).unwrap();
    }
}

#[test]
fn sdm_rep_movs_agrees_with_one_element_at_a_time() {
    // Distances that make the copy overlap itself, forwards and backwards, across pages and unaligned.
    for (from, to, count) in [
        (0, 0x2000, 700),
        (3, 0x2ffd, 1000),
        (0, 1, 300),
        (0, 8, 300),
        (0, 11, 300),
        (11, 0, 300),
        (0x1000, 0xffc, 600),
        (5, 5, 600),
        (0xffd, 0x1ffd, 9),
    ] {
        for down in [false, true] {
            let start = if down { count * 4 } else { 0 };
            let mut m = strings(DATA + from + start, DATA + to + start, count);
            fill(&mut m, DATA, 0x4000);
            m.cpu.system_flags = if down { flags::DF } else { 0 };
            let mut expected = bytes_at(&m, DATA, 0x6000);
            for n in 0..count {
                let at = if down { start - n * 4 } else { n * 4 } as usize;
                let element: [u8; 4] = std::array::from_fn(|k| expected[from as usize + at + k]);
                expected[to as usize + at..][..4].copy_from_slice(&element);
            }
            assert_eq!(m.run(|a| a.rep().movsd()), Ok(Flow::Next));
            assert!(bytes_at(&m, DATA, 0x6000) == expected, "{from:#x} to {to:#x}, {count}, down {down}");
            let moved = if down { (count * 4).wrapping_neg() } else { count * 4 };
            let end = |at: u64| (DATA + at + start).wrapping_add(moved);
            assert_eq!(registers(&m), (end(from), end(to), 0));
        }
    }
}

#[test]
fn sdm_rep_stos_fills_bytes_and_patterns() {
    for value in [0, 0x0123_4567_89ab_cdefu64, 0x5555_5555_5555_5555] {
        let mut m = strings(0, DATA + 5, 1000);
        m.cpu.regs[RAX] = value;
        m.run(|a| a.rep().stosq()).unwrap();
        let expected: Vec<u8> = value.to_le_bytes().into_iter().cycle().take(8000).collect();
        assert!(bytes_at(&m, DATA + 5, 8000) == expected);
        assert_eq!((bytes_at(&m, DATA + 4, 1), bytes_at(&m, DATA + 8005, 1)), (vec![0], vec![0]));
        assert_eq!(registers(&m), (0, DATA + 8005, 0));
    }
}

#[test]
fn sdm_rep_stops_at_a_fault_and_restarts() {
    let mut m = strings(DATA, DATA + 0x5ff0, 100);
    fill(&mut m, DATA, 100);
    let missing = DATA + 0x6000;
    m.map(missing, 0);
    assert_eq!(m.run(|a| a.rep().movsb()), Err(Stop::Fault(Exception::page(missing, 2))));
    assert_eq!(registers(&m), (DATA + 16, missing, 84));
    assert_eq!(m.cpu.rip, CODE);
    m.map(missing, missing | 3);
    assert_eq!(m.cpu.step(), Ok(Flow::Next));
    assert!(bytes_at(&m, DATA + 0x5ff0, 100) == bytes_at(&m, DATA, 100));
}

#[test]
fn rep_gives_way_to_interrupts() {
    let mut m = strings(0, DATA, 0x2_0000);
    assert_eq!(m.run(|a| a.rep().stosb()), Ok(Flow::Again));
    assert_eq!((m.cpu.rip, registers(&m)), (CODE, (0, DATA + 0x1_0000, 0x1_0000)));
    assert_eq!(m.cpu.step(), Ok(Flow::Next));
    assert_eq!((m.cpu.rip, registers(&m)), (CODE + 2, (0, DATA + 0x2_0000, 0)));
    // A device's time counts for more.
    let mut m = strings(DATA, 0, 0x1_0000);
    assert_eq!(m.run(|a| a.rep().outsb()), Ok(Flow::Again));
    assert_eq!(registers(&m), (DATA + 0x400, 0, 0xfc00));
    // Single stepping sees every iteration.
    let mut m = strings(0, DATA, 2);
    m.cpu.set_rflags(flags::TF);
    assert_eq!(m.run(|a| a.rep().stosb()), Ok(Flow::Again));
    assert_eq!(registers(&m), (0, DATA + 1, 1));
}

#[test]
fn sdm_repe_and_repne_end_on_the_zero_flag() {
    let mut m = strings(DATA, DATA + 0x1000, 100);
    fill(&mut m, DATA, 100);
    fill(&mut m, DATA + 0x1000, 100);
    m.cpu.ram.store(DATA + 40, 200u8).unwrap();
    m.run(|a| a.repe().cmpsb()).unwrap();
    assert_eq!((registers(&m), m.cpu.flags.zf()), ((DATA + 41, DATA + 0x1029, 59), false));
    m.cpu.regs[RAX] = 77;
    m.run(|a| a.repne().scasb()).unwrap();
    assert_eq!((m.cpu.regs[RDI], m.cpu.flags.zf()), (DATA + 0x1000 + 78, true));
}

#[test]
fn sdm_rep_with_a_zero_count_changes_nothing() {
    let mut m = strings(1, 2, 0);
    m.cpu.set_rflags(flags::ARITHMETIC);
    m.run(|a| a.repe().cmpsb()).unwrap();
    assert_eq!((registers(&m), m.cpu.rflags()), ((1, 2, 0), 2 | flags::ARITHMETIC));
    // Nor does ECX of zero under an address-size prefix touch the upper half, as silicon has it.
    let mut m = strings(1, 2, 1 << 32);
    m.bytes(&[0x67, 0xf3, 0xac]).unwrap();
    assert_eq!(registers(&m), (1, 2, 1 << 32));
}

#[test]
fn sdm_address_size_prefix_wraps_at_4_gib() {
    let mut m = strings((7 << 32) + DATA, (7 << 32) + DATA + 8, (7 << 32) + 1);
    m.poke(DATA, 0x55);
    m.bytes(&[0x67, 0xf3, 0xa4]).unwrap();
    assert_eq!((m.peek(DATA + 8), registers(&m)), (0x55, (DATA + 1, DATA + 9, 0)));
}

#[test]
fn sdm_ins_reads_the_port_only_when_it_can_store() {
    let mut m = strings(0, DATA, 3);
    m.cpu.regs[RDX] = 0x1f7;
    m.run(|a| a.rep().insb()).unwrap();
    assert_eq!(m.peek(DATA), 0xf7_f7f7);
    m.cpu.regs[RDI] = 0x7000_0000;
    assert_eq!(m.fault(|a| a.insb()), Exception::page(0x7000_0000, 2));
}
