//! The pass over kernel mode: programs of system instructions under both engines, and their whole state compared.

use std::collections::BTreeMap;
use std::fmt::Write;

use kiln::hv::kvm::Kvm;
use kiln::hv::soft::Soft;
use kiln::hv::state::VcpuState;
use kiln::hv::state::x86_64::{Activity, Fpu, Lapic, Msrs, Segment, Table};
use kiln::mem::GuestRam;
use serde_json::Value;

use crate::kernel::{self, TEMPLATES, Template};
use crate::machine;
use crate::outcome;
use crate::rng::Rng;
use crate::sequence::{Sequence, Start};
use crate::soft::Machine;

/// Programs of each kind.
const EACH: u64 = 300;

/// What became of the programs of one kind.
#[derive(Clone, Copy, Debug, Default)]
struct Tally {
    compared: u64,
    lacking: u64,
    differing: u64,
}

/// Compares `each` programs of every kind that `wanted` names; how many kinds differ.
pub(crate) fn compare(seed: u64, wanted: &[String]) -> Result<usize, String> {
    let kvm = match Kvm::new() {
        Ok(kvm) => kvm,
        Err(why) => {
            println!("silicon: kernel mode: not run: {why}");
            return Ok(0);
        }
    };
    let mut native = Machine::new(&kvm)?;
    let mut soft = Machine::new(&Soft::new())?;
    let emulated = is_emulated(&mut native)?;
    if emulated {
        println!("silicon: kernel mode is emulated on this host: #UD and emulation failures are what it lacks");
    }
    let mut tallies = BTreeMap::new();
    for (index, template) in TEMPLATES.iter().enumerate() {
        if !wanted.is_empty() && !wanted.iter().any(|filter| filter == "kernel" || template.name.contains(filter)) {
            continue;
        }
        let mut tally = Tally::default();
        for round in 0..EACH {
            let mut rng = Rng::new(seed << 40 | (index as u64) << 16 | round);
            program(&mut native, &mut soft, template, &mut rng, emulated, &mut tally)?;
            if tally.differing == 3 {
                break;
            }
        }
        tallies.insert(template.name, tally);
    }
    let compared: u64 = tallies.values().map(|tally| tally.compared).sum();
    println!("silicon: {compared} kernel-mode programs of {} kinds compared", tallies.len());
    for (name, tally) in tallies.iter().filter(|(_, tally)| tally.lacking > 0) {
        println!("silicon: {name}: this host's emulator lacks it in {} of {EACH} programs", tally.lacking);
    }
    Ok(tallies.values().filter(|tally| tally.differing > 0).count())
}

fn program(
    native: &mut Machine,
    soft: &mut Machine,
    template: &Template,
    rng: &mut Rng,
    emulated: bool,
    tally: &mut Tally,
) -> Result<(), String> {
    let start = Start::random(rng, false);
    let code = template.program(rng);
    let sequence = Sequence { bytes: code, starts: vec![0] };
    let Some(reference) = run(native, &sequence, &start)? else {
        tally.lacking += 1;
        return Ok(());
    };
    let ours = match run(soft, &sequence, &start) {
        Ok(ours) => ours.ok_or_else(|| "the engine lacks an instruction".to_owned()),
        Err(error) => {
            *soft = Machine::new(&Soft::new())?;
            Err(error)
        }
    };
    let lacks = emulated && reference.vector == Some(6) && ours.as_ref().is_ok_and(|ours| ours.vector != Some(6));
    if lacks {
        tally.lacking += 1;
        return Ok(());
    }
    tally.compared += 1;
    let text = match &ours {
        Ok(ours) => differences(&reference, ours) + &memory(native.ram(), soft.ram()),
        Err(error) => format!("    soft: {error}\n"),
    };
    if !text.is_empty() {
        tally.differing += 1;
        eprintln!("silicon: {} differs [{:02x?}]\n{text}", template.name, sequence.bytes);
    }
    Ok(())
}

/// How a program ended.
#[derive(Clone, Debug)]
struct KernelEnd {
    /// The exception, when it did not come to its end.
    vector: Option<u8>,
    /// The exception's frame, error code first where there is one.
    frame: Vec<u64>,
    state: VcpuState,
}

fn run(processor: &mut Machine, sequence: &Sequence, start: &Start) -> Result<Option<KernelEnd>, String> {
    machine::build(processor.ram());
    outcome::prepare(processor.ram(), sequence, start);
    let Some((port, state)) = processor.run(&kernel_mode(start))? else { return Ok(None) };
    let mut state = comparable(state);
    if u32::from(port) == kernel::END {
        return Ok(Some(KernelEnd { vector: None, frame: Vec::new(), state }));
    }
    let vector = u8::try_from(port).map_err(|_| format!("a program ended at port {port:#x}"))?;
    let words = 5 + u64::from(machine::has_error_code(vector));
    let top = machine::KERNEL_STACK_TOP;
    let word = |index: u64| processor.ram().load::<u64>(top - index * 8).ok_or("a frame outside memory");
    let mut frame = (1..=words).rev().map(word).collect::<Result<Vec<_>, _>>()?;
    if let Some(flags) = frame.iter_mut().rev().nth(2) {
        *flags &= !outcome::RF;
    }
    // The stack pointer before is in the frame; what it is now only says how long that is.
    state.gpr[4] = 0;
    Ok(Some(KernelEnd { vector: Some(vector), frame, state }))
}

