//! The fake's workload, sound or with one fault.

use std::collections::VecDeque;
use std::io;
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Child;
use std::process::Command;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::Condvar;
use std::sync::Mutex;
use std::thread;
use std::time::Duration;
use std::time::Instant;

use kiln_wire::control::Control;
use kiln_wire::control::ControlAck;
use kiln_wire::exit::Exit;
use kiln_wire::failure::Failure;
use kiln_wire::frame::Kind;
use kiln_wire::lost::Lost;

use super::Fault;
use super::Sender;
use super::kill;
use super::send;

/// Bytes that are kept.
const KEPT: u64 = 256 << 10;

/// How long others may hold the outputs.
const DRAIN: Duration = Duration::from_millis(100);

const ESRCH: i32 = 3;
const EBUSY: i32 = 16;
const EINVAL: i32 = 22;

/// The workload that all connections share.
#[derive(Clone, Default)]
pub(crate) struct Workload(Arc<Mutex<Option<Arc<Run>>>>);

struct Run {
    number: u64,
    pid: u32,
    began: Instant,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    pieces: VecDeque<(Kind, Vec<u8>)>,
    start: u64,
    end: u64,
    /// Outputs that are still open.
    open: u8,
    ended: bool,
    code: Option<u32>,
}

fn refused(errno: i32) -> ControlAck {
    ControlAck { errno: Some(errno), ..ControlAck::refused("refused") }
}

impl Workload {
    /// Does `action` if it is one of the workload's: the answer, and what follows it.
    pub(crate) fn act(&self, action: &Control, fault: Fault) -> Option<(ControlAck, Option<Following>)> {
        Some(match action {
            Control::WorkloadStart { argv, env, cwd, .. } => {
                if self.running().is_some() && fault != Fault::StartsTwice {
                    return Some((refused(EBUSY), None));
                }
                let mut command = Command::new(argv.first()?);
                command.args(&argv[1..]).envs(env).process_group(0);
                command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
                (self.start(command, cwd.as_deref(), fault), None)
            }
            Control::Signal { signum, run } => {
                match self.running().filter(|found| run.is_none_or(|run| run == found.number)) {
                    None => (refused(ESRCH), None),
                    Some(run) => {
                        let whom = if fault == Fault::WorkloadSignalsLeaderOnly {
                            run.pid.to_string()
                        } else {
                            format!("-{}", run.pid)
                        };
                        kill(&signum.to_string(), &whom);
                        (run.ack(), None)
                    }
                }
            }
            Control::WorkloadLogs { run, from } => self.follow(*run, Some(from.unwrap_or(0)), fault),
            Control::WorkloadWait { run } => self.follow(*run, None, fault),
            _ => return None,
        })
    }

    fn last(&self) -> Option<Arc<Run>> {
        self.0.lock().expect("no thread panics").clone()
    }

    fn running(&self) -> Option<Arc<Run>> {
        self.last().filter(|run| !run.state.lock().expect("no thread panics").ended)
    }

    fn start(&self, mut command: Command, cwd: Option<&str>, fault: Fault) -> ControlAck {
        if let Some(cwd) = cwd {
            if !Path::new(cwd).is_dir() {
                return ControlAck::refused(Failure::BadCwd(cwd.to_owned()).to_string());
            }
            command.current_dir(cwd);
        }
        let child = match command.spawn() {
            Ok(child) => child,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return ControlAck::refused(Failure::NotFound(error.to_string()).to_string());
            }
            Err(error) => return ControlAck::refused(Failure::NotExecutable(error.to_string()).to_string()),
        };
        let number = self.last().map_or(1, |run| run.number + 1);
        let state = Mutex::new(State { open: 2, ..State::default() });
        let run = Run { number, pid: child.id(), began: Instant::now(), state, changed: Condvar::new() };
        let run = Arc::new(run);
        *self.0.lock().expect("no thread panics") = Some(Arc::clone(&run));
        run.watch(child, fault);
        run.ack()
    }

    fn follow(&self, run: Option<u64>, from: Option<u64>, fault: Fault) -> (ControlAck, Option<Following>) {
        let number = run.filter(|_| fault != Fault::MixesRunsUp);
        let Some(run) = self.last().filter(|found| number.is_none_or(|number| number == found.number)) else {
            return (refused(ESRCH), None);
        };
        if from > Some(run.state.lock().expect("no thread panics").end) {
            return (refused(EINVAL), None);
        }
        let ran_ms = u64::try_from(run.began.elapsed().as_millis()).ok();
        (ControlAck { ran_ms, ..run.ack() }, Some(Following { run, next: from, fault }))
    }
}

