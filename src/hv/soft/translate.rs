//! From instruction bytes to operations: decodes one block and picks each instruction's handler.

use iced_x86::{Code, FlowControl, Instruction, Mnemonic, OpKind, Register, RflagsBits};

use crate::mem::GuestRam;
use crate::units::PAGE_SIZE;

use super::cpu::slot;
use super::exec::{self, Executor};
use super::fast::alu::{self, Form};
use super::fast::branch;
use super::fast::data::{self, Source};
use super::fast::fused;
use super::fast::{Handler, Op, UNLINKED, crossing, general, sse, stack};
use super::operand::operand_bits;
use super::step::{self, MAX_LENGTH};

/// Instructions in a block: longer ones gain little, and this bounds how far a chain overruns its budget. Fits in
/// [`Op::block_length`].
const MAX_BLOCK: usize = 63;

/// A decoded block, good wherever the same bytes lie at the same place of a page.
#[derive(Clone, Copy, Debug)]
pub(super) struct Block<'a> {
    /// What it was decoded from.
    pub(super) source: &'a [u8],
    pub(super) ops: &'a [Op],
    /// Instructions for the general executor.
    pub(super) general: &'a [(Executor, Instruction)],
    /// Which operations those are: their immediates count from the block's first one.
    pub(super) general_ops: &'a [u8],
    /// Where in the page it may go on by the links of its last operation: the one in `link`, and the one in `disp`.
    pub(super) exits: Exits,
}

/// Offsets in the page.
pub(super) type Exits = [Option<u16>; 2];

impl Block<'_> {
    /// The indexes of the general executor's operations, when the first of the block's has index `start`.
    pub(super) fn general_from(&self, start: usize) -> impl Iterator<Item = usize> {
        self.general_ops.iter().map(move |op| start + usize::from(*op))
    }

    /// Whether `ram` has at `at` what it was decoded from.
    pub(super) fn is_of(&self, ram: &GuestRam, at: u64) -> bool {
        let mut bytes = [0; WINDOW];
        let bytes = bytes.get_mut(..self.source.len());
        bytes.is_some_and(|bytes| ram.read_bytes(at, bytes).is_some() && *bytes == *self.source)
    }
}

/// Bytes looked at for one block: more than all but the longest take, and cheaper to copy than a page.
const WINDOW: usize = 192;

/// The six arithmetic flags, as the instruction tables number them.
const ARITHMETIC: u32 =
    RflagsBits::OF | RflagsBits::SF | RflagsBits::ZF | RflagsBits::AF | RflagsBits::CF | RflagsBits::PF;

/// Decodes blocks; owns the scratch space that takes.
#[derive(Debug)]
pub(super) struct Translator {
    insns: Vec<Instruction>,
    ops: Vec<Op>,
    general: Vec<(Executor, Instruction)>,
    general_ops: Vec<u8>,
    window: [u8; WINDOW],
}

impl Translator {
    pub(super) fn new() -> Self {
        Self {
            insns: Vec::with_capacity(MAX_BLOCK),
            ops: Vec::with_capacity(MAX_BLOCK + 1),
            general: Vec::new(),
            general_ops: Vec::new(),
            window: [0; WINDOW],
        }
    }