/// Whether kernel mode is an emulator's: those do not deliver software interrupts in long mode.
fn is_emulated(native: &mut Machine) -> Result<bool, String> {
    let start = Start::random(&mut Rng::new(1), false);
    let int3 = Sequence { bytes: vec![0xcc], starts: vec![0] };
    Ok(run(native, &int3, &start)?.is_none_or(|end| end.vector != Some(3)))
}

fn segment(selector: u16, base: u64, attributes: u16) -> Segment {
    Segment { selector, base, limit: 0xffff_ffff, attributes, unusable: false }
}

/// The state in which programs begin: the machine of the other passes, at privilege level 0.
fn kernel_mode(start: &Start) -> VcpuState {
    let data = |base| segment(0x10, base, 0xc093);
    let task = Segment {
        selector: machine::TSS_SELECTOR,
        base: machine::TSS,
        limit: machine::TSS_LIMIT,
        attributes: 0x8b,
        unusable: false,
    };
    let reset = VcpuState::after_reset(0);
    VcpuState {
        gpr: start.gpr,
        rip: machine::CODE,
        // Interrupts off: there is nobody to send one.
        rflags: start.rflags & !0x200,
        cr0: machine::CR0,
        cr3: machine::PML4,
        cr4: machine::CR4,
        segments: [data(0), segment(0x08, 0, 0xa09b), data(0), data(0), data(machine::FS_BASE), data(machine::GS_BASE)],
        ldtr: Segment { unusable: true, ..Segment::default() },
        tr: task,
        gdtr: Table { base: machine::GDT, limit: machine::GDT_LIMIT },
        idtr: Table { base: machine::IDT, limit: machine::IDT_LIMIT },
        msrs: Msrs { efer: machine::EFER, ..reset.msrs },
        ..reset
    }
}

/// Without what these programs do not touch or engines say differently: time, interrupts, floating point, the place of
/// the `out`, and the hidden part of unusable segments.
fn comparable(mut state: VcpuState) -> VcpuState {
    state.rip = 0;
    state.fpu = Fpu::default();
    state.lapic = Lapic::default();
    (state.msrs.tsc, state.msrs.kvm_system_time, state.msrs.kvm_wall_clock) = (0, 0, 0);
    // An engine may run on from the `out` to the halt behind it before it stops.
    (state.activity, state.interrupt_shadow) = (Activity::Running, false);
    state.rflags &= !outcome::RF;
    for segment in state.segments.iter_mut().chain([&mut state.ldtr, &mut state.tr]) {
        // KVM keeps what it likes in a null SS.
        if segment.unusable || segment.selector & !3 == 0 {
            *segment = Segment { selector: segment.selector, unusable: true, ..Segment::default() };
        }
    }
    state
}

fn differences(native: &KernelEnd, soft: &KernelEnd) -> String {
    let mut text = String::new();
    if native.vector != soft.vector || native.frame != soft.frame {
        let (a, b) = (native, soft);
        let _ = writeln!(text, "    native {:?} {:x?}\n    soft   {:?} {:x?}", a.vector, a.frame, b.vector, b.frame);
    }
    let value = |end: &KernelEnd| serde_json::to_value(&end.state).expect("a state is plain data");
    fields("", &value(native), &value(soft), &mut text);
    text
}

/// A line for each field that differs.
fn fields(path: &str, native: &Value, soft: &Value, text: &mut String) {
    match (native, soft) {
        (Value::Object(a), Value::Object(b)) => {
            for (name, value) in a {
                fields(&format!("{path}.{name}"), value, b.get(name).unwrap_or(&Value::Null), text);
            }
        }
        (Value::Array(a), Value::Array(b)) if a.len() == b.len() => {
            for (index, (a, b)) in a.iter().zip(b).enumerate() {
                fields(&format!("{path}[{index}]"), a, b, text);
            }
        }
        (Value::Number(a), Value::Number(b)) if a != b => {
            let (a, b) = (a.as_u64().unwrap_or_default(), b.as_u64().unwrap_or_default());
            let _ = writeln!(text, "    {path}  native {a:#x}  soft {b:#x}");
        }
        (a, b) if a != b => {
            let _ = writeln!(text, "    {path}  native {a}  soft {b}");
        }
        _ => {}
    }
}

fn memory(native: &GuestRam, soft: &GuestRam) -> String {
    let mut text = String::new();
    for (at, a, b) in outcome::memory_differences(native, soft).into_iter().take(4) {
        let _ = writeln!(text, "    [{at:#x}]  native {a:#018x}  soft {b:#018x}");
    }
    text
}
