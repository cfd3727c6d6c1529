//! What an access to a device costs a guest: out of guest code, to the handler and back.
//!
//! `cargo bench --bench exit_rtt`. Per engine and kind of access; the yardstick is `KVM_RUN` in a loop by hand.

#[path = "../tests/support/bare.rs"]
mod bare;
mod engines;
mod support;

use std::time::Duration;
use std::time::Instant;

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use kiln::hv::Hypervisor;

use crate::bare::Bare;
use crate::engines::leave;
use crate::engines::memory;
use crate::engines::program;
use crate::support::Sample;

const ROUNDS: usize = 20;
/// Accesses in a round.
const ACCESSES: u32 = 2000;
/// In the mapped first gigabyte, and not memory.
const DEVICE: u64 = 0x1000_0000;

type Access = fn(&mut CodeAssembler) -> Result<(), IcedError>;

fn main() {
    let kinds: [(&str, Access); 4] = [
        ("out, 4 bytes", |a| a.out(0x80, eax)),
        ("in, 4 bytes", |a| a.in_(eax, 0x80)),
        ("MMIO write, 4 bytes", |a| a.mov(dword_ptr(rbx), eax)),
        ("MMIO read, 4 bytes", |a| a.mov(eax, dword_ptr(rbx))),
    ];
    for (name, engine) in engines::engines() {
        for (kind, access) in kinds {
            let code = accesses(access);
            let mut subject = Sample::new(format!("kiln, {name}"));
            let mut yardstick = Sample::new("the kernel's calls");
            for _ in 0..ROUNDS {
                subject.add(round(&*engine, &code));
                if let Some(time) = by_hand(&code) {
                    yardstick.add(time);
                }
            }
            support::report_or_alone(&format!("exit_rtt, {kind}"), &subject, yardstick);
        }
    }
    support::note_load();
}

fn accesses(access: Access) -> Vec<u8> {
    program(|a| {
        let mut again = a.create_label();
        a.mov(rbx, DEVICE)?;
        a.mov(ecx, ACCESSES)?;
        a.set_label(&mut again)?;
        access(a)?;
        a.sub(ecx, 1)?;
        a.jne(again)?;
        leave(a)
    })
}

/// The time of one access.
fn round(engine: &dyn Hypervisor, code: &[u8]) -> Duration {
    let mut guest = Bare::enter(engine, memory(code));
    let began = Instant::now();
    guest.run().expect("the guest leaves");
    began.elapsed() / ACCESSES
}

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
fn by_hand(code: &[u8]) -> Option<Duration> {
    use engines::raw_kvm::{Controllers, RawEngine, RawKvm};

    let engine = RawEngine::new(&mut |_, _| {}).ok()?;
    let mut machine = RawKvm::new(&engine, memory(code), Controllers::Local, &mut |_, _| {}).ok()?;
    let began = Instant::now();
    machine.run().ok()?;
    Some(began.elapsed() / ACCESSES)
}

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
fn by_hand(_: &[u8]) -> Option<Duration> {
    None
}
