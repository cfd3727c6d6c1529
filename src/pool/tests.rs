//! Pools of pretended resources under paused time: the same each run, and without a guest.

mod random;
mod world;

use std::future::Future;
use std::time::Duration;

use futures::FutureExt;
use tokio::time::Instant;

use super::core::Core;
use super::core::Refusal;
use super::core::Settings;
use super::lease::Lease;
use super::stats::PoolStats;
use world::Fake;
use world::Refused;
use world::World;
use world::settle;

type Acquired = Result<Lease<Fake>, Refusal<Refused>>;

/// Two to four, which are not reused; a second idle, ten seconds for an acquire.
const RULES: Settings = Settings {
    min: 2,
    max: 4,
    idle_timeout: Duration::from_secs(1),
    acquire_timeout: Duration::from_secs(10),
    grace: Duration::from_secs(3),
    reuse: false,
    parallel: 2,
};

/// Runs `test` under paused time; time goes on only when nothing else can.
fn paused<F: Future>(test: F) -> F::Output {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    runtime.expect("a runtime").block_on(test)
}

/// A pool whose first ones are there.
async fn open(settings: Settings) -> (World, Core<Fake>) {
    let world = World::new();
    let (core, built) = world.open(settings);
    let building = world.serve_starts();
    built.await.expect("the driver is there").expect("starts succeed");
    drop(building);
    settle().await;
    (world, core)
}

fn now(stats: PoolStats) -> (usize, usize, usize, usize) {
    (stats.idle, stats.starting, stats.in_use, stats.stopping)
}

#[test]
fn the_first_starts_alone_and_the_rest_within_the_limit() {
    paused(async {
        let world = World::new();
        let (core, mut built) = world.open(Settings { min: 4, ..RULES });
        settle().await;
        assert_eq!(world.starts(), 1);
        world.start_ends(true);
        settle().await;
        assert_eq!(world.starts(), 2, "as many as the host has processors");
        world.start_ends(true);
        settle().await;
        world.start_ends(true);
        settle().await;
        assert!((&mut built).now_or_never().is_none(), "one is missing");
        world.start_ends(true);
        settle().await;
        assert!(matches!(built.now_or_never(), Some(Ok(Ok(())))));
        assert_eq!(now(core.stats()), (4, 0, 0, 0));
    });
}

#[test]
fn a_first_start_that_fails_is_the_builders() {
    paused(async {
        let world = World::new();
        let (core, built) = world.open(RULES);
        settle().await;
        world.start_ends(false);
        assert!(matches!(built.await, Ok(Err(Refused))));
        core.shutdown().await;
        assert_eq!((world.alive(), world.starts()), (0, 0));
    });
}

#[test]
fn a_builder_that_is_cancelled_leaves_nothing() {
    paused(async {
        let world = World::new();
        let (core, built) = world.open(RULES);
        settle().await;
        world.start_ends(true);
        settle().await;
        assert_eq!((world.alive(), world.starts()), (1, 1));
        drop((core, built));
        settle().await;
        world.assert_over();
    });
}

#[test]
fn an_idle_one_is_handed_out_at_once_and_replaced_when_it_comes_back() {
    paused(async {
        let (world, core) = open(RULES).await;
        let lease = core.acquire().now_or_never().expect("at once").expect("there are two");
        let first = lease.get().number();
        assert_eq!(now(core.stats()), (1, 0, 1, 0));
        settle().await;
        assert_eq!(world.starts(), 0, "in use counts");
        drop(lease);
        assert_eq!(now(core.stats()), (1, 0, 0, 1));
        settle().await;
        world.start_ends(true);
        settle().await;
        assert_eq!(now(core.stats()), (2, 0, 0, 0));
        let stats = core.stats();
        assert_eq!((stats.started, stats.handed_out, stats.discarded, stats.crashed), (3, 1, 1, 0));
        let both = [core.try_acquire().expect("idle"), core.try_acquire().expect("idle")];
        assert!(both.iter().all(|lease| lease.get().number() != first));
        assert!(core.try_acquire().is_none());
    });
}

#[test]
fn reused_it_goes_to_the_next() {
    paused(async {
        let (world, core) = open(Settings { min: 1, max: 1, reuse: true, ..RULES }).await;
        let lease = core.acquire().await.expect("idle");
        let number = lease.get().number();
        let next = core.acquire();
        tokio::pin!(next);
        assert!((&mut next).now_or_never().is_none());
        drop(lease);
        let lease = next.await.expect("it is free");
        assert_eq!((lease.get().number(), world.starts()), (number, 0));
        lease.discard();
        settle().await;
        assert_eq!(world.starts(), 1, "discarded is discarded");
        world.start_ends(true);
        settle().await;
        let lease = core.try_acquire().expect("idle");
        assert_ne!(lease.get().number(), number);
        // Ended while in use.
        lease.get().crash();
        drop(lease);
        settle().await;
        assert_eq!((world.starts(), core.stats().crashed, core.stats().discarded), (1, 1, 1));
    });
}

