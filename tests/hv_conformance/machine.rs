//! Running a guest: one vCPU on the case's own thread, or several on threads of theirs.

use std::num::NonZeroU8;
use std::sync::Arc;
use std::thread;

use kiln::hv::Exit;
use kiln::hv::HvVm;
use kiln::hv::Kick;
use kiln::hv::Vcpu;
use kiln::hv::VcpuSeed;
use kiln::hv::VmSpec;
use kiln::hv::state::VcpuState;
use kiln::mem::GuestRam;
use kiln::units::VcpuId;

use crate::bench::Bench;
use crate::bench::Skip;
use crate::bus::Access;
use crate::bus::Bus;
use crate::bus::Stop;
use crate::guest::Guest;
use crate::guest::USER_END;
use crate::guest::pass_stop;
use crate::layout::STUB_BYTES;
use crate::layout::STUBS;

/// The resume flag, which a fault's frame has set.
const RF: u64 = 1 << 16;

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// The guest came to its end.
    Done,
    /// A vector that the case has no handler for.
    Trap(Trap),
    /// At a point, from which it can go on.
    Point(u64),
    /// Kicked by somebody else than the guest.
    Kicked,
    /// A triple fault.
    Shutdown,
}

/// A vector taken, and the processor before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Trap {
    pub(crate) vector: u8,
    pub(crate) error: u64,
    pub(crate) rip: u64,
    pub(crate) cs: u64,
    pub(crate) rflags: u64,
    pub(crate) rsp: u64,
    pub(crate) ss: u64,
    pub(crate) cr2: u64,
    /// Where the frame lies: the handler's stack.
    pub(crate) frame: u64,
    pub(crate) gpr: [u64; 16],
}

impl End {
    /// The trap; anything else fails the case.
    #[track_caller]
    pub(crate) fn trap(self) -> Trap {
        match self {
            Self::Trap(trap) => trap,
            other => panic!("no trap but {other:x?}"),
        }
    }

    /// The trap of one row of a table.
    #[track_caller]
    pub(crate) fn trap_of(self, row: impl FnOnce() -> String) -> Trap {
        match self {
            Self::Trap(trap) => trap,
            other => panic!("{}: no trap but {other:x?}", row()),
        }
    }

    /// Whether the guest came to its end; anything else fails the case.
    #[track_caller]
    pub(crate) fn done(self) {
        assert!(self == Self::Done, "not done but {self:x?}");
    }

    /// The point; anything else fails the case.
    #[track_caller]
    pub(crate) fn point(self) -> u64 {
        match self {
            Self::Point(point) => point,
            other => panic!("no point but {other:x?}"),
        }
    }
}

/// A machine with one vCPU on this thread.
#[derive(Debug)]
pub(crate) struct Machine {
    pub(crate) vcpu: Box<dyn Vcpu>,
    pub(crate) vm: Box<dyn HvVm>,
    pub(crate) bus: Bus,
    pub(crate) kick: Arc<dyn Kick>,
    ram: Arc<GuestRam>,
    bench: Bench,
    /// Has run, and so may wait in a stop.
    stopped: bool,
}

impl Machine {
    /// A machine that is about to execute `guest`.
    pub(crate) fn new(bench: &Bench, guest: &Guest) -> Result<Self, Skip> {
        Self::answering(bench, guest, &[])
    }

    /// The same; what the guest reads of ports and registers are `answers`.
    pub(crate) fn answering(bench: &Bench, guest: &Guest, answers: &[u64]) -> Result<Self, Skip> {
        let mut machine = Self::over(bench, &guest.ram, answers)?;
        machine.restore(&guest.state);
        Ok(machine)
    }

