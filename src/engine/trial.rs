//! A machine that is made to see whether an engine works, and how fast the guest's kernel mode is.
//!
//! ```text
//!   guest   1000 turns --out--> 2000 turns --out--> 4000 ... --out-->
//!   here              time of a round              ... enough, or the deadline: kick
//! ```
//! An exit costs microseconds, as much as hardware takes for thousands of turns, and where kernel mode is emulated a
//! thousand turns take a millisecond: so rounds double. The fastest counts, because what else the host has to do can only
//! make a round slower.

use std::num::NonZeroU8;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::obstacle::chain;
use crate::hv::HvError;
use crate::hv::Hypervisor;
use crate::hv::IoHandler;
use crate::hv::Kick;
use crate::hv::VmSpec;
use crate::hv::state::VcpuState;
use crate::hv::state::x86_64::Msrs;
use crate::hv::state::x86_64::Segment;
use crate::mem::GuestRam;
use crate::units::{Bytes, GuestAddr, VcpuId};

/// After so long the guest is stopped wherever it is.
const DEADLINE: Duration = Duration::from_millis(20);
/// After so long no further round is begun: the next would take twice as long as the last.
const ENOUGH: Duration = Duration::from_millis(5);
/// Turns of the first round...
const FIRST_TURNS: u64 = 1000;
/// ...and rounds, of which each has twice the turns of the one before.
const ROUNDS_MAX: u32 = 13;
/// Instructions of a turn.
const TURN: u64 = 2;

const MEMORY: Bytes = Bytes::mib(2);
const PAGE_TABLES: u64 = 0x1000;
const CODE: u64 = 0x1_0000;
/// ```text
///        mov r8d, 1000
/// round: mov ecx, r8d
/// turn:  dec ecx
///        jnz turn
///        out 0xf4, al
///        add r8d, r8d
///        jmp round
/// ```
const PROGRAM: [u8; 20] = [
    0x41, 0xb8, 0xe8, 0x03, 0x00, 0x00, 0x44, 0x89, 0xc1, 0xff, 0xc9, 0x75, 0xfc, 0xe6, 0xf4, 0x45, 0x01, 0xc0, 0xeb,
    0xf2,
];

/// What became of a small machine.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "snake_case", tag = "outcome")]
#[non_exhaustive]
pub enum Trial {
    /// None was made.
    #[default]
    NotTried,
    /// The engine did not open, because the host lacks something.
    Lacking {
        /// All of it, by the names that manuals use.
        what: Vec<String>,
    },
    /// It could not be made or run.
    Failed {
        /// The engine's error.
        error: String,
    },
    /// It ran.
    Ran {
        /// How long making it took, in microseconds.
        create_us: u64,
        /// How fast its kernel mode was, in million instructions a second.
        kernel_mips: f64,
    },
}

impl Trial {
    /// Tries a machine of the engine that `open` gives. Takes some 20 ms at most, of which hardware needs a few.
    pub(super) fn of(open: &dyn Fn() -> Result<Arc<dyn Hypervisor>, HvError>) -> Self {
        match open().and_then(|engine| run(&*engine)) {
            Ok(ran) => ran,
            Err(HvError::Missing { what }) => Self::Lacking { what: what.into_iter().map(str::to_owned).collect() },
            Err(error) => Self::Failed { error: chain(&error) },
        }
    }
}

/// What the guest's port hears.
#[derive(Debug)]
struct Rounds {
    began: Instant,
    round_began: Instant,
    completed: u32,
    /// The speed of the fastest one, in million instructions a second; zero before the first is completed.
    best_mips: f64,
}

#[derive(Debug)]
struct Port {
    rounds: Arc<Mutex<Rounds>>,
    kick: Arc<OnceLock<Arc<dyn Kick>>>,
}

