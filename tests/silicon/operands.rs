//! Random operands for a form, and the instructions that make its addresses good.

use iced_x86::{Code, Instruction, Mnemonic, OpCodeOperandKind as K, OpKind, Register};

use crate::machine;
use crate::rng::Rng;

/// Where a memory operand is to point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Aim {
    /// Into the window, aligned as the instruction wants it.
    Good,
    /// Into the window, at any alignment.
    Unaligned,
    /// Across the window's end, into an unmapped page.
    Crossing,
    /// An unmapped page.
    Unmapped,
    /// A page without write permission.
    ReadOnly,
    /// A page of the kernel's.
    Supervisor,
    /// An address that is not canonical.
    NonCanonical,
}

pub(crate) const BAD_AIMS: [Aim; 6] =
    [Aim::Unaligned, Aim::Crossing, Aim::Unmapped, Aim::ReadOnly, Aim::Supervisor, Aim::NonCanonical];

/// An instruction with what has to run before it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Built {
    pub(crate) setup: Vec<Instruction>,
    pub(crate) insn: Instruction,
    /// Base address of the explicit memory operand as it will be used.
    pub(crate) address: u64,
}

/// `mov r, imm`, in the shortest form.
pub(crate) fn load(register: Register, value: u64) -> Instruction {
    let full = register.full_register();
    let code = if u32::try_from(value).is_ok() { Code::Mov_r32_imm32 } else { Code::Mov_r64_imm64 };
    let built = if code == Code::Mov_r32_imm32 {
        Instruction::with2(code, full.full_register32(), value as u32)
    } else {
        Instruction::with2(code, full, value)
    };
    built.expect("a move of an immediate encodes")
}

/// Builds `code` with random operands; `None` when it has an operand kind that needs a template instead.
pub(crate) fn build(rng: &mut Rng, code: Code, aim: Aim) -> Option<Built> {
    let info = code.op_code();
    let mut built = Built::default();
    built.insn.set_code(code);
    let mut seen_imm8 = false;
    for (index, kind) in info.op_kinds().iter().enumerate() {
        let index = index as u32;
        if let Some(register) = register(rng, *kind, code) {
            built.insn.set_op_kind(index, OpKind::Register);
            built.insn.set_op_register(index, register);
            continue;
        }
        match kind {
            K::imm8 if seen_imm8 || code.mnemonic() == Mnemonic::Enter => {
                built.insn.set_op_kind(index, OpKind::Immediate8_2nd);
                built.insn.set_immediate8_2nd(rng.below(32) as u8);
            }
            K::br16_1 | K::br32_1 | K::br64_1 | K::br16_2 | K::br32_4 | K::br64_4 => return None,
            K::seg_rSI | K::es_rDI | K::seg_rDI => implicit(rng, &mut built, index, *kind, aim),
            K::seg_rBX_al => {
                built.insn.set_op_kind(index, OpKind::Memory);
                built.insn.set_memory_base(Register::RBX);
                built.insn.set_memory_index(Register::AL);
                built.setup.push(load(Register::RBX, target(rng, aim, 256, 1)));
            }
            K::mem_offs => {
                let address = target(rng, aim, 8, 1);
                built.address = address;
                built.insn.set_op_kind(index, OpKind::Memory);
                built.insn.set_memory_displ_size(8);
                built.insn.set_memory_displacement64(address);
            }
            K::mem | K::r8_or_mem | K::r16_or_mem | K::r32_or_mem | K::r64_or_mem | K::mm_or_mem | K::xmm_or_mem => {
                memory(rng, &mut built, index, aim);
            }
            _ => {
                seen_imm8 |= *kind == K::imm8;
                immediate(rng, &mut built.insn, index, *kind)?;
            }
        }
    }
    Some(built)
}

/// A register operand, unless the kind is memory, or register or memory and memory was drawn.
fn register(rng: &mut Rng, kind: K, code: Code) -> Option<Register> {
    let rsp = rng.one_in(24);
    let gpr = rng.gpr64(rsp);
    // Intel's manual and AMD's processors differ about what the memory form does to the x87 state.
    let memory = rng.one_in(2) && code.mnemonic() != Mnemonic::Cvtpi2ps;
    Some(match kind {
        K::r8_or_mem | K::r16_or_mem | K::r32_or_mem | K::r64_or_mem | K::mm_or_mem | K::xmm_or_mem if memory => {
            return None;
        }
        K::r8_or_mem | K::r8_reg | K::r8_opcode => byte_register(rng, gpr),
        K::r16_or_mem | K::r16_reg | K::r16_reg_mem | K::r16_rm | K::r16_opcode => Register::AX + gpr.number() as u32,
        K::r32_or_mem | K::r32_reg | K::r32_reg_mem | K::r32_rm | K::r32_opcode => gpr.full_register32(),
        K::r64_or_mem | K::r64_reg | K::r64_reg_mem | K::r64_rm | K::r64_opcode => gpr,
        K::mm_or_mem | K::mm_reg | K::mm_rm => Register::MM0 + rng.below(8) as u32,
        K::xmm_or_mem | K::xmm_reg | K::xmm_rm => Register::XMM0 + rng.below(16) as u32,
        K::al => Register::AL,
        K::cl => Register::CL,
        K::ax => Register::AX,
        K::dx => Register::DX,
        K::eax => Register::EAX,
        K::rax => Register::RAX,
        K::st0 => Register::ST0,
        K::sti_opcode => Register::ST0 + rng.below(8) as u32,
        _ => return None,
    })
    .filter(|_| code != Code::INVALID)
}

