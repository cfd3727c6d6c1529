//! Straight-line programs of random instructions, and the state they begin in.

use iced_x86::{Code, Encoder, Instruction, MemoryOperand, Mnemonic, OpCodeOperandKind, OpKind, Register, RflagsBits};
use kiln::hv::state::x86_64::Fpu;

use crate::forms::{self, Form};
use crate::machine;
use crate::operands::{self, Aim, Built, load};
use crate::rng::Rng;

/// Arithmetic flags and DF: what a sequence may begin with and POPF may load.
const FLAGS: u64 = 0xcd5;

/// A program at [`machine::CODE`]; it ends in INT3 wherever it is cut.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sequence {
    pub(crate) bytes: Vec<u8>,
    /// Offset of every instruction, in order of address.
    pub(crate) starts: Vec<usize>,
}

impl Sequence {
    /// The program with everything from instruction `count` on cut off.
    pub(crate) fn prefix(&self, count: usize) -> Self {
        let end = self.starts.get(count).copied().unwrap_or(self.bytes.len());
        Self { bytes: self.bytes[..end].to_vec(), starts: self.starts[..count.min(self.starts.len())].to_vec() }
    }

    /// How many instructions begin before `rip`.
    pub(crate) fn executed(&self, rip: u64) -> u64 {
        let offset = rip.wrapping_sub(machine::CODE) as usize;
        self.starts.partition_point(|start| *start < offset) as u64
    }
}

/// The registers a sequence begins with.
#[derive(Clone, Debug)]
pub(crate) struct Start {
    pub(crate) gpr: [u64; 16],
    pub(crate) rflags: u64,
    pub(crate) fpu: Fpu,
    /// Seed of the memory's content.
    pub(crate) memory: u64,
}

impl Start {
    /// Random registers; floating-point exceptions are unmasked only when `unmasked`.
    pub(crate) fn random(rng: &mut Rng, unmasked: bool) -> Self {
        let mut gpr: [u64; 16] = std::array::from_fn(|_| rng.integer());
        gpr[4] = stack(rng);
        let mut fpu = Fpu::default();
        let masks = |rng: &mut Rng| if unmasked { rng.next() as u16 & 0x3f } else { 0x3f };
        let control = masks(rng) | (rng.below(4) as u16) << 8 | (rng.below(4) as u16) << 10;
        fpu.fcw = if rng.one_in(2) { 0x37f } else { control | 0x40 };
        let top = rng.below(8) as u16;
        // No pending exception to begin with: it would be the only thing such a sequence tests.
        let pending = rng.next() as u16 & 0x47 & if unmasked { 0 } else { 0xffff };
        fpu.fsw = top << 11 | pending & 0x47 & !0x80 | (rng.next() as u16 & 0x4700);
        fpu.ftw = rng.pick(&[0xff, 0xff, 0, 0x0f, 0xc3, rng.clone().next() as u8]);
        fpu.st = std::array::from_fn(|_| rng.extended());
        let sse_masks = u32::from(masks(rng)) << 7;
        fpu.mxcsr = if rng.one_in(2) {
            0x1f80
        } else {
            sse_masks
                | rng.next() as u32 & 0x8040
                | (rng.below(4) as u32) << 13
                | rng.next() as u32 & 0x3f & if unmasked { 0 } else { 0x3f }
        };
        fpu.xmm = std::array::from_fn(|_| [rng.quad(), rng.quad()]);
        Self { gpr, rflags: rng.next() & FLAGS | 0x202, fpu, memory: rng.next() }
    }
}

impl Start {
    /// With the x87 state in MMX form already.
    pub(crate) fn in_mmx_form(mut self) -> Self {
        self.fpu.fsw &= !0x3800;
        self.fpu.ftw = 0xff;
        self
    }
}

/// An address in the middle of the user stack.
fn stack(rng: &mut Rng) -> u64 {
    machine::STACK + 0xc00 + rng.below(0x80) * 8
}

/// Lays instructions one after another.
#[allow(missing_debug_implementations, reason = "iced's encoder has none")]
pub(crate) struct Builder {
    encoder: Encoder,
    sequence: Sequence,
    /// Whether flags that the manual leaves undefined are made zero after the instruction.
    neutralise: bool,
}

impl Builder {
    pub(crate) fn new(neutralise: bool) -> Self {
        Self { encoder: Encoder::new(64), sequence: Sequence::default(), neutralise }
    }

    pub(crate) fn finish(self) -> Sequence {
        self.sequence
    }

    pub(crate) fn has_room(&self) -> bool {
        (self.sequence.bytes.len() as u64) < machine::CODE_BYTES - 512
    }