    /// A machine over memory that is laid out already; its vCPU is as the engine makes it.
    pub(crate) fn over(bench: &Bench, ram: &Arc<GuestRam>, answers: &[u64]) -> Result<Self, Skip> {
        let vm = create_vm(bench, ram, 1)?;
        let bus = Bus::new(vm.as_ref(), answers);
        let seed = create_vcpu(bench, vm.as_ref(), 0)?;
        let kick = seed.kicker();
        bench.watch(&kick);
        let vcpu = seed.bind(bus.handler(Arc::clone(&kick))).expect("binds");
        Ok(Self { vcpu, vm, bus, kick, ram: Arc::clone(ram), bench: bench.clone(), stopped: false })
    }

    /// Runs until something ends it, on from where it stopped last.
    pub(crate) fn run(&mut self) -> Result<End, Skip> {
        if std::mem::take(&mut self.stopped) {
            let mut state = self.state();
            pass_stop(&mut state, &self.ram);
            self.restore(&state);
        }
        self.stopped = true;
        run(&self.bench, self.vcpu.as_mut(), &self.bus, &self.ram)
    }

    pub(crate) fn state(&mut self) -> VcpuState {
        self.vcpu.save().expect("saves")
    }

    /// The state when the guest came to its end: for code of level 3, that before the trap by which it did.
    pub(crate) fn state_at_end(&mut self) -> VcpuState {
        let mut state = self.state();
        if !(STUBS..STUBS + 256 * STUB_BYTES).contains(&state.rip) {
            return state;
        }
        let trap = trap(6, &state, &self.ram);
        (state.gpr, state.rip, state.rflags) = (trap.gpr, trap.rip, trap.rflags & !RF);
        (state.segments[1].selector, state.segments[2].selector) = (trap.cs as u16, trap.ss as u16);
        state
    }

    #[track_caller]
    pub(crate) fn restore(&mut self, state: &VcpuState) {
        self.stopped = false;
        self.vcpu.restore(state).unwrap_or_else(|error| panic!("restoring: {}", crate::engines::chain(&error)));
    }

    pub(crate) fn accesses(&self) -> Vec<Access> {
        self.bus.accesses()
    }
}

/// Runs `guest` once, from its beginning to whatever ends it.
pub(crate) fn run_once(bench: &Bench, guest: &Guest) -> Result<End, Skip> {
    Machine::new(bench, guest)?.run()
}

/// Runs `guest` to its end; anything else fails the case.
#[track_caller]
pub(crate) fn run_to_end(bench: &Bench, guest: &Guest) -> Result<VcpuState, Skip> {
    let mut machine = Machine::new(bench, guest)?;
    machine.run()?.done();
    Ok(machine.state_at_end())
}

/// How one of several vCPUs ended, and its state then.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) end: Result<End, Skip>,
    pub(crate) state: VcpuState,
}

/// Runs a machine of several vCPUs, one thread each. `states` are what they begin with; `None` leaves one as the engine
/// makes it. The first that ends, however, ends the others.
pub(crate) fn run_together(bench: &Bench, guest: &Guest, states: &[Option<VcpuState>]) -> Result<Vec<Ended>, Skip> {
    let count = u8::try_from(states.len()).expect("few vCPUs");
    let vm = create_vm(bench, &guest.ram, count)?;
    let bus = Bus::new(vm.as_ref(), &[]);
    let seeds: Vec<_> = (0..count).map(|id| create_vcpu(bench, vm.as_ref(), id)).collect::<Result<_, _>>()?;
    let kicks: Vec<_> = seeds.iter().map(|seed| seed.kicker()).collect();
    kicks.iter().for_each(|kick| bench.watch(kick));
    thread::scope(|scope| {
        let threads: Vec<_> = seeds
            .into_iter()
            .zip(states)
            .enumerate()
            .map(|(index, (seed, state))| {
                let one = One { bench, bus: &bus, guest, kicks: &kicks, index };
                thread::Builder::new()
                    .name(format!("{} vCPU {index}", thread::current().name().unwrap_or_default()))
                    .spawn_scoped(scope, move || one.run(seed, state.as_ref()))
                    .expect("a thread")
            })
            .collect();
        Ok(threads.into_iter().map(|thread| thread.join().expect("the vCPU's thread did not panic")).collect())
    })
}

