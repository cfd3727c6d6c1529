//! A guest that does what the test tells it: it executes a table of accesses to memory and registers, again and again.
//!
//! ```text
//!   test   script into TABLE, FLAG = 1 ------------------> waits for FLAG = 0 --> reads what was read
//!   guest  waits for FLAG --> step, step, ... END ------> FLAG = 0 ---------^
//! ```
//! A step is four words: what to do, where, a value, a mask. What a step reads takes the place of its value.
#![allow(dead_code, reason = "each test binary includes this file and uses its part")]

use std::ops::Range;
use std::time::{Duration, Instant};

use futures::FutureExt;
use iced_x86::code_asm::*;
use kiln::mem::GuestRam;
use kiln::vmm::Machine;

use crate::bare::CODE;
use crate::bare_machine::FLAG;
use crate::bare_machine::fresh;
use crate::bare_machine::program;

/// The script that the guest executes, one step after another.
pub(crate) const TABLE: u64 = 0x21_0000;
const STEP: u64 = 32;
/// Most steps of a script.
const STEPS_MAX: usize = 12_000;
/// Far beyond what a script takes; only a guest that hangs lets it pass.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

const END: u64 = 0;
/// Then the same for 2, 4 and 8 bytes.
const WRITE: u64 = 1;
const READ: u64 = 5;
/// Waits until 16 bits are other than the value.
const AWAIT_CHANGE: u64 = 9;
/// Waits until 32 bits have one of the mask's.
const AWAIT_BITS: u64 = 10;
/// Lets as many turns of a short loop pass.
const SPIN: u64 = 11;

/// Accesses in their order.
#[derive(Clone, Debug, Default)]
pub(crate) struct Script(Vec<[u64; 4]>);

impl Script {
    /// Writes the low `width` bytes: 1, 2, 4 or 8.
    pub(crate) fn write(&mut self, width: u32, at: u64, value: u64) -> &mut Self {
        self.step([WRITE + u64::from(width.ilog2()), at, value, 0])
    }

    /// Reads `width` bytes; [`Puppet::run`] returns what all reads found, in their order.
    pub(crate) fn read(&mut self, width: u32, at: u64) -> &mut Self {
        self.step([READ + u64::from(width.ilog2()), at, 0, 0])
    }

    /// Waits until the 16 bits at `at` are not `value`.
    pub(crate) fn await_change(&mut self, at: u64, value: u16) -> &mut Self {
        self.step([AWAIT_CHANGE, at, u64::from(value), 0])
    }

    /// Waits until the 32 bits at `at` have some of `mask`.
    pub(crate) fn await_bits(&mut self, at: u64, mask: u32) -> &mut Self {
        self.step([AWAIT_BITS, at, 0, u64::from(mask)])
    }

    /// Does nothing for so many turns.
    pub(crate) fn spin(&mut self, turns: u64) -> &mut Self {
        self.step([SPIN, 0, turns.max(1), 0])
    }

    fn step(&mut self, step: [u64; 4]) -> &mut Self {
        self.0.push(step);
        self
    }
}

/// A machine whose guest executes scripts.
#[derive(Debug)]
pub(crate) struct Puppet {
    pub(crate) machine: Machine,
}

impl Puppet {
    /// Has the guest execute `script`; what it read.
    pub(crate) async fn run(&self, script: &Script) -> Vec<u64> {
        self.begin(script);
        let done = self.finished(PATIENCE).await;
        let end = self.machine.ended().now_or_never();
        assert!(
            done,
            "the guest hangs or is gone ({end:?}); its last steps: {:x?}",
            &script.0[script.0.len().saturating_sub(6)..]
        );
        let reads = script.0.iter().enumerate().filter(|(_, step)| (READ..AWAIT_CHANGE).contains(&step[0]));
        reads.map(|(n, _)| self.load(TABLE + n as u64 * STEP + 16)).collect()
    }

    /// Has the guest begin to execute `script`.
    pub(crate) fn begin(&self, script: &Script) {
        assert!(script.0.len() < STEPS_MAX, "{} steps", script.0.len());
        let ram = self.machine.memory();
        for (n, word) in (0..).zip(script.0.iter().chain([&[END, 0, 0, 0]]).flatten()) {
            ram.store(TABLE + n * 8, *word).expect("the table is in memory");
        }
        ram.store(FLAG, 1u64).expect("in memory");
    }