    /// Decodes the block at a RAM offset.
    pub(super) fn block(&mut self, ram: &GuestRam, at: u64) -> Block<'_> {
        let start = at % PAGE_SIZE;
        let len = ((PAGE_SIZE - start) as usize).min(WINDOW);
        let _ = ram.read_bytes(at, &mut self.window[..len]);
        self.decode(len, start);
        self.drop_dead_flags();
        fuse(&self.insns, &mut self.ops);
        let end = self.insns.last().map_or(start, Instruction::next_ip);
        let count = self.insns.len().max(1) as u8;
        match self.insns.last().map(Instruction::flow_control) {
            // The very first instruction runs over the page's end, or is none at all: one step tells.
            None => self.ops.push(Op { at: start as u16, ..blank(crossing) }),
            // Cut short: runs on into the next block.
            Some(FlowControl::Next) => self.ops.push(Op { imm: end, at: end as u16, ..blank(branch::jmp) }),
            Some(_) => {}
        }
        if let Some(last) = self.ops.last_mut() {
            last.set_block_length(count);
        }
        Block {
            source: &self.window[..((end - start).max(1) as usize).min(len)],
            ops: &self.ops,
            general: &self.general,
            general_ops: &self.general_ops,
            exits: self.exits(end),
        }
    }

    /// Where the last operation may go on in the page; the block's code ends at `end`.
    fn exits(&self, end: u64) -> Exits {
        let within = |at: u64| u16::try_from(at).ok().filter(|at| u64::from(*at) < PAGE_SIZE);
        let Some(last) = self.insns.last() else { return [None; 2] };
        let general = self.general_ops.last().map(|op| usize::from(*op) + 1) == Some(self.ops.len());
        match last.flow_control() {
            FlowControl::Next => [within(end), None],
            _ if general || last.op0_kind() != OpKind::NearBranch64 => [None; 2],
            FlowControl::ConditionalBranch => [within(last.near_branch_target()), within(end)],
            _ => [within(last.near_branch_target()), None],
        }
    }

    /// Decodes up to the first branch, to what has no executor, or to the end of the window's first `len` bytes.
    fn decode(&mut self, len: usize, start: u64) {
        self.insns.clear();
        self.ops.clear();
        self.general.clear();
        self.general_ops.clear();
        let mut decoder = step::decoder(&self.window[..len], start);
        while self.insns.len() < MAX_BLOCK && decoder.can_decode() {
            let insn = decoder.decode();
            if insn.is_invalid() || insn.len() > MAX_LENGTH {
                break;
            }
            let general = self.general.len();
            let Some(op) = translate(&insn, &mut self.general) else { break };
            if self.general.len() > general {
                self.general_ops.push(self.ops.len() as u8);
            }
            self.ops.push(op);
            self.insns.push(insn);
            if insn.flow_control() != FlowControl::Next {
                break;
            }
        }
    }

    /// Replaces handlers that compute flags which nothing can see: a later instruction of the block overwrites them
    /// all, and none before it reads them, may fault or leaves the chain.
    fn drop_dead_flags(&mut self) {
        let mut needed = true;
        for (insn, op) in self.insns.iter().zip(&mut self.ops).rev() {
            let writes = insn.rflags_modified() & ARITHMETIC != 0;
            if !needed
                && writes
                && let Some(light) = pick(insn, false)
            {
                op.run = light.run;
            }
            if overwrites_flags(insn) {
                needed = false;
            }
            if insn.rflags_read() & ARITHMETIC != 0 || may_stop(insn, op) {
                needed = true;
            }
        }
    }
}

/// Whether an instruction writes all six flags, whatever its operands.
fn overwrites_flags(insn: &Instruction) -> bool {
    let mut written = insn.rflags_written() | insn.rflags_cleared() | insn.rflags_set();
    // Multiplication keeps what the manual calls undefined; a shift by CL may write nothing.
    if insn.mnemonic() != Mnemonic::Imul {
        written |= insn.rflags_undefined();
    }
    written & ARITHMETIC == ARITHMETIC && insn.op1_register() != Register::CL
}

/// Whether an instruction may fault or leave the chain, so that the flags before it can be seen.
fn may_stop(insn: &Instruction, op: &Op) -> bool {
    let has_memory = (0..insn.op_count()).any(|n| insn.op_kind(n) == OpKind::Memory);
    std::ptr::fn_addr_eq(op.run, general as Handler)
        || insn.is_stack_instruction()
        || (has_memory && insn.mnemonic() != Mnemonic::Lea)
        || insn.flow_control() != FlowControl::Next
        || insn.op_register(0).is_xmm()
        || insn.op_register(1).is_xmm()
}

fn blank(run: Handler) -> Op {
    let zero = slot::ZERO as u8;
    Op { run, imm: 0, disp: 0, link: UNLINKED, dst: zero, src: zero, base: zero, index: zero, at: 0, len: 0, misc: 0 }
}