/// One of several vCPUs.
struct One<'a> {
    bench: &'a Bench,
    bus: &'a Bus,
    guest: &'a Guest,
    kicks: &'a [Arc<dyn Kick>],
    index: usize,
}

impl One<'_> {
    fn run(self, seed: Box<dyn VcpuSeed>, state: Option<&VcpuState>) -> Ended {
        let _others = KickOthers { kicks: self.kicks, but: self.index };
        let mut vcpu = seed.bind(self.bus.handler(Arc::clone(&self.kicks[self.index]))).expect("binds");
        if let Some(state) = state {
            vcpu.restore(state).expect("a valid state");
        }
        let end = run(self.bench, vcpu.as_mut(), self.bus, &self.guest.ram);
        Ended { end, state: vcpu.save().expect("saves") }
    }
}

/// Ends the other vCPUs' runs, also when this one's thread panics.
struct KickOthers<'a> {
    kicks: &'a [Arc<dyn Kick>],
    but: usize,
}

impl Drop for KickOthers<'_> {
    fn drop(&mut self) {
        for (_, kick) in self.kicks.iter().enumerate().filter(|(index, _)| *index != self.but) {
            kick.kick();
        }
    }
}

fn create_vm(bench: &Bench, ram: &Arc<GuestRam>, vcpus: u8) -> Result<Box<dyn HvVm>, Skip> {
    let spec = VmSpec { vcpus: NonZeroU8::new(vcpus).expect("at least one") };
    bench.hypervisor().create_vm(&spec, Arc::clone(ram)).map_err(|error| bench.refused("making a machine", &error))
}

fn create_vcpu(bench: &Bench, vm: &dyn HvVm, id: u8) -> Result<Box<dyn VcpuSeed>, Skip> {
    vm.create_vcpu(VcpuId(id)).map_err(|error| bench.refused("making a vCPU", &error))
}

fn run(bench: &Bench, vcpu: &mut dyn Vcpu, bus: &Bus, ram: &GuestRam) -> Result<End, Skip> {
    let exit = vcpu.run().map_err(|error| bench.refused("running", &error))?;
    assert!(!bench.is_over(), "no end in time");
    let stop = match exit {
        Exit::Kicked => bus.take_stop(),
        Exit::Shutdown => return Ok(End::Shutdown),
        other => panic!("unknown exit {other:?}"),
    };
    Ok(match stop {
        Some(Stop::Exit) => End::Done,
        Some(Stop::Trap(vector)) => {
            let trap = trap(vector, &vcpu.save().expect("saves"), ram);
            if is_user_end(&trap, ram) { End::Done } else { End::Trap(trap) }
        }
        Some(Stop::Point(point)) => End::Point(point),
        None => End::Kicked,
    })
}

/// Whether the trap is how code of level 3 ends a run.
fn is_user_end(trap: &Trap, ram: &GuestRam) -> bool {
    trap.vector == 6 && trap.cs & 3 == 3 && ram.load(trap.rip) == Some(USER_END)
}

/// What a stub's stack says: RAX, the error code, and the processor's own frame.
fn trap(vector: u8, state: &VcpuState, ram: &GuestRam) -> Trap {
    let stack = state.gpr[4];
    let word = |n: u64| ram.load::<u64>(stack + n * 8).expect("handlers run on stacks that are mapped one to one");
    let mut gpr = state.gpr;
    (gpr[0], gpr[4]) = (word(0), word(5));
    Trap {
        vector,
        error: word(1),
        rip: word(2),
        cs: word(3),
        rflags: word(4),
        rsp: word(5),
        ss: word(6),
        cr2: state.cr2,
        frame: stack + 16,
        gpr,
    }
}