    /// Appends a random instance of `form` with what it needs around it; false when the draw had no encoding.
    pub(crate) fn form(&mut self, rng: &mut Rng, form: Form, aim: Aim) -> bool {
        let code = form.code;
        if is_branch(code) {
            return self.branch(rng, code);
        }
        let Some(mut built) = operands::build(rng, code, aim) else { return false };
        specialise(rng, &mut built, aim);
        let mut before = Vec::new();
        if forms::uses_stack(code) {
            before.push(load(Register::RSP, stack(rng)));
        }
        before.append(&mut built.setup);
        let rollback = self.sequence.clone();
        for (n, insn) in before.iter().chain([&built.insn]).enumerate() {
            // What sets an image up belongs to what loads it: in between it holds what vendors do differently.
            let done = if n == 0 || !forms::moves_image(code) { self.emit(insn) } else { self.attach(insn) };
            if !done {
                self.sequence = rollback;
                return false;
            }
        }
        for insn in after(&built) {
            assert!(self.attach(&insn), "{insn:?} encodes");
        }
        if forms::leaves_condition_codes(code) {
            self.attach(&Instruction::with(Code::Fxam));
        }
        self.neutralise(rng, &built.insn);
        true
    }

    fn here(&self) -> u64 {
        machine::CODE + self.sequence.bytes.len() as u64
    }

    fn encode(&mut self, insn: &Instruction, at: u64) -> Option<Vec<u8>> {
        let encoded = self.encoder.encode(insn, at).is_ok();
        let bytes = self.encoder.take_buffer();
        (encoded && bytes.len() <= 15).then_some(bytes)
    }

    fn emit(&mut self, insn: &Instruction) -> bool {
        let start = self.sequence.bytes.len();
        let done = self.attach(insn);
        if done {
            self.sequence.starts.push(start);
        }
        done
    }

    /// Appends an instruction that belongs to the one before: a sequence is not cut between them.
    fn attach(&mut self, insn: &Instruction) -> bool {
        let Some(bytes) = self.encode(insn, self.here()) else { return false };
        self.sequence.bytes.extend(bytes);
        true
    }

    /// Makes zero the flags that `insn` leaves undefined and that vendors do not agree about.
    fn neutralise(&mut self, rng: &mut Rng, insn: &Instruction) {
        let undefined = undefined_flags(insn);
        if undefined == 0 || !self.neutralise {
            return;
        }
        let at_rsp = MemoryOperand::with_base(Register::RSP);
        let keep = !(undefined as i32);
        for insn in [
            load(Register::RSP, stack(rng)),
            Instruction::with(Code::Pushfq),
            Instruction::with2(Code::And_rm64_imm32, at_rsp, keep).expect("and [rsp] encodes"),
            Instruction::with(Code::Popfq),
        ] {
            self.attach(&insn);
        }
    }

    /// A branch forward over one harmless instruction, taken or not.
    fn branch(&mut self, rng: &mut Rng, code: Code) -> bool {
        let filler = Instruction::with2(
            Code::Lea_r64_m,
            rng.gpr64(false),
            MemoryOperand::with_base_displ(rng.gpr64(false), rng.below(100) as i64 + 1),
        )
        .expect("lea encodes");
        let filler = self.encode(&filler, 0).expect("lea encodes");
        let rollback = self.sequence.clone();
        if forms::uses_stack(code) || code.mnemonic() == Mnemonic::Ret {
            self.emit(&load(Register::RSP, stack(rng)));
        }
        if matches!(
            code.mnemonic(),
            Mnemonic::Loop | Mnemonic::Loope | Mnemonic::Loopne | Mnemonic::Jrcxz | Mnemonic::Jecxz
        ) {
            let count = if rng.one_in(2) { rng.below(3) } else { rng.integer() };
            self.emit(&load(Register::RCX, count));
        }
        // The target depends on the branch's length, which does not depend on the target.
        let mut target = self.here() + 64;
        for attempt in 0..2 {
            let start = self.sequence.clone();
            let Some(insn) = self.transfer(code, target) else {
                self.sequence = rollback;
                return false;
            };
            if !self.emit(&insn) {
                self.sequence = rollback;
                return false;
            }
            if attempt == 0 {
                target = self.here() + filler.len() as u64;
                self.sequence = start;
            }
        }
        // Not an instruction of its own: when the branch is taken it does not run, and must not be counted.
        self.sequence.bytes.extend(filler);
        true
    }

