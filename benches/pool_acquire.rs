//! How long a user waits for a VM of a pool: one that is idle, one that has to be started, and one of four among sixteen
//! users. The reference is a start without a pool.
//!
//! `cargo bench --bench pool_acquire`. Guests of 128 MiB with busybox, whose image is baked. Each of the sixteen users runs
//! `/bin/echo x` in its VM and gives it back, twenty times.

mod support;

use std::time::Duration;
use std::time::Instant;

use futures::future::join_all;
use kiln::Image;
use kiln::Pool;
use kiln::PoolBuilder;
use kiln::PoolStats;
use kiln::VmConfig;
use kiln::units::Bytes;

use crate::support::Sample;

const MEMORY: Bytes = Bytes::mib(128);
const ROUNDS: usize = 100;
const USERS: usize = 16;
const TURNS: usize = 20;
const VMS: usize = 4;
/// Between two looks at a pool that is getting ready.
const POLL: Duration = Duration::from_micros(500);

#[tokio::main]
async fn main() {
    support::kernel();
    let image = Image::from_oci_layout(support::busybox_layout()).await.expect("the layout is ours");
    image.bake(config()).await.expect("bakes");
    support::note_load();
    // The first is not counted.
    start(&image).await;
    let mut alone = Sample::new("kiln, start");
    for _ in 0..ROUNDS {
        alone.add(start(&image).await);
    }
    let alone = [alone];

    let idle = one_after_another("kiln, idle", pool(&image).min(1).max(2), |stats| stats.idle == 1).await;
    let empty = one_after_another("kiln, none there", pool(&image).min(0).max(1), |_| true).await;
    for sample in [&idle, &empty] {
        support::report("acquire, one user", sample, &alone);
    }
    let contended = pool(&image).min(VMS).max(VMS);
    let (fresh, fresh_rate) = crowd("kiln, fresh VMs", contended.clone()).await;
    let (reused, reused_rate) = crowd("kiln, reused VMs", contended.restore_on_release(false)).await;
    for sample in [&fresh, &reused] {
        support::report(&format!("acquire, {USERS} users of {VMS} VMs"), sample, &alone);
    }
    support::note(&format!("users served: {fresh_rate:.0}/s with fresh VMs, {reused_rate:.0}/s with reused ones"));
    support::report_tail("acquire", &[&alone[0], &idle, &empty, &fresh, &reused]);
}

fn config() -> VmConfig {
    VmConfig::new().memory(MEMORY)
}

fn pool(image: &Image) -> PoolBuilder {
    image.pool().config(config())
}

async fn start(image: &Image) -> Duration {
    let began = Instant::now();
    let vm = image.start(config()).await.expect("restores");
    let time = began.elapsed();
    vm.shutdown().await.expect("stops");
    time
}

/// Acquires once the pool is `ready` and no VM is on its way in or out.
async fn one_after_another(name: &str, pool: PoolBuilder, ready: impl Fn(&PoolStats) -> bool) -> Sample {
    let pool = pool.build().await.expect("a pool");
    let mut sample = Sample::new(name);
    for round in 0..=ROUNDS {
        let at_rest = |stats: PoolStats| stats.starting + stats.stopping + stats.in_use == 0 && ready(&stats);
        while !at_rest(pool.stats()) {
            tokio::time::sleep(POLL).await;
        }
        let began = Instant::now();
        let vm = pool.acquire().await.expect("a VM");
        let time = began.elapsed();
        drop(vm);
        if round > 0 {
            sample.add(time);
        }
    }
    pool.shutdown().await;
    sample
}

/// What the users waited each time, and how many were served in a second.
async fn crowd(name: &str, pool: PoolBuilder) -> (Sample, f64) {
    let pool = pool.build().await.expect("a pool");
    let began = Instant::now();
    let waits = join_all((0..USERS).map(|_| tokio::spawn(user(pool.clone())))).await;
    let took = began.elapsed();
    pool.shutdown().await;
    let mut sample = Sample::new(name);
    waits.into_iter().flat_map(|user| user.expect("no user panics")).for_each(|wait| sample.add(wait));
    (sample, (USERS * TURNS) as f64 / took.as_secs_f64())
}

async fn user(pool: Pool) -> Vec<Duration> {
    let mut waits = Vec::new();
    for _ in 0..TURNS {
        let began = Instant::now();
        let vm = pool.acquire().await.expect("a VM");
        waits.push(began.elapsed());
        support::first_byte(vm.exec_builder()).await;
    }
    waits
}