fn byte_register(rng: &mut Rng, gpr: Register) -> Register {
    const LOW: [Register; 16] = [
        Register::AL,
        Register::CL,
        Register::DL,
        Register::BL,
        Register::SPL,
        Register::BPL,
        Register::SIL,
        Register::DIL,
        Register::R8L,
        Register::R9L,
        Register::R10L,
        Register::R11L,
        Register::R12L,
        Register::R13L,
        Register::R14L,
        Register::R15L,
    ];
    const HIGH: [Register; 4] = [Register::AH, Register::CH, Register::DH, Register::BH];
    if rng.one_in(5) { rng.pick(&HIGH) } else { LOW[gpr.number()] }
}

fn immediate(rng: &mut Rng, insn: &mut Instruction, index: u32, kind: K) -> Option<()> {
    let value = rng.integer();
    match kind {
        K::imm8 => {
            insn.set_op_kind(index, OpKind::Immediate8);
            insn.set_immediate8(value as u8);
        }
        K::imm8_const_1 => {
            insn.set_op_kind(index, OpKind::Immediate8);
            insn.set_immediate8(1);
        }
        K::imm8sex16 => {
            insn.set_op_kind(index, OpKind::Immediate8to16);
            insn.set_immediate8to16((value as i8).into());
        }
        K::imm8sex32 => {
            insn.set_op_kind(index, OpKind::Immediate8to32);
            insn.set_immediate8to32((value as i8).into());
        }
        K::imm8sex64 => {
            insn.set_op_kind(index, OpKind::Immediate8to64);
            insn.set_immediate8to64((value as i8).into());
        }
        K::imm16 => {
            insn.set_op_kind(index, OpKind::Immediate16);
            insn.set_immediate16(value as u16);
        }
        K::imm32 => {
            insn.set_op_kind(index, OpKind::Immediate32);
            insn.set_immediate32(value as u32);
        }
        K::imm32sex64 => {
            insn.set_op_kind(index, OpKind::Immediate32to64);
            insn.set_immediate32to64((value as i32).into());
        }
        K::imm64 => {
            insn.set_op_kind(index, OpKind::Immediate64);
            insn.set_immediate64(value);
        }
        _ => return None,
    }
    Some(())
}

/// How many bytes an access may touch, and the alignment it wants.
fn extent(code: Code) -> (u64, u64) {
    use Mnemonic as M;
    let size = code.op_code().memory_size().size() as u64;
    match code.mnemonic() {
        M::Fxsave | M::Fxsave64 | M::Fxrstor | M::Fxrstor64 => (512, 16),
        M::Fnsave | M::Fsave | M::Frstor => (108, 1),
        M::Fnstenv | M::Fstenv | M::Fldenv => (28, 1),
        M::Cmpxchg16b => (16, 16),
        M::Movups | M::Movupd | M::Movdqu => (16, 1),
        _ if size == 16 => (16, 16),
        _ => (size.max(1), 1),
    }
}

/// An address for an access of `size` bytes with some room on both sides where it is good.
fn target(rng: &mut Rng, aim: Aim, size: u64, align: u64) -> u64 {
    const ROOM: u64 = 1024;
    let good = machine::WINDOW + ROOM + rng.below(machine::WINDOW_BYTES - 2 * ROOM - size);
    match aim {
        Aim::Good => good & !(align - 1),
        Aim::Unaligned if rng.one_in(2) => machine::WINDOW + 0x2000 - rng.below(size + 1),
        Aim::Unaligned => good,
        Aim::Crossing => machine::WINDOW + machine::WINDOW_BYTES - (size / 2).max(1),
        Aim::Unmapped if rng.one_in(2) => (machine::WINDOW - 0x1000 + rng.below(0x800)) & !(align - 1),
        Aim::Unmapped => (0x4000_0000 + rng.below(0x1000_0000)) & !(align - 1),
        Aim::ReadOnly => (machine::READ_ONLY + 1024 + rng.below(512)) & !(align - 1),
        Aim::Supervisor => (machine::SUPERVISOR + 1024 + rng.below(512)) & !(align - 1),
        Aim::NonCanonical => (rng.pick(&[0x8000_0000_0000_0000, 0x0000_8000_0000_0000]) + rng.below(0x1000)) & !15,
    }
}