/// The operation for an instruction: its own handler, or the general executor; `None` for what is #UD.
fn translate(insn: &Instruction, table: &mut Vec<(Executor, Instruction)>) -> Option<Op> {
    let mut op = match pick(insn, true) {
        Some(op) => op,
        None => {
            let execute = exec::executor(insn)?;
            table.push((execute, *insn));
            Op { imm: table.len() as u64 - 1, ..blank(general) }
        }
    };
    op.at = insn.ip() as u16;
    op.len = insn.len() as u8;
    Some(op)
}

/// Makes one operation of a CMP or TEST and the conditional jump that ends the block after it.
fn fuse(insns: &[Instruction], ops: &mut Vec<Op>) {
    let ([.., compare, jump], [.., first, second]) = (insns, ops.as_slice()) else { return };
    let test = compare.mnemonic() == Mnemonic::Test;
    let Some(condition) = (jump.condition_code() as usize).checked_sub(1) else { return };
    let target = jump.near_branch_target();
    let fusible = (test || compare.mnemonic() == Mnemonic::Cmp)
        && jump.is_jcc_short_or_near()
        && jump.op0_kind() == OpKind::NearBranch64
        && target < PAGE_SIZE
        && register(compare, 0).is_some()
        && !is_memory(compare, 1)
        && (compare.op_kind(1) != OpKind::Register || register(compare, 1).is_some());
    if !fusible {
        return;
    }
    let immediate = compare.op_kind(1) != OpKind::Register;
    let [base, index] = (target as u16).to_le_bytes();
    let fused = Op {
        run: fused::handler(test, immediate, operand_bits(compare, 0), condition),
        disp: UNLINKED as i32,
        base,
        index,
        len: first.len + second.len,
        ..*first
    };
    ops.truncate(ops.len() - 2);
    ops.push(fused);
}

/// The operation with a handler of its own for an instruction, if there is one.
fn pick(insn: &Instruction, flags: bool) -> Option<Op> {
    // The decoder lets LOCK stand only where it is allowed: with memory first.
    if insn.has_lock_prefix() {
        return locked(insn);
    }
    match insn.mnemonic() {
        Mnemonic::Mov => mov(insn),
        Mnemonic::Movzx => extension(insn, false),
        Mnemonic::Movsx | Mnemonic::Movsxd => extension(insn, true),
        Mnemonic::Lea => lea(insn),
        Mnemonic::Add
        | Mnemonic::Adc
        | Mnemonic::Sub
        | Mnemonic::Sbb
        | Mnemonic::Cmp
        | Mnemonic::And
        | Mnemonic::Or
        | Mnemonic::Xor
        | Mnemonic::Test
        | Mnemonic::Inc
        | Mnemonic::Dec
        | Mnemonic::Neg
        | Mnemonic::Not => arithmetic(insn, flags),
        Mnemonic::Shl | Mnemonic::Sal | Mnemonic::Shr | Mnemonic::Sar | Mnemonic::Rol | Mnemonic::Ror => {
            shift(insn, flags)
        }
        Mnemonic::Imul => imul(insn, flags),
        Mnemonic::Nop | Mnemonic::Endbr64 => Some(blank(data::nop)),
        _ => by_code(insn).or_else(|| by_condition(insn)).or_else(|| sse_move(insn)).or_else(|| sse_logic(insn)),
    }
}

/// The slot of a general register operand; the high byte registers have none.
fn register(insn: &Instruction, n: u32) -> Option<u8> {
    let register = insn.op_register(n);
    let high = matches!(register, Register::AH | Register::CH | Register::DH | Register::BH);
    (insn.op_kind(n) == OpKind::Register && register.is_gpr() && !high).then(|| register.full_register().number() as u8)
}

fn is_memory(insn: &Instruction, n: u32) -> bool {
    insn.op_kind(n) == OpKind::Memory
}

