//! x87 and MMX control instructions: words, environment, whole state (Intel SDM volume 1, section 8.1.10).

use iced_x86::Code;
use iced_x86::Instruction;
use iced_x86::Mnemonic;
use iced_x86::OpKind;

use crate::hv::soft::cpu::Cpu;
use crate::hv::soft::cpu::cr0;
use crate::hv::soft::exec::Executor;
use crate::hv::soft::fault::Exception;
use crate::hv::soft::fault::Flow;
use crate::hv::soft::fault::Stop;
use crate::hv::soft::mmu::Access;
use crate::hv::soft::operand::segment_fault;

use super::extended::Class;
use super::extended::Extended;
use super::x87::EXCEPTIONS;
use super::x87::Pointers;
use super::x87::X87;
use super::x87::st_index;

pub(super) fn executor(insn: &Instruction) -> Option<Executor> {
    Some(match insn.mnemonic() {
        Mnemonic::Fninit => init,
        Mnemonic::Fnclex => clear_exceptions,
        Mnemonic::Fldcw => load_control,
        Mnemonic::Fnstcw => store_control,
        Mnemonic::Fnstsw => store_status,
        // The decoder takes a WAIT and the no-wait instruction after it for two instructions, as silicon does.
        Mnemonic::Wait => wait,
        Mnemonic::Emms => |cpu, _| {
            cpu.require_mmx()?;
            cpu.fpu.x87.enter_mmx();
            cpu.fpu.x87.valid = 0;
            Ok(Flow::Next)
        },
        // What the 8087 and 287 did with these, nothing since does.
        Mnemonic::Fneni | Mnemonic::Fndisi | Mnemonic::Fnsetpm => |cpu, _| {
            cpu.require_x87()?;
            Ok(Flow::Next)
        },
        Mnemonic::Fnop => |cpu, insn| noted(cpu, insn, |_| {}),
        Mnemonic::Fincstp => |cpu, insn| noted(cpu, insn, |x87| turn(x87, 1)),
        Mnemonic::Fdecstp => |cpu, insn| noted(cpu, insn, |x87| turn(x87, 7)),
        Mnemonic::Ffree => |cpu, insn| {
            let i = st_index(insn.op0_register());
            noted(cpu, insn, |x87| {
                x87.free(i);
                x87.set_c1(false);
            })
        },
        Mnemonic::Ffreep => |cpu, insn| {
            let i = st_index(insn.op0_register());
            noted(cpu, insn, |x87| {
                x87.free(i);
                x87.pop();
                x87.set_c1(false);
            })
        },
        Mnemonic::Fnstenv => store_environment,
        Mnemonic::Fldenv => load_environment,
        Mnemonic::Fnsave => save,
        Mnemonic::Frstor => restore,
        _ => return None,
    })
}

fn turn(x87: &mut X87, by: u8) {
    x87.rotate(by);
    x87.set_c1(false);
}

fn noted(cpu: &mut Cpu, insn: &Instruction, f: impl FnOnce(&mut X87)) -> Result<Flow, Stop> {
    cpu.begin_x87()?;
    cpu.note_x87(insn)?;
    f(&mut cpu.fpu.x87);
    Ok(Flow::Next)
}

fn init(cpu: &mut Cpu, _: &Instruction) -> Result<Flow, Stop> {
    cpu.require_x87()?;
    cpu.fpu.x87.init();
    Ok(Flow::Next)
}

fn clear_exceptions(cpu: &mut Cpu, _: &Instruction) -> Result<Flow, Stop> {
    cpu.require_x87()?;
    cpu.fpu.x87.clear_exceptions();
    Ok(Flow::Next)
}

fn load_control(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    cpu.begin_x87()?;
    let control = cpu.load(insn)?;
    cpu.fpu.x87.set_control(control);
    Ok(Flow::Next)
}

fn store_control(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    cpu.require_x87()?;
    cpu.store(insn, cpu.fpu.x87.control)?;
    Ok(Flow::Next)
}

fn store_status(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    cpu.require_x87()?;
    let status = cpu.fpu.x87.status_word();
    if insn.op0_kind() == OpKind::Memory {
        cpu.store(insn, status)?;
    } else {
        cpu.set_register(insn.op0_register(), status.into());
    }
    Ok(Flow::Next)
}

fn wait(cpu: &mut Cpu, _: &Instruction) -> Result<Flow, Stop> {
    if cpu.control.cr0 & (cr0::MP | cr0::TS) == cr0::MP | cr0::TS {
        return Err(Exception::NO_FPU.into());
    }
    cpu.deliver_pending_x87()?;
    Ok(Flow::Next)
}

/// Whether the operand size is 16 bits, which makes the environment 14 bytes and not 28.
fn is_narrow(insn: &Instruction) -> bool {
    matches!(insn.code(), Code::Fnstenv_m14byte | Code::Fldenv_m14byte | Code::Fnsave_m94byte | Code::Frstor_m94byte)
}

/// The environment in memory has another layout in real mode, with linear addresses instead of selectors.
fn require_selectors(cpu: &Cpu) -> Result<(), Stop> {
    if cpu.is_protected() { Ok(()) } else { Err(Stop::Unimplemented("the x87 environment of real mode")) }
}

const fn environment_size(narrow: bool) -> usize {
    if narrow { 14 } else { 28 }
}