    /// The branch itself, with the target put where it looks for it.
    fn transfer(&mut self, code: Code, target: u64) -> Option<Instruction> {
        let info = code.op_code();
        if code.mnemonic() == Mnemonic::Ret {
            // Pushed as a sign-extended immediate: targets are small.
            self.emit(&Instruction::with1(Code::Pushq_imm32, target as i32).ok()?);
            return if info.op_count() == 0 {
                Some(Instruction::with(code))
            } else {
                Instruction::with1(code, 16u32).ok()
            };
        }
        if info.op_kind(0) == OpCodeOperandKind::r64_or_mem {
            // Register or memory, chosen by the address so that both attempts agree.
            let in_memory = self.sequence.bytes.len().is_multiple_of(2);
            if !in_memory {
                let register = Register::RAX;
                self.emit(&load(register, target));
                return Instruction::with1(code, register).ok();
            }
            let slot = MemoryOperand::with_displ(machine::WINDOW + 0x800, 4);
            self.emit(&Instruction::with2(Code::Mov_rm64_imm32, slot, target as i32).ok()?);
            return Instruction::with1(code, slot).ok();
        }
        Instruction::with_branch(code, target).ok()
    }
}

fn is_branch(code: Code) -> bool {
    let info = code.op_code();
    use OpCodeOperandKind as K;
    matches!(info.op_kinds().first(), Some(K::br32_1 | K::br64_1 | K::br32_4 | K::br64_4))
        || matches!(code.mnemonic(), Mnemonic::Jmp | Mnemonic::Call | Mnemonic::Ret)
}

/// Gives registers the values without which an instruction would mostly fault, or run for long.
fn specialise(rng: &mut Rng, built: &mut Built, aim: Aim) {
    use Mnemonic as M;
    let code = built.insn.code();
    let memory = (0..built.insn.op_count()).any(|index| built.insn.op_kind(index) == OpKind::Memory);
    let at = memory_operand(&built.insn);
    let mut first = Vec::new();
    match code.mnemonic() {
        M::Div => first.push(load(Register::RDX, rng.below(4))),
        M::Idiv if rng.one_in(4) => first.push(load(Register::RDX, rng.pick(&[0, u64::MAX]))),
        M::Idiv => match code.op_code().operand_size() {
            64 => first.push(Instruction::with(Code::Cqo)),
            32 => first.push(Instruction::with(Code::Cdq)),
            16 => first.push(Instruction::with(Code::Cwd)),
            _ => {}
        },
        // A bit number reaches far beyond the operand.
        M::Bt | M::Bts | M::Btr | M::Btc if memory && built.insn.op_kind(1) == OpKind::Register => {
            let register = built.insn.op_register(1);
            if register.full_register() == built.insn.memory_base().full_register()
                || register.full_register() == built.insn.memory_index().full_register()
            {
                built.insn.set_memory_index(Register::None);
                built.insn.set_memory_base(Register::None);
                built.insn.set_segment_prefix(Register::None);
                built.insn.set_memory_displ_size(4);
                built.insn.set_memory_displacement64(built.address & 0x7fff_ffff);
            }
            built.setup.push(load(register, (rng.below(8000) as i64 - 4000) as u64));
        }
        // Beyond the operand's size the result is undefined.
        M::Shld | M::Shrd if code.op_code().operand_size() == 16 => {
            if built.insn.op_kind(2) == OpKind::Register {
                built.setup.push(load(Register::RCX, rng.below(17) | rng.next() << 8));
                avoid_rcx(built);
            } else {
                built.insn.set_immediate8(rng.below(17) as u8);
            }
        }
        M::Enter => {
            built.setup.push(load(Register::RBP, stack(rng)));
            built.insn.set_immediate16(rng.below(256) as u16);
            if code.op_code().operand_size() == 16 {
                built.insn.set_immediate8_2nd(rng.below(2) as u8);
            }
        }
        M::Leave => built.setup.push(load(Register::RBP, stack(rng))),
        M::Popf | M::Popfq | M::Popfd => {
            let flags = (rng.next() & FLAGS | 2) as i32;
            let at_rsp = MemoryOperand::with_base(Register::RSP);
            built.setup.push(Instruction::with2(Code::Mov_rm64_imm32, at_rsp, flags).expect("mov [rsp] encodes"));
        }
        M::Cmpxchg if rng.one_in(2) && (!memory || aim == Aim::Good) => equal_accumulator(built),
        M::Fldcw if memory && aim == Aim::Good => {
            let control = (rng.below(16) as i32) << 8 | 0x37f & 0xff;
            built.setup.push(Instruction::with2(Code::Mov_rm16_imm16, at, control).expect("mov encodes"));
        }
        M::Ldmxcsr if memory && aim == Aim::Good => {
            let control = 0x1f80 | (rng.next() as i32 & 0xe07f & 0xffff);
            built.setup.push(Instruction::with2(Code::Mov_rm32_imm32, at, control).expect("mov encodes"));
        }
        // An image that the processor has written itself.
        M::Fxrstor => built.setup.push(Instruction::with1(Code::Fxsave_m512byte, at).expect("fxsave encodes")),
        M::Fxrstor64 => built.setup.push(Instruction::with1(Code::Fxsave64_m512byte, at).expect("fxsave encodes")),
        M::Fldenv | M::Frstor => {
            let save = match code {
                Code::Fldenv_m14byte => Code::Fnstenv_m14byte,
                Code::Fldenv_m28byte => Code::Fnstenv_m28byte,
                Code::Frstor_m94byte => Code::Fnsave_m94byte,
                _ => Code::Fnsave_m108byte,
            };
            built.setup.push(Instruction::with1(save, at).expect("the save encodes"));
        }
        _ => {}
    }
    if code.op_code().can_use_lock_prefix() && built.insn.op0_kind() == OpKind::Memory && rng.one_in(3) {
        built.insn.set_has_lock_prefix(true);
    }
    first.append(&mut built.setup);
    built.setup = first;
}