fn implicit(rng: &mut Rng, built: &mut Built, index: u32, kind: K, aim: Aim) {
    let short = rng.one_in(4) && aim != Aim::NonCanonical;
    // Which of two bad operands faults first is the processor's choice: CMPS gets one.
    let second_of_two = built.insn.code().mnemonic() != Mnemonic::Movsb && index == 1;
    let aim = if second_of_two && built.insn.op0_kind() != OpKind::Register { Aim::Good } else { aim };
    // The count below stays under 16, so strings stay in the room around the target.
    let address = target(rng, aim, 16, 1);
    let (op_kind, register) = match (kind, short) {
        (K::seg_rSI, false) => (OpKind::MemorySegRSI, Register::RSI),
        (K::seg_rSI, true) => (OpKind::MemorySegESI, Register::RSI),
        (K::es_rDI, false) => (OpKind::MemoryESRDI, Register::RDI),
        (K::es_rDI, true) => (OpKind::MemoryESEDI, Register::RDI),
        (_, false) => (OpKind::MemorySegRDI, Register::RDI),
        (_, true) => (OpKind::MemorySegEDI, Register::RDI),
    };
    // CMPS and MOVS have two: both of one address size.
    let other = (0..index).map(|index| built.insn.op_kind(index)).find(|kind| *kind != OpKind::Register);
    let op_kind = match (other, op_kind) {
        (Some(OpKind::MemorySegRSI | OpKind::MemoryESRDI), OpKind::MemorySegESI) => OpKind::MemorySegRSI,
        (Some(OpKind::MemorySegRSI | OpKind::MemoryESRDI), OpKind::MemoryESEDI) => OpKind::MemoryESRDI,
        (Some(OpKind::MemorySegESI | OpKind::MemoryESEDI), OpKind::MemorySegRSI) => OpKind::MemorySegESI,
        (Some(OpKind::MemorySegESI | OpKind::MemoryESEDI), OpKind::MemoryESRDI) => OpKind::MemoryESEDI,
        (_, op_kind) => op_kind,
    };
    built.insn.set_op_kind(index, op_kind);
    built.setup.push(load(register, address));
    let info = built.insn.code().op_code();
    if index + 1 == info.op_count() || matches!(kind, K::seg_rDI) {
        let repeat = rng.below(3);
        if info.can_use_rep_prefix() && repeat == 1 {
            built.insn.set_has_rep_prefix(true);
        } else if info.can_use_repne_prefix() && repeat == 2 {
            built.insn.set_has_repne_prefix(true);
        }
        if repeat != 0 {
            built.setup.push(load(Register::RCX, rng.below(16)));
        }
    }
}

/// An explicit memory operand in one of the addressing modes.
fn memory(rng: &mut Rng, built: &mut Built, index: u32, aim: Aim) {
    let code = built.insn.code();
    let (size, align) = extent(code);
    let address = target(rng, aim, size, align);
    built.address = address;
    let insn = &mut built.insn;
    insn.set_op_kind(index, OpKind::Memory);
    let segment = if aim == Aim::NonCanonical { 0 } else { rng.below(24) };
    let (prefix, segment_base) = match segment {
        1 => (Register::FS, machine::FS_BASE),
        2 => (Register::GS, machine::GS_BASE),
        _ => (Register::None, 0),
    };
    insn.set_segment_prefix(prefix);
    let mut offset = address.wrapping_sub(segment_base);
    let low = u32::try_from(offset).is_ok();
    match rng.below(8) {
        0 if low && segment_base == 0 => {
            insn.set_memory_base(Register::RIP);
            insn.set_memory_displ_size(8);
            insn.set_memory_displacement64(offset);
        }
        1 if low => {
            insn.set_memory_displ_size(4);
            insn.set_memory_displacement64(offset);
        }
        2 if low => {
            // A 32-bit address: the upper half of the base does not matter.
            let base = rng.gpr64(false);
            insn.set_memory_base(base.full_register32());
            built.setup.push(load(base, offset | rng.next() << 32));
        }
        mode => {
            let base = rng.gpr64(false);
            insn.set_memory_base(base);
            if mode >= 5 {
                let mut register = rng.gpr64(false);
                while register == base {
                    register = rng.gpr64(false);
                }
                let (scale, value) = (1 << rng.below(4), rng.below(0x1_0000) as i64 - 0x8000);
                insn.set_memory_index(register);
                insn.set_memory_index_scale(scale);
                built.setup.push(load(register, value as u64));
                offset = offset.wrapping_sub((value * i64::from(scale)) as u64);
            }
            let displacement = match rng.below(3) {
                0 => 0,
                1 => rng.below(256) as i64 - 128,
                _ => i64::from(rng.next() as i32),
            };
            if displacement != 0 {
                insn.set_memory_displ_size(if i8::try_from(displacement).is_ok() { 1 } else { 8 });
                insn.set_memory_displacement64(displacement as u64);
            }
            built.setup.push(load(base, offset.wrapping_sub(displacement as u64)));
        }
    }
}