impl IoHandler for Port {
    fn mmio_read(&mut self, _addr: GuestAddr, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn mmio_write(&mut self, _addr: GuestAddr, _data: &[u8]) {}

    fn pio_in(&mut self, _port: u16, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn pio_out(&mut self, _port: u16, _data: &[u8]) {
        let mut rounds = lock(&self.rounds);
        rounds.best_mips = rounds.best_mips.max(mips(FIRST_TURNS << rounds.completed, rounds.round_began.elapsed()));
        rounds.completed += 1;
        let enough = rounds.completed >= ROUNDS_MAX || rounds.began.elapsed() >= ENOUGH;
        rounds.round_began = Instant::now();
        drop(rounds);
        if enough && let Some(kick) = self.kick.get() {
            kick.kick();
        }
    }
}

fn run(engine: &dyn Hypervisor) -> Result<Trial, HvError> {
    let ram = Arc::new(memory()?);
    let began = Instant::now();
    let vm = engine.create_vm(&VmSpec { vcpus: NonZeroU8::MIN }, ram)?;
    let seed = vm.create_vcpu(VcpuId(0))?;
    let create_us = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
    let kick = seed.kicker();
    let now = Instant::now();
    let rounds = Arc::new(Mutex::new(Rounds { began: now, round_began: now, completed: 0, best_mips: 0.0 }));
    let handler = Port { rounds: Arc::clone(&rounds), kick: Arc::new(OnceLock::from(Arc::clone(&kick))) };
    let mut vcpu = seed.bind(Box::new(handler))?;
    vcpu.restore(&entry())?;
    let (done, ended) = channel::<()>();
    thread::scope(|scope| {
        thread::Builder::new()
            .name("trial-deadline".to_owned())
            .spawn_scoped(scope, move || {
                if ended.recv_timeout(DEADLINE) == Err(RecvTimeoutError::Timeout) {
                    kick.kick();
                }
            })
            .map_err(|source| HvError::Call { call: "making a thread", source })?;
        let began = Instant::now();
        {
            let mut rounds = lock(&rounds);
            (rounds.began, rounds.round_began) = (began, began);
        }
        let exit = vcpu.run();
        drop(done);
        exit?;
        let rounds = lock(&rounds);
        // When not even one round was completed it was slower than that.
        let kernel_mips = if rounds.completed > 0 { rounds.best_mips } else { mips(FIRST_TURNS, began.elapsed()) };
        Ok(Trial::Ran { create_us, kernel_mips })
    })
}

/// Million instructions a second.
fn mips(turns: u64, took: Duration) -> f64 {
    // No round takes less than a nanosecond.
    (turns * TURN) as f64 / took.as_secs_f64().max(1e-9) / 1e6
}

fn lock(rounds: &Mutex<Rounds>) -> MutexGuard<'_, Rounds> {
    rounds.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The program, and page tables that map the first 2 MiB to itself.
fn memory() -> Result<GuestRam, HvError> {
    let ram = GuestRam::new(MEMORY)
        .map_err(|error| HvError::Call { call: "mapping memory", source: std::io::Error::other(error) })?;
    let tables = [(0, (PAGE_TABLES + 0x1000) | 3), (0x1000, (PAGE_TABLES + 0x2000) | 3), (0x2000, 0x83u64)];
    for (at, entry) in tables {
        // All of it lies in the memory just made.
        let _ = ram.store(PAGE_TABLES + at, entry);
    }
    for (at, byte) in (CODE..).zip(PROGRAM) {
        let _ = ram.store(at, byte);
    }
    Ok(ram)
}

/// 64-bit mode at privilege level 0, flat segments, interrupts off.
fn entry() -> VcpuState {
    let code = Segment { selector: 0x10, base: 0, limit: u32::MAX, attributes: 0xa09b, unusable: false };
    let data = Segment { selector: 0x18, base: 0, limit: u32::MAX, attributes: 0xc093, unusable: false };
    let reset = VcpuState::after_reset(0);
    VcpuState {
        rip: CODE,
        cr0: 0x8005_0033,
        cr3: PAGE_TABLES,
        cr4: 0x20,
        segments: [data, code, data, data, data, data],
        ldtr: Segment { unusable: true, ..Segment::default() },
        tr: Segment { limit: 0x67, attributes: 0x8b, ..Segment::default() },
        msrs: Msrs { efer: 0x500, ..reset.msrs },
        ..reset
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hv::soft::Soft;

    #[test]
    fn a_machine_of_a_working_engine_is_measured_and_comes_to_its_end() {
        let began = Instant::now();
        let trial = Trial::of(&|| Ok(Arc::new(Soft::new())));
        let Trial::Ran { kernel_mips, .. } = trial else { panic!("{trial:?}") };
        assert!(kernel_mips > 0.1 && kernel_mips < 1e6, "{kernel_mips}");
        // It is stopped in milliseconds; a machine that is not would run for ever.
        assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
    }

    #[test]
    fn an_engine_that_fails_says_how() {
        let failing = || Err(HvError::Unavailable(std::io::ErrorKind::PermissionDenied.into()));
        let error = "hypervisor unavailable: permission denied".to_owned();
        assert_eq!(Trial::of(&failing), Trial::Failed { error });
        let lacking = || Err(HvError::Missing { what: vec!["SSE2"] });
        assert_eq!(Trial::of(&lacking), Trial::Lacking { what: vec!["SSE2".to_owned()] });
    }

    #[test]
    fn a_turn_is_two_instructions() {
        assert_eq!(mips(1_000_000, Duration::from_millis(1)).round(), 2000.0);
        assert!(mips(1, Duration::ZERO).is_finite());
    }
}