/// Resolves the memory operand into `op`; whether it has a second component.
fn memory(insn: &Instruction, op: &mut Op) -> Option<bool> {
    let (base, index) = (insn.memory_base(), insn.memory_index());
    op.base = match base {
        Register::RIP => slot::PAGE as u8,
        Register::None if index == Register::None && insn.memory_displ_size() == 4 => return None,
        Register::None => slot::ZERO as u8,
        _ if base.is_gpr64() => base.number() as u8,
        _ => return None,
    };
    op.disp = i32::try_from(insn.memory_displacement64() as i64).ok()?;
    let segment = match insn.memory_segment() {
        Register::FS => Some(slot::FS_BASE as u8),
        Register::GS => Some(slot::GS_BASE as u8),
        _ => None,
    };
    match (index, segment) {
        (Register::None, None) => Some(false),
        (Register::None, Some(base)) => {
            op.index = base;
            Some(true)
        }
        (_, None) if index.is_gpr64() => {
            op.index = index.number() as u8;
            op.misc = insn.memory_index_scale().trailing_zeros() as u8;
            Some(true)
        }
        _ => None,
    }
}

fn mov(insn: &Instruction) -> Option<Op> {
    let mut op = blank(data::nop);
    if is_memory(insn, 0) {
        let indexed = memory(insn, &mut op)?;
        match insn.op_kind(1) {
            OpKind::Register => op.src = register(insn, 1)?,
            _ => op.imm = insn.immediate(1),
        }
        op.run = data::mov_store(operand_bits(insn, 0), indexed);
        return Some(op);
    }
    op.dst = register(insn, 0)?;
    let bits = operand_bits(insn, 0);
    op.run = match insn.op_kind(1) {
        OpKind::Register => {
            op.src = register(insn, 1)?;
            data::mov_registers(bits)
        }
        OpKind::Memory => data::mov_load(bits, memory(insn, &mut op)?),
        _ => {
            op.imm = insn.immediate(1);
            data::mov_immediate(bits)
        }
    };
    Some(op)
}

fn extension(insn: &Instruction, signed: bool) -> Option<Op> {
    let mut op = blank(data::nop);
    op.dst = register(insn, 0)?;
    let source = if is_memory(insn, 1) {
        if memory(insn, &mut op)? { Source::Indexed } else { Source::Memory }
    } else {
        op.src = register(insn, 1)?;
        Source::Register
    };
    op.run = data::extend(operand_bits(insn, 1), operand_bits(insn, 0), signed, source)?;
    Some(op)
}

fn lea(insn: &Instruction) -> Option<Op> {
    if matches!(insn.memory_segment(), Register::FS | Register::GS) {
        return None;
    }
    let mut op = blank(data::nop);
    op.dst = register(insn, 0)?;
    let indexed = memory(insn, &mut op)?;
    op.run = data::lea(operand_bits(insn, 0), indexed)?;
    Some(op)
}

/// Instructions with one operand or two.
fn arithmetic(insn: &Instruction, flags: bool) -> Option<Op> {
    let mut op = blank(data::nop);
    let (mut form, mut indexed) = (Form::Rr, false);
    if is_memory(insn, 0) {
        form = Form::Mr;
        indexed = memory(insn, &mut op)?;
    } else {
        op.dst = register(insn, 0)?;
    }
    match insn.op_kind(1) {
        _ if insn.op_count() == 1 => {}
        OpKind::Register => op.src = register(insn, 1)?,
        OpKind::Memory => {
            form = Form::Rm;
            indexed = memory(insn, &mut op)?;
        }
        _ => {
            op.imm = insn.immediate(1);
            if form == Form::Rr {
                form = Form::Ri;
            }
        }
    }
    op.run = alu::handler(insn.mnemonic(), operand_bits(insn, 0), flags, form, indexed)?;
    Some(op)
}

/// Arithmetic on memory as one access.
fn locked(insn: &Instruction) -> Option<Op> {
    let mut op = blank(data::nop);
    let indexed = memory(insn, &mut op)?;
    op.run = alu::locked_handler(insn.mnemonic(), operand_bits(insn, 0), indexed)?;
    match insn.op_kind(1) {
        _ if insn.op_count() == 1 => {}
        OpKind::Register => op.src = register(insn, 1)?,
        _ => op.imm = insn.immediate(1),
    }
    Some(op)
}

