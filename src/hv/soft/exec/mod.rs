//! The general executor: every instruction, plainly, from its decoded form.
//!
//! It is the reference that the specialised handlers of the fast path are an optimisation of, and it runs whatever
//! they do not cover. An instruction either completes or leaves the state as it was. What the processor does
//! not advertise has no executor and is #UD, as on silicon.

mod alu;
mod bits;
mod control;
mod decimal;
mod far;
mod flow;
mod interrupt;
mod io;
mod legacy_interrupt;
mod moves;
mod msr;
mod muldiv;
mod segment;
mod shift;
mod stack;
mod state;
mod string;
mod system_segment;
#[cfg(all(test, target_os = "linux", target_arch = "x86_64"))]
mod tests;
mod validate;

use iced_x86::{Code, Instruction, Mnemonic, Register};

use super::cpu::Cpu;
use super::fault::{Flow, Stop};
use super::flags::Flags;
use super::operand::operand_bits;

pub(super) use interrupt::{Shutdown, Source};

/// Executes one instruction. `Cpu::rip` is already that of the next one; a branch replaces it.
pub(super) type Executor = fn(&mut Cpu, &Instruction) -> Result<Flow, Stop>;

/// The executor of a decoded instruction; `None` is #UD.
pub(super) fn executor(insn: &Instruction) -> Option<Executor> {
    general(insn).or_else(|| system(insn)).or_else(|| super::fpu::executor(insn))
}