/// The tag word with two bits a register: valid, zero, special, empty.
fn tag_word(x87: &X87) -> u16 {
    let top = x87.status_word() >> 11 & 7;
    (0..8).rev().fold(0, |tags, physical: u16| {
        let i = (physical.wrapping_sub(top) & 7) as u8;
        let tag = if x87.is_empty(i) {
            3
        } else {
            match x87.raw(i).class() {
                Class::Normal => 0,
                Class::Zero => 1,
                _ => 2,
            }
        };
        tags << 2 | tag
    })
}

fn environment(x87: &X87, narrow: bool) -> [u8; 28] {
    let Pointers { opcode, ip, cs, dp, ds } = x87.pointers;
    let mut bytes = [0; 28];
    if narrow {
        let words = [x87.control, x87.status_word(), tag_word(x87), ip as u16, cs, dp as u16, ds];
        for (n, word) in words.iter().enumerate() {
            bytes[2 * n..2 * n + 2].copy_from_slice(&word.to_le_bytes());
        }
    } else {
        let high = |word: u16| u32::from(word) | 0xffff_0000;
        let code = u32::from(cs) | u32::from(opcode) << 16;
        let words =
            [high(x87.control), high(x87.status_word()), high(tag_word(x87)), ip as u32, code, dp as u32, high(ds)];
        for (n, word) in words.iter().enumerate() {
            bytes[4 * n..4 * n + 4].copy_from_slice(&word.to_le_bytes());
        }
    }
    bytes
}

fn set_environment(x87: &mut X87, bytes: &[u8; 28], narrow: bool) {
    let word = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
    let dword = |at: usize| u64::from(word(at)) | u64::from(word(at + 2)) << 16;
    let tags = if narrow {
        x87.pointers = Pointers { opcode: 0, ip: word(6).into(), cs: word(8), dp: word(10).into(), ds: word(12) };
        x87.set_control(word(0));
        x87.set_status_word(word(2));
        word(4)
    } else {
        x87.pointers = Pointers { opcode: word(18) & 0x7ff, ip: dword(12), cs: word(16), dp: dword(20), ds: word(24) };
        x87.set_control(word(0));
        x87.set_status_word(word(4));
        word(8)
    };
    x87.valid = (0..8).fold(0, |valid, n| valid | u8::from(tags >> (2 * n) & 3 != 3) << n);
}

fn write_all(cpu: &mut Cpu, insn: &Instruction, bytes: &[u8]) -> Result<(), Stop> {
    let at = cpu.linear_address(insn, bytes.len() as u64, Access::Write)?;
    let fault = |stop| segment_fault(insn, stop);
    cpu.probe_write(at, bytes.len() as u64).map_err(fault)?;
    for (n, &byte) in bytes.iter().enumerate() {
        cpu.write(at.wrapping_add(n as u64), byte).map_err(fault)?;
    }
    Ok(())
}

fn read_all(cpu: &mut Cpu, insn: &Instruction, bytes: &mut [u8]) -> Result<(), Stop> {
    let at = cpu.linear_address(insn, bytes.len() as u64, Access::Read)?;
    for (n, byte) in bytes.iter_mut().enumerate() {
        *byte = cpu.read(at.wrapping_add(n as u64)).map_err(|stop| segment_fault(insn, stop))?;
    }
    Ok(())
}

fn store_environment(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    cpu.require_x87()?;
    require_selectors(cpu)?;
    let narrow = is_narrow(insn);
    let bytes = environment(&cpu.fpu.x87, narrow);
    write_all(cpu, insn, &bytes[..environment_size(narrow)])?;
    mask_all(&mut cpu.fpu.x87);
    Ok(Flow::Next)
}

/// FNSTENV leaves all exceptions masked.
fn mask_all(x87: &mut X87) {
    x87.set_control(x87.control | EXCEPTIONS);
}

fn load_environment(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    cpu.begin_x87()?;
    require_selectors(cpu)?;
    let narrow = is_narrow(insn);
    let mut bytes = [0; 28];
    read_all(cpu, insn, &mut bytes[..environment_size(narrow)])?;
    set_environment(&mut cpu.fpu.x87, &bytes, narrow);
    Ok(Flow::Next)
}

fn save(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    cpu.require_x87()?;
    require_selectors(cpu)?;
    let narrow = is_narrow(insn);
    let size = environment_size(narrow);
    let mut bytes = [0; 108];
    bytes[..28].copy_from_slice(&environment(&cpu.fpu.x87, narrow));
    for i in 0..8u8 {
        let value = cpu.fpu.x87.raw(i);
        let at = size + 10 * usize::from(i);
        bytes[at..at + 8].copy_from_slice(&value.sig.to_le_bytes());
        bytes[at + 8..at + 10].copy_from_slice(&value.se.to_le_bytes());
    }
    write_all(cpu, insn, &bytes[..size + 80])?;
    cpu.fpu.x87.init();
    Ok(Flow::Next)
}

fn restore(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    cpu.begin_x87()?;
    require_selectors(cpu)?;
    let narrow = is_narrow(insn);
    let size = environment_size(narrow);
    let mut bytes = [0; 108];
    read_all(cpu, insn, &mut bytes[..size + 80])?;
    let mut environment = [0; 28];
    environment[..size].copy_from_slice(&bytes[..size]);
    let x87 = &mut cpu.fpu.x87;
    set_environment(x87, &environment, narrow);
    for i in 0..8u8 {
        let at = size + 10 * usize::from(i);
        let mut wide = [0; 16];
        wide[..10].copy_from_slice(&bytes[at..at + 10]);
        let value = u128::from_le_bytes(wide);
        x87.set_raw(i, Extended { sig: value as u64, se: (value >> 64) as u16 });
    }
    Ok(Flow::Next)
}