impl Run {
    fn ack(&self) -> ControlAck {
        ControlAck { pid: Some(self.pid), run: Some(self.number), ..ControlAck::done() }
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock().expect("no thread panics"));
        self.changed.notify_all();
    }

    /// Reads the outputs and waits for the end, in threads.
    fn watch(self: &Arc<Self>, mut child: Child, fault: Fault) {
        let outputs: [(Kind, Option<Box<dyn Read + Send>>); 2] = [
            (Kind::Stdout, child.stdout.take().map(|pipe| Box::new(pipe) as _)),
            (Kind::Stderr, child.stderr.take().map(|pipe| Box::new(pipe) as _)),
        ];
        for (kind, pipe) in outputs {
            let run = Arc::clone(self);
            thread::spawn(move || {
                // An output that breaks has ended.
                let _ = pipe.map(|pipe| run.read(kind, pipe, fault));
                run.change(|state| state.open -= 1);
            });
        }
        let run = Arc::clone(self);
        thread::spawn(move || {
            let status = child.wait().expect("our child");
            let code = status.code().or(status.signal().map(|signal| 128 + signal)).unwrap_or_default();
            let state = run.state.lock().expect("no thread panics");
            let waited = run.changed.wait_timeout_while(state, DRAIN, |state| state.open > 0);
            drop(waited);
            run.change(|state| (state.ended, state.code) = (true, u32::try_from(code).ok()));
        });
    }

    fn read(&self, kind: Kind, mut pipe: impl Read, fault: Fault) -> io::Result<()> {
        let mut buffer = vec![0; 16 << 10];
        loop {
            let read = pipe.read(&mut buffer)?;
            if read == 0 {
                return Ok(());
            }
            if fault == Fault::HoldsWorkloadUp && self.state.lock().expect("no thread panics").end >= KEPT {
                // As an agent would whose buffer is full and whose reader does not read.
                loop {
                    thread::park();
                }
            }
            self.change(|state| {
                state.pieces.push_back((kind, buffer[..read].to_vec()));
                state.end += read as u64;
                while state.end - state.start > KEPT
                    && let Some((_, oldest)) = state.pieces.pop_front()
                {
                    state.start += oldest.len() as u64;
                }
            });
        }
    }
}

/// A host's way through a run.
pub(crate) struct Following {
    run: Arc<Run>,
    next: Option<u64>,
    fault: Fault,
}

impl Following {
    pub(crate) fn group(&self) -> u32 {
        self.run.pid
    }

    /// Sends everything up to the end.
    pub(crate) fn send(mut self, sender: &Sender) -> io::Result<()> {
        let mut state = self.run.state.lock().expect("no thread panics");
        loop {
            let frames = self.next.as_mut().map(|next| pieces(&state, next, self.fault)).unwrap_or_default();
            if let (true, Some(code)) = (frames.is_empty(), state.code) {
                drop(state);
                return send(sender, Kind::Exit, Exit { code, peak_rss_kib: None }.encode());
            }
            if frames.is_empty() {
                state = self.run.changed.wait(state).expect("no thread panics");
                continue;
            }
            drop(state);
            for (kind, bytes) in frames {
                send(sender, kind, bytes)?;
            }
            state = self.run.state.lock().expect("no thread panics");
        }
    }
}

/// The frames from `next` on, which is then behind them.
fn pieces(state: &State, next: &mut u64, fault: Fault) -> Vec<(Kind, Vec<u8>)> {
    let mut frames = Vec::new();
    if *next < state.start {
        let bytes = state.start - *next;
        *next = state.start;
        if fault != Fault::ForgetsLost {
            frames.push((Kind::Lost, Lost { bytes }.encode().to_vec()));
        }
    }
    let mut begin = state.start;
    for (kind, bytes) in &state.pieces {
        let end = begin + bytes.len() as u64;
        if *next < end {
            let skipped = usize::try_from(*next - begin).expect("within a piece");
            frames.push((*kind, bytes[skipped..].to_vec()));
            *next = end;
        }
        begin = end;
    }
    frames
}