#[test]
fn the_queue_is_served_in_order_and_each_waiter_has_one_start() {
    paused(async {
        let (world, core) = open(Settings { min: 0, max: 3, ..RULES }).await;
        let mut queue: Vec<_> = (0..5).map(|_| Box::pin(core.acquire())).collect();
        for acquire in &mut queue {
            assert!(acquire.now_or_never().is_none());
        }
        settle().await;
        assert_eq!((world.starts(), core.stats().waiting), (3, 5), "no more than may exist");
        // The second gives up, the first start fails and the others succeed.
        drop(queue.remove(1));
        world.start_ends(false);
        settle().await;
        let refused = (&mut queue[0]).now_or_never();
        assert!(matches!(refused, Some(Err(Refusal::Failed(Refused)))), "the first is told");
        drop(queue.remove(0));
        assert_eq!((world.starts(), core.stats().waiting), (3, 3));
        let mut leases = Vec::new();
        for _ in 0..3 {
            world.start_ends(true);
            settle().await;
            leases.push(queue.remove(0).now_or_never().expect("its turn").expect("a lease"));
            assert!(queue.iter_mut().all(|acquire| acquire.now_or_never().is_none()));
        }
        assert_eq!(now(core.stats()), (0, 0, 3, 0));
    });
}

#[test]
fn what_was_on_its_way_to_one_who_left_goes_to_the_next_as_fresh_as_it_was() {
    paused(async {
        let (world, core) = open(Settings { min: 0, max: 1, ..RULES }).await;
        let mut queue: Vec<_> = (0..3).map(|_| Box::pin(core.acquire())).collect();
        for acquire in &mut queue {
            assert!(acquire.now_or_never().is_none());
        }
        settle().await;
        world.start_ends(true);
        settle().await;
        assert_eq!(core.stats().waiting, 2, "the first has an answer, and has not looked");
        drop(queue.remove(0));
        settle().await;
        assert_eq!((core.stats().waiting, core.stats().discarded), (1, 0));
        let lease = queue.remove(0).now_or_never().expect("the same").expect("a lease");
        assert_eq!((world.made(), core.stats().handed_out), (1, 1));
        drop(lease);
        settle().await;
        world.start_ends(true);
        settle().await;
        // Nobody is left to have it.
        drop(queue);
        settle().await;
        assert_eq!((now(core.stats()), core.stats().discarded), ((1, 0, 0, 0), 1));
    });
}

#[test]
fn an_acquire_has_a_deadline_also_for_a_start() {
    paused(async {
        let (world, core) = open(Settings { min: 0, max: 1, ..RULES }).await;
        let began = Instant::now();
        assert!(matches!(core.acquire().await, Err(Refusal::Timeout)));
        assert_eq!(began.elapsed(), RULES.acquire_timeout);
        assert_eq!((core.stats().timed_out, core.stats().waiting, core.stats().starting), (1, 0, 1));
        world.start_ends(true);
        settle().await;
        assert_eq!(core.stats().idle, 1, "the start was not in vain");
    });
}

#[test]
fn idle_ones_that_end_are_replaced_and_never_handed_out() {
    paused(async {
        let (world, core) = open(RULES).await;
        world.crash_all();
        // Before the driver had a turn.
        assert!(core.try_acquire().is_none());
        settle().await;
        let stats = core.stats();
        assert_eq!((stats.crashed, stats.idle, world.alive()), (2, 0, 0));
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert_eq!(world.starts(), 2);
        world.start_ends(true);
        settle().await;
        // Watched, with nobody asking.
        let rested = Instant::now();
        world.crash_all();
        settle().await;
        assert_eq!((core.stats().crashed, core.stats().idle), (3, 0));
        while world.starts() < 2 {
            settle().await;
        }
        assert!(rested.elapsed() >= Duration::from_millis(100), "no hot loop");
    });
}

#[test]
fn starts_that_nobody_waits_for_are_tried_again_after_longer_and_longer_rests() {
    paused(async {
        let (world, core) = open(RULES).await;
        drop((core.try_acquire(), core.try_acquire()));
        settle().await;
        let began = Instant::now();
        let mut failed = 0;
        while began.elapsed() < Duration::from_secs(60) {
            while world.start_ends(false) {
                failed += 1;
            }
            settle().await;
        }
        assert!((6..30).contains(&failed), "{failed} starts in a minute");
        assert_eq!(core.stats().failed_starts, failed);
        // Somebody who waits does not wait for the rest.
        while world.start_ends(false) {}
        settle().await;
        assert!(core.acquire().now_or_never().is_none());
        let acquire = core.acquire();
        tokio::pin!(acquire);
        assert!((&mut acquire).now_or_never().is_none());
        settle().await;
        assert!(world.start_ends(true), "a start at once");
        assert!(acquire.await.is_ok());
    });
}