fn shift(insn: &Instruction, flags: bool) -> Option<Op> {
    let mut op = blank(data::nop);
    op.dst = register(insn, 0)?;
    let bits = operand_bits(insn, 0);
    let by_cl = insn.op_kind(1) == OpKind::Register;
    if !by_cl {
        let count = insn.immediate(1) & if bits == 64 { 63 } else { 31 };
        if count == 0 {
            return None;
        }
        op.imm = count;
    }
    op.run = alu::shift_handler(insn.mnemonic(), bits, flags, by_cl)?;
    Some(op)
}

fn imul(insn: &Instruction, flags: bool) -> Option<Op> {
    let mut op = blank(data::nop);
    op.dst = register(insn, 0)?;
    if insn.op_count() == 1 {
        return None;
    }
    op.src = register(insn, 1)?;
    if insn.op_count() == 3 {
        op.imm = insn.immediate(2);
    }
    op.run = alu::imul_handler(operand_bits(insn, 0), flags, insn.op_count() == 3)?;
    Some(op)
}

fn by_code(insn: &Instruction) -> Option<Op> {
    let mut op = blank(data::nop);
    op.run = match insn.code() {
        Code::Push_r64 => {
            op.src = register(insn, 0)?;
            stack::push
        }
        Code::Pushq_imm8 | Code::Pushq_imm32 => {
            op.imm = insn.immediate(0);
            stack::push
        }
        Code::Pop_r64 => {
            op.dst = register(insn, 0)?;
            stack::pop
        }
        Code::Leaveq => stack::leave,
        Code::Jmp_rel8_64 | Code::Jmp_rel32_64 => {
            op.imm = insn.near_branch_target();
            branch::jmp
        }
        Code::Call_rel32_64 => {
            op.imm = insn.near_branch_target();
            branch::call
        }
        Code::Retnq => branch::ret,
        Code::Retnq_imm16 => {
            op.imm = insn.immediate(0);
            branch::ret
        }
        Code::Jmp_rm64 if is_memory(insn, 0) => {
            if memory(insn, &mut op)? {
                branch::jmp_memory::<true>
            } else {
                branch::jmp_memory::<false>
            }
        }
        Code::Call_rm64 if is_memory(insn, 0) => {
            if memory(insn, &mut op)? {
                branch::call_memory::<true>
            } else {
                branch::call_memory::<false>
            }
        }
        Code::Jmp_rm64 => {
            op.dst = register(insn, 0)?;
            branch::jmp_register
        }
        Code::Call_rm64 => {
            op.dst = register(insn, 0)?;
            branch::call_register
        }
        Code::Cdqe => data::cdqe,
        Code::Cqo => data::cqo,
        Code::Cdq => data::cdq,
        Code::Bswap_r32 => {
            op.dst = register(insn, 0)?;
            data::bswap32
        }
        Code::Bswap_r64 => {
            op.dst = register(insn, 0)?;
            data::bswap64
        }
        Code::Xchg_rm64_r64 | Code::Xchg_r64_RAX | Code::Xchg_rm32_r32 | Code::Xchg_r32_EAX => {
            op.dst = register(insn, 0)?;
            op.src = register(insn, 1)?;
            data::xchg(operand_bits(insn, 0))
        }
        _ => return None,
    };
    Some(op)
}

