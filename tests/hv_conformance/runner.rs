//! Cases times engines, each on a thread of its own with a deadline, and the counts at the end.

use std::any::Any;
use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;
use std::time::Instant;

use crate::bench::Bench;
use crate::bench::Case;
use crate::bench::Outcome;
use crate::cases;
use crate::engines;
use crate::engines::Engine;
use crate::options::Options;

/// No case takes anywhere near as long, also on a busy host with a slow emulator.
const DEADLINE: Duration = Duration::from_secs(60);
/// How long a kicked vCPU may take to notice.
const GRACE: Duration = Duration::from_secs(10);

/// How a case ended under an engine.
enum Verdict {
    Passed,
    Failed(String),
    Skipped(String),
}

/// What an engine's cases came to.
#[derive(Default)]
struct Counts {
    passed: usize,
    failed: usize,
    skipped: BTreeMap<String, Vec<&'static str>>,
}

impl Counts {
    fn add(&mut self, case: &'static str, verdict: &Verdict) {
        match verdict {
            Verdict::Passed => self.passed += 1,
            Verdict::Failed(_) => self.failed += 1,
            Verdict::Skipped(why) => self.skipped.entry(why.clone()).or_default().push(case),
        }
    }

    fn skips(&self) -> usize {
        self.skipped.values().map(Vec::len).sum()
    }

    fn report(&self, engine: &str) {
        let ran = self.passed + self.failed;
        println!("{engine}: {ran} run, {} passed, {} failed, {} skipped", self.passed, self.failed, self.skips());
        for (why, cases) in &self.skipped {
            println!("  {} skipped: {why}\n    {}", cases.len(), cases.join(" "));
        }
    }
}

/// Runs what `options` ask for.
pub(crate) fn run(options: &Options) -> ExitCode {
    let all = engines::all();
    let engines: Vec<_> = all.iter().filter(|e| options.engine.as_deref().is_none_or(|name| name == e.name)).collect();
    if engines.is_empty() {
        let names: Vec<_> = all.iter().map(|engine| engine.name).collect();
        eprintln!("hv_conformance: there are the engines {names:?}");
        return ExitCode::from(2);
    }
    let every: Vec<Case> = cases::all().collect();
    let wanted: Vec<Case> = every.iter().copied().filter(|case| options.wants(case.name)).collect();
    if options.list {
        wanted.iter().for_each(|case| println!("{}: test", case.name));
        return ExitCode::SUCCESS;
    }
    println!("\nrunning {} cases on {} engines", wanted.len(), engines.len());
    let started = Instant::now();
    let counts: Vec<_> = engines.iter().map(|engine| (engine.name, run_on(engine, &wanted))).collect();
    println!();
    counts.iter().for_each(|(engine, counts)| counts.report(engine));
    let filtered = (every.len() - wanted.len()) * engines.len();
    summary(counts.iter().map(|(_, counts)| counts), filtered, started.elapsed())
}

/// The line that `cargo test` ends a test program with; a skip counts as ignored there.
fn summary<'a>(counts: impl Iterator<Item = &'a Counts>, filtered: usize, took: Duration) -> ExitCode {
    let (passed, failed, ignored) = counts.fold((0, 0, 0), |(passed, failed, ignored), counts| {
        (passed + counts.passed, failed + counts.failed, ignored + counts.skips())
    });
    let word = if failed == 0 { "ok" } else { "FAILED" };
    println!(
        "\ntest result: {word}. {passed} passed; {failed} failed; {ignored} ignored; 0 measured; {filtered} filtered \
         out; finished in {:.2}s\n",
        took.as_secs_f64()
    );
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn run_on(engine: &Engine, cases: &[Case]) -> Counts {
    let mut counts = Counts::default();
    if let Err(why) = &engine.hypervisor {
        println!("test {}: all {} cases ... skipped: {why}", engine.name, cases.len());
        cases.iter().for_each(|case| counts.add(case.name, &Verdict::Skipped(why.clone())));
        return counts;
    }
    let bench = Bench::new(engine.clone());
    for case in cases {
        let started = Instant::now();
        let verdict = judge(case, &bench.renewed());
        let told = match &verdict {
            Verdict::Passed => "ok".to_owned(),
            Verdict::Failed(why) => format!("FAILED: {why}"),
            Verdict::Skipped(why) => format!("skipped: {why}"),
        };
        println!("test {}: {} ... {told} ({} ms)", engine.name, case.name, started.elapsed().as_millis());
        counts.add(case.name, &verdict);
    }
    counts
}

/// Runs a case on its own thread, so that a panic or a vCPU that does not come back fails the case and no other.
fn judge(case: &Case, bench: &Bench) -> Verdict {
    let (end, ended) = mpsc::channel();
    let (run, on) = (case.run, bench.clone());
    let name = format!("{}: {}", bench.engine_name(), case.name);
    let thread = thread::Builder::new().name(name).spawn(move || {
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| run(&on)));
        // Nobody listens any more if it came too late.
        let _ = end.send(outcome);
    });
    let thread = thread.expect("a thread");
    let outcome = ended.recv_timeout(DEADLINE).or_else(|_| {
        bench.expire();
        ended.recv_timeout(GRACE)
    });
    let Ok(outcome) = outcome else {
        // The thread cannot be ended; it goes with the process.
        return Verdict::Failed("no end in time, and a kick did not end it".to_owned());
    };
    thread.join().expect("panics are caught");
    verdict(outcome, bench)
}

fn verdict(outcome: thread::Result<Outcome>, bench: &Bench) -> Verdict {
    match outcome {
        Ok(Ok(())) => Verdict::Passed,
        Ok(Err(skip)) if bench.is_soft() => Verdict::Failed(format!("{}; this engine may skip nothing", skip.0)),
        Ok(Err(skip)) => Verdict::Skipped(skip.0),
        Err(panic) => Verdict::Failed(message(panic.as_ref())),
    }
}

fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    text.unwrap_or("a panic without a message").to_owned()
}