#[test]
fn those_beyond_the_minimum_expire_when_they_have_been_idle_for_long_enough() {
    paused(async {
        let (world, core) = open(Settings { reuse: true, ..RULES }).await;
        let acquires = [(); 4].map(|()| core.acquire());
        let starts = world.serve_starts();
        let leases = futures::future::join_all(acquires).await;
        drop(starts);
        assert_eq!(now(core.stats()), (0, 0, 4, 0));
        drop(leases);
        settle().await;
        tokio::time::sleep(RULES.idle_timeout - Duration::from_millis(10)).await;
        assert_eq!(now(core.stats()), (4, 0, 0, 0));
        tokio::time::sleep(Duration::from_millis(20)).await;
        settle().await;
        assert_eq!((now(core.stats()), core.stats().expired), ((2, 0, 0, 0), 2));
        tokio::time::sleep(RULES.idle_timeout * 10).await;
        assert_eq!(now(core.stats()), (2, 0, 0, 0));
    });
}

#[test]
fn a_detached_one_is_replaced_and_survives_the_pool() {
    paused(async {
        let (world, core) = open(RULES).await;
        let own = core.try_acquire().expect("idle").detach();
        settle().await;
        assert_eq!(now(core.stats()), (1, 1, 0, 0));
        core.shutdown().await;
        assert_eq!(world.alive(), 1);
        drop(own);
        world.assert_over();
    });
}

#[test]
fn a_shutdown_refuses_waits_for_users_and_then_stops_them() {
    paused(async {
        let (world, core) = open(Settings { max: 3, ..RULES }).await;
        let early = core.try_acquire().expect("idle");
        let late = core.try_acquire().expect("idle");
        let waiting = core.acquire();
        tokio::pin!(waiting);
        assert!((&mut waiting).now_or_never().is_none());
        settle().await;
        let began = Instant::now();
        let mut shutdown = Box::pin(core.shutdown());
        assert!((&mut shutdown).now_or_never().is_none());
        assert!(matches!(waiting.await, Err(Refusal::Closed)));
        assert!(matches!(core.acquire().await, Err(Refusal::Closed)));
        assert!(core.try_acquire().is_none());
        // Cancelled, it goes on.
        drop(shutdown);
        drop(early);
        settle().await;
        assert_eq!((world.alive(), now(core.stats())), (1, (0, 0, 1, 0)));
        let again = futures::future::join(core.shutdown(), core.shutdown());
        again.await;
        assert!(began.elapsed() >= RULES.grace && began.elapsed() < RULES.grace + Duration::from_secs(1));
        assert!(late.get().is_stopped(), "with its user still at it");
        drop(late);
        core.shutdown().await;
        world.assert_over();
        assert_eq!(now(core.stats()), (0, 0, 0, 0));
    });
}

#[test]
fn dropping_the_pool_leaves_those_in_use_to_their_users_and_ends_its_task() {
    paused(async {
        let (world, core) = open(RULES).await;
        let lease = core.try_acquire().expect("idle");
        drop(core);
        settle().await;
        assert_eq!(world.alive(), 1);
        assert!(world.is_forgotten(), "the task is gone");
        tokio::time::sleep(RULES.grace * 2).await;
        assert!(!lease.get().is_stopped());
        drop(lease);
        world.assert_over();
    });
}

#[test]
fn a_lease_outlives_the_runtime_and_a_pool_without_one_is_closed() {
    let (world, core, lease) = paused(async {
        let (world, core) = open(RULES).await;
        let lease = core.try_acquire().expect("idle");
        (world, core, lease)
    });
    drop(lease);
    world.assert_over();
    assert!(core.try_acquire().is_none());
    let acquired: Acquired = paused(core.acquire());
    assert!(matches!(acquired, Err(Refusal::Closed)));
    paused(core.shutdown());
}

#[test]
fn a_lease_is_given_back_from_any_thread() {
    paused(async {
        let (world, core) = open(Settings { reuse: true, ..RULES }).await;
        let lease = core.try_acquire().expect("idle");
        std::thread::spawn(move || drop(lease)).join().expect("no panic outside of tokio");
        settle().await;
        assert_eq!((now(core.stats()), world.made()), ((2, 0, 0, 0), 2));
    });
}
