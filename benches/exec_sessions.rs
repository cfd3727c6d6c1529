//! How many commands a second, one after the other and many at once.
//!
//! `cargo bench --bench exec_sessions`. `/bin/true` with `output()`, under an agent that is an ordinary process on a Unix
//! socket and in a guest on the soft engine, against `tokio::process` at the same concurrency. In turns.

mod support;

use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::Instant;

use kiln::ExecBuilder;
use kiln::Image;
use kiln::VmConfig;
use kiln::units::Bytes;
use tokio::task::JoinSet;

use crate::support::Sample;
use crate::support::agent::Agent;
use crate::support::agent::host_true;

const CONCURRENCY: [usize; 3] = [1, 10, 100];
/// Commands a round.
const SESSIONS: usize = 500;
const ROUNDS: usize = 5;

#[tokio::main]
async fn main() {
    let agent = Agent::start().await;
    compare("on the host", "kiln, agent on a socket", agent.exec()).await;

    let image = Image::from_oci_layout(support::busybox_layout()).await.expect("the layout is ours");
    let vm = image.start(VmConfig::new().memory(Bytes::mib(256))).await.expect("the guest boots");
    compare("in a guest", "kiln, soft engine", vm.exec_builder()).await;
    vm.shutdown().await.expect("the guest stops");
}

async fn compare(place: &str, name: &str, exec: ExecBuilder) {
    let exec = exec.argv(["/bin/true"]);
    for concurrency in CONCURRENCY {
        let (mut subject, mut yardstick) = (Sample::new(name), Sample::new("tokio::process"));
        for round in 0..=ROUNDS {
            let command = exec.clone();
            let ours = many(concurrency, move || session(command.clone())).await;
            let theirs = many(concurrency, || async {
                host_true().await;
            })
            .await;
            // The first round warms up.
            if round > 0 {
                subject.add(ours);
                yardstick.add(theirs);
            }
        }
        let title = format!("sessions of /bin/true {place}, {concurrency} at once");
        #[allow(clippy::cast_precision_loss, reason = "exact, and a figure for people")]
        support::report_rates(&title, SESSIONS as f64, "sessions", &subject, &yardstick);
    }
}

async fn session(exec: ExecBuilder) {
    assert!(exec.output().await.expect("the agent answers").success());
}

/// Runs [`SESSIONS`] commands, `concurrency` at a time.
async fn many<F>(concurrency: usize, run: impl Fn() -> F + Clone + Send + 'static) -> Duration
where
    F: Future<Output = ()> + Send,
{
    let left = Arc::new(AtomicUsize::new(SESSIONS));
    let started = Instant::now();
    let mut workers = JoinSet::new();
    for _ in 0..concurrency {
        let (left, run) = (Arc::clone(&left), run.clone());
        workers.spawn(async move {
            while left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok() {
                run().await;
            }
        });
    }
    while let Some(worker) = workers.join_next().await {
        worker.expect("every command succeeds");
    }
    started.elapsed()
}