/// Instructions of any privilege level.
fn general(insn: &Instruction) -> Option<Executor> {
    // String forms share their mnemonic with SSE2's.
    match insn.code() {
        Code::Movsd_m32_m32 => return Some(string::movs),
        Code::Cmpsd_m32_m32 => return Some(string::cmps),
        _ => {}
    }
    if insn.is_jcc_short_or_near() {
        return Some(flow::jcc);
    }
    let executor: Executor = match insn.mnemonic() {
        Mnemonic::Add => alu::add,
        Mnemonic::Adc => alu::adc,
        Mnemonic::Sub => alu::sub,
        Mnemonic::Sbb => alu::sbb,
        Mnemonic::And => alu::and,
        Mnemonic::Or => alu::or,
        Mnemonic::Xor => alu::xor,
        Mnemonic::Cmp => alu::cmp,
        Mnemonic::Test => alu::test,
        Mnemonic::Inc => alu::inc,
        Mnemonic::Dec => alu::dec,
        Mnemonic::Neg => alu::neg,
        Mnemonic::Not => alu::not,
        Mnemonic::Shl | Mnemonic::Sal => shift::shl,
        Mnemonic::Shr => shift::shr,
        Mnemonic::Sar => shift::sar,
        Mnemonic::Rol => shift::rol,
        Mnemonic::Ror => shift::ror,
        Mnemonic::Rcl => shift::rcl,
        Mnemonic::Rcr => shift::rcr,
        Mnemonic::Shld => shift::shld,
        Mnemonic::Shrd => shift::shrd,
        Mnemonic::Mul => muldiv::mul,
        Mnemonic::Imul => muldiv::imul,
        Mnemonic::Div => muldiv::div,
        Mnemonic::Idiv => muldiv::idiv,
        Mnemonic::Bt => bits::bt,
        Mnemonic::Bts => bits::bts,
        Mnemonic::Btr => bits::btr,
        Mnemonic::Btc => bits::btc,
        // Without BMI1 and LZCNT in CPUID, the prefix that makes the newer instructions is ignored.
        Mnemonic::Bsf | Mnemonic::Tzcnt => bits::bsf,
        Mnemonic::Bsr | Mnemonic::Lzcnt => bits::bsr,
        Mnemonic::Bswap => bits::bswap,
        Mnemonic::Mov => return mov(insn),
        Mnemonic::Movnti => moves::mov,
        Mnemonic::Movzx => moves::movzx,
        Mnemonic::Movsx | Mnemonic::Movsxd => moves::movsx,
        Mnemonic::Lea => moves::lea,
        Mnemonic::Xchg => moves::xchg,
        Mnemonic::Xadd => moves::xadd,
        Mnemonic::Cmpxchg => moves::cmpxchg,
        Mnemonic::Cmpxchg8b => moves::cmpxchg8b,
        Mnemonic::Cmpxchg16b => moves::cmpxchg16b,
        Mnemonic::Cbw | Mnemonic::Cwde | Mnemonic::Cdqe => moves::extend_accumulator,
        Mnemonic::Cwd | Mnemonic::Cdq | Mnemonic::Cqo => moves::sign_to_rdx,
        Mnemonic::Xlatb => moves::xlat,
        Mnemonic::Lahf => moves::lahf,
        Mnemonic::Sahf => moves::sahf,
        Mnemonic::Push => stack::push,
        Mnemonic::Pop => return pop(insn),
        Mnemonic::Pushf | Mnemonic::Pushfd | Mnemonic::Pushfq => stack::pushf,
        Mnemonic::Popf | Mnemonic::Popfd | Mnemonic::Popfq => stack::popf,
        Mnemonic::Pusha | Mnemonic::Pushad => stack::pusha,
        Mnemonic::Popa | Mnemonic::Popad => stack::popa,
        Mnemonic::Enter => stack::enter,
        Mnemonic::Leave => stack::leave,
        Mnemonic::Jmp if insn.is_jmp_far_indirect() || insn.is_jmp_far() => far::jmp,
        Mnemonic::Jmp => flow::jmp,
        Mnemonic::Call if insn.is_call_far_indirect() || insn.is_call_far() => far::call,
        Mnemonic::Call => flow::call,
        Mnemonic::Ret => flow::ret,
        Mnemonic::Retf => far::ret,
        Mnemonic::Loop | Mnemonic::Loope | Mnemonic::Loopne => flow::loops,
        Mnemonic::Jrcxz | Mnemonic::Jecxz | Mnemonic::Jcxz => flow::jrcxz,
        Mnemonic::Int3 | Mnemonic::Int | Mnemonic::Int1 | Mnemonic::Into => flow::int,
        Mnemonic::Bound => flow::bound,
        Mnemonic::Iret | Mnemonic::Iretd | Mnemonic::Iretq => far::iret,
        Mnemonic::Syscall => flow::syscall,
        Mnemonic::Nop
        | Mnemonic::Reservednop
        | Mnemonic::Endbr64
        | Mnemonic::Endbr32
        // Loads are done in order, and so are stores.
        | Mnemonic::Lfence
        | Mnemonic::Sfence
        | Mnemonic::Prefetch
        | Mnemonic::Prefetchw
        | Mnemonic::Prefetchnta
        | Mnemonic::Prefetcht0
        | Mnemonic::Prefetcht1
        | Mnemonic::Prefetcht2
        | Mnemonic::Prefetchwt1
        | Mnemonic::Prefetchit0
        | Mnemonic::Prefetchit1
        // Hints and shadow-stack reads in the space of reserved no-operations, which they are here.
        | Mnemonic::Cldemote
        | Mnemonic::Rdsspd
        | Mnemonic::Rdsspq => flow::nop,
        Mnemonic::Mfence => flow::mfence,
        Mnemonic::Pause => flow::pause,
        Mnemonic::Clflush => control::clflush,
        Mnemonic::Movsb | Mnemonic::Movsw | Mnemonic::Movsq => string::movs,
        Mnemonic::Stosb | Mnemonic::Stosw | Mnemonic::Stosd | Mnemonic::Stosq => string::stos,
        Mnemonic::Lodsb | Mnemonic::Lodsw | Mnemonic::Lodsd | Mnemonic::Lodsq => string::lods,
        Mnemonic::Scasb | Mnemonic::Scasw | Mnemonic::Scasd | Mnemonic::Scasq => string::scas,
        Mnemonic::Cmpsb | Mnemonic::Cmpsw | Mnemonic::Cmpsq => string::cmps,
        Mnemonic::Insb | Mnemonic::Insw | Mnemonic::Insd => string::ins,
        Mnemonic::Outsb | Mnemonic::Outsw | Mnemonic::Outsd => string::outs,
        Mnemonic::In => io::input,
        Mnemonic::Out => io::output,
        Mnemonic::Cld => control::cld,
        Mnemonic::Std => control::std,
        Mnemonic::Clc => control::clc,
        Mnemonic::Stc => control::stc,
        Mnemonic::Cmc => control::cmc,
        Mnemonic::Lds | Mnemonic::Les | Mnemonic::Lfs | Mnemonic::Lgs | Mnemonic::Lss => segment::load_pointer,
        Mnemonic::Aaa => decimal::aaa,
        Mnemonic::Aas => decimal::aas,
        Mnemonic::Daa => decimal::daa,
        Mnemonic::Das => decimal::das,
        Mnemonic::Aam => decimal::aam,
        Mnemonic::Aad => decimal::aad,
        Mnemonic::Salc => decimal::salc,
        mnemonic => return conditional(mnemonic),
    };
    Some(executor)
}