fn by_condition(insn: &Instruction) -> Option<Op> {
    // iced numbers the conditions from 1 in the order of their encoding.
    let condition = (insn.condition_code() as usize).checked_sub(1)?;
    let mut op = blank(data::nop);
    op.run = if insn.is_jcc_short_or_near() && insn.op0_kind() == OpKind::NearBranch64 {
        op.imm = insn.near_branch_target();
        op.disp = UNLINKED as i32;
        branch::JCC[condition & 15]
    } else if matches!(insn.mnemonic(), Mnemonic::Jcxz | Mnemonic::Jecxz | Mnemonic::Jrcxz) {
        return None;
    } else if insn.op_count() == 1 {
        if !operand_is_setcc(insn) {
            return None;
        }
        op.dst = register(insn, 0)?;
        data::setcc(condition)
    } else if insn.op_count() == 2 {
        op.dst = register(insn, 0)?;
        let from_memory = is_memory(insn, 1);
        if from_memory {
            memory(insn, &mut op)?;
        } else {
            op.src = register(insn, 1)?;
        }
        data::cmov(condition, operand_bits(insn, 0), from_memory)?
    } else {
        return None;
    };
    Some(op)
}

fn operand_is_setcc(insn: &Instruction) -> bool {
    // Of the instructions with a condition and one operand, only SETcc has a byte register.
    insn.op_kind(0) == OpKind::Register && insn.op_register(0).is_gpr8()
}

/// The slot of an XMM register operand.
fn xmm(insn: &Instruction, n: u32) -> Option<u8> {
    let register = insn.op_register(n);
    (insn.op_kind(n) == OpKind::Register && register.is_xmm()).then(|| register.number() as u8)
}

fn sse_move(insn: &Instruction) -> Option<Op> {
    let mut op = blank(data::nop);
    // Full-width moves: whether memory must be aligned.
    let full = match insn.mnemonic() {
        Mnemonic::Movaps | Mnemonic::Movapd | Mnemonic::Movdqa => Some(true),
        Mnemonic::Movups | Mnemonic::Movupd | Mnemonic::Movdqu => Some(false),
        _ => None,
    };
    if let Some(aligned) = full {
        op.run = match (xmm(insn, 0), xmm(insn, 1)) {
            (Some(dst), Some(src)) => {
                (op.dst, op.src) = (dst, src);
                sse::mov_registers
            }
            (Some(dst), None) => {
                op.dst = dst;
                sse::load128(aligned, memory(insn, &mut op)?)
            }
            (None, Some(src)) => {
                op.src = src;
                sse::store128(aligned, memory(insn, &mut op)?)
            }
            (None, None) => return None,
        };
        return Some(op);
    }
    op.run = match insn.code() {
        Code::Movd_xmm_rm32 | Code::Movq_xmm_rm64 if !is_memory(insn, 1) => {
            (op.dst, op.src) = (xmm(insn, 0)?, register(insn, 1)?);
            sse::general_to_xmm(operand_bits(insn, 1))
        }
        Code::Movd_rm32_xmm | Code::Movq_rm64_xmm if !is_memory(insn, 0) => {
            (op.dst, op.src) = (register(insn, 0)?, xmm(insn, 1)?);
            sse::xmm_to_general(operand_bits(insn, 0))
        }
        Code::Movd_xmm_rm32
        | Code::Movq_xmm_rm64
        | Code::Movq_xmm_xmmm64
        | Code::Movss_xmm_xmmm32
        | Code::Movsd_xmm_xmmm64
            if is_memory(insn, 1) =>
        {
            op.dst = xmm(insn, 0)?;
            sse::load_part(operand_bits(insn, 1), memory(insn, &mut op)?)
        }
        Code::Movd_rm32_xmm
        | Code::Movq_rm64_xmm
        | Code::Movq_xmmm64_xmm
        | Code::Movss_xmmm32_xmm
        | Code::Movsd_xmmm64_xmm
            if is_memory(insn, 0) =>
        {
            op.src = xmm(insn, 1)?;
            sse::store_part(operand_bits(insn, 0), memory(insn, &mut op)?)
        }
        _ => return None,
    };
    Some(op)
}

fn sse_logic(insn: &Instruction) -> Option<Op> {
    let mut op = blank(data::nop);
    let in_memory = is_memory(insn, 1);
    op.run = sse::logic(insn.mnemonic(), in_memory)?;
    op.dst = xmm(insn, 0)?;
    if in_memory {
        memory(insn, &mut op)?;
    } else {
        op.src = xmm(insn, 1)?;
    }
    Some(op)
}