    /// Waits until the guest has come to the end of its script; false if it does not within `patience`.
    pub(crate) async fn finished(&self, patience: Duration) -> bool {
        let began = Instant::now();
        while self.load(FLAG) != 0 {
            if began.elapsed() > patience || self.machine.ended().now_or_never().is_some() {
                return false;
            }
            tokio::time::sleep(Duration::from_micros(100)).await;
        }
        true
    }

    /// Whether the guest's program and page tables are what they were, and the script what it was told.
    pub(crate) fn is_intact(&self, script: &Script) -> bool {
        const PAGE_TABLES: Range<u64> = 0x1000..0x5000;
        const ACCESSED_AND_DIRTY: u64 = 0x60;
        let program = code();
        let (_, fresh) = fresh(&program);
        let entry = |ram: &GuestRam, at| ram.load::<u64>(at).expect("in memory") & !ACCESSED_AND_DIRTY;
        let mapped = PAGE_TABLES.step_by(8).all(|at| entry(self.ram(), at) == entry(&fresh, at));
        let is_told = |(at, step): (u64, &[u64; 4])| self.load(at) == step[0] && self.load(at + 8) == step[1];
        let told = (TABLE..).step_by(STEP as usize).zip(&script.0).all(is_told);
        mapped && told && (CODE..).zip(program).all(|(at, byte)| self.ram().load(at) == Some(byte))
    }

    fn load(&self, at: u64) -> u64 {
        self.machine.memory().load(at).expect("in memory")
    }

    /// The guest's memory.
    pub(crate) fn ram(&self) -> &GuestRam {
        self.machine.memory()
    }
}

/// The guest's program.
pub(crate) fn code() -> Vec<u8> {
    program(|a| {
        let (mut wait, mut next, mut done, mut end) =
            (a.create_label(), a.create_label(), a.create_label(), a.create_label());
        a.set_label(&mut wait)?;
        a.pause()?;
        a.cmp(qword_ptr(FLAG), 0)?;
        a.je(wait)?;
        a.mov(rsi, TABLE)?;
        a.set_label(&mut next)?;
        a.mov(rax, qword_ptr(rsi))?;
        a.mov(rdi, qword_ptr(rsi + 8))?;
        a.mov(rbx, qword_ptr(rsi + 16))?;
        a.cmp(rax, END as i32)?;
        a.je(end)?;
        // Each compares, skips, acts and goes on.
        let act =
            |a: &mut CodeAssembler, what: u64, act: &dyn Fn(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>| {
                let mut other = a.create_label();
                a.cmp(rax, what as i32)?;
                a.jne(other)?;
                act(a)?;
                a.jmp(done)?;
                a.set_label(&mut other)?;
                // An instruction has one label, and the next may be another's.
                a.nop()
            };
        act(a, WRITE, &|a| a.mov(byte_ptr(rdi), bl))?;
        act(a, WRITE + 1, &|a| a.mov(word_ptr(rdi), bx))?;
        act(a, WRITE + 2, &|a| a.mov(dword_ptr(rdi), ebx))?;
        act(a, WRITE + 3, &|a| a.mov(qword_ptr(rdi), rbx))?;
        act(a, READ, &|a| a.movzx(ebx, byte_ptr(rdi)))?;
        act(a, READ + 1, &|a| a.movzx(ebx, word_ptr(rdi)))?;
        act(a, READ + 2, &|a| a.mov(ebx, dword_ptr(rdi)))?;
        act(a, READ + 3, &|a| a.mov(rbx, qword_ptr(rdi)))?;
        act(a, AWAIT_CHANGE, &|a| {
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            a.pause()?;
            a.cmp(word_ptr(rdi), bx)?;
            a.je(again)
        })?;
        act(a, AWAIT_BITS, &|a| {
            let mut again = a.create_label();
            a.mov(rcx, qword_ptr(rsi + 24))?;
            a.set_label(&mut again)?;
            a.pause()?;
            a.mov(edx, dword_ptr(rdi))?;
            a.test(edx, ecx)?;
            a.je(again)
        })?;
        act(a, SPIN, &|a| {
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            a.dec(rbx)?;
            a.jne(again)
        })?;
        a.set_label(&mut done)?;
        a.mov(qword_ptr(rsi + 16), rbx)?;
        a.add(rsi, STEP as i32)?;
        a.jmp(next)?;
        a.set_label(&mut end)?;
        a.mov(qword_ptr(FLAG), 0)?;
        a.jmp(wait)
    })
}