/// SETcc and CMOVcc.
fn conditional(mnemonic: Mnemonic) -> Option<Executor> {
    use Mnemonic as M;
    Some(match mnemonic {
        M::Seto | M::Setno | M::Setb | M::Setae | M::Sete | M::Setne | M::Setbe | M::Seta => moves::setcc,
        M::Sets | M::Setns | M::Setp | M::Setnp | M::Setl | M::Setge | M::Setle | M::Setg => moves::setcc,
        M::Cmovo | M::Cmovno | M::Cmovb | M::Cmovae | M::Cmove | M::Cmovne | M::Cmovbe | M::Cmova => moves::cmovcc,
        M::Cmovs | M::Cmovns | M::Cmovp | M::Cmovnp | M::Cmovl | M::Cmovge | M::Cmovle | M::Cmovg => moves::cmovcc,
        _ => return None,
    })
}

/// Instructions that set up or look at the machine.
fn system(insn: &Instruction) -> Option<Executor> {
    Some(match insn.mnemonic() {
        Mnemonic::Cli => control::cli,
        Mnemonic::Sti => control::sti,
        Mnemonic::Hlt => control::hlt,
        Mnemonic::Sysret | Mnemonic::Sysretq => flow::sysret,
        Mnemonic::Swapgs => control::swapgs,
        Mnemonic::Lmsw => control::lmsw,
        Mnemonic::Smsw => control::smsw,
        Mnemonic::Clts => control::clts,
        Mnemonic::Invlpg => control::invlpg,
        Mnemonic::Invd | Mnemonic::Wbinvd | Mnemonic::Wbnoinvd => control::wbinvd,
        Mnemonic::Cpuid => control::cpuid,
        Mnemonic::Rdtsc => control::rdtsc,
        Mnemonic::Rdtscp => control::rdtscp,
        Mnemonic::Rdpmc => control::rdpmc,
        Mnemonic::Rdmsr => msr::rdmsr,
        Mnemonic::Wrmsr => msr::wrmsr,
        Mnemonic::Lgdt => system_segment::lgdt,
        Mnemonic::Lidt => system_segment::lidt,
        Mnemonic::Sgdt => system_segment::sgdt,
        Mnemonic::Sidt => system_segment::sidt,
        Mnemonic::Lldt => system_segment::lldt,
        Mnemonic::Sldt => system_segment::sldt,
        Mnemonic::Ltr => system_segment::ltr,
        Mnemonic::Str => system_segment::str,
        Mnemonic::Verr => system_segment::verr,
        Mnemonic::Verw => system_segment::verw,
        Mnemonic::Lar => system_segment::lar,
        Mnemonic::Lsl => system_segment::lsl,
        Mnemonic::Arpl => system_segment::arpl,
        _ => return None,
    })
}

/// MOV is many instructions under one name.
fn mov(insn: &Instruction) -> Option<Executor> {
    let (to, from) = (insn.op0_register(), insn.op1_register());
    Some(if to.is_segment_register() {
        // There is no moving to CS.
        if to == Register::CS {
            return None;
        }
        segment::mov_to
    } else if from.is_segment_register() {
        segment::mov_from
    } else if to.is_cr() || from.is_cr() {
        control::control_register(insn)?
    } else if to.is_dr() || from.is_dr() {
        control::mov_dr
    } else {
        moves::mov
    })
}

fn pop(insn: &Instruction) -> Option<Executor> {
    Some(if insn.op0_register().is_segment_register() { segment::pop } else { stack::pop })
}

impl Cpu {
    /// The read-modify-write that all instructions with a memory destination go through: the flags take effect
    /// only when the result is written.
    fn modify(&mut self, insn: &Instruction, operation: impl Fn(&mut Flags, u64, u32) -> u64) -> Result<Flow, Stop> {
        let (bits, before) = (operand_bits(insn, 0), self.flags);
        let mut flags = before;
        if insn.has_lock_prefix() {
            self.update_operand(insn, |value| {
                flags = before;
                operation(&mut flags, value, bits)
            })?;
        } else {
            let value = self.operand_for_write(insn, 0)?;
            let result = operation(&mut flags, value, bits);
            self.set_operand(insn, 0, result)?;
        }
        self.flags = flags;
        Ok(Flow::Next)
    }
}

/// A mask of `bits` one bits.
const fn mask(bits: u32) -> u64 {
    u64::MAX >> (64 - bits)
}