/// Moves RCX out of the memory operand, so that it can be the count.
fn avoid_rcx(built: &mut Built) {
    let uses = |register: Register| register.full_register() == Register::RCX;
    if uses(built.insn.memory_base()) || uses(built.insn.memory_index()) {
        built.insn.set_memory_index(Register::None);
        built.insn.set_memory_base(Register::None);
        built.insn.set_segment_prefix(Register::None);
        built.insn.set_memory_displ_size(4);
        built.insn.set_memory_displacement64(built.address & 0x7fff_ffff);
    }
}

/// Loads the accumulator from the destination, so that a compare-and-exchange exchanges.
fn equal_accumulator(built: &mut Built) {
    let insn = &built.insn;
    let is_rax = |register: Register| register.full_register() == Register::RAX;
    if is_rax(insn.memory_base()) || is_rax(insn.memory_index()) {
        return;
    }
    let (bits, to) = match insn.code() {
        Code::Cmpxchg_rm8_r8 => (Code::Mov_r8_rm8, Register::AL),
        Code::Cmpxchg_rm16_r16 => (Code::Mov_r16_rm16, Register::AX),
        Code::Cmpxchg_rm32_r32 => (Code::Mov_r32_rm32, Register::EAX),
        _ => (Code::Mov_r64_rm64, Register::RAX),
    };
    let copied = if insn.op0_kind() == OpKind::Memory {
        Instruction::with2(bits, to, memory_operand(insn))
    } else {
        Instruction::with2(bits, to, insn.op0_register())
    };
    built.setup.extend(copied);
}

fn memory_operand(insn: &Instruction) -> MemoryOperand {
    MemoryOperand::new(
        insn.memory_base(),
        insn.memory_index(),
        insn.memory_index_scale(),
        insn.memory_displacement64() as i64,
        insn.memory_displ_size(),
        false,
        insn.segment_prefix(),
    )
}

/// Overwrites what a saved image says about the last x87 instruction (vendors save it under different conditions) and
/// about what else MXCSR could hold.
fn after(built: &Built) -> Vec<Instruction> {
    use Mnemonic as M;
    let saves: &[u64] = match built.insn.mnemonic() {
        M::Fxsave | M::Fxsave64 | M::Fxrstor | M::Fxrstor64 => &[6, 8, 12, 16, 20, 28, 30],
        M::Fnstenv | M::Fstenv | M::Fnsave | M::Fsave | M::Fldenv | M::Frstor => match built.insn.code() {
            Code::Fnstenv_m14byte
            | Code::Fstenv_m14byte
            | Code::Fnsave_m94byte
            | Code::Fsave_m94byte
            | Code::Fldenv_m14byte
            | Code::Frstor_m94byte => &[6, 8, 10, 12],
            _ => &[12, 14, 16, 18, 20, 22, 24, 26],
        },
        _ => return Vec::new(),
    };
    if u32::try_from(built.address).is_err() {
        // It faults: nothing is saved, and nothing after it runs.
        return Vec::new();
    }
    let narrow = saves[0] == 6 && saves.len() == 7;
    let clear = |offset: &u64| {
        let at = MemoryOperand::with_displ(built.address + offset, 4);
        let code = if narrow && *offset != 6 && *offset < 24 { Code::Mov_rm32_imm32 } else { Code::Mov_rm16_imm16 };
        Instruction::with2(code, at, 0).expect("mov encodes")
    };
    saves.iter().map(clear).collect()
}

/// Flags to leave out: the manual calls them undefined, and processors differ.
fn undefined_flags(insn: &Instruction) -> u64 {
    use Mnemonic as M;
    let undefined = match insn.mnemonic() {
        // Every processor since the 486 clears AF.
        M::And | M::Or | M::Xor | M::Test => 0,
        _ => insn.rflags_undefined(),
    };
    [
        (RflagsBits::CF, 0x1),
        (RflagsBits::PF, 0x4),
        (RflagsBits::AF, 0x10),
        (RflagsBits::ZF, 0x40),
        (RflagsBits::SF, 0x80),
        (RflagsBits::OF, 0x800),
    ]
    .into_iter()
    .filter(|(flag, _)| undefined & flag != 0)
    .fold(0, |all, (_, bit)| all | bit)
}
